"""Installs the peers, runs them and this program, prints the tables and stores the figures."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from bench import footprint, jobs, losses, report, stored
from bench.peers import install_all, install_floors
from bench.plan import FULL, QUICK
from bench.results import STORED, Results
from bench.world import CACHE, World

PARTS = {
    "rename to stored": stored.measure,
    "versions lost": losses.measure,
    "footprint": footprint.measure,
    "start, drain, list and restore": jobs.measure,
}


def main() -> int:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds and cells; does not replace bench/results.json",
    )
    quick = parser.parse_args().quick
    for each in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is ended
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    console = report.console()
    load = round(os.getloadavg()[0], 1)
    peers, missing = install_all()
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}")
    floors, rows = install_floors(), []
    for name, measure in PARTS.items():
        began = time.monotonic()
        with World() as world:
            rows += measure(
                world,
                QUICK if quick else FULL,
                peers if measure == losses.measure else [*peers, *floors],
            )
        console.print(f"{name}: measured in {time.monotonic() - began:.0f} s")
    results = Results.of_now(
        load, {each.name: each.version for each in [*peers, *floors]}, missing, rows
    )
    path = CACHE / "quick.json" if quick else STORED
    results.save(path)
    report.show(results, console)
    console.print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
