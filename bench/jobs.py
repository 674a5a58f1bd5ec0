"""What is done in one go: start until the first version is stored, drain what is staged, list,
restore.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from kit import script_environment

from bench.backlog import fill, stage
from bench.collect import Rows
from bench.peers import AwsV1, BareSdk, Program, Running
from bench.processes import peak_rss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.peers import Contestant
    from bench.plan import Plan
    from bench.rows import Case, Row
    from bench.world import Place, World

START = "start to first version stored"
DRAIN = "drain of what is staged, by round trips for each version"
READING = "list and restore"
PATIENCE_SECONDS = 30.0
ROUND_TRIP_SECONDS = 0.04
BARE_PUTS = 20
LOOK_SECONDS = 0.005


class Effort(NamedTuple):
    """How much is measured."""

    starts: int
    drained: int
    objects: int
    reads: int


FULL = Effort(starts=7, drained=1_000, objects=5_000, reads=3)
QUICK = Effort(starts=1, drained=20, objects=100, reads=1)


def measure(world: World, plan: Plan, contestants: Sequence[Contestant]) -> list[Row]:
    """Return all rows."""
    effort = QUICK if plan.quick else FULL
    return starts(world, effort, contestants) + drain(world, effort) + reading(world, effort)


def starts(world: World, effort: Effort, contestants: Sequence[Contestant]) -> list[Row]:
    """Measure from the start of a process until S3 has stored the file: this program, `aws s3 cp`,
    and a bare put.

    A round more is run before and not counted, in which the byte code of all is compiled and read
    from the disk.
    """
    rows = Rows(START)
    chosen = [each for each in contestants if isinstance(each, Program | AwsV1 | BareSdk)]
    with world.line() as line:
        places = [world.place(f"start-{number}", line) for number in range(len(chosen))]
        for number in range(-1, effort.starts):
            for contestant, place in zip(chosen, places, strict=True):
                version = place.lnd.write()
                began = time.monotonic()
                process = begin(contestant, place)
                try:
                    stored = line.wait_for(version.sha256)
                finally:
                    process.kill()
                    process.communicate()
                if not stored:
                    raise RuntimeError(f"{contestant.name} stored nothing")
                if number >= 0:
                    rows.add("", "ms", contestant.name, (stored.at - began) * 1e3)
    return rows.all()


def begin(contestant: Contestant, place: Place) -> subprocess.Popen[bytes]:
    """Start a process that stores the file as it is now."""
    file, command = str(place.lnd.path), list(map(str, contestant.command(place)))
    if isinstance(contestant, AwsV1):
        command = shlex.split(
            contestant.upload(place, shlex.quote(file), f"{place.prefix}{time.time_ns()}.backup")
        )
    process = subprocess.Popen(
        command,
        env=script_environment(contestant.environment(place), str(place.home)),
        cwd=place.home,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if isinstance(contestant, BareSdk) and process.stdin:
        process.stdin.write(f"{file}\n".encode())
        process.stdin.flush()
    return process


def drain(world: World, effort: Effort) -> list[Row]:
    """Measure how long this program takes for each version of a backlog, in round trips of the
    line, and count them.

    Beside it the floor: a bare put after the other on the same line.
    """
    rows, program, floor = Rows(DRAIN), Program(), BareSdk()
    program.install()
    case: Case = {"staged": effort.drained, "round trip": f"{ROUND_TRIP_SECONDS * 1e3:.0f} ms"}
    with world.line(far=True) as line:
        line.set_round_trip(ROUND_TRIP_SECONDS)
        place = world.place("drain", line)
        oldest = stage(place, effort.drained)[0]
        running = Running(program, place)
        try:  # newest first: the oldest is the last
            if not line.wait_for(
                oldest.sha256, PATIENCE_SECONDS + 4 * effort.drained * ROUND_TRIP_SECONDS
            ):
                raise RuntimeError(
                    f"the oldest of the staged versions was not stored:\n{running.output}"
                )
            counted = line.counts.round_trips
        finally:
            running.stop()
        moments = sorted(each.at for each in line.stored())
        seconds = (moments[-1] - moments[0]) / (len(moments) - 1)
        rows.add("time", "round trips", program.name, seconds / ROUND_TRIP_SECONDS, **case)
        rows.add(
            "counted, handshake included",
            "round trips",
            program.name,
            counted / len(moments),
            **case,
        )
        with floor.start(world.place("bare", line)) as bare:
            line.reset_counts()
            for _ in range(BARE_PUTS):
                bare.update(channels=1)
            puts = re.findall(r"^put (\S+) (\S+)", bare.output, re.MULTILINE)[-BARE_PUTS:]
        for began, ended in puts:
            rows.add(
                "time",
                "round trips",
                floor.name,
                (float(ended) - float(began)) / ROUND_TRIP_SECONDS,
                **case,
            )
        rows.add(
            "counted, handshake included",
            "round trips",
            floor.name,
            line.counts.round_trips / BARE_PUTS,
            **case,
        )
    return rows.all()


def reading(world: World, effort: Effort) -> list[Row]:
    """Measure `list` and `restore` of this program with many versions in the bucket."""
    rows, program = Rows(READING), Program()
    program.install()
    with world.line(far=True) as line:
        place = world.place("reading", line)
        fill(world, place, effort.objects)
        env = script_environment(program.environment(place), str(place.home))
        for number in range(effort.reads):
            output = place.home / f"restored-{number}"
            for command in (["list"], ["restore", "--output", str(output)]):
                line.reset_counts()
                began = time.monotonic()
                process = subprocess.Popen(
                    [*program.command(place), *command],
                    env=env,
                    cwd=place.home,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
                peak = peak_until_end(process)
                seconds = time.monotonic() - began
                said = process.communicate()[1].decode()
                if process.returncode:
                    raise RuntimeError(f"{command[0]} failed:\n{said}")
                case: Case = {"command": command[0], "objects": effort.objects}
                rows.add("time on loopback", "s", program.name, seconds, **case)
                rows.add(
                    "counted, handshake included",
                    "round trips",
                    program.name,
                    line.counts.round_trips,
                    **case,
                )
                rows.add("RSS at peak", "MB", program.name, peak, **case)
    return rows.all()


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
