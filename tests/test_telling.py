"""What those who watch over the service are told: systemd's status line, METRICS_FILE and
HEARTBEAT_URL.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

import pytest
from inside import true_name
from kit import (
    MADE_UP,
    PATIENCE_SECONDS,
    SCRIPT,
    Answer,
    Daemon,
    FakeS3,
    RawS3,
    answers,
    channel_backup,
    run_script,
    unlistable_while,
)
from kit import script as script_module
from kit.script import altered
from shared import NOWHERE, OFTEN, Env, StartedBy, done_well, ordinary, refused, staged

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kit import Lnd

FINE = Answer(etag=False)
STORED = r"stored \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, "
SECRET_PATH = "/ping/5e3cb1a0-top-secret"
KINDS = ("reading", "staging", "storing", "watching", "copying", "heartbeat", "metrics")
GAUGES = {
    "last_stored_timestamp_seconds",
    "last_seen_timestamp_seconds",
    "oldest_staged_timestamp_seconds",
    "staged",
    "last_size_bytes",
    *(f'problem{{kind="{kind}"}}' for kind in KINDS),
}
FAMILY = (
    r"# TYPE (?P<name>lnd_backup_[a-z_]+) gauge\n"
    r'((?P=name)(\{kind="[a-z]+"\})? (0|[1-9][0-9]*)\n)+'
)


@pytest.fixture
def beat() -> Iterator[FakeS3]:
    """Return a service that takes heartbeats."""
    with FakeS3(defaults={"GET": FINE, "POST": FINE}) as server:
        yield server


@pytest.fixture
def telling_env(fake_env: Env) -> Env:
    """Return the settings of the program, which looks and so reports often."""
    return fake_env | OFTEN


@pytest.fixture
def beating(telling_env: Env, beat: FakeS3, lnd: Lnd) -> Env:
    """Return the settings with a heartbeat, and let a version be on disk."""
    lnd.write()
    return telling_env | {"HEARTBEAT_URL": f"{beat.endpoint}{SECRET_PATH}"}


@pytest.fixture
def prom(telling_env: Env, tmp_path: Path) -> Path:
    """Return the metrics file that the settings name."""
    path = tmp_path / "textfile/lnd_backup.prom"
    path.parent.mkdir()
    telling_env["METRICS_FILE"] = str(path)
    return path


@pytest.fixture(autouse=True)
def impatient(started_by: StartedBy, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Shorten the pauses between attempts, and return what changes some of the constants."""

    def hurry(code: str = "", **constants: float) -> None:
        monkeypatch.setattr(script_module, "SCRIPT", SCRIPT)  # not the launcher of another call
        started_by(altered(f"import random\nrandom.uniform = lambda *_: 0.05\n{code}", **constants))

    hurry()
    return hurry


def wait_for_status(daemon: Daemon, pattern: str) -> str:
    """Block until the status was this, and return it when the whole report is over."""
    told = daemon.systemd.wait_for(f"^STATUS=({pattern})$")[1]
    daemon.wait_for_looks(1)
    return told


def metrics(path: Path) -> dict[str, int]:
    """Return the samples of a metrics file, which holds them all and nothing else."""
    text = path.read_text(encoding="ascii")
    assert re.fullmatch(f"({FAMILY})+", text)
    samples = dict(re.findall(r"^lnd_backup_(\S+) (\d+)$", text, re.MULTILINE))
    assert samples.keys() == GAUGES
    return {name: int(value) for name, value in samples.items()}


def wait_for_metrics(
    path: Path, staged: int, *kinds: str, size: int | None = None
) -> dict[str, int]:
    """Block until the file tells these figures and problems, and return all samples."""
    expected = {f'problem{{kind="{kind}"}}': int(kind in kinds) for kind in KINDS}
    expected["staged"] = staged
    if size is not None:
        expected["last_size_bytes"] = size
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not path.exists() or not expected.items() <= metrics(path).items():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    return metrics(path)


def time_of(name: str) -> int:
    """Return the time in a version's name."""
    return round(datetime.fromisoformat(name[:23]).timestamp())


# --- STATUS= ---


def test_the_status_has_no_secrets_and_no_forged_lines(
    telling_env: Env, lnd: Lnd, fake: FakeS3
) -> None:
    """What S3 answers is escaped and masked."""
    said = f"signed with {MADE_UP.secret_key},&#10;STATUS=all is well \u202e"
    fake.set_default(Answer(500, body=answers.error("InternalError", said)))
    lnd.write()
    with Daemon(telling_env) as daemon:
        told = wait_for_status(daemon, "nothing stored yet, 1 staged; .*InternalError.*")
        assert r"signed with ***,\nSTATUS=all is well \u202e" in told
        assert MADE_UP.secret_key not in daemon.log + "\n".join(daemon.systemd.messages)
        lines = "\n".join(daemon.systemd.messages).split("\n")
        assert all(line.isprintable() for line in lines)


def test_systemd_is_asked_for_as_long_as_the_grace_takes(telling_env: Env) -> None:
    """It is asked with STOPPING=1, in the same message, and for a second more."""
    with Daemon(telling_env | {"SHUTDOWN_GRACE_SECONDS": "30"}) as daemon:
        daemon.begin_to_stop()
        asked = daemon.systemd.wait_for(r"^STOPPING=1\nEXTEND_TIMEOUT_USEC=(\d+)$")
        assert int(asked[1]) > 31_000_000


def test_systemd_is_told_at_an_abstract_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NOTIFY_SOCKET may begin with @: a name that is in no file system."""
    name = f"notify-{tmp_path.name}-{os.getpid()}@host"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}")
        systemd.settimeout(PATIENCE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        program.notify_systemd("READY=1")
        assert systemd.recv(100) == b"READY=1"


# --- METRICS_FILE ---


def test_the_metrics_tell_a_life(
    telling_env: Env,
    lnd: Lnd,
    fake: FakeS3,
    prom: Path,
    staging: Path,
    impatient: Callable[..., None],
) -> None:
    """So does the status line; and all may read the metrics, whatever the umask."""
    impatient("import os\nos.umask(0o077)")
    with Daemon(telling_env) as daemon:
        absent = rf"cannot read channel\.backup: {lnd.path}: No such .*"
        wait_for_status(daemon, f"nothing stored yet, 0 staged; {absent}")
        values = wait_for_metrics(prom, 0, "reading")
        assert stat.S_IMODE(prom.stat().st_mode) == 0o644
        assert sum(values.values()) == 1

        began = int(time.time())
        version = lnd.write(3)
        status = wait_for_status(daemon, STORED + "0 staged")
        stored = wait_for_metrics(prom, 0, size=len(version.data))
        stored_at = stored["last_stored_timestamp_seconds"]
        assert stored["oldest_staged_timestamp_seconds"] == 0
        for at in (stored_at, stored["last_seen_timestamp_seconds"]):
            assert began <= at <= time.time() + 1
        assert abs(datetime.fromisoformat(status[7:26] + "Z").timestamp() - stored_at) <= 1

        fake.set_default(answers.SLOW_DOWN)
        for count in (1, 2):
            daemon.wait_for_captured(lnd.write())
            waiting = rf"{count} staged; cannot store: s3://some-bucket/\S+: SlowDown: .*"
            assert wait_for_status(daemon, STORED + waiting)[:26] == status[:26]
        left = channel_backup(2)  # by a run long ago
        (staging.parent / "left").write_bytes(left)  # the daemon must not find half of it
        (staging.parent / "left").rename(staging / true_name(left))
        away = wait_for_metrics(prom, 3, "storing", size=len(version.data))
        oldest, _, newest = staged(staging)
        assert away["oldest_staged_timestamp_seconds"] == time_of(oldest)
        assert away["last_seen_timestamp_seconds"] == time_of(newest)
        assert away["last_stored_timestamp_seconds"] == stored_at

        fake.set_default(answers.STORED)
        daemon.wait_for_stored(lnd.written[-1], count=2)
        over = wait_for_metrics(prom, 0)
        assert over["oldest_staged_timestamp_seconds"] == 0
        assert over["last_stored_timestamp_seconds"] >= time_of(newest)


def test_a_receipt_from_the_future_is_not_told(
    fake: FakeS3, telling_env: Env, lnd: Lnd, prom: Path, staging: Path
) -> None:
    """It would hide for months that nothing is stored."""
    lnd.write()
    done_well(telling_env)
    receipt = staging / ".receipt"
    future = {"stored_at": "2099-01-01T00:00:00+00:00"}
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | future))
    fake.set_default(answers.INTERNAL_ERROR)
    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, "nothing stored yet, 1 staged; cannot store.*")
        assert wait_for_metrics(prom, 1, "storing", size=0)["last_stored_timestamp_seconds"] == 0


def test_the_metrics_are_whole_at_every_moment(telling_env: Env, lnd: Lnd, prom: Path) -> None:
    """The file is replaced, and only when something has changed: flash memory wears out."""
    version = lnd.write(3)
    with Daemon(telling_env) as daemon:
        wait_for_metrics(prom, 0, size=len(version.data))
        with prom.open(encoding="ascii") as held:
            before = prom.stat()
            old = prom.read_text(encoding="ascii")
            daemon.wait_for_looks(5)
            assert prom.stat().st_mtime_ns == before.st_mtime_ns
            newer = lnd.write(5)
            wait_for_metrics(prom, 0, size=len(newer.data))
            assert prom.stat().st_ino != before.st_ino
            assert held.read() == old
        prom.unlink()
        wait_for_metrics(prom, 0, size=len(newer.data))
        assert [path.name for path in prom.parent.iterdir()] == [prom.name]


def test_a_directory_of_metrics_that_vanishes(
    beating: Env, lnd: Lnd, beat: FakeS3, prom: Path
) -> None:
    """It is told once; backups and heartbeats go on, and so do the metrics when it is back."""
    with Daemon(beating | {"METRICS_FILE": str(prom)}) as daemon:
        beat.wait_for_requests(1, method="GET")
        wait_for_metrics(prom, 0)
        prom.parent.rename(prom.parent.with_name("gone"))  # in one step: a report may be under way
        lnd.write(5)
        beat.wait_for_requests(2, method="GET")
        daemon.wait_for_log(f"cannot write METRICS_FILE: {prom.parent}.*: No such file")
        newest = lnd.write(7)
        beat.wait_for_requests(3, method="GET")
        assert daemon.log.count("cannot write METRICS_FILE") == 1
        prom.parent.mkdir()
        daemon.wait_for_log("METRICS_FILE.* again")
        wait_for_metrics(prom, 0, size=len(newest.data))
        assert daemon.stop() == 0


@pytest.mark.parametrize("path", ["no such/lnd.prom", "."])
def test_metrics_that_cannot_be_made(fake_env: Env, tmp_path: Path, path: str) -> None:
    """No command is told that would take a directory away from those who use it."""
    told = refused(fake_env | {"METRICS_FILE": str(tmp_path / path)}, "METRICS_FILE")
    assert f"hint: name a file in a directory that user {os.geteuid()} may write to" in told


def test_no_metrics_in_lnds_directory(written_env: Env, lnd: Lnd) -> None:
    """A METRICS_FILE below LND's directory is wrong configuration, and nothing is written there."""
    below = lnd.directory / "data/below"
    below.mkdir(parents=True)
    before = lnd.fingerprint()
    refused(written_env | {"METRICS_FILE": str(below / "lnd.prom")}, "METRICS_FILE", args=())
    assert lnd.fingerprint() == before


# --- HEARTBEAT_URL ---


def methods(beat: FakeS3) -> list[str]:
    """Return how it was asked: by GET for a success, by POST for an alarm."""
    return [request.method for request in beat.requests]


def test_one_heartbeat_for_each_confirmed_backup(
    beating: Env, lnd: Lnd, fake: FakeS3, beat: FakeS3
) -> None:
    """There is none while the bucket does not hold the current file."""
    beating["HEARTBEAT_URL"] += "?a=1&b=%20"
    with Daemon(beating) as daemon:
        beat.wait_for_requests(1, method="GET")
        daemon.wait_for_looks(6)
        (request,) = beat.requests
        assert (request.path, request.body) == (SECRET_PATH + "?a=1&b=%20", b"")

        fake.hold()  # a newer version is staged when the receipt comes
        older = lnd.write()
        fake.wait_for_requests(2)
        newer = lnd.write()
        daemon.wait_for_captured(newer)
        fake.release()
        fake.hold()  # who was waiting is answered, who comes now waits
        daemon.wait_for_stored(older)
        fake.wait_for_requests(3)
        daemon.wait_for_looks()
        assert len(beat.requests) == 1
        fake.release()
        daemon.wait_for_stored(newer)
        beat.wait_for_requests(2, method="GET")

        fake.hold()  # the file cannot be read when the receipt comes
        last = lnd.write()
        fake.wait_for_requests(4)
        lnd.place(b"")
        daemon.wait_for_log("0 bytes cannot be a channel backup")
        fake.release()
        daemon.wait_for_stored(last)
        daemon.wait_for_looks()
        assert len(beat.requests) == 2

        daemon.wait_for_stored(lnd.write())
        beat.wait_for_requests(3, method="GET")


def test_a_heartbeat_that_hangs_delays_nothing(
    beating: Env, lnd: Lnd, beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """Versions are stored, and it stops as ever."""
    impatient(TELLING_SECONDS=1000.0, THREADS_MAX=1)
    beat.hold()
    with Daemon(beating | {"SHUTDOWN_GRACE_SECONDS": "1000"}) as daemon:
        beat.wait_for_requests(1, method="GET")
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        assert len(daemon.stored_names()) == 4
        assert len(beat.requests) == 1


MOVED = Answer(302, headers={"Location": "/elsewhere"}, etag=False)


@pytest.mark.parametrize("answer", [answers.INTERNAL_ERROR, answers.DROPPED, MOVED])
def test_a_heartbeat_that_fails_is_told_once(
    beating: Env, lnd: Lnd, fake: FakeS3, beat: FakeS3, answer: Answer
) -> None:
    """So is its end, which nobody knows while there is nothing to tell. No redirect is followed."""
    beat.set_default(answer, "GET")
    with Daemon(beating) as daemon:
        beat.wait_for_requests(4, method="GET")
        daemon.wait_for_stored(lnd.write())
        fake.set_default(answers.SLOW_DOWN)  # S3 is away, and not for long enough to alarm anybody
        daemon.wait_for_captured(lnd.write())
        wait_for_status(daemon, STORED + "1 staged; .*SlowDown.*")
        daemon.wait_for_looks()
        assert daemon.log.count("cannot reach HEARTBEAT_URL") == 1
        assert "HEARTBEAT_URL answers again" not in daemon.log
        beat.set_default(FINE, "GET")
        fake.set_default(answers.STORED)
        daemon.wait_for_log("HEARTBEAT_URL answers again, after")
        daemon.wait_for_looks()
        told = len(beat.requests)
        daemon.wait_for_looks()
        assert len(beat.requests) == told
        assert daemon.log.count("HEARTBEAT_URL answers again") == 1
        assert {(each.method, each.path) for each in beat.requests} == {("GET", SECRET_PATH)}
        assert "top-secret" not in daemon.log + "\n".join(daemon.systemd.messages)


def test_a_lasting_trouble_alarms_once(
    beating: Env, lnd: Lnd, fake: FakeS3, beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """The alarm has the reason; a success follows without a new version."""
    impatient(ALARM_SECONDS=0.5)
    beating["HEARTBEAT_URL"] += "?rid=7"
    (version,) = lnd.written
    with Daemon(beating) as daemon:
        beat.wait_for_requests(1, method="GET")
        for alarms in (1, 2):
            lnd.place(b"\x1b[31m" + os.urandom(10))
            alarm = beat.wait_for_requests(alarms, method="POST")[-1]
            assert alarm.path == SECRET_PATH + "/fail?rid=7"
            reason = f"cannot read channel.backup: {lnd.path}: 15 bytes cannot be a channel backup"
            assert reason in alarm.body.decode()
            daemon.wait_for_looks()
            assert methods(beat) == ["GET", "POST"] * alarms
            lnd.place(version.data)
            beat.wait_for_requests(alarms + 1, method="GET")
            daemon.wait_for_looks()
            assert methods(beat) == [*["GET", "POST"] * alarms, "GET"]
        assert len(fake.requests) == 1

        fake.set_default(Answer(503, body=answers.error("SlowDown", "a\u202eb&#10;c")))
        daemon.wait_for_captured(lnd.write())
        alarm = beat.wait_for_requests(3, method="POST")[-1]
        assert rb"SlowDown: a\u202eb\nc (HTTP 503)" in alarm.body
        fake.set_default(answers.STORED)
        beat.wait_for_requests(4, method="GET")


def test_an_alarm_that_cannot_be_sent_is_sent_later(
    beating: Env, beat: FakeS3, tmp_path: Path, impatient: Callable[..., None]
) -> None:
    """A staging directory that cannot be listed is one, and no success."""
    impatient(unlistable_while(tmp_path), ALARM_SECONDS=0.0)
    beat.set_default(answers.INTERNAL_ERROR, "POST")
    with Daemon(beating) as daemon:
        alarm = beat.wait_for_requests(3, method="POST")[-1]
        assert b"cannot use BACKUP_DIRECTORY" in alarm.body
        beat.set_default(FINE, "POST")
        daemon.wait_for_log("HEARTBEAT_URL.* again, after")
        told = len(beat.requests)
        daemon.wait_for_looks()
        assert methods(beat) == ["POST"] * told


def test_once_sends_a_heartbeat(
    beating: Env, lnd: Lnd, staging: Path, fake: FakeS3, beat: FakeS3
) -> None:
    """It sends none when it has not stored everything."""
    left = channel_backup(3)
    (staging / true_name(left)).write_bytes(left)
    done_well(beating)
    assert [request.path for request in beat.requests] == [SECRET_PATH]
    fake.set_default(answers.ACCESS_DENIED)
    assert run_script(beating, "once").returncode == 1
    lnd.place(b"")
    fake.set_default(answers.STORED)
    assert run_script(beating, "once").returncode == 1
    assert len(beat.requests) == 1


URLS = "ftp://{} file://{} javascript:{} {} http:{} http://user:word@{} http://{}\x01 http://{}\xe9"


@pytest.mark.parametrize("url", URLS.split())
def test_a_heartbeat_must_be_http(beating: Env, url: str) -> None:
    """Any other URL is wrong configuration, and the message names the variable and not the URL."""
    wrong = url.format(f"127.0.0.1{SECRET_PATH}")
    told = refused(beating | {"HEARTBEAT_URL": wrong}, "HEARTBEAT_URL")
    assert not re.search(r"127\.0\.0\.1|top-secret|word@", told)


def test_the_heartbeat_is_named(beating: Env) -> None:
    """It is named by its variable alone, also if its server repeats the URL."""
    with RawS3(lambda request: answers.framed([], status=f"404 no {request.path}")) as raw:
        for at, why in ((NOWHERE, "Connection refused"), (raw.endpoint, "404: no")):
            told = done_well(beating | {"HEARTBEAT_URL": at + SECRET_PATH}).stderr
            found = re.search(f"warning: cannot reach HEARTBEAT_URL: .*{why}.*\n.*hint: (.*)", told)
            assert found
            assert not re.search("staged|bucket|list shows", found[1])
            assert "top-secret" not in told


@pytest.mark.parametrize(
    ("path", "why", "method", "asked", "body"),
    [
        ("/ping/a?b=c", "", "GET", "/ping/a?b=c", b""),
        ("/ping/a?b=c", "why\nnot", "POST", "/ping/a/fail?b=c", rb"why\nnot"),
        ("/api/push/a?status=up&msg=OK", "", "GET", "/api/push/a?status=up", b""),
        ("/api/push/a", "why & not", "GET", "/api/push/a?status=down&msg=why+%26+not", b""),
    ],
    ids=["good", "fail", "kuma good", "kuma down"],
)
def test_what_a_heartbeat_asks_for(
    beat: FakeS3, path: str, why: str, method: str, asked: str, body: bytes
) -> None:
    """A bad one is a POST to /fail; a push URL of Uptime Kuma takes both in its query."""
    program.request_heartbeat(beat.endpoint + path, why)
    (request,) = beat.requests
    assert (request.method, request.path, request.body) == (method, asked, body)
    assert request.headers["user-agent"] == f"lnd-backup/{program.__version__}"


# --- What the user that runs it could read ---


@pytest.mark.parametrize("can_read", [True, False])
def test_a_secret_of_lnd_that_can_be_read_is_warned_of(
    written_env: Env, lnd: Lnd, *, can_read: bool
) -> None:
    """When the user that runs it could read LND's secrets, which it need not, the start says so."""
    lnd.leave_decoys()
    secrets = [lnd.directory / name for name in ("admin.macaroon", "wallet.db")]
    for secret in secrets:
        secret.chmod(0o400 if can_read else 0)
    with Daemon(written_env, command=[*ordinary(), sys.executable, str(SCRIPT)]) as daemon:
        told = re.findall("warning: this user can read (.*?): ", daemon.log)
        assert told == [str(secret) for secret in secrets if can_read]
