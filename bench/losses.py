"""How many versions are lost? Of pairs of writes that follow each other closely, and of those that
LND writes while S3 is out of reach. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bench.peers import AWS_V2
from bench.report import LOST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kit import Written
    from kit.line import Line

    from bench.peers import Contestant, Running, World
    from bench.report import Rows

Result = TypeVar("Result")

PAIR_GAP_SECONDS = 0.01
PAIR_EVERY_SECONDS = 1.0
UP_SECONDS = 3.0  # between two outages
OTHERS_SHARE = 0.2  # of the time for the last: for those before it, which go after it if at all


class Effort(NamedTuple):
    """How much is measured; times in seconds."""

    pairs: int
    outages: int
    outage: float
    lines: int  # that have outages at the same time
    settle: float  # for the last version to arrive


FULL = Effort(pairs=100, outages=20, outage=10.0, lines=5, settle=15.0)
QUICK = Effort(pairs=2, outages=1, outage=2.0, lines=1, settle=4.0)


def lost(world: World, rows: Rows, *, quick: bool) -> None:
    """Count what each contestant loses.

    Two that take as much CPU time as aws would be late by the machine's fault: the pairs of the
    second one are written while there are outages, in which little else happens.
    """
    effort = QUICK if quick else FULL
    peers = [each for each in world.contestants if not each.is_floor]
    of_pairs = in_pairs(world, effort, [each for each in peers if each.name != AWS_V2])
    with ThreadPoolExecutor(1) as pool:
        others = [each for each in peers if each.name == AWS_V2]
        second = pool.submit(in_pairs, world, effort, others)
        of_outages = in_outages(world, effort, peers)
        of_pairs |= second.result()
    for each in peers:
        all_of_them, newer = of_pairs[each.name]
        pairs, seconds = effort.pairs, f"{effort.outage:.0f} s"
        rows.add(LOST, f"of {2 * pairs} in {pairs} pairs", "", each.name, all_of_them)
        rows.add(LOST, f"of {pairs} that ended a pair", "", each.name, newer)
        figure = f"of {effort.outages} in outages of {seconds}"
        rows.add(LOST, figure, "", each.name, of_outages[each.name])


def in_pairs(
    world: World, effort: Effort, contestants: Sequence[Contestant]
) -> dict[str, tuple[int, int]]:
    """Write pairs to all in turns; return how many versions each lost, and how many newer ones."""
    with world.line() as line, world.running(contestants, line) as running:
        began = time.monotonic()

        def write(each: Running, offset: float) -> tuple[int, int]:
            written = []
            for number in range(effort.pairs):
                sleep_until(began + offset + number * PAIR_EVERY_SECONDS)
                written.append(each.place.lnd.write())
                time.sleep(PAIR_GAP_SECONDS)
                written.append(each.place.lnd.write())
            missing = find_lost(line, written, effort.settle)
            return len(missing), len(set(written[1::2]) & set(missing))

        return for_all(running, write)


def in_outages(world: World, effort: Effort, contestants: Sequence[Contestant]) -> dict[str, int]:
    """Let S3 be out of reach again and again, with one write in each outage; return what each lost.

    Several lines have their outages at the same time, a little apart, each with contestants of its
    own.
    """
    shift = (effort.outage + UP_SECONDS) / effort.lines
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(effort.lines) as pool:
        lines = [stack.enter_context(world.line(far=True)) for _ in range(effort.lines)]
        running = [stack.enter_context(world.running(contestants, line)) for line in lines]
        began = time.monotonic()
        jobs = [
            pool.submit(in_outages_of, line, runners, began + shift * index, effort)
            for index, (line, runners) in enumerate(zip(lines, running, strict=True))
        ]
        missing = [job.result() for job in jobs]
    return {each.name: sum(of_line[each.name] for of_line in missing) for each in contestants}


def in_outages_of(
    line: Line, running: Sequence[Running], began: float, effort: Effort
) -> dict[str, int]:
    """Make the outages of one line; the writes are spread over them, from early to late."""
    written: dict[str, list[Written]] = {each.name: [] for each in running}
    outages = effort.outages // effort.lines
    for number in range(outages):
        start = began + number * (effort.outage + UP_SECONDS)
        sleep_until(start)
        line.take_down()
        sleep_until(start + effort.outage * (number + 0.5) / outages)
        for each in running:
            written[each.name].append(each.place.lnd.write())
        sleep_until(start + effort.outage)
        line.bring_up()
    return for_all(running, lambda each, _: len(find_lost(line, written[each.name], effort.settle)))


def find_lost(line: Line, versions: Sequence[Written], settle: float) -> list[Written]:
    """Return those versions that were not stored when the last one was, or a little later."""
    line.wait_for(versions[-1].sha256, settle)
    deadline = time.monotonic() + OTHERS_SHARE * settle
    return [
        each
        for each in versions
        if not line.wait_for(each.sha256, max(0.0, deadline - time.monotonic()))
    ]


def for_all(
    running: Sequence[Running], work: Callable[[Running, float], Result]
) -> dict[str, Result]:
    """Work with all at the same time, each told its share of a second; return results by name."""
    with ThreadPoolExecutor(max(1, len(running))) as pool:
        jobs = {
            each.name: pool.submit(work, each, index / len(running))
            for index, each in enumerate(running)
        }
        return {name: job.result() for name, job in jobs.items()}


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
