"""How many versions are lost: of pairs of writes, and in outages of S3. Nothing is timed here."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bench.rows import Row
from bench.stored import all_running

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kit import Written
    from kit.line import Line

    from bench.peers import Contestant, Running
    from bench.plan import Plan
    from bench.world import World

Result = TypeVar("Result")

GROUP = "versions lost"
PAIR_GAP_SECONDS = 0.01
PAIR_EVERY_SECONDS = 1.0
UP_SECONDS = 3.0  # between two outages
OTHERS_SHARE = 0.2  # of the time for the last: for those before it, which go after it if at all
# what takes so much CPU time that two of them at once would be late by the machine's fault
HEAVY = "aws"


class Pairs(NamedTuple):
    """How many versions of pairs were lost, and how many of those were the newer of their pair."""

    lost: int
    newer: int


def measure(world: World, plan: Plan, contestants: Sequence[Contestant]) -> list[Row]:
    """Return what was lost."""
    lost, in_outages = (
        together(world, plan, contestants) if plan.quick else apart(world, plan, contestants)
    )
    rows = []
    for name in (each.name for each in contestants):
        rows += [
            Row(
                GROUP, f"of {2 * plan.pairs} in {plan.pairs} pairs", "", name, {}, [lost[name].lost]
            ),
            Row(GROUP, f"of {plan.pairs} that ended a pair", "", name, {}, [lost[name].newer]),
            Row(
                GROUP,
                f"of {plan.outages} in outages of {plan.outage_seconds:.0f} s",
                "",
                name,
                {},
                [in_outages[name]],
            ),
        ]
    return rows


def together(
    world: World, plan: Plan, contestants: Sequence[Contestant]
) -> tuple[dict[str, Pairs], dict[str, int]]:
    """Write pairs to all at the same time, and then make outages for the same processes."""
    with world.line(far=True) as line, all_running(world, contestants, line) as running:
        return _pairs_of(line, running, plan), _outages_of(
            line, running, time.monotonic(), plan.outages, plan
        )


def apart(
    world: World, plan: Plan, contestants: Sequence[Contestant]
) -> tuple[dict[str, Pairs], dict[str, int]]:
    """Write pairs to all but the greatest load, whose pairs run beside the outages, in which little
    else happens.
    """
    heavy = [each for each in contestants if each.name.startswith(HEAVY)]
    lost = pairs(world, plan, [each for each in contestants if each not in heavy[1:]])
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(pairs, world, plan, heavy[1:])
        in_outages = outages(world, plan, contestants)
        return lost | second.result(), in_outages


def pairs(world: World, plan: Plan, contestants: Sequence[Contestant]) -> dict[str, Pairs]:
    """Write pairs to these contestants at the same time."""
    if not contestants:
        return {}
    with world.line() as line, all_running(world, contestants, line) as running:
        return _pairs_of(line, running, plan)


def _pairs_of(line: Line, running: Sequence[Running], plan: Plan) -> dict[str, Pairs]:
    """Write pairs, one each second, to all in turns."""
    began = time.monotonic()

    def write(each: Running, offset: float) -> Pairs:
        versions = []
        for number in range(plan.pairs):
            _sleep_until(began + offset + number * PAIR_EVERY_SECONDS)
            versions.append(each.place.lnd.write())
            time.sleep(PAIR_GAP_SECONDS)
            versions.append(each.place.lnd.write())
        lost = find_lost(line, versions, plan.settle_seconds)
        return Pairs(len(lost), len(set(versions[1::2]) & set(lost)))

    return _for_all(running, write)


def outages(world: World, plan: Plan, contestants: Sequence[Contestant]) -> dict[str, int]:
    """Let S3 be out of reach again and again, with one write in each outage; return what each lost.

    Several lines have their outages at the same time, a little apart, each with contestants of its
    own.
    """
    each_line = plan.outages // plan.outages_at_once
    shift = (plan.outage_seconds + UP_SECONDS) / plan.outages_at_once
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(plan.outages_at_once) as pool:
        lines = [stack.enter_context(world.line(far=True)) for _ in range(plan.outages_at_once)]
        running = [stack.enter_context(all_running(world, contestants, line)) for line in lines]
        began = time.monotonic()
        jobs = [
            pool.submit(_outages_of, line, runners, began + shift * index, each_line, plan)
            for index, (line, runners) in enumerate(zip(lines, running, strict=True))
        ]
        lost = [job.result() for job in jobs]
    return {each.name: sum(of_line[each.name] for of_line in lost) for each in contestants}


def _outages_of(
    line: Line, running: Sequence[Running], began: float, count: int, plan: Plan
) -> dict[str, int]:
    """Make the outages of one line; the writes are spread over the outage, from early to late."""
    seconds = plan.outage_seconds
    versions: dict[str, list[Written]] = {each.name: [] for each in running}
    for number in range(count):
        start = began + number * (seconds + UP_SECONDS)
        _sleep_until(start)
        line.take_down()
        _sleep_until(start + seconds * (number + 0.5) / count)
        for each in running:
            versions[each.name].append(each.place.lnd.write())
        _sleep_until(start + seconds)
        line.bring_up()
    return _for_all(
        running, lambda each, _: len(find_lost(line, versions[each.name], plan.settle_seconds))
    )


def find_lost(line: Line, versions: Sequence[Written], settle_seconds: float) -> list[Written]:
    """Return those versions that were not stored when the last one was, or a little later."""
    line.wait_for(versions[-1].sha256, settle_seconds)
    deadline = time.monotonic() + OTHERS_SHARE * settle_seconds
    return [
        each
        for each in versions
        if not line.wait_for(each.sha256, max(0.0, deadline - time.monotonic()))
    ]


def _for_all(
    running: Sequence[Running], work: Callable[[Running, float], Result]
) -> dict[str, Result]:
    """Do something with all at the same time, each told its share of a second; return the results
    by name.
    """
    with ThreadPoolExecutor(len(running)) as pool:
        jobs = {
            each.name: pool.submit(work, each, index / len(running))
            for index, each in enumerate(running)
        }
        return {name: job.result() for name, job in jobs.items()}


def _sleep_until(moment: float) -> None:
    """Sleep until a moment of the schedule."""
    threading.Event().wait(max(0.0, moment - time.monotonic()))
