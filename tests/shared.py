"""What the tests of several files share: times, settings, a scripted S3 that answers step by step,
and what is expected of a run.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit import (
    PATIENCE_SECONDS,
    SCRIPT,
    VERSION_NAME,
    Answer,
    FakeS3,
    Lnd,
    Script,
    run_script,
    version_name,
)
from kit.script import LATE_ENOUGH

if TYPE_CHECKING:
    from kit import Daemon, S3Server, Written

Env = dict[str, str]
Done = subprocess.CompletedProcess[str]
Session = Callable[..., contextlib.AbstractContextManager["Daemon"]]

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
LARGEST = 16 << 20
SELDOM = {"RESCAN_SECONDS": "600"}  # only events are left
OFTEN = {"RESCAN_SECONDS": "0.1"}
AT_ONCE = {"SHUTDOWN_GRACE_SECONDS": "5", "RESCAN_SECONDS": "0.1"}
NOWHERE = "http://127.0.0.1:1"  # nobody listens there
AWAY = {"AWS_ENDPOINT_URL_S3": NOWHERE, "SHUTDOWN_GRACE_SECONDS": "0"}
UNPRINTABLE = "\u00a0\u3000\U0001f469\u200d\U0001f4bb"  # to Python, and no control characters
TRY_AGAIN, WRONG_CONFIGURATION = 75, 78


class SteppedS3(FakeS3):
    """Answers, and stores, only when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)

    def let(self, count: int = 1) -> None:
        self._permits.release(count)

    def release(self) -> None:
        self.let(1000)  # more than any test has

    def wait_for_leave(self) -> None:
        self._permits.acquire()

    def hashes(self) -> list[str]:
        """Return the last digits of the SHA-256 of each PUT, in the order of their arrival."""
        return [request.path[-6:] for request in self.requests if request.method == "PUT"]


# --- What is staged ---


def staged(staging: Path) -> list[str]:
    """Return the names of the staged versions, oldest first."""
    return sorted(entry.name for entry in staging.iterdir() if VERSION_NAME.fullmatch(entry.name))


def staged_data(staging: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(staging.glob("2*"))]


def wait_until_staged(staging: Path, versions: list[bytes]) -> None:
    """Wait until these versions are staged, oldest first; the log tells of a capture a moment
    before.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while staged_data(staging) != versions:
        assert time.monotonic() < deadline, f"staged: {sorted(staging.iterdir())}"
        time.sleep(0.01)


def leave(directory: Path) -> None:
    """Let go of the directory, and its lock, as the end of a process does."""
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            if target == str(directory) or target.startswith(f"{directory}/"):
                os.close(int(descriptor.name))


# --- What LND writes ---


def write_unseen(lnd: Lnd) -> Written:
    """Let another file be linked into the place of LND's, of which no event tells that is listened
    to.
    """
    elsewhere = Lnd(lnd.directory / "elsewhere")
    version = elsewhere.write()
    lnd.path.unlink(missing_ok=True)
    lnd.path.hardlink_to(elsewhere.path)
    lnd.written.append(version)
    return version


def changing(left: Path) -> str:
    """Return code that changes LND's file while it is read, as often as this file has bytes."""
    return f"""{LATE_ENOUGH}
import os
looked = os.fstat
def fstat(descriptor):
    status, path = looked(descriptor), os.environ["MONITOR_FILE_PATH"]
    size = os.path.getsize({str(left)!r})
    if size and os.path.samestat(status, os.stat(path)):
        os.utime(path, ns=(0, size))
        os.truncate({str(left)!r}, size - 1)
    return status
os.fstat = fstat
"""


# --- What is stored ---


def put_version(
    server: S3Server,
    bucket: str,
    at: datetime,
    data: bytes,
    prefix: str = "alice/",
    *,
    name: str = "",
    metadata: dict[str, str] | None = None,
) -> str:
    """Store a version captured at this time, by default under its right name and metadata, and
    return its key.
    """
    return server.put_version(bucket, prefix + (name or version_name(data, at)), data, metadata)


def expect_newest_last(daemon: Daemon, newest: Written) -> None:
    """Expect that the last one put has the newest name, and the bytes that LND wrote last."""
    names = daemon.stored_names()
    assert names[-1] == max(names)
    assert names[-1].endswith(newest.sha256[-6:])


def expect_last(fake: FakeS3, version: bytes) -> None:
    """Expect that this version was put last, under the newest name, and that names did increase
    from put to put wherever the same version was put again.
    """
    puts = [request for request in fake.requests if request.method == "PUT"]
    assert puts[-1].body == version
    assert puts[-1].path == max(request.path for request in puts)
    assert len({request.path for request in puts}) == len(puts)


# --- How a command ends ---


def refused(env: dict[str, str], *names: str, args: tuple[str, ...] = ("once",)) -> str:
    """Run a command that is refused, each of these settings being named, and return what it
    says.
    """
    done = run_script(env, *args)
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if re.search("error: (?!hint)", line)]
    for name in names:
        assert any(name in line for line in errors), done.stderr
    assert done.stderr.count("hint: ") >= len(names)
    return done.stderr


def done_well(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    done = run_script(env, *(args or ("once",)))
    assert done.returncode == 0, done.stderr
    return done


def start(good: dict[str, str], *arguments: str, code: int = 78) -> list[str]:
    """Run the program to its early end, in which nothing was made or watched, and return the lines
    of its log.
    """
    staging = Path(good.get("BACKUP_DIRECTORY") or "/nowhere")
    before = list(staging.iterdir()) if staging.is_dir() else None
    done = run_script(good, *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert (list(staging.iterdir()) if staging.is_dir() else None) == before
    assert not re.search("watching|Traceback", done.stderr)
    return done.stderr.splitlines()


def env_file(directory: Path, values: dict[str, str], encoding: str = "utf-8") -> str:
    """Write an --env-file that sets these values, and return its path."""
    path = directory / "env"
    path.write_text("".join(f"{name}={value}\n" for name, value in values.items()), encoding)
    return str(path)


def failure_of(env: dict[str, str]) -> str:
    """Return what the daemon logs when it cannot store, with the hint; it goes on, and is
    stopped.
    """
    with Script(env) as script:
        said = script.wait_for_log(r"\w+: cannot store: .*\n.*hint: .*").group()
        assert script.stop() == 0
    return said


def say(fake: FakeS3, status: int, body: bytes, content_type: str = "application/xml") -> None:
    for method in ("PUT", "GET", "HEAD", "POST"):
        answer = Answer(status, headers={"Content-Type": content_type}, body=body, etag=False)
        fake.set_default(answer, method)


def statements(text: str) -> list[dict[str, Any]]:
    return [json.loads(found) for found in re.findall(r'\{[^{}]*"Effect"[^{}]*\}', text)]


def restore(env: dict[str, str], home: Path, *args: str, code: int = 0) -> Done:
    """Run `restore` in that directory, and expect this exit code, no traceback and no leftovers."""
    before = set(home.iterdir())
    done = run_script(env, "restore", *args, cwd=home)
    assert done.returncode == code, done.stderr
    expect_tidy(
        home,
        done,
        before | ({home / "channel.backup"} if code == 0 and "--output" not in args else set()),
    )
    return done


def command_for_the_one_before(done: Done) -> list[str]:
    """Return the words of the command in the hint, without Python and the script; none if there is
    none.
    """
    found = re.search(rf"hint: .*({re.escape(shlex.quote(sys.executable))} .*)", done.stderr)
    if not found:
        return []
    _, script, *words = shlex.split(found[1])
    assert Path(script) == SCRIPT
    return words


def expect_tidy(home: Path, done: Done, expected: set[Path]) -> None:
    """Expect no traceback, nothing on stdout after a failure, and no file but those expected."""
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == (done.returncode != 0)
    left = set(home.iterdir()) - expected
    assert not {path for path in left if path.name.startswith(".")}
    assert done.returncode == 0 or not left


def ordinary() -> list[str]:
    """Return the beginning of a command that may not read and write everything, as root may."""
    leave_out = "-dac_override,-dac_read_search"
    return ["setpriv", "--bounding-set", leave_out] if os.geteuid() == 0 else []


# --- Unit files and the commands beside them ---


def run_command(
    *command: str | Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    user: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing of the caller's environment."""
    minimum = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
    }
    return subprocess.run(
        command,
        env=minimum | (env or {}),
        cwd=cwd,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        check=False,
        capture_output=True,
        encoding="utf-8",
        timeout=150,
    )


def section(unit: Path, name: str) -> dict[str, str]:
    """Return the last value of each key in a section of a unit file."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit, encoding="utf-8")
    return dict(parser[name])
