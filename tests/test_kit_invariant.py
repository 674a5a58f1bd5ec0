"""The invariant goes red for each way of losing something."""

from __future__ import annotations

import hashlib
import shutil
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from kit import Lnd, StoredObject, assert_nothing_lost, channel_backup, version_name
from shared import NOON

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Kept:
    """A bucket and a staging directory in which nothing is lost: LND wrote three versions, two are
    stored, and the last one is staged. A number is the second of the capture.
    """

    def __init__(self, lnd: Lnd, staging: Path) -> None:
        self.lnd, self.staging = lnd, staging
        self.held: dict[str, StoredObject] = {}
        self.written = [lnd.write(channels).data for channels in (1, 0, 2)]
        self.store(0, self.written[0])
        self.store(1, self.written[1])
        self.stage(2, self.written[2])
        (staging / ".state").touch(mode=0o600)

    def objects(self, bucket: str, prefix: str = "") -> dict[str, StoredObject]:  # noqa: ARG002 - as a server has it
        return self.held

    def store(self, number: int, data: bytes, holds: bytes | None = None, digest: str = "") -> None:
        """Store a version, or other bytes under its name, or with another digest."""
        key = "alice/" + version_name(data, NOON + timedelta(seconds=number))
        metadata = {"sha256": digest or hashlib.sha256(data).hexdigest()}
        self.held[key] = StoredObject(key, data if holds is None else holds, metadata, NOON)

    def stage(self, number: int, data: bytes, holds: bytes | None = None) -> Path:
        """Stage a version, or other bytes under its name."""
        path = self.staging / version_name(data, NOON + timedelta(seconds=number))
        path.write_bytes(data if holds is None else holds)
        path.chmod(0o600)
        return path

    def remove(self, data: bytes) -> None:
        self.held = {key: entry for key, entry in self.held.items() if entry.data != data}

    def check(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        assert_nothing_lost(self.lnd, self, "bucket", "alice", self.staging, **kwargs)


@pytest.fixture
def kept(lnd: Lnd, staging: Path) -> Kept:
    return Kept(lnd, staging)


def test_the_invariant_holds_where_nothing_is_lost(kept: Kept) -> None:
    """Versions that are stored, staged or both satisfy the invariant."""
    kept.check()
    kept.store(2, kept.written[2])
    kept.check()
    shutil.rmtree(kept.staging)
    kept.check()


def test_a_lost_version_is_found_unless_it_was_replaced(kept: Kept) -> None:
    """A version in neither place is lost, unless it is named as replaced; the last always."""
    kept.remove(kept.written[1])
    with pytest.raises(AssertionError, match="version 1 of 3 is lost: Written"):
        kept.check()
    kept.check(replaced_ok={1})
    kept.check(replaced_ok=True)
    with pytest.raises(AssertionError, match="version 1 of 3 is lost"):
        kept.check(replaced_ok={0})
    kept.stage(2, kept.written[2]).unlink()
    with pytest.raises(AssertionError, match="version 2 of 3 is lost"):
        kept.check(replaced_ok=True)


def test_second_names_are_found_unless_they_are_refreshes(kept: Kept) -> None:
    """The same bytes under two names are a duplicate, unless refreshes account for it."""
    kept.store(3, kept.written[2])
    with pytest.raises(AssertionError, match=r"1 second names .*, where 0 are allowed"):
        kept.check()
    kept.check(refreshes=1)
    kept.stage(4, kept.written[2])
    with pytest.raises(AssertionError, match=r"2 second names .*, where 1 are allowed"):
        kept.check(refreshes=1)
    kept.check(refreshes=None)


def test_foreign_names_are_left_out(kept: Kept) -> None:
    """What others left is a violation until it is named."""
    (kept.staging / "notes.txt").touch(mode=0o600)
    kept.held["alice/other/key"] = StoredObject("alice/other/key", b"", {}, NOON)
    with pytest.raises(
        AssertionError, match=r"alice/other/key does not have.*\n(.*\n)*.*notes.txt does not have"
    ):
        kept.check()
    kept.check(foreign={"notes.txt", "other/key"})


def _swap_first_names(kept: Kept) -> None:
    """Store the first version as if it had been captured after the second."""
    kept.remove(kept.written[0])
    kept.store(3, kept.written[0])


VIOLATIONS: dict[str, tuple[Callable[[Kept], object], str]] = {
    "object torn": (
        lambda kept: kept.store(0, kept.written[0], kept.written[0][:-1]),
        "holds other bytes than its name says",
    ),
    "metadata wrong": (
        lambda kept: kept.store(0, kept.written[0], digest="0" * 64),
        "does not have its SHA-256 as metadata",
    ),
    "staged torn": (
        lambda kept: kept.stage(2, kept.written[2], kept.written[2][:-1]),
        "staged file .* holds other bytes",
    ),
    "staged name": (
        lambda kept: (kept.staging / "20261120T215558.123456Z-a1b2c3.tmp").touch(mode=0o600),
        "does not have the name of a version",
    ),
    "staged link": (
        lambda kept: (kept.staging / ".link").symlink_to(kept.lnd.path),
        "is not a regular file",
    ),
    "staging open": (lambda kept: kept.staging.chmod(0o750), "has mode 0750, not 0700"),
    "staged open": (lambda kept: (kept.staging / ".state").chmod(0o644), "has mode 0644, not 0600"),
    "bytes unknown": (lambda kept: kept.store(3, channel_backup(0)), "that were never a version"),
    "order wrong": (_swap_first_names, "its name does not follow"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_each_violation_is_found(kept: Kept, violation: str) -> None:
    """The invariant goes red for each kind of violation, and says what it is."""
    violate, message = VIOLATIONS[violation]
    violate(kept)
    with pytest.raises(AssertionError, match=message):
        kept.check()


def test_a_placed_file_may_be_kept_but_need_not(kept: Kept) -> None:
    """A file placed at LND's path satisfies the invariant whether it was backed up or not."""
    kept.lnd.place(b"x" * 100)
    kept.check()
    kept.store(3, b"x" * 100)
    kept.check()
