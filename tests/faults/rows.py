"""The faults that tests inject: the rows of the table, and how their tests are run and counted."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from faults.table import Tally
from kit import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BURST = "SIGKILL in a burst"
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
    BURST: ["test_disk.py::test_kills_at_any_moment_lose_nothing_that_was_staged"],
    "100,000 updates at full speed": ["faults/node.py::test_a_hundred_thousand_updates"],
    "an outage with 10,000 versions staged": ["faults/node.py::test_a_month_away"],
}
ROW_OF = {test.rpartition(":")[2]: row for row, tests in ROWS.items() for test in tests}
KILLS_IN_A_BURST = 10  # in one run of that test


def inject_by_tests(directory: Path, rounds: int, only: str) -> list[Tally]:
    """Run the tests in a mount namespace of their own; return what came of each, by row."""
    tests = [f"tests/{name}" for name in [OUTAGE, *itertools.chain(*ROWS.values())]]
    namespace = ["unshare", "-m", "--propagation", "private"]
    pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb", "no", "-r", "N"]
    plugin = ["-p", "faults.counting", "-o", "junit_family=xunit1"]
    tallies: list[Tally] = []
    for number in range(rounds):
        report = directory / f"round-{number}.xml"
        chosen = ["-n", "2", "-k", only, "-m", "not once" if number else ""]
        subprocess.run(
            [*namespace, *pytest, *plugin, *chosen, f"--junit-xml={report}", *tests],
            cwd=CHECKOUT,
            env=os.environ | {"PYTHONPATH": "tests"},
            stdout=sys.stderr,
            check=False,  # what failed is in the report
        )
        if report.exists():
            tallies += read_report(report)
    # The rows of S3, which are not in that list, come first.
    order = list(ROWS)
    return sorted(tallies, key=lambda each: order.index(each.fault) if each.fault in order else -1)


def read_report(report: Path) -> Iterator[Tally]:
    """Yield a tally for each test of a report."""
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest wrote it
        tally = Tally(row_of(case.attrib["name"]))
        for found in case.iter("property"):
            tally.numbers[found.attrib["name"]] += int(found.attrib["value"])
        wrong = [each for each in case if each.tag in ("failure", "error")]
        # One that is skipped has injected nothing, which shows in the table.
        if wrong or case.find("skipped") is not None:
            tally.numbers["injected"] = 0
        elif not tally.numbers["injected"]:
            tally.numbers["injected"] = KILLS_IN_A_BURST if tally.fault == BURST else 1
        tally.complaints += [
            f"{case.attrib['name']}: {(each.text or '')[-3000:]}" for each in wrong
        ]
        yield tally


def row_of(test: str) -> str:
    name, _, parameters = test.partition("[")
    if found := re.fullmatch(r"(.*)-https?\]", parameters):
        return f"S3: {found[1].replace('-', ' ')}"
    return ROW_OF.get(name, name)
