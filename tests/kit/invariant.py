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
    from collections.abc import Collection, Mapping
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
    if problems := [*found.false, *found.lost, *found.repeated]:
        more = (
            [f"... and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
        )
        raise AssertionError(
            "\n  ".join(["the invariant is broken:", *problems[:MAX_REPORTED], *more])
        )


def find_problems(
    lnd: Lnd, server: Holder, bucket: str, prefix: str, staging: Path, **allowed: Unpack[Allowed]
) -> Problems:
    foreign, replaced_ok = allowed.get("foreign", ()), allowed.get("replaced_ok", False)
    stored = _in_bucket(
        server.objects(bucket, normalised_prefix(prefix)), normalised_prefix(prefix), foreign
    )
    staged = _in_staging(staging, foreign)
    excused = range(len(lnd.written) - 1) if replaced_ok is True else replaced_ok or ()
    return Problems(
        lost=_lost(lnd, stored, staged, excused),
        repeated=_repeated(stored, staged, allowed.get("refreshes", 0)),
        false=[
            *_false_objects(stored),
            *_false_files(staging, foreign),
            *_unknown(lnd, {name: entry.data for name, entry in stored.items()} | staged),
            *_disordered(lnd, stored, staged),
        ],
    )


def _in_bucket(
    objects: Mapping[str, StoredObject], prefix: str, foreign: Collection[str]
) -> dict[str, StoredObject]:
    """Return the objects by name, without those of others."""
    names = {key.removeprefix(prefix): entry for key, entry in objects.items()}
    return {name: entry for name, entry in names.items() if name not in foreign}


def _in_staging(staging: Path, foreign: Collection[str]) -> dict[str, bytes]:
    if not staging.is_dir():
        return {}
    return {
        entry.name: entry.read_bytes()
        for entry in sorted(staging.iterdir())
        if VERSION_NAME.fullmatch(entry.name) and entry.is_file() and entry.name not in foreign
    }


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


def _false_files(staging: Path, foreign: Collection[str]) -> list[str]:
    """Find what does not belong in staging, differs from its name, or is open to others."""
    if not staging.is_dir():
        return []
    problems = []
    if (mode := stat.S_IMODE(staging.stat().st_mode)) != 0o700:
        problems.append(f"the staging directory has mode {mode:04o}, not 0700")
    for entry in sorted(staging.iterdir()):
        if entry.name in foreign:
            continue
        if not stat.S_ISREG(entry.lstat().st_mode):
            problems.append(f"{entry} is not a regular file")
            continue
        if (mode := stat.S_IMODE(entry.stat().st_mode)) != 0o600:
            problems.append(f"{entry} has mode {mode:04o}, not 0600")
        if not entry.name.startswith(".") and (
            wrong := _false_name(entry.name, entry.read_bytes())
        ):
            problems.append(f"staged file {entry.name} {wrong}")
    return problems


def _lost(
    lnd: Lnd,
    stored: Mapping[str, StoredObject],
    staged: Mapping[str, bytes],
    excused: Collection[int],
) -> list[str]:
    """Find versions that are in neither place."""
    kept = {entry.data for entry in stored.values()} | set(staged.values())
    return [
        f"version {index} of {len(lnd.written)} is lost: {version}"
        for index, version in enumerate(lnd.written)
        if version.data not in kept and index not in excused
    ]


def _unknown(lnd: Lnd, kept: Mapping[str, bytes]) -> list[str]:
    """Find bytes that LND never completed, torn copies for example."""
    known = {version.data for version in lnd.written} | set(lnd.placed)
    return [
        f"{name} holds {len(data)} bytes that were never a version"
        for name, data in kept.items()
        if data not in known
    ]


def _names_by_data(
    stored: Mapping[str, StoredObject], staged: Mapping[str, bytes]
) -> dict[bytes, list[str]]:
    """Return all names of the same bytes, oldest first."""
    names: dict[bytes, set[str]] = {}
    for name, data in [*((name, entry.data) for name, entry in stored.items()), *staged.items()]:
        names.setdefault(data, set()).add(name)
    return {data: sorted(group) for data, group in names.items()}


def _repeated(
    stored: Mapping[str, StoredObject], staged: Mapping[str, bytes], refreshes: int | None
) -> list[str]:
    """Find bytes under more names than refreshes account for."""
    repeated = [names for names in _names_by_data(stored, staged).values() if len(names) > 1]
    extra = sum(len(names) - 1 for names in repeated)
    if refreshes is None or extra <= refreshes:
        return []
    return [f"{extra} second names for the same bytes, where {refreshes} are allowed: {repeated}"]


def _disordered(
    lnd: Lnd, stored: Mapping[str, StoredObject], staged: Mapping[str, bytes]
) -> list[str]:
    """Find versions whose names do not follow the order in which LND wrote them."""
    names = _names_by_data(stored, staged)
    order = [version.data for version in lnd.written]
    once = [data for data in order if data in names and order.count(data) == 1]
    first = [names[data][0] for data in once]
    return [
        f"{later} was written after {earlier}, but its name does not follow"
        for earlier, later in itertools.pairwise(first)
        if later <= earlier
    ]
