"""The staging directory: whole files or none, and nothing of others sent or touched."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from inside import GOOD, discard, errors, files, mode, offered, receipt, restart, stage, true_name
from kit import FakeS3, FaultProxy, Lnd, channel_backup, settings_at
from shared import LARGEST, OFTEN, Env, Session, done_well, expect_newest_last, leave, staged

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable

EARLIER, LATER = "20260101T000000.000000Z-", "20290101T000000.000000Z-"
IMPOSSIBLE = "20260230T250000.000000Z-"  # no such day, no such hour
THEIRS = b"theirs" * 100
HALF_WRITTEN = f".{true_name(THEIRS)}.partial"
OWN = [b".receipt", b"..receipt.partial", HALF_WRITTEN.encode()]
LINKS = {"link": "../target", "dangling link": "nothing", "link to a device": "/dev/zero"}
KINDS = ["directory", "fifo", *LINKS]


class Thing(NamedTuple):
    """What lies in the directory."""

    name: bytes
    kind: str
    data: bytes = b""


ODD = [b"\n", b"-rf", b" ", b"*", b"\xff\xfe", b"channel.backup", b"x" * 255, b"\x1b[2J"]
NEAR = [b".receipt~", b".lock.1", b".damaged-", b"notes.txt", b"...", b".mine.partial"]
odd_names = st.sampled_from([*ODD, *NEAR, *OWN]) | (
    st.binary(min_size=1, max_size=80)
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in (b".", b"..", b".lock"))
)


@st.composite
def things(draw: st.DrawFn) -> Thing:
    """Return what lies around, often under a version's name, be it the right one or not."""
    data = draw(st.binary(max_size=100) | st.binary(min_size=400, max_size=500))
    moment = draw(st.sampled_from([EARLIER, LATER, IMPOSSIBLE]))
    names = [true_name(held, moment).encode() for held in (data, data + b"?")]
    name = draw(odd_names | st.sampled_from(names))
    kind = "file" if name in OWN else draw(st.sampled_from(["file"] * 3 + KINDS))
    return Thing(name, kind, data)


def lay(directory: Path, thing: Thing) -> None:
    path = directory / os.fsdecode(thing.name)
    if thing.kind == "directory":
        path.mkdir()
    elif thing.kind == "fifo":
        os.mkfifo(path)
    elif thing.kind in LINKS:
        path.symlink_to(LINKS[thing.kind])
    else:
        path.write_bytes(thing.data)


def identities(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return by name what any change to a thing itself would alter; the link count is left out."""
    entries = {entry.name: entry.lstat() for entry in directory.iterdir()}
    return {
        name: (status.st_ino, status.st_mode, status.st_uid, status.st_size, status.st_mtime_ns)
        for name, status in entries.items()
    }


def is_version(thing: Thing) -> bool:
    names = [true_name(thing.data, moment).encode() for moment in (EARLIER, LATER)]
    return thing.name in names and thing.kind == "file" and len(thing.data) >= 45


# --- What it does every day ---


class Name(str):
    """A name of a version; counts how often any of them is looked at."""

    __slots__ = ()
    looks = 0


def _counted(method: str) -> Callable[..., object]:
    def look(name: str, *other: object) -> object:
        Name.looks += 1
        return getattr(str, method)(name, *other)

    return look


for each in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"):
    setattr(Name, each, _counted(each))


@pytest.mark.parametrize("at", [0, 5_000, -1], ids=["oldest", "middle", "newest"])
def test_a_receipt_takes_its_version_off_without_a_search(queue: program.Staging, at: int) -> None:
    """Of ten thousand versions that wait, few are looked at."""
    queue.pending = [Name(f"2026-{number:06}") for number in range(10_000)]
    name = queue.pending[at]
    Name.looks = 0
    queue.acknowledge(receipt(name, GOOD))
    assert Name.looks < 100
    assert len(queue.pending) == 9_999
    assert name not in queue.pending


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
    assert {entry.name for entry in directory.iterdir()} == {".lock", ".receipt", second}
    assert {mode(entry) for entry in directory.iterdir()} == {0o600}


# --- What lies around ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [HALF_WRITTEN, "..receipt.partial", ".receipt"])
def test_leftover_that_is_no_file_does_not_hold_up_the_start(
    name: str, kind: str, staging: Path
) -> None:
    """Under the name of a half-written file it is removed."""
    lay(staging, Thing(name.encode(), kind))
    queue = restart(staging)
    is_removed = name.endswith(".partial") and kind != "directory"
    assert os.path.lexists(staging / name) != is_removed
    own = stage(queue, GOOD)
    assert offered(queue) == [(own, GOOD)]


def test_planted_link_is_not_written_through(
    queue: program.Staging, staging: Path, tmp_path: Path
) -> None:
    (outside := tmp_path / "outside").write_bytes(b"theirs")
    for own in (".receipt", "..receipt.partial", f".{true_name(GOOD)}.partial", true_name(GOOD)):
        (staging / own).symlink_to(outside)
    queue.stage(program.Version(true_name(GOOD), GOOD))
    discard(queue, true_name(GOOD), GOOD)
    assert outside.read_bytes() == b"theirs"


TOO_SMALL, TOO_LARGE = bytes(44), bytes(LARGEST + 1)
DAMAGED = {  # name and bytes; the last two fit their name
    "other bytes": (true_name(GOOD), GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    "cut": (true_name(GOOD), GOOD[:-100]),
    "longer": (true_name(GOOD), GOOD + b"x"),
    "empty": (true_name(GOOD), b""),
    "too small": (true_name(TOO_SMALL), TOO_SMALL),
    "too large": (true_name(TOO_LARGE), TOO_LARGE),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_staged_file_whose_bytes_do_not_fit_its_name_is_kept_aside(
    damage: str, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told as an error, and what is older is sent."""
    (name, data), older = DAMAGED[damage], channel_backup(2)
    (staging / name).write_bytes(data)
    (staging / true_name(older, "20190101T000000.000000Z-")).write_bytes(older)
    queue = restart(staging)
    assert [version.data for version in offered(queue)] == [older]
    (message,) = errors(caplog)
    assert name in message
    assert len(restart(staging).pending) == 1
    assert (staging / f".damaged-{name}").read_bytes() == data


@pytest.mark.parametrize("moment", ["20190101T000000.000000Z-", "20210101T000000.000000Z-"])
def test_damaged_and_foreign_files_are_never_sent(
    moment: str, fake: FakeS3, fake_env: Env, lnd: Lnd, staging: Path
) -> None:
    """`once` sends the true versions, newest first, and names the damaged one."""
    older, old, cut = (channel_backup(channels) for channels in (0, 1, 2))
    version = lnd.write()
    (staging / true_name(old)).write_bytes(old)
    (staging / true_name(older, "20180101T000000.000000Z-")).write_bytes(older)
    (staging / true_name(cut, moment)).write_bytes(cut[:-1])
    (staging / "theirs").write_bytes(channel_backup(3))
    os.mkfifo(staging / true_name(channel_backup(4)))
    assert true_name(cut, moment) in done_well(fake_env).stderr
    sent = [request.body for request in fake.requests]
    assert sent == [version.data, old, older, version.data]
    assert (staging / "theirs").exists()


GOOD_RECEIPT = receipt(true_name(GOOD), GOOD)._asdict()
WRONG_FIELDS = [
    ("name", 1),
    ("name", "../../etc/passwd"),
    ("newest", "x"),
    ("newest", 0),
    ("newest", None),
    ("newest", []),
    ("size_bytes", "x"),
    ("size_bytes", float("inf")),
    ("stored_at", "x"),
    ("stored_at", "2026-03-01T12:00:00"),  # without a zone
    ("of a later version", 1),
]
RECEIPTS = {
    "empty": b"",
    "cut": json.dumps(GOOD_RECEIPT)[:-20].encode(),
    "zeros": bytes(200),
    "null": b"null",
    "list": b"[]",
    "text": b'"x"',
    "not UTF-8": b"\xff\xfe\xfd",
    "no name": b"{}",
    "nested": b"[" * 100_000,
    **{
        f"{field}: {value!r}": json.dumps(GOOD_RECEIPT | {field: value}).encode()
        for field, value in WRONG_FIELDS
    },
}


@pytest.mark.parametrize("content", RECEIPTS)
def test_damaged_receipt_holds_nobody_up(
    content: str, staging: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told of, and the next one takes its place."""
    (staging / ".receipt").write_bytes(RECEIPTS[content])
    (staging / true_name(GOOD)).write_bytes(GOOD)
    queue = restart(staging)
    assert queue.receipt is None
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING]
    discard(queue, true_name(GOOD), GOOD)
    assert program.read_receipt(staging) == queue.receipt


# --- What is staged ---


@pytest.mark.parametrize(("number", "count"), [(0, 3), (1, 2), (2, 3)])
def test_staged_bytes_count_only_as_the_newest(
    number: int, count: int, lnd: Lnd, staging: Path, look: Callable[[], None]
) -> None:
    versions = [channel_backup(1) for _ in range(3)]
    for data, day in zip(versions[:2], ("01", "02"), strict=True):
        (staging / true_name(data, f"202001{day}T000000.000000Z-")).write_bytes(data)
    lnd.write(data=versions[number])
    look()
    assert len(files(staging)) == count
    assert files(staging)[max(files(staging))] == versions[number]


def test_directory_that_is_exchanged_for_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "file"):
        with pytest.raises(program.ConfigError, match=r"Not a directory|File exists") as caught:
            program.Staging(tmp_path / name)
        assert caught.value.exit_code == 78
        assert caught.value.hint
    assert list((tmp_path / "real").iterdir()) == []


# --- What somebody does to it meanwhile ---


@pytest.mark.parametrize(("damage", "captures"), [("edited", 1), ("removed", 2)])
def test_a_version_whose_staged_copy_is_gone_gets_out(
    session: Session, lnd: Lnd, s3_line: FaultProxy, staging: Path, damage: str, captures: int
) -> None:
    """It is sent as it was captured; a copy that was removed is staged anew at a look."""
    with session(OFTEN | {"REFRESH_SECONDS": "0"}) as daemon:
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
        assert daemon.log.count("captured") == 1 + captures
        assert daemon.log.count("stored s3://") == 2


def test_a_version_that_somebody_put_into_staging_is_sent_once(
    backed_up: Session, lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """Where its name is a later one, LND's own gets a name above it, once."""
    foreign = channel_backup(10)
    lnd.placed.append(foreign)
    with backed_up(OFTEN, refreshes=2) as daemon:
        laid = tmp_path / "laid"
        laid.write_bytes(foreign)
        laid.rename(staging / true_name(foreign, "21000101T000000.000000Z-"))
        last = lnd.write()
        daemon.wait_for_log(f"stored .*{true_name(foreign, '')}")
        daemon.wait_for_stored(last, count=2)
        daemon.wait_for_looks(10)
        expect_newest_last(daemon, last)
        # once anew, above the name that was laid there, and once more if its older name came last
        assert daemon.log.count("captured") in (3, 4)


@pytest.mark.unmeasured
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@example([Thing(true_name(kind.encode() * 99).encode(), kind) for kind in KINDS])
@example([Thing(b".mine.partial", "file"), Thing(b".receipt~", "fifo")])
@given(st.lists(things(), min_size=5, max_size=40, unique_by=lambda thing: thing.name))
def test_once_is_not_bothered(lying: list[Thing]) -> None:
    """It sends LND's version and the true staged ones, and leaves everything else as it is."""
    with tempfile.TemporaryDirectory() as name, FakeS3() as fake:
        directory, lnd = Path(name, "staging"), Lnd(Path(name, "lnd"))
        directory.mkdir(mode=0o700)
        Path(name, "target").write_bytes(b"t" * 100)
        newest = lnd.write().data
        for thing in lying:
            lay(directory, thing)
        before = identities(directory)
        done = done_well(settings_at(fake.endpoint, lnd, directory, bucket="bucket", prefix=""))
        after = identities(directory).values()
        assert not re.search("Traceback|\x1b", done.stderr)
        versions = {os.fsdecode(thing.name): thing.data for thing in lying if is_version(thing)}
        for own in (*versions, *map(os.fsdecode, OWN)):
            before.pop(own, None)
        assert set(before.values()) <= set(after), "something is not as it was"
        assert mode(directory) == 0o700
        sent = {key: entry.data for key, entry in fake.objects("bucket").items()}
        # LND's goes out once more if others went out after it.
        own_puts = {key: data for key, data in sent.items() if key not in versions}
        assert sent == versions | own_puts
        assert list(own_puts.values()) == [newest] * (1 + bool(versions))
        assert fake.requests[-1].body == newest
