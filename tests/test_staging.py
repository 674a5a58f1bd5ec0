"""The staging directory: whole files or none, whatever the disk does, and nothing of others
touched.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import VERSION_NAME, FakeS3, Lnd, Script, channel_backup, run_script, settings_at

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


def receipt(name: str, data: bytes) -> program.Stored:
    """Return S3's proof that it holds this version."""
    return program.Stored(
        name, f"alice/{name}", len(data), "2026-11-20T21:55:59+00:00", digest(data)
    )


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
    return program.Staging(directory)


def stage(queue: program.Staging, data: bytes) -> str:
    """Stage a version and return its name."""
    before = set(queue.names())
    queue.stage(data)
    (name,) = set(queue.names()) - before
    return name


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


def test_version_is_staged_loaded_and_discarded(queue: program.Staging, staging: Path) -> None:
    """A version is offered from its staging to its receipt, and then leaves nothing but the memory
    of it.
    """
    assert queue.names() == []
    name = stage(queue, data := channel_backup(1))
    assert VERSION_NAME.fullmatch(name)
    assert name.endswith(digest(data)[-6:])
    assert files(staging) == {name: data}
    assert queue.load(name) == data
    assert queue.changed.is_set()
    queue.discard(receipt(name, data))
    assert queue.names() == []
    assert files(staging) == {}


def test_staged_versions_survive_a_restart(queue: program.Staging, staging: Path) -> None:
    """What was staged is offered again by the next process."""
    versions = {stage(queue, data): data for data in (channel_backup(1), channel_backup(2))}
    queue = restart(staging)
    assert {name: queue.load(name) for name in queue.names()} == versions


def test_newest_version_comes_first(queue: program.Staging, staging: Path) -> None:
    """Versions are offered newest first, also those of earlier processes."""
    names = [stage(queue, channel_backup(1)) for _ in range(5)]
    assert queue.names() == names[::-1]
    assert restart(staging).names() == names[::-1]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_may_read_what_is_staged(umask: int, tmp_path: Path) -> None:
    """The directory is made with mode 0700, and every file in it with 0600, whatever the umask."""
    directory = tmp_path / "made"
    previous = os.umask(umask)
    try:
        queue = program.Staging(directory)
        first, second = (stage(queue, data) for data in (b"1" * 500, b"2" * 500))
        queue.discard(receipt(first, b"1" * 500))
    finally:
        os.umask(previous)
        leave(directory)
    assert mode(directory) == 0o700
    assert {entry.name: mode(entry) for entry in directory.iterdir()} == {
        ".lock": 0o600,
        ".receipt": 0o600,
        second: 0o600,
    }


@pytest.mark.parametrize(
    ("size", "level"),
    [(45, logging.WARNING), (46, logging.WARNING), (415, logging.WARNING), (416, logging.INFO)],
)
def test_unusual_sizes_are_staged_with_a_warning(
    size: int, level: int, queue: program.Staging, caplog: pytest.LogCaptureFixture
) -> None:
    """A version without channels, or of a size that LND does not write today, is staged like any
    other, and told of.
    """
    data = os.urandom(size)
    assert queue.load(stage(queue, data)) == data
    (entry,) = caplog.records
    assert entry.levelno == level
    assert ("no channels" in entry.getMessage()) == (size == 45)


def test_version_that_is_staged_is_recognised(queue: program.Staging) -> None:
    """Only the bytes of the newest version still to be sent count as staged already."""
    old, new = channel_backup(1), channel_backup(1)
    assert not queue.is_newest(old)
    stage(queue, old)
    name = stage(queue, new)
    assert queue.is_newest(new)
    assert not queue.is_newest(old)
    queue.discard(receipt(name, new))
    assert queue.is_newest(old)


# --- the lock ---


def test_second_queue_in_the_same_directory_is_refused(
    queue: program.Staging, staging: Path
) -> None:
    """A directory that is in use is refused with exit code 75, and what is being written there is
    left alone.
    """
    (staging / ".partial-x").write_bytes(b"")
    with pytest.raises(program.Failure, match="another copy holds it") as caught:
        program.Staging(staging)
    assert caught.value.cause.exit_code == 75
    assert caught.value.hint
    assert (staging / ".partial-x").exists()
    assert queue.names() == []


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
        assert f"{staging}: another copy holds it" in done.stderr
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
    for name in (f".partial-{true_name(data)}", ".partial-.receipt", ".partial-"):
        (staging / name).write_bytes(data[:100])
    (staging / f".damaged-{true_name(data)}").write_bytes(data)
    assert program.Staging(staging).names() == []
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
    queue = program.Staging(staging)
    assert queue.names() == []
    own = stage(queue, data := channel_backup(1))
    queue.discard(receipt(own, data))
    after = identities(staging)
    assert {entry: after[entry] for entry in before} == before


@pytest.mark.parametrize("make", KINDS)
def test_leftover_that_is_no_file_does_not_hold_up_the_start(
    make: Callable[[Path], None], staging: Path
) -> None:
    """Something of another kind that bears the name of a partial file keeps nobody from staging."""
    make(staging / ".partial-x")
    queue = program.Staging(staging)
    data = channel_backup(1)
    assert queue.load(stage(queue, data)) == data


def test_planted_link_is_not_written_through(
    queue: program.Staging, staging: Path, tmp_path: Path
) -> None:
    """A link under the name of a file of the program's own never makes it write elsewhere."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    (staging / ".receipt").symlink_to(outside)
    name = stage(queue, data := channel_backup(1))
    queue.discard(receipt(name, data))
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
    the log.
    """
    name = true_name(GOOD)
    (staging / name).write_bytes(DAMAGES[damage])
    queue = program.Staging(staging)
    assert queue.load(name) is None
    assert queue.names() == []
    assert (staging / f".damaged-{name}").read_bytes() == DAMAGES[damage]
    (message,) = errors(caplog)
    assert name in message
    assert restart(staging).names() == []


def test_small_file_is_no_version_even_if_it_fits_its_name(staging: Path) -> None:
    """A staged file of less than 45 bytes is kept aside, whatever its name says."""
    name = true_name(b"x" * 44)
    (staging / name).write_bytes(b"x" * 44)
    assert program.Staging(staging).load(name) is None


def test_huge_file_is_no_version(staging: Path) -> None:
    """A staged file over 64 MiB is kept aside."""
    name = true_name(GOOD)
    (staging / name).write_bytes(GOOD)
    os.truncate(staging / name, (64 << 20) + 1)
    assert program.Staging(staging).load(name) is None


def test_damaged_and_foreign_files_are_never_sent(lnd: Lnd, staging: Path) -> None:
    """`once` sends the true versions alone, newest first, and names the damaged one in the log."""
    old, cut = channel_backup(1), channel_backup(2)
    version = lnd.write()
    (staging / true_name(old)).write_bytes(old)
    (staging / true_name(cut)).write_bytes(cut[:-1])
    (staging / "theirs").write_bytes(channel_backup(3))
    make_fifo(staging / true_name(channel_backup(4)))
    with FakeS3() as fake:
        done = run_script(settings_at(fake.endpoint, lnd, staging), "once")
        assert [request.body for request in fake.requests] == [version.data, old]
    assert done.returncode == 0
    assert true_name(cut) in done.stderr
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
    "of a later version": GOOD_RECEIPT.replace(b"{", b'{"more": 1, ', 1),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("content", RECEIPTS)
def test_damaged_receipt_holds_nobody_up(content: str, staging: Path) -> None:
    """A receipt that cannot be read is done without, and the next one takes its place."""
    (staging / ".receipt").write_bytes(RECEIPTS[content])
    (staging / true_name(GOOD)).write_bytes(GOOD)
    queue = program.Staging(staging)
    assert queue.names() == [true_name(GOOD)]
    name = stage(queue, data := channel_backup(1))
    queue.discard(receipt(name, data))
    assert true_name(GOOD) < name
    assert json.loads((staging / ".receipt").read_bytes())["name"] == name


def test_receipt_that_is_a_directory_holds_nobody_up(staging: Path) -> None:
    """Something of another kind in the receipt's place keeps nobody from staging."""
    make_directory(staging / ".receipt")
    queue = program.Staging(staging)
    assert queue.load(stage(queue, GOOD)) == GOOD


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
    for prefix in draw(
        st.lists(
            st.sampled_from([b".partial-", b".damaged-", b".receipt"]), max_size=3, unique=True
        )
    ):
        things[prefix + draw(st.just(b"") | any_name)] = draw(any_content)
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
            queue = program.Staging(directory)
            offered = {
                entry: data for entry in queue.names() if (data := queue.load(entry)) is not None
            }
            own = stage(queue, GOOD)
            assert own == max(queue.names())
            after = identities(directory)
        finally:
            leave(directory)
    assert offered == {
        os.fsdecode(entry): thing
        for entry, thing in things.items()
        if isinstance(thing, bytes)
        and len(thing) >= 45
        and entry in (true_name(thing, MADE_BEFORE).encode(), true_name(thing, MADE_AFTER).encode())
    }
    remain = {identity[0] for identity in after.values()}
    lost = {entry for entry, identity in before.items() if identity[0] not in remain}
    assert all(entry.startswith(".partial-") for entry in lost)


# --- names across restarts ---


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[timedelta], None]:
    """Return a function that sets the clock by which versions are named."""

    def set_clock(offset: timedelta) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Self:
                moment = datetime.now(tz) + offset
                return cls.fromtimestamp(moment.timestamp(), tz)

        monkeypatch.setattr(program, "datetime", Clock)

    return set_clock


@pytest.mark.parametrize("sent", [False, True])
def test_names_increase_when_the_clock_is_set_back(
    queue: program.Staging,
    staging: Path,
    set_clock: Callable[[timedelta], None],
    *,
    sent: bool,
) -> None:
    """Names increase across restarts with the clock set back by a day, whether or not all was sent
    before.
    """
    names = []
    for days in range(3):
        set_clock(timedelta(days=-days))
        names.append(stage(queue, data := channel_backup(1)))
        if sent:
            queue.discard(receipt(names[-1], data))
            assert files(staging) == {}
        queue = restart(staging)
    assert names == sorted(set(names))


def test_late_receipt_of_an_older_version_is_not_remembered(
    queue: program.Staging, staging: Path, set_clock: Callable[[timedelta], None]
) -> None:
    """The receipt that is remembered is the newest version's, since it is sent first and the older
    ones follow.
    """
    older, newer = stage(queue, b"1" * 500), stage(queue, b"2" * 500)
    queue.discard(receipt(newer, b"2" * 500))
    queue.discard(receipt(older, b"1" * 500))
    set_clock(timedelta(days=-1))
    assert stage(restart(staging), b"3" * 500) > newer
    assert json.loads((staging / ".receipt").read_bytes())["name"] == newer


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
            "write",
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

    def _open(self, descriptor: int, mode: str = "r") -> io.BufferedIOBase:
        """Open a descriptor as open() does, with a write that can fail."""
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:  # noqa: ANN401 - as in the base class
                disk.step("write", self.fileno())
                return super().write(data) or 0

        raw = Raw(descriptor, mode)
        return io.BufferedWriter(raw) if "w" in mode else io.BufferedReader(raw)


def _named(target: object) -> str:
    """Return the last name of a path, or of what a descriptor stands for."""
    return (
        Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(str(target))
    ).name


def test_version_is_on_disk_before_it_is_offered(queue: program.Staging, staging: Path) -> None:
    """The bytes are written and synced before the rename, and the directory after it."""
    with Disk() as disk:
        queue.stage(GOOD)
    (name,) = files(staging)
    partial = f".partial-{name}"
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
        queue.discard(receipt(name, GOOD))
    assert (
        disk.index("write", ".partial-.receipt")
        < disk.index("fsync", ".partial-.receipt")
        < disk.index("rename", ".partial-.receipt")
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


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS], ids=os.strerror
)
def test_version_is_staged_or_held_when_any_call_fails(code: int, tmp_path: Path) -> None:
    """Whichever call the disk refuses while staging, the version is offered whole, and staged once
    the disk is well.
    """

    def act(disk: Disk, number: int) -> None:
        directory = tmp_path / str(number)
        queue = program.Staging(directory)
        disk.error, disk.failing = OSError(code, os.strerror(code)), lambda call: call == number
        with disk:
            queue.stage(GOOD)
        (name,) = queue.names()
        assert queue.load(name) == GOOD
        assert_whole(directory)
        assert {entry.name for entry in directory.iterdir()} <= {".lock", name}
        queue.settle()
        assert queue.names() == [name]
        assert files(directory) == {name: GOOD}
        assert mode(directory / name) == 0o600
        queue = restart(directory)
        assert {entry.name for entry in directory.iterdir()} == {".lock", name}
        assert queue.load(name) == GOOD
        leave(directory)

    assert each_call(act) >= 5


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE, errno.EROFS], ids=os.strerror
)
def test_version_is_not_sent_again_when_any_call_of_tidying_fails(
    code: int, tmp_path: Path
) -> None:
    """Whichever call the disk refuses after a receipt, the version is not offered again, and later
    names are higher.
    """

    def act(disk: Disk, number: int) -> None:
        directory = tmp_path / str(number)
        queue = program.Staging(directory)
        name = stage(queue, GOOD)
        disk.error, disk.failing = OSError(code, os.strerror(code)), lambda call: call == number
        with disk:
            queue.discard(receipt(name, GOOD))
        assert queue.names() == []
        assert_whole(directory)
        queue = restart(directory)
        assert set(queue.names()) <= {name}
        assert stage(queue, channel_backup(1)) > name
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
                queue.discard(receipt(name, old))
            else:
                queue.stage(GOOD)
        queue = restart(directory)
        assert_whole(directory)
        left = [queue.load(entry) for entry in queue.names()]
        assert left in ([[], [old]] if while_discarding else [[old], [GOOD, old]])
        assert stage(queue, channel_backup(1)) > name
        assert not [entry for entry in directory.iterdir() if entry.name.startswith(".partial-")]
        leave(directory)

    assert each_call(act) >= 5


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Let every write fail, and nothing else."""
    with Disk(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) as disk:
        disk.failing = lambda call: disk.calls[call - 1][0] in ("write", "fsync", "fdatasync")
        yield


def test_full_disk_is_said_and_versions_wait_in_memory(
    queue: program.Staging, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a full disk versions are offered from memory, with one error, and staged as they are once
    there is room.
    """
    with full_disk():
        versions = {
            stage(queue, data): data
            for data in (channel_backup(1), channel_backup(2), channel_backup(3))
        }
        assert queue.names() == sorted(versions, reverse=True)
        assert {name: queue.load(name) for name in versions} == versions
        assert files(staging) == {}
        assert queue.is_newest(list(versions.values())[-1])
    assert len([message for message in errors(caplog) if "No space left" in message]) == 1
    queue.settle()
    assert files(staging) == versions
    assert restart(staging).names() == sorted(versions, reverse=True)


def test_memory_keeps_the_newest_versions_alone(
    queue: program.Staging, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of more versions than memory may hold the oldest are given up, each with an error."""
    count = program.HELD_COUNT_MAX + 3
    names = []
    with full_disk():
        for _ in range(count):
            queue.stage(channel_backup(1))
            names.append(queue.names()[0])
        assert queue.names() == names[: -program.HELD_COUNT_MAX - 1 : -1]
    given_up = [message for message in errors(caplog) if "gave up" in message]
    assert len(given_up) == 3
    assert all(name in message for name, message in zip(names, given_up, strict=False))
    queue.settle()
    assert sorted(files(staging)) == names[3:]


def test_version_sent_from_memory_is_not_offered_again(
    queue: program.Staging, staging: Path
) -> None:
    """A version that was sent from memory, while the disk is still full, is not offered again."""
    with full_disk():
        name = stage(queue, GOOD)
        queue.discard(receipt(name, GOOD))
        assert queue.names() == []
    queue.settle()
    assert queue.names() == []
    assert files(staging) == {}
    assert stage(queue, channel_backup(1)) > name


def test_version_sent_from_memory_once_the_disk_is_well_leaves_its_receipt(
    queue: program.Staging, staging: Path
) -> None:
    """The receipt of a version that was never on disk is remembered like any other."""
    with full_disk():
        name = stage(queue, GOOD)
    queue.discard(receipt(name, GOOD))
    assert queue.names() == []
    assert files(staging) == {}
    assert json.loads((staging / ".receipt").read_bytes())["name"] == name


def test_version_that_cannot_be_read_keeps_its_place(queue: program.Staging, staging: Path) -> None:
    """A staged file that the disk does not give back is neither deleted nor called damaged."""
    name = stage(queue, GOOD)
    with (
        Disk(OSError(errno.EIO, os.strerror(errno.EIO)), lambda _: True),
        pytest.raises(OSError, match="Input/output error"),
    ):
        queue.load(name)
    assert queue.names() == [name]
    assert queue.load(name) == GOOD
    assert files(staging) == {name: GOOD}


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


def test_disk_that_is_really_full_loses_nothing(small_disk: Path) -> None:
    """On a file system without a byte left versions wait in memory, and are staged when there is
    room again.
    """
    queue = program.Staging(small_disk)
    filler = fill(small_disk)
    versions = {stage(queue, data): data for data in (channel_backup(10), channel_backup(10))}
    assert {name: queue.load(name) for name in queue.names()} == versions
    assert set(files(small_disk)) == {"theirs"}
    filler.unlink()
    queue.settle()
    assert files(small_disk) == versions


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
        with pytest.raises(program.Failure) as caught:
            program.Staging(tmp_path / name)
        assert caught.value.cause.exit_code == 78
        assert caught.value.hint
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS], ids=os.strerror
)
def test_disk_that_refuses_the_lock_is_refused(code: int, staging: Path) -> None:
    """A disk on which not even the lock file can be made is refused with the system's reason."""
    with (
        Disk(OSError(code, os.strerror(code)), lambda call: call == 2),
        pytest.raises(program.Failure, match=os.strerror(code)),
    ):
        program.Staging(staging)
