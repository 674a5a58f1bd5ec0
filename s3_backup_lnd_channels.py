#!/usr/bin/env python3
"""Keep every version of LND's channel.backup in an S3 bucket.

LND replaces channel.backup (the static channel backup, SCB) by a rename whenever a channel opens or closes. This
program stages each version, sends it to S3, and deletes the staged copy only when S3 has proved by a receipt that it
holds those bytes. An event is only a bell: what counts is the file, looked at again at every event, every
RESCAN_SECONDS and before leaving. The staging directory is the queue and the only lasting state.

    channel.backup --look--> version --fsync, rename--> staging directory --put, newest first--> bucket
                                                               '<------ receipt, then delete -----'
reads     MONITOR_FILE_PATH, --env-file, the AWS SDK's own files; no other file is read unasked
writes    BACKUP_DIRECTORY; nothing is ever created, locked, renamed or touched in LND's directory
connects  the S3 endpoint and the SDK's configured source of credentials; nothing else
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import enum
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
import stat
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

try:
    import boto3.session
    import botocore.exceptions as sdk
    from asyncinotify import InitFlags, Inotify, Mask, Watch
    from botocore.config import Config
    from dotenv import dotenv_values
except ImportError as missing:  # started with another Python than the venv's: no traceback for that
    sys.stderr.write(f"cannot start: {missing}\nhint: use the Python of the venv that holds requirements.txt\n")
    sys.exit(78)

__version__ = "0.1.0"

DONE, FAILED, TRY_AGAIN, WRONG_CONFIGURATION = 0, 1, 75, 78  # exit codes, with argparse's 2 for wrong usage
EMPTY_SIZE_BYTES = 45  # no channels: nonce 24, version 1, count 4, tag 16 (LND chanbackup/multi.go)
ONE_CHANNEL_SIZE_BYTES = 416  # the smallest file with a channel (LND chanbackup/single.go, up to 0.21)
LARGEST_SIZE_BYTES = 64 << 20  # some 95,000 channels; what is larger is no channel backup
HELD_COUNT_MAX = 8  # versions kept in memory while the staging disk refuses them
ATTEMPT_SECONDS = 30.0  # an attempt is given up when the socket is silent for so long
ONE_SHOT_PATIENCE_SECONDS = 25.0  # no new attempt after that: with one that is given up, under a minute
STUCK_THREADS_MAX = 20  # attempts that were given up and hang all the same; no new one beside so many
BACKOFF_FIRST_SECONDS = 1.0
CONNECTION_IDLE_SECONDS = 5.0  # then it is closed: a NAT drops it in silence, and the next put would hang
JUST_NOW_SECONDS = 120.0  # for so long `check` says that LND has written, not that the bucket is behind
REMINDER_SECONDS = 3600.0  # how often a lasting trouble is said again


# --- Failures and log: what failed, on what, why, and what to do -----------------------------------------------------
class Cause(enum.Enum):
    """Why something failed: a one-shot's exit code, the longest pause in seconds between attempts, and what to do."""

    SETTINGS = WRONG_CONFIGURATION, 300.0, ""
    LOCKED = TRY_AGAIN, 60.0, "if it is the service, it backs up by itself: see its log"
    ABSENT = FAILED, 60.0, ""
    NETWORK = TRY_AGAIN, 60.0, "versions stay staged until it works again; if it does not pass, check what is named"
    CLOCK = TRY_AGAIN, 60.0, "set the clock (timedatectl; boards without a clock battery need NTP): S3 compares it"
    CREDENTIALS = FAILED, 300.0, "check the access key and its secret, or AWS_PROFILE; changed files are read again"
    DENIED = FAILED, 300.0, "add to the policy of this key: {permission}"
    BUCKET = FAILED, 300.0, "check the bucket's name, quota and region (AWS_REGION), the endpoint, AWS_CA_BUNDLE"
    OTHER = FAILED, 60.0, "see the message; it is tried again"

    def __init__(self, exit_code: int, pause_seconds: float, hint: str) -> None:
        self.exit_code, self.pause_seconds, self.hint = exit_code, pause_seconds, hint


class Failure(Exception):
    """What an operator can act on: one line `what failed: on what: why`, and a hint, which also tells kinds apart."""

    def __init__(self, cause: Cause, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.cause, self.hint = cause, hint or cause.hint


Result = TypeVar("Result")
log = logging.getLogger("lnd-backup")


def say(failure: Failure, suffix: str = "") -> None:
    """Log a failure and its hint; what passes by itself is a warning."""
    level = logging.WARNING if failure.cause in (Cause.ABSENT, Cause.NETWORK) else logging.ERROR
    log.log(level, "%s%s", failure, suffix, extra={"hint": failure.hint})


def shown(text: object) -> str:
    """Escape what came from outside: no control or format character can forge a line or move a cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class LineFormatter(logging.Formatter):
    """One escaped line per fact, its hint on a second; priorities for journald, times for people; secrets masked."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, each with a prefix of its own: journald files a bare line as plain information."""
        lines = [record.getMessage(), *(f"hint: {hint}" for hint in [getattr(record, "hint", "")] if hint)]
        lines += self.formatException(record.exc_info).splitlines() if record.exc_info else []
        error = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{error.st_dev}:{error.st_ino}":
            prefix = {logging.CRITICAL: "<2>", logging.ERROR: "<3>", logging.WARNING: "<4>"}.get(record.levelno, "<6>")
        else:
            prefix = self.formatTime(record, "%Y-%m-%d %H:%M:%S ")
            prefix += f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        text = "\n".join(prefix + shown(line) for line in lines)
        for secret in (value for name, value in os.environ.items() if SECRET_NAME.search(name) and value):
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)  # put there by a library
        return re.sub(r"(https?://)\S*@", r"\1***@", text)


class Trouble:
    """Something wrong for a while: logged when it begins or changes, hourly while it lasts, and when it is over."""

    def __init__(self, over: str) -> None:
        self.over, self.count, self.began_at, self.said_at = over, 0, 0.0, 0.0
        self.failure: Failure | None = None

    def begin(self, failure: Failure) -> Failure:
        """Note a failure, and return it."""
        now = time.monotonic()
        self.began_at, self.count = (self.began_at, self.count + 1) if self.failure else (now, 1)
        if not self.failure or self.failure.hint != failure.hint or now - self.said_at >= REMINDER_SECONDS:
            self.said_at = now
            say(failure, f" ({self.count} times in {now - self.began_at:.0f} s)" if self.count > 1 else "")
        self.failure = failure
        return failure

    def end(self) -> None:
        """Note that it works."""
        if self.failure:
            log.info("%s again, after %d failures in %.0f s", self.over, self.count, time.monotonic() - self.began_at)
            self.failure = None


# --- Settings: environment variables; all faults are found at once, and nothing is written or connected --------------
SECRET_NAME = re.compile("(SECRET_ACCESS_KEY|TOKEN|HEARTBEAT_URL)$")
SECONDS = r"[0-9]{1,9}(\.[0-9]{1,6})?"
HOST = r"([^\s/@]+@)?(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]+)?(/\S*)?"
BLANKS, URL = "copy it again, without blanks", "write a URL such as https://s3.example.org"
# Variable: default (None: required), pattern, what to do. Blanks, quotes, # and ${ would name another bucket: systemd
# and python-dotenv read them differently. The SDK takes blanks in a key; S3 then refuses every signature.
VALUES: dict[str, tuple[str | None, str, str]] = {
    "MONITOR_FILE_PATH": (None, "[^~].*", "write the whole path of LND's channel.backup"),
    "BACKUP_DIRECTORY": (None, "[^~].*", "write the whole path, such as /var/lib/lnd-backup"),
    "S3_BUCKET_NAME": (None, r"[A-Za-z0-9._-]{3,255}|arn:[\w:/-]+", "write the name alone, without s3:// and path"),
    "S3_BACKUP_PREFIX": ("", r"(?=.{1,240}$)((?!\.\.?(/|$))[\w.@=+,~!()*-]+(/|$))*", "write it like node1/ or a/b/"),
    "RESCAN_SECONDS": ("60", f"(?=.*[1-9]){SECONDS}", "write a number of seconds, more than 0"),
    "REFRESH_SECONDS": ("86400", SECONDS, "write a number of seconds; 0 turns the refresh off"),
    "SHUTDOWN_GRACE_SECONDS": ("10", SECONDS, "write a number of seconds, 0 or more"),
    **dict.fromkeys(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("", rf"https?://{HOST}", URL)),
    **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), ("", rf"(https?://)?{HOST}", URL)),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), ("", r"\S+", BLANKS)),
}
# Never to be restored from a copy (a stale channel.db is punished with all its money), or never to leave the node.
FORBIDDEN_NAME = re.compile(r"channel\.db|wallet\.db|.*\.sqlite.*|.*\.macaroon|hsm_secret", re.IGNORECASE)
LND_NAME = re.compile(r"channel\.db|wallet\.db|.*\.macaroon|chan-backup-archives|lnd\.conf")


class Settings(NamedTuple):
    """The configuration; times in seconds."""

    monitored: Path
    staging: Path
    bucket: str
    prefix: str
    rescan_seconds: float
    refresh_seconds: float
    grace_seconds: float


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings in an --env-file; raises Failure if systemd's EnvironmentFile= would read it otherwise."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "not UTF-8")
        raise Failure(Cause.SETTINGS, f"cannot read --env-file: {path}: {why}", "check the path") from None
    bare, quoted = r"""[^"'\\#\s]([^"'\\]*[^"'\\\s])?""", r""""[^"\\]*"|'[^'\\]*\'"""
    line = re.compile(rf"\s*(#.*(?<!\\)|(?!export\s)[A-Za-z_]\w*\s*=\s*(?!.*\s#)({bare}|{quoted})?)?\s*", re.ASCII)
    lines = enumerate(text.replace("\t", " ").replace("\r\n", "\n").split("\n"), 1)
    if numbers := [str(number) for number, given in lines if not (line.fullmatch(given) and given.isprintable())]:
        hint = "write KEY=value; export, backslashes and comments behind a value are read differently by systemd"
        raise Failure(Cause.SETTINGS, f"cannot read --env-file: {path}: line {', '.join(numbers)}", hint)
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text), interpolate=False).items()}


def is_lnd_directory(directory: Path, monitored: Path | None) -> bool:
    """Tell whether LND keeps its data or the monitored file here; one that cannot be listed is asked for names."""
    homes = (os.path.realpath(monitored.parent), os.path.dirname(os.path.realpath(monitored))) if monitored else ()
    if os.path.realpath(directory) in homes:
        return True
    try:
        return any(map(LND_NAME.fullmatch, os.listdir(directory)))
    except OSError:
        return any(os.path.lexists(directory / name) for name in ("wallet.db", "channel.db", "admin.macaroon"))


def monitored_fault(path: Path) -> tuple[str, str] | None:
    """Return what is wrong with MONITOR_FILE_PATH: why, and what to do."""
    if FORBIDDEN_NAME.fullmatch(path.name) or FORBIDDEN_NAME.fullmatch(Path(os.path.realpath(path)).name):
        return "must never be copied", "name channel.backup: a copy of a database loses money, a macaroon gives it away"
    return ("is a directory", f"name the file in it: {path / 'channel.backup'}") if os.path.isdir(path) else None


def staging_fault(path: Path, monitored: Path | None) -> tuple[str, str] | None:
    """Return what is wrong with BACKUP_DIRECTORY, which may be made later: why, and what to do."""
    whole, user = Path(os.path.realpath(path)), os.geteuid()
    make = f"run: sudo install -d -m 0700 -o {user} {shlex.quote(str(path))}"
    if any(is_lnd_directory(each, monitored) for each in (whole, *whole.parents)):
        return "is a directory of LND's", "name another, such as /var/lib/lnd-backup: LND's are only read"
    if not os.path.lexists(path):
        return None if os.access(path.parent, os.W_OK | os.X_OK) else ("cannot be made", make)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "is a link or no directory", f"name another, or move it away and {make}"
    if status.st_uid != user:
        return f"belongs to user #{status.st_uid}, not #{user}", f"run this as its owner: sudo -u '#{status.st_uid}' …"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return "must be writable by its owner and nobody else", f"run: chmod 0700 {shlex.quote(str(path))}"
    return None


def load_settings(environ: Mapping[str, str], unneeded: Collection[str] = ()) -> Settings:
    """Return the settings; raises an ExceptionGroup of all faults. Empty is not set; what is unneeded may be so."""
    values = {name: environ.get(name) or default for name, (default, _, _) in VALUES.items()}
    values["BACKUP_DIRECTORY"] = values["BACKUP_DIRECTORY"] or environ.get("STATE_DIRECTORY", "").split(":")[0] or None
    values |= {name: values[name] or os.devnull for name in unneeded}
    faults: dict[str, tuple[str, str] | None] = dict.fromkeys(unneeded)
    for name, (_, pattern, advice) in VALUES.items():
        if (value := values[name]) is None or (value and name not in unneeded and not re.fullmatch(pattern, value)):
            faults[name] = ("cannot be used" if value else "is not set", advice)
    monitored, staging = (Path(os.path.abspath(values[name] or "")) for name in list(VALUES)[:2])
    faults.setdefault("MONITOR_FILE_PATH", monitored_fault(monitored))
    faults.setdefault("BACKUP_DIRECTORY", staging_fault(staging, None if faults["MONITOR_FILE_PATH"] else monitored))
    if (bundle := environ.get("AWS_CA_BUNDLE")) and not os.path.exists(bundle):
        faults["AWS_CA_BUNDLE"] = ("is not there", "name the file that holds the CA's certificate")
    failures = []
    for name, fault in faults.items():
        value = values.get(name) or environ.get(name, "")
        value = "***" if "_KEY" in name or "TOKEN" in name or "@" in value else value
        if fault:
            failures.append(Failure(Cause.SETTINGS, f"configuration: {name}={value}: {fault[0]}", fault[1]))
    if failures:
        raise ExceptionGroup("configuration", failures)
    bucket, prefix, *seconds = [value or "" for value in values.values()][2:7]
    return Settings(monitored, staging, bucket, prefix and prefix.rstrip("/") + "/", *map(float, seconds))


# --- Versions: one content of channel.backup, its name, and how it is read -------------------------------------------
def captured_at(name: str) -> datetime | None:
    """Return the time of capture in a version's name; None if it is no version's name."""
    with contextlib.suppress(ValueError):
        if match := re.fullmatch(r"((?!9999)[0-9]{8}T[0-9]{6}\.[0-9]{6}Z)-[0-9a-f]{6}", name):
            return datetime.fromisoformat(match[1])
    return None


def version_name(digest: str, now: datetime, newest: str) -> str:
    """Return the name of a version with this SHA-256, captured now (UTC): later than the newest, whatever the clock."""
    if (previous := captured_at(newest)) and now <= previous:
        now = previous + timedelta(microseconds=1)
    return f"{now:%Y%m%dT%H%M%S.%f}Z-{digest[-6:]}"


def node_failure(what: str, error: OSError) -> Failure:
    """Return what the system refused on LND's side, as a failure with what to do."""
    hint = {
        errno.ENOENT: "LND makes it when it starts; if LND runs, compare the path with its settings",
        errno.EACCES: "this user needs r on the file, r and x on its directory, and x on all directories above",
        errno.ENOSPC: "raise it: sysctl fs.inotify.max_user_watches",
        errno.EMFILE: "raise it: sysctl fs.inotify.max_user_instances, or the limit of open files",
    }.get(error.errno or 0, "check the path and its file system")
    return Failure(Cause.ABSENT if error.errno == errno.ENOENT else Cause.OTHER, f"{what}: {error.strerror}", hint)


def read_channel_backup(path: Path) -> bytes:
    """Return the version at this path now, read by one descriptor: a rename cannot mix two. Raises Failure."""
    # A link may be switched at any time, so its target is checked at every read; opening a device can set it going.
    what, hint = f"cannot read channel.backup: {path}", "let MONITOR_FILE_PATH name LND's channel.backup"
    try:
        whole = Path(os.path.realpath(path, strict=True))
        if FORBIDDEN_NAME.fullmatch(whole.name) or not stat.S_ISREG(whole.stat().st_mode):
            raise Failure(Cause.OTHER, f"{what}: it is {whole.name}, or no regular file", hint)
        with open(os.open(whole, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            before = os.fstat(file.fileno())
            data = file.read(min(before.st_size, LARGEST_SIZE_BYTES) + 1) if stat.S_ISREG(before.st_mode) else b""
            after = os.fstat(file.fileno())
    except OSError as error:
        raise node_failure(what, error) from None
    size, times = after.st_size, (before.st_mtime_ns, after.st_mtime_ns)
    if size <= LARGEST_SIZE_BYTES and not (len(data) == before.st_size == size and times[0] == times[1]):
        raise Failure(Cause.ABSENT, f"{what}: it changed while it was read", "it is read again in a moment")
    if not EMPTY_SIZE_BYTES <= size <= LARGEST_SIZE_BYTES:
        why = f"{size} bytes cannot be a channel backup ({EMPTY_SIZE_BYTES} to {LARGEST_SIZE_BYTES})"
        raise Failure(Cause.OTHER, f"{what}: {why}", "not written by LND; the last good version stays the newest")
    return data


# --- Staging: the directory that is the queue, and what is remembered across restarts --------------------------------
class Stored(NamedTuple):
    """A version in the bucket: as S3's receipt proves it, or as the bucket lists it; stored_at is ISO 8601, UTC."""

    name: str
    key: str
    size_bytes: int
    stored_at: str
    sha256: str = ""  # this and the bucket in a receipt only
    bucket: str = ""

    def at(self) -> datetime:
        """Return the earlier of capture and storing: no clock that ran ahead, and no thief, names one the newest."""
        captured, stored_at = captured_at(self.name), datetime.fromisoformat(self.stored_at)
        # S3 cuts its times to the second; within one, the name decides.
        return captured if captured and captured < stored_at + timedelta(seconds=1) else stored_at

    def as_json(self) -> dict[str, Any]:
        """Return the fields that scripts may rely on."""
        captured, empty = (captured_at(self.name) or self.at()).isoformat(), self.size_bytes == EMPTY_SIZE_BYTES
        return {"captured_at": captured, "empty": empty} | {
            k: v for k, v in self._asdict().items() if k not in ("sha256", "bucket")
        }


def read_file(path: Path | str, directory: int | None = None) -> bytes:
    """Return the bytes of a file, of which a link is not followed and a pipe not waited for; raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory), "rb") as file:
        return file.read(LARGEST_SIZE_BYTES + 1)


def write_file(directory: int, name: str, data: bytes, *, new: bool = False) -> None:
    """Write a file: whole and on disk, or not at all; a new one overwrites nothing. Raises OSError."""
    partial = f".partial-{name}-{os.getpid()}" if new else f".partial-{name}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | (os.O_EXCL if new else os.O_TRUNC)
    try:
        with open(os.open(partial, flags, 0o600, dir_fd=directory), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        (os.link if new else os.rename)(partial, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)  # what was placed outlives a power cut only once the directory is on disk
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=directory)


def recall_receipt(directory: Path) -> Stored | None:
    """Return the newest receipt that is remembered in a staging directory."""
    try:
        receipt = Stored(**json.loads(read_file(directory / ".receipt")))
        return receipt if captured_at(receipt.name) and receipt.at() else None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            log.warning("cannot read the last receipt: %s: %s", directory / ".receipt", error)
        return None


class Staging:
    """The staging directory: the watcher alone adds versions, the uploader alone removes them.

    Beside versions: .lock, .receipt (the newest), .partial-* (cut short by a crash, removed at the start), .damaged-*.
    Files of others are left alone. All goes through one descriptor: replacing the directory cannot split the queue.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory if need be, lock it until the process ends, recall the newest name; raises Failure."""
        self.directory, self.trouble = directory, Trouble("staging works")
        self.changed = asyncio.Event()  # the bell: something was staged, or a stop began
        self.held: dict[str, bytes] = {}  # versions that the disk refused, to be sent straight from memory
        self.delivered: set[str] = set()  # versions with a receipt that the disk refused to delete
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            self.fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            lock = os.open(".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.fd)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in (each for each in os.listdir(self.fd) if each.startswith(".partial-")):
                with contextlib.suppress(IsADirectoryError):
                    os.unlink(name, dir_fd=self.fd)
            self.receipt = recall_receipt(directory)
            self.newest = max([*self.names(), self.receipt.name if self.receipt else ""])  # the highest name given
        except BlockingIOError:
            raise Failure(Cause.LOCKED, f"cannot start: {directory}: another copy holds it") from None
        except OSError as error:
            hint = "check its owner, its mode, and that its file system is writable and not full"
            raise Failure(Cause.SETTINGS, f"cannot use BACKUP_DIRECTORY: {directory}: {error.strerror}", hint) from None

    def names(self) -> list[str]:
        """Return the names of the versions still to be sent, newest first."""
        files = (entry.name for entry in os.scandir(self.fd) if entry.is_file(follow_symlinks=False))
        return sorted({name for name in files if captured_at(name)} - self.delivered | self.held.keys(), reverse=True)

    def load(self, name: str) -> bytes | None:
        """Return the bytes of a version, or None, keeping it aside, if they do not fit its name; raises OSError."""
        if name in self.held:
            return self.held[name]
        data = read_file(name, self.fd)
        if len(data) >= EMPTY_SIZE_BYTES and name.endswith(hashlib.sha256(data).hexdigest()[-6:]):
            return data
        os.rename(name, f".damaged-{name}", src_dir_fd=self.fd, dst_dir_fd=self.fd)
        hint = "somebody edited it, or the disk is failing; it is not sent, and kept as .damaged-* for a look"
        say(Failure(Cause.OTHER, f"damaged: {self.directory / name}: its bytes are not those of its name", hint))
        return None

    def stage(self, data: bytes) -> None:
        """Stage a version under a new name and ring the bell; where that is impossible, keep it in memory."""
        self.newest = name = version_name(hashlib.sha256(data).hexdigest(), datetime.now(UTC), self.newest)
        self.held[name] = data
        self.settle_held()
        remark = "" if len(data) >= ONE_CHANNEL_SIZE_BYTES else ", a size that no known LND writes; backed up anyway"
        remark = ", no channels: a new node, or LND in a recovery" if len(data) == EMPTY_SIZE_BYTES else remark
        log.log(logging.WARNING if remark else logging.INFO, "captured %s: %d bytes%s", name, len(data), remark)
        self.changed.set()

    def settle_held(self) -> None:
        """Put on disk what is only in memory, newest first; memory keeps a few, each complete in itself."""
        for name in sorted(self.held, reverse=True):
            try:
                write_file(self.fd, name, self.held[name])
            except OSError as error:
                self.refused("stage", name, error, "free or repair the disk; until then versions are sent from memory")
                break
            del self.held[name]
            self.trouble.end()
        for name in sorted(self.held)[:-HELD_COUNT_MAX]:
            log.error("gave up %s: the disk refuses it, S3 does not take it, and there are newer ones", name)
            del self.held[name]

    def is_newest(self, data: bytes) -> bool:
        """Tell whether the newest version still to be sent has these bytes."""
        with contextlib.suppress(OSError):
            return any(self.load(name) == data for name in self.names()[:1])
        return False

    def discard(self, receipt: Stored) -> None:
        """Remember a receipt, if it is the newest, and delete the version that it proves stored."""
        self.held.pop(receipt.name, None)
        self.delivered.add(receipt.name)
        remembered = self.receipt is not None and receipt.name < self.receipt.name
        self.receipt = self.receipt if remembered else receipt
        text = json.dumps(receipt._asdict()).encode()
        try:
            with contextlib.suppress(OSError):
                if not remembered:
                    write_file(self.fd, ".receipt", text)
                    remembered = True
            with contextlib.suppress(FileNotFoundError):  # it was never on disk
                os.unlink(receipt.name, dir_fd=self.fd)
            if not remembered:  # a full disk may have room for it now
                write_file(self.fd, ".receipt", text)
            self.delivered.discard(receipt.name)
        except OSError as error:
            self.refused("tidy up", receipt.name, error, "free or repair the disk; this version is in the bucket")

    def refused(self, what: str, name: str, error: OSError, hint: str) -> Failure:
        """Note what the disk refuses to do with a version."""
        message = f"cannot {what}: {self.directory / name}: {error.strerror}"
        return self.trouble.begin(Failure(Cause.OTHER, message, hint))


# --- S3: one client, one put that proves itself, and every error explained -------------------------------------------
CODES = {  # of S3's errors; HTTP's status codes count where S3's say nothing
    Cause.CLOCK: "RequestTimeTooSkewed RequestExpired",
    Cause.CREDENTIALS: "ExpiredToken InvalidToken TokenRefreshRequired InvalidAccessKeyId 401 403",
    Cause.DENIED: "AccessDenied",
    Cause.OTHER: "NoSuchKey InvalidObjectState",
    Cause.BUCKET: "NoSuchBucket QuotaExceeded 301 307 308 400 404 405 501 507",
    Cause.NETWORK: "RequestTimeout BadDigest XAmzContentSHA256Mismatch Throttling ThrottlingException SlowDown",
}
# Of the SDK's exceptions; a credential program that fails raises neither a ClientError nor a BotoCoreError (1.44).
CLASSES: tuple[tuple[Cause, tuple[type[Exception], ...]], ...] = (
    (Cause.CREDENTIALS, (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.SSOError, sdk.LoginError)),
    (Cause.NETWORK, (sdk.CredentialRetrievalError, sdk.MetadataRetrievalError, sdk.TokenRetrievalError)),
    (Cause.NETWORK, (sdk.ConnectionError, sdk.HTTPClientError, sdk.IncompleteReadError, OSError, json.JSONDecodeError)),
    (Cause.BUCKET, (sdk.BotoCoreError, ValueError)),
)


def explain(what: str, error: Exception, permission: str = "") -> Failure:
    """Return an error of the SDK as a failure with its cause and what to do; a pure function."""
    if isinstance(error, sdk.ClientError):
        code, text = (error.response.get("Error", {}).get(part, "") for part in ("Code", "Message"))
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        found = [cause for each in (code, status) for cause, codes in CODES.items() if each in codes.split()]
        unknown = Cause.NETWORK if re.fullmatch("408|409|425|429|5..", status) else Cause.OTHER
        cause, why = [*found, unknown][0], f"{code}: {text} (HTTP {status})"
    else:
        why = " ".join(str(error).split()) or type(error).__name__
        cause = next((cause for cause, classes in CLASSES if isinstance(error, classes)), Cause.OTHER)
        if "CERTIFICATE_VERIFY_FAILED" in why:
            cause = Cause.CLOCK if "not yet valid" in why or "expired" in why else Cause.BUCKET
        if reason := getattr(error, "kwargs", {}).get("error"):  # botocore keeps the reason to itself
            why += f" ({str(reason).rpartition(': ')[2]})"
        why = re.sub(r"(header value) b?'.*?'", r"\1 ***", why)  # a session token with a line break in it
    return Failure(cause, f"{what}: {why}", cause.hint.replace("{permission}", permission))


class Bucket:
    """The bucket, by way of one SDK client: made at the first use, and anew when its credentials or settings fail."""

    def __init__(self, settings: Settings) -> None:
        """Check what can be checked on this machine, without asking any source of credentials; raises Failure."""
        self.name, self.prefix, self.using = settings.bucket, settings.prefix, ""
        self.session: Any = None
        self.client: Any = None
        try:
            self.new_client(aws_access_key_id="-", aws_secret_access_key="-")  # noqa: S106
        except Exception as error:
            hint = "check AWS_PROFILE, AWS_REGION, the endpoint, and the SDK's files (AWS_CONFIG_FILE)"
            raise Failure(Cause.SETTINGS, str(explain("configuration: AWS SDK", error)), hint) from None

    def new_client(self, **credentials: str) -> Any:
        """Return an SDK client, its limits explicit; what the user chose in the environment or a file is left alone."""
        self.session = self.session or boto3.session.Session()  # only a new one reads changed files
        chosen = {name for name, value in self.session._session.get_scoped_config().items() if value}  # noqa: SLF001
        chosen |= {name[4:].lower() for name, value in os.environ.items() if name.startswith("AWS_") and value}
        limits: dict[str, Any] = dict.fromkeys(("connect_timeout", "read_timeout"), ATTEMPT_SECONDS)
        limits["max_pool_connections"] = 1
        for checksums in ("request_checksum_calculation", "response_checksum_validation"):
            limits[checksums] = "when_required"  # else trailers, which break many stores (boto3#4392)
        if not chosen & {"max_attempts", "retry_mode"}:  # the SDK's own attempts run dry; the uploader's never do
            limits["retries"] = {"mode": "standard", "total_max_attempts": 1}
        config = Config(**{name: value for name, value in limits.items() if name not in chosen})
        region = os.environ.get("AWS_REGION") or None  # which people set, and the SDK ignores
        client = self.session.client("s3", region_name=region, config=config, **credentials)
        self.is_aws = str(urlsplit(client.meta.endpoint_url).hostname).endswith((".amazonaws.com", ".amazonaws.com.cn"))
        on, before, after = client.meta.events.register, "before-sign.s3.PutObject", "after-call.s3.PutObject"
        # `Expect: 100-continue` costs a round trip, and a second where a proxy ignores it (botocore#3613).
        on(before, lambda request, **_: request.headers.__delitem__("Expect"))
        # The body of the answer tells a receipt, which has none, from the page of a captive portal.
        on(after, lambda http_response, parsed, **_: parsed.update(Body=http_response.content))
        return client

    def call(self, what: str, action: str, permission: str, **arguments: Any) -> dict[str, Any]:
        """Call one operation of S3 and return its answer; the first call logs what is in use. Raises Failure."""
        try:
            if self.client is None:
                self.client, credentials = self.new_client(), self.session.get_credentials()
                meta, method = self.client.meta, credentials.method if credentials else "none"
                using = f"endpoint {meta.endpoint_url}, region {meta.region_name}, credentials: {method}"
                if using != self.using:
                    log.info("using %s", using)
                self.using = using
            answer: dict[str, Any] = getattr(self.client, action)(Bucket=self.name, **arguments)
        except Exception as error:
            resource = f"arn:aws:s3:::{self.name}" + (f"/{self.prefix}*" if "Object" in permission else "")
            failure = explain(what, error, json.dumps({"Effect": "Allow", "Action": permission, "Resource": resource}))
            self.client = self.session = None  # the next attempt reads the AWS settings and credentials anew
            raise failure from error
        return answer

    def put(self, name: str, data: bytes) -> Stored:
        """Send a version and return S3's receipt; raises Failure. The same version twice is the same object."""
        key, digest = self.prefix + name, hashlib.sha256(data)
        what, checksum = f"cannot store: s3://{self.name}/{key}", base64.b64encode(digest.digest()).decode()
        check = {"ChecksumSHA256": checksum, "ChecksumAlgorithm": "SHA256"}
        if not self.is_aws:  # the one check that nearly every store honours, and Object Lock accepts
            check = {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
        # A stream is sent in small blocks, each with a time-out of its own, as a slow uplink needs it.
        body, metadata = io.BytesIO(data), {"sha256": digest.hexdigest()}
        answer = self.call(what, "put_object", "s3:PutObject", Key=key, Body=body, Metadata=metadata, **check)
        if not answer.get("ETag") or answer["Body"] or answer.get("ChecksumSHA256", checksum) != checksum:
            hint = "something answers in S3's place (a captive portal, a proxy): open a web page, check the endpoint"
            raise Failure(Cause.NETWORK, f"{what}: the answer is no receipt", hint)
        return Stored(
            name, key, len(data), datetime.now(UTC).isoformat(timespec="seconds"), digest.hexdigest(), self.name
        )

    def ask(self, what: str, action: str, permission: str, **arguments: Any) -> dict[str, Any]:
        """Call one operation of S3 for a one-shot, which gives up when there is no answer; raises Failure."""
        seconds = ATTEMPT_SECONDS + ONE_SHOT_PATIENCE_SECONDS
        return asyncio.run(in_daemon_thread(seconds, what, lambda: self.call(what, action, permission, **arguments)))

    def versions(self) -> tuple[list[Stored], int]:
        """Return the versions right under the prefix, newest first, and the number of other keys; raises Failure."""
        found: list[Stored] = []
        what, others = f"cannot list: s3://{self.name}/{self.prefix}", 0
        page = {"Prefix": self.prefix, "Delimiter": "/"}
        while True:
            answer = self.ask(what, "list_objects_v2", "s3:ListBucket", **page)
            if "IsTruncated" not in answer:
                raise Failure(Cause.NETWORK, f"{what}: the answer is not S3's", "a captive portal, or another server?")
            others += len(answer.get("CommonPrefixes", [])) + len(answer.get("Contents", []))
            for entry in answer.get("Contents", []):
                name, stored_at = entry["Key"].removeprefix(self.prefix), entry["LastModified"].astimezone(UTC)
                if captured_at(name):
                    found.append(Stored(name, entry["Key"], entry["Size"], stored_at.isoformat()))
            if not answer["IsTruncated"]:
                return sorted(found, key=lambda each: (each.at(), each.name), reverse=True), others - len(found)
            page["ContinuationToken"] = answer["NextContinuationToken"]

    def fetch(self, key: str, *, by_name_alone: bool = False) -> tuple[bytes, datetime]:
        """Return the bytes of a version, if they fit metadata and name, and the time it counts by; raises Failure."""
        what, hint = f"cannot use s3://{self.name}/{key}", "take another version: list shows them"
        answer = self.ask(what, "get_object", "s3:GetObject", Key=key)
        size = answer.get("ContentLength", 0)
        try:
            data: bytes = answer["Body"].read(LARGEST_SIZE_BYTES + 1) if size <= LARGEST_SIZE_BYTES else b""
        except Exception as error:
            raise Failure(Cause.NETWORK, f"{what}: cut off: {error}") from error
        if len(data) < size <= LARGEST_SIZE_BYTES:  # a connection that ends early need not raise
            raise Failure(Cause.NETWORK, f"{what}: cut off after {len(data)} of {size} bytes")
        digest, wanted = hashlib.sha256(data).hexdigest(), answer["Metadata"].get("sha256")
        fits = wanted in (None, digest) and key[-6:] == digest[-6:]
        if not fits or not EMPTY_SIZE_BYTES <= len(data) <= LARGEST_SIZE_BYTES:
            raise Failure(Cause.OTHER, f"{what}: damaged: its bytes are not those of its name and metadata", hint)
        if wanted is None and not by_name_alone:
            hint = f"it was not stored by this program; to trust the six digits of its name: restore --key {key}"
            raise Failure(Cause.OTHER, f"{what}: no sha256 in its metadata", hint)
        if wanted is None:
            log.warning("only the six digits of its name could be checked: %s", key)
        stored_at = answer["LastModified"].astimezone(UTC).isoformat()
        return data, Stored(key.rpartition("/")[2], key, len(data), stored_at).at()

    def holds(self, key: str, data: bytes) -> bool:
        """Tell whether an object has these bytes; raises Failure if it cannot be had."""
        try:
            return self.fetch(key, by_name_alone=True)[0] == data
        except Failure as failure:
            if failure.cause is not Cause.OTHER:
                raise
            return False


async def in_daemon_thread(seconds: float, what: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread that cannot delay the end of the process, as asyncio.to_thread's would.

    Raises what it raises, and Failure after so many seconds; that, and being cancelled, abandons the thread.
    """
    if threading.active_count() > STUCK_THREADS_MAX:
        raise Failure(Cause.NETWORK, f"{what}: {STUCK_THREADS_MAX} attempts hang", "a credential program that hangs?")
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    call = asyncio.wrap_future(future)
    call.add_done_callback(lambda done: done.cancelled() or done.exception())  # an abandoned one is read by nobody
    if not (await asyncio.wait({call}, timeout=seconds))[0]:
        raise Failure(Cause.NETWORK, f"{what}: given up after {seconds:.0f} s")
    return call.result()


# --- Watching: every bell leads to a look at the file, and only the file counts --------------------------------------
# MOVED_TO is LND's rename, CLOSE_WRITE a writer in place; never an open or a read: LND reads the old file first.
WATCHED = Mask.MOVED_TO | Mask.CLOSE_WRITE | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR


async def rings(bell: asyncio.Event, seconds: float) -> bool:
    """Wait for a bell; tell whether it rang in time. May be cancelled (asyncio.wait_for may not, up to Python 3.11)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            return await bell.wait()
    return False


class Watcher:
    """Looks at channel.backup and stages what is new; the only user of inotify."""

    def __init__(self, settings: Settings, staging: Staging) -> None:
        self.settings, self.staging, self.bell = settings, staging, asyncio.Event()
        self.trouble = Trouble("channel.backup is watched and read")
        self.inotify: Inotify | None = None
        self.watch: Watch | None = None
        self.listener: asyncio.Task[None] | None = None
        self.unread: Failure | None = None  # why the last look could not read the file
        self.seen = ""  # SHA-256 of the last version; forgotten when it is to be put again, as at the start
        self.refresh_at = self.next_refresh()
        if os.path.islink(settings.monitored):
            log.warning("%s is a link: no event comes from its target, only rescans see changes", settings.monitored)

    async def run(self) -> None:
        """Watch until cancelled, which may happen at any time, and look once more before returning."""
        try:
            while not (self.listener and self.listener.done()):
                self.bell.clear()
                self.look()
                notify_systemd("WATCHDOG=1")
                watchdog = float(os.environ.get("WATCHDOG_USEC") or "inf") / 3e6
                rescan = 1.0 if self.trouble.failure else watchdog  # not watched, or the file absent or being written
                refresh = max(self.refresh_at - time.clock_gettime(time.CLOCK_BOOTTIME), 0.0)
                await rings(self.bell, min(self.settings.rescan_seconds, watchdog, refresh, rescan))
            self.listener.result()
        finally:
            self.look()  # a last time
            if self.inotify and self.listener:  # in another order, asyncinotify 4.4's `get` never ends
                self.listener.cancel()
                await asyncio.wait({self.listener})
                self.inotify.close()

    def arm(self) -> Failure | None:
        """Watch the directory that the path names now, or return why not; one system call if nothing changed."""
        # Before each look: no event tells of an ancestor renamed, a link switched, a mount placed over it.
        try:
            if self.inotify is None:  # asyncinotify 4.4 builds its own NONBLOCK from O_CLOEXEC
                self.inotify = Inotify(InitFlags(os.O_CLOEXEC | os.O_NONBLOCK))
                self.listener = asyncio.create_task(self.listen(self.inotify))
                self.listener.add_done_callback(lambda _: self.bell.set())
            previous, self.watch = self.watch, self.inotify.add_watch(self.settings.monitored.parent, WATCHED)
            if previous and previous is not self.watch:
                with contextlib.suppress(OSError):  # the kernel has removed it with its directory
                    self.inotify.rm_watch(previous)
        except OSError as error:
            return node_failure(f"cannot watch, only look at intervals: {self.settings.monitored.parent}", error)
        return None

    async def listen(self, inotify: Inotify) -> None:
        """Ring the bell for every event that concerns the file; a cancelled `get` loses events, so only the end may."""
        while True:
            event = await inotify.get()
            if event.name is None or event.name.name == self.settings.monitored.name:  # no name: overflow, life cycle
                self.bell.set()

    def look(self) -> bool:
        """Stage the file if it is not the version last seen, or is to prove the way out; tell whether it was."""
        if time.clock_gettime(time.CLOCK_BOOTTIME) >= self.refresh_at:
            self.seen, self.refresh_at = "", self.next_refresh()
        self.staging.settle_held()
        failure, self.unread = self.arm(), None
        try:
            data = read_channel_backup(self.settings.monitored)
        except Failure as unread:
            self.unread = self.trouble.begin(unread)
            return False
        self.trouble.begin(failure) if failure else self.trouble.end()
        digest = hashlib.sha256(data).hexdigest()
        # At the start and at a refresh nothing was seen: the same bytes are staged anew, unless still to be sent.
        is_new = digest != self.seen and (self.seen != "" or not self.staging.is_newest(data))
        if is_new:
            self.staging.stage(data)
        self.seen = digest
        return is_new

    def next_refresh(self) -> float:
        """Return when the file is to be put again: by a clock that counts in suspend, and is deaf to clock settings."""
        return time.clock_gettime(time.CLOCK_BOOTTIME) + (self.settings.refresh_seconds or float("inf"))


# --- Uploading: newest first, for ever, and a staged version is deleted only on its receipt --------------------------
class Uploader:
    """Sends what is staged; the only user of the bucket while the daemon runs."""

    def __init__(self, staging: Staging, bucket: Bucket, stored: Callable[[Stored], None]) -> None:
        self.staging, self.bucket, self.stored, self.trouble = staging, bucket, stored, Trouble("S3 stores versions")
        self.failure: Failure | None = None  # of the last attempt

    async def run(self, stopping: asyncio.Event, patience_seconds: float = float("inf")) -> None:
        """Send until cancelled (a version in flight stays staged), or, if stopping, until all are sent or hope ends."""
        failures, give_up_at = 1, time.monotonic() + patience_seconds
        while True:
            self.failure = await self.send_staged()
            pause = CONNECTION_IDLE_SECONDS
            if self.failure:  # doubled at each failure up to the cause's limit, half of it jitter
                longest = min(self.failure.cause.pause_seconds, BACKOFF_FIRST_SECONDS * 2.0 ** min(failures - 1, 16))
                pause = longest * random.uniform(0.5, 1.0)
            hope = self.failure and self.failure.cause.exit_code == TRY_AGAIN and time.monotonic() + pause < give_up_at
            if stopping.is_set() and not hope and not self.staging.changed.is_set():
                return
            rang = await rings(self.staging.changed, pause)
            failures = 1 if rang or not self.failure else failures + 1  # what is new is tried at once, and anew
            if not rang and not self.failure:
                if client := self.bucket.client:
                    client.close()
                await self.staging.changed.wait()

    async def send_staged(self) -> Failure | None:
        """Send all that is staged, newest first, until something newer comes; return the failure that is left."""
        self.staging.changed.clear()  # before looking, so that what comes meanwhile rings again
        left, name = None, "."
        try:
            for name in self.staging.names():
                if self.staging.changed.is_set():
                    break
                try:
                    data = self.staging.load(name)
                except OSError as error:  # the others can go all the same
                    left = self.staging.refused("read", name, error, "check its owner and mode, and the disk")
                    continue
                if data is not None:
                    seconds = ATTEMPT_SECONDS + len(data) / 4000.0  # bytes per second; a credential program may hang
                    receipt = await in_daemon_thread(seconds, f"cannot store: {name}", self.bucket.put, name, data)
                    self.trouble.end()
                    log.info("stored s3://%s/%s: %d bytes", self.bucket.name, receipt.key, receipt.size_bytes)
                    self.staging.discard(receipt)
                    self.stored(receipt)
        except Exception as error:
            self.bucket.client = self.bucket.session = None  # a thread that was given up may still hold their locks
            return self.trouble.begin(error if isinstance(error, Failure) else explain(f"cannot store: {name}", error))
        return left


# --- The daemon: one function owns all tasks -------------------------------------------------------------------------
def notify_systemd(state: str) -> None:
    """Tell systemd (sd_notify(3)); that nobody listens is no reason to fail."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(state.encode())


def install_handlers(loop: asyncio.AbstractEventLoop) -> tuple[asyncio.Event, asyncio.Future[None]]:
    """Return what the first signal sets, and what fails with the loop's callbacks; a second signal ends the process."""
    stopping, broken = asyncio.Event(), loop.create_future()

    def on_signal(number: int) -> None:
        if stopping.is_set():  # the second was waiting already, or this is a one-shot
            os._exit(128 + number)
        for each in (signal.SIGTERM, signal.SIGINT):  # not by the loop, which a slow disk may hold up
            signal.signal(each, lambda second, _: os._exit(128 + second))
        log.info("stopping: %s", signal.Signals(number).name)
        stopping.set()

    def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not broken.done():  # a failing reader callback is called again for ever, and no task hears of it
            broken.set_exception(context.get("exception") or RuntimeError(context["message"]))

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal, each)
    loop.set_exception_handler(on_exception)
    return stopping, broken


async def run_daemon(settings: Settings, *, once: bool) -> int:
    """Watch and upload until a signal, or once; return the exit code. Raises Failure, and whatever ends a task."""
    bucket, staging = Bucket(settings), Staging(settings.staging)
    watcher = Watcher(settings, staging)

    def stored(receipt: Stored) -> None:
        if receipt.sha256 == watcher.seen:  # a refresh counts from the last receipt for what is on disk
            watcher.refresh_at = watcher.next_refresh()
        if once:
            print(f"stored {shown(receipt.key)}", flush=True)

    uploader = Uploader(staging, bucket, stored)
    stopping, broken = install_handlers(asyncio.get_running_loop())
    log.info("watching %s, staging in %s, %d staged", settings.monitored, settings.staging, len(staging.names()))
    watcher.look()
    notify_systemd("READY=1")
    if once:
        stopping.set()
    uploading = asyncio.create_task(uploader.run(stopping, ONE_SHOT_PATIENCE_SECONDS if once else float("inf")))
    watching = asyncio.create_task(watcher.run())
    tasks: list[asyncio.Future[Any]] = [watching, uploading, asyncio.create_task(stopping.wait()), broken]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        notify_systemd("STOPPING=1")
        if once:
            await uploading
        elif stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.grace_seconds):
                    await drain(watcher, uploader, uploading, stopping)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for ended in tasks:
        if not ended.cancelled():
            ended.result()
    code = outcome(staging, uploader.failure, watcher.unread)
    return code if once else DONE


def outcome(staging: Staging, unsent: Failure | None, unread: Failure | None) -> int:
    """Log what is left, and return the exit code of a one-shot."""
    left = len(staging.names())
    log.info("stopped, %d versions staged for the next start", left - len(staging.held))
    if staging.held:
        log.error("lost with memory: %d versions that neither the disk nor S3 took", len(staging.held))
    if left:
        return unsent.cause.exit_code if unsent else TRY_AGAIN
    return unread.cause.exit_code if unread else DONE


async def drain(watcher: Watcher, uploader: Uploader, uploading: asyncio.Task[None], stopping: asyncio.Event) -> None:
    """Look, and send until nothing is left and a look finds nothing more; to be cancelled when the time is over."""
    watcher.look()
    uploader.staging.changed.set()  # a pause between attempts ends here
    await uploading
    while watcher.look() or (uploader.staging.changed.is_set() and not uploader.failure):
        await uploader.run(stopping)


# --- The commands ----------------------------------------------------------------------------------------------------
def ago(then: datetime) -> str:
    """Return how long ago that was, in words."""
    seconds = max((datetime.now(UTC) - then).total_seconds(), 0)
    units = (("years", 31557600), ("months", 2629800), ("days", 86400), ("hours", 3600), ("minutes", 60))
    return next((f"{seconds / unit:.0f} {name}" for name, unit in units if seconds >= 2 * unit), f"{seconds:.0f} s")


def command_run(options: argparse.Namespace) -> int:
    """Run the daemon, or one pass of it."""
    return asyncio.run(run_daemon(load_settings(os.environ), once=options.command == "once"))


def command_check(options: argparse.Namespace) -> int:
    """Print whether the bucket holds the version on disk: by its bytes where the key may read, else by a receipt."""
    settings = load_settings(os.environ, ["BACKUP_DIRECTORY"])
    bucket, data = Bucket(settings), read_channel_backup(settings.monitored)
    digest, written_at = hashlib.sha256(data).hexdigest(), os.path.getmtime(settings.monitored)
    current, proof, known = False, "bucket", None
    verb = "LND has written since, for" if time.time() - written_at < JUST_NOW_SECONDS else "the bucket is behind for"
    reason = f"{verb} {ago(datetime.fromtimestamp(written_at, UTC))}"
    try:
        versions, _ = bucket.versions()
        same = [version for version in versions if version.name.endswith(digest[-6:])]
        known = next(iter([*same, *versions]), None)
        current = any(bucket.holds(version.key, data) for version in same)
        reason = f"damaged in the bucket: {same[0].key}" if same else reason
    except Failure as failure:
        if failure.cause is not Cause.DENIED:
            raise
        proof, known = "receipt", recall_receipt(settings.staging)
        if not known or (known.bucket, known.key) != (bucket.name, bucket.prefix + known.name):
            reason = "this key may not read the bucket, and BACKUP_DIRECTORY has no receipt of it that can be read"
        elif known.sha256 == digest:
            age = datetime.now(UTC) - datetime.fromisoformat(known.stored_at)
            late = 0 < 2 * settings.refresh_seconds < age.total_seconds()
            current, reason = not late, "the last receipt is old: nothing refreshes it, or refreshing fails"
    staged = None
    with contextlib.suppress(OSError):
        staged = sum(captured_at(name) is not None for name in os.listdir(settings.staging))
    facts, reason = known.as_json() if known else {}, "the version on disk is stored" if current else reason
    answer = {"current": current, "proof": proof} | {
        name: facts.get(name) for name in ("key", "captured_at", "stored_at")
    }
    answer |= {"staged": staged, "reason": reason}
    newest = f"{known.key}, stored {ago(datetime.fromisoformat(known.stored_at))} ago" if known else "none"
    text = f"{reason}; newest: {newest}; staged: {'?' if staged is None else staged}; proof: {proof}"
    print(json.dumps(answer) if options.json else shown(text))
    return DONE if current else FAILED


def command_list(options: argparse.Namespace) -> int:
    """Print the versions in the bucket, newest first: for a terminal, for a pipe, or as JSON."""
    bucket = Bucket(load_settings(os.environ, ["MONITOR_FILE_PATH", "BACKUP_DIRECTORY"]))
    versions, others = bucket.versions()
    rows = [version.as_json() for version in versions]
    if sys.stdout.isatty() and not options.json:
        print(f"{'captured (UTC) and name':30} {'age':>10} {'bytes':>11} stored (UTC)")
    for row, version, older in zip(rows, versions, [*versions[1:], None], strict=False):
        late = datetime.fromisoformat(row["captured_at"]) > version.at() + timedelta(minutes=1)
        shrunk = older is not None and not row["empty"] and version.size_bytes * 2 < older.size_bytes
        marks = ["no channels"] * row["empty"] + ["much smaller than the one before"] * shrunk
        row["marks"] = marks + ["named later than stored"] * late
        if sys.stdout.isatty() and not options.json:
            stored_at = row["stored_at"][:19].replace("T", " ")
            print(f"{version.name} {ago(version.at()):>10} {version.size_bytes:>11,} {stored_at}")
            print(*(f"  ! {mark}\n" for mark in row["marks"]), sep="", end="")
        elif not options.json:
            cells = (row["key"], row["captured_at"], row["size_bytes"], row["stored_at"], ", ".join(row["marks"]))
            print(*map(shown, cells), sep="\t")
    if options.json:
        print(json.dumps(rows, indent=1))
    log.info("%d versions in s3://%s/%s, %d other keys not shown", len(versions), bucket.name, bucket.prefix, others)
    return DONE


def choose_version(bucket: Bucket, before: datetime | None) -> tuple[str, bytes, datetime]:
    """Return the newest version that holds channels, before a time if given: key, bytes, time; raises Failure."""
    versions = [each for each in bucket.versions()[0] if before is None or each.at() < before]
    versions = [each for each in versions if each.size_bytes >= EMPTY_SIZE_BYTES]
    full = [each for each in versions if each.size_bytes > EMPTY_SIZE_BYTES]
    if not full:
        why = "no version holds channels" if versions else "there is no version"
        why += f" before {before.isoformat()}" if before else ""
        hint = f"to restore it all the same: --key {versions[0].key}" if versions else "check the bucket and the prefix"
        raise Failure(Cause.OTHER, f"cannot restore: s3://{bucket.name}/{bucket.prefix}: {why}", hint)
    log.info("chosen: %s, the newest version%s that holds channels", full[0].key, " before that time" if before else "")
    for empty in versions[: versions.index(full[0])]:
        log.warning("passed over: %s: no channels; LND writes such a file in a recovery", empty.key)
    damaged: Failure | None = None
    for each in full:
        try:
            data, at = bucket.fetch(each.key)
        except Failure as failure:
            if failure.cause is not Cause.OTHER:
                raise
            damaged = damaged or failure
            continue
        if damaged:
            raise Failure(Cause.OTHER, str(damaged), f"the next good one: restore --key {each.key}")
        return each.key, data, at
    raise damaged or AssertionError


NEXT_STEPS = """restored {key}
  {size} bytes, SHA-256 {digest}, counted as of {at} (the earlier of capture and S3's time)
  to {path}
next, as the user that runs LND, with the wallet of the same 24 words (if there is none yet: lncli create, and wait):
  lncli verifychanbackup --multi_file {path}
  lncli restorechanbackup --multi_file {path}
or, for a new wallet, both in one:
  lncli create --multi_file {path}
if LND refuses this version, the one before it:
  {program}{env_file} restore --before {at} --output {before}
never start an old channel.db, never run two nodes of one seed, and never use chantools scbforceclose with a version
that is not the latest: each can cost the money in the channels. More: docs/recovery.md"""


def command_restore(options: argparse.Namespace) -> int:
    """Download one version, verify it, write it to a new file, and print what to do with it."""
    settings = load_settings(os.environ, ["MONITOR_FILE_PATH", "BACKUP_DIRECTORY"])
    bucket, output = Bucket(settings), Path(os.path.abspath(options.output))
    what, directory = f"cannot restore: {output}", Path(os.path.realpath(output.parent))
    homes = [parent for parent in directory.parents if os.path.lexists(parent / "lnd.conf")]
    if homes or is_lnd_directory(directory, settings.monitored):
        hint = "a wrong file there keeps LND from starting: write it elsewhere, lncli takes it from there"
        raise Failure(Cause.OTHER, f"{what}: it is in a directory of LND's", hint)
    try:
        if os.path.lexists(output):
            raise FileExistsError(errno.EEXIST, "it is there already, and nothing is overwritten")
        if options.key is None:
            key, data, at = choose_version(bucket, options.before)
        else:
            key = bucket.prefix + options.key if captured_at(options.key) else options.key
            data, at = bucket.fetch(key, by_name_alone=True)
        write_file(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), output.name, data, new=True)
    except OSError as error:
        raise Failure(Cause.OTHER, f"{what}: {error.strerror}", "name a new file elsewhere with --output") from None
    path, before = shlex.quote(str(output)), shlex.quote(f"{output}.before")
    env_file = f" --env-file {shlex.quote(os.path.abspath(options.env_file))}" if options.env_file else ""
    program = shlex.join([sys.executable, os.path.abspath(sys.argv[0])])
    if len(data) == EMPTY_SIZE_BYTES:
        log.warning("no channels in this version: restoring it brings nothing back from channels")
    facts = {"key": shown(key), "size": len(data), "digest": hashlib.sha256(data).hexdigest(), "at": at.isoformat()}
    print(NEXT_STEPS.format(**facts, path=path, before=before, program=program, env_file=env_file))
    return DONE


def point_in_time(text: str) -> datetime:
    """Parse a time of the command line: ISO 8601, local without an offset; raises ValueError."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as error:
        raise ValueError from error


COMMANDS = {
    "run": (command_run, "watch and back up until stopped; the default when no command is given"),
    "once": (command_run, "back up the current version and whatever is still staged, then exit"),
    "check": (command_check, "is the version on disk now in the bucket, byte for byte?"),
    "list": (command_list, "the versions in the bucket, newest first"),
    "restore": (command_restore, "download one version, verify it, write it to a file"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    prog, description = "s3_backup_lnd_channels.py", "Keep every version of LND's channel.backup in an S3 bucket."
    epilog = "Settings: lnd-backup-env.example. Exit codes: 0 done, 1 failed, 2 wrong usage, 75 try again, 78 settings."
    parser = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    parser.add_argument("--env-file", metavar="FILE", type=Path, help="read settings from FILE; the environment wins")
    parser.add_argument("--version", action="version", version=f"{prog} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name in ("check", "list"):
            command.add_argument("--json", action="store_true", help="print JSON: its fields are in the README")
        if name == "restore":
            which = command.add_mutually_exclusive_group()
            which.add_argument("--key", help="this version: a whole key, or the name alone")
            which.add_argument("--before", metavar="TIME", type=point_in_time, help="the newest before TIME (ISO 8601)")
            command.add_argument("--output", metavar="FILE", default="channel.backup", help="default: %(default)s")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code; nothing that a user can cause ends in a traceback."""
    options = build_parser().parse_args(arguments)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.root.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk behind stderr is no reason for tracebacks
    logging.getLogger("botocore").setLevel(logging.CRITICAL)  # its tracebacks; every failure is explained here
    try:
        for name, value in (read_env_file(options.env_file) if options.env_file else {}).items():
            os.environ.setdefault(name, value)
        for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
            del os.environ[name]  # empty is not set; the SDK would look for a profile, a region of no name
        code = COMMANDS[options.command or "run"][0](options)
        sys.stdout.flush()
    except BrokenPipeError:  # list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Failure as failure:
        say(failure)
        return failure.cause.exit_code
    except ExceptionGroup as faults:
        for fault in faults.exceptions:
            say(fault)  # type: ignore[arg-type]
        return WRONG_CONFIGURATION
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception:
        log.critical("a fault of this program, please report it", exc_info=True)
        return FAILED
    return code


if __name__ == "__main__":
    sys.exit(main())
