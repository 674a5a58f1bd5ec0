"""The benchmark's figures on processes are right: ended children, short-lived memory, wake-ups."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from bench.processes import TICKS, Peak, cpu_seconds, family, idle, memory, peak_rss

if TYPE_CHECKING:
    from collections.abc import Iterator

MEGABYTES = 64
PATIENCE_SECONDS = 10.0
BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(time.process_time(), flush=True)"
FILL = f"data = bytearray(b'x') * ({MEGABYTES} << 20)\nprint(flush=True)\ninput()"
GIVE_BACK = f"data = bytearray(b'x') * ({MEGABYTES} << 20)\ndel data\nprint(flush=True)\ninput()"
SLEEP = (
    "import time\nprint(flush=True)\ninput()\nfor _ in range(50): "
    "time.sleep(0.001)\nprint(flush=True)\ninput()"
)


def python(code: str) -> str:
    """Return the shell's command for some Python code."""
    return shlex.join([sys.executable, "-c", code])


@contextlib.contextmanager
def shell(script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a shell script that ends with its stdin, at the latest."""
    command = ["sh", "-c", f"{script}\ncat >/dev/null"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        try:
            yield process
        finally:
            process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """Return the next line that it printed."""
    return process.stdout.readline() if process.stdout else ""


def tell(process: subprocess.Popen[str]) -> None:
    """Let it go on."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def test_cpu_time_of_ended_children_counts() -> None:
    """The CPU time of a group is there when the child that used it is not."""
    with shell(f"{python(BURN)}; echo over") as process:
        used = float(said(process))
        assert said(process) == "over\n"
        assert family(process.pid)[0] == process.pid
        assert used - 3 / TICKS <= cpu_seconds(family(process.pid)) < used + 0.3


def test_peak_of_memory_of_a_child() -> None:
    """The peak holds what a child had that is gone, and what is measured afterwards does not."""
    with shell(f"{python(FILL)}; echo over") as process:
        with Peak(process.pid) as peak:
            assert said(process) == "\n"
            began = time.monotonic()
            while peak.memory.pss < MEGABYTES and time.monotonic() < began + PATIENCE_SECONDS:
                time.sleep(0.01)
            tell(process)
            assert said(process) == "over\n"
        after = memory(family(process.pid))
    assert after.rss < MEGABYTES < peak.memory.pss <= peak.memory.rss


def test_peak_of_memory_that_was_given_back() -> None:
    """The kernel remembers the largest RSS of a process."""
    with shell(f"exec {python(GIVE_BACK)}") as process:
        assert said(process) == "\n"
        assert memory([process.pid]).rss < MEGABYTES < peak_rss(process.pid)
        tell(process)


def test_wake_ups() -> None:
    """Each time that a process waits and goes on is one wake-up, and takes some CPU time."""
    with shell(f"exec {python(SLEEP)}") as process:
        assert said(process) == "\n"
        before = idle([process.pid])
        tell(process)
        assert said(process) == "\n"
        used = idle([process.pid]) - before
        assert 50 <= used.wake_ups < 100
        assert 0 < used.cpu < 1
        tell(process)


def test_what_has_ended_has_no_memory() -> None:
    """A process that ended while it was looked at does not disturb the others' figures."""
    with subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL) as process:
        process.wait()
    assert memory([process.pid]) == (0, 0)
    assert cpu_seconds([process.pid]) == 0
    with pytest.raises(FileNotFoundError):
        peak_rss(process.pid)
