"""`make faults`: tries to make the program lose something, and prints what it was tried against and
what came of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from faults import rows, steps, table
from kit import S3Server

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
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each test is run (default: %(default)s)"
    )
    parser.add_argument(
        "--part",
        choices=["all", "steps", "tests"],
        default="all",
        help="strace's part, or the tests'",
    )
    parser.add_argument(
        "--only",
        default="",
        help="run only these: of the tests, what pytest -k takes by this; of strace's part, the "
        "rows whose name holds it",
    )
    options = parser.parse_args()
    if wrong := prepare():
        print(wrong, file=sys.stderr)
        return 1
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

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with (
        S3Server(directory / "s3-http") as http,
        S3Server(directory / "s3-https", tls=True) as https,
    ):
        places = (
            steps.Place.at(http, directory / "http"),
            steps.Place.at(https, directory / "https"),
        )
        return steps.inject_all(*places, only, progress)


def prepare() -> str | None:
    """Install what is missing, where that is possible; return what is still missing, and what to
    do.
    """
    if os.geteuid():
        return "make faults needs root: it mounts file systems, and traces processes"
    missing = [package for command, package in NEEDED.items() if not shutil.which(command)]
    if missing and shutil.which("apt-get"):
        print(f"installing {' '.join(missing)}", file=sys.stderr, flush=True)
        quiet = {
            "stdout": subprocess.DEVNULL,
            "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        }
        subprocess.run(["apt-get", "update", "-qq"], check=False, **quiet)  # type: ignore[call-overload]  # noqa: S607
        install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        subprocess.run(install, check=False, **quiet)  # type: ignore[call-overload]
        missing = [package for command, package in NEEDED.items() if not shutil.which(command)]
    if missing:
        return f"make faults needs what is not there: install {' '.join(missing)}"
    return None


if __name__ == "__main__":
    sys.exit(main())
