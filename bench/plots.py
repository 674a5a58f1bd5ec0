"""Draws docs/latency.svg and docs/footprint.svg from the stored results."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from kit import CHECKOUT

from bench import footprint, stored
from bench.peers import CONTESTANTS, BareSdk
from bench.rows import number

if TYPE_CHECKING:
    from pathlib import Path

    from bench.results import Results

NAMES = [*(each.name for each in CONTESTANTS), BareSdk.name]
COLOURS = [
    "#1a7f37",
    "#0969da",
    "#8250df",
    "#bc4c00",
    "#cf222e",
    "#9a6700",
    "#bf3989",
    "#57606a",
    "#000000",
]
LEFT, TOP, RIGHT, BOTTOM = 70, 50, 560, 400
FLAT_LEFT, BAR, GAP = 170, 14, 34
DISTANCES = [0, 40, 150]


def draw(results: Results) -> dict[Path, str]:
    """Return the drawings by their paths."""
    return {
        CHECKOUT / "docs/latency.svg": latency(results),
        CHECKOUT / "docs/footprint.svg": small(results),
    }


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a drawing on white ground."""
    box = f'viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13">'
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>\n"])


def text(x: float, y: float, what: str, anchor: str = "start", colour: str = "#000000") -> str:
    """Return a line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(what)}</text>'
    )


def points(results: Results, name: str) -> list[tuple[int, float]]:
    """Return the median latency over https, warm, by round-trip time."""
    rows = {
        each: results.find(stored.over("https", "warm"), name, case={"round trip": f"{each} ms"})
        for each in DISTANCES
    }
    return [(distance, row.median) for distance, row in rows.items() if row]


def latency(results: Results) -> str:
    """Draw the latency of each contestant against the round-trip time, on a logarithmic scale."""
    curves = {name: found for name in NAMES if (found := points(results, name))}
    values = [value for found in curves.values() for _, value in found]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def place(distance: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * distance / DISTANCES[-1], BOTTOM - (BOTTOM - TOP) * share

    parts = [text(LEFT, TOP - 20, "LND's rename to stored, ms; 6,775 bytes over https, warm")]
    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#d0d7de"/>',
            text(LEFT - 8, y + 4, f"{10**power:,}", "end"),
        ]
    parts += [
        text(place(each, 10.0**low)[0], BOTTOM + 18, str(each), "middle") for each in DISTANCES
    ]
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 38, "round-trip time to S3, ms", "middle"))
    used: list[float] = []
    for name, found in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        colour, width = COLOURS[NAMES.index(name)], 3 if name == NAMES[0] else 1.5
        dots = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in found))
        dashes = ' stroke-dasharray="5 4"' if name == BareSdk.name else ""
        parts.append(
            f'<polyline points="{dots}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dashes}/>'
        )
        x, y = place(*found[-1])
        y = max([y, *(each + 15 for each in used[-1:])])  # names do not cover each other
        used.append(y)
        parts.append(text(x + 8, y + 4, name, colour=colour))
    return svg(720, BOTTOM + 50, "Latency against round-trip time", parts)


def small(results: Results) -> str:
    """Draw memory and CPU time while nothing happens."""
    parts, y = [], 20.0
    for figure, unit in (("PSS", "MB"), ("CPU time", "ms per hour")):
        rows = [row for name in NAMES if (row := results.find(footprint.REST, name, figure))]
        most = max([row.median for row in rows], default=0) or 1
        parts.append(text(10, y, f"while nothing happens: {figure}, {unit}"))
        y += 14
        for row in rows:
            length = (RIGHT + 40 - FLAT_LEFT) * row.median / most
            colour = COLOURS[NAMES.index(row.contestant)]
            parts += [
                text(FLAT_LEFT - 8, y + BAR - 2, row.contestant, "end"),
                (
                    f'<rect x="{FLAT_LEFT}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" '
                    f'fill="{colour}"/>'
                ),
                text(
                    FLAT_LEFT + length + 6,
                    y + BAR - 2,
                    number(row.median),
                ),
            ]
            y += BAR + 5
        y += GAP
    return svg(720, round(y - GAP + 10), "Memory and CPU time while nothing happens", parts)
