"""How LND's channel.backup is read: whole or not at all, nothing else in its place, no trace."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from kit import SCRIPT, Daemon, FakeS3, Lnd, run_script
from shared import AT_ONCE, AWAY, LARGEST, OFTEN, Env, Session, done_well, staged

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable


def refusal(path: Path, code: int = 1) -> program.BackupError:
    """Return why this path is not read, of which no descriptor is left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(program.BackupError) as caught:
        program.read_channel_backup(path)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert caught.value.exit_code == code
    return caught.value


# --- In the tests' own process ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fifo", "regular file"),
        ("directory", "Is a directory"),
        ("socket", "No such device"),
        ("loop", "Too many levels"),
        ("/dev/zero", "regular file"),
        ("/dev/null", "regular file"),
    ],
)
def test_only_a_regular_file_is_read(name: str, words: str, public: Path) -> None:
    """Anything else is refused at once, also behind a link."""
    os.mkfifo(public / "fifo")
    (public / "directory").mkdir()
    (public / "loop").symlink_to("loop")
    link = public / "link"
    link.symlink_to(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(str(public / "socket"))
        for path in (public / name, link):
            failure = refusal(path)
            assert words in str(failure)
            assert failure.level == logging.ERROR


def test_link_to_what_must_never_be_copied_is_refused(lnd: Lnd) -> None:
    (lnd.directory / "channel.db").write_bytes(os.urandom(1000))
    lnd.path.symlink_to("channel.db")
    assert "channel.db must never be copied" in str(refusal(lnd.path))


@pytest.mark.parametrize("what", ["fifo", "link"])
def test_file_that_is_exchanged_before_it_is_opened_is_refused(
    what: str, lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    lnd.write()
    os.mkfifo(lnd.directory / "fifo")
    (lnd.directory / "link").symlink_to("wallet.db")
    (lnd.directory / "wallet.db").write_bytes(os.urandom(1000))
    real_open = os.open

    def exchange(path: str | Path, *args: Any, **options: Any) -> int:  # noqa: ANN401 - passed on
        if Path(path) == lnd.path:
            (lnd.directory / what).rename(lnd.path)
        return real_open(path, *args, **options)

    monkeypatch.setattr(os, "open", exchange)
    refusal(lnd.path)


def during_the_read(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act after the opened file was looked at for the first time, and before its bytes are read."""
    look, acts = os.fstat, [act]

    def fstat(descriptor: int) -> os.stat_result:
        status = look(descriptor)
        if acts:
            acts.pop()()
        return status

    monkeypatch.setattr(os, "fstat", fstat)


@pytest.mark.parametrize("size", [100, 6775, 100_000], ids=["shrink", "rewrite", "grow"])
def test_file_that_is_written_while_it_is_read_is_read_again(
    size: int, lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    lnd.write()
    os.utime(lnd.path, (1, 1))
    during_the_read(lambda: lnd.path.write_bytes(bytes(size)), monkeypatch)
    failure = refusal(lnd.path, 75)
    assert "changed" in str(failure)
    assert failure.level == logging.WARNING
    assert program.read_channel_backup(lnd.path) == lnd.path.read_bytes()


def test_file_that_is_replaced_while_it_is_read_is_read_whole(
    lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = lnd.write(3).data
    during_the_read(lambda: lnd.write(30), monkeypatch)
    assert program.read_channel_backup(lnd.path) == old
    assert program.read_channel_backup(lnd.path) == lnd.written[1].data


# --- What the daemon makes of it ---


@pytest.mark.parametrize("size", [0, 1, 44, LARGEST + 1])
def test_a_file_of_an_impossible_size_is_never_staged(
    backed_up: Session, lnd: Lnd, staging: Path, size: int
) -> None:
    """It is told once, and the version before stays the newest."""
    with backed_up(OFTEN) as daemon:
        lnd.place(bytes(size))
        daemon.wait_for_log(f"error: .*{size} bytes")
        daemon.wait_for_looks()
        assert daemon.log.count("error: cannot read") == 1
        assert staged(staging) == []
        lnd.placed.clear()
        daemon.wait_for_stored(lnd.write())


@pytest.mark.parametrize(
    ("size", "odd"),
    [(46, "no known LND writes"), (415, "no known LND writes"), (45, "no channels"), (416, "")],
)
def test_a_file_that_is_doubtful_is_stored_with_a_warning(
    session: Session, lnd: Lnd, size: int, odd: str
) -> None:
    version = lnd.write(data=os.urandom(size))
    with session() as daemon:
        daemon.wait_for_log(f"captured .*: {size} bytes")
        daemon.wait_for_stored(version)
        warnings = re.findall("warning: .*", daemon.log)
        assert len(warnings) == bool(odd)
        assert odd in "".join(warnings)


def test_the_directory_of_lnd_is_only_read(env: Env, lnd: Lnd, backed_up: Session) -> None:
    """A session, an outage, a stop and `once` change nothing there."""
    lnd.leave_decoys()
    with backed_up(OFTEN) as daemon:
        daemon.wait_for_stored(lnd.write())
        before = lnd.fingerprint()
        daemon.wait_for_looks()
    with Daemon(env | OFTEN | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    done_well(env)
    assert lnd.fingerprint() == before


# --- Mounts and large files ---


@pytest.mark.unmeasured
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_single_file_that_is_mounted(
    fake: FakeS3, fake_env: Env, lnd: Lnd, tmp_path: Path, unshared: Callable[..., None]
) -> None:
    """One that was replaced outside shows the old content for ever: a problem, no success."""
    first = lnd.write()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "channel.backup").touch()
    bind = f"mount --bind {lnd.path} {inside}/channel.backup"
    unshared("-m", "--propagation", "private", command=bind)
    env = fake_env | AT_ONCE | {"MONITOR_FILE_PATH": str(inside / "channel.backup")}
    with Daemon(env) as daemon:
        daemon.wait_for_stored(first)
        lnd.write()
        daemon.wait_for_log("error: .*: the path shows a deleted file\n.*hint: bind the directory")
        daemon.systemd.wait_for("STATUS=.*deleted")
        command = ["nsenter", "-m", "-t", str(daemon.pid), sys.executable, str(SCRIPT)]
        for name, staging in (("once", tmp_path / "other"), ("check", env["BACKUP_DIRECTORY"])):
            done = run_script(env | {"BACKUP_DIRECTORY": str(staging)}, name, command=command)
            assert done.returncode == 1, done.stderr
            assert "the path shows a deleted file" in done.stdout + done.stderr
            assert not done.stdout.startswith("BACKED UP")
        assert daemon.stop() == 0
    assert len([request for request in fake.requests if request.method == "PUT"]) == 1


@pytest.mark.cold
@pytest.mark.unmeasured
def test_large_versions_fit_into_the_units_memory(fake: FakeS3, fake_env: Env, lnd: Lnd) -> None:
    """Three of the largest wait at once, and one is far too large."""
    fake.hold()
    with Daemon(fake_env | AT_ONCE) as daemon:
        for _ in range(3):
            daemon.wait_for_captured(lnd.write(data=os.urandom(LARGEST)))
        large = lnd.directory / "large"
        large.touch()
        os.truncate(large, 1 << 30)
        large.rename(lnd.path)
        daemon.wait_for_log(f"error: .*{1 << 30} bytes")
        daemon.wait_for_looks()
        lnd.path.unlink()
        fake.release()
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert {len(request.body) for request in fake.requests} == {LARGEST}
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) < 256 << 10  # MemoryMax=256M
        assert daemon.stop() == 0
