"""Installs the peers, runs them and this program, prints the tables, and stores the figures."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time

from bench import losses, report, resources, speed
from bench.peers import CACHE, install_all, new_world

PARTS = (
    (speed.updates, speed),
    (losses.lost, losses),
    (resources.at_work_and_at_rest, resources),
    (resources.out_of_reach, resources),
    (speed.starts, speed),
    (speed.drain, speed),
    (speed.backlogs, speed),
    (speed.reading, speed),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure less, and replace no figures")
    quick = parser.parse_args().quick
    end_what_was_started()
    load, rows, console = round(os.getloadavg()[0], 1), report.Rows(), report.console()
    contestants, missing = install_all()
    for name, reason in missing.items():
        console.print(f"left out: {name}: {reason}")
    for part, module in PARTS:
        began = time.monotonic()
        with new_world(contestants) as world:
            part(world, rows, module.QUICK if quick else module.FULL)
        console.print(f"{part.__name__}: measured in {time.monotonic() - began:.0f} s")
    versions = {each.name: each.version for each in contestants}
    results = report.Results.of_now(load, versions, missing, rows)
    if quick or missing:
        results.save(CACHE / "results.json")
        report.show(results, console)
        console.print(f"the figures of the pages stay; these are in {CACHE}/results.json")
    else:
        results.save(report.STORED)
        report.main()
    return 0


def end_what_was_started() -> None:
    """Let a signal end this process by an exception, so that it ends the others first."""
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda number, _: sys.exit(128 + number))


if __name__ == "__main__":
    sys.exit(main())
