"""What processes cost, as the kernel counts it: memory, CPU time, wake-ups."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable

TICKS = os.sysconf("SC_CLK_TCK")
CPUCLOCK_SCHED = 2
SAMPLE_SECONDS = 0.002


class Memory(NamedTuple):
    """Memory of processes, in MB: their share of it (PSS), and with all of what they share
    (RSS).
    """

    pss: float
    rss: float


def memory(pids: Iterable[int]) -> Memory:
    """Return the memory of these processes now; one that has ended has none."""
    total = Memory(0, 0)
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes = dict(re.findall(r"^(Pss|Rss):\s+(\d+) kB", text, re.MULTILINE))
            if sizes:  # a process that is ending has none
                total = Memory(
                    total.pss + int(sizes["Pss"]) / 1024, total.rss + int(sizes["Rss"]) / 1024
                )
    return total


def peak_rss(pid: int) -> float:
    """Return the largest RSS of a process until now, in MB."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if not found:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of these processes, and, cut to the tick, of all their children that have
    ended.
    """
    seconds = 0.0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds += clock(pid) + sum(map(int, fields[13:15])) / TICKS
    return seconds


def clock(pid: int) -> float:
    """Return the CPU time of a process, its ended threads included, to the nanosecond; 0 if it has
    ended.
    """
    with contextlib.suppress(OSError):
        return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3) makes it
    return 0.0


class Idle(NamedTuple):
    """What processes have used until now: CPU seconds to the nanosecond, and how often their
    threads woke up.
    """

    cpu: float
    wake_ups: int

    def __sub__(self, earlier: Idle) -> Idle:
        """Return what was used since."""
        return Idle(self.cpu - earlier.cpu, self.wake_ups - earlier.wake_ups)


def idle(pids: Iterable[int]) -> Idle:
    """Return what the threads of these processes have used; the wake-ups of threads that have ended
    are lost.
    """
    total = Idle(0, 0)
    for pid in pids:
        total = Idle(total.cpu + clock(pid), total.wake_ups)
        for task in Path(f"/proc/{pid}/task").iterdir():
            waited = re.search(
                r"^voluntary_ctxt_switches:\s*(\d+)", (task / "status").read_text(), re.MULTILINE
            )
            total = Idle(total.cpu, total.wake_ups + int(waited[1] if waited else 0))
    return total


def family(pid: int) -> list[int]:
    """Return a process and all that it has started and that still run."""
    found = [pid]
    for each in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


class Peak:
    """The largest memory of a process and its descendants while the `with` block runs, looked at
    all the time.
    """

    def __init__(self, pid: int) -> None:
        """Prepare to look at this process."""
        self.memory = Memory(0, 0)
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            now = memory(family(self._pid))
            self.memory = Memory(max(self.memory.pss, now.pss), max(self.memory.rss, now.rss))
