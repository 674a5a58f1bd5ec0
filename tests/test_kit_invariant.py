"""The invariant goes red for each way of losing something."""

from __future__ import annotations

import hashlib
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from kit import Lnd, S3Server, Written, assert_nothing_lost, channel_backup

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Kept:
    """A world in which nothing is lost: two versions stored, the last one staged as well as
    stored.
    """

    def __init__(self, s3: S3Server, bucket: str, lnd: Lnd, staging: Path) -> None:
        """Let LND write three versions, and keep them as the program does."""
        self.s3, self.bucket, self.lnd, self.staging = s3, bucket, lnd, staging
        self.written = [lnd.write(channels) for channels in (1, 0, 2)]
        self.store(self.written[0], 0)
        self.store(self.written[1], 1)
        self.stage(self.written[2], 2)
        (staging / ".state").touch(mode=0o600)

    def name(self, version: Written, number: int) -> str:
        """Return the name of a version captured at that second."""
        return f"20261120T2155{number:02}.123456Z-{version.sha256[-6:]}"

    def store(
        self, version: Written, number: int, data: bytes | None = None, **metadata: str
    ) -> None:
        """Put a version, or other bytes under its name, into the bucket."""
        self.s3.admin.put_object(
            Bucket=self.bucket,
            Key="alice/" + self.name(version, number),
            Body=version.data if data is None else data,
            Metadata={"sha256": version.sha256} | metadata,
        )

    def stage(self, version: Written, number: int, data: bytes | None = None) -> Path:
        """Put a version, or other bytes under its name, into staging."""
        path = self.staging / self.name(version, number)
        path.write_bytes(version.data if data is None else data)
        path.chmod(0o600)
        return path

    def remove(self, number: int) -> None:
        self.s3.admin.delete_object(
            Bucket=self.bucket, Key="alice/" + self.name(self.written[number], number)
        )

    def check(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        assert_nothing_lost(self.lnd, self.s3, self.bucket, "alice", self.staging, **kwargs)


@pytest.fixture
def kept(s3_http: S3Server, lnd: Lnd, staging: Path) -> Kept:
    return Kept(s3_http, s3_http.create_bucket(), lnd, staging)


def test_the_invariant_holds_where_nothing_is_lost(kept: Kept) -> None:
    """Versions that are stored, staged or both satisfy the invariant."""
    kept.check()
    kept.store(kept.written[2], 2)
    kept.check()
    shutil.rmtree(kept.staging)
    kept.check()


def test_a_lost_version_is_found_unless_it_was_replaced(kept: Kept) -> None:
    """A version in neither place is lost, unless it is named as replaced; the last always."""
    kept.remove(1)
    with pytest.raises(AssertionError, match=r"version 1 of 3 is lost: <0 channels, 45 bytes"):
        kept.check()
    kept.check(replaced_ok={1})
    kept.check(replaced_ok=True)
    with pytest.raises(AssertionError, match="version 1 of 3 is lost"):
        kept.check(replaced_ok={0})
    (kept.staging / kept.name(kept.written[2], 2)).unlink()
    with pytest.raises(AssertionError, match="version 2 of 3 is lost"):
        kept.check(replaced_ok=True)


def test_second_names_are_found_unless_they_are_refreshes(kept: Kept) -> None:
    """The same bytes under two names are a duplicate, unless refreshes account for it."""
    kept.store(kept.written[2], 3)
    with pytest.raises(
        AssertionError, match="1 second names for the same bytes, where 0 are allowed"
    ):
        kept.check()
    kept.check(refreshes=1)
    kept.stage(kept.written[2], 4)
    with pytest.raises(
        AssertionError, match="2 second names for the same bytes, where 1 are allowed"
    ):
        kept.check(refreshes=1)
    kept.check(refreshes=None)


def test_foreign_names_are_left_out(kept: Kept) -> None:
    """What others left is a violation until it is named."""
    (kept.staging / "notes.txt").touch(mode=0o600)
    kept.s3.admin.put_object(Bucket=kept.bucket, Key="alice/other/key", Body=b"")
    with pytest.raises(
        AssertionError, match=r"alice/other/key does not have.*\n(.*\n)*.*notes.txt does not have"
    ):
        kept.check()
    kept.check(foreign={"notes.txt", "other/key"})


def _unwritten() -> Written:
    """Return a version that no LND of the test wrote."""
    data = channel_backup(0)
    return Written(data, hashlib.sha256(data).hexdigest(), 0, 0.0, None)  # type: ignore[arg-type]


def _swap_first_names(kept: Kept) -> None:
    """Store the first version as if it had been captured after the second."""
    kept.remove(0)
    kept.store(kept.written[0], 3)


VIOLATIONS: dict[str, tuple[Callable[[Kept], object], str]] = {
    "object torn": (
        lambda kept: kept.store(kept.written[0], 0, kept.written[0].data[:-1]),
        "holds other bytes than its name says",
    ),
    "metadata wrong": (
        lambda kept: kept.store(kept.written[0], 0, sha256="0" * 64),
        "does not have its SHA-256 as metadata",
    ),
    "staged torn": (
        lambda kept: kept.stage(kept.written[2], 2, kept.written[2].data[:-1]),
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
    "bytes unknown": (lambda kept: kept.store(_unwritten(), 3), "that were never a version"),
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
    placed = Written(
        b"x" * 100, hashlib.sha256(b"x" * 100).hexdigest(), 0, 0.0, kept.written[0].wall
    )
    kept.store(placed, 3)
    kept.check()
