"""The table of `make faults`: what was done to the program, how often, and what became of the
versions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable

WIDTH = 110


@dataclass
class Tally:
    """What came of one kind of fault; each complaint tells of one thing that is not as it should
    be.
    """

    fault: str
    injected: int = 0
    at_stake: int = 0
    lost: int = 0
    duplicates: int = 0
    damaged: int = 0
    complaints: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another one in."""
        self.injected += other.injected
        self.at_stake += other.at_stake
        self.lost += other.lost
        self.duplicates += other.duplicates
        self.damaged += other.damaged
        self.complaints += other.complaints

    @property
    def passed(self) -> bool:
        """Tell whether the fault was injected, and nothing came of it."""
        return bool(self.injected) and not (
            self.lost or self.duplicates or self.damaged or self.complaints
        )


def merged(tallies: Iterable[Tally]) -> list[Tally]:
    """Return one tally for each fault, in the order of their first."""
    rows: dict[str, Tally] = {}
    for tally in tallies:
        rows.setdefault(tally.fault, Tally(tally.fault)).add(tally)
    return list(rows.values())


def show(rows: list[Tally]) -> None:
    """Print every complaint, and below them the table."""
    table = Table(box=box.MARKDOWN)  # as it stands in docs/reliability.md
    table.add_column("fault")
    for name in ("times injected", "versions at stake", "lost", "duplicates", "damaged"):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (row.injected, row.at_stake, row.lost, row.duplicates, row.damaged)
        table.add_row(
            row.fault,
            *(f"{number:,}" for number in numbers),
            style=None if row.passed else "bold red",
        )
    total = Tally("in all")
    for row in rows:
        total.add(row)
    numbers = (total.injected, total.at_stake, total.lost, total.duplicates, total.damaged)
    table.add_row(total.fault, *(f"{number:,}" for number in numbers))
    console = Console(width=WIDTH)
    for row in rows:
        if not row.injected:
            console.print(f"{row.fault}: never injected", markup=False)
        for complaint in row.complaints:
            console.print(f"{row.fault}: {complaint}", markup=False)
    console.print(table)
