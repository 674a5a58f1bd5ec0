"""The daemon keeps what LND wrote, whatever S3, the signals, the disk and the clock do."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    VERSION_NAME,
    Answer,
    Daemon,
    FakeS3,
    FaultProxy,
    Lnd,
    Mode,
    NotifySocket,
    S3Server,
    Script,
    Written,
    assert_nothing_lost,
    run_script,
    unlistable_while,
)
from kit import script as script_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SELDOM = {"RESCAN_SECONDS": "600"}  # only events are left
OFTEN = {"RESCAN_SECONDS": "0.1"}
AWAY = {
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    "SHUTDOWN_GRACE_SECONDS": "0",
}  # nobody listens there
TRY_AGAIN, WRONG_CONFIGURATION = 75, 78


class SteppedS3(FakeS3):
    """Answers, and stores, only when it is let."""

    def __init__(self, *scripted: Answer, free: bool = False) -> None:
        """Script the answers; a free one answers at once."""
        super().__init__(*scripted)
        self._permits = threading.Semaphore(0)
        self._free = free

    def let(self, count: int = 1) -> None:
        """Give so many answers more."""
        self._permits.release(count)

    def release(self) -> None:
        """Answer everything from now on."""
        self._free = True
        self._permits.release(1000)
        super().release()

    def wait_for_leave(self) -> None:
        """Block until one more answer may be given."""
        super().wait_for_leave()
        if not self._free:
            self._permits.acquire()

    def hashes(self) -> list[str]:
        """Return the last digits of the SHA-256 of each PUT, in the order of their arrival."""
        return [request.path[-6:] for request in self.requests if request.method == "PUT"]


@pytest.fixture
def stepped(env: dict[str, str]) -> Iterator[SteppedS3]:
    """Return a scripted S3 that holds its answers back, and let the program use it."""
    with SteppedS3() as fake:
        env["AWS_ENDPOINT_URL_S3"] = fake.endpoint
        yield fake


@pytest.fixture
def check_stepped(
    lnd: Lnd, stepped: SteppedS3, bucket: str, prefix: str, staging: Path
) -> partial[None]:
    """Return the invariant for the scripted S3."""
    return partial(assert_nothing_lost, lnd, stepped, bucket, prefix, staging)


@pytest.fixture
def proxy(s3: S3Server, env: dict[str, str]) -> Iterator[FaultProxy]:
    """Return a line to the server that fails on demand, and let the program use it."""
    with FaultProxy(s3.host, s3.port) as line:
        env["AWS_ENDPOINT_URL_S3"] = line.endpoint()
        yield line


def staged(staging: Path) -> list[str]:
    """Return the names of the staged versions, oldest first."""
    return sorted(entry.name for entry in staging.iterdir() if VERSION_NAME.fullmatch(entry.name))


def expect_newest_last(daemon: Daemon, newest: Written) -> None:
    """Expect that the last one put has the newest name, and the bytes that LND wrote last."""
    names = daemon.stored_names()
    assert names[-1] == max(names)
    assert names[-1].endswith(newest.sha256[-6:])


def write_unseen(lnd: Lnd) -> Written:
    """Let LND's file be replaced by a link, of which no event tells that is listened to."""
    elsewhere = Lnd(lnd.directory / "elsewhere")
    version = elsewhere.write()
    lnd.path.unlink(missing_ok=True)
    lnd.path.hardlink_to(elsewhere.path)
    lnd.written.append(version)
    return version


# --- readiness ---


def test_it_is_ready_although_nothing_is_there(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """With LND's directory and S3 missing the daemon is ready, and stops in order."""
    lnd.directory.rmdir()
    with Daemon(SELDOM | env | AWAY) as daemon:
        assert daemon.systemd.messages[0] == "READY=1"
        assert daemon.stop() == 0
        daemon.systemd.wait_for("STOPPING=1")
    check()


def test_it_is_not_ready_with_a_wrong_configuration(
    env: dict[str, str], check: partial[None]
) -> None:
    """With a fault in the configuration systemd hears nothing."""
    with NotifySocket() as systemd:
        done = run_script(env | {"S3_BUCKET_NAME": "s3://wrong", "NOTIFY_SOCKET": systemd.path})
        assert done.returncode == WRONG_CONFIGURATION
        assert systemd.messages == []
    check()


# --- what nearly every peer gets wrong ---


def test_the_gap_between_read_and_rename_does_not_matter(
    env: dict[str, str], lnd: Lnd, proxy: FaultProxy, check: partial[None]
) -> None:
    """With 30 ms between LND's read and its rename and a slow upload, the newest version is stored
    20 of 20 times.
    """
    proxy.set("latency", up=0.15, down=0.15)
    lnd.read_gap_seconds = 0.03
    lnd.write()
    with Daemon(SELDOM | env) as daemon:
        for _ in range(20):
            daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
    check(replaced_ok=[0])


def test_a_second_version_during_an_upload_is_stored_too(
    env: dict[str, str], lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None]
) -> None:
    """A version that comes while another is on its way is captured at once, and both are stored."""
    lnd.write()
    with Daemon(SELDOM | env) as daemon:
        stepped.wait_for_requests(1)
        second = lnd.write()
        daemon.wait_for_captured(second)
        stepped.let(2)
        daemon.wait_for_stored(second)
        assert daemon.stop() == 0
    check_stepped()


# --- what is put, and how often ---


def test_every_start_puts_the_version_once(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """The version on disk gets a new name at each start, and only then, even if it did not
    change.
    """
    version = lnd.write()
    for _ in range(2):
        with Daemon(SELDOM | env | OFTEN) as daemon:
            daemon.wait_for_stored(version)
            daemon.wait_for_looks()
            assert daemon.stop() == 0
            assert len(daemon.stored_names()) == 1
    check(refreshes=1)


def test_a_staged_version_counts_as_the_put_of_a_start(
    env: dict[str, str], lnd: Lnd, check: partial[None], staging: Path
) -> None:
    """A version that is still staged with the bytes on disk gets no second name at the next
    start.
    """
    version = lnd.write()
    for _ in range(2):
        with Daemon(SELDOM | env | AWAY) as daemon:
            daemon.wait_for_log("cannot store")
            assert daemon.stop() == 0
            assert len(staged(staging)) == 1
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    check()


def test_an_unchanged_file_is_put_again(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """When the last receipt is REFRESH_SECONDS old the unchanged file is put under a new, later
    name.
    """
    version = lnd.write()
    with Daemon(SELDOM | env | {"REFRESH_SECONDS": "0.3"}) as daemon:
        daemon.wait_for_stored(version, count=3)
        assert daemon.stop() == 0
        names = daemon.stored_names()
    assert all(earlier < later for earlier, later in itertools.pairwise(names))
    check(refreshes=len(names) - 1)


def test_a_refresh_does_not_pile_up(
    env: dict[str, str], lnd: Lnd, proxy: FaultProxy, check: partial[None], staging: Path
) -> None:
    """While S3 is away an unchanged file is staged once, however often a refresh is due."""
    lnd.write()
    proxy.set("refuse")
    with Daemon(SELDOM | env | OFTEN | {"REFRESH_SECONDS": "0.05"}) as daemon:
        daemon.wait_for_log("cannot store")
        daemon.wait_for_looks(10)
        assert len(staged(staging)) == 1
        assert daemon.log.count("captured") == 1
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    check()


def test_a_refresh_can_be_turned_off(env: dict[str, str], lnd: Lnd, check: partial[None]) -> None:
    """With REFRESH_SECONDS=0 an unchanged file is never put again."""
    version = lnd.write()
    with Daemon(SELDOM | env | {"RESCAN_SECONDS": "0.02", "REFRESH_SECONDS": "0"}) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_looks(20)
        assert daemon.stop() == 0
    check()


@pytest.mark.parametrize("damage", ["edited", "removed"])
def test_a_version_whose_staged_copy_is_gone_gets_out(
    env: dict[str, str],
    lnd: Lnd,
    proxy: FaultProxy,
    check: partial[None],
    staging: Path,
    damage: str,
) -> None:
    """A version that waits for S3, and whose staged copy somebody edits or removes, is staged anew
    at a look.
    """
    with Daemon(SELDOM | env | OFTEN | {"REFRESH_SECONDS": "0"}) as daemon:
        daemon.wait_for_stored(lnd.write())
        proxy.set("refuse", cut=True)
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("cannot store")
        (name,) = staged(staging)
        if damage == "edited":
            (staging / name).write_bytes(bytes(700))
        else:
            (staging / name).unlink()
        daemon.wait_for_captured(version, count=2)
        proxy.set("pass")
        daemon.wait_for_stored(version)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
        assert daemon.log.count("captured") == 3
        assert daemon.log.count("stored s3://") == 2
    for aside in staging.glob(".damaged-*"):
        aside.unlink()
    check()


def test_a_version_that_somebody_put_into_staging_is_sent_once(
    env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """A version of a later name, laid into the staging directory, is sent, and LND's own gets a
    name above it, once.
    """
    foreign = Lnd(lnd.directory.parent / "other").write()
    with Daemon(SELDOM | env | OFTEN) as daemon:
        daemon.wait_for_stored(lnd.write())
        laid = lnd.directory.parent / "laid"
        laid.write_bytes(foreign.data)
        laid.rename(staging / f"21000101T000000.000000Z-{foreign.sha256[-6:]}")
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_stored(foreign)
        daemon.wait_for_stored(lnd.written[-1], count=2)
        daemon.wait_for_looks(10)
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])
        # once anew, above the name that was laid there, and once more if its older name came last
        assert daemon.log.count("captured") in (3, 4)


# --- S3 is away ---


@pytest.mark.parametrize("mode", ["refuse", "rst"])
def test_an_outage_delays_and_loses_nothing(
    env: dict[str, str], lnd: Lnd, proxy: FaultProxy, check: partial[None], mode: Mode
) -> None:
    """What LND writes during an outage is stored when it is over, newest first; its begin and its
    end are logged.
    """
    proxy.set(mode)
    lnd.write()
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_log("cannot store")
        for _ in range(10):
            daemon.wait_for_captured(lnd.write())
        proxy.set("pass")
        daemon.wait_for_captured(lnd.write())
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert daemon.log.count("cannot store") == 1, daemon.log
        assert len(re.findall(r"again, after \d+ s", daemon.log)) == 1, daemon.log
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])
        names = daemon.stored_names()[:-1]
        # some may have been on their way before the newest was there
        names = names[names.index(max(names)) :]
        assert names == sorted(names, reverse=True)
        assert len(names) > 5
    check(refreshes=1)


def test_the_newest_comes_first_even_within_a_drain(
    env: dict[str, str], lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None]
) -> None:
    """A version that comes while the others are being sent is the next one to be sent, and at the
    end it is put once more.
    """
    first = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        stepped.wait_for_requests(1)
        second = lnd.write()
        daemon.wait_for_captured(second)  # else it may be replaced before it is looked at
        third = lnd.write()
        daemon.wait_for_captured(third)
        stepped.let()
        stepped.wait_for_requests(2)
        fourth = lnd.write()
        daemon.wait_for_captured(fourth)
        stepped.let(4)
        daemon.wait_for_stored(fourth, count=2)
        assert daemon.stop() == 0
        expect_newest_last(daemon, fourth)
    assert stepped.hashes() == [
        version.sha256[-6:] for version in (first, third, fourth, second, fourth)
    ]
    check_stepped(refreshes=1)


def test_wrong_credentials_are_put_right(
    env: dict[str, str], lnd: Lnd, check: partial[None], tmp_path: Path
) -> None:
    """With a wrong key versions are captured and the log is loud; when the file is mended all of
    them are stored.
    """
    key, secret = env.pop("AWS_ACCESS_KEY_ID"), env.pop("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    content = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    file.write_text(content.format(key, "wrong"))
    with Daemon(SELDOM | env | {"AWS_SHARED_CREDENTIALS_FILE": str(file)}) as daemon:
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        daemon.wait_for_log(
            "error: cannot store: .*SignatureDoesNotMatch: .*\n.*hint: check the access key"
        )
        file.write_text(content.format(key, secret))
        daemon.wait_for_captured(lnd.write())
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert secret not in daemon.log
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])
    check(refreshes=1)


# --- signals ---


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon(
    env: dict[str, str], lnd: Lnd, check: partial[None], sig: signal.Signals
) -> None:
    """An idle daemon ends with success at the first signal."""
    version = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(version)
        daemon.signal(sig)
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log
    check()


def test_an_upload_in_flight_is_finished(
    env: dict[str, str], lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None], staging: Path
) -> None:
    """A version on its way when the signal comes, and one that LND writes after it, are stored
    before the end.
    """
    first = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        stepped.wait_for_requests(1)
        daemon.begin_to_stop()
        second = lnd.write()
        daemon.wait_for_captured(second)
        stepped.let(2)
        assert daemon.wait() == 0
        assert [name[-6:] for name in daemon.stored_names()] == [
            first.sha256[-6:],
            second.sha256[-6:],
        ]
        assert staged(staging) == []
    check_stepped()


@pytest.mark.parametrize(
    ("mode", "grace"), [("blackhole", 0), ("blackhole", 1), ("refuse", 0), ("refuse", 1)]
)
def test_the_grace_period_is_kept(
    env: dict[str, str],
    lnd: Lnd,
    proxy: FaultProxy,
    check: partial[None],
    staging: Path,
    mode: Mode,
    grace: int,
) -> None:
    """With S3 hanging or gone the daemon ends in order after the grace period, and the next start
    sends the rest.
    """
    proxy.set(mode)
    version = lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": str(grace)}) as daemon:
        if mode == "blackhole":
            proxy.wait_until(lambda counts: counts.bytes_up > len(version.data))
        else:
            daemon.wait_for_log("cannot store")
        assert daemon.stop(timeout=grace + 4) == 0
        assert len(staged(staging)) == 1
    proxy.set("pass", cut=True)
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    check()


def test_it_looks_after_the_signal_and_before_it_leaves(
    env: dict[str, str], lnd: Lnd, proxy: FaultProxy, check: partial[None], staging: Path
) -> None:
    """What no event told is found by a look right after the signal, and what comes later by another
    before the end.
    """
    first = lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        daemon.wait_for_stored(first)
        proxy.set("blackhole", cut=True)
        second = write_unseen(lnd)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_captured(second)
        third = write_unseen(lnd)
        assert daemon.wait() == 0
        daemon.wait_for_captured(third)
        assert [name[-6:] for name in staged(staging)] == [second.sha256[-6:], third.sha256[-6:]]
    check()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    env: dict[str, str],
    lnd: Lnd,
    stepped: SteppedS3,
    check_stepped: partial[None],
    second: signal.Signals,
) -> None:
    """While the daemon is still sending, a second signal ends it without waiting for the grace
    period.
    """
    lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": "300"}) as daemon:
        stepped.wait_for_requests(1)
        daemon.begin_to_stop()
        daemon.signal(second)
        assert daemon.wait() == 128 + second
    check_stepped()


# --- crashes ---


@pytest.mark.unmeasured
@pytest.mark.timeout(240)  # some twenty starts, one after the other
def test_kills_at_any_moment_lose_nothing_that_was_staged(
    env: dict[str, str], lnd: Lnd, s3: S3Server, check: partial[None], staging: Path
) -> None:
    """Killed ten times in the middle of bursts, the daemon sends all that was staged, and leaves no
    litter.
    """
    chance, before = random.Random(1), set()  # noqa: S311 - any moments will do
    for _ in range(10):
        with Daemon(SELDOM | env) as daemon:
            for _ in range(chance.randrange(1, 12)):
                lnd.write(channels=chance.choice([0, 10, 300]))
            time.sleep(chance.uniform(0, 0.05))  # the moment
            daemon.signal(signal.SIGKILL)
            assert daemon.wait() == -signal.SIGKILL
        before |= set(staged(staging))
    with Daemon(SELDOM | env) as daemon:
        last = lnd.write()
        daemon.wait_for_stored(last)
        assert daemon.stop() == 0
    assert sorted(entry.name for entry in staging.iterdir()) == [".lock", ".receipt"]
    assert before <= {key.rpartition("/")[2] for key in s3.objects(env["S3_BUCKET_NAME"])}
    check(replaced_ok=True, refreshes=10)


def test_a_kill_in_the_middle_of_a_write_leaves_no_half_version(
    env: dict[str, str],
    lnd: Lnd,
    check: partial[None],
    staging: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Killed when 4096 bytes of a version are written, the daemon leaves nothing that looks like a
    version.
    """
    launcher = tmp_path / "limited.py"
    launcher.write_text(f"""
import resource, runpy, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
runpy.run_path({str(script_module.SCRIPT)!r}, run_name="__main__")
""")
    version = lnd.write()
    with monkeypatch.context() as limited:
        limited.setattr(script_module, "SCRIPT", launcher)
        with Script(env) as script:
            assert script.wait() == -signal.SIGXFSZ
    assert staged(staging) == []
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    assert sorted(entry.name for entry in staging.iterdir()) == [".lock", ".receipt"]
    check()


def test_a_kill_before_the_receipt_leaves_one_object(
    env: dict[str, str], lnd: Lnd, proxy: FaultProxy, check: partial[None], staging: Path
) -> None:
    """Killed between S3's storing and its answer, the daemon sends the same bytes under the same
    name again.
    """
    proxy.set("swallow_response")
    version = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        proxy.wait_until(lambda counts: counts.swallowed > 0)
        names = staged(staging)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    proxy.set("pass")
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stored_names() == names
        assert daemon.stop() == 0
    check()


# --- once, and two at a time ---


def test_once_stores_the_version_and_what_was_staged(
    env: dict[str, str], lnd: Lnd, check: partial[None], staging: Path, prefix: str
) -> None:
    """The command once stores the version on disk and what is staged, the one on disk last, names
    their keys in the log, prints nothing.
    """
    lnd.write()
    with Daemon(SELDOM | env | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
    names = staged(staging)
    newest = lnd.write()
    done = run_script(env, "once")
    assert done.returncode == 0, done.stderr
    keys = re.findall(rf"stored s3://\S+/{prefix}(\S+-[0-9a-f]{{6}})", done.stderr)
    assert (len(keys), done.stdout) == (3, "")
    assert keys[1:] == [names[0], max(keys)]
    assert {keys[0][-6:], keys[2][-6:]} == {newest.sha256[-6:]}
    check(refreshes=1)


def test_once_puts_an_unchanged_file_again(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """Each run of the command once puts the version on disk under a new name."""
    lnd.write()
    assert [run_script(env, "once").returncode for _ in range(2)] == [0, 0]
    check(refreshes=1)


@pytest.mark.parametrize("size", [None, 0, 44])
def test_once_without_a_channel_backup_fails_and_sends_the_rest(
    env: dict[str, str], lnd: Lnd, check: partial[None], staging: Path, size: int | None
) -> None:
    """With no file, or one that is too small, the command once fails, and what was staged is sent
    all the same.
    """
    lnd.write()
    with Daemon(SELDOM | env | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
    lnd.path.unlink()
    if size is not None:
        lnd.path.write_bytes(bytes(size))
    done = run_script(env, "once")
    assert done.returncode == 1, done.stderr
    assert re.search(r"(error|warning): cannot read channel\.backup: ", done.stderr)
    assert staged(staging) == []
    check()


def test_once_with_s3_away_may_be_tried_again(
    env: dict[str, str],
    lnd: Lnd,
    check: partial[None],
    staging: Path,
    started_by: Callable[[str], None],
) -> None:
    """With S3 out of reach the command once stages the version, loses patience and says that trying
    again may help.
    """
    started_by("""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("program", SCRIPT)
program = sys.modules["program"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
assert program.ONE_SHOT_SECONDS < 60
program.ONE_SHOT_SECONDS = 1.0
sys.exit(program.main())
""")
    lnd.write()
    done = run_script(env | AWAY, "once")
    assert done.returncode == TRY_AGAIN, done.stderr
    assert done.stdout == ""
    assert len(staged(staging)) == 1
    check()


@pytest.mark.parametrize("command", ["run", "once"])
def test_a_second_copy_does_not_start(
    env: dict[str, str], lnd: Lnd, check: partial[None], staging: Path, command: str
) -> None:
    """While one copy holds the staging directory another ends with 75 and says so, and the first
    goes on.
    """
    first = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(first)
        done = run_script(env, command)
        assert done.returncode == TRY_AGAIN
        assert f"{staging}: another copy holds it" in done.stderr
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
    check()


# --- clock and disk ---


@pytest.mark.parametrize("stored", [True, False])
def test_names_increase_although_the_clock_was_set_back(
    env: dict[str, str],
    lnd: Lnd,
    stepped: SteppedS3,  # a server would refuse the wrong time
    check_stepped: partial[None],
    tmp_path: Path,
    *,
    stored: bool,
) -> None:
    """After a day's jump back of the clock the names go on from the last one, whether it is stored
    or still staged.
    """
    stepped.release()
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text("""
import datetime
class Ahead(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)
datetime.datetime = Ahead
""")
    first = lnd.write()
    with Daemon(SELDOM | env | {"PYTHONPATH": str(ahead)} | ({} if stored else AWAY)) as daemon:
        daemon.wait_for_stored(first) if stored else daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
        tomorrow = max(re.findall(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6}", daemon.log))
    assert tomorrow > f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    with Daemon(SELDOM | env) as daemon:
        daemon.wait_for_stored(first)
        for _ in range(2):
            daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        names = sorted(daemon.stored_names())
    assert names[0] >= tomorrow
    check_stepped(refreshes=int(stored))


def test_a_version_that_the_disk_refuses_is_sent_from_memory(
    env: dict[str, str],
    lnd: Lnd,
    proxy: FaultProxy,
    check: partial[None],
    started_by: Callable[[str], None],
) -> None:
    """Where staging is impossible, the newest version is held in memory and sent from there, the
    log says so and names what is given up, and it recovers.
    """
    started_by("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))")
    with Daemon(SELDOM | env | OFTEN) as daemon:
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot use BACKUP_DIRECTORY: .*\n.*hint: .*sent from memory")
        proxy.set("refuse", cut=True)
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        daemon.wait_for_log("cannot store")
        for given_up in lnd.written[1:3]:
            daemon.wait_for_log(rf"error: dropped, never staged: .*-{given_up.sha256[-6:]}\b")
        resource.prlimit(
            daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        daemon.wait_for_log("staging works again")
        daemon.wait_for_looks()
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    check(replaced_ok=[1, 2])


def test_a_full_disk_is_no_end(
    env: dict[str, str],
    lnd: Lnd,
    check: partial[None],
    staging: Path,
    started_by: Callable[[str], None],
) -> None:
    """On a full disk a version is sent once and from memory, and when there is room again nothing
    is left over.
    """
    mounted = f"mount -t tmpfs -o size=32k,mode=700 none '{staging}' && exec \"$@\""
    unshare = ["unshare", "-m", "--propagation", "private", "sh", "-c", mounted, "sh"]
    if (
        os.geteuid()
        or subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("needs root, and unshare -m")
    started_by(
        f"import os, sys\nos.execvp('unshare', [*{unshare!r}, sys.executable, SCRIPT, "
        f"*sys.argv[1:]])"
    )
    first = lnd.write()
    with Daemon(SELDOM | env | OFTEN | {"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        daemon.wait_for_stored(first)
        disk = Path(f"/proc/{daemon.pid}/root{staging}")
        with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot use BACKUP_DIRECTORY: .*No space")
        (disk / "filler").unlink()
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_looks()
        assert staged(disk) == []
        assert daemon.stop() == 0
        daemon.wait_for_log(r"stopped\b.* 0\b")
        names = daemon.stored_names()
        assert len(set(names)) == len(names), "sent more than once"
    check()


def test_the_staging_directory_may_vanish(
    env: dict[str, str], lnd: Lnd, check: partial[None], staging: Path
) -> None:
    """Without its staging directory the daemon goes on and stores versions, each once, from
    memory.
    """
    first = lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        daemon.wait_for_stored(first)
        while staging.exists():
            shutil.rmtree(staging, ignore_errors=True)  # a receipt may just be written
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot (use BACKUP_DIRECTORY|write)")
        assert daemon.stop() == 0
        names = daemon.stored_names()
        assert len(set(names)) == len(names), "sent more than once"
    check()


def test_a_staging_directory_that_cannot_be_listed_is_explained(
    env: dict[str, str], lnd: Lnd, staging: Path, started_by: Callable[[str], None]
) -> None:
    """A disk that cannot list the staging directory is named, and is no fault of the program."""
    started_by(unlistable_while(lnd.directory))
    lnd.write()
    done = run_script(env, "once")
    assert done.returncode == 1
    told = f"error: cannot use BACKUP_DIRECTORY: {staging}: .*Input/output error"
    assert re.search(told, done.stderr)
    assert "a fault of this program" not in done.stderr


def test_a_staging_directory_that_cannot_be_listed_spoils_no_stop(
    env: dict[str, str], lnd: Lnd, staging: Path, tmp_path: Path, started_by: Callable[[str], None]
) -> None:
    """A disk that fails before the daemon stops is named, and the stop is an orderly one all the
    same.
    """
    broken = tmp_path / "broken"
    started_by(unlistable_while(broken))
    first = lnd.write()
    with Daemon(OFTEN | env) as daemon:
        daemon.wait_for_stored(first)
        broken.touch()
        daemon.wait_for_log(f"error: cannot use BACKUP_DIRECTORY: {staging}: .*Input/output error")
        assert daemon.stop() == 0


def test_a_thread_that_was_left_behind_cannot_spoil_the_end(
    env: dict[str, str], lnd: Lnd, check: partial[None], started_by: Callable[[str], None]
) -> None:
    """An attempt that was given up may write to the log while the program ends; Python alone would
    abort.
    """
    started_by("""
import sys
import threading

def chatter():
    while True:
        sys.stderr.write("chatter\\n")
        sys.stderr.flush()

threading.Thread(target=chatter, daemon=True).start()
""")
    lnd.write()
    assert [run_script(env, "once").returncode for _ in range(3)] == [0, 0, 0]
    check(refreshes=2)


# --- manners ---


def test_the_directory_of_lnd_is_only_read(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """Neither a session with an outage and a stop, nor the command once, changes anything in LND's
    directory.
    """
    lnd.leave_decoys()
    version = lnd.write()
    before = lnd.fingerprint()
    with Daemon(SELDOM | env | OFTEN | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    with Daemon(SELDOM | env | OFTEN) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    assert run_script(env, "once").returncode == 0
    assert lnd.fingerprint() == before
    check(refreshes=1)


def test_the_journal_gets_priorities(
    env: dict[str, str], lnd: Lnd, check: partial[None], started_by: Callable[[str], None]
) -> None:
    """For journald each line, hints included, bears a priority instead of a time."""
    started_by(
        "import os\nstderr = os.fstat(2)\nos.environ['JOURNAL_STREAM'] = "
        "f'{stderr.st_dev}:{stderr.st_ino}'"
    )
    lnd.write(channels=0)
    with Daemon(SELDOM | env | AWAY) as daemon:
        daemon.wait_for_log(r"^<4>.*: no channels")
        daemon.wait_for_log(r"^<4>cannot store: .*\n<4>hint: ")
        lnd.place(b"")
        daemon.wait_for_log(r"^<3>cannot read channel.backup: .*\n<3>hint: ")
        assert daemon.stop() == 0
        assert [line for line in daemon.log.splitlines() if not re.match(r"<[346]>\S", line)] == []
    lnd.placed.clear()
    check()


def test_a_session_has_no_warnings(env: dict[str, str], lnd: Lnd, check: partial[None]) -> None:
    """In Python's development mode, with every warning an error, a session with an outage goes as
    ever.
    """
    first = lnd.write()
    strict = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    with Daemon(SELDOM | env | strict | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
        log = daemon.log
    with Daemon(SELDOM | env | strict) as daemon:
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        log += daemon.log
    assert not re.search("Traceback|Warning|never|Exception ignored", log), log
    check()


def test_a_python_without_the_libraries_says_so(env: dict[str, str], check: partial[None]) -> None:
    """A Python that lacks the libraries ends with 78 and says in one line what is missing, and what
    to do.
    """
    command = [sys.executable, "-I", "-S", str(script_module.SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == WRONG_CONFIGURATION
    assert re.fullmatch(r"cannot start: No module named '\w+'\n(hint: .*\n)?", done.stderr)
    check()


def test_a_python_that_is_too_old_says_so(env: dict[str, str], check: partial[None]) -> None:
    """A Python before 3.11, which `datetime` tells by the lack of UTC, ends with 78 and says which
    one is needed.
    """
    older = (
        "import datetime, runpy, sys\ndel datetime.UTC\nrunpy.run_path(sys.argv.pop(1), "
        "run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", older, str(script_module.SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == WRONG_CONFIGURATION
    assert re.fullmatch(
        r"cannot start: cannot import name 'UTC' .*\nhint: .*Python 3\.11 or newer.*\n", done.stderr
    )
    check()
