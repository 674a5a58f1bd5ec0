#!/usr/bin/env python3
"""Send a message when backups fail, and when they work again.

There are three ways to send it: by mail (ALERT_MAIL), by POST (ALERT_URL), and in the journal.

lnd-backup-alert@.service starts this as the user lnd-backup, with the name of a unit: the service,
which has failed, or its check, which has failed or succeeded. A message goes out by each way when
a problem begins, once a day while it lasts, and when a check finds that it is over. A check that
could not reach S3 (exit code 75) changes nothing. With `test-alert` this sends a test.

reads     what the check printed (/run/lnd-backup-check), the state of the unit, and its log
writes    STATE_DIRECTORY and RUNTIME_DIRECTORY alone: which messages went out, by which way, and
          when. The second is for a disk that is full or read-only
connects  to the host of ALERT_URL; starts sendmail for ALERT_MAIL
never     prints the address of a way; follows a redirect; touches LND, the settings or the bucket

Begin to read at `main`, at the end. You may replace this program by your own.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

REPEAT_SECONDS = 86400.0 - 1800  # a day, less what an hourly check may come too early
PATIENCE_SECONDS = 20.0
SUBJECT_MAX, TEXT_MAX = 400, 3500  # ntfy turns more than 4,096 bytes into an attachment
SENDMAIL = "/usr/sbin/sendmail"
SAID = Path("/run/lnd-backup-check")  # SERVICE/said is what its last check printed: check-twice
CHECK = re.compile(r"lnd-backup-check@(?P<service>.+)\.service")
# A line of the log begins with its time. Its level follows, unless it is mere information.
TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
LEVEL = re.compile(r"^(warning|error|critical): ")
VERDICT = re.compile(r"(NOT BACKED UP|BACKED UP|UNKNOWN)\b")
AGAIN = "BACKED UP again"
WHAT_TO_DO = 'What to do: read "When an alert fires" in /opt/lnd-backup/current/docs/operations.md'
NO_WAY = """nobody would get an alert: neither ALERT_MAIL nor ALERT_URL is set
hint: sudoedit /etc/default/lnd-backup-alert, then sudo lnd-backup test-alert"""
FAILURES = (OSError, ValueError, subprocess.SubprocessError, http.client.HTTPException)
# Why a unit failed: by its exit code, or else by what systemd calls its result.
MEANING = {
    "78": "its settings are wrong",
    "203": "its program is missing",
    "226": "a directory that a drop-in names is missing",
    "243": "a credential could not be read",
    "start-limit-hit": "it failed or was restarted eight times in ten minutes",
    "watchdog": "it did not look at channel.backup for three minutes",
    "timeout": "it took too long",
    "oom-kill": "it needed more memory than it is allowed to use",
    "resources": "systemd could not start it, perhaps because the settings file is missing",
}


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Treat a redirect as a failure: it could lead to a file, or to a stranger."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow nothing."""


class Run(NamedTuple):
    """How a unit ended, in systemd's words."""

    result: str
    status: str
    invocation: str

    @classmethod
    def of(cls, unit: str) -> Run:
        """Return what systemd passed in the environment (251 and later), or else ask it."""
        names = ("MONITOR_SERVICE_RESULT", "MONITOR_EXIT_STATUS", "MONITOR_INVOCATION_ID")
        if os.environ.get(names[0]):
            return cls(*(os.environ.get(name, "") for name in names))
        shown = [show(unit, name) for name in ("Result", "ExecMainStatus", "InvocationID")]
        return cls(*shown)

    @property
    def failed(self) -> bool:
        """Tell whether systemd calls it a failure."""
        return self.result != "success"

    @property
    def why(self) -> str:
        """Say in words why it failed."""
        known = MEANING.get(self.status) if self.result == "exit-code" else None
        if known := known or MEANING.get(self.result):
            return known
        if self.result == "exit-code":
            return f"it ended with exit code {self.status}" if self.status else "it did not start"
        if self.result in {"signal", "core-dump"}:
            return f"the signal {self.status} ended it"
        return f'systemd calls the reason "{self.result}"'


class Incident:
    """By which ways it was sent that a unit failed, and when."""

    def __init__(self, unit: str) -> None:
        """Read the first file that can be read. If there is none, nothing was sent."""
        names = ("RUNTIME_DIRECTORY", "STATE_DIRECTORY")
        known = [os.environ[name] for name in names if name in os.environ]
        self.paths = [Path(directory, f"{unit}.json") for directory in known]
        self.told: dict[str, float] = {}
        for path in self.paths:
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                self.told = {way: float(when) for way, when in told.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                continue
            return

    def keep(self) -> None:
        """Write each file, whole or not at all."""
        for path in self.paths:
            partial = path.with_suffix(".partial")
            try:
                partial.write_text(json.dumps(self.told), encoding="utf-8")
                partial.replace(path)
            except OSError as error:
                print(f"<4>cannot write {path}: {error.strerror}", flush=True)


def show(unit: str, name: str) -> str:
    """Return a property of a unit."""
    return output("systemctl", "show", f"--property={name}", "--value", unit).strip()


def output(*command: str) -> str:
    """Return what a command prints, or nothing if it hangs or is missing."""
    try:
        return subprocess.run(
            command,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def one_line(text: str) -> str:
    """Return a text as a subject: one line, not too long, and without control characters."""
    line = " ".join(text.split())
    line = "".join(each if each.isprintable() else "?" for each in line)
    return line if len(line) <= SUBJECT_MAX else f"{line[:SUBJECT_MAX]}…"


def what_it_said(service: str, invocation: str) -> list[str]:
    """Return what the check of a service printed in this run. Lines of its log that are mere
    information are left out, and so are time and level of the others.
    """
    try:
        text = Path(SAID, service, "said").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    first, *lines = text.splitlines() or [""]
    told = []
    for line in lines if first == invocation else []:
        plain = TIME.sub("", line)
        if plain == line or LEVEL.match(plain):
            told.append(LEVEL.sub("", plain))
    return told


def verdict_of(lines: list[str], run: Run) -> str:
    """Return the sentence that the check printed, or one that says why it printed none."""
    spoken = [line for line in lines if line.strip() and not line.startswith("hint: ")]
    for line in spoken:
        if VERDICT.match(line):
            return one_line(line)
    if spoken:
        return one_line(f"UNKNOWN: the check could not ask S3: {spoken[0]}")
    return f"UNKNOWN: the check did not run: {run.why}"


def last_lines(service: str) -> str:
    """Return the end of the service's log, below a title."""
    command = ["journalctl", "--unit", service, "--lines=10", "--no-pager", "--output=short-iso"]
    return f"The last lines of its log:\n{output(*command)}"


def send_mail(address: str, subject: str, text: str) -> None:
    """Hand a mail to the system's sendmail. Raises one of FAILURES."""
    mail = EmailMessage()
    mail["To"], mail["Subject"] = address, subject
    mail.set_content(f"{subject}\n\n{text}")
    subprocess.run(
        [SENDMAIL, "-t", "-i"], check=True, input=mail.as_bytes(), timeout=PATIENCE_SECONDS
    )


def post(url: str, subject: str, text: str) -> None:
    """Post the message. Raises one of FAILURES."""
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError("ALERT_URL is not http or https")
    headers = {"Content-Type": "text/plain; charset=utf-8", "User-Agent": "lnd-backup-alert"}
    body = f"{subject}\n\n{text}".encode()[:TEXT_MAX].decode(errors="ignore").encode()
    request = urllib.request.Request(url, body, headers)  # noqa: S310 - checked above
    with urllib.request.build_opener(NoRedirect).open(request, timeout=PATIENCE_SECONDS):
        pass


def to_journal(_: str, subject: str, __: str) -> None:
    """Write the subject to the journal. The lines of the log are there already."""
    print(f"<{5 if AGAIN in subject else 2}>{subject}", flush=True)


def ways() -> dict[str, tuple[Callable[[str, str, str], None], str]]:
    """Return the ways that are configured, and the address of each. The journal always is."""
    found: dict[str, tuple[Callable[[str, str, str], None], str]] = {"journal": (to_journal, "")}
    for name, send in (("ALERT_MAIL", send_mail), ("ALERT_URL", post)):
        if target := os.environ.get(name):
            found[name] = (send, target)
    return found


def reason_of(error: Exception) -> str:
    """Say why a message was not sent, without the URL, which is a secret. What sendmail says is in
    the journal already.
    """
    if isinstance(error, subprocess.CalledProcessError):
        return f"{SENDMAIL} ended with exit code {error.returncode}"
    if isinstance(error, FileNotFoundError):
        return f"there is no {SENDMAIL}"
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return type(error).__name__


def give_up(*_: object) -> None:
    """End an answer that never ends: each of its parts is in time. Raises TimeoutError."""
    raise TimeoutError


def tell(way: str, subject: str, text: str) -> bool:
    """Send a message by a way, and tell whether that worked."""
    send, target = ways()[way]
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE_SECONDS)
    try:
        send(target, subject, text)
    except FAILURES as error:
        print(f"<3>cannot send the message by {way}: {reason_of(error)}", flush=True)
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def begin(unit: str, sentence: str, text: str, now: float) -> int:
    """Send it by each way by which it was not sent within a day. Return 1 if one failed."""
    incident = Incident(unit)
    due = [way for way in ways() if not 0 <= now - incident.told.get(way, -1e9) < REPEAT_SECONDS]
    if not due:
        print("<5>not sent again: it was sent less than a day ago", flush=True)
        return 0
    for way in due:
        if tell(way, sentence, text):
            incident.told[way] = now
            incident.keep()  # at once: this may be ended while it tries the next way
    return int(any(incident.told.get(way) != now for way in due))


def over(units: list[str], sentence: str, text: str) -> int:
    """Send that a failure is over, by each way by which it was sent. Return 1 if one failed."""
    incidents = [incident for unit in units if (incident := Incident(unit)).told]
    due = [way for way in ways() if any(way in incident.told for incident in incidents)]
    told = [way for way in due if tell(way, sentence, text)]
    for incident in incidents:
        # A way that is no longer configured is forgotten. One that failed is tried next time.
        left = {way: when for way, when in incident.told.items() if way in due and way not in told}
        incident.told = left
        incident.keep()
    return int(told != due)


def after_check(unit: str, service: str, now: float) -> int:
    """Send what a check of a service found, if it is news."""
    run = Run.of(unit)
    lines = what_it_said(service, run.invocation)
    verdict = verdict_of(lines, run)
    here = f"{socket.gethostname()}: {service}"
    if run.failed:
        hints = [line for line in lines if line.startswith("hint: ")]
        text = "\n".join([*hints, WHAT_TO_DO, "", last_lines(f"{service}.service")])
        return begin(unit, f"{here}: {verdict}", text, now)
    if not verdict.startswith("BACKED UP") or show(f"{service}.service", "ActiveState") == "failed":
        return 0
    sentence = f"{here}: {verdict.replace('BACKED UP', AGAIN, 1)}"
    return over([unit, f"{service}.service"], sentence, "You need not do anything.")


def after_service(unit: str, now: float) -> int:
    """Send that a service failed."""
    service = unit.removesuffix(".service")
    sentence = (
        f"{socket.gethostname()}: {service} has stopped: {Run.of(unit).why}. "
        f"New versions of channel.backup are not stored"
    )
    return begin(unit, sentence, f"{WHAT_TO_DO}\n\n{last_lines(unit)}", now)


def test() -> int:
    """Send a test by each way that is configured. Return 1 if one failed, or if there is none."""
    asked = [way for way in ways() if way != "journal"]
    if not asked:
        print("\n".join(f"<3>{line}" for line in NO_WAY.splitlines()), flush=True)
        return 1
    subject = f"{socket.gethostname()}: a test of lnd-backup's alerts; nothing is wrong"
    text = "The first line of an alert says what is wrong."
    worked = [way for way in asked if tell(way, subject, text)]
    for way in worked:
        print(f"<5>sent: {way}", flush=True)
    return int(worked != asked)


def main(unit: str, clock: Callable[[], float] = time.time) -> int:
    """Send what there is to say about a unit. Return 1 if it could not be sent by some way."""
    if unit == "test-alert":
        return test()
    unit = unit.removeprefix("over-")
    if check := CHECK.fullmatch(unit):
        return after_check(unit, check["service"], clock())
    return after_service(unit, clock())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
