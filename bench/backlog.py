"""Many versions at once, in the staging directory or in the bucket, as this program would have put
them there.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from kit import channel_backup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.world import Place, World


class Version(NamedTuple):
    """One version of a node with one channel."""

    name: str
    data: bytes
    sha256: str


def versions(count: int) -> Iterator[Version]:
    """Yield so many versions, oldest first, the last of them captured before now."""
    first = datetime.now(UTC) - timedelta(seconds=count)
    for number in range(count):
        data = channel_backup(1)
        digest = hashlib.sha256(data).hexdigest()
        yield Version(
            f"{first + timedelta(seconds=number):%Y%m%dT%H%M%S.%f}Z-{digest[-6:]}", data, digest
        )


def stage(place: Place, count: int) -> list[Version]:
    """Put so many versions into the staging directory, and return them, oldest first."""
    staged = list(versions(count))
    for version in staged:
        path = place.staging / version.name
        path.touch(mode=0o600)
        path.write_bytes(version.data)
    return staged


def fill(world: World, place: Place, count: int) -> None:
    """Put so many versions into the bucket."""
    for version in versions(count):
        key, metadata = place.prefix + version.name, {"sha256": version.sha256}
        world.server.admin.put_object(
            Bucket=place.bucket, Key=key, Body=version.data, Metadata=metadata
        )
