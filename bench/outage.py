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
    VERSION_NAME,
    Daemon,
    FaultProxy,
    Lnd,
    S3Server,
    assert_nothing_lost,
    settings_for,
)

if TYPE_CHECKING:
    from kit import Mode

AWAY, LAST_WRITE, BACK, END = 10.0, 34.0, 40.0, 50.0
SAMPLE_SECONDS = 0.05
LEFT, TOP, RIGHT, BOTTOM = 60, 46, 740, 320
SERIES = [
    ("written by LND", "#555555", "6 4"),
    ("stored in the bucket", "#1a7f37", ""),
    ("staged on disk", "#bc4c00", ""),
]

Sample = tuple[float, int, int, int]


def run() -> list[Sample]:
    """Run the daemon through one outage, and return the numbers of versions written, stored and
    staged over time.
    """
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
                    staged = sum(
                        bool(VERSION_NAME.fullmatch(path.name)) for path in staging.iterdir()
                    )
                    stored = daemon.log.count(" stored s3://")
                    samples.append((now, len(lnd.written), stored, staged))
                    time.sleep(SAMPLE_SECONDS)  # a sample is due at intervals
                if daemon.stop() != 0:
                    raise RuntimeError(daemon.log)
        assert_nothing_lost(lnd, server, bucket, "", staging, replaced_ok=True)  # on a busy machine
    return samples


def path_of(samples: list[Sample], series: int, most: int) -> str:
    """Return the steps of one curve as SVG's path data."""
    steps = [f"M{LEFT} {BOTTOM}"]
    before: float = 0
    for sample in samples:
        number = sample[1 + series]
        if number != before:
            x, y = LEFT + (RIGHT - LEFT) * sample[0] / END, BOTTOM - (BOTTOM - TOP) * number / most
            steps.append(f"H{x:.1f}V{y:.1f}")
            before = number
    return "".join([*steps, f"H{RIGHT}"])


def draw(samples: list[Sample]) -> str:
    """Return the plot as SVG."""
    most = max(written for _, written, _, _ in samples)
    scale = (RIGHT - LEFT) / END
    parts = [
        (
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 380" '
            'font-family="sans-serif" font-size="13">'
        ),
        "<title>One outage of S3: versions written, stored and staged over time</title>",
        '<rect width="800" height="380" fill="#ffffff"/>',
        f'<rect x="{LEFT + AWAY * scale:.1f}" y="{TOP}" fill="#ffebe9"',
        f' width="{(BACK - AWAY) * scale:.1f}" height="{BOTTOM - TOP}"/>',
        (
            f'<text x="{LEFT + (AWAY + BACK) / 2 * scale:.1f}" y="{TOP - 8}" '
            f'text-anchor="middle">S3 out of reach</text>'
        ),
        f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#000000"/>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">seconds</text>',
        f'<text x="{LEFT}" y="{TOP - 8}">versions</text>',
    ]
    parts += [
        f'<text x="{LEFT + seconds * scale:.1f}" y="{BOTTOM + 18}" '
        f'text-anchor="middle">{seconds}</text>'
        for seconds in range(0, int(END) + 1, 10)
    ]
    parts += [
        f'<text x="{LEFT - 8}" y="{BOTTOM - (BOTTOM - TOP) * number / most + 4:.1f}" '
        f'text-anchor="end">{number}</text>'
        for number in range(0, most + 1, 10)
    ]
    for index, (label, colour, dashes) in enumerate(SERIES):
        data = path_of(samples, index, most)
        stroke = f'stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes or "none"}"'
        x = LEFT + 30 + index * 230
        parts.append(f'<path d="{data}" fill="none" {stroke}/>')
        parts.append(
            f'<path d="M{x} 368h30" fill="none" {stroke}/><text x="{x + 38}" y="372">{label}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> int:
    """Run and draw."""
    target = CHECKOUT / "docs/outage.svg"
    target.write_text(draw(run()))
    print(f"drawn: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
