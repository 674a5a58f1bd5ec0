#!/usr/bin/env python3
"""Keep every version of LND's channel.backup in an S3 bucket.

LND replaces channel.backup (the static channel backup, SCB) by a rename whenever a channel opens or closes. This
program stages each version, sends it to S3, and deletes the staged copy only when S3 has proved by a receipt that it
holds those bytes. An event is only a bell: what counts is the file, looked at again at every event, every
RESCAN_SECONDS and before leaving. The staging directory is the queue and the only lasting state.

    channel.backup --look--> version --fsync, rename--> staging directory --put, newest first--> bucket
                                                               '<------ receipt, then delete -----'
reads     MONITOR_FILE_PATH, --env-file, the AWS SDK's own files; no other file is read unasked
writes    BACKUP_DIRECTORY, METRICS_FILE; nothing is ever created, locked, renamed or touched in LND's directory
connects  the S3 endpoint, the SDK's configured source of credentials, HEARTBEAT_URL; nothing else
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
import math
import os
import random
import re
import shlex
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

try:
    from datetime import UTC, datetime, timedelta  # UTC since Python 3.11

    import botocore.exceptions as sdk
    import botocore.session  # boto3's core: the rest of boto3 would cost 3 MB, and is not used
    from asyncinotify import InitFlags, Inotify, Mask, Watch
    from botocore.config import Config
    from botocore.parsers import ResponseParserError
    from botocore.utils import get_environ_proxies
    from dotenv import dotenv_values
except ImportError as missing:  # started with another Python than the venv's: no traceback for that
    sys.stderr.write(f"cannot start: {missing}\nhint: use the venv that holds requirements.txt, Python 3.11 or newer\n")
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
ALARM_SECONDS = 600.0  # a trouble that lasts so long is told to the heartbeat
REPORT_SECONDS = 1.0  # a thousand changes in a second are one report
HEARTBEAT_SECONDS = 10.0


# --- Failures and log: what failed, on what, why, and what to do -----------------------------------------------------
CHECK_KEY = "check the access key and its secret, or AWS_PROFILE; changed files are read again"
CHECK_BUCKET = "check the bucket's name, quota and region (AWS_REGION), the endpoint, AWS_CA_BUNDLE"
AWAY = "what is staged stays staged; if it lasts, check the network, and the endpoint: http or https, host, port"


class Cause(enum.Enum):
    """Why something failed: exit code of a one-shot, longest pause in seconds, S3's codes and HTTP statuses, a hint."""

    SETTINGS = WRONG_CONFIGURATION, 300.0, "", ""
    LOCKED = TRY_AGAIN, 60.0, "", "if it is the service, it backs up by itself: see its log"
    ABSENT = FAILED, 60.0, "", ""
    CLOCK = TRY_AGAIN, 60.0, "RequestTimeTooSkewed RequestExpired", "set the clock, as by NTP: S3 compares it"
    CREDENTIALS = FAILED, 300.0, "ExpiredToken InvalidToken TokenRefreshRequired InvalidAccessKeyId 401 403", CHECK_KEY
    DENIED = FAILED, 300.0, "AccessDenied", "if key, bucket and prefix are right, add to the key's policy: {permission}"
    OTHER = FAILED, 60.0, "NoSuchKey InvalidObjectState", "see the message; list shows which versions there are"
    BUCKET = FAILED, 300.0, "NoSuchBucket QuotaExceeded 301 307 308 400 404 405 501 507", CHECK_BUCKET
    NETWORK = TRY_AGAIN, 60.0, "RequestTimeout BadDigest XAmzContentSHA256Mismatch Throttling ThrottlingException", AWAY

    def __init__(self, exit_code: int, pause_seconds: float, codes: str, hint: str) -> None:
        self.exit_code, self.pause_seconds, self.codes, self.hint = exit_code, pause_seconds, codes.split(), hint


class Failure(Exception):
    """What an operator can act on: one line `what failed: on what: why`, and a hint, which also tells kinds apart."""

    def __init__(self, cause: Cause, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.cause, self.hint = cause, hint or cause.hint

    def say(self, suffix: str = "", level: int = logging.ERROR) -> None:
        """Log it and its hint."""
        log.log(level, "%s%s", self, suffix, extra={"hint": self.hint})


Result = TypeVar("Result")
log = logging.getLogger("lnd-backup")
SECRET_NAME = re.compile("(SECRET_ACCESS_KEY|TOKEN|HEARTBEAT_URL)$")


def shown(text: object) -> str:
    """Escape what came from outside, so that nothing forges a line or moves a cursor, and hide secrets."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    for secret in (value for name, value in os.environ.items() if SECRET_NAME.search(name) and value):
        line = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", line)  # put there by a library
    return re.sub(r"(?<!s3:)(//|proxy: (?!http))\S*@", r"\1***@", line)  # who a URL is for; a key may hold an @


class LineFormatter(logging.Formatter):
    """One line per fact, its hint on a second; priorities for journald, times for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, each with a prefix of its own: journald files a bare line as plain information."""
        lines = [record.getMessage()] + ([f"hint: {hint}"] if (hint := getattr(record, "hint", "")) else [])
        lines += self.formatException(record.exc_info).splitlines() if record.exc_info else []
        error = os.fstat(sys.stderr.fileno())
        if os.environ.get("JOURNAL_STREAM") == f"{error.st_dev}:{error.st_ino}":
            prefix = {logging.CRITICAL: "<2>", logging.ERROR: "<3>", logging.WARNING: "<4>"}.get(record.levelno, "<6>")
        else:
            prefix = self.formatTime(record, "%Y-%m-%d %H:%M:%S ")
            prefix += f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return "\n".join(prefix + shown(line) for line in lines)


class Trouble:
    """Something wrong for a while: logged when it begins or changes, hourly while it lasts, and when it is over."""

    failures: ClassVar[Counter[Cause]] = Counter()  # of all troubles

    def __init__(self, over: str) -> None:
        self.over, self.count, self.began_at, self.said_at = over, 0, 0.0, 0.0
        self.failure: Failure | None = None

    def begin(self, failure: Failure) -> Failure:
        """Note a failure, and return it; what passes by itself is a warning."""
        now, passing = time.monotonic(), failure.cause in (Cause.ABSENT, Cause.NETWORK)
        self.failures[failure.cause] += 1
        self.began_at, self.count = (self.began_at, self.count + 1) if self.failure else (now, 1)
        if not self.failure or self.failure.hint != failure.hint or now - self.said_at >= REMINDER_SECONDS:
            suffix = f" ({self.count} times in {now - self.began_at:.0f} s)" if self.count > 1 else ""
            failure.say(suffix, logging.WARNING if passing else logging.ERROR)
            self.said_at = now
        self.failure = failure
        return failure

    def end(self) -> None:
        """Note that it works."""
        if self.failure:
            log.info("%s again, after %d failures in %.0f s", self.over, self.count, time.monotonic() - self.began_at)
            self.failure = None


# --- Settings: environment variables; all faults are found at once, and nothing is written or connected --------------
SECONDS = r"[0-9]{1,9}(\.[0-9]{1,6})?"
HOST = r"([^\s/@]+@)?(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]{1,5})?(/\S*)?"
URL, PROXY = "write a whole URL: https://HOST or http://HOST:PORT", "write http://HOST:PORT; SOCKS is not supported"
LOCAL_HOST = re.compile(r"[^.:]+|::1|fd.*:.*|(127|10|192\.168|172\.(1[6-9]|2\d|3[01]))\.[\d.]+|.*\.(local|lan|onion)")
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
    "METRICS_FILE": ("", "/.*[^/]", "write the whole path of a file, outside LND's directories"),
    "HEARTBEAT_URL": ("", r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:[0-9]{1,5})?([/?][!-~]*)?", URL),
    **dict.fromkeys(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("", f"https?://{HOST}", URL)),
    **dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), ("", f"(https?://)?{HOST}", PROXY)),
    **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), ("", r"\S+", "no blanks")),
}
OF_THE_SERVICE = ("BACKUP_DIRECTORY", "METRICS_FILE", "HEARTBEAT_URL")  # what the commands that read do not need
PATH_NAMES = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "METRICS_FILE")
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
    metrics: str
    heartbeat: str


def read_env_file(path: Path) -> dict[str, str]:
    """Return the settings in an --env-file; raises Failure if systemd's EnvironmentFile= would read it otherwise."""
    what = f"cannot read --env-file: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(Cause.SETTINGS, f"{what}: {getattr(error, 'strerror', 'not UTF-8')}", "check the path") from None
    bare, quoted = r"""[^"'\\#\s]([^"'\\]*[^"'\\\s])?""", r""""[^"\\]*"|'[^'\\]*\'"""
    line = re.compile(rf"\s*(#.*(?<!\\)|(?!export\s)[A-Za-z_]\w*\s*=\s*(?!.*\s#)({bare}|{quoted})?)?\s*", re.ASCII)
    lines = enumerate(text.replace("\t", " ").replace("\r\n", "\n").split("\n"), 1)
    if numbers := [str(number) for number, given in lines if not (line.fullmatch(given) and given.isprintable())]:
        hint = "write KEY=value; export, backslashes and comments behind a value are read differently by systemd"
        raise Failure(Cause.SETTINGS, f"{what}: line {', '.join(numbers)}", hint)
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text), interpolate=False).items()}


def is_lnd_directory(directory: Path, monitored: Path | None) -> bool:
    """Tell whether LND keeps its data or the monitored file here; one that cannot be listed is asked for names."""
    homes = {os.path.realpath(monitored.parent), os.path.dirname(os.path.realpath(monitored))} if monitored else set()
    try:
        names = os.listdir(directory)
    except OSError:
        names = [name for name in ("wallet.db", "admin.macaroon") if os.path.lexists(directory / name)]
    return os.path.realpath(directory) in homes or any(map(LND_NAME.fullmatch, names))


def path_fault(name: str, path: Path, monitored: Path | None) -> tuple[str, str] | None:
    """Return what is wrong with a path of the settings, which may be made later: why, and what to do."""
    whole, user, status = Path(os.path.realpath(path)), os.geteuid(), os.lstat(path) if os.path.lexists(path) else None
    place = shlex.quote(str(path.parent if name == "METRICS_FILE" else path))
    make, fault = f"run: sudo install -d -m 0700 -o {user} {place}", None
    if name == "MONITOR_FILE_PATH":
        if FORBIDDEN_NAME.fullmatch(path.name) or FORBIDDEN_NAME.fullmatch(whole.name):
            fault = "must never be copied", "name channel.backup: a database loses money, a macaroon gives it away"
        elif os.path.isdir(whole):
            fault = "is a directory", f"name the file in it: {path / 'channel.backup'}"
    elif any(is_lnd_directory(each, monitored) for each in (whole, *whole.parents)):
        fault = "is in a directory of LND's", "name another, such as /var/lib/lnd-backup: LND's are only read"
    elif name == "METRICS_FILE" or not status:
        possible = os.access(path.parent, os.W_OK | os.X_OK) and not os.path.isdir(path)
        fault = None if possible else ("cannot be made", make)
    elif not stat.S_ISDIR(status.st_mode):
        fault = "is a link or no directory", f"name another, or move it away and {make}"
    elif status.st_uid != user:
        fault = f"belongs to user #{status.st_uid}, not #{user}", f"run as its owner: sudo -u '#{status.st_uid}' …"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        fault = "must be writable by its owner and nobody else", f"if nothing else uses it, run: chmod 0700 {place}"
    return fault


def sdk_faults(environ: Mapping[str, str]) -> dict[str, tuple[str, str] | None]:
    """Return what is wrong with the SDK's variables where the SDK would find it late, or never."""
    faults: dict[str, tuple[str, str] | None] = {}
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):  # some providers show it so; the bucket is then in the key
        path = re.sub("^[a-z]+://[^/]*", "", environ.get(name, "")).rstrip("/")  # a host may be called like the bucket
        if path.endswith(f"/{environ.get('S3_BUCKET_NAME')}"):
            faults[name] = "ends with the bucket", "leave the bucket's name out"
    try:
        if bundle := environ.get("AWS_CA_BUNDLE"):
            ssl.create_default_context(cafile=bundle)
    except OSError as error:
        faults["AWS_CA_BUNDLE"] = f"cannot be used: {error.strerror}", "name the file that holds the CA's certificate"
    return faults


def load_settings(environ: Mapping[str, str], unneeded: Collection[str] = (), *more: Failure) -> Settings:
    """Return the settings; raises an ExceptionGroup of all faults, and more. Empty counts as not set."""
    values = {name: environ.get(name) or default or "" for name, (default, _, _) in VALUES.items()}
    values["BACKUP_DIRECTORY"] = values["BACKUP_DIRECTORY"] or environ.get("STATE_DIRECTORY", "").split(":")[0]
    faults: dict[str, tuple[str, str] | None] = dict.fromkeys(unneeded)  # to None: `setdefault` finds no fault there
    for name, (default, pattern, advice) in VALUES.items():
        if values[name] and not re.fullmatch(pattern, values[name]):
            faults.setdefault(name, ("cannot be used", advice))
        elif not values[name] and default is None:
            faults.setdefault(name, ("is not set", advice))
    paths = {name: Path(os.path.abspath(values[name] or os.devnull)) for name in PATH_NAMES}
    monitored = None  # until it, the first of them, is judged
    for name, path in paths.items():
        if values[name]:
            faults.setdefault(name, path_fault(name, path, monitored))
        monitored = None if faults.get("MONITOR_FILE_PATH") else paths["MONITOR_FILE_PATH"]
    faults = sdk_faults(environ) | faults
    failures = []
    for name, (why, hint) in ((name, fault) for name, fault in faults.items() if fault):
        value = values.get(name) or environ.get(name, "")
        value = "***" if "_KEY" in name or SECRET_NAME.search(name) or "@" in value else value
        failures.append(Failure(Cause.SETTINGS, f"configuration: {name}={value}: {why}", hint))
    if not any("AWS_ENDPOINT_URL" in str(each) for each in failures):  # else the SDK says the same, passwords included
        failures += more
    if failures:
        raise ExceptionGroup("configuration", failures)
    return Settings(
        monitored=monitored or Path(),
        staging=paths["BACKUP_DIRECTORY"],
        bucket=values["S3_BUCKET_NAME"],
        prefix=values["S3_BACKUP_PREFIX"] and values["S3_BACKUP_PREFIX"].rstrip("/") + "/",
        rescan_seconds=float(values["RESCAN_SECONDS"]),
        refresh_seconds=float(values["REFRESH_SECONDS"]),
        grace_seconds=float(values["SHUTDOWN_GRACE_SECONDS"]),
        metrics=values["METRICS_FILE"],
        heartbeat=values["HEARTBEAT_URL"],
    )


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


def read_channel_backup(path: Path) -> bytes:
    """Return the version at this path now, read by one descriptor: a rename cannot mix two. Raises Failure."""
    what, hint = f"cannot read channel.backup: {path}", "let MONITOR_FILE_PATH name LND's channel.backup"
    try:
        whole = os.path.realpath(path, strict=True)  # a link may be switched at any time: checked at every read
        with open(os.open(whole, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            before = os.fstat(file.fileno())
            allowed = stat.S_ISREG(before.st_mode) and not FORBIDDEN_NAME.fullmatch(os.path.basename(whole))
            data = file.read(min(before.st_size, LARGEST_SIZE_BYTES) + 1) if allowed else b""
            after = os.fstat(file.fileno())
    except OSError as error:
        raise node_failure(what, error) from None
    if not allowed:
        raise Failure(Cause.OTHER, f"{what}: it is {whole}, no regular file or one that must never be copied", hint)
    size, unchanged = after.st_size, before.st_mtime_ns == after.st_mtime_ns
    if size <= LARGEST_SIZE_BYTES and not (len(data) == before.st_size == size and unchanged):
        raise Failure(Cause.ABSENT, f"{what}: it changed while it was read", "it is read again in a moment")
    if not EMPTY_SIZE_BYTES <= size <= LARGEST_SIZE_BYTES:
        why = f"{size} bytes cannot be a channel backup ({EMPTY_SIZE_BYTES} to {LARGEST_SIZE_BYTES})"
        raise Failure(Cause.OTHER, f"{what}: {why}", "not written by LND; the last good version stays the newest")
    return data


def node_failure(what: str, error: OSError) -> Failure:
    """Return what the system refused on LND's side, as a failure with what to do."""
    hint = {
        errno.ENOENT: "LND makes it when it starts; if LND runs, compare the path with its settings",
        errno.EACCES: "this user needs r on the file, r and x on its directory, and x on all directories above",
        errno.ENOSPC: "raise it: sysctl fs.inotify.max_user_watches",
        errno.EMFILE: "raise it: sysctl fs.inotify.max_user_instances, or the limit of open files",
    }.get(error.errno or 0, "check the path and its file system")
    return Failure(Cause.ABSENT if error.errno == errno.ENOENT else Cause.OTHER, f"{what}: {error.strerror}", hint)


# --- Staging: the directory that is the queue, and what is remembered across restarts --------------------------------
class Stored(NamedTuple):
    """A version in the bucket: as S3's receipt proves it, or as the bucket lists it; stored_at is ISO 8601, UTC."""

    name: str
    key: str
    size_bytes: int
    stored_at: str
    sha256: str = ""  # in a receipt only
    bucket: str = ""  # in a receipt only, behind the endpoint's host: HOST/BUCKET

    def at(self) -> datetime:
        """Return the earlier of capture and storing: no clock that ran ahead, and no thief, names one the newest."""
        captured, stored_at = captured_at(self.name), datetime.fromisoformat(self.stored_at)
        # S3 cuts its times to the second; within one, the name decides.
        return captured if captured and captured < stored_at + timedelta(seconds=1) else stored_at

    def age_seconds(self) -> float:
        """Return how long ago it was stored, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.stored_at)).total_seconds()

    def as_json(self) -> dict[str, Any]:
        """Return the fields that scripts may rely on."""
        fields = {"name": self.name, "key": self.key, "size_bytes": self.size_bytes, "stored_at": self.stored_at}
        captured = captured_at(self.name) or self.at()
        return fields | {"captured_at": captured.isoformat(), "empty": self.size_bytes == EMPTY_SIZE_BYTES}

    def marks(self, older: Stored | None) -> list[str]:
        """Return what deserves a look, beside the version before it that holds channels."""
        empty, captured = self.size_bytes == EMPTY_SIZE_BYTES, captured_at(self.name) or self.at()
        shrunk = older is not None and not empty and self.size_bytes * 2 < older.size_bytes
        late = captured > self.at() + timedelta(minutes=1)
        marks = {"no channels": empty, "much smaller than the one before": shrunk, "named later than stored": late}
        return [mark for mark, is_so in marks.items() if is_so]


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
        return receipt if captured_at(receipt.name) and receipt.at() else None  # `at` raises if stored_at is no time
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
        self.changed, self.news = asyncio.Event(), asyncio.Event()  # bells: something to send (or to stop); to report
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
            self.receipt = self.remembered = recall_receipt(directory)
            self.newest = max([*self.names(), self.receipt.name if self.receipt else ""])  # the highest name given
        except BlockingIOError:
            raise Failure(Cause.LOCKED, f"cannot start: {directory}: another copy holds it") from None
        except OSError as error:
            hint = "check its owner, its mode, and that its file system is writable and not full"
            raise Failure(Cause.SETTINGS, f"cannot use BACKUP_DIRECTORY: {directory}: {error.strerror}", hint) from None

    def names(self) -> list[str]:
        """Return the names of the versions still to be sent, newest first; raises Failure."""
        try:
            files = [entry.name for entry in os.scandir(self.fd) if entry.is_file(follow_symlinks=False)]
        except OSError as error:
            hint = "check the disk, and the limit of open files"
            raise Failure(Cause.OTHER, f"cannot list: {self.directory}: {error.strerror}", hint) from None
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
        Failure(Cause.OTHER, f"damaged: {self.directory / name}: its bytes are not those of its name", hint).say()
        return None

    def stage(self, data: bytes) -> None:
        """Stage a version under a new name and ring the bell; where that is impossible, keep it in memory."""
        self.newest = name = version_name(hashlib.sha256(data).hexdigest(), datetime.now(UTC), self.newest)
        self.held[name] = data
        self.settle()
        remark = "" if len(data) >= ONE_CHANNEL_SIZE_BYTES else ", a size that no known LND writes; backed up anyway"
        remark = ", no channels: a new node, or LND in a recovery" if len(data) == EMPTY_SIZE_BYTES else remark
        log.log(logging.WARNING if remark else logging.INFO, "captured %s: %d bytes%s", name, len(data), remark)
        self.changed.set()

    def is_newest(self, data: bytes) -> bool:
        """Tell whether the newest version still to be sent has these bytes; if the disk cannot tell, by its name."""
        try:
            return any(self.load(name) == data for name in self.names()[:1])
        except (OSError, Failure):
            return self.newest.endswith(hashlib.sha256(data).hexdigest()[-6:])

    def discard(self, receipt: Stored) -> None:
        """Remember a receipt, if it is the newest, and delete the version that it proves stored."""
        self.held.pop(receipt.name, None)
        self.delivered.add(receipt.name)
        self.receipt = max(receipt, self.receipt or receipt)  # by name
        self.newest = max(self.newest, receipt.name)  # which somebody may have laid there
        self.settle()

    def settle(self) -> None:
        """Do what is to be done on disk, and what it refused to do before; what fails is tried again at each look."""
        refused: tuple[str, OSError] | None = None
        with contextlib.suppress(OSError):  # before deleting what it proves; on a full disk it fits only after that
            self.remember()
        for what, step in (("tidy up", self.delete), ("remember", self.remember), ("stage", self.place)):
            try:
                step()
            except OSError as error:
                refused = what, error
        for name in sorted(self.held)[:-HELD_COUNT_MAX]:
            log.error("gave up %s: the disk refuses it, S3 does not take it, and there are newer ones", name)
            del self.held[name]
        if refused:
            message = f"cannot {refused[0]}: {self.directory}: {refused[1].strerror}"
            self.trouble.begin(Failure(Cause.OTHER, message, "free or repair the disk; versions are sent from memory"))
        else:
            self.trouble.end()

    def remember(self) -> None:
        """Write the newest receipt."""
        if self.receipt and self.receipt is not self.remembered:
            write_file(self.fd, ".receipt", json.dumps(self.receipt._asdict()).encode())
            self.remembered = self.receipt

    def delete(self) -> None:
        """Delete what was delivered."""
        for name in sorted(self.delivered):
            with contextlib.suppress(FileNotFoundError):  # it was never on disk
                os.unlink(name, dir_fd=self.fd)
            self.delivered.discard(name)

    def place(self) -> None:
        """Put on disk what is only in memory, newest first."""
        for name in sorted(self.held, reverse=True):
            write_file(self.fd, name, self.held[name])
            del self.held[name]


# --- S3: one client, one put that proves itself, and every error explained -------------------------------------------
# The SDK's exceptions; a credential program that fails raises neither a ClientError nor a BotoCoreError (1.44).
CLASSES: tuple[tuple[Cause, tuple[type[Exception], ...]], ...] = (
    (Cause.CREDENTIALS, (sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.SSOError, sdk.LoginError)),
    (Cause.NETWORK, (sdk.CredentialRetrievalError, sdk.MetadataRetrievalError, sdk.TokenRetrievalError)),
    (Cause.NETWORK, (ResponseParserError, RecursionError)),  # a web page; one that redirects, to the SDK (1.44)
    (Cause.NETWORK, (sdk.ConnectionError, sdk.HTTPClientError, sdk.IncompleteReadError, OSError, json.JSONDecodeError)),
    (Cause.BUCKET, (sdk.BotoCoreError, ValueError)),
)


def explain(what: str, error: Exception, permission: str = "") -> Failure:
    """Return an error of the SDK as a failure with its cause and what to do; a pure function."""
    if isinstance(error, sdk.ClientError):
        code, text = (error.response.get("Error", {}).get(part, "") for part in ("Code", "Message"))
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        found = [cause for each in (code, status) for cause in Cause if each in cause.codes]  # S3's word comes first
        unknown = Cause.NETWORK if re.fullmatch("408|409|425|429|5..", status) else Cause.OTHER
        cause, why = [*found, unknown][0], f"{code}: {text} (HTTP {status})"
    else:
        why = " ".join(str(error).split()) or type(error).__name__
        cause = next((cause for cause, classes in CLASSES if isinstance(error, classes)), Cause.OTHER)
        if "CERTIFICATE_VERIFY_FAILED" in why or "doesn't match" in why:  # the certificate is for another name
            cause = Cause.CLOCK if "not yet valid" in why or "expired" in why else Cause.BUCKET
        _, _, reason = str(getattr(error, "kwargs", {}).get("error", "")).rpartition(": ")
        why += f" ({reason})" if reason not in why else ""  # botocore may keep it to itself
        why = re.sub(r"(header value) b?'.*?'", r"\1 ***", why)  # a session token with a line break in it
    return Failure(cause, f"{what}: {why}", cause.hint.replace("{permission}", permission))


def is_on_ec2(dmi: Path) -> bool:
    """Tell whether this machine's bios_vendor, bios_version or sys_vendor is Amazon's; one that does not say is not."""
    with contextlib.suppress(OSError):
        return any("amazon" in path.read_text().lower() for path in dmi.glob("*s_ve*"))
    return False


class Damaged(Failure):
    """An object that is not what its name and metadata say."""


class Bucket:
    """The bucket, by way of one SDK client: made at the first use, and anew when its credentials or settings fail."""

    def __init__(self) -> None:
        """Check what can be checked on this machine, without asking any source of credentials; raises Failure."""
        self.name, self.prefix, self.using = "", "", ""
        self.session: Any = None
        self.client: Any = None
        try:
            self.new_client(aws_access_key_id="-", aws_secret_access_key="-")  # noqa: S106
        except Exception as error:
            hint = "check AWS_PROFILE, AWS_REGION, the endpoint, and the SDK's files (AWS_CONFIG_FILE)"
            raise Failure(Cause.SETTINGS, str(explain("configuration: AWS SDK", error)), hint) from None

    def new_client(self, **credentials: str) -> Any:
        """Return an SDK client, its limits explicit; what the user chose in the environment or a file is left alone."""
        if not (is_on_ec2(Path("/sys/class/dmi/id")) or os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")):
            os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")  # off EC2, nobody is asked for a role
        self.session = self.session or botocore.session.get_session()  # only a new one reads changed files
        chosen = {name for name, value in self.session.get_scoped_config().items() if value}
        chosen |= {name[4:].lower() for name, value in os.environ.items() if name.startswith("AWS_") and value}
        limits: dict[str, Any] = {"connect_timeout": ATTEMPT_SECONDS, "read_timeout": ATTEMPT_SECONDS}
        for checksums in {"request_checksum_calculation", "response_checksum_validation"} - chosen:
            limits[checksums] = "when_required"  # else trailers, which break many stores (boto3#4392)
        if not chosen & {"max_attempts", "retry_mode"}:  # the SDK's own attempts run dry; the uploader's never do
            limits["retries"] = {"mode": "standard", "total_max_attempts": 1}
        region = os.environ.get("AWS_REGION") or None  # which people set, and the SDK ignores
        client = self.session.create_client("s3", region_name=region, config=Config(**limits), **credentials)
        self.host, self.partition = str(urlsplit(client.meta.endpoint_url).hostname), client.meta.partition
        self.is_aws = self.host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        on = client.meta.events.register
        # It costs a round trip, and a second where a proxy ignores it (botocore#3613).
        on("before-sign.s3.PutObject", lambda request, **_: request.headers.__delitem__("Expect"))
        # The body of the answer tells a receipt, which has none, from the page of a captive portal.
        on("after-call.s3.PutObject", lambda http_response, parsed, **_: parsed.update(Body=http_response.content))
        return client

    def connect(self) -> None:
        """Make the client if there is none, and log what is in use if that is new; raises what the SDK raises."""
        if self.client is None:
            self.client, credentials = self.new_client(), self.session.get_credentials()
            meta, method = self.client.meta, credentials.method if credentials else "none"
            url, proxies = urlsplit(meta.endpoint_url), get_environ_proxies(meta.endpoint_url)
            using = f"endpoint {meta.endpoint_url}, region {meta.region_name}, credentials: {method}"
            using += f", proxy: {proxies[url.scheme]}" if url.scheme in proxies else ""
            if using != self.using:
                log.info("using %s", using)
                if url.scheme == "http" and not LOCAL_HOST.fullmatch(str(url.hostname)):
                    hint = "use https: whoever is on the way can read along and forge receipts"
                    log.warning("not encrypted: %s", meta.endpoint_url, extra={"hint": hint})
            self.using = using

    def call(self, what: str, action: str, permission: str, **arguments: Any) -> dict[str, Any]:
        """Call one operation of S3 and return its answer; raises Failure."""
        try:
            self.connect()
            answer: dict[str, Any] = getattr(self.client, action)(Bucket=self.name, **arguments)
            if action == "get_object":  # within the time that the call may take; what is too large stays there
                fits = answer.get("ContentLength", math.inf) <= LARGEST_SIZE_BYTES
                answer["Body"] = answer["Body"].read() if fits else b""
        except Exception as error:
            resource = f"arn:{self.partition}:s3:::{self.name}" + (f"/{self.prefix}*" if "Object" in permission else "")
            failure = explain(what, error, json.dumps({"Effect": "Allow", "Action": permission, "Resource": resource}))
            if not isinstance(error, (sdk.ConnectionError, sdk.HTTPClientError)):
                self.client = self.session = None  # the next attempt reads the AWS settings and credentials anew
            raise failure from error
        return answer

    def put(self, name: str, data: bytes) -> Stored:
        """Send a version and return S3's receipt; raises Failure. The same version twice is the same object."""
        key, digest = self.prefix + name, hashlib.sha256(data)
        what, checksum = f"cannot store: s3://{self.name}/{key}", base64.b64encode(digest.digest()).decode()
        check: dict[str, Any] = {"ChecksumSHA256": checksum, "ChecksumAlgorithm": "SHA256"}
        if not self.is_aws:  # the one check that nearly every store honours, and Object Lock accepts
            check = {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
        # A stream is sent in small blocks, each with a time-out of its own, as a slow uplink needs it.
        check |= {"Key": key, "Body": io.BytesIO(data), "Metadata": {"sha256": digest.hexdigest()}}
        answer = self.call(what, "put_object", "s3:PutObject", **check)
        if not answer.get("ETag") or answer["Body"] or answer.get("ChecksumSHA256", checksum) != checksum:
            hint = "something answers in S3's place (a captive portal, a proxy): open a web page, check the endpoint"
            raise Failure(Cause.NETWORK, f"{what}: the answer is no receipt", hint)
        stored_at, where = datetime.now(UTC).isoformat(), f"{self.host}/{self.name}"
        return Stored(name, key, len(data), stored_at, digest.hexdigest(), where)

    def ask(self, what: str, action: str, permission: str, **arguments: Any) -> dict[str, Any]:
        """Call one operation of S3 for a one-shot, which gives up when there is no answer; raises Failure."""
        seconds = ATTEMPT_SECONDS + ONE_SHOT_PATIENCE_SECONDS
        return asyncio.run(in_daemon_thread(seconds, what, lambda: self.call(what, action, permission, **arguments)))

    def versions(self) -> tuple[list[Stored], int]:
        """Return the versions right under the prefix, newest first, and the number of other keys; raises Failure."""
        what, count, found = f"cannot list: s3://{self.name}/{self.prefix}", 0, []
        page = {"Prefix": self.prefix, "Delimiter": "/"}
        while True:
            answer = self.ask(what, "list_objects_v2", "s3:ListBucket", **page)
            if "IsTruncated" not in answer:
                raise Failure(Cause.NETWORK, f"{what}: the answer is not S3's", "a captive portal, or another server?")
            count += len(answer.get("CommonPrefixes", [])) + len(answer.get("Contents", []))
            for entry in answer.get("Contents", []):
                name, stored_at = entry["Key"].removeprefix(self.prefix), entry["LastModified"].astimezone(UTC)
                if captured_at(name):
                    found.append(Stored(name, entry["Key"], entry["Size"], stored_at.isoformat()))
            if not answer["IsTruncated"]:
                return sorted(found, key=lambda each: (each.at(), each.name), reverse=True), count - len(found)
            page["ContinuationToken"] = answer["NextContinuationToken"]

    def fetch(self, key: str, *, by_name_alone: bool = False) -> tuple[bytes, Stored]:
        """Return the bytes of a version, if they fit metadata and name, and what S3 says of it; raises Failure."""
        what = f"cannot use s3://{self.name}/{key}"
        answer = self.ask(what, "get_object", "s3:GetObject", Key=key)
        if not {"ETag", "LastModified"} <= answer.keys():
            raise Failure(Cause.NETWORK, f"{what}: the answer is not S3's", "a captive portal, or another server?")
        data: bytes = answer["Body"]
        metadata = {name.lower(): value for name, value in answer["Metadata"].items()}  # some stores write Sha256
        digest, wanted = hashlib.sha256(data).hexdigest(), metadata.get("sha256")
        if len(data) < EMPTY_SIZE_BYTES or wanted not in (None, digest) or key[-6:] != digest[-6:]:
            raise Damaged(Cause.OTHER, f"{what}: damaged: its bytes are not those of its name and metadata")
        if wanted is None and not by_name_alone:
            hint = "another program stored it; --key with this key trusts the six digits of its name"
            raise Damaged(Cause.OTHER, f"{what}: no sha256 in its metadata", hint)
        if wanted is None:
            log.warning("only the six digits of its name could be checked: %s", key)
        stored_at = answer["LastModified"].astimezone(UTC).isoformat()
        return data, Stored(key.rpartition("/")[2], key, len(data), stored_at)


async def in_daemon_thread(seconds: float, what: str, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a thread that cannot delay the end of the process, as asyncio.to_thread's would.

    Raises what it raises, and Failure after so many seconds; that, and being cancelled, abandons the thread.
    """
    kind = what.partition(":")[0]
    if sum(thread.name == kind for thread in threading.enumerate()) >= STUCK_THREADS_MAX:
        raise Failure(Cause.NETWORK, f"{what}: {STUCK_THREADS_MAX} attempts hang", "a credential program that hangs?")
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name=kind, daemon=True).start()
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
        self.seen = ""  # SHA-256 of the last version; nothing was seen at the start
        if os.path.islink(settings.monitored):
            log.warning("%s is a link: no event comes from its target, only rescans see changes", settings.monitored)
        for name in ("admin.macaroon", "wallet.db"):
            if os.access(settings.monitored.parent / name, os.R_OK):
                log.warning("this user can read %s: docs/access.md has a way without", settings.monitored.parent / name)

    async def run(self) -> None:
        """Watch until cancelled, which may happen at any time, and look once more before returning."""
        most = min(self.settings.rescan_seconds, float(os.environ.get("WATCHDOG_USEC") or "inf") / 3e6)
        most = min(most, self.settings.refresh_seconds or most)
        try:
            while not (self.listener and self.listener.done()):
                self.bell.clear()
                self.look()
                notify_systemd("WATCHDOG=1")
                # In trouble it is not watched, or the file is absent or being written.
                await rings(self.bell, min(most, 1.0) if self.trouble.failure else most)
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
        self.staging.settle()
        self.staging.news.set()
        failure, self.unread = self.arm(), None
        try:
            data = read_channel_backup(self.settings.monitored)
        except Failure as unread:
            self.unread = self.trouble.begin(unread)
            return False
        self.trouble.begin(failure) if failure else self.trouble.end()
        digest, receipt, refresh = hashlib.sha256(data).hexdigest(), self.staging.receipt, self.settings.refresh_seconds
        age = receipt.age_seconds() if receipt else math.inf  # below 0: the clock was set back, and nothing is sure
        is_proved = receipt is not None and receipt.sha256 == digest and (refresh == 0 or 0 <= age < refresh)
        # At the start, for a refresh, and if its staged copy was damaged or removed, the same version is staged anew.
        anew = not self.seen or (self.seen == digest and not is_proved)
        is_new = not self.staging.is_newest(data) if anew else self.seen != digest
        if is_new:
            self.staging.stage(data)
        self.seen = digest
        return is_new


# --- Uploading: newest first, for ever, and a staged version is deleted only on its receipt --------------------------
class Uploader:
    """Sends what is staged; the only user of the bucket while the daemon runs."""

    def __init__(self, staging: Staging, bucket: Bucket) -> None:
        self.staging, self.bucket, self.trouble = staging, bucket, Trouble("S3 stores versions")
        self.failure: Failure | None = None  # of the last attempt
        self.attempt_seconds = ATTEMPT_SECONDS

    async def run(self, stopping: asyncio.Event, patience_seconds: float = math.inf) -> None:
        """Send until cancelled (a version in flight stays staged), or, if stopping, until all are sent or hope ends."""
        doublings, give_up_at = 0, time.monotonic() + patience_seconds
        # Each of connect, proxy, TLS and answer may take long, as over Tor; a one-shot is to end within a minute.
        self.attempt_seconds = ATTEMPT_SECONDS if patience_seconds < math.inf else 4 * ATTEMPT_SECONDS
        while True:
            self.failure = await self.send_staged()
            self.staging.news.set()
            pause = CONNECTION_IDLE_SECONDS
            if self.failure:  # doubled at each failure up to the cause's limit, half of it jitter
                longest = min(self.failure.cause.pause_seconds, BACKOFF_FIRST_SECONDS * 2.0 ** min(doublings, 16))
                pause = longest * random.uniform(0.5, 1.0)
            hope = self.failure and self.failure.cause.exit_code == TRY_AGAIN and time.monotonic() + pause < give_up_at
            if stopping.is_set() and not (hope or self.staging.changed.is_set()):
                return
            rang = await rings(self.staging.changed, pause)
            doublings = 0 if rang or not self.failure else doublings + 1  # what is new is tried at once, and anew
            if not rang and not self.failure:
                if client := self.bucket.client:
                    client.close()
                await self.staging.changed.wait()

    async def send_staged(self) -> Failure | None:
        """Send all that is staged, newest first, until something newer comes; return the failure that is left."""
        self.staging.changed.clear()  # before looking, so that what comes meanwhile rings again
        left, name = None, "anything"
        try:
            if self.bucket.client is None:  # the log says at the start what is in use, also if there is nothing to send
                await in_daemon_thread(self.attempt_seconds, "cannot prepare: S3", self.bucket.connect)
            for name in self.staging.names():
                if self.staging.changed.is_set():
                    break
                try:
                    data = self.staging.load(name)
                except OSError as error:  # the others can go all the same
                    message = f"cannot read: {self.staging.directory / name}: {error.strerror}"
                    left = self.trouble.begin(Failure(Cause.OTHER, message, "check its owner and mode, and the disk"))
                    continue
                if data is not None:
                    seconds = self.attempt_seconds + len(data) / 4000.0  # bytes per second
                    receipt = await in_daemon_thread(seconds, f"cannot store: {name}", self.bucket.put, name, data)
                    self.trouble.end()
                    log.info("stored s3://%s/%s: %d bytes", self.bucket.name, receipt.key, receipt.size_bytes)
                    self.staging.discard(receipt)
            if not left and not self.staging.changed.is_set():
                self.trouble.end()  # nothing waits, not even for credentials
        except Exception as error:
            if not error.__cause__:  # not from Bucket.call: its thread may have been given up, and hold their locks
                self.bucket.client = self.bucket.session = None
            return self.trouble.begin(error if isinstance(error, Failure) else explain(f"cannot store: {name}", error))
        return left


# --- Reporting: systemd, the metrics file and the heartbeat hear how it goes, and cannot harm a backup ----------------
def notify_systemd(state: str) -> None:
    """Tell systemd (sd_notify(3)); that nobody listens is no reason to fail."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.sendall(state.encode())


class Reporter:
    """Tells those who watch over the service what is stored, what is staged and what is wrong."""

    def __init__(self, settings: Settings, staging: Staging, troubles: list[Trouble]) -> None:
        self.settings, self.staging, self.troubles = settings, staging, troubles
        self.writing, self.beating = Trouble("METRICS_FILE is written"), Trouble("HEARTBEAT_URL answers")
        self.beat_for, self.alarmed = staging.receipt, False  # what was told last
        self.metrics: list[str] = []

    async def run(self) -> None:
        """Report every change, many at once as one, until cancelled, which may happen at any time."""
        if self.settings.heartbeat and not self.settings.refresh_seconds:
            log.warning("REFRESH_SECONDS=0: a node whose channels do not change sends no heartbeat, and looks dead")
        reported_at = -math.inf
        while True:
            await self.staging.news.wait()
            await asyncio.sleep(max(reported_at + REPORT_SECONDS - time.monotonic(), 0))
            self.staging.news.clear()
            await self.report()
            reported_at = time.monotonic()

    async def report(self) -> None:
        """Report how it goes; that nobody can be told is itself a trouble, and no more."""
        names = self.tell()
        try:
            await self.beat(names)
        except Exception as error:
            message = str(explain("cannot reach HEARTBEAT_URL", error))
            self.beating.begin(Failure(Cause.NETWORK, message, "backups go on; check the URL, and who answers there"))

    def tell(self) -> list[str] | None:
        """Write METRICS_FILE and the status line; return the names of what is staged, None if the disk refuses them."""
        names, receipt = None, self.staging.receipt
        stored_at = datetime.fromisoformat(receipt.stored_at) if receipt else None
        try:
            names = self.staging.names()
            self.write_metrics(names, stored_at)
            self.writing.end()
        except Failure as failure:
            self.writing.begin(failure)
        stored = f"stored {stored_at:%F %T} UTC" if stored_at else "nothing stored yet"
        wrong = [str(trouble.failure) for trouble in (*self.troubles, self.writing) if trouble.failure]
        staged = f"{'?' if names is None else len(names)} staged"
        notify_systemd("STATUS=" + shown("; ".join([f"{stored}, {staged}", *wrong])))
        return names

    def write_metrics(self, names: list[str], stored_at: datetime | None) -> None:
        """Write METRICS_FILE for node_exporter's textfile collector, if anything changed; raises Failure."""
        receipt = self.staging.receipt
        times = {
            "last_stored": stored_at,
            "last_seen": captured_at(self.staging.newest),
            "oldest_staged": captured_at(names[-1]) if names else None,
        }
        values = {f"{name}_timestamp_seconds": at.timestamp() if at else 0 for name, at in times.items()}
        values |= {"staged": len(names), "last_size_bytes": receipt.size_bytes if receipt else 0}
        lines = [f"# TYPE lnd_backup_{name} gauge\nlnd_backup_{name} {value:.0f}\n" for name, value in values.items()]
        failures = [f'_total{{cause="{cause.name.lower()}"}} {Trouble.failures[cause]}' for cause in Cause]
        lines += ["# TYPE lnd_backup_failures_total counter\n", *(f"lnd_backup_failures{each}\n" for each in failures)]
        if self.settings.metrics and not (lines == self.metrics and os.path.exists(self.settings.metrics)):
            self.place_metrics("".join(lines))
        self.metrics = lines

    def place_metrics(self, text: str) -> None:
        """Replace METRICS_FILE in one step, readable by others; raises Failure."""
        part = Path(self.settings.metrics + ".partial")
        try:
            part.unlink(missing_ok=True)  # it may be a link: others may write there
            with part.open("x") as file:
                file.write(text)
            part.chmod(0o644)
            part.rename(self.settings.metrics)
        except OSError as error:
            hint = "check its directory, and that the disk is not full"
            raise Failure(Cause.OTHER, f"cannot write METRICS_FILE: {part}: {error.strerror}", hint) from None

    async def beat(self, names: list[str] | None) -> None:
        """Request HEARTBEAT_URL when the bucket holds the current file, URL/fail when a trouble lasts ten minutes."""
        wrong, receipt = [trouble for trouble in self.troubles if trouble.failure], self.staging.receipt
        lasting = [str(each.failure) for each in wrong if time.monotonic() - each.began_at >= ALARM_SECONDS]
        current = receipt and not wrong and names is not None and max(names, default="") < receipt.name
        good = current and (receipt is not self.beat_for or self.alarmed)
        url, body = urlsplit(self.settings.heartbeat), None
        if lasting and not self.alarmed:
            url, body = url._replace(path=url.path.rstrip("/") + "/fail"), shown("; ".join(lasting)).encode()
        if url.scheme and (good or body):
            # No redirects: whoever answers in the heartbeat's place cannot send the request elsewhere.
            handler = type("NoRedirect", (urllib.request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
            request = partial(urllib.request.build_opener(handler).open, url.geturl(), body, HEARTBEAT_SECONDS)
            (await in_daemon_thread(2 * HEARTBEAT_SECONDS, "cannot reach HEARTBEAT_URL", request)).close()
            self.beat_for, self.alarmed = receipt, bool(lasting)
            self.beating.end()


# --- The daemon: one function owns all tasks -------------------------------------------------------------------------
def install_handlers(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """Return what the first signal sets; a second one ends the process, and so does a fault in the loop's callbacks."""
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():  # the second was waiting already, or this is a one-shot
            os._exit(128 + number)
        for each in (signal.SIGTERM, signal.SIGINT):  # not by the loop, which a slow disk may hold up
            signal.signal(each, lambda second, _: os._exit(128 + second))
        log.info("stopping: %s", signal.Signals(number).name)
        stopping.set()

    def on_exception(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A failing reader callback is called again for ever, and no task hears of it.
        log.critical("a fault of this program: %s", context["message"], exc_info=context.get("exception"))
        os._exit(FAILED)

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, on_signal, each)
    loop.set_exception_handler(on_exception)
    return stopping


async def run_daemon(settings: Settings, bucket: Bucket, *, once: bool) -> int:
    """Watch and upload until a signal, or once; return the exit code. Raises Failure, and whatever ends a task."""
    staging = Staging(settings.staging)
    watcher, uploader = Watcher(settings, staging), Uploader(staging, bucket)
    reporter = Reporter(settings, staging, [watcher.trouble, uploader.trouble, staging.trouble])
    stopping = install_handlers(asyncio.get_running_loop())
    watcher.look()
    log.info("watching %s, staging in %s, %d staged", settings.monitored, settings.staging, len(staging.names()))
    notify_systemd("READY=1")
    if once:
        stopping.set()
    uploading = asyncio.create_task(uploader.run(stopping, ONE_SHOT_PATIENCE_SECONDS if once else math.inf))
    others = (watcher.run(), stopping.wait(), *([] if once else [reporter.run()]))
    tasks: list[asyncio.Task[Any]] = [uploading, *(asyncio.create_task(each) for each in others)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        notify_systemd(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={(settings.grace_seconds + 5) * 1e6:.0f}")
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
    if once:
        left = say_what_is_left(staging)
        await reporter.report()
        failure, otherwise = (uploader.failure, TRY_AGAIN) if left else (watcher.unread, DONE)
        if failure:
            log.error("not done: %s", failure)
        return failure.cause.exit_code if failure else otherwise
    try:
        say_what_is_left(staging)
        reporter.tell()
    except Failure as untold:
        untold.say()  # the stop is an orderly one all the same
    return DONE


def say_what_is_left(staging: Staging) -> int:
    """Log and return how many versions were not sent; raises Failure."""
    if staging.held:
        log.error("lost with memory: %d versions that neither the disk nor S3 took", len(staging.held))
    left = len(staging.names())
    log.info("stopped, %d versions staged for the next start", left - len(staging.held))
    return left


async def drain(watcher: Watcher, uploader: Uploader, uploading: asyncio.Task[None], stopping: asyncio.Event) -> None:
    """Look, and send until nothing is left and a look finds nothing more; to be cancelled when the time is over."""
    watcher.look()
    uploader.staging.changed.set()  # a pause between attempts ends here
    await uploading
    while watcher.look() or (uploader.staging.changed.is_set() and not uploader.failure):
        await uploader.run(stopping)


# --- The commands ----------------------------------------------------------------------------------------------------
def configure(*unneeded: str) -> tuple[Settings, Bucket]:
    """Return what a command works with, nothing connected; raises an ExceptionGroup of all faults, the SDK's too."""
    faults = []
    try:
        bucket = Bucket()
    except Failure as failure:
        faults.append(failure)
    settings = load_settings(os.environ, unneeded, *faults)
    bucket.name, bucket.prefix = settings.bucket, settings.prefix
    return settings, bucket


def command_run(options: argparse.Namespace) -> int:
    """Run the daemon, or one pass of it."""
    return asyncio.run(run_daemon(*configure(), once=options.command == "once"))


def ago(then: datetime) -> str:
    """Return how long ago that was, in words."""
    seconds = max((datetime.now(UTC) - then).total_seconds(), 0)
    units = (("years", 31557600), ("months", 2629800), ("days", 86400), ("hours", 3600), ("minutes", 60))
    return next((f"{seconds / unit:.0f} {name}" for name, unit in units if seconds >= 2 * unit), f"{seconds:.0f} s")


def check_bucket(bucket: Bucket, data: bytes) -> tuple[bool, Stored | None, str]:
    """Return whether the bucket holds these bytes, by which version or else the newest, a remark; raises Failure."""
    versions, remark, digits = bucket.versions()[0], "", hashlib.sha256(data).hexdigest()[-6:]
    for each in (each for each in versions if each.name.endswith(digits)):
        try:
            if bucket.fetch(each.key, by_name_alone=True)[0] == data:
                return True, each, f", but {versions[0].key} is newer" if each is not versions[0] else ""
        except Damaged:
            remark = f"damaged in the bucket: {each.key}"
    return False, next(iter(versions), None), remark


def check_receipt(settings: Settings, bucket: Bucket, digest: str) -> tuple[bool, Stored | None, str]:
    """Return whether the last receipt is for this digest and not too old, that receipt, and a remark."""
    receipt, why, where = recall_receipt(settings.staging), "", f"{bucket.host}/{bucket.name}"
    if not receipt or (receipt.bucket, receipt.key) != (where, bucket.prefix + receipt.name):
        why = "this key may not read the bucket, and this user finds no receipt of it in BACKUP_DIRECTORY"
        receipt = None
    elif receipt.sha256 == digest and 0 < 2 * settings.refresh_seconds < receipt.age_seconds():
        why = "the last receipt is old: nothing refreshes it, or refreshing fails"
    return bool(receipt and receipt.sha256 == digest and not why), receipt, why


def command_check(options: argparse.Namespace) -> int:
    """Print whether the bucket holds the version on disk: by its bytes where the key may read, else by a receipt."""
    settings, bucket = configure(*OF_THE_SERVICE)
    data, proof, staged = read_channel_backup(settings.monitored), "bucket", None
    try:
        current, version, remark = check_bucket(bucket, data)
    except Failure as failure:
        if failure.cause is not Cause.DENIED:
            raise
        proof, (current, version, remark) = "receipt", check_receipt(settings, bucket, hashlib.sha256(data).hexdigest())
    written = datetime.fromtimestamp(os.path.getmtime(settings.monitored), UTC)
    is_late = datetime.now(UTC) - written > timedelta(seconds=JUST_NOW_SECONDS)
    behind = f"{'the bucket is behind for' if is_late else 'LND has written since, for'} {ago(written)}"
    reason = f"the version on disk is stored{remark}" if current else (remark or behind)
    with contextlib.suppress(OSError):
        staged = sum(captured_at(name) is not None for name in os.listdir(settings.staging))
    if options.json:
        fields = version.as_json() if version else {}
        answer = {"current": current, "proof": proof, "staged": staged, "reason": reason}
        print(json.dumps(answer | {name: fields.get(name) for name in ("key", "captured_at", "stored_at")}))
    else:
        last = f"{version.key}, stored {ago(datetime.fromisoformat(version.stored_at))} ago" if version else "none"
        label = "stored as" if current else "newest"
        print(shown(f"{reason}; {label}: {last}; staged: {'?' if staged is None else staged}; proof: {proof}"))
    return DONE if current else FAILED


def command_list(options: argparse.Namespace) -> int:
    """Print the versions in the bucket, newest first: as lines, or as JSON."""
    _, bucket = configure("MONITOR_FILE_PATH", *OF_THE_SERVICE)
    versions, others = bucket.versions()
    full = [each for each in versions if each.size_bytes > EMPTY_SIZE_BYTES]
    older = dict(zip_longest(full, full[1:]))
    rows = [each.as_json() | {"marks": each.marks(older.get(each))} for each in versions]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif sys.stdout and sys.stdout.isatty():  # none if it is closed
        print(f"{'captured (UTC) and name':30} {'age':>10} {'bytes':>11} stored (UTC)")
        for each, row in zip(versions, rows, strict=True):
            stored_at = each.stored_at[:19].replace("T", " ")
            print(f"{each.name} {ago(each.at()):>10} {each.size_bytes:>11,} {stored_at}")
            print(*(f"  ! {mark}\n" for mark in row["marks"]), sep="", end="")
    else:
        for row in rows:
            cells = (row["captured_at"], row["size_bytes"], row["stored_at"], ", ".join(row["marks"]))
            print(shown(row["key"]), *cells, sep="\t")
    where, hint = f"s3://{bucket.name}/{bucket.prefix}", "" if versions else "check S3_BUCKET_NAME and S3_BACKUP_PREFIX"
    log.info("%d versions in %s, %d other keys not shown", len(versions), where, others, extra={"hint": hint})
    return DONE


def again(options: argparse.Namespace, *arguments: str) -> str:
    """Return the command line that runs this restore again, otherwise."""
    env_file = ["--env-file", os.path.abspath(options.env_file)] if options.env_file else []
    return shlex.join([sys.executable, os.path.abspath(sys.argv[0]), *env_file, "restore", *arguments])


def choose_version(bucket: Bucket, options: argparse.Namespace) -> tuple[bytes, Stored]:
    """Return the newest version that holds channels, before a time if given, and its bytes; raises Failure."""
    what, limit = f"cannot restore: s3://{bucket.name}/{bucket.prefix}", options.before
    earlier = f" before {limit.isoformat()}" if limit else ""
    versions = [each for each in bucket.versions()[0] if limit is None or each.at() < limit]
    versions = [each for each in versions if each.size_bytes >= EMPTY_SIZE_BYTES]
    full, damaged = [each for each in versions if each.size_bytes > EMPTY_SIZE_BYTES], 0
    if versions and not full:
        hint = f"to restore it all the same: {again(options, '--key', versions[0].key)}"
        raise Failure(Cause.OTHER, f"{what}: no version{earlier} holds channels", hint)
    for empty in versions[: versions.index(full[0])] if full else []:
        log.warning("passed over: %s: no channels; LND writes such a file in a recovery", empty.key)
    for each, older in zip_longest(full, full[1:]):
        try:
            data, version = bucket.fetch(each.key)
        except Damaged as failure:
            failure.say()
            damaged += 1
            continue
        if damaged:
            hint = f"the next good one: {again(options, '--key', each.key)}"
            raise Failure(Cause.OTHER, f"{what}: {damaged} newer than the next good one cannot be used", hint)
        log.info("chosen: %s, the newest version%s that holds channels", each.key, earlier)
        for mark in each.marks(older):
            log.warning("%s: %s", each.key, mark)
        return data, version
    why = f"not one of {damaged} versions can be used" if damaged else f"there is no version{earlier}"
    raise Failure(Cause.OTHER, f"{what}: {why}", "check the bucket and the prefix; object versions: docs/recovery.md")


NEXT_STEPS = """restored {key}
  {size} bytes, SHA-256 {digest}, counted as of {at} (the earlier of capture and S3's time)
  to {path}
next, as the user that runs LND, with the wallet of the same 24 words (if there is none yet: lncli create, and wait):
  lncli verifychanbackup --multi_file {path}
  lncli restorechanbackup --multi_file {path}
or, for a new wallet, both in one:
  lncli create --multi_file {path}
if LND refuses this version, the one before it:
  {before}
never start an old channel.db, never run two nodes of one seed, and never use chantools scbforceclose with a version
that is not the latest: each can cost the money in the channels. More: docs/recovery.md"""


def command_restore(options: argparse.Namespace) -> int:
    """Download one version, verify it, write it to a new file, and print what to do with it."""
    settings, bucket = configure("MONITOR_FILE_PATH", *OF_THE_SERVICE)
    output = Path(os.path.abspath(options.output))
    what, directory = f"cannot restore: {output}", Path(os.path.realpath(output.parent))
    homes = [parent for parent in directory.parents if os.path.lexists(parent / "lnd.conf")]
    if homes or is_lnd_directory(directory, settings.monitored):
        hint = "a wrong file there keeps LND from starting: write it elsewhere, lncli takes it from there"
        raise Failure(Cause.OTHER, f"{what}: it is in a directory of LND's", hint)
    try:
        if os.path.lexists(output):
            raise FileExistsError(errno.EEXIST, "it is there already, and nothing is overwritten")
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        if options.key is None:
            data, version = choose_version(bucket, options)
        else:
            prefix = bucket.prefix if captured_at(options.key) else ""
            data, version = bucket.fetch(prefix + options.key, by_name_alone=True)
        write_file(place, output.name, data, new=True)
    except OSError as error:
        raise Failure(Cause.OTHER, f"{what}: {error.strerror}", "name a new file elsewhere with --output") from None
    if len(data) == EMPTY_SIZE_BYTES:
        log.warning("no channels in this version: restoring it brings nothing back from channels")
    at, digest = version.at().isoformat(), hashlib.sha256(data).hexdigest()
    before = again(options, "--before", at, "--output", f"{output}.before")
    path = shlex.quote(str(output))
    print(NEXT_STEPS.format(key=shown(version.key), size=len(data), digest=digest, at=at, path=path, before=before))
    return DONE


def point_in_time(text: str) -> datetime:
    """Parse a time of the command line: ISO 8601, local without an offset."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError("write it like 2026-11-20, or 2026-11-20T18:00:00+01:00") from None


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
        commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    for name in ("check", "list"):
        commands.choices[name].add_argument("--json", action="store_true", help="print JSON; its fields: README.md")
    restore = commands.choices["restore"]
    which = restore.add_mutually_exclusive_group()
    which.add_argument("--key", help="this version: a whole key, or the name alone")
    which.add_argument("--before", metavar="TIME", type=point_in_time, help="the newest before TIME (ISO 8601)")
    restore.add_argument("--output", metavar="FILE", default="channel.backup", help="default: %(default)s")
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
        print(end="", flush=True)
    except Failure as failure:
        failure.say()
        code = failure.cause.exit_code
    except ExceptionGroup as faults:
        for fault in faults.exceptions:
            fault.say()  # type: ignore[union-attr]
        code = WRONG_CONFIGURATION
    except OSError as error:
        code = DONE if isinstance(error, BrokenPipeError) else FAILED  # list | head
        if code:
            Failure(Cause.OTHER, f"cannot go on: {error}", "check the disk, the permissions and the limits").say()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception:
        log.critical("a fault of this program, please report it", exc_info=True)
        code = FAILED
    return code


if __name__ == "__main__":
    # Not by sys.exit: Python aborts if the thread of an attempt that was left behind writes to the log meanwhile.
    os._exit(main())
