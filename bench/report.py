"""What came of it? The figures of a run are stored in bench/results.json. From there `python -m
bench.report` brings them into README.md, docs/performance.md and two plots, tells which targets are
met, and prints the tables.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from kit import CHECKOUT
from rich.console import Console
from rich.markdown import Markdown

from bench.peers import AWS_V1, AWS_V2, BARE, CONTESTANTS, CURL, PROGRAM, RCLONE, THIS, TWIN

if TYPE_CHECKING:
    from collections.abc import Iterable

STORED = CHECKOUT / "bench/results.json"
DOCUMENT, README = CHECKOUT / "docs/performance.md", CHECKOUT / "README.md"
LATENCY, FOOTPRINT = CHECKOUT / "docs/latency.svg", CHECKOUT / "docs/footprint.svg"
BEGIN, END = "<!-- begin: written by python -m bench.report -->", "<!-- end -->"
TERMINAL_WIDTH = 180
DIGITS = 4  # that are stored
ORDER = [  # this program, the floors, the peers
    each.name
    for each in sorted([*CONTESTANTS, TWIN], key=lambda each: (each is not THIS, not each.is_floor))
]

VERDICTS = ("met", "not met", "not measured")

# The tables, by their titles.
SIZES = "rename to stored, http on loopback, warm"
COUNTED = "round trips of an update, counted"
LOST = "versions lost"
WORK = "CPU time of an update, and memory at its peak"
REST = "while nothing happens"
AWAY = "memory while S3 is out of reach, by number of staged versions"
START = "start to first version stored"
DRAIN = "drain of what is staged, by round trips for each version"
BACKLOG = "drain on loopback, for each of the first 100 versions, by number of staged versions"
READING = "list and restore"


def rename_to_stored(scheme: str, connection: str) -> str:
    """Return the title of the table of a kind of connection, warm or cold."""
    return f"rename to stored, 6,775 B, {scheme}, {connection}"


Case = dict[str, str | int]


class Row(NamedTuple):
    """All values that one contestant gave for one figure in one case; a group is a table."""

    group: str
    figure: str
    unit: str
    contestant: str
    case: Case
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Return the quartiles, or the smallest and the greatest of less than four values."""
        if len(self.values) < 4:  # noqa: PLR2004 - fewer have no quartiles
            return min(self.values), max(self.values)
        first, _, third = statistics.quantiles(self.values, n=4)
        return first, third

    @property
    def column(self) -> str:
        """Return the heading under which it stands in its table."""
        case = [f"{name} {value}" for name, value in self.case.items()]
        return ", ".join([*([self.figure] if self.figure else []), *case])


class Rows(list[Row]):
    """The rows of a run, in the order of their first values."""

    def add(
        self, group: str, figure: str, unit: str, contestant: str, *values: float, **case: str | int
    ) -> None:
        key = (group, figure, unit, contestant, case)
        row = next((each for each in self if each[:5] == key), None)
        if row is None:
            row = Row(*key, [])
            self.append(row)
        row.values.extend(float(f"{value:.{DIGITS}g}") for value in values)


@dataclass(frozen=True)
class Results:
    """All figures of a run, and on what and with what they were taken."""

    date: str
    machine: dict[str, str | float]
    versions: dict[str, str]
    missing: dict[str, str]
    rows: list[Row]

    @classmethod
    def of_now(
        cls, load: float, versions: dict[str, str], missing: dict[str, str], rows: list[Row]
    ) -> Self:
        """Return the results of a run that has just ended; the machine had this load before."""
        info = Path("/proc/cpuinfo").read_text()
        cpus = re.findall(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
        machine: dict[str, str | float] = {
            "CPU": cpus[0] if cpus else platform.machine(),
            "cores": len(cpus),
            "kernel": platform.release(),
            "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
            "Python": platform.python_version(),
            "load before": load,
        }
        date = datetime.now(UTC).isoformat(timespec="minutes")
        return cls(date, machine, versions, missing, rows)

    @classmethod
    def load(cls, path: Path = STORED) -> Self:
        found = json.loads(path.read_text())
        return cls(**found | {"rows": [Row(**row) for row in found["rows"]]})

    def save(self, path: Path) -> None:
        """Store everything, a row in a line, so that a diff of two runs can be read."""
        rows = ",\n  ".join(json.dumps(row._asdict(), ensure_ascii=False) for row in self.rows)
        lines = [
            f' "{name}": {json.dumps(value, ensure_ascii=False)}'
            for name, value in vars(self).items()
            if name != "rows"
        ]
        path.write_text("{\n" + ",\n".join([*lines, f' "rows": [\n  {rows}\n ]']) + "\n}\n")

    def find(
        self, group: str, contestant: str, figure: str = "", case: Case | None = None
    ) -> Row | None:
        """Return the one row for a figure and these parts of a case, if it was measured."""
        found = [
            row
            for row in self.rows
            if (row.group, row.contestant, row.figure) == (group, contestant, figure)
            and row.values
            and (case or {}).items() <= row.case.items()
        ]
        if len(found) > 1:
            raise ValueError(f"more than one row: {found}")
        return found[0] if found else None


class Cell(NamedTuple):
    """Where a figure stands: the arguments of `Results.find`."""

    group: str
    contestant: str = PROGRAM
    figure: str = ""
    case: Case | None = None


class Target(NamedTuple):
    """A limit for a figure of this program, or for its ratio to another figure of the same run."""

    what: str
    limit: float
    cells: list[tuple[Cell, ...]]  # the worst one counts

    def measured(self, results: Results) -> float | None:
        """Return the median or the ratio of medians, as it is told; None if it was not measured."""
        values = []
        for cells in self.cells:
            rows = [row for cell in cells if (row := results.find(*cell))]
            if len(rows) < len(cells):
                return None
            values.append(rows[0].median / (rows[1].median if rows[1:] else 1.0))
        return float(f"{max(values):.3g}")

    def verdict(self, results: Results) -> str:
        value = self.measured(results)
        return VERDICTS[2 if value is None else int(value > self.limit)]


def beside(group: str, other: str, figure: str = "", case: Case | None = None) -> tuple[Cell, Cell]:
    """Return the cells of this program and of another contestant."""
    return Cell(group, PROGRAM, figure, case), Cell(group, other, figure, case)


def trips(connection: str) -> tuple[Cell]:
    """Return the cell of the round trips of an update over https."""
    return (Cell(COUNTED, case={"scheme": "https", "connection": connection}),)


NEAR: Case = {"round trip": "0 ms"}
FAR: Case = {"round trip": "40 ms"}
CONNECTIONS = [(scheme, state) for scheme in ("http", "https") for state in ("warm", "cold")]
TARGETS = [
    Target(
        "time of an update on loopback, warm, against a bare put by the same client",
        1.3,
        [beside(rename_to_stored("http", "warm"), BARE, case=NEAR)],
    ),
    Target(
        "time of an update at 40 ms, against a bare put, worst of http and https, warm and cold",
        1.08,
        [beside(rename_to_stored(*each), BARE, case=FAR) for each in CONNECTIONS],
    ),
    Target("round trips of an update over https, warm", 1, [trips("warm")]),
    Target("round trips of an update over https, cold", 3, [trips("cold")]),
    Target(
        "time of a drained version, against bare puts in a loop on the same line",
        1.05,
        [beside(DRAIN, BARE, "time")],
    ),
    Target(
        "time of a drained version, 10,000 staged against 100 staged",
        1.1,
        [(Cell(BACKLOG, case={"staged": 10_000}), Cell(BACKLOG, case={"staged": 100}))],
    ),
    Target(
        "idle memory, against a bare process with a boto3 client and the same malloc settings",
        1.05,
        [beside(REST, TWIN.name, "PSS")],
    ),
    Target("idle processor time, ms an hour", 90, [(Cell(REST, figure="CPU time"),)]),
    Target(
        "time from start to first version stored, against `aws s3 cp`",
        0.8,
        [beside(START, name) for name in (AWS_V1, AWS_V2)],
    ),
]


def number(value: float) -> str:
    """Return a value with three digits that mean something, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR2004 - three digits


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """Return a table, whose numbers are in all columns but the first."""
    ruled = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def entry(row: Row | None, program: Row | None, bare: Row | None) -> str:
    """Return median, spread and ratio: to this program, or for this program to a bare put."""
    if row is None:
        return ""
    low, high = row.spread
    text = number(row.median) + (f" ({number(low)} to {number(high)})" if low != high else "")
    other, form = (bare, "{} of bare") if row.contestant == PROGRAM else (program, "{}x")
    if other and other.median:
        text += ", " + form.format(number(row.median / other.median))
    return text


def tables(results: Results) -> list[str]:
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.values:
            groups.setdefault(row.group, []).append(row)
    return [table(title, rows) for title, rows in groups.items()]


def table(title: str, rows: list[Row]) -> str:
    """Return one table: a line for each contestant, a column for each case."""
    columns = list(dict.fromkeys((row.column, row.unit) for row in rows))
    found = {(row.contestant, row.column): row for row in rows}
    lines = []
    for name in ORDER:
        if any(row.contestant == name for row in rows):
            beside = [
                [found.get((each, column)) for each in (name, PROGRAM, BARE)]
                for column, _ in columns
            ]
            lines.append([name, *(entry(*cells) for cells in beside)])
    units = {unit for _, unit in columns}
    if len(units) == 1:
        title = f"{title}, {units.pop()}".strip(", ")
        columns = [(column, "") for column, _ in columns]
    header = ["", *(f"{column}, {unit}".strip(", ") for column, unit in columns)]
    return f"### {title}\n\n{markdown(header, lines)}\n"


def targets(results: Results) -> str:
    lines = []
    for target in TARGETS:
        value = target.measured(results)
        measured = "" if value is None else number(value)
        lines.append([target.what, f"≤ {target.limit:g}", measured, target.verdict(results)])
    whole = markdown(["ratio or number", "target", "measured", ""], lines)
    return f"### Targets\n\n{summary(results)}\n\n{whole}\n"


def summary(results: Results) -> str:
    """Tell how many targets are met and how many are not."""
    verdicts = [each.verdict(results) for each in TARGETS]
    met, missed, unknown = (verdicts.count(each) for each in VERDICTS)
    return (
        f"Of {len(TARGETS)} targets this program met {met} on {results.date[:10]}, missed "
        f"{missed}, and {unknown} were not measured."
    )


def setting(results: Results) -> str:
    """Return when, on what and with what the figures were taken."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    versions = "".join(f"- {name}: {version}\n" for name, version in results.versions.items())
    missing = "".join(f"- {name}: not measured: {why}\n" for name, why in results.missing.items())
    return f"Taken {results.date}, on one machine: {machine}.\n\n{versions}{missing}"


def beside_loops(results: Results) -> str:
    """Return the table of the README: this program beside three loops around inotifywait."""
    names = [PROGRAM, CURL, RCLONE, AWS_V2]
    lost = list(dict.fromkeys(row.figure for row in results.rows if row.group == LOST))
    figures = {
        "from LND's rename to the object stored, ms": (rename_to_stored("http", "warm"), "", NEAR),
        f"versions lost {lost[0]}": (LOST, lost[0], None),
        f"versions lost {lost[2]}": (LOST, lost[2], None),
        "memory while nothing happens, MB (PSS)": (REST, "PSS", None),
    }
    header = [f"`make bench`, {results.date[:10]}", PROGRAM, *(f"`{name}`" for name in names[1:])]
    lines = []
    for label, (group, figure, case) in figures.items():
        rows = [results.find(group, name, figure, case) for name in names]
        lines.append([label, *(number(row.median) for row in rows if row)])
    return markdown(header, lines)


def documents(results: Results) -> dict[Path, str]:
    """Return what is made from the results: the documents with their tables, and the plots."""
    made = {
        README: beside_loops(results),
        DOCUMENT: "\n".join([setting(results), targets(results), *tables(results)]),
    }
    for path, content in made.items():
        head, _, rest = path.read_text().partition(BEGIN)
        made[path] = f"{head}{BEGIN}\n{content}\n{END}{rest.partition(END)[2]}"
    return made | {LATENCY: latency(results), FOOTPRINT: footprint(results)}


def console() -> Console:
    """Return a console as wide as the terminal, or as the tables where there is none."""
    return Console(width=None if sys.stdout.isatty() else TERMINAL_WIDTH)


def show(results: Results, to: Console) -> None:
    for each in [*tables(results), targets(results)]:
        to.print(Markdown(each))
    to.print(setting(results), highlight=False)


# The plots.
COLOURS = {
    PROGRAM: "#1a7f37",
    "watchdog + boto3": "#0969da",
    "watchfiles + boto3": "#8250df",
    CURL: "#bc4c00",
    RCLONE: "#cf222e",
    "s3cmd put": "#9a6700",
    AWS_V1: "#bf3989",
    AWS_V2: "#57606a",
    BARE: "#000000",
}
LEFT, TOP, RIGHT, BOTTOM = 70, 50, 560, 400
FLAT_LEFT, BAR, GAP = 170, 14, 34
DISTANCES = [0, 40, 150]


def svg(height: int, title: str, parts: Iterable[str], width: int = 720) -> str:
    """Return a drawing on white ground."""
    box = f'viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="13">'
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>\n"])


def label(x: float, y: float, what: str, anchor: str = "start", colour: str = "#000000") -> str:
    at = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {at} text-anchor="{anchor}" fill="{colour}">{escape(what)}</text>'


def latency(results: Results) -> str:
    """Draw the latency of each contestant against the round-trip time, on a logarithmic scale."""
    group, curves = rename_to_stored("https", "warm"), {}
    for name in COLOURS:
        rows = {ms: results.find(group, name, case={"round trip": f"{ms} ms"}) for ms in DISTANCES}
        if points := [(ms, row.median) for ms, row in rows.items() if row]:
            curves[name] = points
    logs = [math.log10(value) for points in curves.values() for _, value in points]
    low, high = math.floor(min(logs)), math.ceil(max(logs))

    def place(distance: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / (high - low)
        return LEFT + (RIGHT - LEFT) * distance / DISTANCES[-1], BOTTOM - (BOTTOM - TOP) * share

    parts = [label(LEFT, TOP - 20, "LND's rename to stored, ms; 6,775 bytes over https, warm")]
    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="#d0d7de"/>')
        parts.append(label(LEFT - 8, y + 4, f"{10**power:,}", "end"))
    parts += [label(place(ms, 1)[0], BOTTOM + 18, str(ms), "middle") for ms in DISTANCES]
    parts.append(label((LEFT + RIGHT) / 2, BOTTOM + 38, "round-trip time to S3, ms", "middle"))
    lowest = 0.0
    for name, points in sorted(curves.items(), key=lambda item: -item[1][-1][1]):
        colour, width = COLOURS[name], 3 if name == PROGRAM else 1.5
        dots = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*each) for each in points))
        stroke = f'stroke="{colour}" stroke-width="{width}"'
        dashes = ' stroke-dasharray="5 4"' if name == BARE else ""
        parts.append(f'<polyline points="{dots}" fill="none" {stroke}{dashes}/>')
        x, y = place(*points[-1])
        lowest = max(y, lowest + 15)  # names do not cover each other
        parts.append(label(x + 8, lowest + 4, name, colour=colour))
    return svg(BOTTOM + 50, "Latency against round-trip time", parts)


def footprint(results: Results) -> str:
    parts, y = [], 20.0
    for figure, unit in (("PSS", "MB"), ("CPU time", "ms per hour")):
        rows = [row for name in COLOURS if (row := results.find(REST, name, figure))]
        most = max([row.median for row in rows], default=0) or 1
        parts.append(label(10, y, f"while nothing happens: {figure}, {unit}"))
        y += 14
        for row in rows:
            length = (RIGHT + 40 - FLAT_LEFT) * row.median / most
            at = f'x="{FLAT_LEFT}" y="{y:.1f}" width="{length:.1f}" height="{BAR}"'
            parts.append(label(FLAT_LEFT - 8, y + BAR - 2, row.contestant, "end"))
            parts.append(f'<rect {at} fill="{COLOURS[row.contestant]}"/>')
            parts.append(label(FLAT_LEFT + length + 6, y + BAR - 2, number(row.median)))
            y += BAR + 5
        y += GAP
    return svg(round(y - GAP + 10), "Memory and CPU time while nothing happens", parts)


def main() -> int:
    """Bring documents and plots up to date with the stored results, and print the tables."""
    results = Results.load()
    for path, content in documents(results).items():
        path.write_text(content)
    show(results, console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
