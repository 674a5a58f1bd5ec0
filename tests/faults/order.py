"""The order of operations, read off a trace: what survives a power cut depends on it, and no file
shows it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from faults.strace import Call

DELETED = "the version is deleted"
ORDER = [
    "the version is synced",
    "the version gets its name",
    "the directory is synced",
    "the version is sent",
    "S3 acknowledges it",
    "the receipt is synced",
    "the receipt gets its name",
    "the directory is synced",
    DELETED,
]


def order_of(calls: Iterable[Call], name: str, staging: str) -> list[str]:
    """Return what happened to the version of this name, up to its deletion."""
    version, directory = re.escape(name), re.escape(staging)
    patterns = {
        rf"fsync\(\d+<{directory}/\.{version}\.partial>": "the version is synced",
        rf'(rename|link)\w*\(.*"\.{version}\.partial", .*"{version}"': "the version gets its name",
        rf"fsync\(\d+<{directory}>": "the directory is synced",
        rf"send\w+\(.*PUT /\S*/{version} HTTP": "the version is sent",
        r"recv\w+\(.*HTTP/1\.1 200 ": "S3 acknowledges it",
        rf"fsync\(\d+<{directory}/\.\.receipt\.partial>": "the receipt is synced",
        r'(rename|link)\w*\(.*"\.\.receipt\.partial", .*"\.receipt"': "the receipt gets its name",
        rf'unlink\w*\(.*"{version}"': DELETED,
    }
    found = [
        what
        for call in calls
        for pattern, what in patterns.items()
        if re.search(pattern, call.line)
    ]
    return found[: found.index(DELETED) + 1] if DELETED in found else found
