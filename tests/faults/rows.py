"""The faults that tests inject: which tests belong to which row of the table, and how they are run
and counted.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from faults.counting import RECORD, ROUNDS
from faults.table import COLUMNS, Tally
from kit import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

OUTAGE = "test_outage.py::test_a_fault_is_told_survived_and_over"
# Row of the table: the tests, below tests/.
ROWS = {
    "staging disk full": [
        "faults/node.py::test_staging_disk_is_full",
        "test_disk.py::test_a_full_disk_is_no_end",
    ],
    "staging disk read-only": ["faults/node.py::test_staging_disk_becomes_read_only"],
    "staging directory removed": ["test_disk.py::test_the_staging_directory_may_vanish"],
    "LND's directory missing": ["test_watching.py::test_a_directory_made_later_is_watched"],
    "LND's directory replaced": [
        "test_watching.py::test_a_directory_removed_and_made_again_is_watched",
        "test_watching.py::test_a_directory_put_in_the_place_of_another_is_watched",
        "test_watching.py::test_a_directory_renamed_away_and_back_is_watched",
    ],
    "an ancestor renamed, a link switched": [
        "test_watching.py::test_a_replaced_ancestor_is_found_by_the_rescan",
        "test_watching.py::test_a_switched_link_to_the_directory_is_found_by_the_rescan",
    ],
    "another directory mounted over LND's": [
        "test_watching.py::test_a_mount_over_the_directory_is_found_by_the_rescan"
    ],
    "LND's file system unmounted, mounted": [
        "test_watching.py::test_an_unmounted_file_system_is_no_end"
    ],
    "inotify: queue overflow": ["test_watching.py::test_an_overflow_of_events_loses_nothing"],
    "inotify: no instance or watch left": [
        "test_watching.py::test_the_limits_of_the_kernel_are_survived"
    ],
    "no descriptor left": ["faults/node.py::test_no_descriptors"],
    "clock: a year ahead, a day back": ["faults/node.py::test_clock_jumps"],
    "suspended for a minute while sending": ["faults/node.py::test_suspended_for_a_minute"],
    "two daemons at once": ["faults/node.py::test_two_daemons_at_once"],
    "SIGKILL in each state": ["faults/node.py::test_killed_in_each_state"],
    "SIGKILL in a burst": ["test_disk.py::test_kills_at_any_moment_lose_nothing_that_was_staged"],
    "100,000 updates at full speed": ["faults/node.py::test_a_hundred_thousand_updates"],
    "an outage with 10,000 versions staged": ["faults/node.py::test_a_month_away"],
}
ROW_OF = {test.rpartition(":")[2]: row for row, tests in ROWS.items() for test in tests}
KILLS_IN_A_BURST = 10  # in one run of that test


def inject_by_tests(directory: Path, rounds: int, only: str) -> list[Tally]:
    """Run the tests in a mount namespace of their own, and return what came of them, by row."""
    record = directory / "record"
    names = [OUTAGE, *itertools.chain.from_iterable(ROWS.values())]
    tests = [f"tests/{name}" for name in names]
    namespace = ["unshare", "-m", "--propagation", "private"]
    pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb", "no", "-r", "N"]
    subprocess.run(
        [*namespace, *pytest, "-p", "faults.counting", "-n", "2", "-k", only, *tests],
        cwd=CHECKOUT,
        env=os.environ | {"PYTHONPATH": "tests", RECORD: str(record), ROUNDS: str(rounds)},
        stdout=sys.stderr,
        check=False,  # what failed is in the record
    )
    return read_record(record.read_text().splitlines() if record.exists() else [])


def read_record(lines: Iterable[str]) -> list[Tally]:
    """Return a tally for each row of which the record tells."""
    rows: dict[str, Tally] = {}
    for line in lines:
        facts: dict[str, Any] = json.loads(line)
        row = row_of(facts["test"])
        tally = rows.setdefault(row, Tally(row))
        kills = KILLS_IN_A_BURST if row == "SIGKILL in a burst" else 1
        facts["injected"] = facts.get("injected", 0) * kills
        tally.numbers.update({name: facts.get(name, 0) for name in COLUMNS})
        if "failed" in facts:  # one that is skipped has injected nothing, which shows in the table
            tally.complaints.append(f"{facts['test']}: {facts['failed']}")
    order = list(ROWS)
    # The rows of S3, which are not in that list, come first.
    return sorted(
        rows.values(), key=lambda tally: order.index(tally.fault) if tally.fault in order else -1
    )


def row_of(test: str) -> str:
    """Return the row of a test by its id."""
    name, _, parameters = test.rpartition("::")[2].partition("[")
    if found := re.match(r"(.*)-(https?)-round", parameters):
        return f"S3: {found[1].replace('-', ' ')}"
    return ROW_OF.get(name, name)
