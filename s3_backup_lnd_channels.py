#!/usr/bin/env python3
"""Keep every version of LND's channel.backup in an S3 bucket.

LND replaces channel.backup (the static channel backup, SCB) by a rename whenever a channel opens or
closes. This program copies each version into a staging directory, puts it into the bucket, and
deletes the staged copy only after S3 has acknowledged those very bytes. After a crash the next
start goes on with what lies in the staging directory.

    channel.backup --capture--> version --stage--> staging directory --put, newest first--> bucket
                                                          ^                                    |
                                                          '--- delete, only on a receipt <-----'

`Daemon.run` is one loop of twenty lines: begin there. Whatever wakes it (a rename, an answer of S3,
a signal, the time), each pass asks the same questions and takes the steps that it finds missing.
Sections 1 to 4 are all that ever touches the node's file and the versions.

reads     MONITOR_FILE_PATH, the file of --env-file, the AWS SDK's own files; nothing else unasked
writes    BACKUP_DIRECTORY, METRICS_FILE; `restore` writes one new file; nothing in LND's directory
connects  to the S3 endpoint, the SDK's source of credentials, HEARTBEAT_URL; nowhere else
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit

try:
    from datetime import UTC, datetime, timedelta  # UTC since Python 3.11

    import boto3
    import botocore.credentials
    import botocore.exceptions as sdk
    from asyncinotify import InitFlags, Inotify, Mask, Watch
    from botocore.config import Config
    from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
    from botocore.parsers import ResponseParserError
    from dotenv import dotenv_values

    MISSING = ""
except ImportError as missing:  # --help and --version work all the same
    MISSING = str(missing)

__version__ = "0.1.0"
Result = TypeVar("Result")

EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_CONFIG = 0, 1, 75, 78  # 2, wrong usage, is argparse's
EMPTY_BYTES = 45  # no channels: nonce 24, version 1, count 4, tag 16 (LND 0.21 chanbackup/multi.go)
ONE_CHANNEL_BYTES = 416  # the smallest file with a channel (LND 0.21 chanbackup/single.go)
LARGEST_BYTES = 16 << 20  # some 24,000 channels; the service stays below its MemoryMax= with it
LND_FILES = ("channel.db", "wallet.db", "*.macaroon", "chan-backup-archives", "lnd.conf")
# Never to be restored from a copy (a stale channel.db loses money), or never to leave the node.
FORBIDDEN = (
    "channel.db",
    "wallet.db",
    "*.sqlite*",
    "*.macaroon",
    "hsm_secret",
    "walletunlock.json",
)
DROP = "a channel less than before: restore both"
DROP_BYTES = 300  # a file smaller by so much lacks a channel: each takes 378 or more (LND 0.21)
FIRST_YEAR, LAST_YEAR = 1970, 9999  # between them a time can be counted with
PAGES_MAX = 1000  # of a thousand keys each: a list that is longer never ends
LATE_SECONDS = 600.0  # a put that began so long after the capture does not prove today's order
TROUBLE_SECONDS = 1.0  # how often to look at a file that is absent, unreadable or unwatched
SILENCE_SECONDS = 30.0  # an attempt is given up when the socket is silent for so long
ATTEMPT_SECONDS = 120.0  # connect, proxy, TLS and answer may each be slow, as over Tor
SLOWEST_BYTES_PER_SECOND = 4000.0  # an uplink that is not given up
THREADS_MAX = 20  # given up and not ended yet; no new attempt beside so many
IDLE_SECONDS = 5.0  # then the connection is closed: a NAT drops it, and the next put would hang
ONE_SHOT_SECONDS = 45.0  # the one-shots give up; what they tell at the end may take some more
TELLING_SECONDS = 10.0
LAST_SECONDS = 0.5  # of a stop, to tell what came last
LAST_RESORT_SECONDS = 5.0  # of a restore, for each version before a drop
SECRET_CHARACTERS = 8  # of a secret that is masked: a shorter one would mask words
ALARM_SECONDS = 600.0  # a problem that lasts so long is told to the heartbeat
REMINDER_SECONDS = 3600.0  # how often a lasting problem is logged again


# --- 1. Versions: what channel.backup held at one moment ------------------------------------------
# A version is the whole content of the file; its name is the time of capture and six digits of its
# SHA-256. LND's file is only ever read.


class Version(NamedTuple):
    """A version: its name and its bytes."""

    name: str
    data: bytes


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def captured_at(name: str) -> datetime | None:
    """Return the time of capture (UTC) in a version's name; None if it is no version's name."""
    if not re.fullmatch(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{6}", name):
        return None
    with contextlib.suppress(ValueError):
        if not name.startswith("9999"):  # there must be a later name
            return datetime.fromisoformat(name[:23])
    return None


def age_seconds(at: datetime) -> float:
    """Return how long ago a time was; negative if it is still to come."""
    return (datetime.now(UTC) - at).total_seconds()


def new_name(sha256: str, newest: str) -> str:
    """Return the name of a version captured now: above the newest name, whatever the clock says."""
    now, last = datetime.now(UTC), captured_at(newest)
    if last is not None and now <= last:
        now = last + timedelta(microseconds=1)
    return f"{now:%Y%m%dT%H%M%S.%f}Z-{sha256[-6:]}"


def is_forbidden(path: str) -> bool:
    """Tell whether a path names something that must never be copied."""
    return any(fnmatch(os.path.basename(path).lower(), pattern) for pattern in FORBIDDEN)


def open_file(path: Path | str, directory: int | None = None) -> BinaryIO:
    """Open a file to read it: no link is followed, and no pipe waited for. Raises OSError."""
    more = os.O_NOFOLLOW | os.O_NONBLOCK
    opener = lambda name, flags: os.open(name, flags | more, dir_fd=directory)  # noqa: E731
    return open(path, "rb", opener=opener)


def read_file(path: Path | str, directory: int | None = None) -> bytes:
    """Return the bytes of a file, cut above 16 MiB; raises OSError."""
    with open_file(path, directory) as file:
        return file.read(min(os.fstat(file.fileno()).st_size, LARGEST_BYTES) + 1)


def read_channel_backup(path: Path) -> bytes:
    """Return the version at this path now; raises BackupError, NotYetError if it may come.

    Read through one descriptor: LND's rename (0.21 chanbackup/backupfile.go) cannot mix two
    versions. A link is followed, and where it leads is judged at each read: it may be switched.
    """
    what = f"cannot read channel.backup: {path}"
    try:
        target = os.path.realpath(path, strict=True)
        with open_file(target) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode) or is_forbidden(target):
                why = f"{target} is no regular file, or must never be copied"
                raise BackupError(f"{what}: {why}", "set MONITOR_FILE_PATH to LND's file")
            data = file.read(min(before.st_size, LARGEST_BYTES) + 1)
            after = os.fstat(file.fileno())
        is_deleted = after.st_nlink == 0 and os.path.samestat(after, os.stat(target))
    except OSError as error:
        raise node_error(what, error) from None
    if is_deleted:
        hint = (
            "bind the directory into the container, not the file, which shows old content for ever"
        )
        raise BackupError(f"{what}: the path shows a deleted file", hint)
    same_size = before.st_size == after.st_size == len(data)
    is_changing = not same_size or before.st_mtime_ns != after.st_mtime_ns
    if is_changing and after.st_size <= LARGEST_BYTES:
        raise NotYetError(f"{what}: it changed while it was read", "it is read again in a moment")
    if not EMPTY_BYTES <= after.st_size <= LARGEST_BYTES:
        why = f"{after.st_size} bytes cannot be a channel backup ({EMPTY_BYTES} to {LARGEST_BYTES})"
        raise BackupError(f"{what}: {why}", "LND did not write this; the last good version counts")
    return data


# --- 2. Staging: the directory that is the queue, and the last receipt ----------------------------
# A version is on this disk, synced, before it is sent, and stays until S3 has acknowledged it.
# Beside the versions lie dot files of the program's own; files of others are left alone.


def write_file(
    directory: int, name: str, data: bytes, *, mode: int = 0o600, new: bool = False
) -> None:
    """Write a file, synced: whole or not at all. A new one overwrites nothing. Raises OSError.

    `directory` is an open descriptor, so that all steps happen in one and the same directory.
    """
    partial = f".{name}.partial"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial, dir_fd=directory)  # cut short by a crash, or planted by somebody
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(partial, flags, mode, dir_fd=directory), "wb") as file:
            with contextlib.suppress(OSError):  # exFAT and SMB have no modes
                os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place = os.link if new else os.rename
        try:
            place(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            if not new or isinstance(error, FileExistsError):
                raise
            # exFAT and SMB have no hard links: the name is taken first, and replaced then.
            os.close(os.open(name, flags, mode, dir_fd=directory))
            os.rename(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
        try:
            os.fsync(directory)  # a new name outlives a power cut only once its directory is synced
        except OSError as error:
            if not new and error.errno != errno.EINVAL:  # old CIFS; a step that only hardens
                raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=directory)


@dataclass(frozen=True)
class Receipt:
    """What S3 acknowledged: the licence to delete the staged copy. The last one is .receipt."""

    name: str
    key: str
    size_bytes: int
    stored_at: str  # ISO 8601, UTC: when the put began, by this machine's clock
    sha256: str
    bucket: str  # HOST/BUCKET: it proves nothing of another one
    newest: str = ""  # the highest name ever given: names increase across restarts

    def is_proof(self, refresh_seconds: float) -> bool:
        """Tell whether it proves that its version is the newest in the bucket, by name and by time.

        Not if it comes from the future, is older than the refresh (0: none), or if the put began
        long after the time in the name: S3 was away, or a clock was wrong.
        """
        put_at, captured = datetime.fromisoformat(self.stored_at), captured_at(self.name)
        is_late = captured is None or (put_at - captured).total_seconds() > LATE_SECONDS
        return not is_late and 0 <= age_seconds(put_at) < (refresh_seconds or math.inf)


def read_receipt(directory: Path) -> Receipt | None:
    """Return the last receipt in a staging directory; one that makes no sense is logged."""
    try:
        receipt = Receipt(**json.loads(read_file(directory / ".receipt")))
        receipt.is_proof(0)  # raises if the name or the time makes no sense
        if captured_at(receipt.name) is None or captured_at(receipt.newest or receipt.name) is None:
            raise ValueError("a wrong name")
        return replace(receipt, size_bytes=int(receipt.size_bytes))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        log.warning(
            "ignored: the last receipt makes no sense: %s: %s", directory / ".receipt", error
        )
        return None


class Staging:
    """The staging directory, locked until the process ends; used by the loop alone.

    Beside versions: .lock, .receipt, .*.partial (cut short by a crash), .damaged-*. All goes
    through one descriptor: replacing the directory cannot split the queue.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory if need be, and lock it; raises TransientError, ConfigError."""
        self.directory = directory
        self.pending: list[str] = []  # versions to be sent, oldest first
        self.unreadable: set[str] = set()  # those that the disk did not give
        self.acknowledged: set[str] = set()  # versions to be deleted
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            fcntl.flock(
                os.open(".lock", flags, 0o600, dir_fd=self.fd), fcntl.LOCK_EX | fcntl.LOCK_NB
            )
            for name in os.listdir(self.fd):
                if fnmatch(name, ".*.partial"):
                    with contextlib.suppress(IsADirectoryError):
                        os.unlink(name, dir_fd=self.fd)
        except BlockingIOError:
            hint = "if it is the service, it backs up by itself: see its log"
            raise TransientError(
                f"cannot start: {directory}: another copy holds it", hint
            ) from None
        except OSError as error:
            hint = "check its owner, its mode, and that its file system is writable and not full"
            message = f"cannot use BACKUP_DIRECTORY: {directory}: {error.strerror}"
            raise ConfigError(message, hint) from None
        self.receipt = self.written = read_receipt(directory)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn an OSError into a BackupError."""
        try:
            yield
        except OSError as error:
            hint = "free or repair the disk; meanwhile the newest version is sent from memory"
            message = f"cannot {what}: {self.directory}: {error.strerror}"
            raise BackupError(message, hint) from None

    def relist(self) -> None:
        """See what waits on disk: others may add, mend or remove a version; raises BackupError."""
        with self.explained("list"), os.scandir(self.fd) as entries:
            files = [entry for entry in entries if captured_at(entry.name)]
            names = {entry.name for entry in files if entry.is_file(follow_symlinks=False)}
        self.pending = sorted(names - self.acknowledged)
        self.unreadable &= names

    def newest(self) -> Version | None:
        """Return the newest version that waits; raises BackupError if the disk does not give it.

        Such a one waits for the next listing, so that others can go. A damaged one is put aside.
        """
        while self.pending:
            name = self.pending.pop()
            self.unreadable.add(name)
            with self.explained(f"read {name}"):
                try:
                    data = read_file(name, self.fd)
                except OSError:  # what passes at once, as EMFILE may, makes no second capture
                    data = read_file(name, self.fd)
                self.unreadable.discard(name)
                is_possible = EMPTY_BYTES <= len(data) <= LARGEST_BYTES
                if is_possible and sha256_of(data).endswith(name[-6:]):
                    self.pending.append(name)
                    return Version(name, data)
                os.rename(name, f".damaged-{name}", src_dir_fd=self.fd, dst_dir_fd=self.fd)
            hint = "somebody edited it, or the disk is failing; it is kept as .damaged-* for a look"
            BackupError(f"damaged, and not sent: {self.directory / name}", hint).log()
        return None

    def stage(self, version: Version) -> None:
        """Put a version on disk, synced; raises BackupError."""
        with self.explained("stage"):
            write_file(self.fd, *version)
        if self.pending[-1:] != [version.name]:  # listed already, if only the sync failed
            insort(self.pending, version.name)

    def acknowledge(self, receipt: Receipt) -> None:
        """Take a version off the queue; `tidy` deletes it, while the next one is on its way."""
        if receipt.name in self.pending:
            self.pending.remove(receipt.name)
        self.acknowledged.add(receipt.name)
        self.receipt = receipt

    def tidy(self) -> None:
        """Write the last receipt down, then delete what is acknowledged; raises BackupError."""
        with contextlib.suppress(BackupError):  # on a full disk it fits after the deletion
            self.write_receipt()
        with self.explained("tidy up"):
            for name in sorted(self.acknowledged):
                with contextlib.suppress(FileNotFoundError):  # it was sent from memory
                    os.unlink(name, dir_fd=self.fd)
                self.acknowledged.discard(name)
        self.write_receipt()

    def write_receipt(self) -> None:
        """Write the last receipt down, unless it is on disk already; raises BackupError."""
        if self.receipt is not None and self.receipt is not self.written:
            with self.explained("write .receipt"):
                write_file(self.fd, ".receipt", json.dumps(asdict(self.receipt)).encode())
            self.written = self.receipt


# --- 3. S3: one client, one put, and what counts as a receipt -------------------------------------
# S3 is made to check the bytes on receipt, and only an answer that proves the object is a receipt.
# Nothing that S3 sends is trusted to be complete, finite, or S3's at all.


class Bucket:
    """The bucket, through one boto3 client; used by one thread at a time."""

    def __init__(self, name: str, prefix: str, put_arguments: Mapping[str, str]) -> None:
        """Name the bucket, the prefix of its keys, and more arguments of a put; connect nothing."""
        self.put_arguments = put_arguments
        self.name, self.prefix, self.place, self.in_use = name, prefix, "", ""
        self.session: Any = None
        self.client: Any = None

    def forget(self) -> None:
        """Let the next call read the AWS SDK's settings and credentials anew."""
        self.session = self.client = None
        new_session.cache_clear()

    def connect(self) -> Any:
        """Return the client, with credentials that have not expired; raises BackupError.

        It asks the SDK's source of credentials, which may take its time, and logs what is in use.
        """
        with explained("cannot use the AWS settings"):
            self.session = self.session or new_session()
        with explained(f"cannot get credentials{credential_source(self.session)}", CREDENTIALS):
            credentials = self.session.get_credentials()
            if credentials is None:
                raise sdk.NoCredentialsError
            keys = credentials.get_frozen_credentials()
            keep_secret(keys.secret_key, keys.token)
        with explained("cannot use the AWS settings"):
            self.client = self.client or new_client(self.session)
        meta = self.client.meta
        self.place = f"{urlsplit(meta.endpoint_url).hostname}/{self.name}"
        url, proxies = urlsplit(meta.endpoint_url), urllib.request.getproxies()
        in_use = f"endpoint {url.geturl()}, region {meta.region_name}"
        if url.scheme in proxies and not urllib.request.proxy_bypass(str(url.hostname)):
            in_use += f", proxy: {proxies[url.scheme]}"
        if in_use != self.in_use:
            log.info("using %s, credentials: %s", in_use, credentials.method)
            self.in_use = in_use
        return self.client

    def put(self, name: str, data: bytes) -> Receipt:
        """Put a version into the bucket and return S3's receipt; raises BackupError.

        The same version twice is the same object. The thread that calls this may be abandoned.
        """
        client, key, sha256 = self.connect(), self.prefix + name, sha256_of(data)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        check = {"ChecksumSHA256": checksum, "ChecksumAlgorithm": "SHA256"}
        if not self.place.split("/")[0].endswith((".amazonaws.com", ".amazonaws.com.cn")):
            # Nearly every store honours it, and Object Lock accepts it; many refuse the other one.
            md5 = hashlib.md5(data, usedforsecurity=False).digest()
            check = {"ContentMD5": base64.b64encode(md5).decode()}
        body = io.BytesIO(data)  # is sent in blocks, each with a time-out of its own
        what, put_at = f"cannot store: s3://{self.name}/{key}", datetime.now(UTC).isoformat()
        objects = f"arn:{client.meta.partition}:s3:::{self.name}/{self.prefix}*"
        if self.name.startswith("arn:"):  # an access point
            objects = f"{self.name}/object/{self.prefix}*"
        allow = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": objects}
        with explained(what, json.dumps(allow)):
            arguments = {"Metadata": {"sha256": sha256}, **check, **self.put_arguments}
            answer = client.put_object(Bucket=self.name, Key=key, Body=body, **arguments)
        echoed = answer.get("ChecksumSHA256", checksum)
        if not answer.get("ETag") or answer["AnswerBody"] or echoed != checksum:
            raise TransientError(f"{what}: the answer is no receipt", SOMETHING_BETWEEN)
        return Receipt(name, key, len(data), put_at, sha256, self.place)


# --- 4. The daemon: one loop that brings the bucket up to what is on disk -------------------------
# One object owns all state and all tasks. A version is on LND's disk, captured, staged, in flight
# (`upload`), acknowledged, deleted; each pass of the loop takes the steps that it finds missing.


class Daemon:
    """Brings the bucket up to what is on disk, for ever."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        """Lock the staging directory; raises BackupError. `stop` asks `run` to come to an end."""
        self.settings, self.bucket, self.stop = settings, bucket, asyncio.Event()
        self.staging = Staging(settings.staging)
        receipt = self.staging.receipt
        self.newest = (
            max(receipt.name, receipt.newest) if receipt else ""
        )  # highest name ever given
        self.newest_sha256 = ""
        self.newest_receipt: Receipt | None = None  # both of this run: an older one proves nothing
        self.last_receipt: Receipt | None = None
        self.on_disk: Version | None = None  # the newest version, as LND's disk has it
        self.unstaged: Version | None = None  # the same, while the staging disk refuses it
        self.upload: asyncio.Task[Any] | None = None  # what is in flight
        self.event: asyncio.Task[None] | None = None
        self.inotify: Inotify | None = None
        self.watch: Watch | None = None
        self.list_at = self.retry_at = self.used_at = 0.0  # by time.monotonic, as all times here
        self.failures = 0
        self.errands = Errands()
        self.reading = Problem("reading", "channel.backup is read")
        self.disk = Problem("staging", "staging works")
        self.storing = Problem("storing", "S3 stores versions")
        self.watching = Problem("watching", "the directory is watched")
        self.telling = Problem("telling", "METRICS_FILE and HEARTBEAT_URL work")
        self.copying = Problem("copying", "COPY_DIRECTORY keeps versions")

    async def run(self, grace_seconds: float, last_seconds: float) -> None:
        """Back up until stopped, then send what is left for at most so many seconds.

        `once` is this, stopped before it began. May be cancelled; a version in flight stays staged.
        Raises only on a fault of this program.
        """
        install_signal_handlers(self.stop)
        stopped, deadline = asyncio.create_task(self.stop.wait()), math.inf
        self.watch_directory()
        notify_systemd("READY=1")
        while True:
            if self.stop.is_set() and deadline == math.inf:
                deadline, self.retry_at = time.monotonic() + grace_seconds, 0.0
                notify_systemd(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(grace_seconds + 5) * 1e6:.0f}")
            self.watch_directory()
            self.list_staging()
            self.capture()
            self.start_upload()
            self.tidy_staging()
            self.report()
            if self.stop.is_set() and (self.is_finished() or time.monotonic() >= deadline):
                break
            tasks = (self.event, stopped, self.upload, *self.errands.tasks.values())
            await first_of(self.pause(deadline), *tasks)
            self.finish_upload()
        self.list_at = 0.0
        self.list_staging()
        if self.unstaged:
            log.error("lost with memory: %s: neither the disk nor S3 took it", self.unstaged.name)
        for _ in range(2):  # what is being told, and then what came since
            if any(not task.done() for task in self.errands.tasks.values()):
                await asyncio.wait(self.errands.tasks.values(), timeout=last_seconds / 2)
            self.finish_upload()
            self.tidy_staging()
            self.report()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # what is left may fail

    def pause(self, deadline: float) -> float:
        """Return for how many seconds nothing is to be done, unless something happens."""
        now, settings = time.monotonic(), self.settings
        pauses = [deadline - now, settings.rescan_seconds, settings.refresh_seconds or math.inf]
        pauses.append(float(os.environ.get("WATCHDOG_USEC") or "inf") / 3e6)
        if self.reading.error or self.watching.error or self.unstaged:
            pauses.append(TROUBLE_SECONDS)
        if self.wants_upload():
            pauses.append(self.retry_at - now)
        elif not self.upload and not self.is_settled():
            pauses.append(0.0)
        return max(min(pauses), 0.0)

    def is_waiting(self) -> bool:
        """Tell whether a version waits to be sent."""
        return self.unstaged is not None or bool(self.staging.pending)

    def wants_upload(self) -> bool:
        """Tell whether to call S3: a version waits, or nobody was told yet what is in use."""
        return not self.upload and (self.is_waiting() or not self.bucket.client)

    def is_settled(self) -> bool:
        """Tell whether nothing waits, and the version on disk, if readable, was the last put."""
        is_last = self.newest_receipt is self.last_receipt or self.reading.error is not None
        return is_last and not self.is_waiting()

    def is_finished(self) -> bool:
        """Tell whether nothing is left to send, or nothing that trying again soon would help."""
        is_hopeless = self.storing.error and not isinstance(self.storing.error, TransientError)
        return self.is_settled() or bool(is_hopeless and not self.upload)

    def watch_directory(self) -> None:
        """Watch the directory that the path names now: one system call if nothing changed.

        Each time, for no event tells of an ancestor renamed, a link switched, a mount over it.
        MOVED_TO is LND's rename, CLOSE_WRITE a writer in place; never a read: LND reads it before.
        """
        mask = Mask.MOVED_TO | Mask.CLOSE_WRITE | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
        file = self.settings.file
        try:
            if self.inotify is None:  # asyncinotify 4.4 builds its own NONBLOCK from O_CLOEXEC
                self.inotify = Inotify(InitFlags(os.O_CLOEXEC | os.O_NONBLOCK))
            old, self.watch = self.watch, self.inotify.add_watch(file.parent, mask)
            if old and old is not self.watch:
                with contextlib.suppress(OSError):  # the kernel removed it with its directory
                    self.inotify.rm_watch(old)
            self.watching.resolve()
        except OSError as error:
            what = f"cannot watch, only look at intervals: {file.parent}"
            self.watching.report(node_error(what, error))
        if self.event and self.event.done():
            self.event.result()  # raises if inotify failed, which must end the process
            self.event = None
        if self.inotify and not self.event:
            self.event = asyncio.create_task(next_event(self.inotify, file.name))

    def list_staging(self) -> None:
        """Every RESCAN_SECONDS see what waits: others may add, edit or remove a version.

        A name above the newest, laid there by others, becomes the newest: names increase.
        """
        if time.monotonic() < self.list_at:
            return
        try:
            self.staging.relist()
            self.list_at = time.monotonic() + self.settings.rescan_seconds
            version = self.staging.newest()
            if version and version.name >= self.newest:
                self.newest, self.newest_sha256 = version.name, sha256_of(version.data)
                self.newest_receipt = None
            if not (self.unstaged or self.staging.acknowledged or self.staging.unreadable):
                self.disk.resolve()
        except BackupError as error:
            self.disk.report(error)

    def capture(self) -> None:
        """Name and stage what is on disk, unless it is backed up; hold it if the disk refuses."""
        captured = None
        try:
            data = read_channel_backup(self.settings.file)
            self.reading.resolve()
        except BackupError as error:
            self.reading.report(error)
        else:
            if not self.is_backed_up(sha256_of(data)):
                if self.unstaged:
                    log.error("given up for a newer one, not on disk: %s", self.unstaged.name)
                self.newest_sha256, self.newest_receipt = sha256_of(data), None
                self.newest = new_name(self.newest_sha256, self.newest)
                captured = self.on_disk = self.unstaged = Version(self.newest, data)
                self.retry_at, self.failures = 0.0, 0  # a new version resets the back-off
        try:
            if self.unstaged:
                self.staging.stage(self.unstaged)
                self.unstaged = None
        except BackupError as error:
            self.disk.report(error)
        if captured:
            log_captured(captured)

    def is_backed_up(self, sha256: str) -> bool:
        """Tell whether the bytes on disk wait to be sent, or were the last ones put and prove it.

        This one rule makes the put at every start, the refresh, and a new copy of a staged one that
        was removed. It also keeps the version on disk the last put: after a drain, an outage or
        a wrong clock it goes out once more, and `restore` takes it.
        """
        if sha256 != self.newest_sha256:
            return False
        if self.unstaged or self.staging.pending[-1:] == [self.newest]:
            return True
        if self.newest_receipt is None:
            return False
        if self.is_waiting():
            return True  # it is judged once nothing is left to send
        is_last = self.newest_receipt is self.last_receipt
        return is_last and self.newest_receipt.is_proof(self.settings.refresh_seconds)

    def start_upload(self) -> None:
        """Send the newest version that waits, if nothing is in flight and it is time."""
        now = time.monotonic()
        if not self.wants_upload() or now < self.retry_at:
            return
        try:
            version = self.unstaged or self.staging.newest()
        except BackupError as error:
            self.disk.report(error)
            return
        if self.bucket.client and now > self.used_at + IDLE_SECONDS:
            self.bucket.client.close()  # a NAT drops what is idle, and a put on it would hang
        if version:
            seconds = ATTEMPT_SECONDS + len(version.data) / SLOWEST_BYTES_PER_SECOND
            call = in_daemon_thread(seconds, "cannot store", self.bucket.put, *version)
        else:
            call = in_daemon_thread(ATTEMPT_SECONDS, "cannot connect", self.bucket.connect)
        self.upload = asyncio.create_task(call)

    def finish_upload(self) -> None:
        """Take what came of the upload: a receipt, or a failure and when to try again."""
        if not self.upload or not self.upload.done():
            return
        upload, self.upload = self.upload, None
        try:
            result = upload.result()
        except BackupError as error:
            if not isinstance(error, TransientError):
                self.bucket.forget()
            self.storing.report(error)
            longest = min(error.retry_seconds_max, 2.0**self.failures)
            self.retry_at = time.monotonic() + longest * random.uniform(0.5, 1.0)
            self.failures = min(self.failures + 1, 10)
            return
        self.storing.resolve()
        self.failures, self.retry_at, self.used_at = 0, 0.0, time.monotonic()
        if isinstance(result, Receipt):
            log.info("stored s3://%s/%s: %d bytes", self.bucket.name, result.key, result.size_bytes)
            self.last_receipt = replace(result, newest=self.newest)
            if result.name == self.newest:
                self.newest_receipt, self.unstaged = self.last_receipt, None
            self.staging.acknowledge(self.last_receipt)

    def tidy_staging(self) -> None:
        """Delete what S3 acknowledged, while the next version is on its way."""
        try:
            self.staging.tidy()
        except BackupError as error:
            self.disk.report(error)

    def report(self) -> None:
        """Tell systemd, METRICS_FILE and HEARTBEAT_URL how it goes; none can hold this up."""
        receipt, settings, beat = self.staging.receipt, self.settings, ""
        waiting = self.staging.pending + ([self.unstaged.name] if self.unstaged else [])
        problems = [self.reading, self.disk, self.storing, self.watching]  # worst first
        wrong = [problem for problem in problems if problem.error]
        lasting = [str(each.error) for each in wrong if each.seconds() >= ALARM_SECONDS]
        if lasting:
            beat = "fail"
        elif self.newest_receipt and not wrong and not waiting:
            beat = self.newest
        problems += [self.copying, self.telling]
        status = status_line(receipt, len(waiting), problems)
        notify_systemd(f"WATCHDOG=1\nSTATUS={status}")
        period = self.list_at  # metrics and copy are seen to again at each listing
        if settings.copy_directory and self.on_disk:
            news = (self.newest_sha256, period)
            copy = (copy_version, settings.copy_directory, self.on_disk)
            self.errands.run(self.copying, news, period, *copy)
        if settings.metrics_file:
            text = metrics_text(receipt, self.newest, waiting, problems)
            write = (write_metrics, settings.metrics_file, text)
            self.errands.run(self.telling, (text, period), period, *write)
        if settings.heartbeat_url and beat:
            request = (request_heartbeat, settings.heartbeat_url, "; ".join(lasting))
            self.errands.run(self.telling, beat, period, *request)


def copy_version(copy_directory: str, version: Version) -> None:
    """Keep a version in COPY_DIRECTORY too, unless the newest file there holds it.

    Nothing there is overwritten or deleted, and the directory is not made: that is how a stick is
    missed that is not mounted. Raises BackupError. May hang as long as the mount does.
    """
    try:
        if is_lnd_directory(Path(copy_directory), Path(copy_directory)):
            raise OSError(errno.EPERM, "it is a directory of LND's")
        directory = os.open(copy_directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            newest = max(filter(captured_at, os.listdir(directory)), default="")
            if not newest or read_file(newest, directory) != version.data:
                write_file(directory, *version, mode=0o640, new=True)
        finally:
            os.close(directory)
    except FileExistsError:
        pass  # it is there, below one with a later name
    except OSError as error:
        what = f"cannot copy to COPY_DIRECTORY: {copy_directory}: {error.strerror}"
        raise BackupError(what, "is it mounted, writable, and not full?") from None


# --- 5. Threads and signals, and the SDK held to limits -------------------------------------------
# What may hang is called in a thread that can be left behind.


async def next_event(inotify: Inotify, name: str) -> None:
    """Return when an event concerns the file or the watch itself. Cancelled, it loses events."""
    while True:
        event = await inotify.get()
        if event.name is None or event.name.name == name:  # None: overflow, or the directory's own
            return


async def first_of(seconds: float, *tasks: asyncio.Task[Any] | None) -> None:
    """Return when one of the tasks that still run is done, or the time is over; cancels nothing."""
    running = [task for task in tasks if task and not task.done()]
    if running:
        await asyncio.wait(running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(seconds)


class Errands:
    """Calls of functions in threads, one of each at a time: what must not hold up the loop."""

    def __init__(self) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.done: dict[str, object] = {}

    def run(
        self, problem: Problem, news: object, period: float, call: Callable[..., None], *args: Any
    ) -> None:
        """Make a call, unless it was made for this news, or an earlier one is still at work.

        What failed is tried again in the next period.
        """

        async def make() -> None:
            try:
                await in_daemon_thread(2 * TELLING_SECONDS, f"cannot {name}", call, *args)
                problem.resolve()
            except BackupError as error:
                problem.report(error)
                self.done[name] = failed

        name, failed = call.__name__.replace("_", " "), (news, period)
        is_busy = name in self.tasks and not self.tasks[name].done()
        if not is_busy and self.done.get(name) not in (news, failed):
            self.done[name], self.tasks[name] = news, asyncio.create_task(make())


async def in_daemon_thread(
    seconds: float, what: str, function: Callable[..., Result], *arguments: Any
) -> Result:
    """Call a function in a thread that cannot hold up the end of the process (to_thread's can).

    Raises what the function raises, and TransientError after so many seconds. That, and being
    cancelled, abandons the thread.
    """
    if sum(thread.name == what for thread in threading.enumerate()) >= THREADS_MAX:
        raise TransientError(f"{what}: {THREADS_MAX} attempts hang", "they end by themselves")
    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name=what, daemon=True)
    thread.start()
    call = asyncio.wrap_future(future)
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # if abandoned
    await asyncio.wait([call], timeout=seconds)
    if not call.done():
        # An answer that drips, or never ends, outlasts every time-out of its socket. This ends the
        # thread between two of its steps (CPython's C API: PyThreadState_SetAsyncExc).
        ident, ending = ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ending)
        raise TransientError(
            f"{what}: given up after {seconds:.0f} s", "it hangs; it is tried again"
        )
    return call.result()


def install_signal_handlers(stop: asyncio.Event) -> None:
    """Let the first SIGTERM or SIGINT ask for a stop, and a second one end the process at once.

    A fault in a callback of the loop ends it too: no task hears of it, and a failing reader is
    called again for ever (asyncinotify 4.4).
    """

    def on_signal(number: int) -> None:
        if stop.is_set():  # this is `once`, or the second one was waiting already
            os._exit(128 + number)
        for each in (signal.SIGTERM, signal.SIGINT):  # not by the loop, which a disk may hold up
            signal.signal(each, lambda second, _: os._exit(128 + second))
        log.info("stopping: %s", signal.Signals(number).name)
        stop.set()

    def on_fault(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        fault = context.get("exception")
        log.critical("%s: %s", FAULT, context["message"], exc_info=fault)
        os._exit(EXIT_FAILED)

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal, each)
    loop.set_exception_handler(on_fault)


@functools.cache
def new_session() -> Any:
    """Return a session, until the cache is cleared; only a new one reads changed files."""
    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)  # the SDK ignores it


def new_client(session: Any, **credentials: str) -> Any:
    """Return an S3 client with limits; what the user chose is left alone. Raises what the SDK does.

    Beyond boto3's interface it uses two things of botocore's (1.44): `_session`, to see what the
    user chose in a profile, and `_endpoint`, to read no answer further than it can be good.
    """
    chosen = {name for name, value in session._session.get_scoped_config().items() if value}
    chosen |= {name[4:].lower() for name in os.environ if name.startswith("AWS_")}
    limits: dict[str, Any] = {"connect_timeout": SILENCE_SECONDS, "read_timeout": SILENCE_SECONDS}
    for checksums in {"request_checksum_calculation", "response_checksum_validation"} - chosen:
        limits[checksums] = "when_required"  # else trailers, which break many stores (boto3#4392)
    if not chosen & {"max_attempts", "retry_mode"}:  # the SDK's attempts run dry; the loop's never
        limits["retries"] = {"mode": "standard", "total_max_attempts": 1}
    client = session.client("s3", config=Config(**limits), **credentials)

    def drop_expect(request: Any, **_: object) -> None:
        del request.headers["Expect"]  # a round trip, and a second if ignored (botocore#3613)

    def send(request: Any, **_: object) -> Any:  # every answer of S3 is read here, up to a limit
        request.stream_output = True
        answer = client._endpoint.http_session.send(request)
        data = answer.raw.read(LARGEST_BYTES + 1)
        if len(data) > LARGEST_BYTES:
            answer.raw.close()
            answer.headers["Content-Length"] = str(len(data))
        answer.raw = AnswerBody(data)
        return answer

    def keep_body(http_response: Any, parsed: dict[str, Any], **_: object) -> None:
        parsed["AnswerBody"] = http_response.content

    client.meta.events.register("before-sign.s3.PutObject", drop_expect)
    client.meta.events.register("before-send.s3", send)
    client.meta.events.register("after-call.s3.PutObject", keep_body)
    return client


def credential_source(session: Any) -> str:
    """Return what the SDK's settings name as the source of credentials, for an error."""
    names = (
        "credential_process",
        "role_arn",
        "web_identity_token_file",
        "sso_session",
        "mfa_serial",
    )
    config = session._session.get_scoped_config()
    found = [f"{name} of profile {session.profile_name}" for name in names if name in config]
    found += [name for name in os.environ if "TOKEN_FILE" in name or "CONTAINER_CRED" in name]
    return f" from {', '.join(found)}" if found else ""


class AnswerBody(io.BytesIO):
    """An answer that has been read, as botocore reads it once more."""

    def stream(self, **_: object) -> Iterator[bytes]:
        """Return all of it."""
        yield self.read()


class CredentialProgram(subprocess.Popen):  # type: ignore[type-arg]
    """The SDK's credential_process: without a terminal, and ended with its children if it hangs."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options |= {"stdin": subprocess.DEVNULL, "start_new_session": True}
        super().__init__(*arguments, **options)

    def communicate(self, *_: Any, **__: Any) -> tuple[bytes, bytes]:
        """Return its output; raises CredentialRetrievalError."""
        try:
            return super().communicate(timeout=SILENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.pid, signal.SIGKILL)
            why = f"no answer in {SILENCE_SECONDS:.0f} s"
            raise sdk.CredentialRetrievalError(provider="custom-process", error_msg=why) from None


def no_prompt(_: str) -> str:
    """Refuse the SDK's question for a one-time code: nobody sits at a daemon's terminal."""
    why = "the role wants a one-time code (mfa_serial), and nobody is here to type it"
    raise sdk.CredentialRetrievalError(provider="assume-role", error_msg=why)


# --- 6. Telling: systemd, METRICS_FILE, HEARTBEAT_URL ---------------------------------------------
# Those who watch over the service are told what is stored, what waits and what is wrong. None of
# them can delay a backup.


def notify_systemd(state: str) -> None:
    """Tell systemd (sd_notify(3)). That nobody reads is no reason to fail, or to wait."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as notify:
        notify.sendto(state.encode(), address)


def log_captured(version: Version) -> None:
    """Log that a version was captured, and what is odd about its size."""
    size_bytes, odd = len(version.data), ""
    if size_bytes == EMPTY_BYTES:
        odd = ", no channels: a new node, or LND in a recovery"
    elif size_bytes < ONE_CHANNEL_BYTES:
        odd = ", a size that no known LND writes; backed up anyway"
    level = logging.WARNING if odd else logging.INFO
    log.log(level, "captured %s: %d bytes%s", version.name, size_bytes, odd)


def status_line(receipt: Receipt | None, waiting: int, problems: list[Problem]) -> str:
    """Return one line for systemctl; cut, for systemd drops what is above 4,096 bytes."""
    stored = "nothing stored yet"
    if receipt:
        stored = f"stored {receipt.stored_at[:19].replace('T', ' ')} UTC"
    wrong = [str(problem.error) for problem in problems if problem.error]
    return printable("; ".join([f"{stored}, {waiting} staged", *wrong]))[:1000]


def metrics_text(
    receipt: Receipt | None, newest: str, waiting: list[str], problems: list[Problem]
) -> str:
    """Return the metrics as Prometheus reads them; times are seconds since 1970, 0 for none."""
    times = {
        "last_stored": datetime.fromisoformat(receipt.stored_at) if receipt else None,
        "last_seen": captured_at(newest),
        "oldest_staged": captured_at(min(waiting, default="")),
    }
    lines = []
    for name, at in times.items():
        lines.append(f"# TYPE lnd_backup_{name}_timestamp_seconds gauge")
        lines.append(f"lnd_backup_{name}_timestamp_seconds {at.timestamp() if at else 0:.0f}")
    size_bytes = receipt.size_bytes if receipt else 0
    lines += ["# TYPE lnd_backup_staged gauge", f"lnd_backup_staged {len(waiting)}"]
    lines += ["# TYPE lnd_backup_last_size_bytes gauge", f"lnd_backup_last_size_bytes {size_bytes}"]
    lines.append("# TYPE lnd_backup_problem gauge")
    for problem in problems:
        is_on = int(problem.error is not None)
        lines.append(f'lnd_backup_problem{{kind="{problem.kind}"}} {is_on}')
    return "\n".join(lines) + "\n"


def write_metrics(file: str, text: str) -> None:
    """Write METRICS_FILE, readable by others, unless it says so already; raises BackupError."""
    path = Path(file)
    with contextlib.suppress(OSError):
        if read_file(path) == text.encode():
            return
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            write_file(directory, path.name, text.encode(), mode=0o644)
        finally:
            os.close(directory)
    except OSError as error:
        hint = "check its directory, and that the disk is not full"
        raise BackupError(f"cannot write METRICS_FILE: {path}: {error.strerror}", hint) from None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: whoever answers in the heartbeat's place cannot send the request elsewhere."""

    def redirect_request(self, *_: object) -> None:
        """Refuse."""


def request_heartbeat(url: str, why: str) -> None:
    """Request HEARTBEAT_URL, or URL/fail with the reason; raises TransientError."""
    try:
        parts, body = urlsplit(url), None
        if why:
            parts = parts._replace(path=parts.path.rstrip("/") + "/fail")
            body = printable(why).encode()
        if "/api/push/" in parts.path:  # Uptime Kuma takes it in the query
            query = urlencode(
                {"status": "down", "msg": printable(why)[:200]} if why else {"status": "up"}
            )
            parts, body = parts._replace(path=parts.path.removesuffix("/fail"), query=query), None
        headers = {"User-Agent": f"lnd-backup/{__version__}"}
        request = urllib.request.Request(parts.geturl(), body, headers)
        urllib.request.build_opener(NoRedirect).open(request, timeout=TELLING_SECONDS).close()
    except Exception as error:  # urllib, http.client and ssl have nothing else in common
        hint = "backups go on; check the URL, and who answers there"
        raise TransientError(f"cannot reach HEARTBEAT_URL: {reason(error)}", hint) from None


# --- 7. Reading the bucket: list and get ----------------------------------------------------------
# For `check`, `list` and `restore`, with a key that may read. Newest is decided by the earlier of
# the time in the name and S3's own: no clock that ran ahead, and no thief, names a version newest.


class StoredVersion(NamedTuple):
    """A version as the bucket lists it; times in UTC, `stored_at` by S3's clock."""

    name: str
    key: str
    size_bytes: int
    captured_at: datetime
    stored_at: datetime

    def counts_from(self) -> datetime:
        """Return the earlier of capture and storing; S3 cuts its times to the second."""
        is_ahead = self.captured_at >= self.stored_at + timedelta(seconds=1)
        return self.stored_at if is_ahead else self.captured_at

    def marks(self, older: StoredVersion | None) -> list[str]:
        """Return what deserves a look, beside the version before it."""
        marks = []
        if self.size_bytes == EMPTY_BYTES:
            marks.append("no channels")
        if older and self.size_bytes <= older.size_bytes - DROP_BYTES:
            marks.append(DROP)
        if self.captured_at > self.counts_from() + timedelta(minutes=1):
            marks.append("named later than stored")
        return marks


def list_versions(bucket: Bucket) -> tuple[list[Row], int, list[str]]:
    """Return the versions right under the prefix, newest first, each with its marks.

    And the number of other keys, and the folders. What is unusable is logged. Raises BackupError.
    """
    what, client = f"cannot list: s3://{bucket.name}/{bucket.prefix}", bucket.connect()
    entries, folders = list_entries(what, client, bucket)
    versions, unusable, others = [], 0, len(folders)
    for entry in entries:
        key, stored_at, size_bytes = (
            entry.get("Key", ""),
            entry.get("LastModified"),
            entry.get("Size"),
        )
        name = key.removeprefix(bucket.prefix)
        captured = captured_at(name)
        if captured is None:
            others += 1
        elif size_bytes is None or not stored_at or not FIRST_YEAR < stored_at.year < LAST_YEAR:
            unusable += 1
        else:
            at = stored_at.astimezone(UTC)
            versions.append(StoredVersion(name, key, size_bytes, captured, at))
    if unusable:
        log.warning("left out, S3 gave no size or no possible time: versions: %d", unusable)
    versions.sort(key=lambda version: (version.counts_from(), version.name), reverse=True)
    pairs = itertools.zip_longest(versions, versions[1:])
    return [(version, version.marks(older)) for version, older in pairs], others, folders


Row = tuple[StoredVersion, list[str]]


def list_entries(what: str, client: Any, bucket: Bucket) -> tuple[list[dict[str, Any]], list[str]]:
    """Return all keys under the prefix as S3 tells of them, and the folders; raises BackupError."""
    page = {"Bucket": bucket.name, "Prefix": bucket.prefix, "Delimiter": "/"}
    entries, folders, tokens = [], [], {""}
    while len(tokens) <= PAGES_MAX:
        with explained(what):
            answer = client.list_objects_v2(**page)
        if "IsTruncated" not in answer:
            raise TransientError(f"{what}: the answer is not S3's", SOMETHING_BETWEEN)
        entries += answer.get("Contents", [])
        folders += [str(each.get("Prefix")) for each in answer.get("CommonPrefixes", [])]
        if not answer["IsTruncated"]:
            return entries, folders
        page["ContinuationToken"] = token = answer.get("NextContinuationToken", "")
        if token in tokens:
            log.warning("%s: it ends in the middle: S3 names no further page", what)
            return entries, folders
        tokens.add(token)
    raise BackupError(f"{what}: it does not end after {PAGES_MAX} pages", "check the prefix")


def get_version(bucket: Bucket, key: str) -> bytes:
    """Return the bytes of a version, verified by its metadata, or else by the digits of its name.

    Raises BackupError, and DamagedError if the bytes are not that version's.
    """
    what, client = f"cannot use s3://{bucket.name}/{key}", bucket.connect()
    with explained(what):
        answer = client.get_object(Bucket=bucket.name, Key=key)
        data: bytes = answer["Body"].read()
    if not answer.get("ETag"):
        raise TransientError(f"{what}: the answer is not S3's", SOMETHING_BETWEEN)
    metadata = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}
    sha256, wanted = sha256_of(data), metadata.get("sha256")  # some stores write Sha256
    if len(data) < EMPTY_BYTES or wanted not in (None, sha256) or key[-6:] != sha256[-6:]:
        raise DamagedError(f"{what}: damaged: its bytes are not those of its name and metadata")
    if wanted is None:
        log.warning("no SHA-256 in the metadata, only the six digits were checked: %s", key)
    return data


# --- 8. The commands ------------------------------------------------------------------------------
# `run` and `once` are the loop. The others only read, take no lock, and give up within a minute.


def command_run(_: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Watch and back up until stopped."""
    file = settings.file
    log.info("watching %s, staging in %s", file, settings.staging)
    if os.path.islink(file):
        log.warning("%s is a link: no event comes from its target, only rescans see changes", file)
    for name in ("admin.macaroon", "wallet.db"):
        if os.access(file.parent / name, os.R_OK):
            log.warning("this user can read %s: see docs/access.md", file.parent / name)
    if settings.heartbeat_url and not settings.refresh_seconds:
        log.warning("REFRESH_SECONDS=0: there is no heartbeat while no channel changes")
    daemon = Daemon(settings, bucket)
    asyncio.run(daemon.run(settings.grace_seconds, LAST_SECONDS))
    log.info("stopped; staged for the next start: %d", len(daemon.staging.pending))
    return EXIT_DONE


def command_once(_: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Back up what is on disk and what is staged."""
    daemon = Daemon(settings, bucket)
    daemon.stop.set()
    asyncio.run(daemon.run(ONE_SHOT_SECONDS, TELLING_SECONDS))
    error = daemon.reading.error
    if daemon.list_at == 0.0 or daemon.staging.unreadable:  # what waits there was not all sent
        error = error or daemon.disk.error
    if daemon.is_waiting():
        error = daemon.storing.error
        if error is None:
            error = TransientError(f"S3 did not take it in {ONE_SHOT_SECONDS:.0f} s", NETWORK)
            error.log()
        log.error("staged, and not sent: %d", len(daemon.staging.pending))
    return error.exit_code if error else EXIT_DONE


class TimeIsUpError(BaseException):
    """The alarm of a one-shot: no Exception, so that no library takes it for one of its own."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Give up with TransientError after so many seconds; it rings each second until it is heard."""

    def on_alarm(*_: object) -> None:
        raise TimeIsUpError

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except TimeIsUpError:
        raise TransientError(f"no answer from S3 in {seconds:.0f} s", NETWORK) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Verdict(NamedTuple):
    """What `check` found out. `current`: None if nobody could tell. `proof`: bucket or receipt."""

    current: bool | None
    exit_code: int
    proof: str
    version: StoredVersion | Receipt | None
    reason: str


def check_bucket(bucket: Bucket, data: bytes) -> Verdict:
    """Judge by the objects whether the bucket holds these bytes; raises BackupError."""
    versions = [version for version, _ in list_versions(bucket)[0]]
    why = "the bucket does not hold the version on disk"
    for version in versions:
        try:
            is_candidate = version.name.endswith(sha256_of(data)[-6:])
            if is_candidate and get_version(bucket, version.key) == data:
                newer = f", but {versions[0].key} is newer" if version != versions[0] else ""
                why = f"the bucket holds the version on disk{newer}"
                return Verdict(True, EXIT_DONE, "bucket", version, why)
        except DamagedError as error:
            why = str(error)
    return Verdict(False, EXIT_FAILED, "bucket", next(iter(versions), None), why)


def check_receipt(settings: Settings, bucket: Bucket, data: bytes) -> Verdict:
    """Judge by the last receipt, and by how long LND's file has been waiting."""
    receipt, limit = read_receipt(settings.staging), 2 * settings.refresh_seconds
    if receipt and (receipt.bucket, receipt.key) != (bucket.place, bucket.prefix + receipt.name):
        receipt = None
    written = datetime.fromtimestamp(os.path.getmtime(settings.file), UTC)
    verdict = Verdict(
        None, EXIT_TRY_AGAIN, "receipt", receipt, f"LND wrote it at {written:%H:%M:%S} UTC"
    )
    if receipt and receipt.sha256 == sha256_of(data) and receipt.is_proof(limit):
        why = f"by the receipt of {receipt.stored_at[:16]} UTC; this key may not read the bucket"
        return verdict._replace(current=True, exit_code=EXIT_DONE, reason=why)
    if receipt is None:
        verdict = verdict._replace(reason=f"{verdict.reason}, and BACKUP_DIRECTORY has no receipt")
    failed = verdict._replace(current=False, exit_code=EXIT_FAILED)
    if receipt and limit and age_seconds(datetime.fromisoformat(receipt.stored_at)) > limit:
        return failed._replace(reason=f"nothing was stored since {receipt.stored_at[:16]} UTC")
    if age_seconds(written) > LATE_SECONDS:
        why = f"the version on disk has been waiting since {written:%Y-%m-%d %H:%M} UTC"
        return failed._replace(reason=why)
    return verdict


def judge(settings: Settings, bucket: Bucket) -> Verdict:
    """Return whether the version on disk is backed up. Where S3 does not tell, the receipt may."""
    verdict = Verdict(None, EXIT_FAILED, "receipt", None, "")
    try:
        data = read_channel_backup(settings.file)
        with alarm(ONE_SHOT_SECONDS):
            return check_bucket(bucket, data)
    except AccessDeniedError:
        return check_receipt(settings, bucket, data)
    except BackupError as error:
        error.log()
        if bucket.place:
            verdict = check_receipt(settings, bucket, data)
        if verdict.current is False:
            return verdict._replace(reason=f"{verdict.reason}; {error}")
        return verdict._replace(current=None, exit_code=error.exit_code, reason=str(error))


def command_check(options: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Print the verdict on the version on disk, and why, for somebody who is woken by it."""
    current, code, proof, version, why = judge(settings, bucket)
    staged = key = captured = stored = None
    with contextlib.suppress(OSError):
        staged = len([name for name in os.listdir(settings.staging) if captured_at(name)])
    if version:
        key, stored, captured = version.key, version.stored_at, captured_at(version.name)
    if options.json:
        answer: dict[str, Any] = {"current": current, "proof": proof, "key": key}
        answer |= {"captured_at": captured, "stored_at": stored, "staged": staged, "reason": why}
        print(json.dumps(answer, default=datetime.isoformat))
    else:
        words = {True: "BACKED UP", False: "NOT BACKED UP", None: "UNKNOWN"}
        print(printable(f"{words[current]}: {why}; newest known: {key}"))
    return code


def command_list(options: argparse.Namespace, _: Settings, bucket: Bucket) -> int:
    """Print the versions in the bucket, newest first: as a table, or as JSON."""
    with alarm(ONE_SHOT_SECONDS):
        rows, others, folders = list_versions(bucket)
        if not rows and bucket.prefix:  # is the prefix the wrong one?
            with contextlib.suppress(BackupError), explained("cannot list"):
                page = bucket.connect().list_objects_v2(Bucket=bucket.name, Delimiter="/")
                folders += [str(each.get("Prefix")) for each in page.get("CommonPrefixes", [])]
    if options.json:
        answer = []
        for version, marks in rows:
            empty = version.size_bytes == EMPTY_BYTES
            answer.append(version._asdict() | {"empty": empty, "marks": marks})
        print(json.dumps(answer, indent=1, default=datetime.isoformat))
    else:
        print(f"{'captured (UTC) and name':30} {'bytes':>11}  stored (UTC)")
        for version, marks in rows:
            cells = f"{version.size_bytes:>11,}  {version.stored_at:%Y-%m-%d %H:%M:%S}"
            print(f"{version.name} {cells}  {', '.join(marks)}".rstrip())
    where, hint = f"s3://{bucket.name}/{bucket.prefix}", ""
    if not rows:
        hint = f"is the prefix right? folders here: {', '.join(folders[:20]) or 'none'}"
    told = "versions in %s: %d; other keys, not shown: %d"
    log.info(told, where, len(rows), others, extra={"hint": hint})
    return EXIT_DONE


def restore_line(options: argparse.Namespace, *which: str) -> str:
    """Return the command line that restores another version."""
    env_file = ["--env-file", os.path.abspath(options.env_file)] if options.env_file else []
    return shlex.join([sys.executable, os.path.abspath(sys.argv[0]), *env_file, "restore", *which])


def choose_keys(bucket: Bucket, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the key asked for; or the newest version with channels and the last before each drop.

    And the options that restore the version before the first of them.

    A channel leaves the file when its closing confirms, possibly before its money is swept. Then
    the version before has it, and LND skips what it knows. Raises BackupError.
    """
    if options.key is not None:
        at = captured_at(options.key.rpartition("/")[2]) or datetime.now(UTC)
        key = (bucket.prefix if captured_at(options.key) else "") + options.key
        return [key], ["--before", at.isoformat()]
    what, limit = f"cannot restore: s3://{bucket.name}/{bucket.prefix}", options.before
    earlier = f" before {limit.isoformat()}" if limit else ""
    rows = [row for row in list_versions(bucket)[0] if row[0].size_bytes >= EMPTY_BYTES]
    rows = [row for row in rows if not limit or row[0].counts_from() < limit]
    full = [version for version, _ in rows if version.size_bytes > EMPTY_BYTES]
    if not rows:
        raise BackupError(
            f"{what}: there is no version{earlier}", "check the bucket and the prefix"
        )
    if not full:
        hint = f"to restore it all the same: {restore_line(options, '--key', rows[0][0].key)}"
        raise BackupError(f"{what}: no version{earlier} holds channels", hint)
    while rows[0][0] != full[0]:
        log.warning("passed over: %s: no channels; LND writes it in a recovery", rows.pop(0)[0].key)
    log.info("chosen: %s, the newest version%s that holds channels", full[0].key, earlier)
    drops = [rows[i + 1][0].key for i, (_, marks) in enumerate(rows) if DROP in marks]
    return [full[0].key, *drops[:3]], [text for each in full[1:2] for text in ("--key", each.key)]


NEXT_STEPS = """restored {key}: {size} bytes, SHA-256 {sha256}
next, as the user that runs LND, with the wallet of the same 24 words
(if there is none yet: lncli create, and wait), all these lines, in this order:
{lines}
if LND refuses the first file, the version before it:
  {before}
never start an old channel.db, never run two nodes of one seed, and never use chantools
scbforceclose with a version that is not the latest: each can cost the money in the channels.
More: docs/recovery.md"""


def command_restore(options: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Download versions, verify them, write each to a new file, and print what to do with them."""
    output, elsewhere = Path(os.path.abspath(options.output)), "name a new file with --output"
    what, directory = f"cannot restore: {output}", Path(os.path.realpath(output.parent))
    homes = [parent for parent in directory.parents if os.path.lexists(parent / "lnd.conf")]
    if homes or is_lnd_directory(directory, settings.file):
        hint = (
            "a wrong file there keeps LND from starting: write it elsewhere, lncli takes it there"
        )
        raise BackupError(f"{what}: it is in a directory of LND's", hint)
    if os.path.lexists(output):
        raise BackupError(f"{what}: it is there already, and nothing is overwritten", elsewhere)
    before: list[str] = []
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        with alarm(ONE_SHOT_SECONDS - LAST_RESORT_SECONDS):
            (key, *others), before = choose_keys(bucket, options)
            data = get_version(bucket, key)
        write_file(place, output.name, data, new=True)
    except OSError as error:
        raise BackupError(f"{what}: {error.strerror}", elsewhere) from None
    except BackupError as error:
        if before and not isinstance(error, TransientError):
            line = restore_line(options, *before, "--output", options.output)
            error.hint = "; ".join(filter(None, (error.hint, f"the version before it: {line}")))
        raise
    files = [output]
    for number, other in enumerate(others, 2):
        path = output.with_name(f"{output.name}.{number}")
        try:
            with alarm(LAST_RESORT_SECONDS):
                write_file(place, path.name, get_version(bucket, other), new=True)
            files.append(path)
        except (BackupError, OSError) as error:
            log.warning("left out: %s, from %s: %s", path, other, error)
    if len(data) == EMPTY_BYTES:
        log.warning("no channels in this version: restoring it brings nothing back from channels")
    names = ("verifychanbackup", "restorechanbackup")
    pairs = [(name, shlex.quote(str(file))) for file in files for name in names]
    lines = [f"  lncli {name} --multi_file {file}" for name, file in pairs]
    facts = {"key": key, "size": len(data), "sha256": sha256_of(data), "lines": "\n".join(lines)}
    line = restore_line(options, *before, "--output", f"{options.output}.before")
    text = NEXT_STEPS.format(**facts, before=line if before else "there is none")
    print("\n".join(printable(line) for line in text.splitlines()))
    return EXIT_DONE


# --- 9. Errors and log ----------------------------------------------------------------------------
# An error is one line (what failed, on what, why) and a hint what to do. A problem that lasts is
# logged when it begins, hourly while it lasts, and when it is over.


class BackupError(Exception):
    """What an operator can act on; trying again will not help. A message, and what to do."""

    exit_code, level, retry_seconds_max = EXIT_FAILED, logging.ERROR, 300.0

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def log(self, suffix: str = "", level: int = logging.ERROR) -> None:
        """Log it and its hint."""
        log.log(level, "%s%s", self, suffix, extra={"hint": self.hint})


class AccessDeniedError(BackupError):
    """S3 knows the key, and denies it this."""


class DamagedError(BackupError):
    """A version whose bytes are not those of its name or metadata."""


class NotYetError(BackupError):
    """LND has not written the file yet, or is about to."""

    level = logging.WARNING


class ConfigError(BackupError):
    """The configuration is wrong."""

    exit_code = EXIT_CONFIG


class TransientError(BackupError):
    """Trying again may help."""

    exit_code, level, retry_seconds_max = EXIT_TRY_AGAIN, logging.WARNING, 60.0


class Problem:
    """Something that is wrong for a while: its kind, and what works when it is over."""

    def __init__(self, kind: str, over: str) -> None:
        self.kind, self.over, self.count, self.began_at, self.logged_at = kind, over, 0, 0.0, 0.0
        self.error: BackupError | None = None

    def seconds(self) -> float:
        """Return how long it has lasted."""
        return time.monotonic() - self.began_at if self.error else 0.0

    def report(self, error: BackupError) -> None:
        """Note an error; log it if something else is to be done about it, or an hour has passed."""
        now, previous, self.error = time.monotonic(), self.error, error
        if previous is None:
            self.count, self.began_at = 0, now
        self.count += 1
        is_due = now - self.logged_at >= REMINDER_SECONDS
        if previous is None or previous.hint != error.hint or is_due:
            times = f" ({self.count} times in {self.seconds():.0f} s)" if self.count > 1 else ""
            error.log(times, error.level)
            self.logged_at = now

    def resolve(self) -> None:
        """Note that it works."""
        if self.error:
            seconds, self.error = self.seconds(), None
            log.info("%s again, after %d failures in %.0f s", self.over, self.count, seconds)


FAULT = "a fault of this program, please report it"
SOMETHING_BETWEEN = "something answers in S3's place: a captive portal, a proxy, a wrong endpoint?"
NETWORK = "what is staged stays staged; check the network, and the endpoint: scheme, host, port"
CHECK_SDK = "check AWS_PROFILE, AWS_REGION, the endpoint, and the SDK's files (AWS_CONFIG_FILE)"
CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_PROFILE, and the file, program, role or login behind it"
SET_CLOCK = "set the clock, for example by NTP: S3 compares it with its own"
READER = "the key of the node is not meant to read: use the reader key; or the prefix is wrong"
HINTS = {  # what to do about S3's codes; for any other, S3's own words have to do
    SET_CLOCK: "RequestTimeTooSkewed RequestExpired",
    NETWORK: "RequestTimeout BadDigest XAmzContentSHA256Mismatch Throttling ThrottlingException",
    "check the access key and its secret, or AWS_PROFILE; changed files are read again": """
        InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired""",
    "check the bucket's name, the prefix and the endpoint": "NoSuchBucket InvalidBucketName",
    "`list` shows which versions there are": "NoSuchKey",
    "set AWS_REGION to the bucket's region": """
        PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException""",
    "the bucket is full: free space or raise the quota": "QuotaExceeded XMinioStorageFull",
}


@contextlib.contextmanager
def explained(what: str, denied: str = READER) -> Iterator[None]:
    """Turn whatever the SDK raises into a BackupError; `denied`: what to do if denied."""
    try:
        yield
    except BackupError:
        raise
    except Exception as error:
        raise classify_s3_error(what, error, denied) from None


def classify_s3_error(what: str, error: Exception, denied: str = "") -> BackupError:
    """Return an error of the SDK as the kind that says whether trying again helps, with a hint."""
    message = f"{what}: {reason(error)}"
    if isinstance(error, sdk.ClientError) and denied != CREDENTIALS:
        return classify_answer(what, error.response, denied)
    is_network = isinstance(error, (sdk.ConnectionError, sdk.HTTPClientError))
    is_network |= type(error).__module__.startswith("urllib3")  # while an answer was read
    kind, hint = BackupError, CHECK_SDK
    if "CERTIFICATE_VERIFY_FAILED" in message or "doesn't match" in message:
        hint = "check AWS_CA_BUNDLE, and the name in the endpoint"
        if "not yet valid" in message or "expired" in message:
            kind, hint = TransientError, SET_CLOCK
    elif is_network:
        kind, hint = TransientError, NETWORK
    elif denied == CREDENTIALS:
        hint = CREDENTIALS
    elif isinstance(error, (OSError, RecursionError, ResponseParserError, sdk.IncompleteReadError)):
        kind, hint = TransientError, SOMETHING_BETWEEN
    return kind(message, hint)


def classify_answer(what: str, response: Mapping[str, Any], denied: str) -> BackupError:
    """Return an error that was answered: S3's own code and words decide."""
    error, meta = response.get("Error", {}), response.get("ResponseMetadata", {})
    code, text, status = (
        error.get("Code", ""),
        error.get("Message", ""),
        meta.get("HTTPStatusCode", 0),
    )
    words = ": ".join(part for part in (code[:100], text[:500]) if part)
    message = f"{what}: {words or 'no word of S3'} (HTTP {status})"
    if code == "AccessDenied":
        named = re.search(r"not authorized to perform: ([\w:]+)", text)
        hint = f"if key, bucket and prefix are right, add to the key's policy: {denied}"
        if "explicit deny" in text:
            hint = "a policy denies it explicitly, against which no Allow helps: find that Deny"
        elif denied == READER:
            hint = READER
        elif named and named[1] not in denied:
            hint = f"S3 names the action that is missing: allow {named[1]}"
        return AccessDeniedError(message, hint)
    for hint, codes in HINTS.items():
        if code in codes.split():
            return (TransientError if hint in (SET_CLOCK, NETWORK) else BackupError)(message, hint)
    if code in ("", str(status)):
        return TransientError(message, SOMETHING_BETWEEN)
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS):
        return TransientError(message, NETWORK)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        return TransientError(message, NETWORK)
    return BackupError(message, "these are S3's own words; if they do not help, ask the provider")


def node_error(what: str, error: OSError) -> BackupError:
    """Return what the system refused on LND's side, with what to do."""
    hints = {
        errno.EACCES: "this user needs r on the file, r and x on its directory, and x above it",
        errno.ENOSPC: "raise the limit: sysctl fs.inotify.max_user_watches",
        errno.EMFILE: "raise the limit: sysctl fs.inotify.max_user_instances, or of open files",
    }
    message, hint = f"{what}: {error.strerror}", hints.get(error.errno or 0, "check the path")
    if error.errno == errno.ENOENT:
        hint = "LND writes it when its wallet is unlocked and the chain in sync; check the path"
        return NotYetError(message, hint)
    return BackupError(message, hint)


def reason(error: Exception) -> str:
    """Return what an error says, in one line, with the cause that botocore may keep to itself."""
    text = " ".join(str(error)[:1000].split()) or type(error).__name__
    cause = str(getattr(error, "kwargs", {}).get("error", "")).rpartition(": ")[2]
    return text if cause in text else f"{text} ({cause})"


log = logging.getLogger("lnd-backup")
SECRETS: set[str] = set()


def keep_secret(*secrets: str | None) -> None:
    """Let these never appear in a log line, a status or a table."""
    SECRETS.update(secret for secret in secrets if secret and len(secret) >= SECRET_CHARACTERS)


def printable(text: object) -> str:
    """Escape what came from outside, so that it forges no line, moves no cursor; mask secrets."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    for secret in SECRETS:
        line = line.replace(secret, "***")
    return re.sub(r"(https?:|socks\w*:|proxy )//\S*@", r"\1//***@", line)  # a URL's user


class LineFormatter(logging.Formatter):
    """One line for a fact and one for its hint; priorities for journald, times for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines, each with its prefix: journald takes a bare one as information."""
        lines = [record.getMessage()]
        if hint := getattr(record, "hint", ""):
            lines.append(f"hint: {hint}")
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        stderr, level = os.fstat(sys.stderr.fileno()), record.levelno
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            prefix = {logging.CRITICAL: "<2>", logging.ERROR: "<3>", logging.WARNING: "<4>"}.get(
                level, "<6>"
            )
        else:
            prefix = self.formatTime(record, "%Y-%m-%d %H:%M:%S ")
            prefix += f"{record.levelname.lower()}: " if level > logging.INFO else ""
        return "\n".join(prefix + printable(line) for line in lines)


# --- 10. Settings: environment variables, judged before anything is written or connected ----------
# All faults are found at once. The SDK's settings are the SDK's to judge; we look at what it has
# settled on where that would go wrong late, or never.


class Settings(NamedTuple):
    """The configuration; times in seconds."""

    file: Path
    staging: Path
    bucket: str
    prefix: str
    rescan_seconds: float
    refresh_seconds: float
    grace_seconds: float
    metrics_file: str
    heartbeat_url: str
    copy_directory: str
    put_arguments: dict[str, str]


PATH, SECONDS, URL = "/.+", r"[0-9]{1,9}(\.[0-9]{1,6})?", r"https?://[^\s/@]+([/?][!-~]*)?"
SETTINGS: dict[str, tuple[str | None, str, str]] = {  # default (None: required), pattern, advice
    "MONITOR_FILE_PATH": (None, PATH, "write the whole path of LND's channel.backup"),
    "BACKUP_DIRECTORY": (None, PATH, "write a whole path, such as /var/lib/lnd-backup"),
    "S3_BUCKET_NAME": (None, r"[\w.-]{3,255}|arn:.+/.+", "write the name alone, without s3://"),
    "S3_BACKUP_PREFIX": ("", "[^/].{0,240}", "write it like node1/ or a/b/, 240 letters at most"),
    "RESCAN_SECONDS": ("60", f"(?=.*[1-9]){SECONDS}", "write a number of seconds above 0"),
    "REFRESH_SECONDS": ("86400", SECONDS, "write a number of seconds; 0 turns it off"),
    "SHUTDOWN_GRACE_SECONDS": ("10", SECONDS, "write a number of seconds, 0 or more"),
    "METRICS_FILE": ("", PATH, "write the whole path of a file"),
    "HEARTBEAT_URL": ("", URL, "write a whole URL: https://HOST/…"),
    "COPY_DIRECTORY": ("", PATH, "write the whole path of a directory that is there"),
    "S3_PUT_EXTRA_ARGS": ("", r"(\w+=[^,]+(,|$))+", "write it like NAME=VALUE,NAME=VALUE"),
}
HOST = re.compile(r"(.*@)?(\[[^]]+\]|[^:]+)(:[0-9]{1,5})?")
OWN_ARGUMENTS = {
    "Bucket",
    "Key",
    "Body",
    "Metadata",
    "ContentMD5",
    "ChecksumSHA256",
    "ChecksumAlgorithm",
}
SDK_NAMES = (
    "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION AWS_ENDPOINT_URL "
    "AWS_ENDPOINT_URL_S3 AWS_ROLE_ARN AWS_ROLE_SESSION_NAME AWS_WEB_IDENTITY_TOKEN_FILE "
    "AWS_CONTAINER_CREDENTIALS_FULL_URI AWS_EC2_METADATA_DISABLED HTTP_PROXY HTTPS_PROXY NO_PROXY "
    "http_proxy https_proxy no_proxy REQUESTS_CA_BUNDLE STATE_DIRECTORY"
)
READERS_NEED = ["S3_BUCKET_NAME", "S3_BACKUP_PREFIX"]
SERVICE_PATHS = ("BACKUP_DIRECTORY", "METRICS_FILE", "COPY_DIRECTORY")


def load_settings(environ: Mapping[str, str], command: str) -> Settings:
    """Return the settings; raises an ExceptionGroup of all ConfigErrors. Empty counts as not set.

    What the command does not need is not judged.
    """
    needed = READERS_NEED if command in ("list", "restore") else list(SETTINGS)
    if command == "check":  # another user may run it
        needed = [name for name in SETTINGS if name not in SERVICE_PATHS]
    values = {}
    for name, (default, pattern, _) in SETTINGS.items():
        is_read = name in needed or pattern == PATH
        values[name] = (environ.get(name) if is_read else "") or default or ""
    staging = values["BACKUP_DIRECTORY"] or environ.get("STATE_DIRECTORY", "").split(":")[0]
    values["BACKUP_DIRECTORY"] = staging
    file, faults = Path(values["MONITOR_FILE_PATH"]), []
    for name in needed:
        value, (default, pattern, advice) = values[name], SETTINGS[name]
        if name == "S3_BUCKET_NAME" and ":::" in value:
            advice = f"write the name alone: {value.rpartition(':')[2].partition('/')[0]}"
            faults.append(config_error(name, value, "is a name for policies", advice))
        elif not value and default is None:
            faults.append(config_error(name, value, "is not set", advice))
        elif value and not (value.isprintable() and re.fullmatch(pattern, value)):
            faults.append(config_error(name, value, "cannot be used", advice))
        elif name == "COPY_DIRECTORY" and value == staging != "":
            faults.append(config_error(name, value, "is the staging directory", "name another"))
        elif value and pattern == PATH and (fault := path_fault(name, Path(value), file)):
            faults.append(config_error(name, value, *fault))
        if faults and name == "MONITOR_FILE_PATH":
            file = Path()  # the other paths are not judged beside a wrong one
    if faults:
        values["S3_PUT_EXTRA_ARGS"] = ""
    faults += sdk_faults(environ, values["S3_BUCKET_NAME"], values["S3_PUT_EXTRA_ARGS"])
    if faults:
        raise ExceptionGroup("configuration", faults)
    if values["S3_BACKUP_PREFIX"]:
        values["S3_BACKUP_PREFIX"] = values["S3_BACKUP_PREFIX"].rstrip("/") + "/"
    path, staging, bucket, prefix, rescan, refresh, grace, *texts, arguments = values.values()
    metrics, heartbeat, copies = texts
    times = float(rescan), float(refresh), float(grace)
    pairs = dict(pair.split("=", 1) for pair in arguments.split(",") if pair)
    paths = Path(path), Path(staging or os.devnull)
    return Settings(*paths, bucket, prefix, *times, metrics, heartbeat, copies, pairs)


def warn_of_misspelt(names: Collection[str]) -> None:
    """Warn of a name that is no setting: in the --env-file, or close to one of ours."""
    known = {*SETTINGS, *SDK_NAMES.split()}
    for _, variables, *_ in BOTOCORE_DEFAUT_SESSION_VARIABLES.values():
        known |= set(variables if isinstance(variables, list) else [str(variables)])
    for name in sorted((set(names) | set(os.environ)) - known):
        close = difflib.get_close_matches(name.upper(), known - {name}, 1, 0.6)
        is_near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.8)
        is_sdks = name.startswith("AWS_ENDPOINT_URL_")
        if not is_sdks and (name in names or name.startswith("S3_") or is_near):
            meant = f": is {close[0]} meant?" if close else ""
            log.warning("%s is no setting, and ignored%s", name, meant)


def config_error(name: str, value: str, why: str, hint: str) -> ConfigError:
    """Return what is wrong with a setting; its value is not told if it may be a secret."""
    is_secret = "KEY" in name or "TOKEN" in name or name == "HEARTBEAT_URL" or "@" in value
    return ConfigError(f"configuration: {name}={'***' if is_secret else value}: {why}", hint)


def is_lnd_directory(directory: Path, file: Path) -> bool:
    """Tell whether LND keeps its data or the monitored file here; else ask for their names."""
    try:
        names = os.listdir(directory)
    except OSError:
        names = [name for name in LND_FILES if os.path.lexists(directory / name)]
    if any(fnmatch(name, pattern) for name in names for pattern in LND_FILES):
        return True
    homes = {os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file))}
    return os.path.isabs(file) and os.path.realpath(directory) in homes


def path_fault(name: str, path: Path, file: Path) -> tuple[str, str] | None:
    """Return what is wrong with a path, which may be made later, and what to do."""
    whole, user, fault = Path(os.path.realpath(path)), os.geteuid(), None
    place = shlex.quote(str(path.parent if name == "METRICS_FILE" else path))
    make = f"run: sudo install -d -m 0700 -o {user} {place}"
    if name == "COPY_DIRECTORY":  # a mount may hang: only its path is judged here
        is_lnds = path.is_relative_to(file.parent)
        return ("is in a directory of LND's", "name another one") if is_lnds else None
    status = os.lstat(path) if os.path.lexists(path) else None
    if name == "MONITOR_FILE_PATH":
        if is_forbidden(str(path)) or is_forbidden(str(whole)):
            fault = "must never be copied", "name channel.backup: a stale database loses money"
        elif os.path.isdir(whole):
            fault = "is a directory", f"name the file in it: {path / 'channel.backup'}"
    elif any(is_lnd_directory(each, file) for each in (whole, *whole.parents)):
        fault = "is in a directory of LND's", "name another: LND's are only read"
    elif name == "METRICS_FILE" or not status:
        if os.path.isdir(path) or not os.access(path.parent, os.W_OK | os.X_OK):
            fault = "cannot be made", make
    elif not stat.S_ISDIR(status.st_mode):
        fault = "is a link or no directory", f"name another, or move it away and {make}"
    elif status.st_uid != user:
        inside = f"name a directory inside it, which is made then: {path / 'lnd-backup'}"
        fault = f"belongs to user {status.st_uid}, not to {user}", inside
    elif status.st_mode & 0o022 or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        hint = f"if nothing else uses it, run: chmod 0700 {place}"
        fault = "must be writable by its owner and nobody else", hint
    return fault


def sdk_faults(environ: Mapping[str, str], bucket: str, arguments: str) -> list[ConfigError]:
    """Return what is wrong with the SDK's settings, as far as it shows without a connection."""
    faults = []
    for name, value in environ.items():
        is_proxy = name.lower() in ("http_proxy", "https_proxy")
        if (is_proxy or name.startswith("AWS_")) and not value.isprintable():
            faults.append(config_error(name, value, "has a line break or the like", "remove it"))
        elif name.startswith("AWS_") and name.endswith(("KEY", "KEY_ID", "TOKEN")) and " " in value:
            faults.append(config_error(name, value, "has a blank", "remove it"))
        elif is_proxy and value.startswith("socks"):
            faults.append(config_error(name, value, "cannot be used", "write http://HOST:PORT"))
    if faults:
        return faults
    try:
        session = new_session()
        bundle = session._session.get_config_variable("ca_bundle") or None
        client = new_client(session, aws_access_key_id="-", aws_secret_access_key="-")
        url = urlsplit(client.meta.endpoint_url)
        if url.scheme not in ("http", "https") or not HOST.fullmatch(url.netloc):
            raise ValueError(f"{url.geturl()} is no URL of http or https")
        if bundle:
            ssl.create_default_context(cafile=bundle)
    except OSError as error:
        why = f"configuration: AWS_CA_BUNDLE={bundle}: cannot be used: {error.strerror}"
        return [ConfigError(why, "name the file that holds the CA's certificate")]
    except Exception as error:
        return [ConfigError(f"configuration: AWS SDK: {reason(error)}", CHECK_SDK)]
    known = set(client.meta.service_model.operation_model("PutObject").input_shape.members)
    given = {pair.partition("=")[0] for pair in arguments.split(",") if pair}
    if wrong := given - known | given & OWN_ARGUMENTS:
        what = f"configuration: S3_PUT_EXTRA_ARGS: {', '.join(sorted(wrong))}: cannot be used"
        faults.append(ConfigError(what, "write names of put_object's arguments, with their case"))
    if url.path.rstrip("/").endswith(f"/{bucket}"):
        what = f"configuration: endpoint {url.geturl()}: ends with the bucket's name"
        faults.append(ConfigError(what, "leave the bucket's name out"))
    if str(url.hostname).startswith(f"{bucket}."):
        log.warning("the endpoint %s begins with the bucket's name: leave it out", url.geturl())
    return faults


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings of an --env-file; raises ConfigError where systemd reads otherwise."""
    what = f"cannot read --env-file: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{what}: {getattr(error, 'strerror', 'not UTF-8')}", "check it"
        ) from None
    if text.startswith("\ufeff"):
        raise ConfigError(f"{what}: it begins with a byte order mark", "save it without one")
    lines = text.replace("\r\n", "\n").split("\n")
    wrong = [str(n) for n, line in enumerate(lines, 1) if not is_plain(line)]
    if wrong:
        hint = "write KEY=value: systemd reads export, \\ and a comment behind a value differently"
        raise ConfigError(f"{what}: line {', '.join(wrong)}", hint)
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value or "" for name, value in values.items()}


def is_plain(line: str) -> bool:
    """Tell whether python-dotenv and systemd read this line of a file alike."""
    line = line.replace("\t", " ").strip(" ")
    name, equals, value = (part.strip(" ") for part in line.partition("="))
    if not line or line.startswith("#"):
        return line.isprintable() and not line.endswith("\\")
    quoted = re.fullmatch(r""""[^"\\]*"|'[^'\\]*'""", value)
    is_value = quoted or not re.search(r"""["'\\]|(^| )#""", value)
    is_name = name != "export" and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)
    return bool(equals and is_name and is_value) and line.isprintable()


# --- 11. The command line -------------------------------------------------------------------------
COMMANDS = {
    "run": (command_run, "watch and back up until stopped; the default when no command is given"),
    "once": (command_once, "back up the current version and whatever is still staged, then exit"),
    "check": (command_check, "is the version on disk now in the bucket, byte for byte?"),
    "list": (command_list, "the versions in the bucket, newest first"),
    "restore": (command_restore, "download one version, verify it, write it to a file"),
}


def point_in_time(text: str) -> datetime:
    """Parse a time of the command line: ISO 8601, local without an offset."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        example = "write it like 2026-11-20, or 2026-11-20T18:00:00+01:00"
        raise argparse.ArgumentTypeError(example) from None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    prog, common = "s3_backup_lnd_channels.py", argparse.ArgumentParser(add_help=False)
    text = "read settings from FILE; the environment wins"
    common.add_argument(
        "--env-file", metavar="FILE", type=Path, default=argparse.SUPPRESS, help=text
    )
    options: dict[str, Any] = {"allow_abbrev": False, "parents": [common]}
    text = "Exit codes: 0 done, 1 failed, 2 wrong usage, 75 try again, 78 wrong configuration."
    parser = argparse.ArgumentParser(
        prog, description=__doc__.splitlines()[0], epilog=text, **options
    )
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, **options)
        if name in ("check", "list"):
            command.add_argument("--json", action="store_true", help="print JSON: see README.md")
    restore = commands.choices["restore"]
    which = restore.add_mutually_exclusive_group()
    which.add_argument("--key", help="this version: a whole key, or the name alone")
    which.add_argument(
        "--before", metavar="TIME", type=point_in_time, help="the newest before TIME"
    )
    text = "default: channel.backup"
    restore.add_argument("--output", metavar="FILE", default="channel.backup", help=text)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; nothing that a user can cause ends in a traceback."""
    options = build_parser().parse_args(arguments)
    if MISSING:
        make = "python3 -m venv venv && venv/bin/pip install --require-hashes -r requirements.txt"
        sys.stderr.write(f"cannot start: {MISSING}\nhint: with Python 3.11 or newer, run: {make}\n")
        return EXIT_CONFIG
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.root.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be unable to encode a path
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.raiseExceptions = False  # a full disk behind stderr is no reason for tracebacks
    logging.getLogger("botocore").setLevel(
        logging.CRITICAL
    )  # its tracebacks; all is explained here
    command, code = options.command or "run", EXIT_FAILED
    options.env_file = getattr(options, "env_file", None)
    try:
        prepare_environment(read_env_file(options.env_file) if options.env_file else {})
        settings = load_settings(os.environ, command)
        bucket = Bucket(settings.bucket, settings.prefix, settings.put_arguments)
        code = COMMANDS[command][0](options, settings, bucket)
        print(end="", flush=True)
    except BackupError as error:
        error.log()
        code = error.exit_code
    except ExceptionGroup as faults:
        for fault in faults.exceptions:
            fault.log()  # type: ignore[union-attr]
        code = EXIT_CONFIG
    except BrokenPipeError:  # list | head
        code = EXIT_DONE
    except OSError as error:
        code = EXIT_FAILED
        BackupError(
            f"cannot go on: {error}", "check the disk, the permissions and the limits"
        ).log()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        log.critical(FAULT, exc_info=True)
    return code


def prepare_environment(more: Mapping[str, str]) -> None:
    """Add settings to the environment, learn the secrets, and hold the SDK's sources to limits."""
    for name, value in (more | os.environ).items():
        os.environ[name] = value
        if name.startswith("AWS_") and not value:
            del os.environ[name]  # the SDK would look for a profile, a region of no name
        if name.endswith(("SECRET_ACCESS_KEY", "TOKEN", "HEARTBEAT_URL")):
            keep_secret(value)
        if "@" in value and (name.lower().endswith("_proxy") or "ENDPOINT_URL" in name):
            user = value.rpartition("@")[0].rpartition("://")[2]
            keep_secret(user, user.partition("/")[0])
    warn_of_misspelt(more)
    sources, limited = botocore.credentials, functools.partial
    sources.ProcessProvider = limited(sources.ProcessProvider, popen=CredentialProgram)
    sources.AssumeRoleProvider = limited(sources.AssumeRoleProvider, prompter=no_prompt)


if __name__ == "__main__":
    # Not by sys.exit: Python aborts if an attempt that was left behind writes to the log meanwhile.
    os._exit(main())
