"""What the tests share that run parts of the program in their own process."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from kit import channel_backup
from shared import leave

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MADE_BEFORE = "20200101T000000.000000Z-"
GOOD = channel_backup(1)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def true_name(data: bytes, moment: str = MADE_BEFORE) -> str:
    """Return the name of these bytes, captured long ago unless another moment is given."""
    return moment + digest(data)[-6:]


def receipt(name: str, data: bytes, newest: str = "") -> program.Receipt:
    """Return S3's proof that it holds this version."""
    at = datetime.now(UTC).isoformat()
    return program.Receipt(name, f"alice/{name}", len(data), at, digest(data), "s3/bucket", newest)


def restart(directory: Path) -> program.Staging:
    """Open the directory as the next process would."""
    leave(directory)
    queue = program.Staging(directory)
    queue.relist()
    return queue


def stage(queue: program.Staging, data: bytes) -> str:
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
    return {
        entry.name: entry.read_bytes()
        for entry in directory.iterdir()
        if not entry.name.startswith(".")
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.ERROR]


class NoS3(program.Bucket):
    """A bucket that a put does not reach."""

    def put(self, name: str, data: bytes) -> program.Receipt:  # noqa: ARG002 - as in the base class
        raise program.BackupError("cannot store", "wait")


@contextlib.contextmanager
def use(env: dict[str, str]) -> Iterator[program.Bucket]:
    """Put the settings into the environment, yield the bucket they describe, and close its
    connections.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        found = program.load_settings(os.environ, "once")
        bucket = program.Bucket(found.bucket, found.prefix, found.put_arguments)
        try:
            yield bucket
        finally:
            if bucket.client:
                bucket.client.close()
