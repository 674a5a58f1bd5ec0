"""How many versions are lost? Of pairs of writes that follow each other closely, and of those that
LND writes while S3 is out of reach. Nothing is timed here. As a program it draws docs/outage.svg
from a real run: what one outage does to what LND wrote.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kit import CHECKOUT, Daemon, FaultProxy, Lnd, S3Server, assert_nothing_lost, settings_for
from shared import staged

from bench.peers import AWS_V2
from bench.report import LOST, label, svg

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kit import Mode, Written
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

    pairs: int = 100
    outages: int = 20
    outage: float = 10.0
    lines: int = 5  # that have outages at the same time
    settle: float = 15.0  # for the last version to arrive


FULL = Effort()
QUICK = Effort(pairs=2, outages=1, outage=2.0, lines=1, settle=4.0)


def lost(world: World, rows: Rows, effort: Effort) -> None:
    """Count what each contestant loses.

    Two that take as much CPU time as aws would be late by the machine's fault: the pairs of the
    second one are written while there are outages, in which little else happens.
    """
    peers = [each for each in world.contestants if not each.is_floor]
    of_pairs = in_pairs(world, effort, [each for each in peers if each.name != AWS_V2])
    with ThreadPoolExecutor(1) as pool:
        others = [each for each in peers if each.name == AWS_V2]
        second = pool.submit(in_pairs, world, effort, others)
        of_outages = in_outages(world, effort, peers)
        of_pairs |= second.result()
    pairs, outages = effort.pairs, f"{effort.outages} in outages of {effort.outage:.0f} s"
    for each in peers:
        all_of_them, newer = of_pairs[each.name]
        rows.add(LOST, f"of {2 * pairs} in {pairs} pairs", "", each.name, all_of_them)
        rows.add(LOST, f"of {pairs} that ended a pair", "", each.name, newer)
        rows.add(LOST, f"of {outages}", "", each.name, of_outages[each.name])


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


# The picture of one outage: its times in seconds, and its place in pixels.
AWAY, LAST_WRITE, BACK, END = 10.0, 34.0, 40.0, 50.0
SAMPLE_SECONDS = 0.05
LEFT, TOP, RIGHT, BOTTOM = 60, 46, 740, 320
SERIES = {  # colour and dashes
    "written by LND": ("#555555", "6 4"),
    "stored in the bucket": ("#1a7f37", "none"),
    "staged on disk": ("#bc4c00", "none"),
}

Sample = tuple[float, int, int, int]  # when, and how many in the order of SERIES


def one_outage() -> list[Sample]:
    """Run the daemon through one outage, and return what was written, stored and staged when."""
    chance = random.Random(1)  # noqa: S311 - the same picture each time, as far as that goes
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name, S3Server(Path(name, "s3")) as server:
        lnd, staging, bucket = Lnd(Path(name, "lnd")), Path(name, "staging"), server.create_bucket()
        with FaultProxy(server.host, server.port) as line:
            env = settings_for(server, bucket, "", lnd, staging, endpoint=line.endpoint())
            with Daemon(env) as daemon:
                began, due = time.monotonic(), 0.5
                while (now := time.monotonic() - began) < END:
                    if due < now < LAST_WRITE:
                        lnd.write()
                        due = now + chance.choice([0.15, 0.3, 0.6, 1.5, 3.0])
                    wanted: Mode = "refuse" if AWAY <= now < BACK else "pass"
                    if line.mode != wanted:
                        line.set(wanted, cut=True)
                    stored = {name[-6:] for name in daemon.stored_names()}
                    samples.append((now, len(lnd.written), len(stored), len(staged(staging))))
                    time.sleep(SAMPLE_SECONDS)  # a sample is due at intervals
                assert daemon.stop() == 0, daemon.log  # noqa: S101
        # A busy machine misses some versions, and after the drain the newest is put once more.
        assert_nothing_lost(lnd, server, bucket, "", staging, replaced_ok=True, refreshes=1)
    return samples


def draw(samples: Sequence[Sample]) -> str:
    """Return the picture: each series goes up and down in steps."""
    most = max(written for _, written, _, _ in samples)

    def across(seconds: float) -> float:
        return LEFT + (RIGHT - LEFT) * seconds / END

    def height(number: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * number / most

    away = f'x="{across(AWAY):.1f}" width="{across(BACK) - across(AWAY):.1f}"'
    parts = [
        f'<rect {away} y="{TOP}" height="{BOTTOM - TOP}" fill="#ffebe9"/>',
        label(across((AWAY + BACK) / 2), TOP - 8, "S3 out of reach", "middle"),
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#000000"/>',
        label((LEFT + RIGHT) / 2, BOTTOM + 36, "seconds", "middle"),
        label(LEFT, TOP - 8, "versions"),
    ]
    parts += [
        label(across(seconds), BOTTOM + 18, str(seconds), "middle")
        for seconds in range(0, int(END) + 1, 10)
    ]
    parts += [
        label(LEFT - 8, height(number) + 4, str(number), "end") for number in range(0, most + 1, 10)
    ]
    for index, (name, (colour, dashes)) in enumerate(SERIES.items()):
        steps, before = f"M{LEFT} {BOTTOM}", 0
        for seconds, *numbers in samples:
            if (number := numbers[index]) != before:
                steps += f"H{across(seconds):.1f}V{height(number):.1f}"
                before = number
        x = LEFT + 30 + index * 230
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<path d="{steps}H{RIGHT}" fill="none" {stroke}/>')
        parts.append(f'<path d="M{x} 368h30" fill="none" {stroke}/>')
        parts.append(label(x + 38, 372, name))
    title = "One outage of S3: versions written, stored and staged over time"
    return svg(380, title, parts, width=800)


if __name__ == "__main__":
    (CHECKOUT / "docs/outage.svg").write_text(draw(one_outage()))
