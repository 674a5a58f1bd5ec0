"""The results of one run: what was measured, on what, with what; stored so that a diff of two runs
can be read.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kit import CHECKOUT

from bench.rows import Row

if TYPE_CHECKING:
    from bench.rows import Case

STORED = CHECKOUT / "bench/results.json"
DIGITS = 4


@dataclass(frozen=True)
class Results:
    """All figures of a run."""

    date: str
    machine: dict[str, str | float]
    versions: dict[str, str]
    missing: dict[str, str]
    rows: list[Row]

    @classmethod
    def of_now(
        cls, load: float, versions: dict[str, str], missing: dict[str, str], rows: list[Row]
    ) -> Self:
        """Return the results of a run that has just ended on this machine, which had this load when
        it began.
        """
        date = datetime.now(UTC).isoformat(timespec="minutes")
        rounded = [row._replace(values=[_rounded(value) for value in row.values]) for row in rows]
        return cls(date, machine() | {"load before": load}, versions, missing, rounded)

    @classmethod
    def load(cls, path: Path = STORED) -> Self:
        """Return what was stored."""
        found = json.loads(path.read_text())
        rows = [Row(**row) for row in found["rows"]]
        return cls(found["date"], found["machine"], found["versions"], found["missing"], rows)

    def save(self, path: Path) -> None:
        """Store everything, a row in a line."""
        head = {name: getattr(self, name) for name in ("date", "machine", "versions", "missing")}
        rows = ",\n  ".join(json.dumps(row._asdict(), ensure_ascii=False) for row in self.rows)
        lines = [
            f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
            for name, value in head.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{\n" + ",\n".join([*lines, f' "rows": [\n  {rows}\n ]']) + "\n}\n")

    def find(
        self, group: str, contestant: str, figure: str = "", case: Case | None = None
    ) -> Row | None:
        """Return the one row of a contestant for a figure and these parts of a case; None if it was
        not measured.
        """
        wanted = case or {}
        found = [
            row
            for row in self.rows
            if (row.group, row.contestant, row.figure) == (group, contestant, figure)
            and row.values
            and wanted.items() <= row.case.items()
        ]
        if len(found) > 1:
            raise ValueError(f"more than one row: {found}")
        return found[0] if found else None


def machine() -> dict[str, str | float]:
    """Return what the figures depend on."""
    cpus = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "CPU": cpus[0] if cpus else platform.machine(),
        "cores": len(cpus),
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "Python": platform.python_version(),
    }


def _rounded(value: float) -> float:
    """Return a value without digits that mean nothing."""
    return float(f"{value:.{DIGITS}g}")
