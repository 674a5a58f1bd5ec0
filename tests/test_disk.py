"""Crashes, power cuts, and disks that are full or fail: what was staged gets out whole."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import pytest
from inside import GOOD, digest, discard, files, mode, offered, restart, stage, true_name
from kit import Daemon, Script, channel_backup, run_script, unlistable_while, write_launcher
from kit.script import LATE_ENOUGH
from shared import AT_ONCE, AWAY, OFTEN, SELDOM, done_well, leave, staged, staged_data

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kit import FakeS3, FaultProxy, Lnd, S3Server
    from shared import Env, Session, StartedBy


# --- Crashes ---


@pytest.mark.unmeasured
@pytest.mark.timeout(240)  # some twenty starts, one after the other
def test_kills_at_any_moment_lose_nothing_that_was_staged(
    env: Env, lnd: Lnd, s3: S3Server, session: Session, staging: Path
) -> None:
    """Killed ten times in the middle of bursts, the daemon leaves no litter."""
    chance, before = random.Random(1), set()  # noqa: S311 - any moments will do
    for _ in range(10):
        with Daemon(SELDOM | env) as daemon:
            for _ in range(chance.randrange(1, 12)):
                lnd.write(channels=chance.choice([0, 10, 300]))
            time.sleep(chance.uniform(0, 0.05))  # the moment
            daemon.signal(signal.SIGKILL)
            assert daemon.wait() == -signal.SIGKILL
        before |= set(staged(staging))
    with session(replaced_ok=True, refreshes=10) as daemon:
        daemon.wait_for_stored(lnd.write())
    assert sorted(entry.name for entry in staging.iterdir()) == [".lock", ".receipt"]
    assert before <= {key.rpartition("/")[2] for key in s3.objects(env["S3_BUCKET_NAME"])}


LIMITED = """
import resource, signal
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
"""


def test_a_kill_in_the_middle_of_a_write_leaves_no_half_version(
    env: Env, lnd: Lnd, session: Session, staging: Path, tmp_path: Path
) -> None:
    """It is killed when 4096 bytes are written."""
    version = lnd.write()
    with Script(env, launcher=write_launcher(tmp_path / "limited.py", LIMITED)) as script:
        assert script.wait() == -signal.SIGXFSZ
    assert staged(staging) == []
    with session() as daemon:
        daemon.wait_for_stored(version)
    assert sorted(entry.name for entry in staging.iterdir()) == [".lock", ".receipt"]


def test_a_kill_before_the_receipt_leaves_one_object(
    env: Env, lnd: Lnd, s3_line: FaultProxy, session: Session, staging: Path
) -> None:
    """After S3 has stored it, and before the answer: it is sent again under the same name."""
    s3_line.set("swallow_response")
    version = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        s3_line.wait_until(lambda counts: counts.swallowed > 0)
        names = staged(staging)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    s3_line.set("pass")
    with session() as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stored_names() == names


# --- A disk that is full or refuses ---


def test_a_version_that_the_disk_refuses_is_sent_from_memory(
    session: Session, lnd: Lnd, s3_line: FaultProxy, staging: Path, started_by: StartedBy
) -> None:
    """The log says so and names what is given up, and it recovers."""
    started_by("import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))")
    with session(OFTEN | {"SHUTDOWN_GRACE_SECONDS": "0"}, replaced_ok=[1, 2]) as daemon:
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot use BACKUP_DIRECTORY: .*\n.*hint: .*sent from memory")
        daemon.wait_for_log("staging works again")
        s3_line.set("refuse", cut=True)
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        daemon.wait_for_log("cannot store")
        for given_up in lnd.written[1:3]:
            daemon.wait_for_log(rf"error: dropped, never staged: .*-{given_up.sha256[-6:]}\b")
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        daemon.wait_for_log("staging works again", count=2)
        daemon.wait_for_looks()
        assert daemon.log.count("cannot use BACKUP_DIRECTORY") == 2, "each trouble once"
        assert staged_data(staging) == [lnd.written[3].data]


def fill(directory: Path) -> Path:
    """Fill the disk with somebody else's file."""
    path = directory / "theirs"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return path


@pytest.fixture
def full_disk(small_disk: Path) -> Path:
    """Return the staging directory on a disk that is full."""
    (small_disk / ".lock").touch(0o600)
    fill(small_disk)
    return small_disk


def test_a_full_disk_is_no_end(session: Session, lnd: Lnd, small_disk: Path) -> None:
    """A version is sent once and from memory; when there is room again nothing is left over."""
    first = lnd.write()
    with session(OFTEN | {"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        daemon.wait_for_stored(first)
        filler = fill(small_disk)
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot use BACKUP_DIRECTORY: .*No space")
        filler.unlink()
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_looks()
        assert staged(small_disk) == []
        assert daemon.stop() == 0
        names = daemon.stored_names()
        assert len(set(names)) == len(names), "sent more than once"


def test_once_sends_from_memory_when_the_disk_is_full(
    fake: FakeS3, fake_env: Env, full_disk: Path, lnd: Lnd
) -> None:
    """It says that it could not stage the version, and leaves nothing half there."""
    version = lnd.write()
    assert "No space left" in done_well(fake_env).stderr
    assert [request.body for request in fake.requests] == [version.data]
    assert {entry.name for entry in full_disk.iterdir()} == {".lock", "theirs"}


@pytest.mark.usefixtures("full_disk")
def test_what_neither_the_disk_nor_s3_took_is_told_at_the_end(fake_env: Env, lnd: Lnd) -> None:
    version = lnd.write()
    with Daemon(SELDOM | fake_env | AWAY) as daemon:
        daemon.wait_for_captured(version)
        assert daemon.stop() == 0
        assert re.search(rf"error: not backed up: \S+-{version.sha256[-6:]}: ", daemon.log)


def test_a_disk_that_is_read_only_at_the_start(
    fake: FakeS3, fake_env: Env, small_disk: Path, lnd: Lnd
) -> None:
    """A restart sends what waits there, and the newest from memory."""
    (small_disk / ".lock").touch(0o600)
    (small_disk / true_name(GOOD)).write_bytes(GOOD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # noqa: S607
    version = lnd.write()
    with Daemon(fake_env) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_log(rf"stored s3://\S+{true_name(GOOD)}")
        assert "Read-only file system" in daemon.log
        assert daemon.stop() == 0
    assert {request.body for request in fake.requests} == {version.data, GOOD}
    assert fake.requests[-1].body == version.data


def test_the_staging_directory_may_vanish(session: Session, lnd: Lnd, staging: Path) -> None:
    first = lnd.write()
    with session({"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        daemon.wait_for_stored(first)
        while staging.exists():
            shutil.rmtree(staging, ignore_errors=True)  # a receipt may just be written
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log("error: cannot (use BACKUP_DIRECTORY|write)")
        assert daemon.stop() == 0
        names = daemon.stored_names()
        assert len(set(names)) == len(names), "sent more than once"


def test_a_staging_directory_that_cannot_be_listed_is_explained(
    env: Env, lnd: Lnd, staging: Path, started_by: StartedBy
) -> None:
    """A disk that cannot list the staging directory is named, and is no fault of the program."""
    started_by(unlistable_while(lnd.directory))
    lnd.write()
    done = run_script(env, "once")
    assert done.returncode == 1
    told = f"error: cannot use BACKUP_DIRECTORY: {staging}: .*Input/output error"
    assert re.search(told, done.stderr)
    assert "a fault of this program" not in done.stderr


# --- Each call that can fail, and a power cut ---


class PowerCut(BaseException):
    """The end of the process between two calls."""


CALLS = ["open", "fsync", "fdatasync", "rename", "replace", "unlink", "remove", "fchmod", "scandir"]


class Disk(contextlib.ExitStack):
    """Records each call that changes or reads the disk, and fails those that it is told to fail."""

    def __init__(self, error: BaseException | None = None, due: range = range(0)) -> None:
        """Raise the error at the calls of these numbers, counted from 1."""
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self.error = error
        self.due = due

    def step(self, call: str, target: object, *_: object, **_more: object) -> object:
        """Record a call by the last name of its path; fail it if it is its turn, or let it be."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        self.calls.append((call, os.path.basename(str(target))))
        if self.error and len(self.calls) in self.due:
            raise self.error
        return mock.DEFAULT

    def made(self, calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return which of these calls were made, in their order."""
        return [call for call in self.calls if call in calls]

    def __enter__(self) -> Self:
        """Stand between the program and its disk."""
        for name in CALLS:
            real, step = getattr(os, name), partial(self.step, name)
            self.enter_context(mock.patch.object(os, name, wraps=real, side_effect=step))
        self.enter_context(mock.patch.object(program, "open", self._open, create=True))
        return self

    def _open(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - passed on
        """Open a file whose writing can fail."""
        file = open(*args, **options)  # noqa: SIM115 - the program closes it
        step = partial(self.step, "write", file.fileno())
        file.write = mock.Mock(wraps=file.write, side_effect=step)
        return file


def test_version_is_on_disk_before_it_is_offered(queue: program.Staging, staging: Path) -> None:
    """The bytes are written and synced before the rename, and the directory after it."""
    with Disk() as disk:
        partial = f".{stage(queue, GOOD)}.partial"
    steps = [("open", partial), ("write", partial), ("fsync", partial), ("rename", partial)]
    steps.append(("fsync", staging.name))
    assert disk.made(steps) == steps


def test_receipt_is_on_disk_before_the_version_is_deleted(
    queue: program.Staging, staging: Path
) -> None:
    """It is synced and renamed, and the directory synced."""
    name, partial = stage(queue, GOOD), "..receipt.partial"
    with Disk() as disk:
        discard(queue, name, GOOD)
    steps = [("write", partial), ("fsync", partial), ("rename", partial)]
    steps += [("fsync", staging.name), ("unlink", name)]
    assert disk.made(steps) == steps


def assert_whole(directory: Path) -> None:
    for name, data in files(directory).items():
        assert name.endswith(digest(data)[-6:]), f"{name} is half there"


def each_call(
    error: BaseException, directory: Path, *, from_then_on: bool = False
) -> Iterator[tuple[Disk, Path]]:
    """Yield a disk and a directory for each call, in which that call fails."""
    for number in itertools.count(1):
        own = directory / str(number)
        disk = Disk(error, range(number, 1000 if from_then_on else number + 1))
        yield disk, own
        leave(own)
        if len(disk.calls) < number:
            assert number > 5
            return


each_error = pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS], ids=os.strerror
)


@each_error
def test_version_is_staged_at_the_next_try_when_any_call_fails(code: int, tmp_path: Path) -> None:
    """It is offered once."""
    version = program.Version(true_name(GOOD), GOOD)
    for disk, directory in each_call(OSError(code, os.strerror(code)), tmp_path):
        queue = program.Staging(directory)
        with disk, contextlib.suppress(OSError):
            queue.stage(version)
        assert_whole(directory)
        assert {entry.name for entry in directory.iterdir()} <= {".lock", version.name}
        queue.relist()
        queue.stage(version)
        assert queue.pending == [version.name]
        assert files(directory) == {version.name: GOOD}
        assert mode(directory / version.name) == 0o600
        assert offered(restart(directory)) == [version]
        assert {entry.name for entry in directory.iterdir()} == {".lock", version.name}


@each_error
def test_version_is_not_sent_again_when_any_call_of_tidying_fails(
    code: int, tmp_path: Path
) -> None:
    """It is deleted at the next try, and its name is remembered."""
    for disk, directory in each_call(OSError(code, os.strerror(code)), tmp_path):
        queue = program.Staging(directory)
        name = stage(queue, GOOD)
        with disk, contextlib.suppress(OSError):
            discard(queue, name, GOOD)
        assert_whole(directory)
        remembered = program.read_receipt(directory)
        assert name in files(directory) or (remembered and remembered.name == name)
        queue.relist()
        assert queue.newest() is None
        queue.tidy()
        assert {entry.name for entry in directory.iterdir()} == {".lock", ".receipt"}


def test_the_trouble_lasts_until_the_receipt_is_written(
    queue: program.Staging, staging: Path
) -> None:
    """Where the receipt cannot be written, its version is deleted, and stays in the books."""
    name = stage(queue, GOOD)
    with (
        mock.patch.object(program, "write_file", side_effect=OSError(errno.ENOSPC, "No space")),
        pytest.raises(OSError, match="No space"),
    ):
        discard(queue, name, GOOD)
    assert files(staging) == {}
    assert queue.acknowledged == {name}
    queue.tidy()
    assert queue.acknowledged == set()


@pytest.mark.parametrize("while_discarding", [False, True])
def test_power_cut_at_any_call_leaves_a_version_whole_or_not_at_all(
    tmp_path: Path, *, while_discarding: bool
) -> None:
    """The next process finds nothing to repair."""
    old = channel_backup(2)
    for disk, directory in each_call(PowerCut(), tmp_path, from_then_on=True):
        queue = program.Staging(directory)
        name = stage(queue, old)
        with disk, contextlib.suppress(PowerCut):
            if while_discarding:
                discard(queue, name, old)
            else:
                stage(queue, GOOD)
        queue = restart(directory)
        assert_whole(directory)
        left = [version.data for version in offered(queue)]
        assert left in ([[], [old]] if while_discarding else [[old], [GOOD, old]])
        assert left or (queue.receipt and queue.receipt.name == name)
        assert not list(directory.glob(".*.partial"))


# --- A directory that cannot be listed ---


@pytest.mark.unmeasured
def test_a_staging_directory_that_cannot_be_listed(
    session: Session, lnd: Lnd, staging: Path, tmp_path: Path, started_by: StartedBy
) -> None:
    """Each new version goes to S3 all the same, and a stop is an orderly one."""
    there = tmp_path / "broken"
    started_by(unlistable_while(there))
    with session(AT_ONCE) as daemon:
        daemon.wait_for_stored(lnd.write())
        there.touch()
        for _ in range(2):
            daemon.wait_for_stored(lnd.write())
        daemon.wait_for_log(f"error: cannot use BACKUP_DIRECTORY: {staging}: .*Input/output error")
        there.unlink()
        daemon.wait_for_stored(lnd.write())
        there.touch()
        daemon.wait_for_looks()


UNREADABLE = """
import os
opened = os.open
def open_unless_read(path, flags, *more, dir_fd=None):
    if dir_fd is not None and str(path).startswith("20") and not flags & os.O_WRONLY:
        if os.path.exists({there!r}) and path.endswith(open({there!r}).read()):
            raise OSError(5, os.strerror(5), path)
    return opened(path, flags, *more, dir_fd=dir_fd)
os.open = open_unless_read
"""


@pytest.mark.unmeasured
def test_a_disk_that_takes_versions_and_gives_none_back(
    session: Session, lnd: Lnd, s3_line: FaultProxy, staging: Path, started_by: StartedBy
) -> None:
    """The newest is sent from memory; one that cannot be read keeps nothing back."""
    there = staging.parent / "broken"
    started_by(LATE_ENOUGH + UNREADABLE.format(there=str(there)))
    with session(AT_ONCE, refreshes=2) as daemon:
        daemon.wait_for_stored(lnd.write())
        there.touch()
        daemon.wait_for_stored(lnd.write())
        s3_line.set("refuse", cut=True)
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        oldest, older, newer = lnd.written[-3:]
        there.write_text(older.sha256[-6:])
        s3_line.set("pass")
        daemon.wait_for_stored(newer)
        daemon.wait_for_stored(oldest)
        daemon.wait_for_log("Input/output error")
        there.write_text("no name")
        daemon.wait_for_log("staging works again")
        daemon.wait_for_stored(older)
        daemon.wait_for_looks()
        assert daemon.log.count(" captured ") in (6, 7), "the newest once more, as the last"
    assert files(staging) == {}
