"""Draws docs/outage.svg: one outage of S3 in a real run, with what LND wrote, what was staged and
what was stored.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kit import (
    CHECKOUT,
    Daemon,
    FaultProxy,
    Lnd,
    S3Server,
    assert_nothing_lost,
    settings_for,
)
from shared import staged

from bench.report import label, svg

if TYPE_CHECKING:
    from kit import Mode

AWAY, LAST_WRITE, BACK, END = 10.0, 34.0, 40.0, 50.0
SAMPLE_SECONDS = 0.05
LEFT, TOP, RIGHT, BOTTOM = 60, 46, 740, 320
WIDTH = RIGHT - LEFT
SERIES = [
    ("written by LND", "#555555", "6 4"),
    ("stored in the bucket", "#1a7f37", "none"),
    ("staged on disk", "#bc4c00", "none"),
]

Sample = tuple[float, int, int, int]


def run() -> list[Sample]:
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
                if daemon.stop() != 0:
                    raise RuntimeError(daemon.log)
        # A busy machine misses some versions, and after the drain the newest is put once more.
        assert_nothing_lost(lnd, server, bucket, "", staging, replaced_ok=True, refreshes=1)
    return samples


def path_of(samples: list[Sample], series: int, most: int) -> str:
    """Return the steps of one curve as SVG's path data."""
    steps = [f"M{LEFT} {BOTTOM}"]
    before: float = 0
    for sample in samples:
        number = sample[1 + series]
        if number != before:
            steps.append(f"H{LEFT + WIDTH * sample[0] / END:.1f}V{height(number, most):.1f}")
            before = number
    return "".join([*steps, f"H{RIGHT}"])


def height(number: float, most: int) -> float:
    """Return where a number of versions stands."""
    return BOTTOM - (BOTTOM - TOP) * number / most


def draw(samples: list[Sample]) -> str:
    most = max(written for _, written, _, _ in samples)
    scale = WIDTH / END
    away = f'x="{LEFT + AWAY * scale:.1f}" width="{(BACK - AWAY) * scale:.1f}"'
    parts = [
        f'<rect {away} y="{TOP}" height="{BOTTOM - TOP}" fill="#ffebe9"/>',
        label(LEFT + (AWAY + BACK) / 2 * scale, TOP - 8, "S3 out of reach", "middle"),
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#000000"/>',
        label((LEFT + RIGHT) / 2, BOTTOM + 36, "seconds", "middle"),
        label(LEFT, TOP - 8, "versions"),
    ]
    parts += [
        label(LEFT + seconds * scale, BOTTOM + 18, str(seconds), "middle")
        for seconds in range(0, int(END) + 1, 10)
    ]
    parts += [
        label(LEFT - 8, height(number, most) + 4, str(number), "end")
        for number in range(0, most + 1, 10)
    ]
    for index, (name, colour, dashes) in enumerate(SERIES):
        x = LEFT + 30 + index * 230
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        parts.append(f'<path d="{path_of(samples, index, most)}" fill="none" {stroke}/>')
        parts.append(f'<path d="M{x} 368h30" fill="none" {stroke}/>')
        parts.append(label(x + 38, 372, name))
    title = "One outage of S3: versions written, stored and staged over time"
    return svg(380, title, parts, width=800)


def main() -> int:
    target = CHECKOUT / "docs/outage.svg"
    target.write_text(draw(run()))
    print(f"drawn: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
