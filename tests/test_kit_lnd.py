"""The stand-in for LND writes as LND does, and remembers what it wrote."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

import pytest
from asyncinotify import Inotify, Mask
from kit import Lnd, channel_backup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


EVENTS = Mask.ACCESS | Mask.MODIFY | Mask.ATTRIB | Mask.CLOSE | Mask.OPEN
EVENTS |= Mask.MOVE | Mask.CREATE | Mask.DELETE
NAMES = {
    "channel.backup": "main",
    "temp-dont-use.backup": "temp",
    "chan-backup-archives": "archives",
}

READ_OLD = ["OPEN main", "ACCESS main", "CLOSE_NOWRITE main"]
WRITE_TEMP = ["CREATE temp", "OPEN temp", "MODIFY temp", "CLOSE_WRITE temp"]
RENAME = ["MOVED_FROM temp", "MOVED_TO main"]


def write(lnd: Lnd) -> None:
    lnd.write()


def leave_half(lnd: Lnd) -> None:
    """Leave a temporary file, as a crash does."""
    (lnd.directory / "temp-dont-use.backup").write_bytes(b"half")


UPDATES: dict[str, tuple[list[Callable[[Lnd], object]], list[str]]] = {
    "the first": ([write], [*WRITE_TEMP, *RENAME]),
    "after a crash": ([leave_half, write], ["DELETE temp", *WRITE_TEMP, *RENAME]),
    "the first into the archive": (
        [write, write],
        [*READ_OLD, *WRITE_TEMP, "OPEN main", "CREATE archives", *READ_OLD[1:], *RENAME],
    ),
    "into the archive": (
        [write, write, write],
        [*READ_OLD, *WRITE_TEMP, *READ_OLD, *RENAME],
    ),
    "an export of lncli": (
        [write, Lnd.write_in_place],
        ["OPEN main", "MODIFY main", "CLOSE_WRITE main"],
    ),
}


@pytest.mark.parametrize("update", UPDATES)
def test_an_update_has_the_events_of_lnd(tmp_path: Path, update: str) -> None:
    """The last step leaves the events that were measured with LND and lncli."""
    (*before, last), expected = UPDATES[update]
    lnd = Lnd(tmp_path)
    for step in before:
        step(lnd)
    with Inotify(sync_timeout=0) as inotify:
        inotify.add_watch(tmp_path, EVENTS)
        last(lnd)
        events = [(event.mask & ~Mask.ISDIR, NAMES.get(str(event.name), "?")) for event in inotify]
    assert [
        f"{mask.name} {name}" for mask, name in events if name != "archives" or mask is Mask.CREATE
    ] == expected
    assert lnd.path.read_bytes() == lnd.written[-1].data


def test_backups_have_real_sizes_and_never_repeat() -> None:
    """A backup has the size of a real one, and no two are the same."""
    assert [len(channel_backup(channels)) for channels in (0, 1, 10)] == [45, 718, 6775]
    assert channel_backup(0) != channel_backup(0)


def test_versions_are_recorded_in_order(tmp_path: Path) -> None:
    """Every version is recorded with its hash and rising times; a placed file is not."""
    lnd = Lnd(tmp_path)
    first, second = lnd.write(channels=3), lnd.write(data=b"x" * 45)
    lnd.place(b"odd")
    assert lnd.written == [first, second]
    assert (first.channels, second.channels) == (3, 0)
    assert first.sha256 == hashlib.sha256(first.data).hexdigest()
    assert first.renamed_at < second.renamed_at
    assert first.wall < second.wall
    assert lnd.path.read_bytes() == b"odd"
    assert len(list((tmp_path / "chan-backup-archives").iterdir())) in (1, 2)


def test_the_gap_lies_between_read_and_rename(tmp_path: Path) -> None:
    """The old version stays in place for the whole gap after LND has read it."""
    lnd = Lnd(tmp_path, read_gap_seconds=0.05)
    lnd.write()
    began = time.monotonic()
    assert lnd.write().renamed_at - began >= 0.05


def test_reading_leaves_the_fingerprint_and_any_change_alters_it(tmp_path: Path) -> None:
    """Reading does not show in the fingerprint, and each way of touching the directory does."""
    lnd = Lnd(tmp_path)
    lnd.leave_decoys()
    lnd.write()
    before = lnd.fingerprint()
    assert {"admin.macaroon", "wallet.db", "channel.backup", "."} == set(before)
    lnd.path.read_bytes()
    assert lnd.fingerprint() == before
    touches: list[Callable[[], None]] = [
        lnd.path.touch,
        lambda: lnd.path.chmod(0o600),
        (tmp_path / "new").touch,
    ]
    for touch in touches:
        touch()
        assert lnd.fingerprint() != before
        before = lnd.fingerprint()
