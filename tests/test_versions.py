"""A version's name, what a log line may look like, and how often a lasting problem is said."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import pairwise
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import VERSION_NAME, run_script

import s3_backup_lnd_channels as program

DIGEST = "0" * 58 + "a1b2c3"
NAME = "20261120T215558.123456Z-a1b2c3"
NOW = datetime(2026, 11, 20, 21, 55, 58, 123456, UTC)
# What could end a line, move the cursor, turn the text around, or not be written at all.
NASTY = [
    "\n",
    "\r",
    "\r\n",
    "\0",
    "\t",
    "\x1b[2K",
    "\x85",
    "\u2028",
    "\u2029",
    "\u202e",
    "\u2066",
    "\ufeff",
    "\udc80",
]

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
clocks = st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis adds the zone

# --- names ---


def name_at(moment: datetime, sha256: str, newest: str = "") -> str:
    """Return the name that a version gets when the clock says this."""

    class Clock(datetime):
        @classmethod
        def now(cls, _: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment

    with mock.patch.object(program, "datetime", Clock):
        return program.new_name(sha256, newest)


def test_name_is_the_time_of_capture_and_the_end_of_the_digest() -> None:
    """A name is the UTC time in microseconds, a dash, and the last six hex digits of the
    SHA-256.
    """
    assert name_at(NOW, DIGEST) == NAME


@pytest.mark.parametrize("micros", [0, 1, 999999])
def test_name_always_has_six_digits_of_microseconds(micros: int) -> None:
    """A name has the same length at every microsecond."""
    name = name_at(NOW.replace(microsecond=micros), DIGEST)
    assert name == f"20261120T215558.{micros:06}Z-a1b2c3"


@settings(deadline=None)
@given(st.lists(st.tuples(clocks, digests), min_size=2, max_size=20))
def test_names_increase_whatever_the_clock_says(captures: list[tuple[datetime, str]]) -> None:
    """Names strictly increase, and stay names, for any sequence of clock readings."""
    names = [""]
    for now, digest in captures:
        names.append(name_at(now, digest, names[-1]))
    assert all(earlier < later for earlier, later in pairwise(names))
    assert all(VERSION_NAME.fullmatch(name) and program.captured_at(name) for name in names[1:])
    assert [name[-6:] for name in names[1:]] == [digest[-6:] for _, digest in captures]


def test_names_increase_when_the_clock_stands_still() -> None:
    """At the same clock reading, a digest that sorts lower gets the later name all the same."""
    first = name_at(NOW, "f" * 64)
    second = name_at(NOW, "0" * 64, first)
    assert second > first
    assert program.captured_at(second) == NOW + timedelta(microseconds=1)


@settings(deadline=None)
@given(clocks, digests)
def test_time_of_capture_is_read_back_from_the_name(now: datetime, digest: str) -> None:
    """The time of capture in a name is the clock reading, to the microsecond, in UTC."""
    assert program.captured_at(name_at(now, digest)) == now


@settings(deadline=None)
@given(st.text() | st.from_regex(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{6}", fullmatch=True))
def test_any_text_is_a_name_or_none(text: str) -> None:
    """Any text is either exactly the name of its own time of capture, or no name at all."""
    if (moment := program.captured_at(text)) is not None:
        assert text == f"{moment.year:04}{moment:%m%dT%H%M%S.%f}Z-{text[-6:]}"
        assert moment.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        NAME + "\n",
        "\n" + NAME,
        NAME.lower(),
        NAME[:-1],
        NAME + "0",
        NAME[:-6] + "A1B2C3",
        NAME[:-6] + "g1b2c3",
        "." + NAME,
        f".{NAME}.partial",
        ".damaged-" + NAME,
        "alice/" + NAME,
        NAME + ".tmp",
        NAME.replace("Z-", "-"),
        "20260230T215558.123456Z-a1b2c3",
        "20261320T215558.123456Z-a1b2c3",
        "20261120T255558.123456Z-a1b2c3",
        "20261120T215960.123456Z-a1b2c3",
        "00001120T215558.123456Z-a1b2c3",
        "\u0662\u0660261120T215558.123456Z-a1b2c3",
    ],
)
def test_what_only_resembles_a_name_is_none(text: str) -> None:
    """What differs from a name in the least is no version."""
    assert program.captured_at(text) is None


def test_year_9999_is_no_time_of_capture() -> None:
    """A name from the last year there is, after which no later one could be made, is no version."""
    assert program.captured_at("99991231T235959.999999Z-a1b2c3") is None
    assert name_at(NOW, DIGEST, "99991231T235959.999999Z-a1b2c3") == NAME


# --- log lines ---


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    """Return a record of the program's log."""
    return logging.getLogger("lnd-backup").makeRecord(
        "lnd-backup", level, "f", 1, message, (), None, extra=extra
    )


def fail(text: str) -> None:
    """Raise an error with this text."""
    raise ValueError(text)


def failing_record(text: str) -> logging.LogRecord:
    """Return a record with the traceback of an error with this text."""
    try:
        fail(text)
    except ValueError:
        entry = record("a fault", logging.CRITICAL)
        entry.exc_info = sys.exc_info()
    return entry


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let stderr be what journald reads."""
    status = os.fstat(sys.stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")


@pytest.mark.parametrize("nasty", NASTY, ids=ascii)
def test_no_character_forges_a_line(nasty: str) -> None:
    """A control, format or surrogate character comes out as its escape, within the line."""
    text = program.LineFormatter().format(record(f"path /a{nasty}error: b", hint=f"run{nasty}this"))
    lines = text.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
    assert "\\" in lines[0]
    assert "hint: run\\" in lines[1]
    text.encode()


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="@")))  # what stands before it may be a password
def test_shown_text_is_printable_and_printable_text_is_shown(text: str) -> None:
    """Whatever is shown is printable, and what was printable is shown as it is."""
    shown = program.printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()
    shown.encode()


def test_levels_and_hints_are_told_to_people() -> None:
    """On a terminal a line begins with the local time, and with its level if that is more than
    information.
    """
    stamp = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    lines = [
        program.LineFormatter().format(record("m", level))
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
    ]
    expected = ["m$", "warning: m$", "error: m$"]
    for line, rest in zip(lines, expected, strict=True):
        assert re.match(stamp + rest, line)


@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize(
    ("level", "priority"),
    [
        (logging.INFO, "<6>"),
        (logging.WARNING, "<4>"),
        (logging.ERROR, "<3>"),
        (logging.CRITICAL, "<2>"),
    ],
)
def test_journald_gets_a_priority_on_every_line(level: int, priority: str) -> None:
    """For journald the line and its hint each begin with their priority, and have no time of their
    own.
    """
    assert (
        program.LineFormatter().format(record("m", level, hint="h"))
        == f"{priority}m\n{priority}hint: h"
    )


@pytest.mark.usefixtures("journal")
def test_journald_gets_a_priority_on_every_line_of_a_traceback() -> None:
    """For journald every line of a traceback has the priority, and an error's text cannot choose
    another.
    """
    lines = (
        program.LineFormatter()
        .format(failing_record("x\n<0>forged\r<0>forged\x1b[2K"))
        .splitlines()
    )
    assert len(lines) > 3
    assert all(line.startswith("<2>") and line.isprintable() for line in lines)


def test_another_stream_than_the_journals_has_no_priorities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A JOURNAL_STREAM that stderr is not, because it was redirected, changes nothing."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    assert not program.LineFormatter().format(record("m", logging.ERROR)).startswith("<")


@pytest.mark.parametrize("around", ["{}", "'{}'", "x={}&y", "({})"])
def test_a_secret_that_a_library_puts_into_a_message_is_masked(
    around: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be kept secret never reaches a line, a hint or a traceback."""
    secret = "https://hc.example.org/ge+h/eim"
    monkeypatch.setattr(program, "SECRETS", set())
    program.keep_secret(secret, None, "")
    for entry in (
        record(around.format(secret)),
        record("m", hint=around.format(secret)),
        failing_record(around.format(secret)),
    ):
        text = program.LineFormatter().format(entry)
        assert "eim" not in text
        assert "***" in text


def test_the_secrets_of_the_environment_never_reach_the_log() -> None:
    """The value of a secret variable is masked, wherever in a message it turns up."""
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "geheim-1",
        "AWS_SESSION_TOKEN": "geheim-2",
        "HEARTBEAT_URL": "https://hc.example.org/geheim-3",
    }
    done = run_script(secrets | {"MONITOR_FILE_PATH": " ".join(secrets.values())}, "check")
    assert done.returncode == 78
    assert re.search(r"MONITOR_FILE_PATH=\*\*\* ", done.stderr)
    assert "geheim" not in done.stderr


@pytest.mark.parametrize(
    "password", ["geheim", "ge@heim", "ge:heim", "ge%2Fheim", "ge/heim", "ge?heim", "ge#heim"]
)
def test_a_password_in_a_url_is_masked(password: str) -> None:
    """User and password in a URL never reach a line, and the host does."""
    text = program.LineFormatter().format(
        record(f'cannot reach "http://alice:{password}@s3.example.org/bucket"')
    )
    assert "alice" not in text
    assert "heim" not in text
    assert "s3.example.org/bucket" in text


# --- a lasting problem ---


class Clock:
    """A monotonic clock that stands still until it is told."""

    def __init__(self) -> None:
        """Begin at some time."""
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    """Put the program's monotonic clock into the test's hand, and record its log."""
    caplog.set_level(logging.INFO, "lnd-backup")
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def offline(hint: str = "wait") -> program.TransientError:
    """Return an error that may pass."""
    return program.TransientError("cannot store: k: no route", hint)


def test_a_problem_is_said_once_at_its_start(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A problem that lasts for less than an hour is one line, however often it fails."""
    problem = program.Problem("storing", "it works")
    for _ in range(359):
        problem.report(offline())
        clock.now += 10
    assert [line.levelno for line in caplog.records] == [logging.WARNING]
    assert caplog.messages[0] == "cannot store: k: no route"
    assert vars(caplog.records[0])["hint"] == "wait"


def test_a_problem_is_said_again_every_hour(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A problem that lasts for a day is 24 lines and the first, each with how often and how
    long.
    """
    problem = program.Problem("storing", "it works")
    for _ in range(24 * 360 + 1):
        problem.report(offline())
        clock.now += 10
    assert len(caplog.messages) == 25
    assert "(8641 times in 86400 s)" in caplog.messages[-1]


def test_a_problem_that_changes_is_said_at_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A problem of which something else is to be done is a line of its own at once, and still the
    same problem.
    """
    problem = program.Problem("storing", "it works")
    for hint in ("wait", "wait", "set the clock", "set the clock", "wait"):
        problem.report(offline(hint))
        clock.now += 1
    assert [vars(line)["hint"] for line in caplog.records] == ["wait", "set the clock", "wait"]
    problem.resolve()
    assert "failures: 5" in caplog.messages[-1]


def test_a_problem_that_is_over_is_said_once(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of a problem is one line of information with how often and how long, and a next one
    starts anew.
    """
    problem = program.Problem("storing", "it works")
    problem.resolve()
    assert caplog.messages == []
    problem.report(offline())
    clock.now += 90
    problem.report(offline())
    problem.resolve()
    problem.resolve()
    assert [line.levelno for line in caplog.records] == [logging.WARNING, logging.INFO]
    assert caplog.messages[1] == "it works again, after 90 s (failures: 2)"
    problem.report(offline())
    assert [line.levelno for line in caplog.records] == [
        logging.WARNING,
        logging.INFO,
        logging.WARNING,
    ]
    assert caplog.messages[2] == caplog.messages[0]


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        (program.TransientError, logging.WARNING),
        (program.BackupError, logging.ERROR),
        (program.AccessDeniedError, logging.ERROR),
        (program.DamagedError, logging.ERROR),
        (program.ConfigError, logging.ERROR),
    ],
)
def test_what_passes_by_itself_is_a_warning(
    kind: type[program.BackupError], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing file and a missing network are warnings, and all else that fails is an error."""
    program.Problem("reading", "it works").report(kind("m", "h"))
    assert [line.levelno for line in caplog.records] == [level]
