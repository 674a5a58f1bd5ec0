"""A stand-in for LND that writes `channel.backup` with LND's own sequence of system calls.

As a script it is LND as a service, on a machine that has nothing else of the kit.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

EMPTY_SIZE = 45
CHANNEL_SIZE = 673
MAIN_NAME = "channel.backup"
TEMP_NAME = "temp-dont-use.backup"
ARCHIVE_NAME = "chan-backup-archives"
STOPPING_SECONDS = 0.5

# What os.Create of Go passes to open(2).
_CREATE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC

Fingerprint = dict[str, tuple[int, ...]]


def channel_backup(channels: int) -> bytes:
    """Return random bytes of the size of a real backup of that many channels."""
    return os.urandom(EMPTY_SIZE + CHANNEL_SIZE * channels)


def version_name(data: bytes, at: datetime) -> str:
    """Return the name of a version that was captured at this time."""
    return f"{at:%Y%m%dT%H%M%S.%f}Z-{hashlib.sha256(data).hexdigest()[-6:]}"


@dataclass(frozen=True, repr=False)
class Written:
    """One version that LND completed; both times were taken just before it appeared under its
    name.
    """

    data: bytes
    sha256: str
    channels: int
    renamed_at: float
    wall: datetime

    def __repr__(self) -> str:
        """Name the version without its bytes, to keep failure messages readable."""
        return (
            f"<{self.channels} channels, {len(self.data)} bytes, ..{self.sha256[-6:]}, "
            f"{self.wall:%H:%M:%S.%f}>"
        )


class Lnd:
    """LND as the program sees it: one directory in which `channel.backup` is replaced again and
    again.
    """

    def __init__(self, directory: Path, *, read_gap_seconds: float = 0.0) -> None:
        """Work in the directory, which is made as LND makes it (0700) unless it exists."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / MAIN_NAME
        self.archive = True
        self.read_gap_seconds = read_gap_seconds
        self.written: list[Written] = []
        self.placed: list[bytes] = []

    def write(self, channels: int = 10, data: bytes | None = None) -> Written:
        """Complete one update, call by call as LND's `UpdateAndSwap` does it."""
        payload = channel_backup(channels) if data is None else data
        self._read_old()
        time.sleep(self.read_gap_seconds)
        temp = self._write_temp(payload)
        if self.archive:
            self._archive_old()
        version = _version(payload)
        os.rename(temp, self.path)
        self.written.append(version)
        return version

    def write_in_place(self, channels: int = 10, data: bytes | None = None) -> Written:
        """Overwrite the file as `lncli exportchanbackup --output_file` does."""
        payload = channel_backup(channels) if data is None else data
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            version = _version(payload)
            os.write(descriptor, payload)
        finally:
            os.close(descriptor)
        self.written.append(version)
        return version

    def place(self, data: bytes) -> None:
        """Rename a file of any content into place: no version that must be backed up, but one that
        may be.
        """
        os.rename(self._write_temp(data), self.path)
        self.placed.append(data)

    def leave_decoys(self) -> None:
        """Put LND's secrets beside the file, as they are on a node, to show that they are left
        alone.
        """
        for name, mode in (("admin.macaroon", 0o640), ("wallet.db", 0o600)):
            decoy = self.directory / name
            decoy.write_bytes(b"secret of LND, must never leave the node\n")
            decoy.chmod(mode)

    def fingerprint(self) -> Fingerprint:
        """Return all that a write below the directory would change: names, inodes, modes, sizes and
        times.
        """
        entries = [self.directory, *sorted(self.directory.rglob("*"))]
        return {str(entry.relative_to(self.directory)): _identity(entry) for entry in entries}

    def _read_old(self) -> bytes | None:
        """Read the whole main file, which LND does before it replaces it."""
        try:
            descriptor = os.open(self.path, _READ)
        except FileNotFoundError:
            return None
        try:
            return _read_all(descriptor)
        finally:
            os.close(descriptor)

    def _write_temp(self, data: bytes) -> Path:
        """Write and sync the temporary file, after removing one that a crash left over."""
        temp = self.directory / TEMP_NAME
        temp.unlink(missing_ok=True)
        _write_synced(os.open(temp, _CREATE, 0o666), data)
        return temp

    def _archive_old(self) -> None:
        """Copy the main file into the archive, under local time in whole seconds."""
        try:
            descriptor = os.open(self.path, _READ)
        except FileNotFoundError:
            return
        try:
            archive = self.directory / ARCHIVE_NAME
            archive.mkdir(mode=0o700, exist_ok=True)
            copy = archive / time.strftime(f"{MAIN_NAME}-%Y-%m-%d-%H-%M-%S")
            _write_synced(os.open(copy, _CREATE, 0o666), _read_all(descriptor))
        finally:
            os.close(descriptor)


def _version(data: bytes) -> Written:
    """Describe the version that is about to appear."""
    channels = max(0, (len(data) - EMPTY_SIZE) // CHANNEL_SIZE)
    return Written(
        data, hashlib.sha256(data).hexdigest(), channels, time.monotonic(), datetime.now(UTC)
    )


def _read_all(descriptor: int) -> bytes:
    """Read a descriptor to its end, in one read where the kernel gives everything at once."""
    parts = []
    while part := os.read(descriptor, os.fstat(descriptor).st_size + 512):
        parts.append(part)
    return b"".join(parts)


def _write_synced(descriptor: int, data: bytes) -> None:
    """Write everything at once, sync and close."""
    try:
        if os.write(descriptor, data) != len(data):
            raise OSError("short write")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> tuple[int, ...]:
    """Return what a change to the entry would alter, and reading it would not."""
    status = path.lstat()
    return (
        status.st_ino,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def serve(lnd: Lnd) -> None:
    """Write at the start, at each SIGUSR1, and once more after SIGTERM, late in the stop."""
    signals = {signal.SIGUSR1, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    lnd.write()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    while signal.sigwait(signals) != signal.SIGTERM:
        lnd.write()
    # It closes its peers and its database first; whoever stops beside it, stops before it.
    time.sleep(STOPPING_SECONDS)
    lnd.write()


if __name__ == "__main__":
    serve(Lnd(Path(sys.argv[1])))
