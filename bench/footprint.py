"""What each contestant costs the node: CPU time per update, and memory, CPU time and wake-ups while
nothing happens.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from bench.backlog import stage
from bench.collect import Rows
from bench.peers import Program, Running
from bench.processes import Peak, cpu_seconds, idle, memory, peak_rss
from bench.stored import all_running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Contestant
    from bench.plan import Plan
    from bench.rows import Row
    from bench.world import World

WORK = "CPU time of an update, and memory at its peak"
REST = "while nothing happens"
AWAY = "memory while S3 is out of reach, by number of staged versions"
LOOK_SECONDS = 0.05
LOOKS_MAX = 100
CALM_SHARE = 0.02  # of one core; some wake up many times a second for nothing
UPDATES_MAX = 20


class Effort(NamedTuple):
    """How much is measured; times in seconds."""

    rounds: int
    # until this is used up, there are more updates: the kernel tells the time of ended children in
    # 10 ms
    cpu: float
    # before memory is measured; this program closes its connection when it has been idle for five
    rest: float
    idle: float  # once, in the last round
    staged: int
    attempts: float  # to reach S3, while memory is watched


FULL = Effort(rounds=2, cpu=0.15, rest=7.0, idle=60.0, staged=10_000, attempts=5.0)
QUICK = Effort(rounds=1, cpu=0.05, rest=0.5, idle=2.0, staged=1_000, attempts=1.0)


def measure(world: World, plan: Plan, contestants: Sequence[Contestant]) -> list[Row]:
    """Return all rows."""
    effort = QUICK if plan.quick else FULL
    return running(world, effort, contestants) + out_of_reach(world, effort)


def running(world: World, effort: Effort, contestants: Sequence[Contestant]) -> list[Row]:
    """Measure all contestants, started anew in each round: at work one after the other, at rest at
    the same time.

    They live beside each other, and so share libraries to the same degree.
    """
    work, rest = Rows(WORK), Rows(REST)
    for number in range(effort.rounds):
        with world.line() as line, all_running(world, contestants, line) as started:
            for each in started:
                at_work(each, effort, work)
            time.sleep(effort.rest)
            for each in started:
                now = memory(each.pids())
                rest.add("PSS", "MB", each.name, now.pss)
                rest.add("RSS", "MB", each.name, now.rss)
            if number == effort.rounds - 1:
                at_rest(started, effort, rest)
    return work.all() + rest.all()


def at_work(contestant: Running, effort: Effort, rows: Rows) -> None:
    """Measure the CPU time of an update over many on a warm connection, and the peak of memory over
    one.
    """
    calm(contestant)
    before, updates, used = cpu_seconds(contestant.pids()), 0, 0.0
    while used < effort.cpu and updates < UPDATES_MAX:
        contestant.update()
        updates += 1
        used = cpu_seconds(contestant.pids()) - before
    calm(contestant)
    used = cpu_seconds(contestant.pids()) - before
    rows.add("CPU time", "ms", contestant.name, used / updates * 1e3)
    with Peak(contestant.process.pid) as peak:
        contestant.update()
        calm(contestant)
    rows.add("PSS", "MB", contestant.name, peak.memory.pss)
    rows.add("RSS", "MB", contestant.name, peak.memory.rss)


def at_rest(contestants: Sequence[Running], effort: Effort, rows: Rows) -> None:
    """Measure CPU time and wake-ups of all contestants over the same time, in which LND writes
    nothing.
    """
    before, began = [idle(each.pids()) for each in contestants], time.monotonic()
    time.sleep(effort.idle)
    per_hour = 3600 / (time.monotonic() - began)
    for each, earlier in zip(contestants, before, strict=True):
        used = idle(each.pids()) - earlier
        rows.add("CPU time", "ms per hour", each.name, used.cpu * per_hour * 1e3)
        rows.add("wake-ups", "per hour", each.name, used.wake_ups * per_hour)


def calm(contestant: Running) -> None:
    """Block until what follows an upload is done too: until its processes do next to nothing for a
    moment.
    """
    for _ in range(LOOKS_MAX):
        before = idle(contestant.pids())
        time.sleep(LOOK_SECONDS)
        if (idle(contestant.pids()) - before).cpu < CALM_SHARE * LOOK_SECONDS:
            return
    raise RuntimeError(f"{contestant.name} does not come to rest")


class OutOfReach(Program):
    """This program while S3 is out of reach: an upload ends with the line that says so."""

    done = r"cannot store"


def out_of_reach(world: World, effort: Effort) -> list[Row]:
    """Measure this program's memory while S3 is out of reach, with nothing staged but LND's file
    and with much.
    """
    rows, program = Rows(AWAY), OutOfReach()
    program.install()
    with world.line(far=True) as line:
        line.take_down()
        places = {count: world.place(f"staged-{count}", line) for count in (0, effort.staged)}
        for count, place in places.items():
            stage(place, count)
        for _ in range(effort.rounds):
            with contextlib.ExitStack() as stack:
                started = {count: Running(program, place) for count, place in places.items()}
                for each in started.values():
                    stack.callback(each.stop)
                for each in started.values():
                    if not each.wait_for_done(1):
                        raise RuntimeError(f"it tries nothing:\n{each.output}")
                time.sleep(effort.attempts)
                for count, each in started.items():
                    now = memory(each.pids())
                    rows.add("PSS", "MB", each.name, now.pss, staged=count)
                    rows.add("RSS", "MB", each.name, now.rss, staged=count)
                    rows.add(
                        "RSS at peak", "MB", each.name, peak_rss(each.process.pid), staged=count
                    )
    return rows.all()
