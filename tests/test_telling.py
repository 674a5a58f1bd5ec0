"""What those who watch over the service are told: systemd's status line, METRICS_FILE and
HEARTBEAT_URL.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import re
import shlex
import socket
import stat
import subprocess
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from kit import (
    PATIENCE_SECONDS,
    SCRIPT,
    VERSION_NAME,
    Answer,
    Credentials,
    Daemon,
    FakeS3,
    NotifySocket,
    Script,
    answers,
    channel_backup,
    run_script,
    settings_at,
    unlistable_while,
)
from kit import script as script_module

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kit import Lnd, Request

FINE = Answer(etag=False)
STORED = r"stored \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC, "
SECRET_PATH = "/ping/5e3cb1a0-top-secret"
SECRET_KEY = "wJalr/XUtn+FEMI"
KINDS = ("reading", "staging", "storing", "watching", "copying", "heartbeat", "metrics")
GAUGES = {
    "lnd_backup_last_stored_timestamp_seconds",
    "lnd_backup_last_seen_timestamp_seconds",
    "lnd_backup_oldest_staged_timestamp_seconds",
    "lnd_backup_staged",
    "lnd_backup_last_size_bytes",
    *(f'lnd_backup_problem{{kind="{kind}"}}' for kind in KINDS),
}
# Run before the program: start it again without root's leave to read everything.
ORDINARY = """
if os.geteuid() == 0 and "ORDINARY" not in os.environ:
    os.environ["ORDINARY"] = "yes"
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    os.execvp(drop[0], [*drop, sys.executable, *sys.orig_argv[1:]])
"""
FAMILY = re.compile(
    r"# TYPE (?P<name>lnd_backup_[a-z_]+) gauge\n"
    r'(?P<samples>((?P=name)(\{kind="[a-z]+"\})? (0|[1-9][0-9]*)\n)+)'
)


@pytest.fixture
def beat() -> Iterator[FakeS3]:
    """Return a service that takes heartbeats."""
    with FakeS3(defaults={"GET": FINE, "POST": FINE}) as server:
        yield server


@pytest.fixture
def telling_env(fake: FakeS3, lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return the settings of the program, which looks and so reports often."""
    user = Credentials("AKIDEXAMPLE", SECRET_KEY)
    often = {"RESCAN_SECONDS": "0.1"}
    return settings_at(fake.endpoint, lnd, staging, bucket="bucket", prefix="", user=user) | often


@pytest.fixture
def beating(telling_env: dict[str, str], beat: FakeS3) -> dict[str, str]:
    """Return the settings with a heartbeat."""
    return telling_env | {"HEARTBEAT_URL": f"{beat.endpoint}{SECRET_PATH}"}


@pytest.fixture
def prom(telling_env: dict[str, str], tmp_path: Path) -> Path:
    """Return the metrics file that the settings name."""
    directory = tmp_path / "textfile"
    directory.mkdir()
    telling_env["METRICS_FILE"] = str(directory / "lnd_backup.prom")
    return directory / "lnd_backup.prom"


@pytest.fixture(autouse=True)
def impatient(
    started_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Shorten the pauses between attempts, and return what changes some of the constants."""

    def hurry(code: str = "", **constants: float) -> None:
        monkeypatch.setattr(script_module, "SCRIPT", SCRIPT)  # not the launcher of another call
        started_by(f"""
import importlib.util, os, random, sys
random.uniform = lambda *_: 0.05
spec = importlib.util.spec_from_file_location("program", SCRIPT)
program = sys.modules["program"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
for name, value in {constants!r}.items():
    assert name in vars(program), name
    setattr(program, name, value)
{code}
sys.exit(program.main())
""")

    hurry()
    return hurry


def statuses(daemon: Daemon) -> list[str]:
    """Return the status lines that systemd was told."""
    return [
        line
        for line in "\n".join(daemon.systemd.messages).splitlines()
        if line.startswith("STATUS=")
    ]


def wait_for_reports(daemon: Daemon, more: int = 3) -> None:
    """Block until it has reported so often; the first report may have begun before, and is then
    over.
    """
    daemon.systemd.wait_for("^STATUS=", count=len(statuses(daemon)) + more)


def wait_for_status(daemon: Daemon, pattern: str) -> str:
    """Block until the status is this, and return it when the whole report is over."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not (told := statuses(daemon)) or not re.fullmatch(f"STATUS={pattern}", told[-1]):
        assert time.monotonic() < give_up_at, f"{pattern!r} is not the status: {told[-1:]}"
        daemon.systemd.wait_for("^STATUS=", count=len(told) + 1)
    wait_for_reports(daemon, 1)
    return told[-1].removeprefix("STATUS=")


def metrics(path: Path) -> dict[str, int]:
    """Return the samples of a metrics file by name and label, and expect it to be whole and nothing
    else in it.
    """
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():  # it is written in a thread, beside the status
        assert time.monotonic() < give_up_at
        threading.Event().wait(0.02)
    text = path.read_text(encoding="ascii")
    families = list(FAMILY.finditer(text))
    assert "".join(family[0] for family in families) == text
    samples = dict(
        line.rsplit(" ", 1) for family in families for line in family["samples"].splitlines()
    )
    assert samples.keys() == GAUGES
    assert len(families) == len(GAUGES) - len(KINDS) + 1
    return {name.removeprefix("lnd_backup_"): int(value) for name, value in samples.items()}


def problems(values: dict[str, int]) -> list[str]:
    """Return the kinds of the problems that a metrics file tells of."""
    return [kind for kind in KINDS if values[f'problem{{kind="{kind}"}}']]


def wait_for_metrics(path: Path, staged: int, *kinds: str) -> dict[str, int]:
    """Block until so many versions are staged and these problems are told, and return all samples;
    the file is written beside the status.
    """
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while (values := metrics(path))["staged"] != staged or problems(values) != [*kinds]:
        assert time.monotonic() < give_up_at, values
        time.sleep(0.01)
    return values


def times_of(staging: Path) -> list[int]:
    """Return when the staged versions were captured, oldest first."""
    names = sorted(path.name for path in staging.iterdir() if VERSION_NAME.fullmatch(path.name))
    return [
        round(datetime.strptime(name[:23], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC).timestamp())
        for name in names
    ]


def expect_secret(daemon: Daemon) -> None:
    """Expect that neither log nor systemd was told the heartbeat's URL, nor the part of it that
    matters.
    """
    told = daemon.log + "\n".join(daemon.systemd.messages)
    assert SECRET_PATH not in told
    assert "top-secret" not in told


# --- STATUS= ---


def test_the_status_tells_a_life(telling_env: dict[str, str], lnd: Lnd, fake: FakeS3) -> None:
    """The status line tells what is stored since when, what is staged and what is wrong, and when
    it is over.
    """
    with Daemon(telling_env) as daemon:
        wait_for_status(
            daemon,
            rf"nothing stored yet, 0 staged; cannot read channel\.backup: {lnd.path}: No such .*",
        )
        daemon.wait_for_stored(lnd.write())
        first = wait_for_status(daemon, STORED + "0 staged")
        assert (
            abs(datetime.fromisoformat(first[7:26] + "Z").timestamp() - time.time())
            < PATIENCE_SECONDS
        )
        fake.set_default(answers.SLOW_DOWN)
        daemon.wait_for_captured(lnd.write())
        wait_for_status(daemon, STORED + r"1 staged; cannot store: s3://bucket/\S+: SlowDown: .*")
        daemon.wait_for_captured(lnd.write())
        away = wait_for_status(
            daemon, STORED + r"2 staged; cannot store: s3://bucket/\S+: SlowDown: .*"
        )
        assert away[:26] == first[:26]
        fake.set_default(answers.STORED)
        wait_for_status(daemon, STORED + "0 staged")


def test_the_status_has_no_secrets_and_no_forged_lines(
    telling_env: dict[str, str], lnd: Lnd, fake: FakeS3
) -> None:
    """What S3 answers is escaped in the status line, and a secret in it is masked there and in the
    log.
    """
    said = f"signed with {SECRET_KEY},&#10;STATUS=all is well \u202e"
    document = f"<Error><Code>InternalError</Code><Message>{said}</Message></Error>"
    fake.set_default(Answer(500, body=document.encode()))
    lnd.write()
    with Daemon(telling_env) as daemon:
        told = wait_for_status(daemon, "nothing stored yet, 1 staged; .*InternalError.*")
        assert r"signed with ***,\nSTATUS=all is well \u202e" in told
        assert SECRET_KEY not in daemon.log + "\n".join(daemon.systemd.messages)
        assert all(line.isprintable() for line in statuses(daemon))


def test_a_path_cannot_forge_the_status(telling_env: dict[str, str], lnd: Lnd) -> None:
    """Control characters of a path, where a link leads to, are escaped in the status line."""
    os.mkfifo(lnd.directory / "a\x1b[31m\rb")
    lnd.path.symlink_to("a\x1b[31m\rb")
    with Daemon(telling_env) as daemon:
        told = wait_for_status(daemon, "nothing stored yet, 0 staged; .*regular file.*")
        assert r"a\x1b[31m\rb" in told


@pytest.mark.parametrize("grace", ["0", "7.5"])
def test_systemd_is_asked_for_as_long_as_the_grace_takes(
    telling_env: dict[str, str], lnd: Lnd, grace: str
) -> None:
    """With STOPPING=1, in the same message, comes a request for more time than the grace period and
    the second after it.
    """
    lnd.write()
    with Daemon(telling_env | {"SHUTDOWN_GRACE_SECONDS": grace}) as daemon:
        assert daemon.stop() == 0
        message = next(
            message for message in daemon.systemd.messages if "STOPPING=1" in message.splitlines()
        )
        asked = re.search(r"^EXTEND_TIMEOUT_USEC=([0-9]+)$", message, re.MULTILINE)
        assert asked
        assert int(asked[1]) > (float(grace) + 1) * 1_000_000


# --- METRICS_FILE ---


def test_the_metrics_tell_a_life(
    telling_env: dict[str, str],
    lnd: Lnd,
    fake: FakeS3,
    prom: Path,
    staging: Path,
    impatient: Callable[..., None],
) -> None:
    """Whatever the umask, all may read what is stored, seen and staged, and what is wrong."""
    impatient("os.umask(0o077)")
    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, "nothing stored yet, 0 staged; .*No such.*")
        values = wait_for_metrics(prom, 0, "reading")
        assert stat.S_IMODE(prom.stat().st_mode) == 0o644
        assert sum(values.values()) == 1

        began = int(time.time())
        version = lnd.write(3)
        wait_for_status(daemon, STORED + "0 staged")
        stored = wait_for_metrics(prom, 0)
        assert stored["oldest_staged_timestamp_seconds"] == 0
        assert stored["last_size_bytes"] == len(version.data)
        for name in ("last_stored_timestamp_seconds", "last_seen_timestamp_seconds"):
            assert began <= stored[name] <= time.time() + 1

        fake.set_default(answers.SLOW_DOWN)
        wait_for_status(daemon, STORED + "0 staged")
        for count in (1, 2):
            daemon.wait_for_captured(lnd.write())
            wait_for_status(daemon, STORED + f"{count} staged; .*SlowDown.*")
        left = channel_backup(2)  # by a run long ago
        (staging.parent / "left").write_bytes(left)  # the daemon must not find half of it
        (staging.parent / "left").rename(
            staging / f"20260101T000000.000000Z-{hashlib.sha256(left).hexdigest()[-6:]}"
        )
        wait_for_status(daemon, STORED + "3 staged; .*SlowDown.*")
        away = wait_for_metrics(prom, 3, "storing")
        oldest, _, newest = times_of(staging)
        assert away["oldest_staged_timestamp_seconds"] == oldest
        assert away["last_seen_timestamp_seconds"] == newest
        assert away["last_stored_timestamp_seconds"] == stored["last_stored_timestamp_seconds"]
        assert away["last_size_bytes"] == len(version.data)

        fake.set_default(answers.STORED)
        daemon.wait_for_stored(lnd.written[-1], count=2)
        wait_for_status(daemon, STORED + "0 staged")
        over = wait_for_metrics(prom, 0)
        assert over["oldest_staged_timestamp_seconds"] == 0
        assert over["last_stored_timestamp_seconds"] >= newest


def test_the_metrics_are_whole_at_every_moment(
    telling_env: dict[str, str], lnd: Lnd, prom: Path
) -> None:
    """The file is replaced, never written in place: who reads all the time always reads a whole
    one.
    """
    lnd.write()
    seen: set[int] = set()
    ended = threading.Event()
    faults: list[Exception] = []

    def read() -> None:
        while not ended.is_set():
            try:
                seen.add(metrics(prom)["last_size_bytes"])
            except Exception as error:  # noqa: BLE001 - it is for the test to judge
                faults.append(error)
                return

    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, STORED + "0 staged")
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for count in range(1, 9):
                with prom.open(encoding="ascii") as held:
                    before = os.fstat(held.fileno())
                    daemon.wait_for_stored(lnd.write(count))
                    wait_for_reports(daemon)
                    assert metrics(prom)["last_size_bytes"] == len(lnd.written[-1].data)
                    assert (
                        os.fstat(held.fileno()).st_size,
                        prom.stat().st_ino == before.st_ino,
                    ) == (
                        before.st_size,
                        False,
                    )
        finally:
            ended.set()
            reader.join()
    assert faults == []
    assert len(seen) > 2
    assert [path.name for path in prom.parent.iterdir()] == [prom.name]


def test_the_metrics_are_not_written_again_for_nothing(
    telling_env: dict[str, str], lnd: Lnd, prom: Path
) -> None:
    """As long as nothing changes the file stays the same, look after look: flash memory wears
    out.
    """
    lnd.write()
    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, STORED + "0 staged")
        before = prom.stat()
        daemon.wait_for_looks(5)
        wait_for_reports(daemon)
        after = prom.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_link_in_the_place_of_the_metrics_is_not_followed(
    telling_env: dict[str, str], lnd: Lnd, prom: Path
) -> None:
    """Who may write beside METRICS_FILE cannot lead the program to write elsewhere, as into LND's
    directory.
    """
    elsewhere = lnd.directory / "elsewhere"
    prom.with_name(f".{prom.name}.partial").symlink_to(elsewhere)
    lnd.write()
    assert run_script(telling_env, "once").returncode == 0
    assert not elsewhere.exists()
    assert metrics(prom)["staged"] == 0
    assert not prom.is_symlink()


def test_a_directory_of_metrics_that_vanishes(
    telling_env: dict[str, str], lnd: Lnd, prom: Path
) -> None:
    """When the metrics cannot be written it is said once, the backup goes on, and so do they when
    it is there again.
    """
    lnd.write()
    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, STORED + "0 staged")
        prom.parent.rename(prom.parent.with_name("gone"))  # in one step: a report may be under way
        daemon.wait_for_stored(lnd.write(5))
        daemon.wait_for_log(
            f"cannot write METRICS_FILE: {prom.parent}.*: No such file or directory"
        )
        daemon.wait_for_stored(lnd.write(7))
        wait_for_reports(daemon)
        assert daemon.log.count("cannot write METRICS_FILE") == 1
        prom.parent.mkdir()
        daemon.wait_for_log("METRICS_FILE.* again")
        assert metrics(prom)["last_size_bytes"] == len(lnd.written[-1].data)
        assert daemon.stop() == 0


def test_metrics_that_somebody_removed_come_back(
    telling_env: dict[str, str], lnd: Lnd, prom: Path
) -> None:
    """A metrics file that is gone, as from a directory in memory, is written again without a change
    of state.
    """
    lnd.write()
    with Daemon(telling_env) as daemon:
        wait_for_status(daemon, STORED + "0 staged")
        prom.unlink()
        wait_for_reports(daemon)
        assert metrics(prom)["last_size_bytes"] == len(lnd.written[-1].data)


def test_the_hint_for_a_missing_directory_of_metrics_mends_it(
    telling_env: dict[str, str], lnd: Lnd, tmp_path: Path
) -> None:
    """The command in the hint makes what is missing, and not a directory in place of the file."""
    lnd.write()
    telling_env["METRICS_FILE"] = str(tmp_path / "no such" / "lnd.prom")
    done = run_script(telling_env, "once")
    assert done.returncode == 78
    hint = re.search(r"hint: run: (?:sudo )?(.*)", done.stderr)
    assert hint
    subprocess.run(shlex.split(hint[1]), check=True)
    done = run_script(telling_env, "once")
    assert (done.returncode, metrics(tmp_path / "no such" / "lnd.prom")["staged"]) == (0, 0)
    assert "cannot" not in done.stderr


def test_a_directory_in_place_of_the_metrics(
    telling_env: dict[str, str], lnd: Lnd, tmp_path: Path
) -> None:
    """A METRICS_FILE that is a directory is wrong configuration."""
    lnd.write()
    done = run_script(telling_env | {"METRICS_FILE": str(tmp_path)}, "once")
    assert done.returncode == 78
    assert "METRICS_FILE" in done.stderr


@pytest.mark.parametrize("place", ["", "chan-backup-archives", "data/below"])
def test_no_metrics_in_lnds_directory(telling_env: dict[str, str], lnd: Lnd, place: str) -> None:
    """A METRICS_FILE in or below LND's directory is wrong configuration, and nothing is written
    there.
    """
    lnd.write()
    (lnd.directory / place).mkdir(parents=True, exist_ok=True)
    before = lnd.fingerprint()
    done = run_script(telling_env | {"METRICS_FILE": str(lnd.directory / place / "lnd.prom")})
    assert done.returncode == 78
    assert "METRICS_FILE" in done.stderr
    assert lnd.fingerprint() == before


# --- HEARTBEAT_URL ---


def beats(server: FakeS3, method: str = "GET") -> list[Request]:
    """Return the heartbeats that came."""
    return [request for request in server.requests if request.method == method]


def test_one_heartbeat_for_each_confirmed_backup(
    beating: dict[str, str], lnd: Lnd, fake: FakeS3, beat: FakeS3
) -> None:
    """The URL is requested once when the bucket holds the current file, and not while it does
    not.
    """
    first = lnd.write()
    beating["HEARTBEAT_URL"] += "?a=1&b=%20"
    with Daemon(beating) as daemon:
        beat.wait_for_requests(1, method="GET")
        daemon.wait_for_looks()
        wait_for_reports(daemon)
        assert [(request.path, request.body) for request in beat.requests] == [
            (SECRET_PATH + "?a=1&b=%20", b"")
        ]

        fake.hold()  # a newer version is staged when the receipt comes
        older = lnd.write()
        fake.wait_for_requests(2)
        newer = lnd.write()
        daemon.wait_for_captured(newer)
        fake.release()
        fake.hold()  # who was waiting is answered, who comes now waits
        daemon.wait_for_stored(older)
        fake.wait_for_requests(3)
        wait_for_reports(daemon)
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
        wait_for_reports(daemon)
        assert len(beat.requests) == 2

        daemon.wait_for_stored(lnd.write())
        beat.wait_for_requests(3, method="GET")
        fake.set_default(answers.SLOW_DOWN)  # S3 is away, and not for long enough to alarm anybody
        daemon.wait_for_captured(lnd.write())
        wait_for_status(daemon, STORED + "1 staged; .*SlowDown.*")
        wait_for_reports(daemon)
        assert [request.method for request in beat.requests] == ["GET"] * 3
        daemon.wait_for_stored(first)
        expect_secret(daemon)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
def test_the_heartbeat_goes_through_the_proxy(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, variable: str
) -> None:
    """The proxy that is set for the SDK is the heartbeat's as well, but not where NO_PROXY excepts
    the host.
    """
    lnd.write()
    outside = {"HEARTBEAT_URL": f"http://heartbeat.example{SECRET_PATH}", "NO_PROXY": "127.0.0.1"}
    done = run_script(beating | outside | {variable: beat.endpoint}, "once")
    assert done.returncode == 0, done.stderr
    assert [request.path for request in beat.requests] == [f"http://heartbeat.example{SECRET_PATH}"]
    assert "top-secret" not in done.stderr


def test_a_heartbeat_that_hangs_delays_nothing(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """While the heartbeat is accepted and never answered, versions are captured and stored, and it
    stops as ever.
    """
    impatient(TELLING_SECONDS=1000.0)
    beat.hold()
    lnd.write()
    with Daemon(beating | {"SHUTDOWN_GRACE_SECONDS": "1000"}) as daemon:
        beat.wait_for_requests(1, method="GET")
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.begin_to_stop()
        assert daemon.wait() == 0
        assert len(daemon.stored_names()) == 4
        assert re.search(r"stopped\b.* 0\b", daemon.log)
        assert len(beat.requests) == 1
        expect_secret(daemon)


@pytest.mark.parametrize("target", ["file", "http"])
def test_a_redirect_is_not_followed(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, target: str
) -> None:
    """Whoever answers in the heartbeat's place cannot send the request elsewhere; it is a failure,
    told as one.
    """
    with FakeS3(defaults={"GET": FINE}) as elsewhere:
        location = "file:///etc/passwd" if target == "file" else f"{elsewhere.endpoint}/x"
        beat.set_default(Answer(302, headers={"Location": location}, etag=False), "GET")
        lnd.write()
        with Daemon(beating) as daemon:
            daemon.wait_for_log("cannot .*302")
            wait_for_reports(daemon)
            expect_secret(daemon)
        assert elsewhere.requests == []
        assert {request.path for request in beat.requests} == {SECRET_PATH}


@pytest.mark.parametrize(
    "answer", [answers.INTERNAL_ERROR, Answer(404, etag=False), answers.DROPPED]
)
def test_a_heartbeat_that_fails_is_told_once(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, answer: Answer
) -> None:
    """A wrong answer is told once, however often it is tried again, and so is its end; backups go
    on meanwhile.
    """
    beat.set_default(answer, "GET")
    lnd.write()
    with Daemon(beating) as daemon:
        beat.wait_for_requests(4, method="GET")
        daemon.wait_for_stored(lnd.write())
        lines = [line for line in daemon.log.splitlines() if "cannot" in line]
        assert len(lines) == 1, lines
        beat.set_default(FINE, "GET")
        daemon.wait_for_log("HEARTBEAT_URL.* again, after")
        wait_for_reports(daemon)  # the version stored meanwhile is worth one of its own
        told = len(beat.requests)
        wait_for_reports(daemon)
        assert len(beat.requests) == told
        assert daemon.log.count(" again, after") == 1
        expect_secret(daemon)


def test_a_heartbeat_that_nobody_listens_to_is_told(beating: dict[str, str], lnd: Lnd) -> None:
    """Where nobody listens, the log says that it is the heartbeat, why, and not its URL."""
    lnd.write()
    with Daemon(beating | {"HEARTBEAT_URL": f"http://127.0.0.1:1{SECRET_PATH}"}) as daemon:
        daemon.wait_for_log("cannot .*Connection refused")
        daemon.wait_for_stored(lnd.write())
        expect_secret(daemon)


def test_a_lasting_trouble_alarms_once(
    beating: dict[str, str], lnd: Lnd, fake: FakeS3, beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """A trouble that lasts is sent to URL/fail with its reason, once; a success follows without a
    new version.
    """
    impatient(ALARM_SECONDS=0.5)
    beating["HEARTBEAT_URL"] += "?rid=7"
    version = lnd.write()
    with Daemon(beating) as daemon:
        beat.wait_for_requests(1, method="GET")
        for alarms in (1, 2):
            lnd.place(b"\x1b[31m" + os.urandom(10))
            alarm = beat.wait_for_requests(alarms, method="POST")[-1]
            assert alarm.path == SECRET_PATH + "/fail?rid=7"
            reason = alarm.body.decode()
            assert (
                f"cannot read channel.backup: {lnd.path}: 15 bytes cannot be a channel backup"
                in reason
            )
            assert reason.isprintable()
            wait_for_reports(daemon)
            assert (len(beats(beat)), len(beats(beat, "POST"))) == (alarms, alarms)
            lnd.place(version.data)
            beat.wait_for_requests(alarms + 1, method="GET")
            wait_for_reports(daemon)
            assert (len(beats(beat)), len(beats(beat, "POST"))) == (alarms + 1, alarms)
        assert len(fake.requests) == 1

        document = "<Error><Code>SlowDown</Code><Message>a\u202eb&#10;c</Message></Error>"
        fake.set_default(Answer(503, body=document.encode()))
        daemon.wait_for_captured(lnd.write())
        assert (
            rb"SlowDown: a\u202eb\nc (HTTP 503)"
            in beat.wait_for_requests(3, method="POST")[-1].body
        )
        fake.set_default(answers.STORED)
        beat.wait_for_requests(4, method="GET")
        expect_secret(daemon)


def test_an_alarm_that_cannot_be_sent_is_sent_later(
    beating: dict[str, str], beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """An alarm that the heartbeat's service refuses is tried again until it takes it."""
    impatient(ALARM_SECONDS=0.0)
    beat.set_default(answers.INTERNAL_ERROR, "POST")
    with Daemon(beating) as daemon:
        beat.wait_for_requests(3, method="POST")
        beat.set_default(FINE, "POST")
        daemon.wait_for_log("HEARTBEAT_URL.* again, after")
        told = len(beat.requests)
        wait_for_reports(daemon)
        assert len(beat.requests) == told
        expect_secret(daemon)


def test_once_sends_a_heartbeat(
    beating: dict[str, str], lnd: Lnd, fake: FakeS3, beat: FakeS3
) -> None:
    """The command once, as cron runs it, sends one when it has stored the version, and none when it
    has not.
    """
    version = lnd.write()
    assert run_script(beating, "once").returncode == 0
    assert [request.path for request in beat.requests] == [SECRET_PATH]
    fake.set_default(answers.ACCESS_DENIED)
    lnd.write()
    assert run_script(beating, "once").returncode == 1
    lnd.place(b"")
    fake.set_default(answers.STORED)
    assert run_script(beating, "once").returncode == 1
    assert len(beat.requests) == 1
    assert version.data in [request.body for request in fake.requests]


def test_a_heartbeat_without_a_refresh_is_warned_of(
    beating: dict[str, str], telling_env: dict[str, str], lnd: Lnd
) -> None:
    """REFRESH_SECONDS=0 makes a quiet node look dead to the heartbeat; alone, each of the two is no
    matter.
    """
    lnd.write()
    for settings, expected in (
        (beating | {"REFRESH_SECONDS": "0"}, True),
        (telling_env | {"REFRESH_SECONDS": "0"}, False),
        (beating, False),
    ):
        with Daemon(settings) as daemon:
            wait_for_reports(daemon, 1)
            assert bool(re.search("warning: REFRESH_SECONDS=0.*heartbeat", daemon.log)) is expected
    done = run_script(beating | {"REFRESH_SECONDS": "0"}, "once")  # each of which puts the file
    assert (done.returncode, "REFRESH_SECONDS" in done.stderr) == (0, False)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://{}",
        "file://{}",
        "javascript:{}",
        "{}",
        "http:{}",
        "http://user:word@{}",
        "http://{}\x01",
        "http://{}\xe9",
    ],
)
def test_a_heartbeat_must_be_http(telling_env: dict[str, str], lnd: Lnd, url: str) -> None:
    """Any other URL is wrong configuration, and the message names the variable and not the URL."""
    lnd.write()
    done = run_script(
        telling_env | {"HEARTBEAT_URL": url.format(f"127.0.0.1{SECRET_PATH}")}, "once"
    )
    assert done.returncode == 78
    assert "HEARTBEAT_URL" in done.stderr
    assert "127.0.0.1" not in done.stderr.replace(telling_env["AWS_ENDPOINT_URL_S3"], "")
    assert not re.search("top-secret|word@", done.stderr)


def test_once_sends_one_heartbeat(
    beating: dict[str, str], lnd: Lnd, staging: Path, fake: FakeS3, beat: FakeS3
) -> None:
    """The command once sends one heartbeat, also when what was left is sent long after the newest
    version.
    """
    lnd.write()
    data = channel_backup(3)
    (staging / f"20260101T000000.000000Z-{hashlib.sha256(data).hexdigest()[-6:]}").write_bytes(data)
    fake.hold()
    beat.hold()
    with (
        NotifySocket() as systemd,
        Script(beating | {"NOTIFY_SOCKET": systemd.path}, "once") as script,
    ):
        fake.wait_for_requests(1)
        fake.release()
        fake.hold()
        fake.wait_for_requests(2)
        looked = "".join(systemd.messages).count("WATCHDOG=1")
        systemd.wait_for("WATCHDOG=1", count=looked + 5)  # time enough for a report
        fake.release()
        script.wait_for_log("stored s3://", count=3)  # the newest once more, as the last one
        beat.release()
        assert script.wait() == 0
    assert [request.path for request in beat.requests] == [SECRET_PATH]


def test_the_heartbeat_is_named(beating: dict[str, str], lnd: Lnd, beat: FakeS3) -> None:
    """A heartbeat that fails is called by its variable, and what to do is not what one does about
    S3.
    """
    lnd.write()
    beat.set_default(answers.INTERNAL_ERROR, "GET")
    for url in (f"http://127.0.0.1:1{SECRET_PATH}", beating["HEARTBEAT_URL"]):
        done = run_script(beating | {"HEARTBEAT_URL": url}, "once")
        (message, hint) = (
            line for line in done.stderr.splitlines() if re.search("warning|error", line)
        )
        assert "HEARTBEAT_URL" in message
        assert not re.search("staged|bucket|list shows", hint)


def test_metrics_that_cannot_be_written_do_not_silence_the_heartbeat(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, tmp_path: Path
) -> None:
    """What watches over the heartbeat is not to hear of a death that is none."""
    lnd.write()
    directory = tmp_path / "textfile"
    directory.mkdir()
    (directory / ".lnd.prom.partial").mkdir()
    with Daemon(beating | {"METRICS_FILE": str(directory / "lnd.prom")}) as daemon:
        daemon.wait_for_log("cannot write METRICS_FILE")
        beat.wait_for_requests(1, method="GET")


def test_a_heartbeat_works_again_only_when_it_did(
    beating: dict[str, str], lnd: Lnd, fake: FakeS3, beat: FakeS3
) -> None:
    """While there is nothing to tell the heartbeat, nobody knows that it works again, and nothing
    is said of it.
    """
    beat.set_default(answers.INTERNAL_ERROR, "GET")
    lnd.write()
    with Daemon(beating) as daemon:
        beat.wait_for_requests(2, method="GET")
        fake.set_default(answers.SLOW_DOWN)
        daemon.wait_for_captured(lnd.write())
        wait_for_status(daemon, STORED + "1 staged; .*SlowDown.*")
        wait_for_reports(daemon)
        assert not re.search("HEARTBEAT_URL.* again", daemon.log)


def test_a_heartbeat_that_drips_stops_no_upload(
    beating: dict[str, str], lnd: Lnd, impatient: Callable[..., None]
) -> None:
    """However many heartbeats hang, answered by a byte now and then, versions are sent."""
    impatient(TELLING_SECONDS=0.25, THREADS_MAX=2)
    ended = threading.Event()
    dripping = threading.Semaphore(0)

    class Dripping(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            dripping.release()
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                while not ended.wait(0.02):
                    self.wfile.write(b"x")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    lnd.write()
    try:
        with Daemon(
            beating | {"HEARTBEAT_URL": f"http://127.0.0.1:{server.server_port}{SECRET_PATH}"}
        ) as daemon:
            for _ in range(2):
                assert dripping.acquire(timeout=PATIENCE_SECONDS)
            daemon.wait_for_log("(?i)heartbeat.*given up")
            wait_for_reports(daemon)
            daemon.wait_for_stored(lnd.write())
            expect_secret(daemon)
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_staging_directory_that_cannot_be_listed_is_no_fault_of_the_heartbeat(
    beating: dict[str, str], lnd: Lnd, beat: FakeS3, tmp_path: Path, impatient: Callable[..., None]
) -> None:
    """What cannot be listed is named for what it is; the heartbeat hears nothing good until it can
    be.
    """
    broken = tmp_path / "broken"
    impatient(unlistable_while(broken))
    lnd.write()
    with Daemon(beating) as daemon:
        beat.wait_for_requests(1, method="GET")
        broken.touch()
        wait_for_status(
            daemon, STORED + r"\S+ staged; .*cannot use BACKUP_DIRECTORY: .*Input/output error.*"
        )
        daemon.wait_for_stored(lnd.write())
        wait_for_reports(daemon)
        assert "HEARTBEAT_URL" not in daemon.log
        assert len(beat.requests) == 1
        broken.unlink()
        beat.wait_for_requests(2, method="GET")


def test_a_staged_version_that_can_be_read_again(
    beating: dict[str, str], lnd: Lnd, staging: Path, beat: FakeS3, impatient: Callable[..., None]
) -> None:
    """When a staged version that could not be read is stored at last, nothing is wrong any more."""
    impatient(ORDINARY)
    lnd.write()
    data = channel_backup(3)
    left = staging / f"20260101T000000.000000Z-{hashlib.sha256(data).hexdigest()[-6:]}"
    left.write_bytes(data)
    left.chmod(0)
    with Daemon(beating) as daemon:
        daemon.wait_for_log("cannot use BACKUP_DIRECTORY: .* 20260101T000000")
        left.chmod(0o600)
        daemon.wait_for_log("stored s3://bucket/20260101T000000")
        wait_for_status(daemon, STORED + "0 staged")
        beat.wait_for_requests(1, method="GET")


# --- What the user that runs it could read ---


@pytest.mark.parametrize("name", ["admin.macaroon", "wallet.db"])
def test_a_secret_of_lnd_that_can_be_read_is_warned_of(
    telling_env: dict[str, str], lnd: Lnd, name: str
) -> None:
    """When the user that runs it could read LND's secrets, which it need not, the start says so."""
    lnd.write()
    (lnd.directory / name).write_bytes(b"secret of LND\n")
    with Daemon(telling_env) as daemon:
        assert re.search(rf"warning: .*can read {lnd.directory / name}: ", daemon.log)


def test_no_warning_of_secrets_that_cannot_be_read(
    telling_env: dict[str, str], lnd: Lnd, impatient: Callable[..., None]
) -> None:
    """Where the secrets are not there, or may not be read, nothing is said of them."""
    lnd.write()
    with Daemon(telling_env) as daemon:
        assert "can read" not in daemon.log
    lnd.leave_decoys()
    for name in ("admin.macaroon", "wallet.db"):
        (lnd.directory / name).chmod(0)
    impatient(ORDINARY)
    with Daemon(telling_env) as daemon:
        assert "can read" not in daemon.log
        daemon.wait_for_stored(lnd.written[-1])


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
    """A good heartbeat is a GET, a bad one a POST to /fail with the reason; a push URL of Uptime
    Kuma takes both in its query. Each says that it comes from this program.
    """
    program.request_heartbeat(beat.endpoint + path, why)
    (request,) = beat.requests
    assert (request.method, request.path, request.body) == (method, asked, body)
    assert request.headers["user-agent"] == f"lnd-backup/{program.__version__}"


@pytest.mark.parametrize("sign", ["", "@"], ids=["a path", "abstract"])
def test_systemd_is_told_at_either_kind_of_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    """NOTIFY_SOCKET is a path, or begins with @: a name that is in no file system."""
    monkeypatch.chdir(tmp_path)  # a whole path may be too long for a socket
    name = f"notify-{os.getpid()}@host"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(f"\0{name}" if sign else name)
        systemd.settimeout(PATIENCE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", sign + name)
        program.notify_systemd("READY=1")
        assert systemd.recv(100) == b"READY=1"
