"""The program in a forked process: its libraries are loaded already, and all of its own code runs
from the first line.

Loading them takes most of a start, and nothing is staged or sent meanwhile; without that, a
thousand starts are quick.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import runpy
import select
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, NoReturn, Self

# What the program imports, for every fork to come.
import asyncinotify  # noqa: F401 - see above
import boto3
import botocore.session
import dotenv  # noqa: F401 - see above
from kit import script

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CRASHED = 70
LOOK_SECONDS = 0.02

# What the SDK reads of its own data is read once: thousands of calls that are no step of a backup.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)
boto3.client("s3", region_name="us-east-1", aws_access_key_id="-", aws_secret_access_key="-")


class Forked:
    """The program, running; its log is a pipe that is read while somebody waits, so that no thread
    is needed.
    """

    def __init__(self, env: dict[str, str], *args: str, hold_at: Path | None = None) -> None:
        """Start it; with `hold_at` it stands still before it opens or makes that directory, until
        `go_on`.
        """
        self.log = ""
        self.returncode: int | None = None
        self.ended = False
        self._pipe, output = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(env, list(args), output, hold_at)
        os.close(output)
        if hold_at:
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._set(status)
                self._read(time.monotonic())
                raise AssertionError(f"it ended before it came to {hold_at}:\n{self.log}")

    def __enter__(self) -> Self:
        """Return the running program."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what is left of it."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)
            self._set(os.waitpid(self.pid, 0)[1])
        os.close(self._pipe)

    def signal(self, number: int) -> bool:
        """Send it a signal, if it still runs; tell whether it did."""
        if self.returncode is None:
            os.kill(self.pid, number)
        return self.returncode is None

    def go_on(self) -> None:
        """Let it go on from where it stands still."""
        self.signal(signal.SIGCONT)

    def wait_until(self, reached: Callable[[str], object], timeout: float) -> bool:
        """Wait until its log, or whatever else, is so; tell whether it is, or it ended or the time
        passed before.
        """
        until = time.monotonic() + timeout
        while not reached(self.log):
            if self.ended or time.monotonic() > until:
                return False
            self._read(time.monotonic() + LOOK_SECONDS)
        return True

    def wait(self, timeout: float = 60.0) -> int | None:
        """Wait for its end, and return the exit code, negative for a signal, or None if it still
        runs.
        """
        until = time.monotonic() + timeout
        while not self.ended and time.monotonic() < until:
            self._read(until)
        if self.returncode is None and self.ended:  # the end of its log is its end
            self._set(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def _read(self, until: float) -> None:
        """Add to the log what comes until then, or note that it has ended."""
        if select.select([self._pipe], [], [], max(until - time.monotonic(), 0))[0]:
            data = os.read(self._pipe, 65536)
            self.log += data.decode(errors="replace")
            self.ended = not data

    def _set(self, status: int) -> None:
        """Keep how it ended."""
        self.returncode = os.waitstatus_to_exitcode(status)


def _become(env: dict[str, str], args: list[str], output: int, hold_at: Path | None) -> NoReturn:
    """Turn this process, just forked, into the program."""
    code: object = CRASHED
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.closerange(3, 4096)
        # Those of the parent may know of a file that this is not.
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.clear()
        os.environ.update(env)
        random.seed()
        sys.argv = [str(script.SCRIPT), *args]
        if hold_at:
            _hold_at(str(hold_at))
        runpy.run_path(str(script.SCRIPT), run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - the parent's stack is not its business
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else CRASHED)


def _hold_at(directory: str) -> None:
    """Stop this process when it is about to open or make the directory for the first time."""
    held = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal held
        if event in ("open", "os.mkdir") and not held:
            path = arguments[0]
            if isinstance(path, (str, os.PathLike)) and os.fspath(path) == directory:
                held = True
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)
