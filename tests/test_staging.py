"""The staging directory: whole files or none, whatever the disk does, and nothing of others
touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import (
    PATIENCE_SECONDS,
    FakeS3,
    Lnd,
    Script,
    channel_backup,
    run_script,
    settings_at,
)

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MADE_BEFORE = "20200101T000000.000000Z-"
MADE_AFTER = "29990101T000000.000000Z-"


def digest(data: bytes) -> str:
    """Return the SHA-256."""
    return hashlib.sha256(data).hexdigest()


def true_name(data: bytes, moment: str = MADE_BEFORE) -> str:
    """Return the name of these bytes, captured long ago unless another moment is given."""
    return moment + digest(data)[-6:]


def receipt(name: str, data: bytes, newest: str = "") -> program.Receipt:
    """Return S3's proof that it holds this version."""
    at = datetime.now(UTC).isoformat()
    return program.Receipt(name, f"alice/{name}", len(data), at, digest(data), "s3/bucket", newest)


def leave(directory: Path) -> None:
    """Let go of the directory, and its lock, as the end of a process does."""
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target == str(directory) or target.startswith(f"{directory}/"):
                os.close(int(descriptor.name))


def restart(directory: Path) -> program.Staging:
    """Open the directory as the next process would."""
    leave(directory)
    queue = program.Staging(directory)
    queue.relist()
    return queue


def stage(queue: program.Staging, data: bytes) -> str:
    """Stage a version and return its name."""
    name = program.new_name(digest(data), max(queue.pending, default=""))
    queue.stage(program.Version(name, data))
    return name


def discard(queue: program.Staging, name: str, data: bytes) -> None:
    """Let S3 acknowledge a version."""
    queue.acknowledge(receipt(name, data))
    queue.tidy()


def offered(queue: program.Staging) -> list[program.Version]:
    """Return what is offered, in the order in which it is sent."""
    versions = []
    while version := queue.newest():
        versions.append(version)
        queue.pending.remove(version.name)
    queue.relist()
    return versions


def files(directory: Path) -> dict[str, bytes]:
    """Return the files in the directory that are no dot files."""
    return {
        entry.name: entry.read_bytes()
        for entry in directory.iterdir()
        if not entry.name.startswith(".")
    }


def mode(path: Path) -> int:
    """Return the permissions."""
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    """Record the program's log."""
    caplog.set_level(logging.INFO, "lnd-backup")


@pytest.fixture
def staging(staging: Path) -> Iterator[Path]:
    """Return an empty staging directory, which is let go of at the end."""
    yield staging
    leave(staging)


@pytest.fixture
def queue(staging: Path) -> program.Staging:
    """Return the queue in the empty staging directory."""
    return program.Staging(staging)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the errors in the log."""
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]


# --- what it does every day ---


def test_version_is_staged_offered_and_discarded(queue: program.Staging, staging: Path) -> None:
    """A version is offered from its staging to its receipt, and then leaves nothing but the memory
    of it.
    """
    assert queue.newest() is None
    name = stage(queue, data := channel_backup(1))
    assert files(staging) == {name: data}
    assert offered(queue) == [(name, data)]
    discard(queue, name, data)
    assert queue.newest() is None
    assert files(staging) == {}
    assert program.read_receipt(staging) == queue.receipt
    assert queue.receipt
    assert queue.receipt.name == name


def test_newest_version_comes_first(queue: program.Staging, staging: Path) -> None:
    """Versions are offered newest first, also those of earlier processes."""
    versions = [(stage(queue, data), data) for data in (channel_backup(1) for _ in range(5))]
    assert offered(queue) == versions[::-1]
    assert offered(restart(staging)) == versions[::-1]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_may_read_what_is_staged(umask: int, tmp_path: Path) -> None:
    """The directory is made with mode 0700, and every file in it with 0600, whatever the umask."""
    directory = tmp_path / "made"
    previous = os.umask(umask)
    try:
        queue = program.Staging(directory)
        first, second = (stage(queue, data) for data in (b"1" * 500, b"2" * 500))
        discard(queue, first, b"1" * 500)
    finally:
        os.umask(previous)
        leave(directory)
    assert mode(directory) == 0o700
    assert {entry.name: mode(entry) for entry in directory.iterdir()} == {
        ".lock": 0o600,
        ".receipt": 0o600,
        second: 0o600,
    }


# --- the lock ---


def test_second_queue_in_the_same_directory_is_refused(
    queue: program.Staging, staging: Path
) -> None:
    """A directory that is in use is refused with exit code 75, and what is being written there is
    left alone.
    """
    (staging / ".x.partial").write_bytes(b"")
    with pytest.raises(program.TransientError, match="another copy") as caught:
        program.Staging(staging)
    assert caught.value.exit_code == 75
    assert caught.value.hint
    assert (staging / ".x.partial").exists()
    assert queue.newest() is None


def test_lock_ends_with_the_process(staging: Path) -> None:
    """A lock file that a crash left over holds nobody up."""
    program.Staging(staging)
    assert (staging / ".lock").exists()
    restart(staging)


def test_once_beside_a_daemon_says_so_and_may_be_tried_again(lnd: Lnd, staging: Path) -> None:
    """`once` beside a running daemon exits 75, says what holds the directory, and sends nothing."""
    lnd.write()
    with FakeS3() as fake, Script(settings_at(fake.endpoint, lnd, staging), "run") as daemon:
        daemon.wait_for_log("stored s3://")
        done = run_script(settings_at(fake.endpoint, lnd, staging), "once")
        assert done.returncode == 75
        assert done.stdout == ""
        assert re.search(f"{staging}.*another copy", done.stderr)
        assert daemon.stop() == 0
        assert len(fake.requests) == 1


# --- what lies around ---


def make_directory(path: Path) -> None:
    """Make a directory with a file in it."""
    path.mkdir()
    (path / "inside").write_bytes(b"theirs")


def make_link(path: Path) -> None:
    """Make a link to a file that would do for a version."""
    path.symlink_to(path.parent / "theirs")


def make_dangling(path: Path) -> None:
    """Make a link to nothing."""
    path.symlink_to("nothing")


def make_fifo(path: Path) -> None:
    """Make a FIFO."""
    os.mkfifo(path)


KINDS: list[Callable[[Path], None]] = [make_directory, make_link, make_dangling, make_fifo]


def identities(directory: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is in the directory: by name its inode, mode and time of the last change."""
    entries = {entry.name: entry.lstat() for entry in directory.iterdir()}
    return {
        name: (entry.st_ino, entry.st_mode, entry.st_mtime_ns) for name, entry in entries.items()
    }


def test_leftovers_of_a_crash_are_removed_and_damaged_files_kept(staging: Path) -> None:
    """At the start partial files are removed, and files that were put aside stay."""
    data = channel_backup(1)
    for name in (true_name(data), ".receipt", ""):
        (staging / f".{name}.partial").write_bytes(data[:100])
    (staging / f".damaged-{true_name(data)}").write_bytes(data)
    assert restart(staging).pending == []
    assert {entry.name for entry in staging.iterdir()} == {".lock", f".damaged-{true_name(data)}"}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["notes.txt", ".hidden", true_name(b"theirs" * 100), ".receipt~"])
def test_things_of_others_are_left_alone(
    name: str, make: Callable[[Path], None], staging: Path
) -> None:
    """Directories, links and FIFOs are neither offered nor waited for nor changed, even under a
    version's name.
    """
    (staging / "theirs").write_bytes(b"theirs" * 100)
    make(staging / name)
    before = identities(staging)
    queue = restart(staging)
    assert queue.pending == []
    own = stage(queue, data := channel_backup(1))
    discard(queue, own, data)
    after = identities(staging)
    assert {entry: after[entry] for entry in before} == before


@pytest.mark.parametrize("make", KINDS)
def test_leftover_that_is_no_file_does_not_hold_up_the_start(
    make: Callable[[Path], None], staging: Path
) -> None:
    """Something of another kind that bears the name of a partial file keeps nobody from staging."""
    make(staging / ".x.partial")
    queue = restart(staging)
    name = stage(queue, GOOD)
    assert offered(queue) == [(name, GOOD)]


def test_planted_link_is_not_written_through(
    queue: program.Staging, staging: Path, tmp_path: Path
) -> None:
    """A link under the name of a file of the program's own never makes it write elsewhere."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    for own in (".receipt", "..receipt.partial", f".{true_name(GOOD)}.partial", true_name(GOOD)):
        (staging / own).symlink_to(outside)
    queue.stage(program.Version(true_name(GOOD), GOOD))
    discard(queue, true_name(GOOD), GOOD)
    assert outside.read_bytes() == b"theirs"


GOOD = channel_backup(1)
DAMAGES = {
    "other bytes": GOOD[:-1] + bytes([GOOD[-1] ^ 1]),
    "cut": GOOD[:-100],
    "longer": GOOD + b"x",
    "empty": b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_staged_file_whose_bytes_do_not_fit_its_name_is_kept_aside(
    damage: str, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A staged file that was changed is never sent, but kept under another name, with an error in
    the log; what is older is sent.
    """
    name, older = true_name(GOOD), channel_backup(2)
    (staging / name).write_bytes(DAMAGES[damage])
    (staging / true_name(older, "20190101T000000.000000Z-")).write_bytes(older)
    queue = restart(staging)
    assert [version.data for version in offered(queue)] == [older]
    assert (staging / f".damaged-{name}").read_bytes() == DAMAGES[damage]
    (message,) = errors(caplog)
    assert name in message
    assert len(restart(staging).pending) == 1


@pytest.mark.parametrize(("size", "count"), [(44, 0), (45, 1), (16 << 20, 1), ((16 << 20) + 1, 0)])
def test_file_of_an_impossible_size_is_no_version(size: int, count: int, staging: Path) -> None:
    """A staged file of less than 45 bytes, or of more than 16 MiB, is kept aside, even if it fits
    its name.
    """
    name = true_name(data := bytes(size))
    (staging / name).write_bytes(data)
    assert len(offered(restart(staging))) == count
    assert (staging / f".damaged-{name}").exists() == (not count)


@pytest.mark.parametrize("moment", ["20190101T000000.000000Z-", "20210101T000000.000000Z-"])
def test_damaged_and_foreign_files_are_never_sent(moment: str, lnd: Lnd, staging: Path) -> None:
    """`once` sends the true versions alone, newest first and once more at the end, and names the
    damaged one in the log.
    """
    old, cut = channel_backup(1), channel_backup(2)
    version = lnd.write()
    (staging / true_name(old)).write_bytes(old)
    (staging / true_name(cut, moment)).write_bytes(cut[:-1])
    (staging / "theirs").write_bytes(channel_backup(3))
    make_fifo(staging / true_name(channel_backup(4)))
    with FakeS3() as fake:
        done = run_script(settings_at(fake.endpoint, lnd, staging), "once")
        assert [request.body for request in fake.requests] == [version.data, old, version.data]
    assert done.returncode == 0
    assert true_name(cut, moment) in done.stderr
    assert (staging / "theirs").exists()


GOOD_RECEIPT = json.dumps(receipt(true_name(GOOD), GOOD)._asdict()).encode()
RECEIPTS = {
    "empty": b"",
    "cut": GOOD_RECEIPT[:-20],
    "zeros": bytes(200),
    "null": b"null",
    "list": b"[]",
    "text": b'"x"',
    "not UTF-8": b"\xff\xfe\xfd",
    "no name": b"{}",
    "name is a number": GOOD_RECEIPT.replace(f'"{true_name(GOOD)}"'.encode(), b"1", 1),
    "name is none": GOOD_RECEIPT.replace(true_name(GOOD).encode(), b"../../etc/passwd"),
    "newest is none": GOOD_RECEIPT.replace(b'"newest": ""', b'"newest": "x"'),
    **{
        f"newest is {value}": GOOD_RECEIPT.replace(b'"newest": ""', f'"newest": {value}'.encode())
        for value in ("0", "null", "[]")
    },
    "size is no number": re.sub(rb'"size_bytes": \d+', b'"size_bytes": "x"', GOOD_RECEIPT),
    "size is infinite": re.sub(rb'"size_bytes": \d+', b'"size_bytes": Infinity', GOOD_RECEIPT),
    "time is none": re.sub(rb'"stored_at": "[^"]*"', b'"stored_at": "x"', GOOD_RECEIPT),
    "time without a zone": GOOD_RECEIPT.replace(b"+00:00", b""),
    "of a later version": GOOD_RECEIPT.replace(b"{", b'{"more": 1, ', 1),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", RECEIPTS)
def test_damaged_receipt_holds_nobody_up(
    content: str, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A receipt that cannot be read is told of and done without, and the next one takes its
    place.
    """
    (staging / ".receipt").write_bytes(RECEIPTS[content])
    (staging / true_name(GOOD)).write_bytes(GOOD)
    queue = restart(staging)
    assert queue.receipt is None
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    discard(queue, true_name(GOOD), GOOD)
    assert program.read_receipt(staging) == queue.receipt


def test_receipt_that_is_a_directory_holds_nobody_up(staging: Path) -> None:
    """Something of another kind in the receipt's place keeps nobody from staging."""
    make_directory(staging / ".receipt")
    queue = restart(staging)
    name = stage(queue, GOOD)
    assert offered(queue) == [(name, GOOD)]


any_name = st.binary(min_size=1, max_size=60).filter(
    lambda name: b"/" not in name and b"\0" not in name
)
any_content = st.binary(max_size=200)


@st.composite
def littered(draw: st.DrawFn) -> dict[bytes, bytes | str]:
    """Return what lies around: by name a file's content, or another kind of thing."""
    things: dict[bytes, bytes | str] = {}
    for content in draw(st.lists(any_content, max_size=6)):
        moment = draw(st.sampled_from([MADE_BEFORE, MADE_AFTER, "20200230T000000.000000Z-", "x"]))
        things[draw(any_name | st.just(true_name(content, moment).encode()))] = content
    owns = [b".%b.partial", b".damaged-%b", b".receipt%b"]
    for own in draw(st.lists(st.sampled_from(owns), max_size=3, unique=True)):
        things[own % draw(st.just(b"") | any_name)] = draw(any_content)
    for kind in draw(st.lists(st.sampled_from(["directory", "link", "fifo"]), max_size=3)):
        things[
            draw(
                any_name.filter(lambda name: name[0] != ord("."))
                | st.just(true_name(b"x").encode())
            )
        ] = kind
    return {name: thing for name, thing in things.items() if name not in (b".", b"..", b".lock")}


def strew(directory: Path, things: dict[bytes, bytes | str]) -> None:
    """Put things into the directory."""
    for name, thing in things.items():
        path = directory / os.fsdecode(name)
        if thing == "directory":
            path.mkdir()
        elif thing == "link":
            path.symlink_to("/dev/zero")
        elif thing == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(thing if isinstance(thing, bytes) else b"")


@settings(deadline=None, max_examples=100)
@given(littered())
@example(
    {true_name(b"x" * 50, MADE_AFTER).encode(): b"x" * 50, true_name(b"y" * 50).encode(): b"x" * 50}
)
def test_whatever_lies_around_is_neither_sent_nor_lost(things: dict[bytes, bytes | str]) -> None:
    """Opening any directory neither fails nor deletes what others put there, and true versions
    alone are offered.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        strew(directory, things)
        before = identities(directory)
        try:
            versions = offered(restart(directory))
            after = identities(directory)
        finally:
            leave(directory)
    assert dict(versions) == {
        os.fsdecode(entry): thing
        for entry, thing in things.items()
        if isinstance(thing, bytes)
        and len(thing) >= 45
        and entry in (true_name(thing, MADE_BEFORE).encode(), true_name(thing, MADE_AFTER).encode())
    }
    remain = {identity[0] for identity in after.values()}
    lost = {entry for entry, identity in before.items() if identity[0] not in remain}
    assert all(entry.startswith(".") and entry.endswith(".partial") for entry in lost)


# --- what is named, and what is held in memory ---


class NoS3(program.Bucket):
    """A bucket that a put does not reach."""

    def put(self, name: str, data: bytes) -> program.Receipt:  # noqa: ARG002 - as in the base class
        """Refuse, for good."""
        raise program.BackupError("cannot store", "wait")


@pytest.fixture
def daemon(lnd: Lnd, staging: Path) -> Callable[[], program.Daemon]:
    """Return what makes a daemon that sends nothing."""
    env = settings_at("http://127.0.0.1:9", lnd, staging) | {"RESCAN_SECONDS": "0.05"}
    settings = program.load_settings(env, "run")
    return lambda: program.Daemon(settings, NoS3("some-bucket", "alice/", {}))


@pytest.fixture
def look(daemon: Callable[[], program.Daemon], staging: Path) -> Callable[[], None]:
    """Return what looks at the file once, as `once` does, and stages what is to be staged."""

    async def scenario() -> None:
        (one := daemon()).stop.set()
        await one.run()

    def once() -> None:
        leave(staging)
        asyncio.run(scenario())

    return once


@pytest.mark.parametrize("known", ["staged", "receipt", "newest of the receipt"])
def test_names_increase_when_the_clock_is_set_back(
    known: str,
    lnd: Lnd,
    staging: Path,
    look: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names increase across restarts with the clock set back by a day, whether the highest one is
    still staged, was sent last, or was sent before older ones.
    """

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(datetime.now(tz).timestamp() - 86400, tz)

    lnd.write()
    look()
    ((name, data),) = files(staging).items()
    if known != "staged":
        last = name if known == "receipt" else true_name(data)
        discard(queue := restart(staging), name, data)
        queue.acknowledge(receipt(last, data, newest=name))
        queue.tidy()
    monkeypatch.setattr(program, "datetime", Yesterday)
    lnd.write()
    look()
    at = program.captured_at(name)
    assert at
    assert program.captured_at(max(files(staging))) == at + timedelta(microseconds=1)


@pytest.mark.parametrize(("number", "count"), [(0, 3), (1, 2), (2, 3)])
def test_staged_bytes_count_only_as_the_newest(
    number: int, count: int, lnd: Lnd, staging: Path, look: Callable[[], None]
) -> None:
    """Of the staged versions only the newest one counts as the one on disk."""
    versions = [channel_backup(1) for _ in range(3)]
    for data, day in zip(versions[:2], ("01", "02"), strict=True):
        (staging / true_name(data, f"202001{day}T000000.000000Z-")).write_bytes(data)
    lnd.write(data=versions[number])
    look()
    assert len(files(staging)) == count
    assert files(staging)[max(files(staging))] == versions[number]


@pytest.mark.parametrize(
    ("size", "level"),
    [(45, logging.WARNING), (46, logging.WARNING), (415, logging.WARNING), (416, logging.INFO)],
)
def test_unusual_sizes_are_staged_with_a_warning(
    size: int,
    level: int,
    lnd: Lnd,
    staging: Path,
    look: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A version without channels, or of a size that LND does not write today, is staged like any
    other, and told of.
    """
    data = lnd.write(data=os.urandom(size)).data
    look()
    assert list(files(staging).values()) == [data]
    (name,) = files(staging)
    said = [entry for entry in caplog.records if name in entry.getMessage()]
    assert max(entry.levelno for entry in said) == level
    assert ("no channels" in said[-1].getMessage()) == (size == 45)


def test_memory_keeps_the_newest_version_alone(
    lnd: Lnd,
    staging: Path,
    daemon: Callable[[], program.Daemon],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While the disk refuses, the newest version is held, each older one is given up with an error
    that names it, and what is held is staged as it is once the disk is well.
    """

    def log(pattern: str) -> list[str]:
        return re.findall(pattern, "\n".join(errors(caplog) + caplog.messages))

    async def until(is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not is_so():  # noqa: ASYNC110 - the log has no event
                await asyncio.sleep(0.01)

    async def scenario() -> list[str]:
        running = asyncio.create_task((one := daemon()).run())
        with mock.patch.object(program, "write_file", side_effect=full):
            names = []
            for _ in range(3):
                ending = lnd.write().sha256[-6:]
                await until(lambda ending=ending: log(rf"captured \S+-{ending}"))  # type: ignore[misc]
                names += log(rf"captured (\S+-{ending})")[:1]
        await until(lambda: files(staging))
        one.stop.set()
        await running
        return names

    monkeypatch.setattr(program, "TROUBLE_SECONDS", 0.02)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    names = asyncio.run(scenario())
    assert files(staging) == {names[-1]: lnd.written[-1].data}
    lost = [message for message in errors(caplog) if any(name in message for name in names)]
    assert [name in message for name, message in zip(names, lost, strict=False)] == [True, True]
    assert len([message for message in errors(caplog) if "No space left" in message]) == 1
    assert restart(staging).pending == names[-1:]


# --- a disk that fails ---


class PowerCut(BaseException):
    """The end of the process between two calls."""


class Disk:
    """Records each call that changes or reads the disk, and fails those that it is told to fail."""

    def __init__(
        self, error: BaseException | None = None, failing: Callable[[int], bool] = lambda _: False
    ) -> None:
        """Raise the error at each call, counted from 1, that is to fail."""
        self.calls: list[tuple[str, str]] = []
        self.error = error
        self.failing = failing

    def step(self, call: str, target: object) -> None:
        """Record a call, and fail it if it is its turn."""
        self.calls.append((call, _named(target)))
        if self.error and self.failing(len(self.calls)):
            raise self.error

    def index(self, call: str, target: str) -> int:
        """Return when this call was made, which must be once."""
        assert self.calls.count((call, target)) == 1, self.calls
        return self.calls.index((call, target))

    def __enter__(self) -> Self:
        """Stand between the program and its disk."""
        self._stack = contextlib.ExitStack()
        for name in (
            "open",
            "fsync",
            "fdatasync",
            "rename",
            "replace",
            "unlink",
            "remove",
            "fchmod",
            "scandir",
        ):
            self._stack.enter_context(
                mock.patch.object(os, name, self._wrap(name, getattr(os, name)))
            )
        self._stack.enter_context(mock.patch.object(program, "open", self._open, create=True))
        return self

    def __exit__(self, *_: object) -> None:
        """Step aside."""
        self._stack.close()

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: object, *args: object, **options: object) -> object:
            self.step(name, target)
            return real(target, *args, **options)

        return call

    def _open(
        self,
        file: Any,  # noqa: ANN401 - as open() takes it
        mode: str = "r",
        *,
        opener: Callable[[str, int], int] | None = None,
    ) -> io.BufferedIOBase:
        """Open a descriptor, or a name, as open() does, with a write that can fail."""
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:  # noqa: ANN401 - as in the base class
                disk.step("write", self.fileno())
                return super().write(data) or 0

        raw = Raw(file, mode, opener=opener)
        return io.BufferedWriter(raw) if "w" in mode else io.BufferedReader(raw)


def _named(target: object) -> str:
    """Return the last name of a path, or of what a descriptor stands for."""
    return (
        Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(str(target))
    ).name


def test_version_is_on_disk_before_it_is_offered(queue: program.Staging, staging: Path) -> None:
    """The bytes are written and synced before the rename, and the directory after it."""
    with Disk() as disk:
        name = stage(queue, GOOD)
    partial = f".{name}.partial"
    assert (
        disk.index("open", partial)
        < disk.index("write", partial)
        < disk.index("fsync", partial)
        < disk.index("rename", partial)
        < disk.index("fsync", staging.name)
    )


def test_receipt_is_on_disk_before_the_version_is_deleted(
    queue: program.Staging, staging: Path
) -> None:
    """The receipt is written, synced and renamed, and the directory synced, before the staged
    version is deleted.
    """
    name = stage(queue, GOOD)
    with Disk() as disk:
        discard(queue, name, GOOD)
    assert (
        disk.index("write", "..receipt.partial")
        < disk.index("fsync", "..receipt.partial")
        < disk.index("rename", "..receipt.partial")
        < disk.index("fsync", staging.name)
        < disk.index("unlink", name)
    )


def assert_whole(directory: Path) -> None:
    """Fail if there is a version on disk that is not whole."""
    for name, data in files(directory).items():
        assert name.endswith(digest(data)[-6:]), f"{name} is half there"


def each_call(act: Callable[[Disk, int], None]) -> int:
    """Act with a disk whose first call fails, then its second, and so on until none is left to
    fail.
    """
    number = 0
    while True:
        number += 1
        disk = Disk()
        act(disk, number)
        if len(disk.calls) < number:
            return number - 1


each_error = pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS], ids=os.strerror
)


@each_error
def test_version_is_staged_at_the_next_try_when_any_call_fails(code: int, tmp_path: Path) -> None:
    """Whichever call the disk refuses while staging, that is said, and the version is staged and
    offered once at the next try.
    """

    def act(disk: Disk, number: int) -> None:
        directory = tmp_path / str(number)
        queue, version = program.Staging(directory), program.Version(true_name(GOOD), GOOD)
        disk.error, disk.failing = OSError(code, os.strerror(code)), lambda call: call == number
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
        leave(directory)

    assert each_call(act) >= 5


@each_error
def test_version_is_not_sent_again_when_any_call_of_tidying_fails(
    code: int, tmp_path: Path
) -> None:
    """Whichever call the disk refuses after a receipt, the version is not offered again, is deleted
    at the next try, and its name is remembered.
    """

    def act(disk: Disk, number: int) -> None:
        directory = tmp_path / str(number)
        queue = program.Staging(directory)
        name = stage(queue, GOOD)
        disk.error, disk.failing = OSError(code, os.strerror(code)), lambda call: call == number
        with disk, contextlib.suppress(OSError):
            discard(queue, name, GOOD)
        assert_whole(directory)
        remembered = program.read_receipt(directory)
        assert name in files(directory) or (remembered and remembered.name == name)
        queue.relist()
        assert queue.newest() is None
        queue.tidy()
        assert {entry.name for entry in directory.iterdir()} == {".lock", ".receipt"}
        leave(directory)

    assert each_call(act) >= 6


@pytest.mark.parametrize("while_discarding", [False, True])
def test_power_cut_at_any_call_leaves_a_version_whole_or_not_at_all(
    tmp_path: Path, *, while_discarding: bool
) -> None:
    """Whichever call is the last one before a crash, the next process finds whole versions and
    nothing to repair.
    """
    old = channel_backup(2)

    def act(disk: Disk, number: int) -> None:
        directory = tmp_path / str(number)
        queue = program.Staging(directory)
        name = stage(queue, old)
        disk.error, disk.failing = PowerCut(), lambda call: call >= number
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
        leave(directory)

    assert each_call(act) >= 5


def test_version_that_was_never_on_disk_leaves_its_receipt(
    queue: program.Staging, staging: Path
) -> None:
    """The receipt of a version that was sent from memory is remembered like any other."""
    discard(queue, true_name(GOOD), GOOD)
    assert files(staging) == {}
    assert program.read_receipt(staging) == queue.receipt


def test_version_that_cannot_be_read_keeps_its_place(queue: program.Staging, staging: Path) -> None:
    """A staged file that the disk does not give back is neither deleted nor called damaged, and
    does not keep back the others.
    """
    versions = [(stage(queue, data), data) for data in (channel_backup(1), GOOD)]
    with (
        Disk(OSError(errno.EIO, os.strerror(errno.EIO)), lambda _: True),
        pytest.raises(OSError, match="Input/output error"),
    ):
        queue.newest()
    assert queue.newest() == versions[0]
    queue.relist()
    assert offered(queue) == versions[::-1]
    assert files(staging) == dict(versions)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a mount point with a file system of 64 KiB."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or not mount or not umount:
        pytest.skip("mounting a small file system needs root")
    point = tmp_path / "disk"
    point.mkdir()
    options = [mount, "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(point)]
    done = subprocess.run(options, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield point
    leave(point)
    subprocess.run([umount, str(point)], check=True)


def fill(directory: Path) -> Path:
    """Fill the disk with somebody else's file."""
    path = directory / "theirs"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return path


def test_disk_that_is_really_full_leaves_nothing_half(small_disk: Path) -> None:
    """On a file system without a byte left a version is refused and leaves nothing, and is staged
    when there is room again.
    """
    queue = program.Staging(small_disk)
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        stage(queue, data := channel_backup(10))
    assert set(files(small_disk)) == {"theirs"}
    filler.unlink()
    name = stage(queue, data)
    assert offered(restart(small_disk)) == [(name, data)]


def test_once_sends_from_memory_when_the_disk_is_full(small_disk: Path, lnd: Lnd) -> None:
    """`once` on a full disk sends the version from memory, once, and says that it could not stage
    it.
    """
    program.Staging(small_disk)
    leave(small_disk)
    fill(small_disk)
    version = lnd.write()
    with FakeS3() as fake:
        done = run_script(settings_at(fake.endpoint, lnd, small_disk), "once")
        assert [request.body for request in fake.requests] == [version.data]
    assert "No space left" in done.stderr
    assert done.returncode == 0


# --- a directory that cannot be used ---


def test_directory_that_is_exchanged_for_a_link_is_refused(tmp_path: Path) -> None:
    """A link, and a file, in the directory's place are refused as wrong configuration."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "file"):
        with pytest.raises(program.ConfigError) as caught:
            program.Staging(tmp_path / name)
        assert caught.value.exit_code == 78
        assert caught.value.hint
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS], ids=os.strerror
)
def test_disk_that_refuses_the_lock_is_refused(code: int, staging: Path) -> None:
    """A disk on which not even the lock file can be made is refused with the system's reason."""
    with (
        Disk(OSError(code, os.strerror(code)), lambda call: call == 2),
        pytest.raises(program.ConfigError, match=os.strerror(code)),
    ):
        program.Staging(staging)


@pytest.mark.parametrize(
    ("kind", "longest"), [(program.TransientError, 60), (program.BackupError, 300)]
)
def test_the_pause_after_a_failure_has_an_end(
    daemon: Callable[[], program.Daemon], kind: type[program.BackupError], longest: float
) -> None:
    """However often S3 failed, the next attempt is at most a minute away, or five minutes where the
    settings are at fault.
    """

    async def fail() -> program.Receipt:
        raise kind("cannot store", "wait")

    async def scenario() -> float:
        one = daemon()
        one.failures = 10
        one.upload = asyncio.create_task(fail())
        await asyncio.wait([one.upload])
        began = time.monotonic()
        one.finish_upload()
        return float(one.retry_at) - began

    assert longest / 2 <= asyncio.run(scenario()) < longest + 1
