"""A version's name, which version is put, how often, and in which order."""

from __future__ import annotations

import signal
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import VERSION_NAME, Daemon, FaultProxy, Lnd
from shared import AWAY, OFTEN, SELDOM, SteppedS3, expect_newest_last, staged

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from functools import partial
    from pathlib import Path

    from shared import Env, Session

DIGEST = "0" * 58 + "a1b2c3"
NAME = "20261120T215558.123456Z-a1b2c3"
NOW = datetime(2026, 11, 20, 21, 55, 58, 123456, UTC)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
clocks = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone


# --- Names ---


def name_at(moment: datetime, sha256: str, newest: str = "") -> str:
    """Return the name that a version gets when the clock says this."""
    with mock.patch.object(program, "datetime", wraps=datetime) as clock:
        clock.now.return_value = moment
        return program.new_name(sha256, newest)


def test_name_is_the_time_of_capture_and_the_end_of_the_digest() -> None:
    assert name_at(NOW, DIGEST) == NAME
    assert name_at(NOW.replace(microsecond=1), DIGEST) == "20261120T215558.000001Z-a1b2c3"


@settings(deadline=None)
@given(st.lists(st.tuples(clocks, digests), min_size=2, max_size=20))
@example([(NOW, "f" * 64), (NOW, "0" * 64)])  # the clock stands still, and the digest sorts lower
def test_names_increase_whatever_the_clock_says(captures: list[tuple[datetime, str]]) -> None:
    """They strictly increase, and stay names; the first tells the reading exactly."""
    names = [""]
    with mock.patch.object(program, "datetime", wraps=datetime) as clock:
        for clock.now.return_value, digest in captures:
            names.append(program.new_name(digest, names[-1]))
    assert all(earlier < later for earlier, later in pairwise(names))
    assert all(VERSION_NAME.fullmatch(name) and program.captured_at(name) for name in names[1:])
    assert [name[-6:] for name in names[1:]] == [digest[-6:] for _, digest in captures]
    assert program.captured_at(names[1]) == captures[0][0]


@pytest.mark.parametrize(
    "text",
    [
        NAME + "\n",
        NAME.lower(),
        NAME[:-1],
        NAME[:-6] + "A1B2C3",
        NAME[:-6] + "g1b2c3",
        f".{NAME}.partial",
        "alice/" + NAME,
        NAME + ".tmp",
        NAME.replace("Z-", "-"),
        "20260230T215558.123456Z-a1b2c3",
        "20261120T215960.123456Z-a1b2c3",
        "00001120T215558.123456Z-a1b2c3",
        "\u0662\u0660261120T215558.123456Z-a1b2c3",
    ],
)
def test_what_only_resembles_a_name_is_none(text: str) -> None:
    assert program.captured_at(text) is None


def test_year_9999_is_no_time_of_capture() -> None:
    """A name from the last year there is, after which no later one could be made, is no version."""
    assert name_at(NOW, DIGEST, "99991231T235959.999999Z-a1b2c3") == NAME


# --- What is put, how often, and in which order ---


def test_every_start_puts_the_version_once(env: Env, lnd: Lnd, check: partial[None]) -> None:
    version = lnd.write()
    for _ in range(2):
        with Daemon(env | OFTEN) as daemon:
            daemon.wait_for_stored(version)
            daemon.wait_for_looks()
            assert daemon.stop() == 0
            assert len(daemon.stored_names()) == 1
    check(refreshes=1)


def test_a_staged_version_counts_as_the_put_of_a_start(
    env: Env, lnd: Lnd, session: Session, staging: Path
) -> None:
    version = lnd.write()
    for _ in range(2):
        with Daemon(env | AWAY) as daemon:
            daemon.wait_for_log("cannot store")
            assert daemon.stop() == 0
            assert len(staged(staging)) == 1
    with session() as daemon:
        daemon.wait_for_stored(version)


def test_an_unchanged_file_is_put_again(env: Env, lnd: Lnd, check: partial[None]) -> None:
    """It gets a new, later name when the last receipt is REFRESH_SECONDS old."""
    version = lnd.write()
    with Daemon(SELDOM | env | {"REFRESH_SECONDS": "0.3"}) as daemon:
        daemon.wait_for_stored(version, count=3)
        assert daemon.stop() == 0
        names = daemon.stored_names()
    assert all(earlier < later for earlier, later in pairwise(names))
    check(refreshes=len(names) - 1)


def test_a_refresh_does_not_pile_up(
    env: Env, lnd: Lnd, s3_line: FaultProxy, check: partial[None], staging: Path
) -> None:
    lnd.write()
    s3_line.set("refuse")
    with Daemon(env | OFTEN | {"REFRESH_SECONDS": "0.05"}) as daemon:
        daemon.wait_for_log("cannot store")
        daemon.wait_for_looks(10)
        assert len(staged(staging)) == 1
        assert daemon.log.count("captured") == 1
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    check()


def test_a_refresh_can_be_turned_off(session: Session, lnd: Lnd) -> None:
    version = lnd.write()
    with session({"RESCAN_SECONDS": "0.02", "REFRESH_SECONDS": "0"}) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_looks(20)


def test_the_newest_comes_first_even_within_a_drain(
    env: Env, lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None]
) -> None:
    """At the end it is put once more."""
    first = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        stepped.wait_for_requests(1)
        second = lnd.write()
        daemon.wait_for_captured(second)  # else it may be replaced before it is looked at
        third = lnd.write()
        daemon.wait_for_captured(third)
        stepped.let()
        stepped.wait_for_requests(2)
        fourth = lnd.write()
        daemon.wait_for_captured(fourth)
        stepped.let(4)
        daemon.wait_for_stored(fourth, count=2)
        assert daemon.stop() == 0
        expect_newest_last(daemon, fourth)
    assert stepped.hashes() == [
        version.sha256[-6:] for version in (first, third, fourth, second, fourth)
    ]
    check_stepped(refreshes=1)
