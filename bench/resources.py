"""What does each contestant cost the node? Processor time of an update, and memory, processor time
and wake-ups while nothing happens, as the kernel counts them; and this program's memory while S3 is
out of reach.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.peers import THIS, TWIN, Running
from bench.report import AWAY, REST, WORK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bench.peers import World
    from bench.report import Rows

TICKS = os.sysconf("SC_CLK_TCK")
CPUCLOCK_SCHED = 2
SAMPLE_SECONDS = 0.002
LOOK_SECONDS = 0.05
LOOKS_MAX = 100
CALM_SHARE = 0.02  # of one core; some wake up many times a second for nothing
UPDATES_MAX = 20


class Effort(NamedTuple):
    """How much is measured; times in seconds."""

    rounds: int = 2
    # Until this is used up, there are more updates: the kernel tells the time of ended children in
    # 10 ms.
    cpu: float = 0.15
    # Before memory is measured; this program closes its connection when it has been idle for five.
    rest: float = 7.0
    idle: float = 60.0  # once, in the last round
    staged: int = 10_000
    attempts: float = 5.0  # to reach S3, while memory is watched


FULL = Effort()
QUICK = Effort(rounds=1, cpu=0.05, rest=0.5, idle=2.0, staged=1_000, attempts=1.0)


def at_work_and_at_rest(world: World, rows: Rows, effort: Effort) -> None:
    """Measure all contestants, started anew in each round: at work one after the other, at rest at
    the same time.

    They live beside each other, and so share libraries to the same degree.
    """
    contestants = [*world.contestants, TWIN]
    for number in range(effort.rounds):
        with world.line() as line, world.running(contestants, line) as started:
            for each in started:
                at_work(each, effort, rows)
            time.sleep(effort.rest)
            for each in started:
                now = memory(family(each.process.pid))
                rows.add(REST, "PSS", "MB", each.name, now.pss)
                rows.add(REST, "RSS", "MB", each.name, now.rss)
            if number == effort.rounds - 1:
                at_rest(started, effort.idle, rows)


def at_work(contestant: Running, effort: Effort, rows: Rows) -> None:
    """Measure the CPU time of an update over many, and the peak of memory over one."""
    before, updates, used = calm(contestant), 0, 0.0
    while used < effort.cpu and updates < UPDATES_MAX:
        contestant.update()
        updates += 1
        used = usage(family(contestant.process.pid)).cpu - before.cpu
    used = calm(contestant).cpu - before.cpu
    rows.add(WORK, "CPU time", "ms", contestant.name, used / updates * 1e3)
    with watched(contestant.process.pid) as seen:
        contestant.update()
        calm(contestant)
    rows.add(WORK, "PSS", "MB", contestant.name, max(each.pss for each in seen))
    rows.add(WORK, "RSS", "MB", contestant.name, max(each.rss for each in seen))


def at_rest(contestants: Sequence[Running], seconds: float, rows: Rows) -> None:
    """Measure CPU time and wake-ups of all over the same time, in which LND writes nothing."""
    groups = [family(each.process.pid) for each in contestants]
    before, began = [usage(pids) for pids in groups], time.monotonic()
    time.sleep(seconds)
    per_hour = 3600 / (time.monotonic() - began)
    for each, pids, earlier in zip(contestants, groups, before, strict=True):
        now = usage(pids)
        cpu = (now.cpu - earlier.cpu) * per_hour * 1e3
        rows.add(REST, "CPU time", "ms per hour", each.name, cpu)
        wake_ups = (now.wake_ups - earlier.wake_ups) * per_hour
        rows.add(REST, "wake-ups", "per hour", each.name, wake_ups)


def calm(contestant: Running) -> Usage:
    """Wait until its processes do next to nothing, after an upload; return what they had used."""
    before = usage(family(contestant.process.pid))
    for _ in range(LOOKS_MAX):
        time.sleep(LOOK_SECONDS)
        now = usage(family(contestant.process.pid))
        if abs(now.cpu - before.cpu) < CALM_SHARE * LOOK_SECONDS:
            return now
        before = now
    raise RuntimeError(f"{contestant.name} does not come to rest")


def out_of_reach(world: World, rows: Rows, effort: Effort) -> None:
    """Measure this program's memory while S3 is out of reach, with little and much staged."""
    with world.line(far=True) as line:
        line.take_down()
        places = {count: world.place(f"staged-{count}", line) for count in (0, effort.staged)}
        for count, place in places.items():
            place.stage(count)
        for _ in range(effort.rounds):
            with contextlib.ExitStack() as stack:
                started = {
                    count: stack.enter_context(Running(THIS, place))
                    for count, place in places.items()
                }
                for each in started.values():
                    each.wait_for("cannot store")
                time.sleep(effort.attempts)
                for count, each in started.items():
                    now, peak = memory([each.process.pid]), peak_rss(each.process.pid)
                    rows.add(AWAY, "PSS", "MB", each.name, now.pss, staged=count)
                    rows.add(AWAY, "RSS", "MB", each.name, now.rss, staged=count)
                    rows.add(AWAY, "RSS at peak", "MB", each.name, peak, staged=count)


class Memory(NamedTuple):
    """Memory in MB: the processes' share of it (PSS), and with all of what they share (RSS)."""

    pss: float
    rss: float


def memory(pids: Iterable[int]) -> Memory:
    """Return the memory of these processes now; one that has ended has none."""
    kilobytes: Counter[str] = Counter()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            for name, size in re.findall(r"^(Pss|Rss):\s+(\d+) kB", text, re.MULTILINE):
                kilobytes[name] += int(size)
    return Memory(kilobytes["Pss"] / 1024, kilobytes["Rss"] / 1024)


def peak_rss(pid: int) -> float:
    """Return the largest RSS of a process until now, in MB."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    if not found:
        raise ProcessLookupError(f"process {pid} has ended")
    return int(found[1]) / 1024


class Usage(NamedTuple):
    """What processes have used until now: CPU seconds, and how often their threads woke up."""

    cpu: float
    wake_ups: int


def usage(pids: Iterable[int]) -> Usage:
    """Return what these processes have used: to the nanosecond, and, cut to the tick, what their
    children had used when they ended. The wake-ups of what has ended are lost.
    """
    cpu, wake_ups = 0.0, 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            statuses = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
            ended = sum(map(int, fields[13:15])) / TICKS
            cpu += clock(pid) + ended
            woken = re.findall(r"\nvoluntary_ctxt_switches:\s*(\d+)", "".join(statuses))
            wake_ups += sum(map(int, woken))
    return Usage(cpu, wake_ups)


def clock(pid: int) -> float:
    """Return the CPU time of a process, its ended threads included; 0 if it has ended."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(~pid << 3 | CPUCLOCK_SCHED)  # as clock_getcpuclockid(3) makes it
    return 0.0


def family(pid: int) -> list[int]:
    """Return a process and all that it has started and that still run."""
    found = [pid]
    for each in found:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


@contextlib.contextmanager
def watched(pid: int) -> Iterator[list[Memory]]:
    """Look at the memory of a process and its descendants all the time; yield what was seen."""
    seen, over = [Memory(0, 0)], threading.Event()

    def look() -> None:
        while not over.wait(SAMPLE_SECONDS):
            seen.append(memory(family(pid)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
