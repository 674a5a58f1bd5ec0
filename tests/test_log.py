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
    S3Server,
    Script,
    answers,
    run_script,
    script_environment,
    settings_at,
    version_name,
)
from kit.script import LATE_ENOUGH
from shared import AWAY, NOON, SELDOM

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
    """Whatever is shown is printable and stays within its line, and what was printable is shown as
    it is.
    """
    lines = logged(f"path /a{text}error: b", hint=f"run{text}this").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.isprintable()
        assert (text in line) == text.isprintable()
        line.encode()


def test_levels_and_hints_are_told_to_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stderr is not the journal's stream, a line begins with the local time, and with its
    level if that is more than information.
    """
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    assert re.fullmatch(f"{stamp}m", logged("m"))
    assert re.fullmatch(f"{stamp}warning: m", logged("m", logging.WARNING))
    told = logged("m", logging.ERROR, hint="h")
    assert re.fullmatch(f"{stamp}error: m\n{stamp}error: hint: h", told)


def test_journald_gets_a_priority_on_every_line_of_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For journald every line of a traceback has the priority; an error's text cannot choose
    another, and no secret is in it, nor in the hint.
    """
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
    """While nobody reads its stderr, which takes 4 KiB, all versions are stored, and a stop ends
    it.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    environment = script_environment(fake_env | SELDOM, str(tmp_path))
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=environment, stderr=writing
    ) as process:
        os.close(writing)
        for number in range(40):
            lnd.write()
            fake.wait_for_requests(number + 1)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    os.close(reading)


def test_a_log_that_is_closed_holds_up_nothing(fake: FakeS3, written_env: dict[str, str]) -> None:
    """Somebody may start it with a closed stderr; the version is stored, and a stop ends it."""
    closed = ["/bin/sh", "-c", 'exec "$0" "$1" 2>&-', sys.executable, str(SCRIPT)]
    with Script(written_env, command=closed) as script:
        fake.wait_for_requests(1)
        assert script.stop() == 0


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


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
@pytest.mark.parametrize(
    "password", ["geheim", "ge@heim", "ge:heim", "ge%2Fheim", "ge/heim", "ge?heim", "ge#heim"]
)
def test_a_password_in_a_url_is_masked(scheme: str, password: str) -> None:
    """User and password in a URL never reach a line, and the host does."""
    text = logged(f'cannot reach "{scheme}://alice:{password}@s3.example.org/bucket"')
    assert "alice" not in text
    assert "heim" not in text
    assert "s3.example.org/bucket" in text


# --- A lasting problem ---


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, _log_level: None) -> SimpleNamespace:
    """Return the program's monotonic clock, which stands still until it is set; the log is
    recorded.
    """
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def offline(hint: str = "wait") -> program.TransientError:
    """Return an error that may pass."""
    return program.TransientError("cannot store: k: no route", hint)


def test_a_problem_is_said_again_every_hour(
    clock: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """A problem that lasts for a day is a line when it starts, one every hour with how often and
    how long, and one when it is over; the next one starts anew.
    """
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


# --- A session ---


def test_the_journal_gets_priorities(
    fake_env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """For journald each line, hints included, bears a priority instead of a time."""
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
    """In Python's development mode, with every warning an error, a session with an outage goes as
    ever.
    """
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


def test_the_log_says_at_the_start_what_is_in_use(fake: FakeS3, fake_env: dict[str, str]) -> None:
    """Endpoint, region and credential method stand in the log also while LND has written nothing,
    and the secret never does.
    """
    with Script(fake_env) as script:
        script.wait_for_log(f"using endpoint {fake.endpoint}, region us-east-1, credentials: env$")
        assert script.stop() == 0
        assert script.log.count("using endpoint") == 1
        assert MADE_UP.secret_key not in script.stdout + script.log
    assert not fake.requests


def test_what_is_in_use_is_told_once(fake: FakeS3, written_env: dict[str, str]) -> None:
    """A key that S3 refuses again and again does not fill the log with where it came from."""
    fake.set_default(answers.UNKNOWN_KEY)
    with Daemon(written_env | SELDOM) as daemon:
        fake.wait_for_requests(3)
        assert daemon.log.count("using endpoint") == 1


# --- Secrets and faults ---


PASSWORDS = [
    "alice:geheim@127.0.0.1:9",
    "http://alice:geheim@127.0.0.1:9",
    "http://alice:ge/heim@127.0.0.1:9",
    "http://alice:ge heim@127.0.0.1:9",
]


@pytest.mark.parametrize("url", PASSWORDS)
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "HTTP_PROXY"])
def test_password_in_a_url_is_never_told(
    name: str, url: str, good: dict[str, str], lnd: Lnd
) -> None:
    """User and password in the URL of the endpoint or the proxy, also in one that is faulty, never
    reach the output.
    """
    lnd.write()
    good |= {
        "SHUTDOWN_GRACE_SECONDS": "0",
        "AWS_ENDPOINT_URL_S3": "http://s3.example.org",
        name: url,
    }
    with Script(good, "run") as script:
        script.wait_for_log("error: |cannot store")
        if script.returncode is None:
            script.stop()
        output = script.log + script.stdout
    assert "alice" not in output
    assert "heim" not in output


def test_a_password_that_the_sdk_has_masked_in_part(good: dict[str, str]) -> None:
    """It masks the first `p`, which is that of http, and the rest is masked all the same."""
    through = {"HTTP_PROXY": "http://bo:p@127.0.0.1:1/x@127.0.0.1:1"}
    at = {"AWS_ENDPOINT_URL_S3": "http://s3.example.org"}
    done = run_script(good | at | through, "list")
    assert done.returncode == 75, done.stderr
    assert "proxy URL" in done.stderr
    assert not re.search("bo:|p@|/x", done.stderr)


# --- What stdout cannot encode ---


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("prefix", "encoding"),
    [
        ("ключ ü/", {"PYTHONIOENCODING": "latin-1:strict"}),
        ("alice/", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    ],
    ids=["latin", "C"],
)
def test_a_stdout_that_cannot_encode(
    s3: S3Server,
    bucket: str,
    prefix: str,
    lnd: Lnd,
    staging: Path,
    home: Path,
    encoding: dict[str, str],
) -> None:
    """What stdout cannot encode, of a path or a prefix, is escaped, and the result is the same."""
    wanted = lnd.write().data
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    user = s3.read_write_user(bucket)
    env = settings_at(s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix, user=user) | encoding
    output = home / "копия"
    for args in (("restore", "--output", str(output)), ("list",), ("check",)):
        done = run_script(env, *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert "Traceback" not in done.stderr
    assert output.read_bytes() == wanted
