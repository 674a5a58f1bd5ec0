"""The service on a real systemd, 252 and 257, from installation to removal: `make test-systemd`.

Each systemd is PID 1 of a container with the host's network; S3 is the strict server of the tests,
on loopback. The tests of one box run one after another, in this order; each starts from the
settings, an empty staging directory and a fresh bucket.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
from kit import CHECKOUT, SCRIPT, Answer, Credentials, FakeS3, S3Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUITES = {"bookworm": "252", "trixie": "257"}
BOXES = CHECKOUT / ".cache/systemd-box"
BOX = CHECKOUT / "tests/systemd/box.sh"
SCB = "/var/lib/lnd-scb"
STAGING = "/var/lib/lnd-backup"
SETTINGS = "/etc/default/lnd-backup-env"
DROP_IN = "/run/systemd/system/{}.d/test.conf"
PATIENCE_SECONDS = 30.0
PROGRAM = SCRIPT.read_text(encoding="utf-8")
LND = """[Unit]
Description=LND, as far as channel.backup goes
[Service]
Type=notify
User=bitcoin
ExecStart=/usr/bin/python3 -B /src/tests/kit/lnd.py {directory}
[Install]
WantedBy=multi-user.target
"""

# What an operator types without the installer, up to `systemctl start`: README.md, "Run it by
# hand", with a unit.
BY_HAND = """
useradd --system --shell /usr/sbin/nologin lnd-backup
mkdir -p /opt/lnd-backup
python3 -m venv /opt/lnd-backup/venv
/opt/lnd-backup/venv/bin/pip install -q --require-hashes -r /src/requirements.txt
cp /src/s3_backup_lnd_channels.py /opt/lnd-backup/venv/lib/python3*/site-packages/
install -d -m 2750 -o bitcoin -g lnd-backup /var/lib/lnd-scb
setfacl -d -m u::rwx,g::r-x,o::--- /var/lib/lnd-scb
install -m 0600 /src/lnd-backup-env.example /etc/default/lnd-backup-env
sed -i s,^MONITOR_FILE_PATH=.*,MONITOR_FILE_PATH=/var/lib/lnd-scb/channel.backup, \
    /etc/default/lnd-backup-env
sed -i s,^S3_BUCKET_NAME=.*,S3_BUCKET_NAME=my-bucket, /etc/default/lnd-backup-env
sed s,/opt/lnd-backup/current,/opt/lnd-backup, /src/lnd-backup.service \
    > /etc/systemd/system/lnd-backup.service
systemctl daemon-reload
systemctl -q enable lnd-backup
""".strip().splitlines()


def until(what: str, met: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until something is so."""
    give_up_at = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up_at, f"not so after {seconds:.0f} s: {what}"
        time.sleep(0.1)


class Box:
    """A Debian with its own systemd."""

    def __init__(self, suite: str, directory: Path) -> None:
        """Prepare it; it is off."""
        self.suite, self.directory = suite, directory
        self.env = os.environ | {"BOX": str(directory)}
        self.key: Credentials | None = None

    def control(self, *args: str | Path) -> None:
        """Boot it or shut it down; what runs in it does not hold our pipes open."""
        subprocess.run(
            [BOX, *args], env=self.env, check=True, timeout=100, stdin=subprocess.DEVNULL
        )

    def up(self) -> None:
        """Boot it: the checkout is in /src, read-only."""
        self.control("up", BOXES / self.suite, f"--bind-ro={CHECKOUT}:/src:norbind")

    def run(
        self, *command: str, check: bool = True, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside."""
        done = subprocess.run(
            [BOX, "run", *command],
            env=self.env,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            input=stdin,
            timeout=140,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def sh(self, script: str) -> str:
        """Run a shell script inside, and return what it printed."""
        return self.run("sh", "-euc", script).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        self.run("sh", "-euc", 'mkdir -p "$(dirname "$1")"; cat >"$1"', "sh", path, stdin=text)

    def name(self) -> str:
        """Return its name as a host."""
        return self.sh("uname -n").strip()

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).stdout.strip()

    def log(self, unit: str = "lnd-backup") -> str:
        """Return what a unit logged since the test began."""
        return self.run(
            "journalctl", "--no-pager", "--output=cat", f"--unit={unit}", "--cursor-file=/run/seen"
        ).stdout

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit until the end of the test."""
        self.write(DROP_IN.format(unit), text)
        self.run("systemctl", "daemon-reload")

    def make(
        self, verb: str, *given: str, check: bool = True, source: str = "/src"
    ) -> subprocess.CompletedProcess[str]:
        """Run the installer."""
        return self.run(
            "make", "--directory", source, "--no-print-directory", verb, *given, check=check
        )


class Node:
    """A box in which the service is installed and set up, with a bucket and an LND of its own."""

    def __init__(self, box: Box, s3: S3Server) -> None:
        """Put everything back to where it was after the installation, and make a bucket."""
        self.box, self.s3 = box, s3
        self.bucket = s3.create_bucket()
        self.key = s3.put_only_user(self.bucket, "box/")
        box.sh(
            "systemctl stop lnd lnd-backup 'lnd-backup@*' 'lnd-backup*.timer' 2>/dev/null || :; "
            "systemctl stop 'lnd-backup-check@*' 'lnd-backup-alert@*' 2>/dev/null || :; "
            "systemctl --quiet disable lnd-backup@alice lnd-backup@second; "
            "rm -rf /run/systemd/system/*.d /var/lib/lnd-backup-alert /run/lnd-backup-check "
            "/run/healed /etc/credstore/aws-credentials /etc/default/lnd-backup-alert "
            "/etc/default/lnd-backup@* /var/lib/lnd-backup@*; "
            f"rm -rf {STAGING} {SCB}/* {SCB}/.[!.]*; systemctl daemon-reload; systemctl "
            f"reset-failed"
        )
        self.set_up()
        self.lnd_in(SCB)

    def set_up(self, **settings: str) -> None:
        """Write the settings: those of a put-only key, and these."""
        values = {
            "MONITOR_FILE_PATH": f"{SCB}/channel.backup",
            "S3_BUCKET_NAME": self.bucket,
            "S3_BACKUP_PREFIX": "box/",
            "RESCAN_SECONDS": "1",
            "SHUTDOWN_GRACE_SECONDS": "2",
            "AWS_ACCESS_KEY_ID": self.key.access_key,
            "AWS_SECRET_ACCESS_KEY": self.key.secret_key,
            "AWS_ENDPOINT_URL_S3": self.s3.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        lines = (f"{name}={value}\n" for name, value in (values | settings).items())
        self.box.write(SETTINGS, "".join(lines))
        self.box.run("chmod", "0600", SETTINGS)

    def lnd_in(self, directory: str) -> None:
        """Let LND write to this directory."""
        self.box.write("/etc/systemd/system/lnd.service", LND.format(directory=directory))
        self.box.run("systemctl", "daemon-reload")

    def systemctl(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run systemctl."""
        return self.box.run("systemctl", *args, check=check)

    def lnd_writes(self) -> bytes:
        """Let the LND that runs write a version, and return it."""
        directory = self.box.sh("sed -n s/.*kit.lnd.py.//p /etc/systemd/system/lnd.service")
        path = f"{directory.strip()}/channel.backup"
        before = self.current(path)
        self.systemctl("kill", "--signal=USR1", "lnd")
        until("LND has written", lambda: self.current(path) not in {before, b""})
        return self.current(path)

    def current(self, path: str = f"{SCB}/channel.backup") -> bytes:
        """Return the version on disk."""
        return bytes.fromhex(
            self.box.sh(f"od -An -v -tx1 {path} 2>/dev/null || :").replace("\n", "")
        )

    def stored(self) -> list[bytes]:
        """Return the versions in the bucket."""
        return [each.data for each in self.s3.objects(self.bucket).values()]

    def staged(self) -> list[str]:
        """Return the names and owners of the staged versions."""
        return self.box.sh(
            f"cd {STAGING} && stat -c '%U %a %n' 2*Z-* 2>/dev/null || :"
        ).splitlines()

    def wait_for_stored(self, data: bytes | None = None) -> None:
        """Wait until the bucket holds this version, or that on disk."""
        until(
            "the bucket holds the version",
            lambda: (data or self.current() or None) in self.stored(),
        )

    def pid(self) -> str:
        """Return the process id of the service."""
        return self.box.show("lnd-backup", "MainPID")

    def is_active(self, unit: str = "lnd-backup") -> bool:
        """Tell whether a unit runs."""
        return self.box.show(unit, "ActiveState") == "active"

    def wait_for_tick(self, timer: str) -> None:
        """Wait until a timer has started its unit twice more, and the first of these has ended."""
        for _ in range(2):
            tick = self.box.show(timer, "LastTriggerUSecMonotonic")
            until("the timer ticked", partial(self.has_ticked, timer, tick))

    def has_ticked(self, timer: str, since: str) -> bool:
        """Tell whether a timer has started its unit since."""
        return self.box.show(timer, "LastTriggerUSecMonotonic") != since

    def fill_in(self, settings: str, key: Credentials) -> None:
        """Write a key into settings that the installer made."""
        edit = (
            f"s|^AWS_ACCESS_KEY_ID=.*|&{key.access_key}|; "
            f"s|^AWS_SECRET_ACCESS_KEY=.*|&{key.secret_key}|"
        )
        self.box.run("sed", "-i", edit, settings)

    def check_often(self, service: str = "lnd-backup", again_seconds: int = 1) -> None:
        """Let the check of a service run every second, and believe a failure sooner."""
        ticks = "[Timer]\nOnActiveSec=\nOnActiveSec=1\nOnUnitInactiveSec=1\n"
        ticks += "RandomizedDelaySec=0\nAccuracySec=100ms\n"
        check = f"lnd-backup-check@{service}"
        self.box.drop_in(f"{check}.timer", ticks)
        self.box.drop_in(
            f"{check}.service", f"[Service]\nEnvironment=AGAIN_SECONDS={again_seconds}\n"
        )

    def wait_for_checks(self, number: int, service: str = "lnd-backup") -> None:
        """Wait until the timer has begun and ended this many checks more, and each was told of."""
        check = f"lnd-backup-check@{service}.service"
        for _ in range(number + 1):  # the first may have begun before
            until("a check has ended", partial(self.has_ended, check, self.ended(check)), 90)
        for alert in (
            f"lnd-backup-alert@{check}.service",
            f"lnd-backup-alert@over-{check}.service",
        ):
            until("the alert has ended", partial(self.is_at_rest, alert))

    def status_of_the_last_check(self) -> str:
        """Return the exit code of a check that has ended. Of one that runs, systemd tells 0."""
        shown: dict[str, str] = {}

        def none_runs() -> bool:
            told = self.box.run(
                "systemctl",
                "show",
                "--property=ActiveState,ExecMainStatus",
                "lnd-backup-check@lnd-backup.service",
            ).stdout
            for line in told.splitlines():
                name, _, value = line.partition("=")
                shown[name] = value
            return shown["ActiveState"] in {"inactive", "failed"}

        until("no check runs", none_runs)
        return shown["ExecMainStatus"]

    def is_at_rest(self, unit: str) -> bool:
        """Tell whether a unit neither runs nor is about to."""
        return self.box.show(unit, "ActiveState") in {"inactive", "failed"}

    def ended(self, unit: str) -> str:
        """Return when a unit ended last."""
        return self.box.show(unit, "InactiveEnterTimestampMonotonic")

    def has_ended(self, unit: str, since: str) -> bool:
        """Tell whether a unit has ended since."""
        return self.ended(unit) not in {since, "0"}

    def revoke(self, status: str = "Inactive") -> None:
        """Let S3 refuse the node's key, or take it again (Active)."""
        iam = self.s3.client(service="iam")
        name = iam.get_access_key_last_used(AccessKeyId=self.key.access_key)["UserName"]
        iam.update_access_key(UserName=name, AccessKeyId=self.key.access_key, Status=status)


class Listener:
    """An HTTP server that keeps what is posted to it, and may answer with a redirect."""

    def __init__(self) -> None:
        """Listen on loopback."""
        self.bodies: list[str] = []
        self.redirect = ""
        listener = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                listener.bodies.append(
                    self.rfile.read(int(self.headers["Content-Length"])).decode()
                )
                self.send_response(302 if listener.redirect else 200)
                if listener.redirect:
                    self.send_header("Location", listener.redirect)
                self.end_headers()

            def do_GET(self) -> None:
                listener.bodies.append("a redirect was followed")
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/secret-topic"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        """End."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(suite, marks=pytest.mark.xdist_group(suite), id=suite) for suite in SUITES
    ],
)
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Return a fresh Debian that runs, with a user for LND, and packages at hand instead of a
    network.
    """
    box = Box(request.param, tmp_path_factory.mktemp(f"box-{request.param}"))
    box.up()
    try:
        version = box.run("systemctl", "--version").stdout.split()[1]
        assert version == SUITES[box.suite]
        box.run("useradd", "--system", "--create-home", "--shell=/usr/sbin/nologin", "bitcoin")
        packages = "[global]\nno-index = true\nfind-links = /src/.cache/systemd-box/wheels\n"
        box.write("/etc/pip.conf", packages)
        yield box
    finally:
        box.control("off")


@pytest.fixture(scope="session")
def installed(box: Box) -> Box:
    """Return the box with the service installed."""
    if box.run("test", "-e", "/opt/lnd-backup/current", check=False).returncode:
        box.make("install", "LND_USER=bitcoin")
    return box


@pytest.fixture
def node(installed: Box, s3_http: S3Server) -> Node:
    """Return the node of this test."""
    installed.sh(  # so that `log` does not tell what is left of the tests before
        "journalctl --rotate --quiet; journalctl --unit=lnd-backup --cursor-file=/run/seen "
        "--quiet >/dev/null || :"
    )
    return Node(installed, s3_http)


@pytest.fixture
def hanging_s3(s3_http: S3Server) -> Iterator[S3Server]:
    """Return an S3 that takes connections and answers none, until the end of the test or
    `resume`.
    """
    s3_http.suspend()
    yield s3_http
    s3_http.resume()


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Return where alerts are posted to."""
    listener = Listener()
    yield listener
    listener.close()


class Alerts:
    """What somebody was told, by mail and by POST."""

    def __init__(self, box: Box, listener: Listener) -> None:
        """Set up both ways; the mail goes to a stand-in for sendmail."""
        self.box, self.listener = box, listener
        box.write(
            "/etc/default/lnd-backup-alert",
            f"ALERT_URL={listener.url}\nALERT_MAIL=me@example.org\n",
        )
        box.write("/usr/sbin/sendmail", "#!/bin/sh\ncat >/srv/mail/$(date +%s%N)\n")
        box.sh(
            "chmod 0755 /usr/sbin/sendmail; rm -rf /srv/mail; "
            "install -d -o lnd-backup -m 0755 /srv/mail"
        )

    def mails(self) -> list[email.message.EmailMessage]:
        """Return the mails, oldest first."""
        names = self.box.sh("ls /srv/mail").split()
        texts = [self.box.sh(f"cat /srv/mail/{name}") for name in names]
        return [email.message_from_string(text, policy=email.policy.default) for text in texts]

    def subjects(self) -> list[str]:
        """Return the subjects of the mails, and hold them against what was posted."""
        subjects = [str(mail["Subject"]) for mail in self.mails()]
        assert all(mail["To"] == "me@example.org" for mail in self.mails())
        until(
            "what was mailed was posted as well",
            lambda: len(self.listener.bodies) >= len(subjects),
        )
        assert [body.splitlines()[0] for body in self.listener.bodies] == subjects
        return subjects

    def wait_for(self, number: int) -> list[str]:
        """Wait until this many messages came by each way, and return their subjects."""
        until(
            f"{number} messages came",
            lambda: len(self.mails()) >= number and len(self.listener.bodies) >= number,
            90,
        )
        subjects = self.subjects()
        assert len(subjects) == number
        return subjects


@pytest.fixture
def alerts(node: Node, listener: Listener) -> Alerts:
    """Return the alerts of a node that has both ways set up, and whose check runs often."""
    node.check_often()
    return Alerts(node.box, listener)


# --- before anything is installed ---


def test_nothing_is_installed_where_it_cannot_work(box: Box) -> None:
    """Without a systemd, or beside a user of that name whom somebody uses, nothing is changed."""
    hidden = box.run(
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs none /run; make -C /src install",
        check=False,
    )
    assert "cannot install: systemd is not running here" in hidden.stderr
    box.run("useradd", "--create-home", "--shell=/bin/bash", "lnd-backup")
    refused = box.make("install", check=False)
    assert refused.returncode != 0
    assert "a user lnd-backup (uid 1000, shell /bin/bash) exists" in refused.stderr
    box.run("userdel", "--remove", "lnd-backup")
    nobody = box.make("install", "LND_USER=nobody-of-that-name", check=False)
    assert "there is no user nobody-of-that-name" in nobody.stderr
    assert box.sh("ls /opt; find /etc /usr/local -name '*lnd-backup*'") == ""


def test_from_nothing_to_the_first_version(box: Box, s3_http: S3Server) -> None:
    """One command installs, one edit sets it up, and after `systemctl start` the first version is
    in the bucket.
    """
    bucket = s3_http.create_bucket()
    key = s3_http.put_only_user(bucket, "")
    box.write("/etc/systemd/system/lnd.service", LND.format(directory=SCB))
    # First by hand, for the figures, and then all of it away.
    began = time.monotonic()
    for line in BY_HAND:
        box.sh(line)
    by_hand = time.monotonic() - began
    box.sh(
        "systemctl -q disable lnd-backup; userdel lnd-backup; "
        f"rm -rf /opt/lnd-backup {SCB} {SETTINGS} /etc/systemd/system/lnd-backup.service; "
        f"systemctl daemon-reload"
    )
    began = time.monotonic()
    done = box.make(
        "install",
        "LND_USER=bitcoin",
        f"S3_BUCKET_NAME={bucket}",
        f"AWS_ENDPOINT_URL_S3={s3_http.endpoint}",
    )
    seconds = time.monotonic() - began
    assert "fill in the settings" not in done.stdout
    assert "sudo systemctl start lnd-backup" in done.stdout
    assert box.show("lnd-backup", "UnitFileState") == "enabled"
    edit = (
        f"s|^AWS_ACCESS_KEY_ID=.*|&{key.access_key}|; "
        f"s|^AWS_SECRET_ACCESS_KEY=.*|&{key.secret_key}|"
    )
    box.run("sed", "-i", edit, SETTINGS)
    began = time.monotonic()
    box.run("systemctl", "start", "lnd-backup", "lnd")
    until("the first version is stored", lambda: s3_http.objects(bucket))
    start = time.monotonic() - began
    (stored,) = s3_http.objects(bucket).values()
    assert stored.key.startswith(f"{box.sh('uname -n').strip()}/")
    assert box.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"
    (BOXES / f"figures-{box.suite}").write_text(
        f"systemd {SUITES[box.suite]}, packages at hand, no typing: make install: 1 "
        f"command, {seconds:.1f} s; "
        f"by hand: {len(BY_HAND)} commands, {by_hand:.1f} s; start to first version "
        f"stored: {start:.1f} s\n",
        encoding="utf-8",
    )


# --- the unit ---


def test_systemd_understands_what_was_installed(installed: Box) -> None:
    """Nothing is said of the units as they were installed, and the exposure is low."""
    units = ["lnd-backup.service", "lnd-backup@a.service", "lnd-backup.timer", "lnd-backup@a.timer"]
    units += [
        "lnd-backup-retry@a.service",
        "lnd-backup-alert@a.service",
        "lnd-backup-mounts@a.service",
        "lnd-backup-mounts@a.timer",
        "lnd-backup-check@a.service",
        "lnd-backup-check@a.timer",
    ]
    told = installed.run("systemd-analyze", "verify", "--man=no", *units)
    assert (told.stdout, told.stderr) == ("", "")
    for unit in ("lnd-backup.service", "lnd-backup@a.service", "lnd-backup-check@a.service"):
        installed.run("systemd-analyze", "security", "--offline=true", "--threshold=12", unit)
    steps = "/etc/systemd/system/lnd-backup.service.d/restart-steps.conf"
    missing = installed.run("test", "-e", steps, check=False).returncode
    assert bool(missing) == (SUITES[installed.suite] < "254")


def test_it_starts_before_the_directory_of_lnd_is_there(node: Node) -> None:
    """The start waits for nothing, and the first version in a directory made later is stored."""
    node.set_up(MONITOR_FILE_PATH="/srv/scb/channel.backup")
    node.box.sh("rm -rf /srv/scb")
    node.lnd_in("/srv/scb")
    node.systemctl("start", "lnd-backup")
    assert node.is_active()
    node.box.run("install", "-d", "-o", "bitcoin", "-g", "lnd-backup", "-m", "2750", "/srv/scb")
    node.systemctl("start", "lnd")
    until("LND has written", lambda: node.current("/srv/scb/channel.backup"))
    node.wait_for_stored(node.current("/srv/scb/channel.backup"))


@pytest.mark.skipif("STATUS=" not in PROGRAM, reason="the program does not send STATUS= yet")
def test_the_status_says_how_it_goes(node: Node) -> None:
    """`systemctl status` tells what was stored and when, how many are staged, and what is wrong."""
    status = partial(node.box.show, "lnd-backup", "StatusText")
    node.systemctl("start", "lnd-backup")
    until("nothing stored yet", lambda: re.match("nothing stored yet[,;] 0 staged", status()))
    node.systemctl("start", "lnd")
    node.wait_for_stored()
    pattern = r"stored 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC[,;] 0 staged"
    until("the version is in the status", lambda: re.fullmatch(pattern, status()))
    assert re.search(rf'Status: "{pattern}"', node.systemctl("status", "lnd-backup").stdout)
    node.set_up(AWS_SECRET_ACCESS_KEY="wrong")
    node.systemctl("restart", "lnd-backup")
    until("the trouble is in the status", lambda: "1 staged; cannot store: " in status())


@pytest.mark.skipif(
    '"METRICS_FILE"' not in PROGRAM, reason="the program does not write METRICS_FILE yet"
)
def test_metrics_are_readable_by_others_and_stay(node: Node) -> None:
    """METRICS_FILE in the service's runtime directory can be read by anybody, and is still there
    after a stop.
    """
    node.set_up(METRICS_FILE="/run/lnd-backup/metrics.prom")
    node.systemctl("start", "lnd-backup", "lnd")
    node.wait_for_stored()
    stored = (
        r"grep -Eq '^lnd_backup_last_stored_timestamp_seconds [1-9]' /run/lnd-backup/metrics.prom"
    )
    as_nobody = [
        "setpriv",
        "--reuid=nobody",
        "--regid=nogroup",
        "--clear-groups",
        "sh",
        "-c",
        stored,
    ]
    until("the metrics tell of it", lambda: node.box.run(*as_nobody, check=False).returncode == 0)
    node.systemctl("stop", "lnd-backup")
    node.box.run(*as_nobody)


def test_a_daemon_that_hangs_is_replaced(node: Node) -> None:
    """The watchdog ends a process that no longer looks at the file, without a core dump, and
    another one goes on.
    """
    node.box.drop_in("lnd-backup.service", "[Service]\nWatchdogSec=3\nRestartSec=100ms\n")
    node.systemctl("start", "lnd-backup", "lnd")
    node.wait_for_stored()
    frozen = node.pid()
    node.systemctl("kill", "--signal=STOP", "--kill-whom=main", "lnd-backup")
    until("it was replaced", lambda: node.is_active() and node.pid() not in {frozen, "0"})
    assert node.box.show("lnd-backup", "NRestarts") == "1"
    log = node.box.run("journalctl", "--no-pager", "--output=cat", "--unit=lnd-backup").stdout
    assert "Watchdog timeout" in log
    assert "core-dump" not in log.replace("code=dumped", "")
    node.wait_for_stored(node.lnd_writes())


def test_it_stops_in_time_while_s3_hangs(node: Node, hanging_s3: S3Server) -> None:
    """A stop during an upload that hangs is in order, and what is staged goes out after the next
    start.
    """
    node.systemctl("start", "lnd-backup", "lnd")
    until("a version is staged", node.staged)
    node.systemctl("stop", "lnd-backup")
    assert (
        node.box.show("lnd-backup", "Result"),
        node.box.show("lnd-backup", "ExecMainStatus"),
    ) == ("success", "0")
    assert node.staged()
    hanging_s3.resume()
    node.systemctl("start", "lnd-backup")
    node.wait_for_stored()
    until("nothing is staged", lambda: not node.staged())


@pytest.mark.skipif(
    "EXTEND_TIMEOUT_USEC" not in PROGRAM, reason="the program does not ask for time yet"
)
def test_a_grace_longer_than_the_unit_s_time_out_is_kept(node: Node, hanging_s3: S3Server) -> None:
    """With SHUTDOWN_GRACE_SECONDS above TimeoutStopSec the program asks systemd for more time, and
    is not killed.
    """
    assert hanging_s3.pid
    node.box.drop_in("lnd-backup.service", "[Service]\nTimeoutStopSec=2\n")
    node.set_up(SHUTDOWN_GRACE_SECONDS="5")
    node.systemctl("start", "lnd-backup", "lnd")
    until("a version is staged", node.staged)
    node.systemctl("stop", "lnd-backup")
    assert (
        node.box.show("lnd-backup", "Result"),
        node.box.show("lnd-backup", "ExecMainStatus"),
    ) == ("success", "0")


def test_a_wrong_configuration_does_not_loop(node: Node, listener: Listener) -> None:
    """Exit 78 is not tried again at once; somebody hears why, what it was, and what the log
    says.
    """
    node.box.write("/etc/default/lnd-backup-alert", f"ALERT_URL={listener.url}\n")
    node.set_up(S3_BUCKET_NAME="")
    failed = node.systemctl("start", "lnd-backup", check=False)
    assert failed.returncode != 0
    until("the alert came", lambda: listener.bodies)
    assert [
        node.box.show("lnd-backup", name) for name in ("ActiveState", "ExecMainStatus", "NRestarts")
    ] == [
        "failed",
        "78",
        "0",
    ]
    (body,) = listener.bodies
    sentence = "lnd-backup has stopped: its settings are wrong. New versions of channel.backup"
    assert body.startswith(f"{node.box.name()}: {sentence}")
    assert "S3_BUCKET_NAME=: is not set" in body
    assert node.box.show("lnd-backup.timer", "ActiveState") == "active"


def test_a_service_that_fails_is_told_once_a_day_by_each_way(alerts: Alerts, node: Node) -> None:
    """The next failure within the day is in the journal alone; a redirect is a failure, and only
    what failed is sent again.
    """
    listener = alerts.listener
    alert = "lnd-backup-alert@lnd-backup.service.service"
    listener.redirect = f"{listener.url}/elsewhere"
    assert node.systemctl("start", alert, check=False).returncode != 0
    assert (len(alerts.mails()), len(listener.bodies)) == (1, 1)
    listener.redirect = ""
    node.systemctl("start", alert)
    assert (len(alerts.mails()), len(listener.bodies)) == (1, 2)
    assert "a redirect was followed" not in listener.bodies
    node.systemctl("start", alert)
    assert (len(alerts.mails()), len(listener.bodies)) == (1, 2)
    log = node.box.run("journalctl", "--no-pager", "--output=cat", f"--unit={alert}").stdout
    assert "cannot send the message by ALERT_URL" in log
    assert "not sent again: it was sent less than a day ago" in log
    assert "secret-topic" not in log
    assert node.is_active(alert) is False


def test_a_refused_key_is_told_once_and_its_end_as_well(alerts: Alerts, node: Node) -> None:
    """The service stays up; the check makes one mail and one POST, however often it runs, and one
    of each when it is over.
    """
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    node.wait_for_checks(1)
    assert alerts.subjects() == []
    node.revoke()
    node.lnd_writes()
    (subject,) = alerts.wait_for(1)
    assert re.match(f"{node.box.name()}: lnd-backup: (NOT BACKED UP|UNKNOWN): .*s3://", subject)
    assert "status" not in subject
    body = alerts.mails()[0].get_content()
    assert body.startswith(subject)
    assert "\nhint: " in body
    assert "operations.md" in body
    assert node.is_active()
    node.wait_for_checks(2)
    assert len(alerts.subjects()) == 1
    node.revoke("Active")
    node.wait_for_stored()
    subjects = alerts.wait_for(2)
    assert subjects[1].startswith(f"{node.box.name()}: lnd-backup: BACKED UP again: ")
    node.wait_for_checks(2)
    assert len(alerts.subjects()) == 2
    assert node.box.sh("ls /var/lib/lnd-backup-alert") == ""


def test_many_checks_in_a_row_are_no_failure(alerts: Alerts, node: Node) -> None:
    """Ten checks within seconds start as often, each is told of, and the journal stays quiet."""
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    since = node.box.sh("date +%s.%N").strip()
    for _ in range(10):
        node.systemctl("start", "lnd-backup-check@lnd-backup")
    node.wait_for_checks(1)
    assert alerts.subjects() == []
    assert node.box.show("lnd-backup-check@lnd-backup.service", "Result") == "success"
    units = ["--unit=lnd-backup-check@*", "--unit=lnd-backup-alert@*"]
    told = ["--boot", "--priority=warning", "--output=cat", "--no-pager", "--quiet"]
    assert node.box.run("journalctl", *told, f"--since=@{since}", *units).stdout == ""


def test_a_deleted_bucket_is_told_and_an_outage_changes_nothing(alerts: Alerts, node: Node) -> None:
    """A bucket that is gone is told; that S3 is away then is neither an alert nor the end of one;
    a bucket that is back is. The key may list, so that S3 says it; else the receipt does, later.
    """
    node.key = node.s3.read_write_user(node.bucket)
    node.set_up()
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    for key in node.s3.objects(node.bucket):
        node.s3.admin.delete_object(Bucket=node.bucket, Key=key)
    node.s3.admin.delete_bucket(Bucket=node.bucket)
    node.lnd_writes()
    (subject,) = alerts.wait_for(1)
    assert re.match(f"{node.box.name()}: lnd-backup: (NOT BACKED UP|UNKNOWN): .*bucket", subject)
    node.s3.stop()
    try:
        node.wait_for_checks(1)
        status = node.status_of_the_last_check()
    finally:
        node.s3.start()  # which makes the bucket again
    assert status == "75"
    node.wait_for_stored()
    subjects = alerts.wait_for(2)
    assert subjects[1].startswith(f"{node.box.name()}: lnd-backup: BACKED UP again: ")


def test_s3_that_is_away_is_no_alert(alerts: Alerts, node: Node) -> None:
    """What `check` calls 75 is no failure of its unit, and nobody is woken for it."""
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    node.s3.stop()
    try:
        node.lnd_writes()
        node.wait_for_checks(2)
        assert node.status_of_the_last_check() == "75"
        assert node.box.show("lnd-backup-check@lnd-backup.service", "Result") == "success"
    finally:
        node.s3.start()
    node.wait_for_stored()
    node.wait_for_checks(1)
    assert alerts.subjects() == []


def test_s3_that_is_away_for_a_week_is_told_once_a_day(alerts: Alerts, node: Node) -> None:
    """What is in order for a night is not for a week: the last receipt tells, and S3 need not."""
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    node.s3.stop()
    try:
        at = (datetime.now(UTC) - timedelta(days=7)).isoformat()
        edit = f's/"stored_at": "[^"]*"/"stored_at": "{at}"/'
        node.box.run("sed", "-i", edit, f"{STAGING}/.receipt")
        (subject,) = alerts.wait_for(1)
        told = f"lnd-backup: NOT BACKED UP: nothing was stored since {at[:16]} UTC"
        assert told in subject
        node.wait_for_checks(2)
        assert len(alerts.subjects()) == 1
        node.box.sh("sed -i 's/: [0-9.]*/: 1.0/g' /var/lib/lnd-backup-alert/*.json")  # a day passes
        alerts.wait_for(2)
    finally:
        node.s3.start()
    node.lnd_writes()
    node.wait_for_stored()
    assert "BACKED UP again" in alerts.wait_for(3)[-1]


def test_a_full_quota_is_told(alerts: Alerts, node: Node) -> None:
    """S3 takes nothing for a while; the check tells it once LND's file waits for ten minutes."""
    full = [Answer(403, "QuotaExceeded")] * 5
    with FakeS3(Answer(), *full) as s3:
        node.set_up(AWS_ENDPOINT_URL_S3=s3.endpoint)
        node.systemctl("start", "lnd", "lnd-backup")
        until("the first version is stored", lambda: len(s3.objects(node.bucket)) == 1)
        node.lnd_writes()
        node.box.run("touch", "--date=11 minutes ago", f"{SCB}/channel.backup")
        (subject,) = alerts.wait_for(1)
        assert "lnd-backup: NOT BACKED UP: the version on disk has been waiting since" in subject
        assert "hint: the bucket is full" in alerts.mails()[0].get_content()
        until("S3 takes it again", lambda: len(s3.objects(node.bucket)) == 2, 90)
        assert "BACKED UP again" in alerts.wait_for(2)[-1]


def test_neither_a_start_nor_a_burst_nor_an_upgrade_is_an_alert(alerts: Alerts, node: Node) -> None:
    """While LND writes again and again, and a new version takes the place of the old one, no check
    fails twice in a row. Restarts by hand just before are no reason for the upgrade to fail.
    """
    node.check_often(again_seconds=8)
    node.box.drop_in("lnd-backup.service", "[Unit]\nStartLimitBurst=2\n")
    node.systemctl("start", "lnd", "lnd-backup")
    node.systemctl("restart", "lnd-backup")
    source = copy_of_the_checkout(node.box, "# newer still")
    for _ in range(20):
        node.lnd_writes()
    before = node.pid()
    node.box.make("install", source=source)
    assert node.pid() != before
    for _ in range(10):
        node.lnd_writes()
    node.wait_for_stored()
    node.wait_for_checks(2)
    assert alerts.subjects() == []
    assert node.box.show("lnd-backup-check@lnd-backup.service", "Result") == "success"
    node.box.make("install")


def test_the_check_sees_what_the_service_sees_and_writes_nothing(
    alerts: Alerts, node: Node
) -> None:
    """It runs as the service's user with its credentials; a check that cannot even start is told
    in words.
    """
    profile = (
        f"[default]\naws_access_key_id = "
        f"{node.key.access_key}\naws_secret_access_key = {node.key.secret_key}\n"
    )
    node.box.write("/etc/credstore/aws-credentials", profile)
    node.set_up(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    node.wait_for_checks(1)
    assert node.status_of_the_last_check() == "0"
    said = node.box.sh(
        "cat /run/lnd-backup-check/lnd-backup/said; stat -c %U:%a /run/lnd-backup-check/*"
    )
    assert "BACKED UP: " in said
    assert "lnd-backup:700" in said
    used = [
        int(node.box.show(f"lnd-backup-{unit}.service", "CPUUsageNSec")) / 1e9
        for unit in ("check@lnd-backup", "alert@lnd-backup-check@lnd-backup.service")
    ]
    with (BOXES / f"figures-{node.box.suite}").open("a", encoding="utf-8") as figures:
        figures.write(f"CPU: a check {used[0]:.2f} s, its alert {used[1]:.2f} s\n")
    node.box.run("mv", SETTINGS, f"{SETTINGS}.away")
    (subject,) = alerts.wait_for(1)
    node.box.run("mv", f"{SETTINGS}.away", SETTINGS)
    assert subject == (
        f"{node.box.name()}: lnd-backup: UNKNOWN: the check did not run: "
        "systemd could not start it, perhaps because the settings file is missing"
    )
    assert alerts.wait_for(2)[1].startswith(f"{node.box.name()}: lnd-backup: BACKED UP again: ")


def test_a_test_alert_goes_out_by_every_way(alerts: Alerts, node: Node) -> None:
    """`lnd-backup test-alert` sends a message by mail and by POST, and says so; one that cannot be
    sent, and no way at all, is a failure with a hint.
    """
    done = node.box.run("lnd-backup", "test-alert")
    assert "sent: ALERT_MAIL" in done.stderr
    assert "sent: ALERT_URL" in done.stderr
    (subject,) = alerts.wait_for(1)
    assert "a test of lnd-backup's alerts" in subject
    node.box.write("/usr/sbin/sendmail", "#!/bin/sh\necho sendmail: wrong password >&2; exit 77\n")
    failed = node.box.run("lnd-backup", "test-alert", check=False)
    assert failed.returncode == 1
    assert "sendmail: wrong password" in failed.stderr
    assert "cannot send the message by ALERT_MAIL" in failed.stderr
    assert "secret-topic" not in failed.stderr
    node.box.write("/etc/default/lnd-backup-alert", "")
    nobody = node.box.run("lnd-backup", "test-alert", check=False)
    assert nobody.returncode == 1
    assert "neither ALERT_MAIL nor ALERT_URL is set" in nobody.stderr
    assert "hint: sudoedit /etc/default/lnd-backup-alert" in nobody.stderr


def test_after_the_start_limit_the_timer_tries_again(node: Node, listener: Listener) -> None:
    """A service that fails again and again is one alert; the timer starts it when it can, and never
    beside a stop.
    """
    node.box.write("/etc/default/lnd-backup-alert", f"ALERT_URL={listener.url}\n")
    fails = "[Unit]\nStartLimitIntervalSec=10s\n[Service]\nRestartSec=50ms\n"
    fails += "ExecStartPre=/usr/bin/test -e /run/healed\n"
    if SUITES[node.box.suite] >= "254":
        fails += "RestartMaxDelaySec=100ms\n"
    node.box.drop_in("lnd-backup.service", fails)
    ticks = "[Timer]\nOnCalendar=\nOnCalendar=*:*:0/3\nRandomizedDelaySec=0\nAccuracySec=100ms\n"
    node.box.drop_in("lnd-backup.timer", ticks)
    node.systemctl("start", "--no-block", "lnd-backup")
    until("the alert came", lambda: listener.bodies)
    assert listener.bodies[0].startswith(f"{node.box.name()}: lnd-backup has stopped: ")
    assert node.box.show("lnd-backup", "NRestarts") in {"7", "8"}
    until("a tick came too early", lambda: "repeated too quickly" in node.box.log())
    node.box.run("touch", "/run/healed")
    until("the timer has started it", node.is_active)
    assert len(listener.bodies) == 1
    running = node.pid()
    node.wait_for_tick("lnd-backup.timer")
    assert node.pid() == running
    node.systemctl("stop", "lnd-backup")
    node.wait_for_tick("lnd-backup.timer")
    assert node.box.show("lnd-backup", "ActiveState") == "inactive"


def test_the_lines_of_the_page_start_what_failed_too_often(node: Node) -> None:
    """After the start limit systemd refuses a mere start, although the cause is gone."""
    fails = "[Service]\nRestartSec=50ms\nExecStartPre=/usr/bin/test -e /run/healed\n"
    if SUITES[node.box.suite] >= "254":
        fails += "RestartMaxDelaySec=100ms\n"
    node.box.drop_in("lnd-backup.service", fails)
    node.systemctl("start", "--no-block", "lnd-backup")
    until("systemd gave up", lambda: "repeated too quickly" in node.box.log())
    node.box.run("touch", "/run/healed")
    assert node.systemctl("start", "lnd-backup", check=False).returncode != 0
    page = (CHECKOUT / "docs/operations.md").read_text(encoding="utf-8")
    block = page.partition("If the service has stopped")[2].split("\n\n")[1]
    node.box.sh(block.replace("sudo ", ""))
    assert node.is_active()


def test_credentials_come_from_the_store_unless_the_environment_has_some(node: Node) -> None:
    """The key in /etc/credstore reaches the service alone; a stale one in the settings wins, and
    the log says so.
    """
    profile = (
        f"[default]\naws_access_key_id = "
        f"{node.key.access_key}\naws_secret_access_key = {node.key.secret_key}\n"
    )
    node.box.write("/etc/credstore/aws-credentials", profile)
    node.box.run("chmod", "0600", "/etc/credstore/aws-credentials")
    node.set_up(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
    node.systemctl("start", "lnd-backup", "lnd")
    node.wait_for_stored()
    assert "credentials: shared-credentials-file" in node.box.log()
    check = node.box.run("lnd-backup", "check", check=False)
    assert (check.returncode, "S3 confirmed it" in check.stdout) == (0, True), check.stderr
    node.set_up(AWS_SECRET_ACCESS_KEY="stale")
    node.systemctl("restart", "lnd-backup")
    until("the log says which are used", lambda: "credentials: env" in node.box.log())


def test_the_service_sees_what_it_needs(node: Node) -> None:
    """In its mounts it can write its own directory alone, and execute nothing there."""
    node.systemctl("start", "lnd-backup")
    inside = [
        "nsenter",
        f"--mount=/proc/{node.pid()}/ns/mnt",
        "setpriv",
        "--reuid=lnd-backup",
        "--regid=lnd-backup",
    ]
    inside += ["--clear-groups", "sh", "-c"]
    node.box.run(*inside, f"touch {STAGING}/.probe && rm {STAGING}/.probe")
    for forbidden in (
        f"touch {SCB}/channel.backup",
        "touch /opt/lnd-backup/probe",
        f"cp /usr/bin/true {STAGING}/.probe && {STAGING}/.probe",
        "ls /home/bitcoin",
        f"cat {SETTINGS}",
    ):
        assert node.box.run(*inside, forbidden, check=False).returncode != 0, forbidden


# --- the command ---


def test_the_command_runs_as_the_service_and_as_the_caller(node: Node) -> None:
    """`once` and `check` act as the service's user; `list` and `restore` as root, with another
    key.
    """
    node.systemctl("start", "lnd")
    until("LND has written", node.current)
    once = node.box.run("lnd-backup", "once")
    assert f"stored s3://{node.bucket}/box/" in once.stderr
    node.wait_for_stored()
    assert set(node.box.sh(f"stat -c '%U %a' {STAGING} {STAGING}/.??*").split()) <= {
        "lnd-backup",
        "700",
        "600",
    }
    node.systemctl("start", "lnd-backup")
    assert node.box.run("lnd-backup", "once", check=False).returncode == 75
    answer = node.box.run("lnd-backup", "check", "--json")
    assert json.loads(answer.stdout)["current"] is True
    denied = node.box.run("lnd-backup", "list", check=False)
    assert (denied.returncode, "s3:ListBucket" in denied.stderr) == (1, True)
    reader = node.s3.reader_user(node.bucket)
    key = [f"AWS_ACCESS_KEY_ID={reader.access_key}", f"AWS_SECRET_ACCESS_KEY={reader.secret_key}"]
    listed = node.box.run("env", *key, "lnd-backup", "list", "--json")
    assert len(json.loads(listed.stdout)) == len(node.stored())
    node.box.sh("rm -rf /root/out && mkdir /root/out")
    node.box.run("env", *key, "lnd-backup", "restore", "--output", "/root/out/scb")
    assert node.current("/root/out/scb") in node.stored()
    assert node.box.sh("stat -c '%U %a' /root/out/scb") == "root 600\n"
    card = node.box.run("lnd-backup", "card").stdout
    assert f"bucket   {node.bucket}\nprefix   box/\nendpoint {node.s3.endpoint}\n" in card
    assert hashlib.sha256(SCRIPT.read_bytes()).hexdigest() in card
    assert node.key.secret_key not in card


def test_another_node_on_the_same_host(alerts: Alerts, node: Node) -> None:
    """NODE= makes an instance with settings, a staging directory, a prefix and a check of its own,
    beside the first one; the same command and the same alerts serve it.
    """
    node.systemctl("start", "lnd", "lnd-backup")
    key = node.s3.put_only_user(node.bucket, "alice/")
    told = node.box.make(
        "install",
        "NODE=alice",
        "LND_USER=bitcoin",
        f"S3_BUCKET_NAME={node.bucket}",
        "S3_BACKUP_PREFIX=alice/",
        f"AWS_ENDPOINT_URL_S3={node.s3.endpoint}",
        "AWS_REGION=us-east-1",
    ).stdout
    assert "fill in the settings" not in told
    assert "sudo lnd-backup @alice check" in told
    settings = "/etc/default/lnd-backup@alice-env"
    node.fill_in(settings, key)
    assert node.box.sh(f"stat -c '%U %a' {settings} {SCB}@alice") == "root 600\nbitcoin 2750\n"
    assert node.box.show("lnd-backup@alice", "UnitFileState") == "enabled"
    node.check_often("lnd-backup@alice")
    node.box.sh(f"cp {SCB}/channel.backup {SCB}@alice/; chmod 0640 {SCB}@alice/channel.backup")
    node.systemctl("start", "lnd-backup@alice")
    until(
        "it is stored",
        lambda: any(key.startswith("alice/") for key in node.s3.objects(node.bucket)),
    )
    for timer in ("lnd-backup@alice.timer", "lnd-backup-check@lnd-backup@alice.timer"):
        assert node.is_active(timer)
    assert node.box.run("lnd-backup", "@alice", "check").returncode == 0
    assert "lnd-backup" in node.box.sh("stat -c %U /var/lib/lnd-backup@alice")
    card = node.box.run("lnd-backup", "@alice", "card").stdout
    assert f"node (name, public key)  {node.box.name()}, alice, __" in card
    node.systemctl("stop", "lnd-backup@alice")
    node.box.run("rm", f"{SCB}@alice/channel.backup")
    (subject,) = alerts.wait_for(1)
    assert subject.startswith(f"{node.box.name()}: lnd-backup@alice: ")
    node.systemctl("--quiet", "disable", "lnd-backup@alice")


def test_a_second_bucket_is_a_second_instance_on_the_same_file(node: Node) -> None:
    """Each version reaches both buckets, and one bucket that is gone does not hold up the other."""
    second = node.s3.create_bucket()
    key = node.s3.put_only_user(second, "box/")
    told = node.box.make(
        "install",
        "NODE=second",
        f"MONITOR_FILE_PATH={SCB}/channel.backup",
        f"S3_BUCKET_NAME={second}",
        "S3_BACKUP_PREFIX=box/",
        f"AWS_ENDPOINT_URL_S3={node.s3.endpoint}",
    ).stdout
    assert "fill in the settings" not in told
    node.fill_in("/etc/default/lnd-backup@second-env", key)
    node.systemctl("start", "lnd", "lnd-backup", "lnd-backup@second")
    for _ in range(2):
        data = node.lnd_writes()
        node.wait_for_stored(data)
        until("the second bucket holds it", partial(is_in, node.s3, second, data))
    node.revoke()
    data = node.lnd_writes()
    until("the second bucket holds it", partial(is_in, node.s3, second, data))
    node.systemctl("stop", "lnd-backup@second")
    node.systemctl("--quiet", "disable", "lnd-backup@second")


def is_in(s3: S3Server, bucket: str, data: bytes) -> bool:
    """Tell whether a bucket holds a version."""
    return data in [each.data for each in s3.objects(bucket).values()]


# --- a second place ---


class Stick:
    """A file system on a loop device, which the box mounts and unmounts as one does a stick."""

    mount_point = "/mnt/stick"
    directory = "/mnt/stick/lnd-backup"

    def __init__(self, box: Box, directory: Path) -> None:
        """Make the file system and the device, in the box too."""
        self.box = box
        image = directory / "stick.img"
        with image.open("wb") as file:
            file.truncate(8 << 20)
        host_run("mkfs.ext4", "-q", "-F", str(image))
        self.device = host_run("losetup", "--find", "--show", str(image)).strip()
        number = os.stat(self.device).st_rdev
        box.sh(
            f"rm -f /root/stick; mknod /root/stick b {os.major(number)} {os.minor(number)}; "
            f"mkdir -p {self.mount_point}"
        )

    def put_in(self) -> None:
        """Mount it."""
        self.box.run("mount", "/root/stick", self.mount_point)

    def pull_out(self) -> None:
        """Unmount it; fails if somebody still has it open."""
        self.box.run("umount", self.mount_point)

    def content(self) -> list[bytes]:
        """Return the files of the second place."""
        names = self.box.sh(f"ls {self.directory}").split()
        return [
            bytes.fromhex(self.box.sh(f"od -An -v -tx1 {self.directory}/{name}").replace("\n", ""))
            for name in names
        ]

    def in_use(self) -> bool:
        """Tell whether any process of the box still sees it mounted."""
        return "/root/stick" in self.box.sh("cat /proc/[0-9]*/mountinfo 2>/dev/null || :")

    def throw_away(self) -> None:
        """Let go of the device."""
        self.box.sh(f"umount -l {self.mount_point} 2>/dev/null || :; rm -f /root/stick")
        host_run("losetup", "--detach", self.device)


def host_run(*command: str) -> str:
    """Run a command on the machine that the boxes run on."""
    return subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", timeout=60
    ).stdout


@pytest.fixture
def stick(node: Node, tmp_path: Path) -> Iterator[Stick]:
    """Return a stick that is not put in."""
    stick = Stick(node.box, tmp_path)
    yield stick
    node.systemctl("stop", "lnd-backup")
    node.box.sh("rm -rf /etc/systemd/system/lnd-backup.service.d/copy-directory.conf")
    stick.throw_away()


def test_a_stick_may_be_written_to_pulled_out_and_put_back(node: Node, stick: Stick) -> None:
    """COPY_DIRECTORY= opens the stick for the service: also if it is put in after the start, and
    again after it was pulled out; nothing of the service's keeps it busy, and nothing else is open.
    """
    stick.put_in()
    node.box.run("mkdir", stick.directory)
    told = node.box.make("install", f"COPY_DIRECTORY={stick.directory}").stdout
    assert f"chown lnd-backup:lnd-backup {stick.directory}" in told
    assert "left to do: let the user lnd-backup write" not in told
    assert f"COPY_DIRECTORY={stick.directory}\n" in node.box.sh(f"cat {SETTINGS}")
    for started_with_it in (True, False):
        if not started_with_it:
            stick.pull_out()
        node.systemctl("restart", "lnd-backup")
        inside = as_the_service_in(node)
        write = f"echo x >{stick.directory}/.probe && rm {stick.directory}/.probe"
        if not started_with_it:
            stick.put_in()
        for _ in range(2):
            node.box.run(*inside, write)
            stick.pull_out()
            assert node.box.run(*inside, write, check=False).returncode != 0
            assert not stick.in_use()
            stick.put_in()
        node.box.run(*inside, write)
        assert node.box.run(*inside, "touch /mnt/probe", check=False).returncode != 0


def test_every_version_is_on_the_stick_as_well(node: Node, stick: Stick) -> None:
    """What LND writes is in the bucket and on the stick; without the stick it is in the bucket, and
    when the stick is back, the version on disk is on it.
    """
    stick.put_in()
    node.box.run("mkdir", stick.directory)
    node.box.make("install", f"COPY_DIRECTORY={stick.directory}")
    node.systemctl("start", "lnd", "lnd-backup")
    data = node.lnd_writes()
    node.wait_for_stored(data)
    until("the stick holds it", lambda: data in stick.content())
    stick.pull_out()
    assert not stick.in_use()
    data = node.lnd_writes()
    node.wait_for_stored(data)
    until("the status says so", lambda: "copy" in node.box.show("lnd-backup", "StatusText"))
    stick.put_in()
    until("the stick holds it", lambda: data in stick.content(), 90)
    name = node.box.sh(f"ls {stick.directory} | tail -n 1").strip()
    assert re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{6}", name)
    node.systemctl("stop", "lnd-backup")
    data = node.lnd_writes()
    node.box.run("lnd-backup", "once")
    assert data in stick.content()


def test_a_folder_that_another_user_carries_away(node: Node) -> None:
    """Of a directory made as docs/second-copy.md says, the other user's program can read each copy,
    and nobody else can.
    """
    folder = "/srv/lnd-copies"
    page = (CHECKOUT / "docs/second-copy.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^    sudo (install -d .*{folder})", page, re.MULTILINE)
    assert len(lines) == 1
    node.box.sh(lines[0].replace("-g me", "-g bitcoin"))
    node.box.make("install", f"COPY_DIRECTORY={folder}")
    node.systemctl("start", "lnd", "lnd-backup")
    data = node.lnd_writes()
    node.wait_for_stored(data)
    until("the copy is there", lambda: node.box.sh(f"ls {folder}"))
    drop_in = "/etc/systemd/system/lnd-backup.service.d/copy-directory.conf"
    assert f"ReadWritePaths=-{folder}\n" in node.box.sh(f"cat {drop_in}; rm {drop_in}")
    read = f"cat {folder}/2* >/dev/null"
    node.box.run(
        "setpriv", "--reuid=bitcoin", "--regid=bitcoin", "--clear-groups", "sh", "-c", read
    )
    other = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "sh", "-c", read]
    assert node.box.run(*other, check=False).returncode != 0


def as_the_service_in(node: Node) -> list[str]:
    """Return what runs a shell's line as the service's user in its mounts."""
    return [
        "nsenter",
        f"--mount=/proc/{node.pid()}/ns/mnt",
        "setpriv",
        "--reuid=lnd-backup",
        "--regid=lnd-backup",
        "--clear-groups",
        "sh",
        "-c",
    ]


# --- a file left in LND's directory ---


def test_a_file_left_in_lnd_s_directory(node: Node) -> None:
    """With LND_DIRECTORY= only that directory is seen, a macaroon in it is not readable, a new one
    is noticed.
    """
    directory = "/home/bitcoin/.lnd/data/chain/bitcoin/mainnet"
    node.box.sh(
        f"rm -rf /home/bitcoin/.lnd; su -s /bin/sh bitcoin -c 'umask 077; mkdir -p "
        f"{directory}; umask 022; "
        f"cd {directory}; echo m >admin.macaroon; chmod 0640 admin.macaroon; echo k "
        f">~/.lnd/tls.key'"
    )
    node.set_up(MONITOR_FILE_PATH=f"{directory}/channel.backup")
    node.box.make("install", f"LND_DIRECTORY={directory}")
    node.lnd_in(directory)
    node.box.drop_in(
        "lnd-backup-mounts@lnd-backup.timer",
        "[Timer]\nOnActiveSec=3\nOnUnitInactiveSec=3\nAccuracySec=100ms\n",
    )
    node.systemctl("start", "lnd-backup", "lnd")
    until("LND has written", lambda: node.current(f"{directory}/channel.backup"))
    node.wait_for_stored(node.current(f"{directory}/channel.backup"))
    page = (CHECKOUT / "docs/access.md").read_text(encoding="utf-8")
    block = page.partition("**Can the service read")[2].split("\n\n")[1]
    command = block.replace("sudo ", "")
    assert node.box.sh(command.replace("admin.macaroon", "channel.backup"))
    refused = node.box.run("sh", "-euc", command, check=False)
    assert "admin.macaroon: Permission denied" in refused.stderr
    inside = as_the_service_in(node)
    assert node.box.run(*inside, "ls /home/bitcoin/.lnd/tls.key", check=False).returncode != 0
    answer = node.box.run("lnd-backup", "check", check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    node.systemctl("stop", "lnd")
    before = node.pid()
    node.box.sh(
        f"mv {directory} {directory}.old; cp -a {directory}.old {directory}; setfacl -m "
        f"u:lnd-backup:rx {directory}"
    )
    until("it was restarted", lambda: node.is_active() and node.pid() not in {before, "0"})
    node.systemctl("start", "lnd")
    node.wait_for_stored(node.lnd_writes())
    node.systemctl("start", "lnd-backup-check@lnd-backup.service")
    assert node.box.show("lnd-backup-check@lnd-backup.service", "ExecMainStatus") == "0"
    settled = node.pid()
    node.wait_for_tick("lnd-backup-mounts@lnd-backup.timer")
    assert node.pid() == settled
    node.systemctl("stop", "lnd", "lnd-backup")
    node.box.sh("rm /etc/systemd/system/lnd-backup*.service.d/lnd-directory.conf")
    node.systemctl("stop", "lnd-backup-mounts@lnd-backup.timer")


# --- upgrade, reboot, removal ---


def copy_of_the_checkout(box: Box, line: str) -> str:
    """Return a checkout in the box whose program has this line more."""
    source = "/root/newer"
    box.sh(
        f"rm -rf {source}; mkdir {source}; cd /src; cp -a Makefile docs systemd "
        f"requirements.txt lnd-backup.service "
        f"lnd-backup-env.example {SCRIPT.name} {source}/"
    )
    text = PROGRAM.replace("\nif __name__ ==", f"\n{line}\nif __name__ ==")
    assert text != PROGRAM
    box.write(f"{source}/{SCRIPT.name}", text)
    return source


def test_an_upgrade_keeps_what_is_staged(node: Node, hanging_s3: S3Server) -> None:
    """Without packages the running version goes on undisturbed; with them the new one sends what
    the old one staged.
    """
    node.systemctl("start", "lnd-backup", "lnd")
    until("a version is staged", node.staged)
    staged, old = node.staged(), node.pid()
    source = copy_of_the_checkout(node.box, "# newer")
    node.box.sh(
        "mv /etc/pip.conf /etc/pip.conf.away; printf '[global]\\nno-index = true\\n' >/etc/pip.conf"
    )
    failed = node.box.make("install", check=False, source=source)
    node.box.sh("mv /etc/pip.conf.away /etc/pip.conf")
    assert failed.returncode != 0
    assert "what was running still runs" in failed.stderr
    assert (node.pid(), node.staged()) == (old, staged)
    node.box.make("install", source=source)
    assert node.is_active()
    assert node.pid() != old
    assert set(staged) <= set(node.staged())
    assert all(line.startswith("lnd-backup 600 ") for line in node.staged())
    hanging_s3.resume()
    node.wait_for_stored()
    until("nothing is staged", lambda: not node.staged())


def test_an_upgrade_that_does_not_start_is_taken_back(node: Node) -> None:
    """A new version that is installed and then fails makes way for the one before."""
    node.systemctl("start", "lnd-backup", "lnd")
    node.wait_for_stored()
    version = node.box.sh("readlink /opt/lnd-backup/current")
    faster = "[Unit]\nStartLimitBurst=3\n[Service]\nRestartSec=50ms\n"
    faster += "RestartMaxDelaySec=100ms\n" if SUITES[node.box.suite] >= "254" else ""
    node.box.drop_in("lnd-backup.service", faster)
    source = copy_of_the_checkout(node.box, "if os.environ.get('NOTIFY_SOCKET'):\n    sys.exit(1)")
    failed = node.box.make("install", check=False, source=source)
    assert failed.returncode != 0
    assert "the new version did not start" in failed.stderr
    assert node.box.sh("readlink /opt/lnd-backup/current") == version
    assert node.is_active()
    node.wait_for_stored(node.lnd_writes())


def test_lnd_s_last_write_before_a_reboot_is_stored(node: Node) -> None:
    """At a shutdown LND stops first; what it writes then is stored, and after the boot everything
    runs again.
    """
    node.systemctl("--quiet", "enable", "lnd", "lnd-backup")
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored()
    before = node.current()
    node.box.control("down")
    last = (node.box.directory / f"changes{SCB}/channel.backup").read_bytes()
    stored = node.stored()
    node.box.up()
    assert last != before
    assert last in stored
    until(
        "it runs again",
        lambda: node.is_active() and node.is_active("lnd") and node.is_active("lnd-backup.timer"),
    )
    assert node.is_active("lnd-backup-check@lnd-backup.timer")
    until("LND has written", lambda: node.current() not in {last, b""})
    node.wait_for_stored()
    node.systemctl("--quiet", "disable", "lnd")


def test_removal_keeps_settings_and_staged_versions(node: Node, hanging_s3: S3Server) -> None:
    """`make uninstall` leaves what cannot be had again; another installation sends it; `make purge`
    refuses while something waits, and then leaves nothing.
    """
    node.systemctl("start", "lnd-backup", "lnd")
    until("a version is staged", node.staged)
    data = node.current()
    told = node.box.make("uninstall").stdout
    assert f"kept: settings and staged versions: {SETTINGS}" in told
    assert (
        node.box.sh("find /etc/systemd /run/systemd/system /usr/local /opt -name '*lnd-backup*'")
        == ""
    )
    assert node.box.show("lnd-backup", "LoadState") == "not-found"
    assert node.staged()
    refused = node.box.make("purge", check=False)
    assert refused.returncode != 0
    assert "never reached the bucket; nothing has changed" in refused.stderr
    assert "make purge FORCE=1" in refused.stderr
    assert node.staged()
    hanging_s3.resume()
    node.box.make("install")
    node.systemctl("start", "lnd-backup")
    node.wait_for_stored(data)
    until("nothing is staged", lambda: not node.staged())
    node.s3.suspend()
    node.lnd_writes()
    until("a version is staged", node.staged)
    node.box.run("sh", "-c", "make -C /src purge && exit 1 || exit 0")
    assert node.is_active(), "nothing was stopped"
    told = node.box.make("purge", "FORCE=1").stdout
    assert "deleting what never reached the bucket:" in told
    left = node.box.sh(
        "find / -xdev -name '*lnd-backup*' ! -path '/src/*' ! -path '/proc/*' ! -path "
        "'/root/newer/*'"
    ).split()
    assert left == []
    assert node.box.run("getent", "passwd", "lnd-backup", check=False).returncode != 0
    assert node.current()


# --- the alert rules ---


@pytest.mark.xdist_group("bookworm")
def test_the_alert_rules_are_right(tmp_path: Path) -> None:
    """The tool of Prometheus accepts the rules, and they fire in the cases that are written down
    beside this file.
    """
    for name in (CHECKOUT / "docs/alerts.yml", CHECKOUT / "tests/systemd/alerts_test.yml"):
        shutil.copy(name, tmp_path)
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command],  # noqa: S607 - of Debian's prometheus, asked for before
            cwd=tmp_path,
            check=False,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
