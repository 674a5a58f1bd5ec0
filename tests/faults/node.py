"""The node being a node: tests for `make faults` alone, in a mount namespace of their own."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    Daemon,
    FakeS3,
    Lnd,
    Script,
    answers,
    assert_nothing_lost,
    channel_backup,
    version_name,
)
from shared import OFTEN, TRY_AGAIN, Session, staged

from bench.resources import memory

if TYPE_CHECKING:
    from collections.abc import Callable

DAY, YEAR = 86_400, 31_557_600


@pytest.fixture
def s3(fake: FakeS3) -> FakeS3:
    """Return the scripted S3, so that the fixtures of all tests work on it."""
    return fake


@pytest.fixture
def bucket() -> str:
    return "some-bucket"


@pytest.fixture
def env(fake_env: dict[str, str]) -> dict[str, str]:
    return fake_env


def finish(env: dict[str, str], lnd: Lnd) -> None:
    """Start the daemon anew, let it store one more version, and stop it."""
    with Daemon(env) as daemon:
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0


def kill(daemon: Daemon) -> None:
    daemon.signal(signal.SIGKILL)
    daemon.wait()


def names_in(fake: FakeS3) -> list[str]:
    """Return the names in the bucket in the order in which they were put."""
    return [request.path.rpartition("/")[2] for request in fake.requests if request.method == "PUT"]


# --- the disk ---


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def test_staging_disk_is_full(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, small_disk: Path, check: partial[None]
) -> None:
    """While the disk is full versions go out from memory; with room again the newest is staged."""
    filler = small_disk / ".filler"
    with Daemon(env | OFTEN) as daemon:
        daemon.wait_for_stored(lnd.write())
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        for _ in range(5):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot use BACKUP_DIRECTORY")
        fake.hold()
        daemon.wait_for_captured(lnd.write())
        filler.unlink()
        daemon.wait_for_log("staging works again")
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        daemon.wait_for_looks()
        kill(daemon)
    fake.release()
    finish(env, lnd)
    assert {path.name for path in small_disk.iterdir()} == {".lock", ".receipt"}
    check(refreshes=1)  # after the drain the newest goes out once more


def test_staging_disk_becomes_read_only(
    env: dict[str, str], lnd: Lnd, tmp_path: Path, fake: FakeS3, bucket: str, prefix: str
) -> None:
    """On a disk gone read-only versions go out from memory; mounted anew it is used again."""
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    image.touch()
    os.truncate(image, 16 << 20)
    run("mkfs.ext4", "-q", image)
    mount = partial(run, "mount", "-o", "loop,errors=remount-ro")
    mount(image, disk)
    env["BACKUP_DIRECTORY"] = str(disk / "staging")
    with Daemon(env) as daemon:
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_stored(lnd.write())
        run("mount", "-o", "remount,abort", disk)  # as an error on disk does
        for _ in range(5):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot .*Read-only")  # whichever meets it first
        assert daemon.stop() == 0
    run("umount", disk)
    # A copy, since another test's mount namespace may hold the file system, and would hand it out
    # again as it is.
    mount(shutil.copy(image, tmp_path / "copy"), disk)
    finish(env, lnd)
    try:
        assert_nothing_lost(lnd, fake, bucket, prefix, disk / "staging", refreshes=2)
    finally:
        run("umount", disk)


def lowest_free_descriptor(daemon: Daemon) -> int:
    """Return the lowest descriptor that is free between the looks, each of which uses some."""
    lowest = []
    for _ in range(10):
        daemon.wait_for_looks(1)
        used = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
        lowest.append(min(set(range(len(used) + 1)) - used))
    return min(lowest)


def test_no_descriptors(backed_up: Session, lnd: Lnd) -> None:
    """Without a free descriptor the log says that nothing can be read; with one it goes on."""
    with backed_up(OFTEN) as daemon:
        daemon.wait_for_looks()
        limit = partial(resource.prlimit, daemon.pid, resource.RLIMIT_NOFILE)
        limits = limit()
        limit((lowest_free_descriptor(daemon), limits[1]))
        version = lnd.write()
        daemon.wait_for_log("cannot (read|watch).*Too many open files")
        limit(limits)
        daemon.wait_for_stored(version)
        daemon.wait_for_stored(lnd.write())


# --- the clock ---


def test_clock_jumps(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, check: partial[None], tmp_path: Path
) -> None:
    """A year forward, a day back and home again, within a run and between two: names increase."""
    clock = tmp_path / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    for jumps in ([0, YEAR, -DAY, 0], [-DAY, 0, YEAR, 0]):
        with Daemon(env | faked) as daemon:
            for jump in jumps:
                clock.write_text(f"{jump:+d}")
                daemon.wait_for_stored(lnd.write())
            kill(daemon)
    names = names_in(fake)
    assert max(names)[:8] > f"{time.gmtime().tm_year + 1}", "the clock was not moved"
    # A receipt from the future, or one that the jump made too old, proves nothing.
    check(refreshes=8, replaced_ok=False)


@pytest.mark.once
@pytest.mark.timeout(180)
def test_suspended_for_a_minute(session: Session, lnd: Lnd, fake: FakeS3) -> None:
    """Stopped for a minute in an upload, it ends it, or does it again under the same name."""
    fake.hold()
    first = lnd.write()
    # A refresh of the last one, if the first had to be sent after it.
    with session(refreshes=1) as daemon:
        fake.wait_for_requests(1)
        daemon.signal(signal.SIGSTOP)
        last = lnd.write()
        time.sleep(60)  # as long as a short suspend
        daemon.signal(signal.SIGCONT)
        fake.release()
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(last)
    for version, most in ((first, 1), (last, 2)):
        assert len({name for name in names_in(fake) if name.endswith(version.sha256[-6:])}) <= most


# --- processes ---


def test_two_daemons_at_once(env: dict[str, str], lnd: Lnd, check: partial[None]) -> None:
    """Of two that are started at the same moment one works and the other leaves with 75."""
    version = lnd.write()
    with Script(env) as one, Script(env) as other, ThreadPoolExecutor() as pool:
        ends = {pool.submit(each.wait): each for each in (one, other)}
        (first,) = wait(ends, return_when=FIRST_COMPLETED).done
        ends.pop(first)
        assert first.result() == TRY_AGAIN
        ((end, working),) = ends.items()
        working.wait_for_log(f"stored .*{version.sha256[-6:]}")
        working.signal(signal.SIGTERM)
        assert end.result() == 0
    check()


def bring_to(state: str, daemon: Daemon, lnd: Lnd, fake: FakeS3) -> None:
    """Let LND write, and bring the daemon, which is just ready, to this state."""
    if state == "between attempts":
        fake.set_default(answers.SLOW_DOWN)
        lnd.write()
        daemon.wait_for_log("cannot store")
        fake.set_default(answers.STORED)
        return
    if state in ("sending", "versions waiting", "stopping"):
        fake.hold()
    version = lnd.write()
    if state == "idle":
        daemon.wait_for_stored(version)
    elif state != "starting":
        fake.wait_for_requests(1)
    if state in ("versions waiting", "stopping"):
        for _ in range(5):
            daemon.wait_for_captured(lnd.write())
    if state == "stopping":
        daemon.begin_to_stop()


@pytest.mark.parametrize(
    "state", ["starting", "idle", "sending", "versions waiting", "between attempts", "stopping"]
)
def test_killed_in_each_state(
    state: str, env: dict[str, str], lnd: Lnd, fake: FakeS3, check: partial[None], staging: Path
) -> None:
    """Killed in any state, it sends at the next start what was staged, under the same names."""
    with Daemon(env) as daemon:
        bring_to(state, daemon, lnd, fake)
        kill(daemon)
    waiting = staged(staging)
    fake.release()
    finish(env, lnd)
    assert set(waiting) <= set(names_in(fake))
    assert {path.name for path in staging.iterdir()} == {".lock", ".receipt"}
    # A start puts the version on disk, and a drain of several the newest, once more.
    restarts = int(state in ("starting", "idle"))
    check(refreshes=1 + restarts, replaced_ok=state == "starting")


# --- very many ---


@pytest.mark.once
@pytest.mark.timeout(900)
def test_a_hundred_thousand_updates(
    env: dict[str, str],
    lnd: Lnd,
    fake: FakeS3,
    check: partial[None],
    record_property: Callable[[str, object], None],
) -> None:
    """Of updates at full speed it captures what it can, and the last one without fail."""
    lnd.archive = False
    record_property("injected", updates := 100_000)
    with Daemon(env) as daemon:
        for _ in range(updates):
            last = lnd.write(data=os.urandom(45))
        daemon.wait_for_log(f"stored .*{last.sha256[-6:]}", timeout=120)
        daemon.signal(signal.SIGTERM)
        daemon.wait(timeout=120)
    with Script(env, "once") as rest:  # what did not fit into the grace period
        assert rest.wait(timeout=300) == 0
    check(replaced_ok=True, refreshes=None)
    assert Counter(names_in(fake)).most_common(1)[0][1] <= 2, "a version was sent again and again"


@pytest.mark.cold
@pytest.mark.once
@pytest.mark.timeout(900)
def test_a_month_away(session: Session, lnd: Lnd, fake: FakeS3, staging: Path) -> None:
    """After an outage 10,000 versions go out, newest first, with hardly more memory."""
    for number in range(10_000):
        data = channel_backup(1)
        at = datetime(2026, 1, 1, tzinfo=UTC) + number * timedelta(minutes=4)
        path = staging / version_name(data, at)
        path.write_bytes(data)
        path.chmod(0o600)
        lnd.placed.append(data)
    waiting = staged(staging)
    fake.hold()
    last = lnd.write()
    with session(refreshes=1) as daemon:
        fake.wait_for_requests(1)
        before = memory([daemon.pid]).pss
        fake.release()
        daemon.wait_for_log(f"stored .*{waiting[0]}", timeout=600)
        assert memory([daemon.pid]).pss < 1.2 * before
    names = names_in(fake)
    assert names[1:-1] == waiting[::-1]
    assert [name[-6:] for name in (names[0], names[-1])] == [last.sha256[-6:]] * 2
