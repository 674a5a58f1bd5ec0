"""`make faults`: tries to make the program lose something, and prints what came of it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from faults import rows, steps, table
from kit import S3Server
from stores.servers import install_missing

# What is needed beside the virtual environments, by the Debian package that brings it.
NEEDED = {
    "strace": "strace",
    "faketime": "faketime",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
}


def main() -> int:
    """Run everything, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="how often each test is run (default: %(default)s)")
    add("--part", choices=["all", "steps", "tests"], default="all", help="strace's, or the tests'")
    only = "run only these: the tests that pytest -k takes by this, the steps whose row holds it"
    add("--only", default="", help=only)
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("make faults needs root: it mounts file systems, and traces processes")
    if missing := install_missing(NEEDED):
        sys.exit(f"make faults needs what is not there: install {missing}")
    tallies: list[table.Tally] = []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        if options.part != "tests":
            tallies += under_strace(Path(name), options.only)
        if options.part != "steps":
            tallies += rows.inject_by_tests(Path(name), options.rounds, options.only)
    table.show(merged := table.merged(tallies))
    return 0 if merged and all(row.passed for row in merged) else 1


def under_strace(directory: Path, only: str) -> list[table.Tally]:
    """Kill it at each step, and let each step fail, over http and https."""
    with (
        S3Server(directory / "s3-http") as http,
        S3Server(directory / "s3-https", tls=True) as https,
    ):
        return steps.inject_all(http, https, only)


if __name__ == "__main__":
    sys.exit(main())
