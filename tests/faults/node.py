"""The node being a node, the long way: tests for `make faults` alone, in a mount namespace of their
own.
"""

from __future__ import annotations

import contextlib
import os
import re
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
    settings_at,
    version_name,
)
from shared import OFTEN, TRY_AGAIN, staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUCKET = "bucket"
UPDATES = 100_000
AWAY_STAGED = 10_000
SUSPENDED_SECONDS = 60.0
DAY, YEAR = 86_400, 31_557_600
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


@pytest.fixture
def env(fake: FakeS3, lnd: Lnd, staging: Path, prefix: str) -> dict[str, str]:
    """Return the settings of the program."""
    return settings_at(fake.endpoint, lnd, staging, bucket=BUCKET, prefix=prefix)


@pytest.fixture
def check(lnd: Lnd, fake: FakeS3, prefix: str, staging: Path) -> partial[None]:
    """Return the invariant, to be called at the end."""
    return partial(assert_nothing_lost, lnd, fake, BUCKET, prefix, staging)


def finish(env: dict[str, str], lnd: Lnd) -> None:
    """Start the daemon anew, let it store one more version, and stop it."""
    with Daemon(env) as daemon:
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0


def names_in(fake: FakeS3) -> list[str]:
    """Return the names in the bucket in the order in which they were put."""
    return [request.path.rpartition("/")[2] for request in fake.requests if request.method == "PUT"]


# --- the disk ---


@pytest.fixture
def small_disk(staging: Path) -> Iterator[Path]:
    """Put the staging directory on a file system of its own with room for a few versions."""
    options = ["-t", "tmpfs", "-o", "size=64k,mode=700"]
    subprocess.run(["mount", *options, "none", staging], check=True)  # noqa: S607
    yield staging
    subprocess.run(["umount", "--lazy", staging], check=True)  # noqa: S607


def test_staging_disk_is_full(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, small_disk: Path, check: partial[None]
) -> None:
    """While the disk is full versions go out from memory; the newest, if it was not sent, is staged
    when there is room again.
    """
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
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    fake.release()
    finish(env, lnd)
    assert {path.name for path in small_disk.iterdir()} == {".lock", ".receipt"}
    check(refreshes=1)  # after the drain the newest goes out once more


def test_staging_disk_becomes_read_only(
    env: dict[str, str], lnd: Lnd, tmp_path: Path, fake: FakeS3, prefix: str
) -> None:
    """When the file system gives up and goes read-only, versions go out from memory; mounted anew
    it is used again.
    """
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)  # noqa: S607
    mount = ["mount", "-o", "loop,errors=remount-ro"]
    subprocess.run([*mount, image, disk], check=True)
    env["BACKUP_DIRECTORY"] = str(disk / "staging")
    with Daemon(env) as daemon:
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_stored(lnd.write())
        subprocess.run(["mount", "-o", "remount,abort", disk], check=True)  # noqa: S607 - as an error on disk does
        for _ in range(5):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot .*Read-only")  # whichever meets it first
        assert daemon.stop() == 0
    subprocess.run(["umount", disk], check=True)  # noqa: S607
    # A copy, since another test's mount namespace may hold the file system, and would hand it out
    # again as it is.
    copy = shutil.copy(image, tmp_path / "copy")
    subprocess.run([*mount, copy, disk], check=True)
    finish(env, lnd)
    try:
        assert_nothing_lost(lnd, fake, BUCKET, prefix, disk / "staging", refreshes=2)
    finally:
        subprocess.run(["umount", disk], check=True)  # noqa: S607


def lowest_free_descriptor(daemon: Daemon) -> int:
    """Return the lowest descriptor that is free whenever the daemon does nothing; it uses some in
    every look.
    """
    lowest = []
    for _ in range(10):
        daemon.wait_for_looks(1)
        used = {int(name) for name in os.listdir(f"/proc/{daemon.pid}/fd")}
        lowest.append(min(set(range(len(used) + 1)) - used))
    return min(lowest)


def test_no_descriptors(env: dict[str, str], lnd: Lnd, check: partial[None]) -> None:
    """Without a free descriptor nothing can be read, and the log says so; with one it goes on by
    itself.
    """
    with Daemon(env | OFTEN) as daemon:
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_looks()
        limit = partial(resource.prlimit, daemon.pid, resource.RLIMIT_NOFILE)
        limits = limit()
        limit((lowest_free_descriptor(daemon), limits[1]))
        version = lnd.write()
        daemon.wait_for_log("cannot (read|watch).*Too many open files")
        limit(limits)
        daemon.wait_for_stored(version)
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
    check()


# --- the clock ---


def test_clock_jumps(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, check: partial[None], tmp_path: Path
) -> None:
    """A year forward, a day back and home again, while it runs and between two runs: names increase
    all the same.
    """
    if not FAKETIME:
        pytest.fail("libfaketime is missing: apt install faketime")
    clock = tmp_path / "clock"
    faked = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    clock.write_text("+0")
    for jumps in ([0, YEAR, -DAY, 0], [-DAY, 0, YEAR, 0]):
        with Daemon(env | faked) as daemon:
            for jump in jumps:
                clock.write_text(f"{jump:+d}")
                daemon.wait_for_stored(lnd.write())
            daemon.signal(signal.SIGKILL)
            daemon.wait()
    names = names_in(fake)
    assert max(names)[:8] > f"{time.gmtime().tm_year + 1}", "the clock was not moved"
    # A receipt from the future, or one that the jump made too old, proves nothing.
    check(refreshes=8, replaced_ok=False)


@pytest.mark.once
@pytest.mark.timeout(180)
def test_suspended_for_a_minute(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, check: partial[None]
) -> None:
    """Stopped for a minute in the middle of an upload, the daemon finishes it, or does it again
    under the same name.
    """
    fake.hold()
    lnd.write()
    with Daemon(env) as daemon:
        fake.wait_for_requests(1)
        daemon.signal(signal.SIGSTOP)
        last = lnd.write()
        time.sleep(SUSPENDED_SECONDS)  # as long as a short suspend
        daemon.signal(signal.SIGCONT)
        fake.release()
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert last is version
        assert daemon.stop() == 0
    for ending, most in ((lnd.written[0].sha256[-6:], 1), (last.sha256[-6:], 2)):
        assert len({name for name in names_in(fake) if name.endswith(ending)}) <= most
    check(refreshes=1)  # the last one, if the first had to be sent after it


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


STATES = ("starting", "idle", "sending", "versions waiting", "between attempts", "stopping")


def bring_to(state: str, daemon: Daemon, lnd: Lnd, fake: FakeS3) -> None:
    """Let LND write, and bring the daemon, which is just ready, to this state."""
    held = state in ("sending", "versions waiting", "stopping")
    before = len(fake.requests)
    if held:
        fake.hold()
    if state == "between attempts":
        fake.set_default(answers.SLOW_DOWN)
    version = lnd.write()
    if held:
        fake.wait_for_requests(before + 1)
    if state == "idle":
        daemon.wait_for_stored(version)
    if state == "between attempts":
        daemon.wait_for_log("cannot store")
        fake.set_default(answers.STORED)
    if state in ("versions waiting", "stopping"):
        for _ in range(5):
            daemon.wait_for_captured(lnd.write())
    if state == "stopping":
        daemon.begin_to_stop()


@pytest.mark.parametrize("state", STATES)
def test_killed_in_each_state(
    state: str,
    env: dict[str, str],
    lnd: Lnd,
    fake: FakeS3,
    check: partial[None],
    staging: Path,
) -> None:
    """Killed in any state as the OOM killer does it, the next start sends what was staged, under
    the same names.
    """
    with Daemon(env) as daemon:
        bring_to(state, daemon, lnd, fake)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
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
    """Under updates as fast as the file system takes them it captures what it can, and the last one
    without fail.
    """
    lnd.archive = False
    with Daemon(env) as daemon:
        for _ in range(UPDATES):
            lnd.write(data=os.urandom(45))
        last = lnd.written[-1]
        assert daemon.systemd  # it is still there
        daemon.wait_for_log(f"stored .*{last.sha256[-6:]}", timeout=120)
        daemon.signal(signal.SIGTERM)
        daemon.wait(timeout=120)
    with Script(env, "once") as rest:  # what did not fit into the grace period
        assert rest.wait(timeout=300) == 0
    record_property("injected", UPDATES)
    check(replaced_ok=True, refreshes=None)
    assert Counter(names_in(fake)).most_common(1)[0][1] <= 2, "a version was sent again and again"


@pytest.mark.cold
@pytest.mark.once
@pytest.mark.timeout(900)
def test_a_month_away(
    env: dict[str, str],
    lnd: Lnd,
    fake: FakeS3,
    staging: Path,
    check: partial[None],
    record_property: Callable[[str, object], None],
) -> None:
    """After an outage with 10,000 versions staged all are delivered, newest first, with hardly more
    memory.
    """
    for number in range(AWAY_STAGED):
        data = channel_backup(1)
        path = staging / version_name(data, FIRST + number * timedelta(minutes=4))
        path.write_bytes(data)
        path.chmod(0o600)
        lnd.placed.append(data)
    waiting = staged(staging)
    fake.hold()
    last = lnd.write()
    with Daemon(env) as daemon:
        fake.wait_for_requests(1)
        before = _memory(daemon.pid)
        fake.release()
        daemon.wait_for_log(f"stored .*{waiting[0]}", timeout=600)
        assert _memory(daemon.pid) < 1.2 * before
        assert daemon.stop() == 0
    assert names_in(fake)[0].endswith(last.sha256[-6:])
    assert names_in(fake)[1:-1] == waiting[::-1]
    assert names_in(fake)[-1].endswith(last.sha256[-6:])  # once more
    record_property("injected", 1)
    check(refreshes=1)


def _memory(pid: int) -> int:
    """Return the memory of a process in kB."""
    found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])
