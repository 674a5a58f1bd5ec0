"""A pytest plugin for `make faults`: what the invariant finds is told in pytest's report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import kit
import kit.invariant

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

_assert_nothing_lost = kit.assert_nothing_lost
_running: list[pytest.Item] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    _running[:] = [item]


def _counted(
    lnd: kit.Lnd,
    server: kit.Holder,
    bucket: str,
    prefix: str,
    staging: Path,
    **allowed: Unpack[kit.Allowed],
) -> None:
    """Fail as the invariant does, and count what it finds."""
    found = kit.find_problems(lnd, server, bucket, prefix, staging, **allowed)
    at_stake = {version.data for version in lnd.written} | set(lnd.placed)
    _running[0].user_properties += [
        ("at_stake", len(at_stake)),
        ("lost", len(found.lost)),
        ("duplicates", len(found.repeated)),
        ("damaged", len(found.false)),
    ]
    if any(found):
        _assert_nothing_lost(lnd, server, bucket, prefix, staging, **allowed)


# Before any test module takes the name over.
kit.assert_nothing_lost = kit.invariant.assert_nothing_lost = _counted
