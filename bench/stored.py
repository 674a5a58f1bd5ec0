"""How long it takes from LND's rename until S3 has stored the version, and how many round trips."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from kit.lnd import CHANNEL_SIZE, EMPTY_SIZE

from bench.plan import USUAL
from bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kit.line import Line

    from bench.peers import Contestant, Running
    from bench.plan import Plan
    from bench.rows import Case
    from bench.world import World

SIZES = "rename to stored, http on loopback, warm"
USUAL_SIZE = "rename to stored, 6,775 B"
COUNTED = "round trips of an update, counted"
STARTS_AT_ONCE = 4


def over(scheme: str, connection: str) -> str:
    """Return the group of the figures of a kind of connection, warm or cold."""
    return f"{USUAL_SIZE}, {scheme}, {connection}"


def size_of(channels: int) -> str:
    """Return the size of a backup of so many channels."""
    return f"{EMPTY_SIZE + CHANNEL_SIZE * channels:,} B"


@contextlib.contextmanager
def all_running(
    world: World, contestants: Sequence[Contestant], line: Line
) -> Iterator[list[Running]]:
    """Start all contestants on one line, and yield them when each has stored its first version."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(STARTS_AT_ONCE) as pool:

        def start(contestant: Contestant) -> Running:
            return contestant.start(
                world.place(contestant.name.replace(" ", "-"), line)
            ).__enter__()

        jobs = [pool.submit(start, contestant) for contestant in contestants]
        for job in jobs:
            stack.push(job.result())
        yield [job.result() for job in jobs]


def measure(world: World, plan: Plan, contestants: Sequence[Contestant]) -> list[Row]:
    """Return the rows of all lines, sizes and states of the connection."""
    rows = []
    for scheme in plan.near:
        with world.line(scheme) as line, all_running(world, contestants, line) as running:
            rows += on_loopback(plan, scheme, running)
    for scheme in plan.far:
        with world.line(scheme, far=True) as line, all_running(world, contestants, line) as running:
            rows += counted(scheme, running)
            for milliseconds in plan.round_trips_ms:
                line.set_round_trip(milliseconds / 1000)
                rows += at_distance(plan, scheme, f"{milliseconds} ms", running, plan.rounds_far)
    return rows


def on_loopback(plan: Plan, scheme: str, running: Sequence[Running]) -> list[Row]:
    """Measure without a delay; all sizes over http, and the usual one over https and on cold
    connections.
    """
    rows = at_distance(plan, scheme, "0 ms", running, plan.rounds)
    if scheme != "http":
        return rows
    usual = {row.contestant: row for row in rows if row.group == over(scheme, "warm")}
    for channels in plan.sizes:
        case: Case = {"size": size_of(channels)}
        if channels == USUAL:
            rows += [row._replace(group=SIZES, case=case) for row in usual.values()]
        else:
            rows += timed(
                SIZES, case, running, plan.rounds_of_others, plan.slow_every, channels=channels
            )
    return rows


def at_distance(
    plan: Plan, scheme: str, distance: str, running: Sequence[Running], rounds: int
) -> list[Row]:
    """Measure the usual size, warm and cold. What connects anew for each update knows no
    difference.
    """
    case: Case = {"round trip": distance}
    keepers = [each for each in running if each.contestant.keeps_connection]
    warm = timed(over(scheme, "warm"), case, running, rounds, plan.slow_every)
    cold = timed(over(scheme, "cold"), case, keepers, -(-rounds // 2), plan.slow_every, cold=True)
    return warm + cold


def timed(  # noqa: PLR0913 - the cell of a table has that many sides
    group: str,
    case: Case,
    running: Sequence[Running],
    rounds: int,
    slow_every: int,
    *,
    channels: int = USUAL,
    cold: bool = False,
) -> list[Row]:
    """Update one contestant after the other, round by round, and return the milliseconds of each.

    The first round opens the connections, and is not counted. A cold update is one whose connection
    was closed before.
    """
    values: dict[str, list[float]] = {each.name: [] for each in running}
    for number in range(-1, rounds):
        for each in running:
            turn = each.contestant.fast or number % slow_every == 0
            if not (turn if number >= 0 else each.contestant.keeps_connection):
                continue
            if cold:
                each.place.line.cut()
            version, stored = each.update(channels)
            if stored and number >= 0:
                values[each.name].append((stored.at - version.renamed_at) * 1000)
    return [Row(group, "", "ms", name, case, found) for name, found in values.items()]


def counted(scheme: str, running: Sequence[Running]) -> list[Row]:
    """Count the round trips of an update on a warm connection and on a cold one, handshakes
    included.
    """
    rows = []
    for each in running:
        line = each.place.line
        if each.contestant.keeps_connection:
            each.update()  # the server may have closed what was idle while the others started
        for connection in ("warm", "cold") if each.contestant.keeps_connection else ("cold",):
            if connection == "cold":
                line.cut()
            line.reset_counts()
            each.update()
            case: Case = {"scheme": scheme, "connection": connection}
            rows.append(Row(COUNTED, "", "", each.name, case, [line.counts.round_trips]))
    return rows
