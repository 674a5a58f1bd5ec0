"""Tables of the results: on the terminal, and in the documents, which `python -m bench.report`
brings up to date.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from kit import CHECKOUT
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from bench import footprint, losses, plots
from bench.peers import CONTESTANTS, FLOORS, AwsV2, BareSdk, Curl, Program, Rclone
from bench.results import Results
from bench.rows import number
from bench.targets import NEAR, NEAR_GROUP, TARGETS

if TYPE_CHECKING:
    from pathlib import Path

    from bench.rows import Row

DOCUMENT = CHECKOUT / "docs/performance.md"
README = CHECKOUT / "README.md"
BEGIN, END = "<!-- begin: written by python -m bench.report -->", "<!-- end -->"
FILE_WIDTH = 180
PROGRAM, BARE = Program.name, BareSdk.name
LOOPS = (Curl, Rclone, AwsV2)  # what an operator would write, each started for each event
ORDER = [PROGRAM, *(floor.name for floor in FLOORS), *(each.name for each in CONTESTANTS[1:])]


class Table(NamedTuple):
    """One table: a line for each contestant, a column for each case."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """Return it for a document."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.lines]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def print(self, to: Console) -> None:
        """Print it on a terminal."""
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for line in self.lines:
            table.add_row(*line)
        to.print(table)


def cell(row: Row | None, program: Row | None, bare: Row | None) -> str:
    """Return median, spread and ratio of a row: to this program, or for this program to a bare
    put.
    """
    if row is None:
        return ""
    low, high = row.spread
    text = number(row.median) + (f" ({number(low)} to {number(high)})" if low != high else "")
    if row.contestant == PROGRAM:
        return (
            f"{text}, {number(row.median / bare.median)} of bare" if bare and bare.median else text
        )
    return f"{text}, {number(row.median / program.median)}x" if program and program.median else text


def tables(results: Results) -> list[Table]:
    """Return a table for each group, in the order of their rows."""
    groups: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.values:
            groups.setdefault(row.group, []).append(row)
    return [_table(title, rows) for title, rows in groups.items()]


def _table(title: str, rows: list[Row]) -> Table:
    """Return the table of one group."""
    columns = list(dict.fromkeys((row.column, row.unit) for row in rows))
    cells = {(row.contestant, row.column): row for row in rows}
    names = [name for name in ORDER if any(row.contestant == name for row in rows)]
    lines = [
        [
            name,
            *(
                cell(
                    cells.get((name, column)),
                    cells.get((PROGRAM, column)),
                    cells.get((BARE, column)),
                )
                for column, _ in columns
            ),
        ]
        for name in names
    ]
    units = {unit for _, unit in columns}
    if len(units) == 1:
        title = f"{title}, {units.pop()}".strip(", ")
        return Table(title, ["", *(column for column, _ in columns)], lines)
    return Table(title, ["", *(f"{column}, {unit}".strip(", ") for column, unit in columns)], lines)


def targets(results: Results) -> Table:
    """Return the table of the targets."""
    lines = []
    for target in TARGETS:
        value = target.figure(results)
        limit = f"{'≥' if target.at_least else '≤'} {target.limit:g}"
        verdict = "not measured" if value is None else "met" if target.met(value) else "not met"
        measured = (
            "" if value is None else f"{value:g}" if value == round(value) else f"{value:#.3g}"
        )
        lines.append([target.what, limit, measured, verdict])
    return Table("Targets", ["ratio or number", "target", "measured", ""], lines)


def setting(results: Results) -> str:
    """Return when, on what and with what the figures were taken."""
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    versions = "".join(f"- {name}: {version}\n" for name, version in results.versions.items())
    missing = "".join(
        f"- {name}: not measured: {reason}\n" for name, reason in results.missing.items()
    )
    return f"Taken {results.date}, on one machine: {machine}.\n\n{versions}{missing}"


def markdown(results: Results) -> str:
    """Return the part of the document that is made from the results."""
    parts = [
        setting(results),
        targets(results).markdown(),
        *(table.markdown() for table in tables(results)),
    ]
    return "\n".join(parts)


def console() -> Console:
    """Return a console as wide as the terminal, or wide enough for the tables where there is
    none.
    """
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def show(results: Results, to: Console) -> None:
    """Print everything."""
    for table in tables(results):
        table.print(to)
    to.print(setting(results), highlight=False)
    targets(results).print(to)


def beside_loops(results: Results) -> list[str]:
    """Return the lines of the README: this program beside three loops around inotifywait."""
    names = [PROGRAM, *(loop.name for loop in LOOPS)]
    losses_of = [row for row in results.rows if row.group == losses.GROUP]
    lost = list(dict.fromkeys(row.figure for row in losses_of))
    figures = [
        ("from LND's rename to the object stored, ms", NEAR_GROUP, "", NEAR),
        *((f"versions lost {lost[index]}", losses.GROUP, lost[index], {}) for index in (0, 2)),
        ("memory while nothing happens, MB (PSS)", footprint.REST, "PSS", {}),
    ]
    lines = [
        f"| `make bench`, {results.date[:10]} | {PROGRAM} | "
        + " | ".join(f"`{loop.name}`" for loop in LOOPS)
        + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for label, group, figure, case in figures:
        rows = [results.find(group, name, figure, case) for name in names]
        cells = [f"{row.median:.3g}" for row in rows if row]
        if len(cells) < len(names):
            raise ValueError("the results are not whole")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def between(text: str, content: str) -> str:
    """Return the text with the content between the markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def documents(results: Results) -> dict[Path, str]:
    """Return what is made from the results: the documents with their tables, and the plots."""
    written = {DOCUMENT: markdown(results), README: "\n".join(beside_loops(results))}
    return {
        path: between(path.read_text(), content) for path, content in written.items()
    } | plots.draw(results)


def main() -> int:
    """Bring documents and plots up to date with the stored results, and print the tables."""
    results = Results.load()
    for path, content in documents(results).items():
        path.write_text(content)
    show(results, console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
