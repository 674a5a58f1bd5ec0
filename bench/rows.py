"""The figures as they are measured, stored and read again."""

from __future__ import annotations

import statistics
from typing import NamedTuple

Case = dict[str, str | int]


class Row(NamedTuple):
    """All values that one contestant gave for one figure in one case; a group is a table of the
    report.
    """

    group: str
    figure: str
    unit: str
    contestant: str
    case: Case
    values: list[float]

    @property
    def median(self) -> float:
        """Return the median of the values."""
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
        """Return the heading under which the row stands in the table of its group."""
        return ", ".join(
            [
                *([self.figure] if self.figure else []),
                *(f"{name} {value}" for name, value in self.case.items()),
            ]
        )


def number(value: float) -> str:
    """Return a value with three digits at the most that mean something, all of those before the
    point.
    """
    if value >= 100:  # noqa: PLR2004 - three digits
        return f"{value:,.0f}"
    return f"{value:.3g}"
