"""How long does it take? From LND's rename until S3 has stored the version, with the round trips
that this needs; from the start of a process to the first version stored; for each version of a
backlog that is drained; and for `list` and `restore`.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from kit.lnd import CHANNEL_SIZE, EMPTY_SIZE

from bench.peers import (
    AWS_V1,
    AWS_V2,
    BARE,
    BARE_PUT,
    PATIENCE_SECONDS,
    PROGRAM,
    THIS,
    Loop,
    Running,
    versions,
)
from bench.report import BACKLOG, COUNTED, DRAIN, READING, SIZES, START, rename_to_stored
from bench.resources import peak_rss

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kit.line import Line

    from bench.peers import World
    from bench.report import Case, Rows

USUAL = 10  # channels
DRAIN_ROUND_TRIP_SECONDS = 0.04
BARE_PUTS = 20
BACKLOGS = (100, 10_000)
LOOK_SECONDS = 0.005


class Effort(NamedTuple):
    """How much is measured: unless `--quick` says less, this."""

    near: tuple[str, ...] = ("http", "https")  # schemes on loopback
    far: tuple[str, ...] = ("http", "https")  # schemes with round trips
    round_trips_ms: tuple[int, ...] = (40, 150)
    # In channels: 45, 718, 6,775, 67,345 and 673,045 bytes.
    sizes: tuple[int, ...] = (0, 1, USUAL, 100, 1000)
    rounds: int = 28  # on loopback, at the usual size
    rounds_of_others: int = 7  # on loopback, at the other sizes
    rounds_far: int = 12
    slow_every: int = 7  # rounds, for what starts a process for each event
    starts: int = 7
    drained: int = 1_000
    drains: int = 5  # of each backlog
    objects: int = 5_000
    reads: int = 3


FULL = Effort()
QUICK = Effort(
    near=("http",),
    far=("https",),
    round_trips_ms=(40,),
    sizes=(USUAL,),
    rounds=4,
    rounds_of_others=0,
    rounds_far=2,
    slow_every=4,
    starts=1,
    drained=20,
    drains=1,
    objects=100,
    reads=1,
)


def updates(world: World, rows: Rows, effort: Effort) -> None:
    """Measure updates: on loopback, all sizes over http; at a distance, the usual one."""
    for scheme in effort.near:
        with world.line(scheme) as line, world.running(world.contestants, line) as running:
            usual = at_distance(rows, effort, scheme, 0, running, rounds=effort.rounds)
            for channels in effort.sizes if scheme == "http" else ():
                found = usual
                if channels != USUAL:
                    found = timed(running, effort.rounds_of_others, effort, channels=channels)
                for name, values in found.items():
                    size = f"{EMPTY_SIZE + CHANNEL_SIZE * channels:,} B"
                    rows.add(SIZES, "", "ms", name, *values, size=size)
    for scheme in effort.far:
        line = world.line(scheme, far=True)
        with line, world.running(world.contestants, line) as running:
            count(rows, scheme, running)
            for milliseconds in effort.round_trips_ms:
                line.set_round_trip(milliseconds / 1000)
                at_distance(rows, effort, scheme, milliseconds, running, rounds=effort.rounds_far)


def at_distance(  # noqa: PLR0913 - the cell of a table has that many sides
    rows: Rows, effort: Effort, scheme: str, ms: int, running: Sequence[Running], *, rounds: int
) -> dict[str, list[float]]:
    """Measure the usual size, warm, and cold where that differs, and return the warm values."""
    case: Case = {"round trip": f"{ms} ms"}
    keepers = [each for each in running if each.contestant.keeps_connection]
    warm = timed(running, rounds, effort)
    cold = timed(keepers, -(-rounds // 2), effort, cold=True)
    for connection, found in (("warm", warm), ("cold", cold)):
        for name, values in found.items():
            rows.add(rename_to_stored(scheme, connection), "", "ms", name, *values, **case)
    return warm


def timed(
    running: Sequence[Running],
    rounds: int,
    effort: Effort,
    *,
    channels: int = USUAL,
    cold: bool = False,
) -> dict[str, list[float]]:
    """Update one contestant after the other, round by round, and return the milliseconds of each.

    The first round opens the connections, and is not counted. A cold update is one whose connection
    was closed before.
    """
    values: dict[str, list[float]] = {each.name: [] for each in running}
    for number in range(-1, rounds):
        for each in running:
            turn = each.contestant.fast or number % effort.slow_every == 0
            if not (turn if number >= 0 else each.contestant.keeps_connection):
                continue
            if cold:
                each.place.line.cut()
            version, stored = each.update(channels)
            if stored and number >= 0:
                values[each.name].append((stored.at - version.renamed_at) * 1000)
    return values


def count(rows: Rows, scheme: str, running: Sequence[Running]) -> None:
    """Count the round trips of an update, warm and cold, handshakes included."""
    for each in running:
        line, keeps = each.place.line, each.contestant.keeps_connection
        if keeps:
            each.update()  # the server may have closed what was idle while the others started
        for connection in ("warm", "cold") if keeps else ("cold",):
            if connection == "cold":
                line.cut()
            line.reset_counts()
            each.update()
            case: Case = {"scheme": scheme, "connection": connection}
            rows.add(COUNTED, "", "", each.name, line.counts.round_trips, **case)


def starts(world: World, rows: Rows, effort: Effort) -> None:
    """Measure from the start of a process until S3 has stored the file: this program, `aws s3 cp`,
    and a bare put.

    A round more is run before and not counted, in which the byte code of all is compiled and read
    from the disk.
    """
    wanted = (PROGRAM, AWS_V1, AWS_V2, BARE)
    chosen = [each for each in world.contestants if each.name in wanted]
    with world.line() as line:
        places = [world.place(f"start-{each.name}", line) for each in chosen]
        for number in range(-1, effort.starts):
            for contestant, place in zip(chosen, places, strict=True):
                version = place.lnd.write()
                command = contestant.once(place) if isinstance(contestant, Loop) else ()
                began = time.monotonic()
                with Running(contestant, place, command) as process:
                    process.tell()
                    stored = line.wait_for(version.sha256)
                if not stored:
                    raise RuntimeError(f"{contestant.name} stored nothing:\n{process.output}")
                if number >= 0:
                    rows.add(START, "", "ms", contestant.name, (stored.at - began) * 1e3)


def drain(world: World, rows: Rows, effort: Effort) -> None:
    """Measure how long this program takes for each version of a backlog, in round trips of the
    line, and count them.

    Beside it the floor: a bare put after the other on the same line.
    """
    trip = DRAIN_ROUND_TRIP_SECONDS
    case: Case = {"staged": effort.drained, "round trip": f"{trip * 1e3:.0f} ms"}

    def add(name: str, seconds: Sequence[float], counted: float) -> None:
        rows.add(DRAIN, "time", "round trips", name, *(each / trip for each in seconds), **case)
        rows.add(DRAIN, "counted, handshake included", "round trips", name, counted, **case)

    with world.line(far=True) as line:
        line.set_round_trip(trip)
        with drained(world, line, effort.drained, effort.drained) as moments:
            add(PROGRAM, [mean_gap(moments)], line.counts.round_trips / len(moments))
        with world.running([BARE_PUT], line) as [floor]:
            line.reset_counts()
            for _ in range(BARE_PUTS):
                floor.update(channels=1)
            puts = floor.puts()[-BARE_PUTS:]
        add(BARE, [end - begin for begin, end in puts], line.counts.round_trips / BARE_PUTS)


def backlogs(world: World, rows: Rows, effort: Effort) -> None:
    """Measure whether each of the same number of versions takes longer if more of them wait."""
    for _ in range(effort.drains):
        for staged in BACKLOGS:
            with world.line() as line, drained(world, line, staged, BACKLOGS[0]) as moments:
                rows.add(BACKLOG, "", "ms", PROGRAM, mean_gap(moments) * 1e3, staged=staged)


@contextlib.contextmanager
def drained(world: World, line: Line, staged: int, wanted: int) -> Iterator[list[float]]:
    """Drain a backlog, newest first; yield when each version was stored, once that many are."""
    place = world.place("drain", line)
    last = place.stage(staged)[-wanted]
    with Running(THIS, place) as running:
        if not line.wait_for(last, PATIENCE_SECONDS + wanted * (0.1 + 4 * line.round_trip)):
            raise RuntimeError(f"staged versions were not stored:\n{running.output}")
        yield sorted(each.at for each in line.stored())[: wanted + 1]


def mean_gap(moments: Sequence[float]) -> float:
    """Return how long it took from one to the next."""
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def reading(world: World, rows: Rows, effort: Effort) -> None:
    """Measure `list` and `restore` of this program with many versions in the bucket."""
    with world.line(far=True) as line:
        place = world.place("reading", line)
        for name, data in versions(effort.objects):
            world.server.put_version(place.bucket, place.prefix + name, data)
        for number in range(effort.reads):
            output = place.home / f"restored-{number}"
            for command in (["list"], ["restore", "--output", str(output)]):
                line.reset_counts()
                began = time.monotonic()
                with Running(THIS, place, [*THIS.command(place), *command]) as running:
                    peak = peak_until_end(running.process)
                    seconds = time.monotonic() - began
                if running.process.returncode:
                    raise RuntimeError(f"{command[0]} failed:\n{running.output}")
                for figure, unit, value in (
                    ("time on loopback", "s", seconds),
                    ("counted, handshake included", "round trips", line.counts.round_trips),
                    ("RSS at peak", "MB", peak),
                ):
                    case: Case = {"command": command[0], "objects": effort.objects}
                    rows.add(READING, figure, unit, PROGRAM, value, **case)


def peak_until_end(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end of a process, and return the largest RSS that it had, in MB.

    What wait4(2) tells of it begins with the memory of the process that started it.
    """
    peak = 0.0
    while True:
        with contextlib.suppress(ProcessLookupError):
            peak = peak_rss(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LOOK_SECONDS)
            return peak
