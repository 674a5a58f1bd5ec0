"""Whatever happens to LND's directory and to its events, the version on disk is found."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import Daemon, Lnd
from shared import OFTEN, SELDOM, expect_newest_last, ordinary, write_unseen

if TYPE_CHECKING:
    from collections.abc import Callable

    from kit import FaultProxy
    from shared import Env, Session, StartedBy

AGAIN = r"again, after \d+ s"


@pytest.fixture
def _mount_namespace(unshared: Callable[..., None]) -> None:
    if os.geteuid():
        pytest.skip("only root can mount")
    unshared("-m", "--propagation", "private")


def mount(daemon: Daemon, *command: str) -> None:
    subprocess.run(["nsenter", "-m", "-t", str(daemon.pid), *command], check=True)  # noqa: S607


def move(lnd: Lnd, directory: Path) -> None:
    """Let LND go on in another directory, or under another path of the same one."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lnd.directory, lnd.path = directory, directory / lnd.path.name


def expect_watched(daemon: Daemon, lnd: Lnd) -> None:
    """Expect that an update in this directory is stored, and that no other is watched."""
    daemon.wait_for_stored(lnd.write())
    daemon.assert_watches_only(lnd.directory)


# --- Writers ---


def test_a_file_first_created_later_is_seen(session: Session, lnd: Lnd) -> None:
    with session() as daemon:
        daemon.wait_for_log("No such file")
        daemon.wait_for_stored(lnd.write(channels=0))
        daemon.wait_for_log(AGAIN)


def test_a_writer_in_place_is_seen(backed_up: Session, lnd: Lnd) -> None:
    with backed_up() as daemon:
        daemon.wait_for_stored(lnd.write_in_place())
        daemon.wait_for_stored(lnd.write_in_place(channels=3))


def test_the_last_of_a_burst_is_stored(session: Session, lnd: Lnd) -> None:
    lnd.write()
    with session(replaced_ok=True, refreshes=1) as daemon:
        for _ in range(30):
            lnd.write(channels=100)
        daemon.wait_for_stored(lnd.written[-1])
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])


def test_a_file_linked_into_place_is_found_by_the_rescan(backed_up: Session, lnd: Lnd) -> None:
    """A version that comes without any event that is listened to is found at the next look."""
    with backed_up(OFTEN) as daemon:
        daemon.wait_for_stored(write_unseen(lnd))


def test_a_file_that_comes_back_unchanged_is_no_new_version(backed_up: Session, lnd: Lnd) -> None:
    aside = lnd.directory / "aside"
    with backed_up(OFTEN) as daemon:
        lnd.path.rename(aside)
        daemon.wait_for_log("warning: cannot read channel.backup: .*: No such file")
        aside.rename(lnd.path)
        daemon.wait_for_log(AGAIN)
        daemon.wait_for_looks()
        daemon.wait_for_stored(lnd.write())


def test_a_file_that_grows_slowly_is_stored_in_the_end(session: Session, lnd: Lnd) -> None:
    """It is written in place, and its parts may be seen."""
    last = lnd.write(channels=50)
    size = len(last.data)
    lnd.placed += [last.data[:end] for end in range(4096, size, 4096)]
    lnd.path.write_bytes(b"")
    # The whole is put once more if a part of it, staged before, is sent after it.
    with session({"RESCAN_SECONDS": "0.05"}, refreshes=1) as daemon:
        with lnd.path.open("wb", buffering=0) as file:
            for start in range(0, size, 4096):
                file.write(last.data[start : start + 4096])
                daemon.wait_for_looks(1)
        daemon.wait_for_stored(last)


# --- The directory ---


def test_a_directory_made_later_is_watched(session: Session, lnd: Lnd) -> None:
    lnd.directory.rmdir()
    with session() as daemon:
        daemon.wait_for_log("warning: .*: No such file")
        lnd.directory.mkdir(mode=0o700)
        daemon.wait_for_stored(lnd.write())
        expect_watched(daemon, lnd)


@pytest.mark.parametrize("same_inode", [False, True])
def test_a_directory_removed_and_made_again_is_watched(
    backed_up: Session, lnd: Lnd, *, same_inode: bool
) -> None:
    """It may have got the inode number of the first."""
    with backed_up() as daemon:
        daemon.signal(signal.SIGSTOP)
        inode, fillers = lnd.directory.stat().st_ino, 0
        shutil.rmtree(lnd.directory)
        lnd.directory.mkdir(mode=0o700)
        while (lnd.directory.stat().st_ino == inode) is not same_inode:
            fillers += 1
            if fillers > 200:
                pytest.skip("this file system gives other inode numbers")
            lnd.directory.rmdir()
            if not same_inode:
                (lnd.directory.parent / f"filler-{fillers}").mkdir()
            lnd.directory.mkdir(mode=0o700)
        second = lnd.write()
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_stored(second)
        expect_watched(daemon, lnd)


def test_a_directory_put_in_the_place_of_another_is_watched(backed_up: Session, lnd: Lnd) -> None:
    """What goes on in the old one is not stored."""
    old = Lnd(lnd.directory.with_name("old"))
    with backed_up() as daemon:
        daemon.signal(signal.SIGSTOP)
        lnd.directory.rename(old.directory)
        old.write()
        lnd.directory.mkdir(mode=0o700)
        second = lnd.write()
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_stored(second)
        expect_watched(daemon, lnd)
        old.write()
        expect_watched(daemon, lnd)


def test_a_directory_renamed_away_and_back_is_watched(backed_up: Session, lnd: Lnd) -> None:
    home, away = lnd.directory, lnd.directory.with_name("away")
    with backed_up() as daemon:
        home.rename(away)
        daemon.wait_for_log("No such file")
        move(lnd, away)
        second = lnd.write()
        away.rename(home)
        move(lnd, home)
        daemon.wait_for_stored(second)
        daemon.wait_for_log(AGAIN)
        expect_watched(daemon, lnd)


def test_a_replaced_ancestor_is_found_by_the_rescan(
    backed_up: Session, lnd: Lnd, tmp_path: Path
) -> None:
    move(lnd, tmp_path / "above" / "lnd")
    with backed_up(OFTEN | {"MONITOR_FILE_PATH": str(lnd.path)}) as daemon:
        (tmp_path / "above").rename(tmp_path / "former")
        move(lnd, lnd.directory)
        expect_watched(daemon, lnd)
        expect_watched(daemon, lnd)


def test_a_switched_link_to_the_directory_is_found_by_the_rescan(
    backed_up: Session, lnd: Lnd, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(lnd.directory)
    with backed_up(OFTEN | {"MONITOR_FILE_PATH": str(link / lnd.path.name)}) as daemon:
        move(lnd, tmp_path / "other")
        second = lnd.write()
        (tmp_path / "new-link").symlink_to(lnd.directory)
        (tmp_path / "new-link").rename(link)
        daemon.wait_for_stored(second)
        expect_watched(daemon, lnd)


def test_a_link_in_place_of_the_file_is_followed(
    backed_up: Session, lnd: Lnd, tmp_path: Path
) -> None:
    """Only the rescan finds a new target, which the log says."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "between").symlink_to(lnd.path)
    (links / lnd.path.name).symlink_to("between")
    with backed_up(OFTEN | {"MONITOR_FILE_PATH": str(links / lnd.path.name)}) as daemon:
        daemon.wait_for_log("warning: .*is a link: .*only .*rescan")
        daemon.wait_for_stored(lnd.write())


@pytest.mark.usefixtures("_mount_namespace")
def test_a_mount_over_the_directory_is_found_by_the_rescan(
    backed_up: Session, lnd: Lnd, tmp_path: Path
) -> None:
    home = lnd.directory
    with backed_up(OFTEN) as daemon:
        move(lnd, tmp_path / "mounted")
        second = lnd.write()
        mount(daemon, "mount", "--bind", str(lnd.directory), str(home))
        daemon.wait_for_stored(second)
        expect_watched(daemon, lnd)
        move(lnd, home)
        third = lnd.write()
        mount(daemon, "umount", str(home))
        daemon.wait_for_stored(third)
        daemon.assert_watches_only(lnd.directory)


@pytest.mark.usefixtures("_mount_namespace")
def test_an_unmounted_file_system_is_no_end(session: Session, lnd: Lnd) -> None:
    """The directory below is watched at once."""
    home = lnd.directory
    with session(OFTEN) as daemon:
        mount(daemon, "mount", "-t", "tmpfs", "none", str(home))
        move(lnd, Path(f"/proc/{daemon.pid}/root{home}"))
        expect_watched(daemon, lnd)
        move(lnd, home)
        mount(daemon, "umount", str(home))
        expect_watched(daemon, lnd)
        expect_watched(daemon, lnd)


# --- inotify ---


def test_an_overflow_of_events_loses_nothing(backed_up: Session, lnd: Lnd) -> None:
    here, there = lnd.directory / "here", lnd.directory / "there"
    here.touch()
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 1 << 17:
        pytest.skip("the queue is too long to be filled quickly")
    with backed_up() as daemon:
        daemon.signal(signal.SIGSTOP)
        for _ in range(most // 2 + 1):
            os.rename(here, there)
            os.rename(there, here)
        second = lnd.write()
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_stored(second)
        daemon.wait_for_stored(lnd.write())


@pytest.mark.parametrize("what", ["instances", "watches"])
def test_the_limits_of_the_kernel_are_survived(
    backed_up: Session, lnd: Lnd, unshared: Callable[..., None], what: str
) -> None:
    """The file is looked at every second until the limit is raised, which the hint names."""
    limit = f"/proc/sys/user/max_inotify_{what}"
    unshared("-U", "-r", command=f"echo 0 > {limit}")
    with backed_up() as daemon:
        daemon.wait_for_log(
            f"error: cannot watch, so it is only checked at .*\n.*hint: .*max_user_{what}"
        )
        daemon.wait_for_stored(lnd.write())
        raise_it = f"echo 100 > {limit}"
        subprocess.run(["nsenter", "-U", "-t", str(daemon.pid), "sh", "-c", raise_it], check=True)  # noqa: S607
        daemon.wait_for_log(AGAIN)
        expect_watched(daemon, lnd)
        assert daemon.log.count("cannot watch") == 1


def test_a_failing_reader_ends_the_daemon(env: Env, lnd: Lnd, started_by: StartedBy) -> None:
    started_by("""
import asyncinotify
def fail(*_):
    raise ArithmeticError("no such event")
asyncinotify.Inotify._get = fail
""")
    first = lnd.write()
    with Daemon(env | SELDOM) as daemon:
        daemon.wait_for_stored(first)
        lnd.write()
        assert daemon.wait() == 1
        assert daemon.log.count("ArithmeticError: no such event") == 1, daemon.log


# --- Permissions ---


@pytest.mark.parametrize("what", ["directory", "file"])
def test_a_permission_that_is_granted_later_is_noticed(
    session: Session, lnd: Lnd, started_by: StartedBy, what: str
) -> None:
    """The error names what is needed, and the next rescan is not waited for."""
    command = [*ordinary(), sys.executable]
    started_by(f"import os, sys\nos.execvp({command[0]!r}, [*{command!r}, SCRIPT, *sys.argv[1:]])")
    first = lnd.write()
    denied = lnd.directory if what == "directory" else lnd.path
    mode = denied.stat().st_mode
    denied.chmod(0)
    with session() as daemon:
        daemon.wait_for_log(
            "error: cannot read channel.backup: .*Permission denied\n.*hint: .*needs r on the file"
        )
        daemon.wait_for_looks(1)
        denied.chmod(mode)
        daemon.wait_for_stored(first)
        expect_watched(daemon, lnd)
        assert daemon.log.count("cannot read channel.backup") == 1


# --- Writes during an upload ---


def test_the_gap_between_read_and_rename_does_not_matter(
    session: Session, lnd: Lnd, s3_line: FaultProxy
) -> None:
    s3_line.set("latency", up=0.05, down=0.05)
    lnd.read_gap_seconds = 0.03
    lnd.write()
    with session(replaced_ok=[0]) as daemon:
        for _ in range(20):
            daemon.wait_for_stored(lnd.write())
