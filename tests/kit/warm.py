"""Starts the program warm: as a fork of a process that has loaded the program's libraries.

Loading them is most of what a start costs. Signals, exit code, output and coverage are those of any
other process. Whoever measures time or memory starts the program cold.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SERVER = Path(__file__).with_name("warm_server.py")
# What is read when the program asks for it. Anything else may have been read before: by Python, by
# the C library, by OpenSSL, or by a library while it was loaded.
LATE = re.compile(
    r"(AWS|S3|MONITOR|BACKUP|COPY|METRICS|HEARTBEAT|RESCAN|REFRESH|SHUTDOWN|NOTIFY|WATCHDOG|COVERAGE"
    r")_\w+|\w+_(PROXY|proxy)|HOME|PATH"
)

INHERITED = re.compile(r"^(?:Umask|[UG]id|Groups|Sig(?:Blk|Ign)|Cap\w+):.*", re.MULTILINE)


def inherited() -> list[str]:
    """Return what a process takes over from the one that starts it: rights, signals, limits."""
    status = Path("/proc/thread-self/status").read_text(encoding="utf-8")
    return [*INHERITED.findall(status), Path("/proc/self/limits").read_text(encoding="utf-8")]


class WarmProcess:
    """A program that was started warm, with the methods of `subprocess.Popen`."""

    def __init__(self, report: int) -> None:
        """Take the process id from the report, in which the exit code will follow."""
        self._report = os.fdopen(report)
        self.pid = int(self._report.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the program", timeout or 0.0)
            with self._report:
                self.returncode = int(self._report.readline())
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmServer:
    """The process that forks the program; it runs inside `with`."""

    def __init__(self, program: Path, env: Mapping[str, str]) -> None:
        """Load the libraries of this program in this environment, without coverage."""
        self._env = {name: env[name] for name in env if not name.startswith("COVERAGE_PROCESS_")}
        self._inherited = inherited()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, SERVER, str(theirs.fileno()), program],
                env=self._env,
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def __enter__(self) -> Self:
        """Return it; it answers when its libraries are loaded."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it; what it started goes on."""
        self._control.close()
        self._process.wait()

    def can_start(self, env: Mapping[str, str]) -> bool:
        """Tell whether a start here, in this environment, would be no different if it was cold."""
        differs = [name for name in env.keys() | self._env if env.get(name) != self._env.get(name)]
        return all(map(LATE.fullmatch, differs)) and inherited() == self._inherited

    def start(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str, streams: Sequence[int]
    ) -> WarmProcess:
        """Start a Python script with its arguments, and with these as stdin, stdout and stderr."""
        request = {"command": command, "env": dict(env), "cwd": cwd}
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], [theirs, *streams])
        finally:
            os.close(theirs)
        return WarmProcess(ours)
