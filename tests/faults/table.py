"""The table of `make faults`: what was done, how often, and what became of the versions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

WIDTH = 110
FOUND = ("lost", "duplicates", "damaged")
COLUMNS = {
    "injected": "times injected",
    "at_stake": "versions at stake",
    **{name: name for name in FOUND},
}


@dataclass
class Tally:
    """What came of one kind of fault, by column; each complaint is one thing that is wrong."""

    fault: str
    numbers: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.numbers.update(other.numbers)
        self.complaints += other.complaints

    @property
    def passed(self) -> bool:
        """Tell whether the fault was injected, and nothing came of it."""
        came_of_it = any(self.numbers[name] for name in FOUND)
        return bool(self.numbers["injected"]) and not came_of_it and not self.complaints


def merged(tallies: Iterable[Tally]) -> list[Tally]:
    """Return one tally for each fault, in the order of their first."""
    rows: dict[str, Tally] = {}
    for tally in tallies:
        rows.setdefault(tally.fault, Tally(tally.fault)).add(tally)
    return list(rows.values())


def show(rows: list[Tally]) -> None:
    """Print every complaint, and below them the table."""
    total = Tally("in all")
    table = Table(box=box.MARKDOWN)  # as it stands in docs/reliability.md
    table.add_column("fault")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for row in rows:
        total.add(row)
    for row in [*rows, total]:
        cells = [f"{row.numbers[name]:,}" for name in COLUMNS]
        table.add_row(row.fault, *cells, style=None if row.passed else "bold red")
    console = Console(width=WIDTH)
    for row in rows:
        if not row.numbers["injected"]:
            console.print(f"{row.fault}: never injected", markup=False)
        for complaint in row.complaints:
            console.print(f"{row.fault}: {complaint}", markup=False)
    console.print(table)
