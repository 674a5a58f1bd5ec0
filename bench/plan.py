"""How much is measured: all of it, or enough to see that everything works."""

from __future__ import annotations

from typing import NamedTuple

PROGRAM = "this program"
CHANNELS = (0, 1, 10, 100, 1000)  # 45, 718, 6,775, 67,345 and 673,045 bytes
USUAL = 10
ROUND_TRIPS_MS = (40, 150)


class Plan(NamedTuple):
    """The size of a run."""

    quick: bool
    near: tuple[str, ...]  # schemes on loopback
    far: tuple[str, ...]  # schemes with round trips
    sizes: tuple[int, ...]  # in channels
    round_trips_ms: tuple[int, ...]
    rounds: int  # on loopback, at the usual size
    rounds_of_others: int  # on loopback, at the other sizes
    rounds_far: int
    slow_every: (
        int  # contestants that start a process for each event take part in every so-manieth round
    )
    pairs: int
    outages: int
    outage_seconds: float
    outages_at_once: int
    settle_seconds: float  # for the last version to arrive


FULL = Plan(
    quick=False,
    near=("http", "https"),
    far=("http", "https"),
    sizes=CHANNELS,
    round_trips_ms=ROUND_TRIPS_MS,
    rounds=28,
    rounds_of_others=7,
    rounds_far=12,
    slow_every=7,
    pairs=100,
    outages=20,
    outage_seconds=10.0,
    outages_at_once=5,
    settle_seconds=15.0,
)
QUICK = Plan(
    quick=True,
    near=("http",),
    far=("https",),
    sizes=(USUAL,),
    round_trips_ms=(40,),
    rounds=4,
    rounds_of_others=0,
    rounds_far=2,
    slow_every=4,
    pairs=2,
    outages=1,
    outage_seconds=2.0,
    outages_at_once=1,
    settle_seconds=4.0,
)
