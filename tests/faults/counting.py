"""A pytest plugin for `make faults`: runs each test several times, and writes down what came of it,
a line each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import kit
import kit.invariant
import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

RECORD = "FAULTS_RECORD"
ROUNDS = "FAULTS_ROUNDS"

_assert_nothing_lost = kit.assert_nothing_lost


def _note(test: str, **facts: object) -> None:
    """Append a line; so short a write is not mixed with those of other processes."""
    with Path(os.environ[RECORD]).open("a", encoding="utf-8") as record:
        record.write(json.dumps({"test": test, **facts}) + "\n")


def _counted(
    lnd: kit.Lnd,
    server: kit.Holder,
    bucket: str,
    prefix: str,
    staging: Path,
    **allowed: Unpack[kit.Allowed],
) -> None:
    """Fail as the invariant does, and write down what it finds."""
    found = kit.find_problems(lnd, server, bucket, prefix, staging, **allowed)
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0]
    at_stake = len({version.data for version in lnd.written} | set(lnd.placed))
    wrong = {"lost": found.lost, "duplicates": found.repeated, "damaged": found.false}
    _note(test, at_stake=at_stake, **{name: len(each) for name, each in wrong.items()})
    if any(found):
        _assert_nothing_lost(lnd, server, bucket, prefix, staging, **allowed)


# Before any test module takes the name over.
kit.assert_nothing_lost = kit.invariant.assert_nothing_lost = _counted


@pytest.fixture
def fault_round(request: pytest.FixtureRequest) -> object:
    """Return the number of the round."""
    return request.param


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test in so many rounds."""
    metafunc.fixturenames.append("fault_round")
    rounds = 1 if metafunc.definition.get_closest_marker("once") else int(os.environ[ROUNDS])
    metafunc.parametrize(
        "fault_round", range(rounds), indirect=True, ids=(f"round{n}" for n in range(rounds))
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write down how a test ended, and how many faults it says that it injected."""
    report = yield
    if not report.passed:
        _note(item.nodeid, **{report.outcome: str(report.longrepr)[-3000:]})
    elif report.when == "call":
        _note(item.nodeid, injected=dict(item.user_properties).get("injected", 1))
    return report
