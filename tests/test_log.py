"""The lines of the log: nothing forges one, no secret is in one, and a lasting problem is said
seldom.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import (
    MADE_UP,
    PATIENCE_SECONDS,
    SCRIPT,
    Daemon,
    FakeS3,
    Lnd,
    Script,
    answers,
    run_script,
    script_environment,
)
from kit.script import LATE_ENOUGH
from shared import AWAY, SELDOM

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What could end a line, move the cursor, turn the text around, or not be written at all.
NASTY = "\n\r\0\t\x1b[2K\x85\u2028\u2029\u202e\u2066\ufeff\udc80"


# --- A line ---


def logged(message: str, level: int = logging.INFO, **more: object) -> str:
    """Return what the log writes for a message; `more` are fields of its record."""
    fields = {"msg": message, "levelno": level, "levelname": logging.getLevelName(level)}
    return program.LineFormatter().format(logging.makeLogRecord(fields | more))


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="@")))  # what stands before it may be a password
@example(NASTY)
def test_no_character_forges_a_line(text: str) -> None:
    """What was printable is shown as it is."""
    lines = logged(f"path /a{text}error: b", hint=f"run{text}this").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.isprintable()
        assert (text in line) == text.isprintable()
        line.encode()


def test_levels_and_hints_are_told_to_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """So they are where stderr is not the journal's stream."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(f"{stamp}m", logged("m"))
    assert re.fullmatch(f"{stamp}warning: m", logged("m", logging.WARNING))
    told = logged("m", logging.ERROR, hint="h")
    assert re.fullmatch(f"{stamp}error: m\n{stamp}error: hint: h", told)


def test_journald_gets_a_priority_on_every_line_of_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error's text cannot choose another; no secret is in it, nor in the hint."""
    status = os.fstat(sys.stderr.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    monkeypatch.setattr(program, "SECRETS", {"geheim-geheim"})
    with pytest.raises(ValueError, match="forged") as caught:
        raise ValueError("x\n<0>forged\r<0>forged\x1b[2K geheim-geheim")
    error = (caught.type, caught.value, caught.tb)
    text = logged("a fault", logging.CRITICAL, hint="geheim-geheim", exc_info=error)
    lines = text.splitlines()
    assert len(lines) > 4
    assert all(line.startswith("<2>") and line.isprintable() for line in lines)
    assert "geheim" not in text


@pytest.mark.unmeasured
def test_a_log_that_nobody_reads_holds_up_nothing(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)  # bytes, and each version takes more than 150
    environment = script_environment(fake_env | SELDOM, str(tmp_path))
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=environment, stderr=writing
    ) as process:
        os.close(writing)
        for number in range(30):
            lnd.write()
            fake.wait_for_requests(number + 1)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    os.close(reading)


def test_a_log_that_is_closed_holds_up_nothing(fake: FakeS3, written_env: dict[str, str]) -> None:
    closed = ["/bin/sh", "-c", 'exec "$0" "$1" 2>&-', sys.executable, str(SCRIPT)]
    with Script(written_env, command=closed) as script:
        fake.wait_for_requests(1)
        assert script.stop() == 0


def test_the_secrets_of_the_environment_never_reach_the_log() -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "geheim-1",
        "AWS_SESSION_TOKEN": "geheim-2",
        "HEARTBEAT_URL": "https://hc.example.org/geheim-3",
    }
    done = run_script(secrets | {"MONITOR_FILE_PATH": " ".join(secrets.values())}, "check")
    assert done.returncode == 78
    assert re.search(r"MONITOR_FILE_PATH=\*\*\* ", done.stderr)
    assert "geheim" not in done.stderr


@pytest.mark.parametrize("path", ["api/push/{}?status=up&msg=OK&ping=", "ping/{}", "{}/a?b"])
def test_a_part_of_the_heartbeat_s_url_is_masked(path: str) -> None:
    """Whoever answers there may echo no more than the token."""
    url = f"https://hc.example.org/{path.format('AbCdEf12345678')}"
    done = run_script({"HEARTBEAT_URL": url, "BACKUP_DIRECTORY": "no AbCdEf12345678"}, "run")
    assert "BACKUP_DIRECTORY=no ***: " in done.stderr
    assert "AbCdEf12345678" not in done.stderr


def test_a_secret_that_begins_another_masks_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "SECRETS", set())
    long = [f"geheim-{number:02}-and-more" for number in range(20)]
    program.keep_secret(*(each[:9] for each in long), *long)
    assert {program.printable(each) for each in long} == {"***"}


@pytest.mark.parametrize(
    "password", ["geheim", "ge@heim", "ge:heim", "ge%2Fheim", "ge/heim", "ge?heim", "ge#heim"]
)
def test_a_password_in_a_url_is_masked(password: str) -> None:
    for scheme in ("http", "HTTP"):
        text = logged(f'cannot reach "{scheme}://alice:{password}@s3.example.org/bucket"')
        assert not re.search("alice|heim", text)
        assert "s3.example.org/bucket" in text


# --- A lasting problem ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, _log_level: None) -> SimpleNamespace:
    """Return the program's monotonic clock, which stands still until it is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def offline(hint: str = "wait") -> program.TransientError:
    return program.TransientError("cannot store: k: no route", hint)


def test_a_problem_is_said_again_every_hour(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """It lasts for a day; the next one starts anew."""
    problem = program.Problem("storing", "it works")
    problem.resolve()
    for _ in range(24 * 360 + 1):
        problem.report(offline())
        clock.now += 10
    assert [line.levelno for line in caplog.records] == [logging.WARNING] * 25
    assert caplog.messages[0] == "cannot store: k: no route"
    assert "(8641 times in 86400 s)" in caplog.messages[-1]
    problem.resolve()
    problem.resolve()
    assert caplog.messages[25:] == ["it works again, after 86410 s (failures: 8641)"]
    assert caplog.records[25].levelno == logging.INFO
    problem.report(offline())
    assert caplog.messages[26:] == caplog.messages[:1]


def test_a_problem_that_changes_is_said_at_once(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """Something else is to be done about it; what alternates is said once an hour."""
    problem = program.Problem("storing", "it works")
    for _ in range(100):
        problem.report(offline("wait"))
        problem.report(offline("set the clock"))
        clock.now += 60
    assert [vars(line)["hint"] for line in caplog.records] == ["wait", "set the clock"] * 2
    problem.resolve()
    assert "failures: 200" in caplog.messages[-1]


# --- A session ---


def test_the_journal_gets_priorities(
    fake_env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """Each line, hints included, bears one instead of a time."""
    started_by(f"""{LATE_ENOUGH}
import os
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{{stderr.st_dev}}:{{stderr.st_ino}}"
""")
    lnd.write(channels=0)
    with Daemon(fake_env | SELDOM | AWAY) as daemon:
        daemon.wait_for_log(r"^<4>.*: no channels")
        daemon.wait_for_log(r"^<4>cannot store: .*\n<4>hint: ")
        lnd.place(b"")
        daemon.wait_for_log(r"^<3>cannot read channel.backup: .*\n<3>hint: ")
        assert daemon.stop() == 0
        assert [line for line in daemon.log.splitlines() if not re.match(r"<[346]>\S", line)] == []


@pytest.mark.unmeasured
def test_a_session_has_no_warnings(fake_env: dict[str, str], lnd: Lnd) -> None:
    """It has an outage, and every warning of Python's development mode is an error."""
    first = lnd.write()
    strict = fake_env | SELDOM | {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    with Daemon(strict | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
        log = daemon.log
    with Daemon(strict) as daemon:
        daemon.wait_for_stored(first)
        lnd.directory.rename(lnd.directory.with_name("old"))
        lnd.directory.mkdir(mode=0o700)
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        log += daemon.log
    assert not re.search("Traceback|Warning|never|destroyed|[Ee]xception", log), log


# --- What is in use ---


def test_the_log_says_at_the_start_what_is_in_use(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd
) -> None:
    """It does so before LND has written, and only once, however often S3 refuses the key."""
    fake.set_default(answers.UNKNOWN_KEY)
    with Daemon(fake_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        daemon.wait_for_log(f"using endpoint {fake.endpoint}, region us-east-1, credentials: env$")
        assert not fake.requests
        lnd.write()
        fake.wait_for_requests(2)
        assert daemon.stop() == 0
        assert daemon.log.count("using endpoint") == 1
        assert MADE_UP.secret_key not in daemon.stdout + daemon.log


# --- Passwords ---


@pytest.mark.parametrize(
    "url",
    [
        "alice:geheim@127.0.0.1:9",
        "http://alice:geheim@127.0.0.1:9",
        "http://alice:ge/heim@127.0.0.1:9",
        "http://alice:ge heim@127.0.0.1:9",
    ],
)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "HTTP_PROXY"])
def test_password_in_a_url_is_never_told(name: str, url: str, good: dict[str, str]) -> None:
    """Nor is the user told, also of a URL that is faulty."""
    at = {"AWS_ENDPOINT_URL_S3": "http://s3.example.org", name: url}
    done = run_script(good | at, "list")
    assert done.returncode != 0
    assert not re.search("alice|heim", done.stderr + done.stdout)


def test_a_password_that_the_sdk_has_masked_in_part(good: dict[str, str]) -> None:
    """It masks the first `p`, which is that of http, and the rest is masked all the same."""
    through = {"HTTP_PROXY": "http://bo:p@127.0.0.1:1/x@127.0.0.1:1"}
    done = run_script(good | {"AWS_ENDPOINT_URL_S3": "http://s3.example.org"} | through, "list")
    assert done.returncode == 75, done.stderr
    assert "proxy URL" in done.stderr
    assert not re.search("bo:|p@|/x", done.stderr)
