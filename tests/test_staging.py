"""The staging directory: whole files or none, and nothing of others sent or touched."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inside import (
    GOOD,
    MADE_BEFORE,
    discard,
    errors,
    files,
    mode,
    offered,
    receipt,
    restart,
    stage,
    true_name,
)
from kit import Daemon, FakeS3, FaultProxy, Lnd, channel_backup, run_script, settings_at
from shared import OFTEN, SELDOM, expect_newest_last, leave, staged

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial

MADE_AFTER = "29990101T000000.000000Z-"


pytestmark = pytest.mark.usefixtures("_log_level")


EARLIER, LATER = "20260101T000000.000000Z", "20290101T000000.000000Z"
IMPOSSIBLE = "20260230T250000.000000Z"  # no such day, no such hour
THINGS = ["file", "file", "file", "directory", "link", "dangling link", "link to a device", "fifo"]


class Thing(NamedTuple):
    """One thing that lies around."""

    name: bytes
    kind: str
    data: bytes


def version_name(data: bytes, moment: str) -> bytes:
    """Return the name that a version of these bytes bears."""
    return f"{moment}-{hashlib.sha256(data).hexdigest()[-6:]}".encode()


odd_names = st.binary(min_size=1, max_size=80).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
)
odd_names |= st.sampled_from(
    [b"\n", b"-rf", b" ", b"*", b"\xff\xfe", b"channel.backup", b"x" * 255, b"\x1b[2J"]
)
odd_names |= st.sampled_from([b".receipt~", b".lock.1", b".damaged-", b"notes.txt", b"..."])
contents = (
    st.binary(max_size=100)
    | st.just(b"{}")
    | st.just(b'{"name": 1}')
    | st.binary(min_size=400, max_size=500)
)


@st.composite
def things(draw: st.DrawFn) -> list[Thing]:
    """Return what lies around, each thing under another name."""
    found: dict[bytes, Thing] = {}
    for kind in draw(st.lists(st.sampled_from(THINGS), min_size=5, max_size=40)):
        data = draw(contents)
        moment = draw(st.sampled_from([EARLIER, LATER, IMPOSSIBLE]))
        name = draw(
            odd_names
            | st.just(version_name(data, moment))
            | st.just(version_name(data + b"?", moment))
        )
        found[name] = Thing(name, kind, data)
    for own in draw(
        st.lists(st.sampled_from([b".receipt", b".x.partial", b"..receipt.partial"]), unique=True)
    ):
        found[own] = Thing(own, "file", draw(contents))
    return [thing for name, thing in found.items() if name not in (b".", b"..", b".lock")]


def lay(directory: Path, thing: Thing) -> None:
    """Let a thing lie in the directory."""
    path = os.fsencode(directory) + b"/" + thing.name
    match thing.kind:
        case "directory":
            os.mkdir(path)
        case "link":
            os.symlink(os.fsencode(directory.parent / "target"), path)
        case "dangling link":
            os.symlink(b"nothing", path)
        case "link to a device":
            os.symlink(b"/dev/zero", path)
        case "fifo":
            os.mkfifo(path)
        case _:
            Path(os.fsdecode(path)).write_bytes(thing.data)


def identity(path: str) -> tuple[int, ...]:
    """Return what any change to the thing itself would alter; the name and the link count are left
    out.
    """
    status = os.lstat(path)
    return status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns


def is_version(thing: Thing) -> bool:
    """Tell whether a thing is a staged version, which is to be sent."""
    names = [version_name(thing.data, moment) for moment in (EARLIER, LATER)]
    return thing.name in names and thing.kind == "file" and len(thing.data) >= 45


# --- What it does every day ---


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


# --- The lock ---


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


# --- What lies around ---


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


# --- What is staged ---


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


# --- What somebody does to it meanwhile ---


@pytest.mark.parametrize(("damage", "captures"), [("edited", 1), ("removed", 2)])
def test_a_version_whose_staged_copy_is_gone_gets_out(
    env: dict[str, str],
    lnd: Lnd,
    s3_line: FaultProxy,
    check: partial[None],
    staging: Path,
    damage: str,
    captures: int,
) -> None:
    """A version that waits for S3, and whose staged copy somebody edits, is sent as it was
    captured. If somebody removes its copy, it is staged anew at a look.
    """
    with Daemon(SELDOM | env | OFTEN | {"REFRESH_SECONDS": "0"}) as daemon:
        daemon.wait_for_stored(lnd.write())
        s3_line.set("refuse", cut=True)
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("cannot store")
        (name,) = staged(staging)
        if damage == "edited":
            (staging / name).write_bytes(bytes(700))
        else:
            (staging / name).unlink()
        daemon.wait_for_captured(version, count=captures)
        s3_line.set("pass")
        daemon.wait_for_stored(version)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
        assert daemon.log.count("captured") == 1 + captures
        assert daemon.log.count("stored s3://") == 2
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


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(things())
def test_once_is_not_bothered(lying: list[Thing]) -> None:
    """`once` sends LND's version, also as the last one, and the true staged ones, nothing else, and
    leaves every other thing as it is.
    """
    with tempfile.TemporaryDirectory() as name, FakeS3() as fake:
        directory = Path(name, "staging")
        directory.mkdir(mode=0o700)
        Path(name, "target").write_bytes(b"t" * 100)
        lnd = Lnd(Path(name, "lnd"))
        lnd.write()
        for thing in lying:
            lay(directory, thing)
        before = {thing.name: identity(f"{directory}/{os.fsdecode(thing.name)}") for thing in lying}
        done = run_script(
            settings_at(fake.endpoint, lnd, directory, bucket="bucket", prefix=""), "once"
        )
        after = {identity(entry.path) for entry in os.scandir(directory)}
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stderr
        versions = {thing.name: thing.data for thing in lying if is_version(thing)}
        for thing in lying:
            own = thing.name.startswith(b".receipt") or thing.name.endswith(b".partial")
            if thing.name not in versions and not own:
                assert before[thing.name] in after, f"{thing} is not as it was"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        sent = {key: entry.data for key, entry in fake.objects("bucket").items()}
        assert {os.fsdecode(name): data for name, data in versions.items()}.items() <= sent.items()
        # LND's goes out once more if others went out after it.
        own_puts = [data for key, data in sent.items() if key.encode() not in versions]
        assert set(own_puts) == {lnd.written[-1].data}
        assert len(own_puts) == 1 + bool(versions)
        assert fake.requests[-1].body == lnd.written[-1].data
