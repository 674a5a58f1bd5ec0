"""What is aimed at, as ratios within one run, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bench import footprint, jobs, losses, stored
from bench.peers import AwsV1, AwsV2, BareSdk, Program, Rclone

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.results import Results
    from bench.rows import Case

PROGRAM, BARE = Program.name, BareSdk.name
NEAR: Case = {"round trip": "0 ms"}
NEAR_GROUP = stored.over("http", "warm")


class Target(NamedTuple):
    """A limit for a ratio or a number: None where the run did not measure it."""

    what: str
    limit: float
    figure: Callable[[Results], float | None]
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Tell whether a value is within the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


def ratio(  # noqa: PLR0913 - a cell of a table over another one
    results: Results,
    group: str,
    over: str,
    under: str,
    *,
    figure: str = "",
    case: Case | None = None,
) -> float | None:
    """Return how many times the median of one contestant is that of another."""
    above, below = (results.find(group, name, figure, case) for name in (over, under))
    return above.median / below.median if above and below else None


def near_bare(results: Results) -> float | None:
    """Return the loopback latency against a bare put."""
    return ratio(results, NEAR_GROUP, PROGRAM, BARE, case=NEAR)


def far_bare(results: Results) -> float | None:
    """Return the worst of the latencies at 40 ms against a bare put."""
    ratios = [
        ratio(results, stored.over(scheme, connection), PROGRAM, BARE, case={"round trip": "40 ms"})
        for scheme in ("http", "https")
        for connection in ("warm", "cold")
    ]
    return max((each for each in ratios if each), default=None)


def trips(connection: str) -> Callable[[Results], float | None]:
    """Return what tells the round trips of this program over https."""

    def figure(results: Results) -> float | None:
        row = results.find(
            stored.COUNTED, PROGRAM, case={"scheme": "https", "connection": connection}
        )
        return row.median if row else None

    return figure


def times_faster(*names: str) -> Callable[[Results], float | None]:
    """Return what tells how many times faster than the fastest of these this program is on
    loopback.
    """

    def figure(results: Results) -> float | None:
        ratios = [ratio(results, NEAR_GROUP, name, PROGRAM, case=NEAR) for name in names]
        return min((each for each in ratios if each), default=None)

    return figure


def lost(results: Results) -> float | None:
    """Return how many versions this program lost."""
    rows = [row for row in results.rows if (row.group, row.contestant) == (losses.GROUP, PROGRAM)]
    return sum(row.median for row in rows) if rows else None


def start(results: Results) -> float | None:
    """Return the start against the faster `aws s3 cp`."""
    ratios = [ratio(results, jobs.START, PROGRAM, name) for name in (AwsV1.name, AwsV2.name)]
    return max((each for each in ratios if each), default=None)


def drain(results: Results) -> float | None:
    """Return the round trips that a staged version takes."""
    row = results.find(jobs.DRAIN, PROGRAM, "time")
    return row.median if row else None


def staged(results: Results) -> float | None:
    """Return the memory with the most staged against that with none."""
    rows = [row for row in results.rows if (row.group, row.figure) == (footprint.AWAY, "PSS")]
    return rows[-1].median / rows[0].median if rows else None


TARGETS = [
    Target(
        "rename to stored, 6,775 B, http on loopback, warm, against a bare put_object",
        1.5,
        near_bare,
    ),
    Target("round trips, counted, https, warm", 1, trips("warm")),
    Target("round trips, counted, https, cold", 3, trips("cold")),
    Target(
        "rename to stored at 40 ms, against a bare put_object: the worst of four", 1.1, far_bare
    ),
    Target(
        "times faster than rclone for each event, loopback",
        10,
        times_faster(Rclone.name),
        at_least=True,
    ),
    Target(
        "times faster than aws s3 cp for each event, loopback",
        50,
        times_faster(AwsV1.name, AwsV2.name),
        at_least=True,
    ),
    Target("versions lost, in pairs and outages", 0, lost),
    Target(
        "idle PSS, against a bare process with a boto3 client after one put",
        1.0,
        lambda results: ratio(results, footprint.REST, PROGRAM, BARE, figure="PSS"),
    ),
    Target("start to first version stored, against aws s3 cp", 1.0, start),
    Target("drain at 40 ms: round trips for each staged version", 1.2, drain),
    Target("PSS with the most staged (10,000; QUICK=1: 1,000) against 0", 1.1, staged),
]
