#!/usr/bin/env python3
"""Keep every version of LND's channel.backup in an S3 bucket.

LND replaces channel.backup (the static channel backup, SCB) by a rename whenever a channel opens or
closes. This program copies each version into a staging directory, puts it into the bucket, and
deletes the staged copy only after S3 has acknowledged those very bytes. After a crash the next
start continues with what lies in the staging directory.

    channel.backup --capture--> version --stage--> staging directory --put, newest first--> bucket
                                                          ^                                    |
                                                          '--- delete, only on a receipt <-----'

`Daemon.run` is one loop of thirty lines: begin there. Whatever wakes it (a rename, an answer of S3,
a signal, the time), each pass asks the same questions and takes the steps that it finds missing.
All reading of LND's file, staging and sending is in sections 1 to 4.

reads     MONITOR_FILE_PATH, the file of --env-file, the AWS SDK's own files; nothing else unasked
writes    BACKUP_DIRECTORY, COPY_DIRECTORY, METRICS_FILE, what `restore` fetches; nothing of LND's
connects  to the S3 endpoint, the SDK's source of credentials, HEARTBEAT_URL; nowhere else
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import ctypes
import difflib
import errno
import fcntl
import hashlib
import io
import json
import logging
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
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache, partial
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

try:
    from datetime import UTC, datetime, timedelta  # UTC since Python 3.11

    import boto3
    import botocore.credentials as sources
    import botocore.exceptions as sdk
    from asyncinotify import InitFlags, Inotify, Mask, Watch
    from botocore.config import Config
    from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
    from dotenv import dotenv_values

    MISSING = ""
except ImportError as missing:  # --help and --version work all the same
    MISSING = str(missing)
__version__ = "1.0.0"
Result = TypeVar("Result")
FOREVER = float("inf")
EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_CONFIG = 0, 1, 75, 78  # 2, wrong usage, is argparse's
EMPTY_BYTES = 45  # no channels: nonce 24, version 1, count 4, tag 16 (LND 0.21 chanbackup/multi.go)
ONE_CHANNEL_BYTES = 416  # the smallest file with a channel (LND 0.21 chanbackup/single.go)
LARGEST_BYTES = 16 << 20  # some 24,000 channels; the service stays below its MemoryMax= with it
DROP_BYTES = 300  # a file smaller by so much lacks a channel: each takes 371 or more (LND 0.21)
LND_FILES = ("channel.db", "wallet.db", "*.macaroon", "chan-backup-archives", "lnd.conf")
# Never to be restored from a copy (a stale channel.db loses money), or never to leave the node.
FORBIDDEN = r"(channel|wallet)\.db|.*\.sqlite.*|.*\.macaroon|hsm_secret|walletunlock\.json"
PAGES_MAX = 1000  # of a thousand keys each: a longer list is taken for endless
LIST_BYTES_MAX = 4 << 20  # of such a page: a thousand keys of 1,024 bytes, escaped
LATE_SECONDS = 600.0  # a put that began so long after the capture may not be the newest by time
TROUBLE_SECONDS = 1.0  # how often to look at a file that is absent, unreadable or unwatched
SILENCE_SECONDS = 30.0  # an attempt is given up when the socket is silent for so long
ATTEMPT_SECONDS = 120.0  # connect, proxy, TLS and answer may each be slow, as over Tor
SLOWEST_BYTES_PER_SECOND = 4000.0  # an uplink that is not given up
THREADS_MAX = 20  # that were given up and have not ended; no new attempt beside so many
IDLE_SECONDS = 5.0  # then the connection is closed: a NAT drops it, and the next put would hang
ONE_SHOT_SECONDS = 45.0  # the one-shots give up; what they tell at the end may take some more
TELLING_SECONDS = 10.0
LAST_SECONDS = 0.5  # at the end of a stop, for the last status and heartbeat
ALARM_SECONDS = 600.0  # a problem that lasts so long is told to the heartbeat
REMINDER_SECONDS = 3600.0  # how often a lasting problem is logged again


# --- 1. Versions: what channel.backup held at one moment ------------------------------------------
# A version is the whole content of the file; its name is the time of capture and the last six
# digits of its SHA-256. LND's file is only ever read.


class Version(NamedTuple):
    """A version: its name and its bytes."""

    name: str
    data: bytes


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def captured_at(name: str) -> datetime | None:
    """Return the UTC time in a version's name; None if it is none, or of 9999: no name follows."""
    if re.fullmatch(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{6}", name) and name < "9999":
        with suppress(ValueError):
            return datetime.fromisoformat(name[:23])
    return None


def new_name(sha256: str, newest: str) -> str:
    """Return the name of a version captured now: above the newest name, whatever the clock says."""
    now = datetime.now(UTC)
    last = captured_at(newest)
    if last is not None and now <= last:
        now = last + timedelta(microseconds=1)
    return f"{now:%Y%m%dT%H%M%S.%f}Z-{sha256[-6:]}"


def is_forbidden(path: str) -> bool:
    """Tell whether a path names something that must never be copied."""
    return re.fullmatch(FORBIDDEN, os.path.basename(path).lower(), re.DOTALL) is not None


def read_file(path: Path | str, directory: int | None = None) -> tuple[bytes, os.stat_result]:
    """Return the bytes of a file, cut above 16 MiB, and its status after the reading.

    It follows no link, and waits for no pipe. Raises OSError.
    """
    more = os.O_NOFOLLOW | os.O_NONBLOCK
    opener = partial(os.open, dir_fd=directory)
    with open(path, "rb", opener=lambda name, flags: opener(name, flags | more)) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, f"{path} is no regular file")
        data = file.read(min(before.st_size, LARGEST_BYTES) + 1)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise OSError(errno.EAGAIN, "it changed while it was read")
    return data, after


def read_channel_backup(path: Path) -> bytes:
    """Return the version at this path now; raises BackupError.

    Read through one descriptor: LND's rename (0.21 chanbackup/backupfile.go) cannot mix two
    versions. The path is resolved first, and its target judged at each read, as it may change.
    """
    what = f"cannot read channel.backup: {path}"
    try:
        target = os.path.realpath(path, strict=True)
        if is_forbidden(target):
            hint = "set MONITOR_FILE_PATH to LND's file"
            raise BackupError(f"{what}: {target} must never be copied", hint)
        data, status = read_file(target)
        is_deleted = status.st_nlink == 0 and os.path.samestat(status, os.stat(target))
    except OSError as error:
        raise node_error(what, error) from None
    if is_deleted:  # a single file bound into a container shows its old content for ever
        hint = "bind the directory into the container, not the file"
        raise BackupError(f"{what}: the path shows a deleted file", hint)
    if not EMPTY_BYTES <= status.st_size <= LARGEST_BYTES:
        why = f"{status.st_size} bytes cannot be a channel backup (45 to {LARGEST_BYTES})"
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
    unfinished = f".{name}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with suppress(FileNotFoundError):
            os.unlink(unfinished, dir_fd=directory)  # cut short by a crash, or planted by somebody
        with open(os.open(unfinished, flags, mode, dir_fd=directory), "wb") as file:
            with suppress(OSError):  # exFAT and SMB have no modes
                os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        place = os.link if new else os.rename
        try:
            place(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError as error:
            if not new or isinstance(error, FileExistsError):
                raise
            # exFAT and SMB have no hard links: the name is taken first, and replaced then.
            os.close(os.open(name, flags, mode, dir_fd=directory))
            os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
        try:
            os.fsync(directory)  # a new name outlives a power cut only once its directory is synced
        except OSError as error:
            is_optional = new or error.errno == errno.EINVAL  # not every stick or NAS can
            if not is_optional:
                raise
    finally:
        with suppress(OSError):
            os.unlink(unfinished, dir_fd=directory)


class Receipt(NamedTuple):
    """What S3 acknowledged: the licence to delete the staged copy. The last one is .receipt."""

    name: str
    key: str
    size_bytes: int
    stored_at: str  # ISO 8601, UTC: when the put began, by this machine's clock
    sha256: str
    bucket: str  # ENDPOINT/BUCKET: a receipt is valid for this bucket only
    newest: str = ""  # the highest name ever given: names increase across restarts

    def age_seconds(self) -> float:
        """Return how long ago the put began; negative if a clock ran ahead then."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.stored_at)).total_seconds()

    def is_proof(self, refresh_seconds: float) -> bool:
        """Tell whether it proves that its version is the newest in the bucket, by name and by time.

        Not if it comes from the future, is older than the refresh (0: none), or if the put began
        long after the time in the name: S3 was away, or a clock was wrong.
        """
        put_at, captured = datetime.fromisoformat(self.stored_at), captured_at(self.name)
        is_late = captured is None or (put_at - captured).total_seconds() > LATE_SECONDS
        return not is_late and 0 <= self.age_seconds() < (refresh_seconds or FOREVER)


def read_receipt(directory: Path) -> Receipt | None:
    """Return the last receipt in a staging directory; one that makes no sense is logged."""
    path = directory / ".receipt"
    try:
        receipt = Receipt(**json.loads(read_file(path)[0]))
        receipt.is_proof(0)  # raises if the time makes no sense
        names = {receipt.name, receipt.newest} - {""}
        if not receipt.name or not all(map(captured_at, names)):
            raise ValueError("a wrong name")
        return receipt._replace(size_bytes=int(receipt.size_bytes))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        log.warning("ignored: the last receipt makes no sense: %s: %s", path, error)
        return None


class Staging:
    """The staging directory, locked until the process ends; used by the loop alone.

    Beside versions: .lock, .receipt, .*.partial (cut short by a crash), .damaged-*. One descriptor
    is used, so that replacing the directory cannot split the queue. Its methods raise OSError.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory if need be, and lock it; raises TransientError, ConfigError."""
        self.directory = directory
        self.pending: list[str] = []  # versions to be sent, oldest first
        self.acknowledged: set[str] = set()  # versions to be deleted
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            is_read_only = os.fstatvfs(self.fd).f_flag & os.ST_RDONLY  # versions can still be sent
            access = os.O_RDONLY if is_read_only else os.O_RDWR
            lock = os.open(".lock", access | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(self.fd):
                if fnmatch(name, ".[.0-9]*.partial"):  # of a version or of .receipt
                    with suppress(OSError):
                        os.unlink(name, dir_fd=self.fd)
        except BlockingIOError:
            message = f"cannot start: {directory}: another copy holds it"
            hint = "if it is the service, it backs up by itself: see its log"
            raise TransientError(message, hint) from None
        except OSError as error:
            message = f"cannot use BACKUP_DIRECTORY: {directory}: {error.strerror}"
            hint = "check its owner, its mode, and that its file system is writable and not full"
            raise ConfigError(message, hint) from None
        self.receipt = self.written = read_receipt(directory)

    def relist(self) -> None:
        """See what waits on disk: others may add, mend or remove a version."""
        with os.scandir(self.fd) as entries:
            files = [entry for entry in entries if captured_at(entry.name)]
            names = {entry.name for entry in files if entry.is_file(follow_symlinks=False)}
        self.pending = sorted(names - self.acknowledged)

    def newest(self, held: Version | None = None) -> Version | None:
        """Return the newest version that waits; `held` is in memory, and is not read from disk.

        One that the disk does not give waits for the next listing. A damaged one is put aside.
        """
        while self.pending:
            name = self.pending.pop()
            if held and held.name == name:
                self.pending.append(name)
                return held
            data, _ = read_file(name, self.fd)
            if EMPTY_BYTES <= len(data) <= LARGEST_BYTES and sha256_of(data).endswith(name[-6:]):
                self.pending.append(name)
                return Version(name, data)
            os.rename(name, f".damaged-{name}", src_dir_fd=self.fd, dst_dir_fd=self.fd)
            hint = "somebody edited it, or the disk is failing; it is kept as .damaged-* for a look"
            BackupError(f"damaged, and not sent: {self.directory / name}", hint).log()
        return None

    def stage(self, version: Version) -> None:
        """Put a version on disk, synced."""
        write_file(self.fd, *version)
        if self.pending[-1:] != [version.name]:  # listed already, if only the sync failed
            self.pending.append(version.name)

    def acknowledge(self, receipt: Receipt) -> None:
        """Take a version off the queue; `tidy` deletes it, while the next one is on its way."""
        at = bisect.bisect_left(self.pending, receipt.name)  # ten thousand may wait
        del self.pending[at : bisect.bisect_right(self.pending, receipt.name)]
        self.acknowledged.add(receipt.name)
        self.receipt = receipt

    def tidy(self) -> None:
        """Write the last receipt down, then delete what is acknowledged."""
        with suppress(OSError):  # on a full disk it is written after the deletion
            self.write_receipt()
        for name in sorted(self.acknowledged):
            with suppress(FileNotFoundError):  # it was sent from memory
                os.unlink(name, dir_fd=self.fd)
        self.write_receipt()
        self.acknowledged.clear()

    def write_receipt(self) -> None:
        """Write the last receipt down, unless it is on disk already."""
        if self.receipt is not None and self.receipt is not self.written:
            write_file(self.fd, ".receipt", json.dumps(self.receipt._asdict()).encode())
            self.written = self.receipt


# --- 3. S3: one client, one put, and what counts as a receipt -------------------------------------
# S3 is made to check the bytes on receipt, and only an answer that proves the object is a receipt.
# Nothing that S3 sends is trusted to be complete, finite, or S3's at all.


class Bucket:
    """The bucket, through one boto3 client (which may be shared with a thread given up)."""

    def __init__(self, name: str, prefix: str, put_arguments: Mapping[str, str]) -> None:
        """Name the bucket, the prefix of its keys, and more arguments of a put; connect nothing."""
        self.name, self.prefix = name, prefix
        self.put_arguments = put_arguments
        self.place = self.told = ""
        self.client: Any = None

    def forget(self) -> None:
        """Let the next call read the AWS SDK's settings and credentials anew."""
        self.client = None
        new_session.cache_clear()

    def connect(self) -> Any:
        """Return the client, with credentials that have not expired; raises BackupError.

        It asks the SDK's source of credentials, which may take its time, and logs what is in use.
        """
        with explained("cannot use the AWS settings", CHECK_SDK):
            session = new_session()
            names = [name for name in os.environ if name.startswith("AWS_")]
            names += scoped_config(session)
            source = f"profile {session.profile_name}, with {', '.join(names) or 'no setting'}"
        with explained(f"cannot get credentials ({source})", CREDENTIALS):
            credentials = session.get_credentials()
            keys = credentials and credentials.get_frozen_credentials()
            if not keys or None in keys[:2]:  # a program may print a key of null
                raise sdk.NoCredentialsError
            keep_secret(keys.secret_key, keys.token)
        if self.client is None:
            with explained("cannot use the AWS settings", CHECK_SDK):
                self.client = new_client(session)
            url, region = self.client.meta.endpoint_url, self.client.meta.region_name
            self.place = f"{url.rpartition('//')[2].rpartition('@')[2].rstrip('/')}/{self.name}"
            told = f"using endpoint {url}, region {region}, credentials: {credentials.method}"
            if told != self.told:
                log.info(told)
            self.told = told
        return self.client

    def put(self, name: str, data: bytes) -> Receipt:
        """Put a version into the bucket and return S3's receipt; raises BackupError.

        Repeating it is harmless: same key, same bytes. It may run on in a thread that is given up.
        """
        client = self.connect()
        key, sha256 = self.prefix + name, sha256_of(data)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()
        check = {"ChecksumSHA256": checksum, "ChecksumAlgorithm": "SHA256"}
        host = urlsplit(client.meta.endpoint_url).hostname
        if not host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
            # Nearly every store and Object Lock accept MD5; many refuse ChecksumSHA256.
            md5 = hashlib.md5(data, usedforsecurity=False).digest()
            check = {"ContentMD5": base64.b64encode(md5).decode()}
        body = io.BytesIO(data)  # is sent in blocks, each with a time-out of its own
        what = f"cannot store: s3://{self.name}/{key}"
        put_at = datetime.now(UTC).isoformat()
        objects = f"arn:{client.meta.partition}:s3:::{self.name}/{self.prefix}*"
        if self.name.startswith("arn:"):  # an access point
            objects = f"{self.name}/object/{self.prefix}*"
        allow = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": objects}
        with explained(what, json.dumps(allow)):
            own = {"Bucket": self.name, "Key": key, "Body": body, "Metadata": {"sha256": sha256}}
            answer = client.put_object(**{**self.put_arguments, **own, **check})
            echoed = answer.get("ChecksumSHA256", checksum)
            body_bytes = answer["ResponseMetadata"]["HTTPHeaders"]["x-answer-bytes"]
            if not answer.get("ETag") or body_bytes != "0" or echoed != checksum:
                raise TransientError(f"{what}: the answer is no receipt", SOMETHING_BETWEEN)
        return Receipt(name, key, len(data), put_at, sha256, self.place)


# --- 4. The daemon: one loop that brings the bucket up to what is on disk -------------------------
# One object owns all state and all tasks. A version is on LND's disk, then captured, staged, in
# flight (`upload`), acknowledged, deleted; each pass of the loop takes the steps that are missing.


class Daemon:
    """Brings the bucket up to what is on disk, for ever."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        """Lock the staging directory; raises BackupError. Setting `stop` makes `run` finish."""
        self.settings, self.bucket = settings, bucket
        self.stop = asyncio.Event()
        self.staging = Staging(settings.staging)
        receipt = self.staging.receipt
        self.newest = max(receipt.name, receipt.newest) if receipt else ""  # highest name given
        self.newest_sha256 = ""
        self.newest_receipt: Receipt | None = None  # of this run: an older one proves nothing
        self.on_disk: Version | None = None  # the newest version, as LND's disk has it
        self.unstaged: Version | None = None  # `on_disk`, while the staging disk refuses it
        self.upload: asyncio.Task[Any] | None = None  # what is in flight
        self.event: asyncio.Task[None] | None = None
        self.inotify: Inotify | None = None
        self.watch: Watch | None = None
        self.list_at = self.retry_at = self.used_at = 0.0  # by time.monotonic, as all times here
        self.failures = 0
        self.reading = Problem("reading", "channel.backup is read")
        self.disk = Problem("staging", "staging works")
        self.storing = Problem("storing", "S3 stores versions")
        self.watching = Problem("watching", "the directory is watched")
        self.copy = Errand("copying", "COPY_DIRECTORY keeps versions")
        self.heartbeat = Errand("heartbeat", "HEARTBEAT_URL answers")
        self.metrics = Errand("metrics", "METRICS_FILE is written")

    async def run(self) -> None:
        """Back up until stopped, then send what is left, for at most the grace period.

        `once` runs this with `stop` set, and each version sent extends its time. May be cancelled;
        a version in flight stays staged. Raises only on a fault of this program or of inotify.
        """
        grace, last, is_once = self.settings.grace_seconds, LAST_SECONDS, self.stop.is_set()
        if is_once:
            grace, last = ONE_SHOT_SECONDS, TELLING_SECONDS
        install_signal_handlers(self.stop)
        stopped, never = asyncio.create_task(self.stop.wait()), asyncio.Future[None]()
        deadline = fewest = FOREVER
        self.watch_directory()
        notify_systemd("READY=1")
        while True:
            if self.stop.is_set() and deadline == FOREVER:
                deadline, self.retry_at, self.failures = time.monotonic() + grace, 0.0, 0
            self.watch_directory()
            self.list_staging()
            self.capture()
            await self.start_upload()
            with self.using_disk():
                self.staging.tidy()  # while the next version is on its way
            if is_once and len(self.staging.pending) < fewest:
                deadline, fewest = time.monotonic() + grace, len(self.staging.pending)
            self.report(deadline)
            if self.stop.is_set() and (self.is_finished() or time.monotonic() >= deadline):
                break
            awaited = [never, stopped, self.event, self.upload, *self.telling()]
            running = [each for each in awaited if each and not each.done()]
            await asyncio.wait(running, timeout=self.pause(deadline), return_when=FIRST_COMPLETED)
            self.finish_upload()
        self.list_at = 0.0  # stays so if the directory, or the newest there, cannot be read
        self.list_staging()
        for _ in range(2):  # what is being told, and then what came since
            if telling := self.telling():
                await asyncio.wait(telling, timeout=last / 2)
            self.finish_upload()
            self.capture()  # the last look: what comes so late is staged for the next start
            with self.using_disk():
                self.staging.tidy()
            self.report(deadline)
        if self.unstaged:
            log.error("not backed up: %s: neither the disk nor S3 took it", self.unstaged.name)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # what is left may fail

    def telling(self) -> list[asyncio.Task[None]]:
        """Return the errands that are under way."""
        tasks = [errand.task for errand in (self.copy, self.heartbeat, self.metrics)]
        return [task for task in tasks if task and not task.done()]

    def pause(self, deadline: float) -> float:
        """Return for how many seconds nothing is to be done, unless something happens."""
        now, settings = time.monotonic(), self.settings
        pauses = [deadline - now, settings.rescan_seconds, settings.refresh_seconds or FOREVER]
        if os.environ.get("WATCHDOG_USEC", "").isdecimal():
            pauses.append(int(os.environ["WATCHDOG_USEC"]) / 3e6 or FOREVER)
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
        """Tell whether nothing waits, and what is on disk, if it can be read, was the last put."""
        is_last = self.newest_receipt is not None and self.newest_receipt is self.staging.receipt
        return (is_last or self.reading.error is not None) and not self.is_waiting()

    def is_finished(self) -> bool:
        """Tell whether nothing is left to send, or nothing that trying again soon would help."""
        is_hopeless = self.storing.error and not isinstance(self.storing.error, TransientError)
        is_changing = isinstance(self.reading.error, TransientError)  # read again in a moment
        if self.is_settled():
            return not is_changing
        return bool(is_hopeless and not self.upload)

    def watch_directory(self) -> None:
        """Watch the directory that the path names now: one system call if nothing changed.

        In every pass, because no event tells of a renamed ancestor, a switched link, a new mount.
        MOVED_TO is LND's rename, CLOSE_WRITE a writer in place. Reads are not watched: LND reads
        the old file just before it replaces it.
        """
        mask = Mask.MOVED_TO | Mask.CLOSE_WRITE | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
        file = self.settings.file
        try:
            if self.inotify is None:  # asyncinotify 4.4 builds its own NONBLOCK from O_CLOEXEC
                self.inotify = Inotify(InitFlags(os.O_CLOEXEC | os.O_NONBLOCK))
            old, self.watch = self.watch, self.inotify.add_watch(file.parent, mask)
            if old and old is not self.watch:
                with suppress(OSError):  # the kernel removed it with its directory
                    self.inotify.rm_watch(old)
            self.watching.resolve()
        except OSError as error:
            what = f"cannot watch, so it is only checked at intervals: {file.parent}"
            self.watching.report(node_error(what, error))
        if self.event and self.event.done():
            self.event.result()  # raises if inotify failed, which must end the process
            self.event = None
        if self.inotify and not self.event:
            self.event = asyncio.create_task(next_event(self.inotify, file.name))

    @contextmanager
    def using_disk(self) -> Iterator[None]:
        """Report what the staging disk refuses; the loop goes on."""
        try:
            yield
        except OSError as error:
            what = f"{error.filename or ''} {error.strerror}".strip()
            message = f"cannot use BACKUP_DIRECTORY: {self.staging.directory}: {what}"
            hint = "free or repair the disk; if replaced, restart; the newest is sent from memory"
            self.disk.report(BackupError(message, hint))

    def list_staging(self) -> None:
        """See what waits, every RESCAN_SECONDS; others may remove a version, or lay a later one."""
        if time.monotonic() < self.list_at:
            return
        with self.using_disk():
            self.staging.relist()
            version = self.staging.newest(self.on_disk)
            self.list_at = time.monotonic() + self.settings.rescan_seconds
            if version and version.name >= self.newest:
                self.newest, self.newest_sha256 = version.name, sha256_of(version.data)
                self.newest_receipt = self.unstaged = None
            if not (self.unstaged or self.staging.acknowledged):
                self.disk.resolve()

    def capture(self) -> None:
        """Name and stage what is on disk, if need be; hold it in memory if the disk refuses."""
        captured = None
        try:
            data = read_channel_backup(self.settings.file)
            self.reading.resolve()
        except BackupError as error:
            self.reading.report(error)
        else:
            sha256 = sha256_of(data)
            if self.needs_capture(sha256):
                if self.unstaged:
                    log.error("dropped, never staged: %s: a newer one came", self.unstaged.name)
                self.newest, self.newest_sha256 = new_name(sha256, self.newest), sha256
                self.newest_receipt = None
                captured = self.unstaged = Version(self.newest, data)
                self.retry_at, self.failures = 0.0, 0  # a new version resets the back-off
            self.on_disk = Version(self.newest, data)
        with self.using_disk():
            if self.unstaged:
                self.staging.stage(self.unstaged)
                self.unstaged = None
        if captured:
            log.info("captured %s: %d bytes", captured.name, len(captured.data))
        if captured and len(captured.data) < ONE_CHANNEL_BYTES:
            odd = "no channels: a new node, or LND in a recovery"
            if len(captured.data) > EMPTY_BYTES:
                odd = "a size that no known LND writes; backed up anyway"
            log.warning("%s: %s", captured.name, odd)

    def needs_capture(self, sha256: str) -> bool:
        """Tell whether the bytes on disk neither wait to be sent, nor were put last and prove it.

        This one rule makes the put at every start, the refresh, and a new copy of a staged one that
        was removed. It also keeps the version on disk the last put: after a drain, an outage or
        a wrong clock it goes out once more, and `restore` takes it.
        """
        if sha256 != self.newest_sha256:
            return True
        if self.unstaged or self.newest in self.staging.pending[-1:]:
            return False
        if self.newest_receipt is None:
            return True
        if self.is_waiting():
            return False  # decided once nothing is left to send
        is_last = self.newest_receipt is self.staging.receipt
        return not (is_last and self.newest_receipt.is_proof(self.settings.refresh_seconds))

    async def start_upload(self) -> None:
        """Send the newest version that waits, if nothing is in flight and it is time."""
        now = time.monotonic()
        if not self.wants_upload() or now < self.retry_at:
            return
        if self.bucket.client and now > self.used_at + IDLE_SECONDS:
            self.bucket.client.close()  # a NAT drops what is idle, and a put on it would hang
        with self.using_disk():
            version = self.unstaged or self.staging.newest(self.on_disk)
            if version:
                seconds = ATTEMPT_SECONDS + len(version.data) / SLOWEST_BYTES_PER_SECOND
                call = in_daemon_thread(seconds, "cannot store", self.bucket.put, *version)
            else:
                call = in_daemon_thread(ATTEMPT_SECONDS, "cannot connect", self.bucket.connect)
            self.upload = asyncio.create_task(call)
            await asyncio.sleep(0)  # it begins here, and not when the loop comes to wait

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
            self.staging.acknowledge(result._replace(newest=self.newest))
            if result.name == self.newest:
                self.newest_receipt, self.unstaged = self.staging.receipt, None

    def report(self, deadline: float) -> None:
        """Tell systemd and the rest how it goes, and keep the copy; none can hold this up."""
        settings, receipt = self.settings, self.staging.receipt
        waiting = list(self.staging.pending)
        if self.unstaged:
            waiting.append(self.unstaged.name)
        problems = [self.reading, self.disk, self.storing, self.watching, self.copy.problem]
        wrong = [problem for problem in problems if problem.error]  # worst first
        lasting = "; ".join(str(each.error) for each in wrong if each.seconds() >= ALARM_SECONDS)
        problems += [self.heartbeat.problem, self.metrics.problem]
        status = status_line(receipt, len(waiting), problems)
        if deadline < FOREVER:
            seconds = deadline - time.monotonic() + TELLING_SECONDS
            status += f"\nSTOPPING=1\nEXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}"
        notify_systemd(f"WATCHDOG=1\nSTATUS={status}")
        period = time.monotonic() // settings.rescan_seconds  # a failure waits for the next one
        if settings.copy_directory and self.on_disk:
            copy = (copy_version, settings.copy_directory, settings.file, self.on_disk)
            self.copy.run((self.on_disk.name, period), period, *copy)
        if settings.metrics_file:
            text = metrics_text(receipt, self.newest, waiting, problems)
            self.metrics.run((text, period), period, write_metrics, settings.metrics_file, text)
        is_good = self.newest_receipt and not wrong and not waiting
        if settings.heartbeat_url and (lasting or is_good):
            beat = "" if lasting else self.newest
            self.heartbeat.run(beat, period, request_heartbeat, settings.heartbeat_url, lasting)


# --- 5. Threads and signals, and the SDK held to limits -------------------------------------------
# What may hang is called in a thread that can be left behind.


async def next_event(inotify: Inotify, name: str) -> None:
    """Return when an event concerns the file or the watch itself. Cancelled, it loses events."""
    while True:
        event = await inotify.get()
        if event.name is None or event.name.name == name:  # None: overflow, or the directory's own
            return


class Errand:
    """A call in a thread, one at a time: what must not hold up the loop."""

    def __init__(self, kind: str, over: str) -> None:
        self.problem = Problem(kind, over)
        self.done: object = self
        self.task: asyncio.Task[None] | None = None

    def run(self, about: object, period: float, call: Callable[..., None], *args: Any) -> None:
        """Make a call, unless the last one was about the same, or is still at work.

        What failed is tried again in the next period.
        """

        async def make() -> None:
            try:
                what = f"cannot {call.__name__.replace('_', ' ')}"
                await in_daemon_thread(2 * TELLING_SECONDS, what, call, *args)
                self.problem.resolve()
            except BackupError as error:
                self.problem.report(error)
                self.done = (about, period)

        is_busy = self.task and not self.task.done()
        if not is_busy and self.done not in (about, (about, period)):
            self.done, self.task = about, asyncio.create_task(make())


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
    try:
        thread.start()
    except RuntimeError as error:
        raise TransientError(f"{what}: {error}", "raise the limit of threads") from None
    call = asyncio.wrap_future(future)
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # if abandoned
    await asyncio.wait([call], timeout=seconds)
    if not call.done():
        # An answer that drips, or never ends, outlasts every time-out of its socket. This ends the
        # thread between two of its steps (CPython's C API: PyThreadState_SetAsyncExc).
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
        why = f"{what}: given up after {seconds:.0f} s"
        raise TransientError(why, "it hangs; it is tried again")
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
        log.critical("%s: %s", FAULT, context["message"], exc_info=context.get("exception"))
        os._exit(EXIT_FAILED)

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal, each)
    loop.set_exception_handler(on_fault)


@cache
def new_session() -> Any:
    """Return a session, until the cache is cleared; only a new one reads changed files."""
    return boto3.Session(region_name=os.environ.get("AWS_REGION") or None)  # the SDK ignores it


def scoped_config(session: Any) -> dict[str, str]:
    """Return what the SDK's files say for the profile in use."""
    return {name: value for name, value in session._session.get_scoped_config().items() if value}


def new_client(session: Any, **credentials: str) -> Any:
    """Return an S3 client with limits; what the user chose is left alone. Raises what the SDK does.

    Beyond boto3's interface it uses these of botocore's (1.44): `_session`, to see what the user
    chose in a profile; `_endpoint`, `_content` and `raw`, to read no answer further than it can be
    good; and the parser.
    """
    chosen = {name[4:].lower() for name in os.environ if name.startswith("AWS_")}
    chosen.update(scoped_config(session))
    limits: dict[str, Any] = {"connect_timeout": SILENCE_SECONDS, "read_timeout": SILENCE_SECONDS}
    for checksums in {"request_checksum_calculation", "response_checksum_validation"} - chosen:
        limits[checksums] = "when_required"  # else trailers, which break many stores (boto3#4392)
    if not chosen & {"max_attempts", "retry_mode"}:  # the SDK's attempts run dry; the loop's never
        limits["retries"] = {"mode": "standard", "total_max_attempts": 1}
    parsers = session._session.get_component("response_parser_factory")
    parsers.set_parser_defaults(timestamp_parser=str)  # else one wrong time spoils a whole list
    client = session.client("s3", config=Config(**limits), **credentials)

    def drop_expect(request: Any, **_: object) -> None:
        del request.headers["Expect"]  # a round trip, and a second if ignored (botocore#3613)

    def send(request: Any, **_: object) -> Any:  # every answer of S3 is read here, up to a limit
        request.stream_output = True
        if request.method == "HEAD":  # the SDK asks where the bucket is, and is redirected again
            raise ValueError("a redirect that names no region")
        limit = 65536
        if request.method == "GET":
            limit = LIST_BYTES_MAX if "list-type=" in request.url else LARGEST_BYTES
        answer = client._endpoint.http_session.send(request)
        data = answer.raw.read(limit + 1)
        if len(data) > limit:
            answer.raw.close()
            answer.headers["Content-Length"] = str(len(data))
        elif answer.raw.length_remaining or answer.status_code // 100 == 1:
            raise sdk.HTTPClientError(error="the answer is cut short")
        answer._content, answer.raw = data, io.BytesIO(data)  # botocore reads one of them
        answer.headers["x-answer-bytes"] = str(len(data))  # for `put`: a receipt has no body
        return answer

    client.meta.events.register("before-sign.s3.PutObject", drop_expect)
    client.meta.events.register("before-send.s3", send)
    return client


def start_program(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start the SDK's credential_process, without a terminal; coreutils end it if it hangs."""
    limit = ["timeout", "--verbose", "--kill-after=1", f"{SILENCE_SECONDS}"]
    return subprocess.Popen([*limit, *command], stdin=subprocess.DEVNULL, **options)  # noqa: S603


def no_prompt(_: str) -> str:
    """Refuse the SDK's question for a one-time code: nobody sits at a daemon's terminal."""
    why = "it wants a code (mfa_serial), and nobody is here to type it"
    raise sdk.CredentialRetrievalError(provider="the role", error_msg=why)


# --- 6. Telling: systemd, METRICS_FILE, HEARTBEAT_URL, COPY_DIRECTORY -----------------------------
# Those who watch over the service are told what is stored, what waits and what is wrong. None of
# them can delay a backup, and neither can the copy.


def notify_systemd(state: str) -> None:
    """Tell systemd (sd_notify(3)). It neither fails nor waits if nobody reads."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as notify:
            notify.sendto(state.encode(), re.sub("^@", "\0", address))  # @: an abstract address


def status_line(receipt: Receipt | None, waiting: int, problems: list[Problem]) -> str:
    """Return one line for systemctl; cut, for systemd drops what is above 4,096 bytes."""
    stored = "nothing stored yet"
    if receipt and receipt.age_seconds() >= 0:
        stored = f"stored {receipt.stored_at[:19].replace('T', ' ')} UTC"
    wrong = [str(problem.error) for problem in problems if problem.error]
    return printable("; ".join([f"{stored}, {waiting} staged", *wrong]))[:1000]


def metrics_text(
    receipt: Receipt | None, newest: str, waiting: list[str], problems: list[Problem]
) -> str:
    """Return the metrics as Prometheus reads them; times are seconds since 1970, 0 for none."""
    if receipt and receipt.age_seconds() < 0:
        receipt = None  # of a clock that ran ahead
    stored = datetime.fromisoformat(receipt.stored_at) if receipt else None
    times = {
        "last_stored": stored,
        "last_seen": captured_at(newest),
        "oldest_staged": captured_at(min(waiting, default="")),
    }
    values = {"staged": len(waiting), "last_size_bytes": receipt.size_bytes if receipt else 0.0}
    for name, at in times.items():
        values[f"{name}_timestamp_seconds"] = at.timestamp() if at else 0.0
    gauge = "# TYPE lnd_backup_{0} gauge\nlnd_backup_{0} {1:.0f}\n"
    text = "".join(gauge.format(*pair) for pair in values.items())
    text += "# TYPE lnd_backup_problem gauge\n"
    for problem in problems:
        text += f'lnd_backup_problem{{kind="{problem.kind}"}} {problem.error is not None:d}\n'
    return text


def write_metrics(file: str, text: str) -> None:
    """Write METRICS_FILE, readable by others, unless it says so already; raises BackupError."""
    path = Path(file)
    with suppress(OSError):
        if read_file(path)[0] == text.encode():
            return
    try:
        with opened(path.parent) as directory:
            write_file(directory, path.name, text.encode(), mode=0o644)
    except OSError as error:
        hint = "check its directory, and that the disk is not full"
        raise BackupError(f"cannot write METRICS_FILE: {path}: {error.strerror}", hint) from None


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Open a directory for `write_file`; raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class NoRedirect(HTTPRedirectHandler):
    """Follows none: whoever answers in the heartbeat's place cannot send the request elsewhere."""

    def redirect_request(self, *_: object) -> None:
        """Refuse."""


def request_heartbeat(url: str, why: str) -> None:
    """Request HEARTBEAT_URL, or URL/fail with the reason; raises TransientError."""
    try:
        parts, body = urlsplit(url), None
        why = printable(why)
        if "/api/push/" in parts.path:  # Uptime Kuma takes it in the query
            told = {"status": "down", "msg": why[:200]} if why else {"status": "up"}
            parts = parts._replace(query=urlencode(told))
        elif why:
            parts = parts._replace(path=parts.path.rstrip("/") + "/fail")
            body = why.encode()
        headers = {"User-Agent": f"lnd-backup/{__version__}"}
        request = Request(parts.geturl(), body, headers)
        build_opener(NoRedirect).open(request, timeout=TELLING_SECONDS).close()
    except Exception as error:  # urllib, http.client and ssl have nothing else in common
        hint = "backups go on; check the URL, and who answers there"
        raise TransientError(f"cannot reach HEARTBEAT_URL: {reason(error)}", hint) from None


def copy_version(copy_directory: str, file: Path, version: Version) -> None:
    """Keep a version in COPY_DIRECTORY too, unless the newest there holds it; overwrite nothing.

    It makes no directory: a stick that is not mounted is noticed. Raises BackupError. May hang.
    """
    try:
        if is_lnds(Path(copy_directory), file) or os.path.lexists(f"{copy_directory}/.lock"):
            raise OSError(errno.EPERM, "it is a directory of LND's, or a staging directory")
        with opened(Path(copy_directory)) as directory:
            names = sorted(filter(captured_at, os.listdir(directory)))
            for name in {version.name, *names[-1:]}.intersection(names):
                with suppress(OSError):  # one that cannot be read is no copy
                    if read_file(name, directory)[0] == version.data:
                        return  # it is the newest, or stands below one with a later name
            write_file(directory, *version, mode=0o640, new=True)
    except OSError as error:
        what = f"cannot copy to COPY_DIRECTORY: {copy_directory}: {error.strerror}"
        raise BackupError(what, "is it mounted, writable, and not full?") from None


# --- 7. Reading the bucket: list and get ----------------------------------------------------------
# For `check`, `list` and `restore`, with a key that may read. The newest is decided by the earlier
# of the time in the name and S3's own, so that neither a clock that ran ahead nor a thief decides.
DROP = "smaller than the one below: restore that, too"


class StoredVersion(NamedTuple):
    """A version as the bucket lists it; times in UTC, `stored_at` by S3's clock."""

    name: str
    key: str
    size_bytes: int
    captured_at: datetime
    stored_at: datetime
    marks: tuple[str, ...] = ()  # what deserves a look

    def counts_from(self) -> datetime:
        """Return the earlier of capture and storing, whose time S3 may have cut to the second."""
        return min(self.captured_at, self.stored_at + timedelta(microseconds=999_999))

    def marked(self, older: StoredVersion | None) -> StoredVersion:
        """Return it with its marks, beside the version before it."""
        marks = []
        if self.size_bytes == EMPTY_BYTES:
            marks.append("no channels")
        if older and self.size_bytes <= older.size_bytes - DROP_BYTES:
            marks.append(DROP)
        if self.captured_at > self.counts_from() + timedelta(minutes=1):
            marks.append("named later than stored")
        return self._replace(marks=tuple(marks))


def list_versions(bucket: Bucket) -> tuple[list[StoredVersion], int, list[str]]:
    """Return versions, newest first, the number of other keys, and folders; raises BackupError."""
    versions, unusable, others, folders = [], 0, 0, []
    for page in list_pages(bucket):
        folders += [str(each.get("Prefix")) for each in page.get("CommonPrefixes", [])]
        for entry in page.get("Contents", []):
            key = str(entry.get("Key"))
            name = key.removeprefix(bucket.prefix)
            captured = captured_at(name)
            if captured is None or key != bucket.prefix + name:
                others += 1
                continue
            with suppress(KeyError, ValueError, OverflowError):  # no field, no such time
                at = datetime.fromisoformat(entry["LastModified"]).astimezone(UTC)
                version = StoredVersion(name, key, int(entry["Size"]), captured, at)
                if version.size_bytes >= EMPTY_BYTES:
                    versions.append((version.counts_from(), version))
                    continue
            unusable += 1
    if unusable:
        log.warning("left out: versions with an impossible size or time: %d", unusable)
    ordered = [version for _, version in sorted(versions, reverse=True)]
    pairs = zip_longest(ordered, ordered[1:])
    return [version.marked(older) for version, older in pairs], others + len(folders), folders


def list_pages(bucket: Bucket) -> Iterator[dict[str, Any]]:
    """Yield what S3 tells of the keys under the prefix, page by page; raises BackupError."""
    what = f"cannot list: s3://{bucket.name}/{bucket.prefix}"
    request = {"Bucket": bucket.name, "Prefix": bucket.prefix, "Delimiter": "/"}
    tokens = {""}
    for _ in range(PAGES_MAX):
        with explained(what), alarm(ONE_SHOT_SECONDS):
            page = bucket.connect().list_objects_v2(**request)
        if page.keys().isdisjoint(("IsTruncated", "Contents", "CommonPrefixes")):
            raise TransientError(f"{what}: the answer is not S3's", SOMETHING_BETWEEN)
        yield page
        token = page.get("NextContinuationToken", "")
        if not token and not page.get("IsTruncated"):
            return
        if token in tokens:
            break
        tokens.add(token)
        request["ContinuationToken"] = token
    log.warning("%s: the list has no proper end; what S3 has listed is used", what)


def get_version(bucket: Bucket, key: str, seconds: float = ONE_SHOT_SECONDS) -> bytes:
    """Return the bytes of a version; raises BackupError, DamagedError if they are others."""
    what = f"cannot use s3://{bucket.name}/{key}"
    with explained(what), alarm(seconds):
        answer = bucket.connect().get_object(Bucket=bucket.name, Key=key)
        data: bytes = answer["Body"].read()
    given = answer.get("Metadata", {}).items()
    wanted = {name.lower(): value.lower() for name, value in given}.get("sha256", "")
    sha256 = sha256_of(data)
    is_whole = len(data) >= EMPTY_BYTES and key.endswith(sha256[-6:])
    if not is_whole or wanted not in ("", sha256):
        if not answer.get("ETag"):
            raise TransientError(f"{what}: the answer is not S3's", SOMETHING_BETWEEN)
        raise DamagedError(f"{what}: damaged: its bytes are not those of its name and metadata")
    if not wanted:
        log.warning("no SHA-256 in the metadata, only the six digits were checked: %s", key)
    return data


# --- 8. The commands ------------------------------------------------------------------------------
# `run` and `once` are the loop. The others only read, take no lock, and give up within a minute.


def command_run(_: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Watch and back up until stopped."""
    with suppress(OSError):  # a log that nobody reads must not hold up a backup
        os.set_blocking(2, os.isatty(2))  # by number: Python knows no stderr that was closed
    file = settings.file
    log.info("watching %s, staging in %s", file, settings.staging)
    if os.path.islink(file):
        log.warning("%s is a link: no event comes from its target, only rescans see changes", file)
    for path in (file.parent / "admin.macaroon", file.parent / "wallet.db"):
        if os.access(path, os.R_OK):
            log.warning("this user can read %s: docs/access.md shows how to avoid this", path)
    daemon = Daemon(settings, bucket)
    asyncio.run(daemon.run())
    log.info("stopped; staged for the next start: %d", len(daemon.staging.pending))
    return EXIT_DONE


def command_once(_: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Back up what is on disk and what is staged."""
    daemon = Daemon(settings, bucket)
    daemon.stop.set()
    asyncio.run(daemon.run())
    error = daemon.reading.error
    if daemon.list_at == 0.0:  # what waits in the staging directory was not all seen
        error = error or daemon.disk.error
    if daemon.is_waiting():
        error = error or daemon.storing.error or TransientError("S3 is too slow")
        why = "" if daemon.storing.error else ": S3 or the source of credentials does not answer"
        count = len(daemon.staging.pending) + (daemon.unstaged is not None)
        log.error("not sent, and still waiting: %d%s", count, why)
    return error.exit_code if error else EXIT_DONE


class TimeIsUpError(BaseException):
    """The alarm of a one-shot: no Exception, so that no library takes it for one of its own."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Interrupt what is `explained` around it after so many seconds; it rings until it is heard."""

    def on_alarm(*_: object) -> None:
        raise TimeIsUpError("no answer in time")

    signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Verdict(NamedTuple):
    """What `check` found out. `current`: None if nobody could tell. `proof`: bucket or receipt."""

    current: bool | None
    proof: str
    version: StoredVersion | Receipt | None
    reason: str


def check_bucket(bucket: Bucket, data: bytes) -> Verdict:
    """Judge by the objects whether the bucket holds these bytes; raises BackupError."""
    versions = list_versions(bucket)[0]
    why = "the bucket does not hold the version on disk"
    for version in versions:
        try:
            is_candidate = version.name.endswith(sha256_of(data)[-6:])
            if is_candidate and get_version(bucket, version.key) == data:
                newer = f", but {versions[0].key} is newer" if version != versions[0] else ""
                why = f"the bucket holds the version on disk{newer}"
                return Verdict(True, "bucket", version, why)
        except DamagedError as error:
            why = str(error)
    return Verdict(False, "bucket", versions[0] if versions else None, why)


def check_receipt(settings: Settings, bucket: Bucket, data: bytes) -> Verdict:
    """Judge by the last receipt, and by how long LND's file has been waiting."""
    if os.path.isdir(settings.staging) and not os.access(settings.staging, os.R_OK | os.X_OK):
        return Verdict(None, "receipt", None, "this user can read no receipt in BACKUP_DIRECTORY")
    receipt = read_receipt(settings.staging)
    place = bucket.place or f"/{bucket.name}"  # without credentials, no endpoint was settled on
    limit = 2 * settings.refresh_seconds
    seconds = min(os.path.getmtime(settings.file), 2**35)  # a datetime ends with the year 9999
    written = datetime.fromtimestamp(seconds, UTC)
    why = f"the version on disk has been waiting since {written:%Y-%m-%d %H:%M} UTC"
    if receipt and receipt.bucket.endswith(place) and receipt.key == bucket.prefix + receipt.name:
        stored = f"{receipt.stored_at[:16]} UTC"
        if receipt.sha256 == sha256_of(data) and receipt.is_proof(limit):
            why = f"S3 confirmed it at {stored}; this key cannot read the bucket to compare it"
            return Verdict(True, "receipt", receipt, why)
        if limit and receipt.age_seconds() > limit:
            return Verdict(False, "receipt", receipt, f"nothing was stored since {stored}")
    else:
        receipt, why = None, f"{why}, and BACKUP_DIRECTORY has no receipt of this bucket"
    is_late = abs(time.time() - seconds) > LATE_SECONDS  # a time to come tells nothing
    return Verdict(False if is_late else None, "receipt", receipt, why)


def judge(settings: Settings, bucket: Bucket, data: bytes) -> Verdict:
    """Judge by the bucket, or by the receipt where S3 does not tell; raises BackupError."""
    try:
        return check_bucket(bucket, data)
    except AccessDeniedError:
        return check_receipt(settings, bucket, data)
    except BackupError as error:
        verdict = check_receipt(settings, bucket, data)
        if verdict.current is not False:
            raise
        error.log()
        return verdict._replace(reason=f"{verdict.reason}; {error}")


def command_check(options: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Print the verdict on the version on disk, and why, for somebody who is woken by it."""
    try:
        verdict = judge(settings, bucket, read_channel_backup(settings.file))
        code = {True: EXIT_DONE, False: EXIT_FAILED, None: EXIT_TRY_AGAIN}[verdict.current]
    except BackupError as error:
        error.log()
        verdict = Verdict(None, "receipt", None, str(error))
        code = error.exit_code
    staged = key = captured = stored = None
    with suppress(OSError):
        staged = len(list(filter(captured_at, os.listdir(settings.staging))))
    if version := verdict.version:
        key, stored, captured = version.key, version.stored_at, captured_at(version.name)
    if options.json:
        answer: dict[str, Any] = {"current": verdict.current, "proof": verdict.proof, "key": key}
        answer |= {"captured_at": captured, "stored_at": stored, "staged": staged}
        answer["reason"] = printable(verdict.reason)
        print(json.dumps(answer, default=datetime.isoformat))
    else:
        word = {True: "BACKED UP", False: "NOT BACKED UP", None: "UNKNOWN"}[verdict.current]
        known = f"; newest version, by the {verdict.proof}: {key}" if key else ""
        print(printable(f"{word}: {verdict.reason}{known}"))
    return code


def command_list(options: argparse.Namespace, _: Settings, bucket: Bucket) -> int:
    """Print the versions in the bucket, newest first: as a table, or as JSON."""
    versions, others, folders = list_versions(bucket)
    if not versions and bucket.prefix:  # is the prefix the wrong one?
        with suppress(BackupError), explained("cannot list"), alarm(TELLING_SECONDS):
            page = bucket.connect().list_objects_v2(Bucket=bucket.name, Delimiter="/")
            folders += [str(each.get("Prefix")) for each in page.get("CommonPrefixes", [])]
    if options.json:
        answer = [each._asdict() | {"empty": each.size_bytes == EMPTY_BYTES} for each in versions]
        print(json.dumps(answer, indent=1, default=datetime.isoformat))
    else:
        print(f"{'captured (UTC) and name':30} {'bytes':>11}  stored (UTC)")
        for version in versions:
            cells = f"{version.size_bytes:>11,}  {version.stored_at:%Y-%m-%d %H:%M:%S}"
            print(f"{version.name} {cells}  {', '.join(version.marks)}".rstrip())
    hint = ""
    if not versions:
        hint = f"is the prefix right? folders here: {', '.join(folders[:20]) or 'none'}"
    told = "versions in s3://%s/%s: %d; other keys, not shown: %d"
    log.info(told, bucket.name, bucket.prefix, len(versions), others, extra={"hint": hint})
    return EXIT_DONE


def restore_line(options: argparse.Namespace, *which: str) -> str:
    """Return the command line that restores another version."""
    env_file = ["--env-file", os.path.abspath(options.env_file)] if options.env_file else []
    return shlex.join([sys.executable, os.path.abspath(sys.argv[0]), *env_file, "restore", *which])


def choose_versions(bucket: Bucket, options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """Return the key asked for; or the newest version with channels and the last before each drop.

    Each comes with the version before it and the command line for that, if there is one. A channel
    leaves the file when its closing confirms, maybe before its money is swept. Raises BackupError.
    """
    if options.key is not None:
        name = options.key.rpartition("/")[2]
        key = (bucket.prefix if captured_at(options.key) else "") + options.key
        line = restore_line(options, "--before", name)
        return {key: ("this", line if captured_at(name) else "")}
    what = f"cannot restore: s3://{bucket.name}/{bucket.prefix}"
    versions = list_versions(bucket)[0]
    earlier = ""
    if limit := options.before:
        earlier = f" before {limit.isoformat()}"
        named = [version.captured_at for version in versions]
        if limit in named:  # a version's name was given: S3's time may have decided its place
            versions = versions[named.index(limit) + 1 :]
        versions = [version for version in versions if version.counts_from() < limit]
    full = [version for version in versions if version.size_bytes > EMPTY_BYTES]
    if not versions:
        hint = "`list` shows which versions and which folders there are"
        raise BackupError(f"{what}: there is no version{earlier}", hint)
    if not full:
        line = restore_line(options, "--key", versions[0].key)
        hint = f"to restore it all the same: {line} --output {shlex.quote(options.output)}"
        raise BackupError(f"{what}: no version{earlier} holds channels", hint)
    while versions[0] != full[0]:
        empty = versions.pop(0).key
        log.warning("skipped %s: no channels; LND writes such a file in a recovery", empty)
    log.info("chosen: %s, the newest version%s that holds channels", full[0].key, earlier)
    drops = [versions[i + 1] for i, version in enumerate(versions) if DROP in version.marks]
    if drops[3:]:
        log.warning("more drops than three: `list` marks them, and docs/recovery.md says more")
    chosen = {each.key: ("", "") for each in [full[0], *drops[:3]]}
    for each, older in pairwise(full):
        if each.key in chosen:
            line = restore_line(options, "--before", each.name)
            chosen[each.key] = (older.key, line)
    return chosen


NEXT_STEPS = """next, as the user that runs LND, with the wallet of the same 24 words (if it has
none yet: lncli create, and wait), run all of these lines in this order:
{}
if LND refuses the first file, get the version before it:
  {}
never start an old channel.db, never run two nodes of one seed, and never use chantools
scbforceclose with a version that is not the latest: each can cost the money in the channels.
More: docs/recovery.md"""
ELSEWHERE = "name a new file with --output, in a directory that is there, on a disk with room"


def command_restore(options: argparse.Namespace, settings: Settings, bucket: Bucket) -> int:
    """Download versions, verify them, write each to a new file, and print what to do with them."""
    output = Path(os.path.abspath(options.output))
    paths = [Path(f"{output}{end}") for end in ("", ".2", ".3", ".4")]
    if is_lnds(output.parent, settings.file):
        hint = "write it elsewhere: a wrong file there keeps LND from starting"
        raise BackupError(f"cannot restore: {output}: it is in a directory of LND's", hint)
    if os.path.lexists(output) or not output.parent.is_dir():
        raise BackupError(f"cannot restore: {output}: it exists, or has no directory", ELSEWHERE)
    chosen = choose_versions(bucket, options)
    told, faults = {}, []
    seconds = ONE_SHOT_SECONDS
    for path, (key, before) in zip(paths, chosen.items(), strict=False):
        try:
            told[path] = restore_one(bucket, key, path, seconds, *before)
        except BackupError as error:
            if path == output:
                raise
            faults.append((path, error))
        seconds = ONE_SHOT_SECONDS / 4  # the others do not keep the first waiting
    steps = "  lncli verifychanbackup --multi_file {0}\n  lncli restorechanbackup --multi_file {0}"
    lines = "\n".join(steps.format(shlex.quote(str(file))) for file in told)
    line = "(there is no version before it)"
    if before_first := next(iter(chosen.values()))[1]:
        line = f"{before_first} --output {shlex.quote(options.output + '.before')}"
    for text in [*told.values(), *NEXT_STEPS.format(lines, line).splitlines()]:
        print(printable(text))
    for path, fault in faults:  # at the end, where they are not overlooked
        log.warning("left out: %s: %s", path, fault, extra={"hint": fault.hint})
    return EXIT_DONE


def restore_one(bucket: Bucket, key: str, path: Path, seconds: float, older: str, line: str) -> str:
    """Download a version, verify it, write it to a new file; return what tells of it."""
    try:
        data = get_version(bucket, key, seconds)
        with opened(path.parent) as directory:
            write_file(directory, path.name, data, new=True)
    except OSError as error:
        raise BackupError(f"cannot restore: {path}: {error.strerror}", ELSEWHERE) from None
    except BackupError as error:
        if line:
            line = f"{older} is the version before it: {line} --output {shlex.quote(str(path))}"
            error.hint = f"{error.hint}; {line}".removeprefix("; ")
        raise
    return f"restored {key} as {path}: {len(data)} bytes, SHA-256 {sha256_of(data)}"


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


class ConfigError(BackupError):
    """The configuration is wrong."""

    exit_code = EXIT_CONFIG


class TransientError(BackupError):
    """Trying again may help."""

    exit_code, level, retry_seconds_max = EXIT_TRY_AGAIN, logging.WARNING, 60.0


class Problem:
    """Something that is wrong for a while: its kind, and what works when it is over."""

    def __init__(self, kind: str, over: str) -> None:
        self.kind, self.over = kind, over
        self.count = 0
        self.began_at = self.logged_at = 0.0
        self.error: BackupError | None = None
        self.told: set[str] = set()  # the hints that were logged within the hour

    def seconds(self) -> float:
        """Return how long it has lasted."""
        return time.monotonic() - self.began_at

    def report(self, error: BackupError) -> None:
        """Note an error; log it if something else is to be done about it, or an hour has passed."""
        now, previous, self.error = time.monotonic(), self.error, error
        if previous is None:
            self.count, self.began_at = 0, now
        self.count += 1
        if previous is None or now - self.logged_at >= REMINDER_SECONDS:
            self.told, self.logged_at = set(), now
        if error.hint not in self.told:
            self.told.add(error.hint)
            times = f" ({self.count} times in {self.seconds():.0f} s)" if self.count > 1 else ""
            error.log(times, error.level)

    def resolve(self) -> None:
        """Note that it works."""
        if self.error:
            self.error = None
            log.info("%s again, after %.0f s (failures: %d)", self.over, self.seconds(), self.count)


FAULT = "a fault of this program, please report it"
SOMETHING_BETWEEN = "something answers in S3's place: a captive portal, a proxy, a wrong endpoint?"
NETWORK = "check the network and the endpoint (scheme, host, port); staged versions are kept"
CHECK_SDK = "check AWS_PROFILE, AWS_REGION, the endpoint, and the SDK's files (AWS_CONFIG_FILE)"
CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_PROFILE, and the file, program, role or login behind it"
SET_CLOCK = "set the clock, for example by NTP: S3 compares it with its own"
READER = "the node's own key is not meant to read: use the reader's key, or check bucket and prefix"
HINTS = {  # what to do about S3's codes and statuses; for any other, S3's own words have to do
    "clean up or raise the quota": "QuotaExceeded XMinioStorageFull XMinioAdminBucketQuotaExceeded",
    SET_CLOCK: "RequestTimeTooSkewed RequestExpired",
    NETWORK: """RequestTimeout BadDigest XAmzContentSHA256Mismatch Throttling ThrottlingException
        408 409 429 500 502 503 504 507 509""",
    "check the access key and its secret, or AWS_PROFILE; changed files are read again": """
        InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken TokenRefreshRequired""",
    "check the bucket's name, the prefix and the endpoint": "NoSuchBucket InvalidBucketName",
    "`list` shows which versions there are": "NoSuchKey",
    "set AWS_REGION to the bucket's region": """
        PermanentRedirect AuthorizationHeaderMalformed IllegalLocationConstraintException""",
}


@contextmanager
def explained(what: str, denied: str = READER) -> Iterator[None]:
    """Turn whatever the SDK raises into a BackupError; `denied`: what to do if denied."""
    try:
        yield
    except BackupError:
        raise
    except (Exception, TimeIsUpError) as error:
        raise classify_s3_error(what, error, denied) from None


def classify_s3_error(what: str, error: BaseException, denied: str = "") -> BackupError:
    """Return an error of the SDK as the kind that says whether trying again helps, with a hint."""
    message = f"{what}: {reason(error)}"
    if "CERTIFICATE_VERIFY_FAILED" in message or "hostname '" in message:
        if "not yet valid" in message or "expired" in message:
            return TransientError(message, f"renew the certificate; or {SET_CLOCK}")
        return BackupError(message, "check AWS_CA_BUNDLE, and the name in the endpoint")
    is_network = type(error).__module__.startswith("urllib3")  # while an answer was read
    if is_network or isinstance(error, (sdk.ConnectionError, sdk.HTTPClientError, TimeIsUpError)):
        return TransientError(message, NETWORK)
    if isinstance(error, sdk.ClientError):
        answered = classify_answer(what, error.response, denied)
        if denied != CREDENTIALS or isinstance(answered, TransientError):
            return answered
    if denied in (CREDENTIALS, CHECK_SDK):
        return BackupError(message, denied)
    if isinstance(error, sdk.BotoCoreError):
        return BackupError(message, CHECK_SDK)
    return TransientError(message, SOMETHING_BETWEEN)


def classify_answer(what: str, response: Mapping[str, Any], denied: str) -> BackupError:
    """Return an error that was answered: S3's own code and words decide."""
    error = response.get("Error", {})
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = str(error.get("Code") or "")
    text = str(error.get("Message") or "")[:500]
    if re.search("Signature (expired|not yet current)", text):  # STS has no code of its own
        code = "RequestExpired"
    words = ": ".join(filter(None, (code[:100], text))) or "no explanation"
    message = f"{what}: {words} (HTTP {status})"
    if code == "AccessDenied":
        named = re.search(r"not authorized to perform: ([\w:]+)", text)
        hint = f"if key, bucket and prefix are right, add to the key's policy: {denied}"
        if denied == READER:
            hint = READER
            if "kms:" in text:
                hint = "the reader's key needs the action of KMS that S3 names, too"
        elif "explicit deny" in text:
            hint = "a policy denies it explicitly, against which no Allow helps: find that Deny"
        elif named and named[1] not in denied:
            hint = f"S3 names the action that is missing: allow {named[1]}"
        return AccessDeniedError(message, hint)
    if code in ("", str(status)):
        return TransientError(message, SOMETHING_BETWEEN)
    for hint, codes in HINTS.items():
        if not {code, str(status)}.isdisjoint(codes.split()):
            kind = TransientError if hint in (SET_CLOCK, NETWORK) else BackupError
            return kind(message, hint)
    return BackupError(message, "these are S3's own words; if they do not help, ask the provider")


def node_error(what: str, error: OSError) -> BackupError:
    """Return what the system refused on LND's side, with what to do."""
    hints = {
        errno.ENOENT: "LND writes it when its wallet is unlocked and the chain in sync",
        errno.EAGAIN: "it is read again in a moment",
        errno.EACCES: "this user needs r on the file, r and x on its directory, and x above it",
        errno.ENOSPC: "raise the limit: sysctl fs.inotify.max_user_watches",
        errno.EMFILE: "raise the limit: sysctl fs.inotify.max_user_instances, or of open files",
    }
    kind = TransientError if error.errno == errno.EAGAIN else BackupError
    found = kind(f"{what}: {error.strerror}", hints.get(error.errno or 0, "check the path"))
    if error.errno == errno.ENOENT:
        found.level = logging.WARNING
    return found


def reason(error: BaseException) -> str:
    """Return what an error says, in one line, with the cause that botocore may keep to itself."""
    text = " ".join(str(error)[:1000].split()) or type(error).__name__
    cause = str(getattr(error, "kwargs", {}).get("error", "")).rpartition(": ")[2]
    is_known = cause in text or " at 0x" in cause  # or names an object of Python's
    return text if is_known else f"{text} ({cause})"


log = logging.getLogger("lnd-backup")
SECRETS: set[str] = set()


def keep_secret(*secrets: str | None) -> None:
    """Let these never appear in a log line, a status or a table; a short one would mask words."""
    parts = "\n".join(filter(None, secrets)).splitlines()  # a line break is told as an escape
    SECRETS.update(part for part in parts if len(part) >= len("password"))


def printable(text: object) -> str:
    """Escape what came from outside, so that it forges no line, moves no cursor; mask secrets."""
    line = ""
    for letter in str(text):
        line += letter if letter.isprintable() else letter.encode("unicode_escape").decode()
    for secret in sorted(SECRETS, key=len, reverse=True):  # one may begin another
        line = line.replace(secret, "***")
    return re.sub(r"(?i)(https?:|socks\w*:|proxy |\*:)//\S*@", r"\1//***@", line)  # a URL's user


class LineFormatter(logging.Formatter):
    """One line for a fact and one for its hint; priorities for journald, times for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines, each with its prefix: journald takes a bare one as information."""
        lines, level = [record.getMessage()], record.levelno
        if hint := getattr(record, "hint", ""):
            lines.append(f"hint: {hint}")
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        stderr = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
            prefix = {50: "<2>", 40: "<3>", 30: "<4>"}.get(level, "<6>")  # see syslog(3)
        else:
            prefix = self.formatTime(record, "%Y-%m-%d %H:%M:%S ")
            prefix += f"{record.levelname.lower()}: " if level > logging.INFO else ""
        return "\n".join(prefix + printable(line) for line in lines)


# --- 10. Settings: environment variables, judged before anything is written or connected ----------
# All faults are found at once. The SDK's settings are the SDK's to judge; we look at what it has
# settled on where that would go wrong late, or never.


class Settings(NamedTuple):
    """The configuration; times in seconds. The fields stand in the order of SETTINGS."""

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


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # lone surrogates are no text
PATH, SECONDS = "/.+", r"[0-9]{1,9}(\.[0-9]{1,6})?"
URL = r"https?://(\[[^]\s]+\]|[^\s/@:]+)(:[0-9]{1,5})?([/?][!-~]*)?"
SETTINGS = {  # default (None: required), pattern, advice
    "MONITOR_FILE_PATH": (None, PATH, "write the absolute path of LND's channel.backup"),
    "BACKUP_DIRECTORY": (None, PATH, "write an absolute path, such as /var/lib/lnd-backup"),
    "S3_BUCKET_NAME": (None, r"[A-Za-z0-9_.-]{3,255}|arn:(?!.*:::).+:s3.+", "write the name alone"),
    "S3_BACKUP_PREFIX": ("", "[^/].{0,240}", "write it like node1/ or a/b/, 240 letters at most"),
    "RESCAN_SECONDS": ("60", f"(?=.*[1-9]){SECONDS}", "write a number of seconds above 0"),
    "REFRESH_SECONDS": ("86400", SECONDS, "write a number of seconds; 0 turns it off"),
    "SHUTDOWN_GRACE_SECONDS": ("10", SECONDS, "write a number of seconds, 0 or more"),
    "METRICS_FILE": ("", PATH, "write the absolute path of a file"),
    "HEARTBEAT_URL": ("", URL, "write a whole URL: https://HOST/…"),
    "COPY_DIRECTORY": ("", PATH, "write the absolute path of a directory that is there"),
    "S3_PUT_EXTRA_ARGS": ("", r"(\w+=[^,]+(,|$))+", "write it like NAME=VALUE,NAME=VALUE"),
}
PLAIN_LINE = re.compile(
    r"""( \#(.*[^\\])? | (?!export)[A-Za-z_][A-Za-z_0-9]*\ *=\ *  # a comment; a name, a value:
    ( "[^"\\]*" | '[^'\\]*' | (?!.*\s\#)[^\s"'\\#][^"'\\]*(?<!\s) )? )?""",
    re.VERBOSE,
)
SDK_NAMES = """AWS_ACCESS_KEY_ID AWS_ACCOUNT_ID AWS_CONTAINER_AUTHORIZATION_TOKEN
    AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE AWS_CONTAINER_CREDENTIALS_FULL_URI
    AWS_CONTAINER_CREDENTIALS_RELATIVE_URI AWS_CREDENTIAL_EXPIRATION AWS_EC2_METADATA_DISABLED
    AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_ENDPOINT_URL_SSO AWS_ENDPOINT_URL_SSO_OIDC
    AWS_ENDPOINT_URL_STS AWS_REGION AWS_ROLE_ARN AWS_ROLE_SESSION_NAME AWS_S3_USE_ARN_REGION
    AWS_SECRET_ACCESS_KEY AWS_SECURITY_TOKEN AWS_SESSION_TOKEN AWS_WEB_IDENTITY_TOKEN_FILE
    HTTPS_PROXY HTTP_PROXY NO_PROXY REQUESTS_CA_BUNDLE SSL_CERT_DIR SSL_CERT_FILE STATE_DIRECTORY TZ
    http_proxy https_proxy no_proxy"""


def load_settings(environ: Mapping[str, str], command: str) -> Settings:
    """Return the settings that a command needs; raises an ExceptionGroup of all ConfigErrors."""
    needed = set(SETTINGS)
    if command in ("list", "restore"):
        needed = {"S3_BUCKET_NAME", "S3_BACKUP_PREFIX"}
    elif command == "check":  # another user may run it
        needed -= {"BACKUP_DIRECTORY", "METRICS_FILE", "COPY_DIRECTORY"}
    values, faults = {}, []
    for name, (default, pattern, _) in SETTINGS.items():
        given = environ.get(name) if name in needed or pattern == PATH else ""
        values[name] = given or default or ""
    if not values["BACKUP_DIRECTORY"]:
        values["BACKUP_DIRECTORY"] = environ.get("STATE_DIRECTORY", "").split(":")[0]
    for name in SETTINGS:
        if name in needed and (fault := setting_fault(name, values)):
            faults.append(fault)
            values[name] = ""  # the others are not judged beside a wrong one
    faults += sdk_faults(environ, values["S3_BUCKET_NAME"], values["S3_PUT_EXTRA_ARGS"])
    if faults:
        raise ExceptionGroup("configuration", faults)
    scb, staging, bucket, prefix, rescan, refresh, grace, metrics, url, copy, more = values.values()
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    times = float(rescan), float(refresh), float(grace)
    arguments = dict(pair.split("=", 1) for pair in more.split(",") if pair)
    paths = Path(scb), Path(staging or os.devnull)
    return Settings(*paths, bucket, prefix, *times, metrics, url, copy, arguments)


def setting_fault(name: str, values: Mapping[str, str]) -> ConfigError | None:
    """Return what is wrong with one of our settings."""
    value, (default, pattern, advice) = values[name], SETTINGS[name]
    if not value:
        return config_error(name, value, "is not set", advice) if default is None else None
    if ":::" in value:  # an ARN, as policies name buckets
        advice = f"{advice}: {value.rpartition(':')[2].partition('/')[0]}"
    if CONTROL.search(value) or not re.fullmatch(pattern, value):
        return config_error(name, value, "cannot be used", advice)
    if pattern == PATH and (fault := path_fault(name, Path(value), values)):
        return config_error(name, value, *fault)
    return None


def warn_of_misspelt(names: Collection[str]) -> None:
    """Warn of a name that is no setting: in the --env-file, or close to one of ours."""
    known = {*SETTINGS, *SDK_NAMES.split()}
    for _, variables, *_ in BOTOCORE_DEFAUT_SESSION_VARIABLES.values():
        known |= set(variables if isinstance(variables, list) else [str(variables)])
    for name in sorted({*names, *os.environ} - known):
        is_near = difflib.get_close_matches(name.upper(), SETTINGS, 1, 0.8)
        if name in names or name.startswith("S3_") or is_near:
            close = difflib.get_close_matches(name.upper(), known, 1, 0.6)
            meant = f": did you mean {close[0]}?" if close else ""
            log.warning("%s is not a known setting%s", name, meant)


def config_error(name: str, value: str, why: str, hint: str) -> ConfigError:
    """Return what is wrong with a setting; its value is not told if it may be a secret."""
    is_secret = re.search("KEY|TOKEN|HEARTBEAT|SSECustomer", f"{name}={value}")
    return ConfigError(f"configuration: {name}={'***' if is_secret else value}: {why}", hint)


def is_lnds(directory: Path, file: Path) -> bool:
    """Tell whether LND keeps its data or the monitored file here, or in a directory above."""
    whole = Path(os.path.realpath(directory))
    homes: set[str] = set()
    names = [name for name in LND_FILES if os.path.lexists(whole / name)]  # if it cannot be listed
    with suppress(OSError):
        names = os.listdir(whole)
    if any(fnmatch(name, pattern) for name in names for pattern in LND_FILES):
        return True
    if os.path.isabs(file):
        homes = {os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file))} - {"/"}
    parents = (whole, *whole.parents)
    is_home = ".lnd" in whole.parts or not homes.isdisjoint(map(str, parents))
    return is_home or any(os.path.lexists(each / "lnd.conf") for each in parents)


def path_fault(name: str, path: Path, values: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what is wrong with a path, which may be made later, and what to do."""
    file = Path(values["MONITOR_FILE_PATH"])
    place = path.parent if name == "METRICS_FILE" else path
    run = f"sudo install -d -m 0700 -o {os.geteuid()} {shlex.quote(str(place))}"
    make = f"if nothing else uses it, run: {run}"
    if name == "METRICS_FILE":
        make = f"name a file in a directory that user {os.geteuid()} may write to"
    if name == "MONITOR_FILE_PATH":
        if is_forbidden(str(path)) or is_forbidden(os.path.realpath(path)):
            return "must never be copied", "name channel.backup: a stale database loses money"
        inside = f"name the file in it: {path / 'channel.backup'}"
        return ("is a directory", inside) if os.path.isdir(path) else None
    if name == "COPY_DIRECTORY":  # a mount may hang: only its path is judged here
        is_taken = path == Path(values["BACKUP_DIRECTORY"]) or path.is_relative_to(file.parent)
        return ("is LND's, or the staging directory", "name another one") if is_taken else None
    if is_lnds(place, file):
        return "is in a directory of LND's", "name another one: LND's directories are only read"
    if name == "METRICS_FILE" or not os.path.lexists(path):
        can_make = os.access(path.parent, os.W_OK | os.X_OK) and not os.path.isdir(path)
        return None if can_make else ("cannot be made", make)
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return "is a link or no directory", f"name another, or move it away; {make}"
    if status.st_uid != os.geteuid():
        hint = f"name a directory inside it, which is made then: {path / 'lnd-backup'}"
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}", hint
    if status.st_mode & 0o022 or ~status.st_mode & 0o700:
        return "must be writable by its owner and nobody else", make
    return None


def sdk_faults(environ: Mapping[str, str], bucket: str, arguments: str) -> list[ConfigError]:
    """Return what is wrong with the SDK's settings, as far as it shows without a connection."""
    faults = []
    for name, value in environ.items():
        is_sdks = name.startswith("AWS_") or name.lower().endswith("_proxy")
        is_key = name.endswith(("ACCESS_KEY", "KEY_ID", "SESSION_TOKEN"))
        if is_sdks and (CONTROL.search(value) or (is_key and not re.fullmatch("[!-~]+", value))):
            faults.append(config_error(name, value, "has a blank or a line break", "remove it"))
    if faults:
        return faults
    bundle = ""
    try:
        session = new_session()
        client = new_client(session, aws_access_key_id="-", aws_secret_access_key="-")
        url = urlsplit(client.meta.endpoint_url)
        if not re.fullmatch(r"https?://(.*@)?(\[.+\]|[^/:]+)(:[0-9]+)?(/.*)?", url.geturl()):
            raise ValueError(f"{url.geturl()} is no URL of http or https")
        if bundle := session._session.get_config_variable("ca_bundle") or "":
            ssl.create_default_context(cafile=bundle)
    except Exception as error:
        what = f"configuration: AWS SDK{bundle and f': AWS_CA_BUNDLE={bundle}'}: {reason(error)}"
        return [ConfigError(what, CHECK_SDK)]
    members = client.meta.service_model.operation_model("PutObject").input_shape.members
    known = {name for name, shape in members.items() if shape.type_name == "string"}
    known -= {"Bucket", "Key", "ContentMD5", "ChecksumSHA256", "ChecksumAlgorithm"}
    # The same version twice has to be the same object, and `restore` has no key for it.
    known -= {"IfMatch", "IfNoneMatch", "SSECustomerKey", "SSECustomerAlgorithm"}
    for name in set(re.findall(r"(?:^|,)(\w+)=", arguments)) - known:
        what = f"configuration: S3_PUT_EXTRA_ARGS: {name}: cannot be used"
        faults.append(ConfigError(what, "write text arguments of put_object, with their case"))
    if bucket and Path(url.path).name == bucket:
        what = f"configuration: endpoint {url.geturl()}: ends with the bucket's name"
        faults.append(ConfigError(what, "leave the bucket's name out"))
    if str(url.hostname).startswith(f"{bucket}."):
        log.warning("the endpoint %s begins with the bucket's name: leave it out", url.geturl())
    return faults


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings of an --env-file; raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise ConfigError(f"cannot read --env-file: {path}: {why}", "check it") from None
    lines = [line.replace("\t", " ").strip(" ") for line in text.replace("\r\n", "\n").split("\n")]
    plain = [PLAIN_LINE.fullmatch(line) and not CONTROL.search(line) for line in lines]
    if wrong := [str(n) for n, is_plain in enumerate(plain, 1) if not is_plain]:
        hint = "write KEY=value: systemd reads export, quotes, \\ and # behind a value differently"
        raise ConfigError(f"cannot read --env-file: {path}: line {', '.join(wrong)}", hint)
    values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value or "" for name, value in values.items()}


# --- 11. The command line -------------------------------------------------------------------------
COMMANDS = {
    "run": (command_run, "watch and back up until stopped; the default when no command is given"),
    "once": (command_once, "back up the current version and whatever is still staged, then exit"),
    "check": (command_check, "is the version on disk now in the bucket, byte for byte?"),
    "list": (command_list, "the versions in the bucket, newest first"),
    "restore": (command_restore, "download one version, verify it, write it to a file"),
}


def point_in_time(text: str) -> datetime:
    """Parse ISO 8601, local without an offset; or the time of capture in a version's name."""
    try:
        return captured_at(text) or datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        example = "write it like 2026-11-20, 2026-11-20T18:00:00+01:00, or a version's name"
        raise argparse.ArgumentTypeError(example) from None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    prog = "s3_backup_lnd_channels.py"
    common = argparse.ArgumentParser(add_help=False)
    env_file = common.add_argument("--env-file", metavar="FILE", type=Path)
    env_file.default = argparse.SUPPRESS
    env_file.help = "read settings; the environment wins"
    options: dict[str, Any] = {"allow_abbrev": False, "parents": [common]}
    codes = "Exit codes: 0 done, 1 failed, 2 wrong usage, 75 try again, 78 wrong configuration."
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog, description=about, epilog=codes, **options)
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, **options)
        if name in ("check", "list"):
            command.add_argument("--json", action="store_true", help="print JSON, for scripts")
    restore = commands.choices["restore"]
    which, name = restore.add_mutually_exclusive_group(), "channel.backup"
    which.add_argument("--key", help="this version: a whole key, or the name alone")
    which.add_argument("--before", metavar="TIME", type=point_in_time, help="the newest before it")
    restore.add_argument("--output", metavar="FILE", default=name, help=f"default: {name}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; nothing that a user can cause ends in a traceback."""
    options = build_parser().parse_args(arguments)
    if MISSING:
        make = "python3 -m venv venv && venv/bin/pip install --require-hashes -r requirements.txt"
        sys.stderr.write(f"cannot start: {MISSING}\nhint: with Python 3.11 or newer, run: {make}\n")
        return EXIT_CONFIG
    prepare_output()
    command = options.command or "run"
    options.env_file = getattr(options, "env_file", None)
    try:
        prepare_environment(read_env_file(options.env_file) if options.env_file else {})
        settings = load_settings(os.environ, command)
        bucket = Bucket(settings.bucket, settings.prefix, settings.put_arguments)
        code = COMMANDS[command][0](options, settings, bucket)
        with suppress(BrokenPipeError):  # nobody reads, but the verdict stands
            print(end="", flush=True)
    except BackupError as error:
        error.log()
        return error.exit_code
    except ExceptionGroup as faults:
        for fault in faults.exceptions:
            fault.log()  # type: ignore[union-attr]
        return EXIT_CONFIG
    except BrokenPipeError:  # list | head
        return EXIT_DONE
    except OSError as error:
        BackupError(f"cannot go on: {error}", "check the disk, the permissions, the limits").log()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        log.critical(FAULT, exc_info=True)
    else:
        return code
    return EXIT_FAILED


def prepare_output() -> None:
    """Let the log go to stderr, and nothing that is printed end in a traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.root.handlers = [handler]
    log.setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may be unable to encode a path
        sys.stdout.reconfigure(errors="backslashreplace", write_through=False)
    logging.raiseExceptions = False  # a full disk behind stderr is no reason for tracebacks
    logging.root.setLevel(logging.CRITICAL)  # what libraries log is all explained here


def prepare_environment(more: Mapping[str, str]) -> None:
    """Add settings to the environment, learn the secrets, and hold the SDK's sources to limits."""
    for name, value in (more | os.environ).items():
        os.environ[name] = value
        if name.startswith("AWS_") and not value:
            del os.environ[name]  # the SDK would look for a profile, a region of no name
        if name.endswith(("SECRET_ACCESS_KEY", "TOKEN", "HEARTBEAT_URL")):
            path = value.partition("://")[2].partition("/")[2]
            keep_secret(value, *re.findall("[^/?&=]{10,}", path))  # a part of it may be echoed
        if "@" in value and (name.lower().endswith("_proxy") or "ENDPOINT_URL" in name):
            user = value.rpartition("@")[0].rpartition("://")[2]
            keep_secret(user, user.partition("/")[0])
    for codec in ("idna", "unicode_escape"):  # loaded now: a lookup that fails once fails for ever
        "a".encode(codec)
    warn_of_misspelt(more)
    sources.ProcessProvider = partial(sources.ProcessProvider, popen=start_program)
    sources.AssumeRoleProvider = partial(sources.AssumeRoleProvider, prompter=no_prompt)


if __name__ == "__main__":
    # Not by sys.exit: Python aborts if an attempt that was left behind writes to the log meanwhile.
    os._exit(main())
