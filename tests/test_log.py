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
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    MADE_UP,
    PATIENCE_SECONDS,
    SCRIPT,
    Daemon,
    FakeS3,
    Lnd,
    RawS3,
    S3Server,
    Script,
    answers,
    channel_backup,
    reader_settings,
    run_script,
    script_environment,
    settings_at,
    version_name,
)
from shared import AWAY, NOON, SELDOM

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial
    from pathlib import Path

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


# --- A line ---


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


def test_the_path_of_the_heartbeat_never_reaches_the_log(
    fake_env: dict[str, str], lnd: Lnd
) -> None:
    """A server that repeats the path of the heartbeat in its answer tells it to nobody."""
    lnd.write()
    with RawS3(lambda request: answers.framed([b""], status=f"404 no {request.path}")) as raw:
        fake_env["HEARTBEAT_URL"] = f"{raw.endpoint}/ping/geheim-geheim"
        done = run_script(fake_env, "once")
        assert raw.requests
    assert "HEARTBEAT_URL" in done.stderr
    assert "geheim" not in done.stderr


def test_a_log_that_nobody_reads_holds_up_nothing(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """While nobody reads its stderr, which takes 4 KiB, all versions are stored, and a stop ends
    it.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    environment = fake_env | SELDOM | {"PATH": os.environ["PATH"], "HOME": str(staging.parent)}
    with subprocess.Popen(
        [sys.executable, str(SCRIPT)], env=environment, stderr=writing
    ) as process:
        os.close(writing)
        for number in range(60):
            lnd.write()
            fake.wait_for_requests(number + 1)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0
    os.close(reading)


def test_what_is_in_use_is_told_once(fake: FakeS3, fake_env: dict[str, str], lnd: Lnd) -> None:
    """A key that S3 refuses again and again does not fill the log with where it came from."""
    fake.set_default(answers.UNKNOWN_KEY)
    lnd.write()
    with Daemon(fake_env | SELDOM) as daemon:
        fake.wait_for_requests(3)
        assert daemon.log.count("using endpoint") == 1


def test_a_log_that_is_closed_holds_up_nothing(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """Somebody may start it with a closed stderr; the version is stored, and a stop ends it."""
    lnd.write()
    environment = fake_env | {"PATH": os.environ["PATH"], "HOME": str(staging.parent)}
    command = ["/bin/sh", "-c", 'exec "$0" "$1" 2>&-', sys.executable, str(SCRIPT)]
    with subprocess.Popen(command, env=environment) as process:
        fake.wait_for_requests(1)
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


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


# --- A lasting problem ---


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


# --- A session ---


def test_the_journal_gets_priorities(
    env: dict[str, str], lnd: Lnd, check: partial[None], started_by: Callable[[str], None]
) -> None:
    """For journald each line, hints included, bears a priority instead of a time."""
    started_by(
        "import os\nstderr = os.fstat(2)\nos.environ['JOURNAL_STREAM'] = "
        "f'{stderr.st_dev}:{stderr.st_ino}'"
    )
    lnd.write(channels=0)
    with Daemon(SELDOM | env | AWAY) as daemon:
        daemon.wait_for_log(r"^<4>.*: no channels")
        daemon.wait_for_log(r"^<4>cannot store: .*\n<4>hint: ")
        lnd.place(b"")
        daemon.wait_for_log(r"^<3>cannot read channel.backup: .*\n<3>hint: ")
        assert daemon.stop() == 0
        assert [line for line in daemon.log.splitlines() if not re.match(r"<[346]>\S", line)] == []
    lnd.placed.clear()
    check()


def test_a_session_has_no_warnings(env: dict[str, str], lnd: Lnd, check: partial[None]) -> None:
    """In Python's development mode, with every warning an error, a session with an outage goes as
    ever.
    """
    first = lnd.write()
    strict = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    with Daemon(SELDOM | env | strict | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
        log = daemon.log
    with Daemon(SELDOM | env | strict) as daemon:
        daemon.wait_for_stored(first)
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
        log += daemon.log
    assert not re.search("Traceback|Warning|never|Exception ignored", log), log
    check()


# --- What is in use ---


@pytest.mark.parametrize(
    ("in_file", "method"),
    [(False, "env"), (True, "shared-credentials-file")],
    ids=["environment", "file"],
)
def test_the_log_says_at_the_start_what_is_in_use(
    fake: FakeS3, fake_env: dict[str, str], tmp_path: Path, method: str, *, in_file: bool
) -> None:
    """Endpoint, region and credential method stand in the log also while LND has written nothing,
    and the secret never does.
    """
    if in_file:
        keys = tmp_path / "credentials"
        key, secret = (
            fake_env.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        )
        keys.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        fake_env["AWS_SHARED_CREDENTIALS_FILE"] = str(keys)
    with Script(fake_env) as script:
        script.wait_for_log(
            f"using endpoint {fake.endpoint}, region us-east-1, credentials: {method}$"
        )
        assert script.stop() == 0
        assert script.log.count("using endpoint") == 1
        assert MADE_UP.secret_key not in script.stdout + script.log
    assert not fake.requests


# --- Secrets and faults ---


PASSWORDS = [f"http://alice:{word}@127.0.0.1:9" for word in ("geheim", "ge/heim", "ge heim")]

PASSWORDS.append("alice:geheim@127.0.0.1:9")


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


def test_every_line_has_a_priority_for_journald(good: dict[str, str], tmp_path: Path) -> None:
    """Where stderr is the journal, every line of every fault, hints included, begins with its
    priority.
    """
    out, into = os.pipe()
    status = os.fstat(into)
    environ = good | {
        "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        "RESCAN_SECONDS": "0\n<0>forged",
        "S3_BUCKET_NAME": "",
    }
    with os.fdopen(out, "rb") as reader:
        try:
            environment = script_environment(environ, str(tmp_path))
            done = subprocess.run(
                [sys.executable, str(SCRIPT)], env=environment, stderr=into, check=False
            )
        finally:
            os.close(into)
        lines = reader.read().decode().splitlines()
    assert done.returncode == 78
    assert len(lines) == 4
    assert all(line.startswith("<3>") for line in lines)


# --- What stdout cannot encode ---


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "encoding",
    [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}],
    ids=["ascii", "latin"],
)
def test_a_stdout_that_cannot_encode(
    s3: S3Server, bucket: str, lnd: Lnd, staging: Path, home: Path, encoding: dict[str, str]
) -> None:
    """What stdout cannot encode, of a path or a prefix, is escaped, and the result is the same."""
    wanted, prefix = lnd.write().data, "ключ ü/"
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    user = s3.read_write_user(bucket)
    env = settings_at(s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix, user=user) | encoding
    output = home / "копия"
    for args in (("restore", "--output", str(output)), ("list",), ("list", "--json"), ("check",)):
        done = run_script(env, *args)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert "Traceback" not in done.stderr
    assert output.read_bytes() == wanted


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "encoding",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "C"],
)
def test_a_path_that_stdout_cannot_encode(
    s3: S3Server, bucket: str, prefix: str, home: Path, encoding: dict[str, str]
) -> None:
    """A path alone, outside of what stdout can encode, is escaped, too."""
    wanted = channel_backup(1)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader | encoding, "restore", "--output", "ü", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "ü").read_bytes() == wanted
    assert "lncli" in done.stdout
