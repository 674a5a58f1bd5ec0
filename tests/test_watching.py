"""Whatever happens to LND's directory and to its events, the version on disk is found."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import Daemon, FaultProxy, Lnd, Written, channel_backup
from kit import script as script_module
from shared import OFTEN, SELDOM, SteppedS3

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial

    from shared import Session

AGAIN = r"again, after \d+ s"


@pytest.fixture
def _mount_namespace(started_by: Callable[[str], None]) -> None:
    """Give the program a mount namespace of its own."""
    if (
        os.geteuid()
        or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode  # noqa: S607
    ):
        pytest.skip("needs root, and unshare -m")
    unshare = ["unshare", "-m", "--propagation", "private", sys.executable]
    started_by(f"import os, sys\nos.execvp('unshare', [*{unshare!r}, SCRIPT, *sys.argv[1:]])")


def mount(daemon: Daemon, *command: str) -> None:
    """Run a command in the daemon's mount namespace."""
    subprocess.run(["nsenter", "-m", "-t", str(daemon.pid), *command], check=True)  # noqa: S607


def move(lnd: Lnd, directory: Path) -> None:
    """Let LND go on in another directory, or under another path of the same one."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lnd.directory, lnd.path = directory, directory / lnd.path.name


def rebuild(lnd: Lnd) -> int:
    """Remove LND's directory, make it anew, and return its former inode number."""
    inode = lnd.directory.stat().st_ino
    shutil.rmtree(lnd.directory)
    lnd.directory.mkdir(mode=0o700)
    return inode


# --- Writers ---


@pytest.mark.parametrize("archive", [True, False])
def test_a_rename_over_the_file_is_seen(session: Session, lnd: Lnd, *, archive: bool) -> None:
    """An update by LND's own sequence is stored without waiting for a rescan."""
    lnd.archive = archive
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_stored(first)
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())


def test_a_file_first_created_later_is_seen(session: Session, lnd: Lnd) -> None:
    """The first file of a new node is stored although there was none at the start."""
    with session() as daemon:
        daemon.wait_for_log("No such file")
        daemon.wait_for_stored(lnd.write(channels=0))
        daemon.wait_for_log(AGAIN)


def test_a_writer_in_place_is_seen(session: Session, lnd: Lnd) -> None:
    """A file that is truncated, written and closed is stored without waiting for a rescan."""
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write_in_place())
        daemon.wait_for_stored(lnd.write_in_place(channels=3))


def test_the_last_of_a_burst_is_stored(session: Session, lnd: Lnd) -> None:
    """Of thirty versions as fast as they can be written, the last is stored, and the others in
    their order.
    """
    lnd.write()
    with session(replaced_ok=True, refreshes=1) as daemon:
        for _ in range(30):
            lnd.write(channels=100)
        daemon.wait_for_stored(lnd.written[-1])
        assert daemon.stop() == 0
        names = daemon.stored_names()
        assert names[-1] == max(names)


def test_a_file_linked_into_place_is_found_by_the_rescan(session: Session, lnd: Lnd) -> None:
    """A version that comes without any event that is listened to is found at the next look."""
    first = lnd.write()
    elsewhere = Lnd(lnd.directory / "elsewhere")
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        second = elsewhere.write()
        lnd.written.append(second)
        lnd.path.unlink()
        lnd.path.hardlink_to(elsewhere.path)
        daemon.wait_for_stored(second)


def test_a_file_deleted_and_made_again_is_stored(session: Session, lnd: Lnd) -> None:
    """A deleted file is a warning at the next look, and the next file is stored."""
    first = lnd.write()
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        lnd.path.unlink()
        daemon.wait_for_log("warning: cannot read channel.backup: .*: No such file")
        daemon.wait_for_stored(lnd.write())


def test_a_file_that_comes_back_unchanged_is_no_new_version(session: Session, lnd: Lnd) -> None:
    """The same bytes moved away and back are not put a second time."""
    first, aside = lnd.write(), lnd.directory / "aside"
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        lnd.path.rename(aside)
        daemon.wait_for_log("No such file")
        aside.rename(lnd.path)
        daemon.wait_for_log(AGAIN)
        daemon.wait_for_looks()


def test_a_file_touched_while_it_is_read_is_read_again(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """A file that changes under the reader is not staged before it keeps still, and then it is."""
    lnd.write()
    size, written_enough = 12 << 20, threading.Event()

    def keep_writing() -> None:
        descriptor = os.open(lnd.path, os.O_WRONLY)
        try:
            while not written_enough.is_set():
                os.pwrite(descriptor, lnd.written[0].data[:1], 0)
        finally:
            os.close(descriptor)

    lnd.written.clear()
    lnd.write(data=channel_backup(1) + bytes(size))
    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        with Daemon(env | OFTEN) as daemon:
            daemon.wait_for_log("it changed while it was read")
            written_enough.set()
            writer.join()
            last = lnd.write()
            daemon.wait_for_stored(last)
            assert daemon.stop() == 0
    finally:
        written_enough.set()
        writer.join()
    check(replaced_ok=True, refreshes=1)


def test_a_file_that_grows_slowly_is_stored_in_the_end(session: Session, lnd: Lnd) -> None:
    """Of a file written in place piece by piece, the whole is stored, whatever was seen of its
    parts.
    """
    first = lnd.write()
    data = channel_backup(50)
    # The whole is put once more if a part of it, staged before, is sent after it.
    with session({"RESCAN_SECONDS": "0.05"}, refreshes=1) as daemon:
        daemon.wait_for_stored(first)
        with lnd.path.open("wb", buffering=0) as file:
            for start in range(0, len(data), 4096):
                lnd.placed.append(data[: start + 4096])
                file.write(data[start : start + 4096])
                daemon.wait_for_looks(1)
            last = Written(data, hashlib.sha256(data).hexdigest(), 50, first.renamed_at, first.wall)
            lnd.placed.pop()
            lnd.written.append(last)
        daemon.wait_for_stored(last)


# --- The directory ---


def test_a_directory_made_later_is_watched(session: Session, lnd: Lnd) -> None:
    """A directory that is missing at the start is a warning, and is watched when it is there."""
    lnd.directory.rmdir()
    with session() as daemon:
        daemon.wait_for_log("warning: .*: No such file")
        lnd.directory.mkdir(mode=0o700)
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)


@pytest.mark.parametrize("same_inode", [False, True])
def test_a_directory_removed_and_made_again_is_watched(
    session: Session, lnd: Lnd, *, same_inode: bool
) -> None:
    """A directory made anew is watched like the first one, even if it has got the inode number of
    the first.
    """
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_stored(first)
        daemon.signal(signal.SIGSTOP)
        inode, fillers = rebuild(lnd), 0
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
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)


def test_a_directory_put_in_the_place_of_another_is_watched(session: Session, lnd: Lnd) -> None:
    """When the directory is renamed away the new one is watched, and the old one no more."""
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_stored(first)
        lnd.directory.rename(lnd.directory.with_name("old"))
        lnd.directory.mkdir(mode=0o700)
        daemon.wait_for_stored(lnd.write())
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)


def test_a_directory_renamed_away_and_back_is_watched(session: Session, lnd: Lnd) -> None:
    """A directory that comes back under its name is watched, and what was written meanwhile is
    stored.
    """
    first, away = lnd.write(), lnd.directory.with_name("away")
    with session() as daemon:
        daemon.wait_for_stored(first)
        lnd.directory.rename(away)
        daemon.wait_for_log("No such file")
        home = lnd.directory
        move(lnd, away)
        second = lnd.write()
        away.rename(home)
        move(lnd, home)
        daemon.wait_for_stored(second)
        daemon.wait_for_log(AGAIN)
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)


def test_events_of_the_old_directory_do_not_confuse(session: Session, lnd: Lnd) -> None:
    """What goes on in a directory that lost its name is neither stored nor does it end the watch of
    the new one.
    """
    first, old = lnd.write(), Lnd(lnd.directory.with_name("old"))
    old.directory.rmdir()
    with session() as daemon:
        daemon.wait_for_stored(first)
        daemon.signal(signal.SIGSTOP)
        lnd.directory.rename(old.directory)
        old.write()
        lnd.directory.mkdir(mode=0o700)
        second = lnd.write()
        shutil.rmtree(old.directory)
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_stored(second)
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)


def test_a_replaced_ancestor_is_found_by_the_rescan(
    session: Session, lnd: Lnd, tmp_path: Path
) -> None:
    """When a directory further up is replaced, of which no event tells, the new path is watched
    after the next look.
    """
    move(lnd, tmp_path / "above" / "lnd")
    first = lnd.write()
    with session(OFTEN | {"MONITOR_FILE_PATH": str(lnd.path)}) as daemon:
        daemon.wait_for_stored(first)
        (tmp_path / "above").rename(tmp_path / "former")
        move(lnd, lnd.directory)
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)
        daemon.wait_for_stored(lnd.write())


def test_a_switched_link_to_the_directory_is_found_by_the_rescan(
    session: Session, lnd: Lnd, tmp_path: Path
) -> None:
    """When a link to the directory is switched, of which no event tells, the other directory is
    watched.
    """
    link = tmp_path / "link"
    link.symlink_to(lnd.directory)
    first = lnd.write()
    with session(OFTEN | {"MONITOR_FILE_PATH": str(link / lnd.path.name)}) as daemon:
        daemon.wait_for_stored(first)
        move(lnd, tmp_path / "other")
        second = lnd.write()
        (tmp_path / "new-link").symlink_to(lnd.directory)
        (tmp_path / "new-link").rename(link)
        daemon.wait_for_stored(second)
        daemon.assert_watches_only(lnd.directory)
        daemon.wait_for_stored(lnd.write())


def test_a_link_in_place_of_the_file_is_followed(
    session: Session, lnd: Lnd, tmp_path: Path
) -> None:
    """The target of a link is found by the rescan when it is replaced, and the log says that
    nothing else finds it.
    """
    link = tmp_path / "links" / lnd.path.name
    link.parent.mkdir()
    link.symlink_to(lnd.path)
    first = lnd.write()
    with session(OFTEN | {"MONITOR_FILE_PATH": str(link)}) as daemon:
        daemon.wait_for_log("warning: .*is a link: .*only .*rescan")
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())


@pytest.mark.usefixtures("_mount_namespace")
def test_a_mount_over_the_directory_is_found_by_the_rescan(
    session: Session, lnd: Lnd, tmp_path: Path
) -> None:
    """When another directory is mounted over LND's, of which no event tells, that one is watched,
    and LND's again.
    """
    first, home = lnd.write(), lnd.directory
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        move(lnd, tmp_path / "mounted")
        second = lnd.write()
        mount(daemon, "mount", "--bind", str(lnd.directory), str(home))
        daemon.wait_for_stored(second)
        daemon.assert_watches_only(lnd.directory)
        daemon.wait_for_stored(lnd.write())
        move(lnd, home)
        third = lnd.write()
        mount(daemon, "umount", str(home))
        daemon.wait_for_stored(third)
        daemon.assert_watches_only(lnd.directory)


@pytest.mark.usefixtures("_mount_namespace")
def test_an_unmounted_file_system_is_no_end(session: Session, lnd: Lnd) -> None:
    """When the file system of LND's directory is unmounted, the directory below is watched at
    once.
    """
    home = lnd.directory
    with session(OFTEN) as daemon:
        mount(daemon, "mount", "-t", "tmpfs", "none", str(home))
        move(lnd, Path(f"/proc/{daemon.pid}/root{home}"))
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)
        move(lnd, home)
        mount(daemon, "umount", str(home))
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)
        daemon.wait_for_stored(lnd.write())


# --- inotify ---


def test_an_overflow_of_events_loses_nothing(session: Session, lnd: Lnd) -> None:
    """The version whose event did not fit into the kernel's queue any more is stored all the
    same.
    """
    first = lnd.write()
    here, there = lnd.directory / "here", lnd.directory / "there"
    here.touch()
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if most > 1 << 17:
        pytest.skip("the queue is too long to be filled quickly")
    with session() as daemon:
        daemon.wait_for_stored(first)
        daemon.signal(signal.SIGSTOP)
        for _ in range(most // 2 + 1):
            os.rename(here, there)
            os.rename(there, here)
        second = lnd.write()
        daemon.signal(signal.SIGCONT)
        daemon.wait_for_stored(second)
        daemon.wait_for_stored(lnd.write())


@pytest.mark.parametrize(
    ("call", "number", "setting"),
    [
        ("__init__", errno.EMFILE, "max_user_instances"),
        ("add_watch", errno.ENOSPC, "max_user_watches"),
    ],
)
def test_without_inotify_it_looks_at_intervals(
    session: Session,
    lnd: Lnd,
    tmp_path: Path,
    started_by: Callable[[str], None],
    call: str,
    number: int,
    setting: str,
) -> None:
    """Where inotify is used up, the file is looked at every second, the hint names the setting, and
    it recovers.
    """
    used_up = tmp_path / "used-up"
    used_up.touch()
    started_by(f"""
import asyncinotify, os
original = asyncinotify.Inotify.{call}
def refuse(*arguments, **more):
    if os.path.exists({str(used_up)!r}):
        raise OSError({number}, os.strerror({number}))
    return original(*arguments, **more)
asyncinotify.Inotify.{call} = refuse
""")
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_log(
            f"error: cannot watch, so it is only checked at intervals: .*{os.strerror(number)}"
        )
        daemon.wait_for_log(f"hint: .*{setting}")
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())
        used_up.unlink()
        daemon.wait_for_log(AGAIN)
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)
        assert daemon.log.count("cannot watch") == 1


@pytest.mark.parametrize(
    ("limit", "setting"),
    [("max_inotify_instances", "max_user_instances"), ("max_inotify_watches", "max_user_watches")],
)
def test_the_limits_of_the_kernel_are_survived(
    session: Session, lnd: Lnd, started_by: Callable[[str], None], limit: str, setting: str
) -> None:
    """Under the kernel's own limits the file is looked at every second, and the hint names the
    setting.
    """
    lower = f'echo 0 > /proc/sys/user/{limit} && exec "$@"'
    unshare = ["unshare", "-U", "-r", "sh", "-c", lower, "sh"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs unshare -U, and limits by user namespace")
    started_by(
        f"import os, sys\nos.execvp('unshare', [*{unshare!r}, sys.executable, SCRIPT, "
        f"*sys.argv[1:]])"
    )
    first = lnd.write()
    with session() as daemon:
        daemon.wait_for_log(
            f"error: cannot watch, so it is only checked at intervals: .*\n.*hint: .*{setting}"
        )
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())


def test_a_failing_reader_ends_the_daemon(
    env: dict[str, str],
    lnd: Lnd,
    session: Session,
    started_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When events cannot be read for an unknown reason, the daemon ends with a failure, and does
    not spin.
    """
    program = script_module.SCRIPT
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
    monkeypatch.setattr(script_module, "SCRIPT", program)
    with session(refreshes=1) as daemon:
        daemon.wait_for_stored(lnd.written[-1])


def test_the_event_loop_has_nothing_to_complain_about(session: Session, lnd: Lnd) -> None:
    """In asyncio's debug mode a session with switches of the directory brings up no complaint."""
    first = lnd.write()
    with session({"PYTHONASYNCIODEBUG": "1", "PYTHONDEVMODE": "1"}) as daemon:
        daemon.wait_for_stored(first)
        lnd.directory.rename(lnd.directory.with_name("old"))
        lnd.directory.mkdir(mode=0o700)
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        assert not re.search("Traceback|Warning|never|destroyed|exception", daemon.log), daemon.log


# --- Permissions ---


# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: without them root is denied what its files' modes deny.
WITHOUT_PRIVILEGE = """
import ctypes, os, sys
for capability in (1, 2):
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(24, capability):
        sys.exit("cannot drop a capability")
os.execv(sys.executable, [sys.executable, SCRIPT, *sys.argv[1:]])
"""


@pytest.mark.parametrize("what", ["directory", "file"])
def test_a_permission_that_is_granted_later_is_noticed(
    session: Session, lnd: Lnd, started_by: Callable[[str], None], what: str
) -> None:
    """A denied directory or file is an error that names what is needed, and once granted the
    version is stored.
    """
    started_by(WITHOUT_PRIVILEGE)
    first = lnd.write()
    denied = lnd.directory if what == "directory" else lnd.path
    mode = denied.stat().st_mode
    denied.chmod(0)
    with session(OFTEN) as daemon:
        daemon.wait_for_log(
            "error: cannot read channel.backup: .*Permission denied\n.*hint: .*needs r on the file"
        )
        daemon.wait_for_looks()
        denied.chmod(mode)
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())
        daemon.assert_watches_only(lnd.directory)
        assert daemon.log.count("cannot read channel.backup") == 1


# --- Writes during an upload ---


def test_the_gap_between_read_and_rename_does_not_matter(
    session: Session, lnd: Lnd, s3_line: FaultProxy
) -> None:
    """With 30 ms between LND's read and its rename and a slow upload, the newest version is stored
    20 of 20 times.
    """
    s3_line.set("latency", up=0.15, down=0.15)
    lnd.read_gap_seconds = 0.03
    lnd.write()
    with session(replaced_ok=[0]) as daemon:
        for _ in range(20):
            daemon.wait_for_stored(lnd.write())


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
