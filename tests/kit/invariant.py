"""The invariant of the whole project, stated once: nothing that LND completed is lost, and nothing
false is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import stat
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict, Unpack

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from .lnd import Lnd
    from .s3_server import StoredObject

VERSION_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-([0-9a-f]{6})", re.ASCII)
MAX_REPORTED = 20


class Holder(Protocol):
    """Whatever can show the objects that it holds: a server, or a scripted one."""

    def objects(self, bucket: str, prefix: str = "") -> dict[str, StoredObject]:
        """Return every object below the prefix by key."""


class Allowed(TypedDict, total=False):
    """What is no problem.

    `replaced_ok`: the indexes in `lnd.written` of versions that LND replaced before anyone could
    look, or True for any but the last. `refreshes`: how many second names the same bytes may have
    in all (one for each restart and each refresh of an unchanged file; by default 0), None for any
    number. `foreign`: names that others left in the bucket or in staging.
    """

    replaced_ok: bool | Collection[int]
    refreshes: int | None
    foreign: Collection[str]


class Problems(NamedTuple):
    """What is wrong, a line each: versions lost, captures under two keys, and what is false in
    either place.
    """

    lost: list[str]
    repeated: list[str]
    false: list[str]


def normalised_prefix(prefix: str) -> str:
    """Return the prefix as it stands before each key."""
    return prefix if not prefix or prefix.endswith("/") else prefix + "/"


def assert_nothing_lost(
    lnd: Lnd, server: Holder, bucket: str, prefix: str, staging: Path, **allowed: Unpack[Allowed]
) -> None:
    """Fail unless every version is stored or staged, and all that is stored or staged is true to
    its name.
    """
    found = find_problems(lnd, server, bucket, prefix, staging, **allowed)
    problems = [*found.false, *found.lost, *found.repeated]
    broken = f"the invariant is broken in {len(problems)} ways:"
    assert not problems, "\n  ".join([broken, *problems[:MAX_REPORTED]])


def find_problems(
    lnd: Lnd, server: Holder, bucket: str, prefix: str, staging: Path, **allowed: Unpack[Allowed]
) -> Problems:
    foreign, replaced_ok = allowed.get("foreign", ()), allowed.get("replaced_ok", False)
    start = normalised_prefix(prefix)
    objects = server.objects(bucket, start)
    stored = {key.removeprefix(start): entry for key, entry in objects.items()}
    stored = {name: entry for name, entry in stored.items() if name not in foreign}
    entries = sorted(staging.iterdir()) if staging.is_dir() else []
    entries = [entry for entry in entries if entry.name not in foreign]
    names = _names_by_data(stored, entries)
    excused = range(len(lnd.written) - 1) if replaced_ok is True else replaced_ok or ()
    return Problems(
        lost=[
            f"version {index} of {len(lnd.written)} is lost: {version}"
            for index, version in enumerate(lnd.written)
            if version.data not in names and index not in excused
        ],
        repeated=_repeated(names, allowed.get("refreshes", 0)),
        false=[
            *_false_objects(stored),
            *_false_files(staging, entries),
            *_unknown(lnd, names),
            *_disordered(lnd, names),
        ],
    )


def _names_by_data(
    stored: Mapping[str, StoredObject], entries: Sequence[Path]
) -> dict[bytes, list[str]]:
    """Return all names of the same bytes, oldest first."""
    kept = {(name, entry.data) for name, entry in stored.items()}
    for entry in entries:
        if VERSION_NAME.fullmatch(entry.name) and entry.is_file():
            kept.add((entry.name, entry.read_bytes()))
    names: dict[bytes, list[str]] = {}
    for name, data in sorted(kept):
        names.setdefault(data, []).append(name)
    return names


def _false_name(name: str, data: bytes) -> str | None:
    """Return what is wrong with the name of these bytes."""
    match = VERSION_NAME.fullmatch(name)
    if match is None:
        return "does not have the name of a version"
    digest = hashlib.sha256(data).hexdigest()
    if match[1] != digest[-6:]:
        return f"holds other bytes than its name says: {len(data)} bytes, SHA-256 ..{digest[-6:]}"
    return None


def _false_objects(stored: Mapping[str, StoredObject]) -> list[str]:
    """Find objects that differ from their name or from their metadata."""
    problems = []
    for name, entry in stored.items():
        if wrong := _false_name(name, entry.data):
            problems.append(f"object {entry.key} {wrong}")
        if entry.metadata.get("sha256") != hashlib.sha256(entry.data).hexdigest():
            problems.append(
                f"object {entry.key} does not have its SHA-256 as metadata: {entry.metadata}"
            )
    return problems


def _false_files(staging: Path, entries: Sequence[Path]) -> list[str]:
    """Find what does not belong in staging, differs from its name, or is open to others."""
    problems = []
    if staging.is_dir() and (mode := stat.S_IMODE(staging.stat().st_mode)) != 0o700:
        problems.append(f"the staging directory has mode {mode:04o}, not 0700")
    for entry in entries:
        if not stat.S_ISREG(entry.lstat().st_mode):
            problems.append(f"{entry} is not a regular file")
            continue
        if (mode := stat.S_IMODE(entry.stat().st_mode)) != 0o600:
            problems.append(f"{entry} has mode {mode:04o}, not 0600")
        wrong = _false_name(entry.name, entry.read_bytes())
        if wrong and not entry.name.startswith("."):
            problems.append(f"staged file {entry.name} {wrong}")
    return problems


def _unknown(lnd: Lnd, names: Mapping[bytes, list[str]]) -> list[str]:
    """Find bytes that LND never completed, torn copies for example."""
    known = {version.data for version in lnd.written} | set(lnd.placed)
    return [
        f"{names[data]} hold {len(data)} bytes that were never a version"
        for data in names.keys() - known
    ]


def _repeated(names: Mapping[bytes, list[str]], refreshes: int | None) -> list[str]:
    """Find bytes under more names than refreshes account for."""
    repeated = [each for each in names.values() if len(each) > 1]
    extra = sum(len(each) - 1 for each in repeated)
    if refreshes is None or extra <= refreshes:
        return []
    return [f"{extra} second names for the same bytes, where {refreshes} are allowed: {repeated}"]


def _disordered(lnd: Lnd, names: Mapping[bytes, list[str]]) -> list[str]:
    """Find versions whose names do not follow the order in which LND wrote them."""
    order = [version.data for version in lnd.written]
    first = [names[data][0] for data in order if data in names and order.count(data) == 1]
    return [
        f"{later} was written after {earlier}, but its name does not follow"
        for earlier, later in itertools.pairwise(first)
        if later <= earlier
    ]
