"""Collects the values of rounds into rows."""

from __future__ import annotations

from bench.rows import Row


class Rows:
    """The rows of one group, each of which gets a value at a time."""

    def __init__(self, group: str) -> None:
        """Begin without rows."""
        self._group = group
        self._rows: dict[str, Row] = {}

    def add(self, figure: str, unit: str, contestant: str, value: float, **case: str | int) -> None:
        """Add one value to its row."""
        row = self._rows.setdefault(
            f"{figure} {contestant} {case}", Row(self._group, figure, unit, contestant, case, [])
        )
        row.values.append(value)

    def all(self) -> list[Row]:
        """Return the rows in the order of their first values."""
        return list(self._rows.values())
