"""How LND's channel.backup is read: whole or not at all, nothing else in its place, no trace."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit import SCRIPT, Daemon, FakeS3, Lnd, as_nobody, channel_backup, run_script
from shared import AT_ONCE, AWAY, LARGEST, OFTEN, SELDOM

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial

    from shared import Session


def refusal(path: Path) -> program.BackupError:
    """Return why this path is not read; it names the path, says what to do, and leaves no
    descriptor open.
    """
    before = os.listdir("/proc/self/fd")
    with pytest.raises(program.BackupError) as caught:
        program.read_channel_backup(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == 1
    return caught.value


MEMORY_MAX_KB = 256 << 10


# --- Sizes ---


@pytest.mark.parametrize("size", [45, 46, 415, 416, 100_000])
def test_file_of_a_possible_size_is_read_as_it_is(size: int, lnd: Lnd) -> None:
    """A file of 45 bytes or more is returned byte for byte."""
    data = os.urandom(size)
    lnd.place(data)
    assert program.read_channel_backup(lnd.path) == data


@pytest.mark.parametrize("size", [0, 1, 44])
def test_file_under_45_bytes_is_refused(size: int, lnd: Lnd) -> None:
    """A file too small for any channel backup is refused with its size, for good."""
    lnd.place(os.urandom(size))
    failure = refusal(lnd.path)
    assert f"{size} bytes" in str(failure)
    assert failure.level == logging.ERROR


def test_file_of_16_mib_is_read(lnd: Lnd) -> None:
    """A file of 16 MiB, the largest there may be, is returned whole."""
    lnd.place(b"")
    os.truncate(lnd.path, LARGEST)
    assert len(program.read_channel_backup(lnd.path)) == LARGEST


@pytest.mark.parametrize("size", [LARGEST + 1, 1 << 40])
def test_larger_file_is_refused_without_being_read_whole(size: int, lnd: Lnd) -> None:
    """A file over 16 MiB is refused with its size, and never takes more memory than the largest
    there may be.
    """
    lnd.place(b"")
    try:
        os.truncate(lnd.path, size)
    except OSError as error:
        pytest.skip(f"this file system has no files of {size} bytes: {error}")
    tracemalloc.start()
    try:
        failure = refusal(lnd.path)
        assert tracemalloc.get_traced_memory()[1] < LARGEST + (1 << 20)
    finally:
        tracemalloc.stop()
    assert str(size) in str(failure)


# --- What stands at the path ---


@pytest.mark.parametrize("path", ["channel.backup", "mainnet/channel.backup", "dangling"])
def test_absent_file_may_come_later(path: str, lnd: Lnd) -> None:
    """A file, a directory or the target of a link that is not there is told apart from all other
    faults, since LND makes it.
    """
    (lnd.directory / "dangling").symlink_to(lnd.directory / "elsewhere")
    assert refusal(lnd.directory / path).level == logging.WARNING


def test_unreadable_file_is_refused_with_the_rights_that_are_needed(public: Path) -> None:
    """A file that the user may not read is refused, and the hint says which rights are needed."""
    path = public / "channel.backup"
    path.write_bytes(channel_backup(1))
    path.chmod(0)
    with as_nobody():
        failure = refusal(path)
    assert "Permission denied" in str(failure)
    assert "this user needs r" in failure.hint


def test_file_in_a_closed_directory_is_refused_with_the_rights_that_are_needed(
    public: Path,
) -> None:
    """A file in a directory that the user may not enter is refused, and the hint says which rights
    are needed.
    """
    path = public / "closed" / "channel.backup"
    path.parent.mkdir()
    path.write_bytes(channel_backup(1))
    path.parent.chmod(0)
    with as_nobody():
        failure = refusal(path)
    path.parent.chmod(0o700)
    assert "Permission denied" in str(failure)
    assert "x on" in failure.hint


def test_link_to_a_backup_is_followed(lnd: Lnd, tmp_path: Path) -> None:
    """A link to a file is followed, also through another link."""
    target, between = tmp_path / "target", tmp_path / "between"
    target.write_bytes(data := channel_backup(1))
    between.symlink_to(target)
    lnd.path.symlink_to(between)
    assert program.read_channel_backup(lnd.path) == data


def test_loop_of_links_is_refused(lnd: Lnd) -> None:
    """Links that lead to each other are refused."""
    other = lnd.directory / "other"
    other.symlink_to(lnd.path)
    lnd.path.symlink_to(other)
    assert refusal(lnd.path).level == logging.ERROR


def test_directory_is_refused(lnd: Lnd) -> None:
    """A directory in the file's place is refused."""
    lnd.path.mkdir()
    assert "Is a directory" in str(refusal(lnd.path))


@pytest.mark.parametrize("linked", [False, True])
def test_fifo_is_refused_and_does_not_block(lnd: Lnd, *, linked: bool) -> None:
    """A FIFO, which nobody writes to, is refused at once."""
    fifo = lnd.directory / "fifo" if linked else lnd.path
    os.mkfifo(fifo)
    if linked:
        lnd.path.symlink_to(fifo)
    assert "regular file" in str(refusal(lnd.path))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_link_to_a_device_is_refused(device: str, lnd: Lnd) -> None:
    """A link to a device is refused, and the device is not read."""
    lnd.path.symlink_to(device)
    refusal(lnd.path)


def test_socket_is_refused(public: Path) -> None:
    """A socket in the file's place is refused."""
    path = public / "channel.backup"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(path))
        assert "No such device" in str(refusal(path))


@pytest.mark.parametrize(
    "name",
    [
        "channel.db",
        "wallet.db",
        "WALLET.DB",
        "channel.sqlite",
        "lnd.sqlite-wal",
        "admin.macaroon",
        "hsm_secret",
    ],
)
def test_link_to_what_must_never_be_copied_is_refused(name: str, lnd: Lnd) -> None:
    """A link that was switched to one of LND's other files is refused, and names it."""
    (lnd.directory / name).write_bytes(os.urandom(1000))
    lnd.path.symlink_to(name)
    assert name in str(refusal(lnd.path))


@pytest.mark.parametrize("what", ["fifo", "link"])
def test_file_that_is_exchanged_before_it_is_opened_is_refused(
    what: str, lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes the file's place between the look at it and its opening is neither waited for nor
    followed.
    """
    lnd.write()
    (lnd.directory / "wallet.db").write_bytes(os.urandom(1000))
    real_open = os.open

    def exchange(path: str | Path, flags: int, *args: int, **options: Any) -> int:  # noqa: ANN401 - passed on
        if Path(path) == lnd.path:
            lnd.path.unlink()
            if what == "fifo":
                os.mkfifo(lnd.path)
            else:
                lnd.path.symlink_to("wallet.db")
        return real_open(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", exchange)
    refusal(lnd.path)


# --- A file that changes meanwhile ---


def grow(lnd: Lnd) -> None:
    """Append to the file."""
    with lnd.path.open("ab") as file:
        file.write(b"more")


def shrink(lnd: Lnd) -> None:
    """Cut the file."""
    os.truncate(lnd.path, 100)


def rewrite(lnd: Lnd) -> None:
    """Write other bytes of the same size into the file."""
    lnd.path.write_bytes(os.urandom(lnd.path.stat().st_size))


def during_the_read(lnd: Lnd, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act after the opened file was looked at for the first time, and before its bytes are read."""
    real_fstat = os.fstat
    target = lnd.path.stat().st_ino
    pending = [act]

    def fstat(descriptor: int) -> os.stat_result:
        status = real_fstat(descriptor)
        if status.st_ino == target and stat.S_ISREG(status.st_mode) and pending:
            pending.pop()()
        return status

    monkeypatch.setattr(os, "fstat", fstat)


@pytest.mark.parametrize("change", [grow, shrink, rewrite])
def test_file_that_is_written_while_it_is_read_is_read_again(
    change: Callable[[Lnd], None], lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changed during the read is no version, and is soon looked at again."""
    lnd.write()
    os.utime(lnd.path, (1, 1))
    during_the_read(lnd, lambda: change(lnd), monkeypatch)
    failure = refusal(lnd.path)
    assert "changed" in str(failure)
    assert failure.level == logging.WARNING
    assert program.read_channel_backup(lnd.path) == lnd.path.read_bytes()


def test_file_that_is_replaced_while_it_is_read_is_read_whole(
    lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename during the read leaves the old version whole, and the next read finds the new
    one.
    """
    old = lnd.write(3).data

    def replace() -> None:
        lnd.write(30)

    during_the_read(lnd, replace, monkeypatch)
    assert program.read_channel_backup(lnd.path) == old
    assert program.read_channel_backup(lnd.path) == lnd.written[1].data


# --- What the daemon makes of it ---


@pytest.mark.parametrize("size", [0, 1, 44])
def test_a_file_that_is_too_small_is_never_staged(
    session: Session, lnd: Lnd, staging: Path, size: int
) -> None:
    """Fewer than 45 bytes are one error, and the version before stays the newest until there is
    another.
    """
    first = lnd.write()
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        lnd.place(bytes(size))
        daemon.wait_for_log(f"error: .*{size} bytes")
        daemon.wait_for_looks()
        assert daemon.log.count("error: cannot read") == 1
        assert [entry for entry in staging.iterdir() if not entry.name.startswith(".")] == []
        lnd.placed.clear()
        daemon.wait_for_stored(lnd.write())


@pytest.mark.parametrize("size", [45, 46, 415])
def test_a_file_that_is_doubtful_is_stored_with_a_warning(
    session: Session, lnd: Lnd, size: int
) -> None:
    """A file without channels, or of a size that no known LND writes, is stored with a warning."""
    version = lnd.write(data=os.urandom(size))
    with session() as daemon:
        daemon.wait_for_log(f"captured .*: {size} bytes\n.*warning: ")
        daemon.wait_for_stored(version)


def test_a_file_that_is_too_large_is_never_staged(
    session: Session, lnd: Lnd, staging: Path
) -> None:
    """More than 16 MiB are one error, and nothing is staged."""
    first, large = lnd.write(), lnd.directory / "large"
    with session(OFTEN) as daemon:
        daemon.wait_for_stored(first)
        large.touch()
        os.truncate(large, LARGEST + 1)
        large.rename(lnd.path)
        daemon.wait_for_log(f"error: .*{LARGEST + 1} bytes")
        daemon.wait_for_looks()
        assert daemon.log.count("error: cannot read") == 1
        assert [entry for entry in staging.iterdir() if not entry.name.startswith(".")] == []
        lnd.path.unlink()
        daemon.wait_for_stored(lnd.write())


def test_a_pipe_at_the_path_does_not_hang_the_daemon(session: Session, lnd: Lnd) -> None:
    """A named pipe is an error that is not read from, and LND's next file is stored."""
    with session(OFTEN) as daemon:
        daemon.wait_for_log("No such file")
        os.mkfifo(lnd.directory / "pipe")
        (lnd.directory / "pipe").rename(lnd.path)
        daemon.wait_for_log("error: .*regular file")
        daemon.wait_for_looks()
        lnd.path.unlink()
        daemon.wait_for_stored(lnd.write())


def test_the_directory_of_lnd_is_only_read(
    env: dict[str, str], lnd: Lnd, check: partial[None]
) -> None:
    """Neither a session with an outage, an update and a stop, nor the command once, changes
    anything in LND's directory.
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
        assert lnd.fingerprint() == before
        version = lnd.write()
        before = lnd.fingerprint()
        daemon.wait_for_stored(version)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    assert run_script(env, "once").returncode == 0
    assert lnd.fingerprint() == before
    check(refreshes=1)


# --- Mounts and large files ---


@pytest.mark.unmeasured
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("command", ["run", "once", "check"])
def test_a_single_file_that_is_mounted(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, tmp_path: Path, command: str
) -> None:
    """A file that was bound into a container, and replaced outside, shows the old content for ever:
    a problem, and no success.
    """
    lnd.write()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "channel.backup").touch()
    mount = f'mount --bind {lnd.path} {inside}/channel.backup && exec "$@"'
    wrapper = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", mount, "sh"]
    if subprocess.run([*wrapper, "true"], check=False).returncode:
        pytest.skip("no mounts here")
    env = fake_env | AT_ONCE | {"MONITOR_FILE_PATH": str(inside / "channel.backup")}
    if command == "run":
        with Daemon(env, command=[*wrapper, sys.executable, str(SCRIPT)]) as daemon:
            daemon.wait_for_stored(lnd.written[0])
            lnd.write()
            said = daemon.wait_for_log(r"(warning|error): .*\n.*hint: .*").group()
            assert re.search("(?i)directory|bind|mount", said)
            daemon.systemd.wait_for("(?i)STATUS=.*(deleted|no name|replaced|mount|removed)")
            assert daemon.stop() == 0
        return
    code = (
        "import os, subprocess, sys\n"
        f"os.rename({str(lnd.path)!r} + '.new', {str(lnd.path)!r})\n"
        f"sys.exit(subprocess.call([sys.executable, {str(SCRIPT)!r}, {command!r}]))"
    )
    if command == "check":
        assert run_script(fake_env, "once").returncode == 0
    asked = len(fake.requests)
    lnd.path.with_suffix(".backup.new").write_bytes(channel_backup(3))
    done = run_script(env, command=[*wrapper, sys.executable, "-c", code])
    assert done.returncode == 1, done.stderr
    assert not done.stdout.startswith("BACKED UP")
    assert "Traceback" not in done.stderr
    assert not [request for request in fake.requests[asked:] if request.method == "PUT"]


@pytest.mark.unmeasured
def test_the_largest_version(fake: FakeS3, fake_env: dict[str, str], lnd: Lnd) -> None:
    """A file of 16 MiB is backed up, and one that has a byte more is refused, while what is staged
    is sent all the same.
    """
    lnd.place(bytes(LARGEST))
    assert run_script(fake_env, "once").returncode == 0
    lnd.place(bytes(LARGEST + 1))
    done = run_script(fake_env, "once")
    assert done.returncode == 1
    assert str(LARGEST + 1) in done.stderr.replace(",", "")
    assert [len(request.body) for request in fake.requests] == [LARGEST]


@pytest.mark.cold
@pytest.mark.unmeasured
def test_large_versions_fit_into_the_units_memory(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd
) -> None:
    """With three of the largest versions staged at once, and more that are too large, the daemon
    stays below the unit's MemoryMax=.
    """
    fake.hold()
    with Daemon(fake_env | AT_ONCE) as daemon:
        for _ in range(3):
            daemon.wait_for_captured(lnd.write(data=os.urandom(LARGEST)))
        for _ in range(3):
            lnd.place(os.urandom(63 << 20))
            daemon.wait_for_looks()
        lnd.path.unlink()
        fake.release()
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert {len(request.body) for request in fake.requests} == {LARGEST}
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) < MEMORY_MAX_KB
        assert daemon.stop() == 0
