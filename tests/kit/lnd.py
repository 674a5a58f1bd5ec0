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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

EMPTY_SIZE = 45
CHANNEL_SIZE = 673
MAIN_NAME = "channel.backup"
TEMP_NAME = "temp-dont-use.backup"
ARCHIVE_NAME = "chan-backup-archives"
STOPPING_SECONDS = 0.5


def channel_backup(channels: int) -> bytes:
    """Return random bytes of the size of a real backup of that many channels."""
    return os.urandom(EMPTY_SIZE + CHANNEL_SIZE * channels)


def version_name(data: bytes, at: datetime) -> str:
    """Return the name of a version that was captured at this time."""
    return f"{at:%Y%m%dT%H%M%S.%f}Z-{hashlib.sha256(data).hexdigest()[-6:]}"


@dataclass(frozen=True)
class Written:
    """One version that LND completed; both times were taken just before it appeared under its
    name.
    """

    data: bytes = field(repr=False)
    sha256: str
    renamed_at: float
    wall: datetime

    @property
    def channels(self) -> int:
        return max(0, (len(self.data) - EMPTY_SIZE) // CHANNEL_SIZE)


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
        if self.path.exists():
            self.path.read_bytes()
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
        version = _version(channel_backup(channels) if data is None else data)
        with self.path.open("wb", buffering=0) as file:
            file.write(version.data)
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

    def fingerprint(self) -> dict[str, tuple[int, ...]]:
        """Return all that a write below the directory would change: names, inodes, modes, sizes and
        times.
        """
        found: dict[str, tuple[int, ...]] = {}
        for entry in (self.directory, *self.directory.rglob("*")):
            status = entry.lstat()
            times = (status.st_mtime_ns, status.st_ctime_ns)  # reading changes the other one
            found[str(entry.relative_to(self.directory))] = (*status[:7], *times)
        return found

    def _write_temp(self, data: bytes) -> Path:
        """Write and sync the temporary file, after removing one that a crash left over."""
        temp = self.directory / TEMP_NAME
        temp.unlink(missing_ok=True)
        _write_synced(temp, data)
        return temp

    def _archive_old(self) -> None:
        """Copy the main file into the archive, under local time in whole seconds."""
        if not self.path.exists():
            return
        with self.path.open("rb") as old:
            archive = self.directory / ARCHIVE_NAME
            archive.mkdir(mode=0o700, exist_ok=True)
            copy = archive / time.strftime(f"{MAIN_NAME}-%Y-%m-%d-%H-%M-%S")
            _write_synced(copy, old.read())


def _version(data: bytes) -> Written:
    """Describe the version that is about to appear."""
    return Written(data, hashlib.sha256(data).hexdigest(), time.monotonic(), datetime.now(UTC))


def _write_synced(path: Path, data: bytes) -> None:
    """Create a file as Go does, write everything at once, and sync."""
    with path.open("w+b", buffering=0) as file:
        if file.write(data) != len(data):
            raise OSError("short write")
        os.fsync(file.fileno())


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
