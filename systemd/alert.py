#!/usr/bin/env python3
"""Tell somebody that a service failed: by mail (ALERT_MAIL) and by POST (ALERT_URL), at most once
an hour.

An example to keep or to replace. Started by lnd-backup-alert@.service with the name of the service
that failed; systemd says in MONITOR_SERVICE_RESULT and MONITOR_EXIT_STATUS why. The message always
goes to the
journal as well.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from email.message import EmailMessage
from pathlib import Path

REPEAT_SECONDS = 3600.0
PATIENCE_SECONDS = 20.0
SENDMAIL = "/usr/sbin/sendmail"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is a failure: it could lead to a file, or the message to a stranger."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Follow nothing."""


def told_lately(unit: str) -> bool:
    """Tell whether there was an alert for this unit within the hour."""
    stamp = Path(os.environ["RUNTIME_DIRECTORY"], unit)
    return stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < REPEAT_SECONDS


def remember(unit: str) -> None:
    """Note that somebody was told."""
    Path(os.environ["RUNTIME_DIRECTORY"], unit).touch()


def why(unit: str) -> str:
    """Return what systemd knows of the failure; the variables are there only when it was the
    service's own end.
    """
    result, status = os.environ.get("MONITOR_SERVICE_RESULT"), os.environ.get("MONITOR_EXIT_STATUS")
    if not result:
        show = [
            "systemctl",
            "show",
            "--property=Result",
            "--property=ExecMainStatus",
            "--value",
            unit,
        ]
        answer = subprocess.run(
            show, check=False, capture_output=True, encoding="utf-8", timeout=PATIENCE_SECONDS
        )
        result, _, status = answer.stdout.strip().partition("\n")
    meaning = {
        "78": ": the configuration is wrong",
        "start-limit-hit": ": it failed again and again",
    }
    return f"{result}, status {status}{meaning.get(status or '', meaning.get(result, ''))}"


def last_lines(unit: str) -> str:
    """Return the end of the service's log."""
    show = ["journalctl", "--unit", unit, "--lines=15", "--no-pager", "--output=short-iso"]
    return subprocess.run(
        show,
        check=False,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE_SECONDS,
    ).stdout


def send_mail(address: str, subject: str, text: str) -> None:
    """Hand a mail to the system's sendmail; raises OSError or CalledProcessError."""
    mail = EmailMessage()
    mail["To"], mail["Subject"] = address, subject
    mail.set_content(text)
    subprocess.run(
        [SENDMAIL, "-t", "-i"], check=True, input=mail.as_bytes(), timeout=PATIENCE_SECONDS
    )


def post(url: str, subject: str, text: str) -> None:
    """Post the message; raises OSError or ValueError."""
    if urllib.parse.urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError("ALERT_URL is not http or https")
    headers = {"Content-Type": "text/plain; charset=utf-8", "User-Agent": "lnd-backup-alert"}
    request = urllib.request.Request(url, f"{subject}\n\n{text}".encode(), headers)  # noqa: S310 - checked above
    with urllib.request.build_opener(NoRedirect).open(request, timeout=PATIENCE_SECONDS):
        pass


def main(unit: str) -> int:
    """Send the alert by each way that is configured, and return 1 if one of them failed."""
    subject = (
        f"{socket.gethostname()}: {unit} failed ({why(unit)}): new versions of "
        f"channel.backup are not stored"
    )
    print(f"<2>{subject}", flush=True)
    if told_lately(unit):
        print("<6>not sent: there was an alert within the hour")
        return 0
    text = f"{last_lines(unit)}\nWhat to do: /opt/lnd-backup/current/docs/operations.md\n"
    failed = False
    for name, send in (("ALERT_MAIL", send_mail), ("ALERT_URL", post)):
        if target := os.environ.get(name):
            try:
                send(target, subject, text)
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                reason = (
                    error.reason
                    if isinstance(error, urllib.error.URLError)
                    else type(error).__name__
                )
                print(f"<3>the alert could not be sent: {name}: {reason}")
                failed = True
    if not failed:
        remember(unit)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
