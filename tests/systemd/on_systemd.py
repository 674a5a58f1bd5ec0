"""The service on a real systemd, 252 and 257, from installation to removal: `make test-systemd`.

Each systemd is PID 1 of a container with the host's network; S3 is the strict server of the tests,
on loopback. The tests of one box run one after another, in this order; each starts from the
settings, an empty staging directory and a fresh bucket.
"""

from __future__ import annotations

import email
import email.policy
import json
import os
import re
import shutil
import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest
from kit import CHECKOUT, SCRIPT, Answer, Credentials, FakeS3, S3Server, reader_settings
from shared import Done, run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SUITES = {"bookworm": "252", "trixie": "257"}
BOXES = CHECKOUT / ".cache/systemd-box"
BOX = CHECKOUT / "tests/systemd/box.sh"
SCB = "/var/lib/lnd-scb"
STAGING = "/var/lib/lnd-backup"
PREFIX = "box/"
SETTINGS = "/etc/default/lnd-backup-env"
STORED_KEY = "/etc/credstore/aws-credentials"
ALERT_SETTINGS = "/etc/default/lnd-backup-alert"
CHECK = "lnd-backup-check@lnd-backup.service"
DROP_INS = "/etc/systemd/system/lnd-backup*.service.d"
FAILS_UNTIL_HEALED = "ExecStartPre=/usr/bin/test -e /run/healed\n"
FAST = "[Service]\nRestartSec=50ms\nRestartMaxDelaySec=100ms\n"  # systemd 252 ignores the last one
PATIENCE_SECONDS = 30.0
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
        """Prepare it, as a host of the name "box"; it is off."""
        self.suite, self.directory = suite, directory
        (directory / "changes/etc").mkdir(parents=True)
        (directory / "changes/etc/hostname").write_text("box\n")
        self.env = os.environ | {"BOX": str(directory)}

    def control(self, *args: str | Path) -> None:
        """Boot it or shut it down; what runs in it does not hold our pipes open."""
        nothing = subprocess.DEVNULL
        subprocess.run([BOX, *args], env=self.env, check=True, timeout=100, stdin=nothing)

    def up(self) -> None:
        """Boot it: the checkout is in /src, read-only."""
        self.control("up", BOXES / self.suite, f"--bind-ro={CHECKOUT}:/src:norbind")

    def run(self, *command: str, check: bool = True, stdin: str = "") -> Done:
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

    def run_as(self, user: str, line: str, *before: str, check: bool = True) -> Done:
        """Run a shell's line as a user who has the group of that name alone."""
        group = "nogroup" if user == "nobody" else user
        ids = (f"--reuid={user}", f"--regid={group}", "--clear-groups")
        return self.run(*before, "setpriv", *ids, "sh", "-c", line, check=check)

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, stdin=text)

    def read(self, path: str) -> bytes:
        """Return the content of a file, or of several, or nothing if there is none."""
        return bytes.fromhex(self.sh(f"od -An -v -tx1 {path} 2>/dev/null || :").replace("\n", ""))

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", f"--property={name}", "--value", unit).stdout.strip()

    def wait_for_another(self, unit: str, name: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until a property of a unit has changed."""
        old = {self.show(unit, name), "0"}
        until(f"{name} of {unit} has changed", lambda: self.show(unit, name) not in old, seconds)

    def journal(self, unit: str, *more: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", f"--unit={unit}", *more).stdout

    def log(self) -> str:
        """Return what the service logged since the test began, or since this was asked last."""
        return self.journal("lnd-backup", "--cursor-file=/run/seen")

    def drop_in(self, unit: str, text: str) -> None:
        """Change a unit until the end of the test."""
        self.write(f"/run/systemd/system/{unit}.d/test.conf", text)
        self.run("systemctl", "daemon-reload")

    def make(self, verb: str, *given: str, check: bool = True, source: str = "/src") -> Done:
        return self.run("make", "--directory", source, verb, *given, check=check)

    def fill_in(self, settings: str, key: Credentials) -> None:
        """Write a key into settings that the installer made."""
        self.sh(
            f"sed -i 's|^AWS_ACCESS_KEY_ID=.*|&{key.access_key}|; "
            f"s|^AWS_SECRET_ACCESS_KEY=.*|&{key.secret_key}|' {settings}"
        )


class Node:
    """A box in which the service is installed and set up, with a bucket and an LND of its own."""

    def __init__(self, box: Box, s3: S3Server) -> None:
        """Put everything back to where it was after the installation, and make a bucket."""
        self.box, self.s3 = box, s3
        self.bucket = s3.create_bucket()
        self.key = s3.put_only_user(self.bucket, PREFIX)
        box.sh(
            "systemctl stop lnd lnd-backup 'lnd-backup@*' 'lnd-backup*.timer' 2>/dev/null || :; "
            "systemctl stop 'lnd-backup-check@*' 'lnd-backup-alert@*' 2>/dev/null || :; "
            "systemctl --quiet disable lnd-backup@alice lnd-backup@second; "
            "rm -rf /run/systemd/system/*.d /var/lib/lnd-backup-alert /run/lnd-backup-* "
            f"/run/healed {STORED_KEY} {ALERT_SETTINGS} {DROP_INS}/*-directory.conf "
            "/etc/default/lnd-backup@* /var/lib/lnd-backup@*; "
            f"rm -rf {STAGING} {SCB}/* {SCB}/.[!.]*; "
            "systemctl daemon-reload; systemctl reset-failed"
        )
        self.lnd_in(SCB)
        self.set_up()

    def set_up(self, **settings: str) -> None:
        """Write the settings: those of a put-only key, and these."""
        values = {
            "MONITOR_FILE_PATH": self.scb,
            "RESCAN_SECONDS": "1",
            "SHUTDOWN_GRACE_SECONDS": "2",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        values |= reader_settings(self.s3, self.bucket, PREFIX, self.key) | settings
        lines = (f"{name}={value}\n" for name, value in values.items())
        self.box.write(SETTINGS, "".join(lines), "0600")

    def set_up_with_a_stored_key(self) -> None:
        """Write the key into the credential store, and none into the settings."""
        key = (
            f"[default]\naws_access_key_id = {self.key.access_key}\n"
            f"aws_secret_access_key = {self.key.secret_key}\n"
        )
        self.box.write(STORED_KEY, key, "0600")
        self.set_up(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")

    def lnd_in(self, directory: str) -> None:
        """Let LND write to this directory, as soon as it starts."""
        self.scb = f"{directory}/channel.backup"
        self.box.write("/etc/systemd/system/lnd.service", LND.format(directory=directory))
        self.box.run("systemctl", "daemon-reload")

    def systemctl(self, *args: str, check: bool = True) -> Done:
        return self.box.run("systemctl", *args, check=check)

    def start(self) -> None:
        """Start LND and the service, and wait until the first version is stored."""
        self.systemctl("start", "lnd", "lnd-backup")
        self.wait_for_stored()

    def start_and_stage(self) -> None:
        """Start LND and the service, and wait until a version is staged, as S3 does not answer."""
        self.systemctl("start", "lnd", "lnd-backup")
        until("a version is staged", self.staged)

    def lnd_writes(self) -> bytes:
        """Let the LND that runs write a version, and return it."""
        before = self.current()
        self.systemctl("kill", "--signal=USR1", "lnd")
        until("LND has written", lambda: self.current() not in {before, b""})
        return self.current()

    def current(self) -> bytes:
        return self.box.read(self.scb)

    def stored(self, bucket: str = "") -> list[bytes]:
        return [each.data for each in self.s3.objects(bucket or self.bucket).values()]

    def staged(self) -> list[str]:
        """Return the names and owners of the staged versions."""
        look = f"cd {STAGING} && stat -c '%U %a %n' 2*Z-* 2>/dev/null || :"
        return self.box.sh(look).splitlines()

    def wait_for_stored(self, data: bytes = b"", bucket: str = "") -> None:
        """Wait until the bucket holds this version, or that on disk."""
        until(
            "the bucket holds the version",
            lambda: (data or self.current() or None) in self.stored(bucket),
        )

    def wait_for_nothing_staged(self) -> None:
        """Wait until the version on disk is stored, and nothing waits."""
        self.wait_for_stored()
        until("nothing is staged", lambda: not self.staged())

    def pid(self) -> str:
        return self.box.show("lnd-backup", "MainPID")

    def is_active(self, unit: str = "lnd-backup") -> bool:
        return self.box.show(unit, "ActiveState") == "active"

    def wait_for_another_process(self, before: str) -> None:
        """Wait until another process of the service runs."""
        until("it was replaced", lambda: self.is_active() and self.pid() not in {before, "0"})

    def run_inside(self, line: str, *, check: bool = True) -> Done:
        """Run a shell's line as the service's user, in the mounts of the service that runs."""
        mounts = f"--mount=/proc/{self.pid()}/ns/mnt"
        return self.box.run_as("lnd-backup", line, "nsenter", mounts, check=check)

    def wait_for_tick(self, timer: str) -> None:
        """Wait until a timer has started its unit twice more, and the first of these has ended."""
        for _ in range(2):
            self.box.wait_for_another(timer, "LastTriggerUSecMonotonic")

    def check_often(self, service: str = "lnd-backup", again_seconds: int = 1) -> None:
        """Let the check of a service run every second, and believe a failure sooner."""
        ticks = "[Timer]\nOnActiveSec=\nOnActiveSec=1\nOnUnitInactiveSec=1\n"
        ticks += "RandomizedDelaySec=0\nAccuracySec=100ms\n"
        check = f"lnd-backup-check@{service}"
        self.box.drop_in(f"{check}.timer", ticks)
        again = f"[Service]\nEnvironment=AGAIN_SECONDS={again_seconds}\n"
        self.box.drop_in(f"{check}.service", again)

    def wait_for_checks(self, number: int) -> None:
        """Wait until the timer has begun and ended this many checks more, and each was told of."""
        for _ in range(number + 1):  # the first may have begun before
            self.box.wait_for_another(CHECK, "InactiveEnterTimestampMonotonic", 90)
        for told in (CHECK, f"over-{CHECK}"):
            alert = f"lnd-backup-alert@{told}.service"
            until("the alert has ended", partial(self.is_at_rest, alert))

    def is_at_rest(self, unit: str) -> bool:
        """Tell whether a unit neither runs nor is about to."""
        return self.box.show(unit, "ActiveState") in {"inactive", "failed"}

    def said_by_the_last_check(self) -> str:
        return self.box.sh("cat /run/lnd-backup-check/lnd-backup/said")

    def install_another(self, name: str, bucket: str, prefix: str, *given: str) -> str:
        """Install the service of another node, with a key, and return what the installer says."""
        told = self.box.make(
            "install",
            f"NODE={name}",
            f"S3_BUCKET_NAME={bucket}",
            f"S3_BACKUP_PREFIX={prefix}",
            f"AWS_ENDPOINT_URL_S3={self.s3.endpoint}",
            *given,
        ).stdout
        assert "fill in the settings" not in told
        key = self.s3.put_only_user(bucket, prefix)
        self.box.fill_in(f"/etc/default/lnd-backup@{name}-env", key)
        return told

    def revoke(self, status: str = "Inactive") -> None:
        """Let S3 refuse the node's key, or take it again (Active)."""
        iam = self.s3.client(service="iam")
        name = iam.get_access_key_last_used(AccessKeyId=self.key.access_key)["UserName"]
        iam.update_access_key(UserName=name, AccessKeyId=self.key.access_key, Status=status)


@pytest.fixture(scope="session", params=list(SUITES))
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """Return a fresh Debian that runs, with a user for LND and without a network for pip."""
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
def hanging_s3(node: Node) -> Iterator[S3Server]:
    """Return the S3 of the node, which takes connections and answers none until `resume`."""
    node.s3.suspend()
    yield node.s3
    node.s3.resume()


class Alerts:
    """What somebody was told, by mail and by POST."""

    def __init__(self, box: Box, listener: FakeS3) -> None:
        self.box, self.listener = box, listener
        self.url = f"{listener.endpoint}/secret-topic"
        box.write(ALERT_SETTINGS, f"ALERT_URL={self.url}\n")

    def set_up_mail(self) -> None:
        """Set up the mail, too; it goes to a stand-in for sendmail, and as with Postfix only a
        program with the right of a group can put it into the queue.
        """
        self.box.write(ALERT_SETTINGS, f"ALERT_URL={self.url}\nALERT_MAIL=me@example.org\n")
        sendmail = "#!/bin/sh\nexec /usr/sbin/postdrop /srv/mail/$(date +%s%N) >/dev/null\n"
        self.box.write("/usr/sbin/sendmail", sendmail, "0755")
        self.box.sh(
            "rm -rf /srv/mail; install -d -g mail -m 0775 /srv/mail; "
            "install -g mail -m 2755 /usr/bin/tee /usr/sbin/postdrop"
        )

    def posts(self) -> list[str]:
        """Return what was posted, oldest first."""
        return [request.body.decode() for request in self.listener.requests]

    def mails(self) -> list[email.message.EmailMessage]:
        names = self.box.sh("ls /srv/mail").split()
        texts = [self.box.sh(f"cat /srv/mail/{name}") for name in names]
        return [email.message_from_string(text, policy=email.policy.default) for text in texts]

    def subjects(self) -> list[str]:
        """Return the subjects of the mails, and hold them against what was posted."""
        mails = self.mails()
        subjects = [str(mail["Subject"]) for mail in mails]
        assert all(mail["To"] == "me@example.org" for mail in mails)
        assert [post.splitlines()[0] for post in self.posts()] == subjects
        return subjects

    def wait_for(self, number: int) -> str:
        """Wait until this many messages came, by mail and then by POST; return the last subject."""
        until(f"{number} messages came", lambda: len(self.posts()) >= number, 90)
        subjects = self.subjects()
        assert len(subjects) == number
        return subjects[-1]


@pytest.fixture
def posted(node: Node) -> Iterator[Alerts]:
    """Return the alerts of a node that has the POST set up."""
    with FakeS3(defaults={"POST": Answer()}) as listener:
        yield Alerts(node.box, listener)


@pytest.fixture
def alerts(node: Node, posted: Alerts) -> Alerts:
    """Return the alerts of a node that has both ways set up, and whose check runs often."""
    node.check_often()
    posted.set_up_mail()
    return posted


# --- before anything is installed ---


def test_nothing_is_installed_where_it_cannot_work(box: Box) -> None:
    """Without a systemd, or beside a user of that name whom somebody uses, nothing is changed."""
    without = "mount -t tmpfs none /run; make -C /src install"
    hidden = box.run("unshare", "--mount", "sh", "-c", without, check=False)
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
    """After one command, one edit and one start, the first version is in the bucket."""
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
    given = (f"S3_BUCKET_NAME={bucket}", f"AWS_ENDPOINT_URL_S3={s3_http.endpoint}")
    began = time.monotonic()
    done = box.make("install", "LND_USER=bitcoin", *given)
    seconds = time.monotonic() - began
    assert "fill in the settings" not in done.stdout
    assert "sudo systemctl start lnd-backup" in done.stdout
    assert box.show("lnd-backup", "UnitFileState") == "enabled"
    box.fill_in(SETTINGS, key)
    began = time.monotonic()
    box.run("systemctl", "start", "lnd-backup", "lnd")
    until("the first version is stored", lambda: s3_http.objects(bucket))
    start = time.monotonic() - began
    assert s3_http.objects(bucket, "box/")
    assert box.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"
    figures = (
        f"systemd {SUITES[box.suite]}, packages at hand, no typing: "
        f"make install: 1 command, {seconds:.1f} s; by hand: {len(BY_HAND)} commands, "
        f"{by_hand:.1f} s; start to first version stored: {start:.1f} s\n"
    )
    (BOXES / f"figures-{box.suite}").write_text(figures, encoding="utf-8")


# --- the unit ---


def test_systemd_understands_what_was_installed(installed: Box) -> None:
    """Nothing is said of the units as they were installed."""
    pattern = "/etc/systemd/system/lnd-backup*."
    verify = f"systemd-analyze verify --man=no {pattern}service {pattern}timer"
    told = installed.run("sh", "-c", verify)
    assert (told.stdout, told.stderr) == ("", "")
    steps = "/etc/systemd/system/lnd-backup.service.d/restart-steps.conf"
    missing = installed.run("test", "-e", steps, check=False).returncode
    assert bool(missing) == (SUITES[installed.suite] < "254")


def test_it_starts_before_the_directory_of_lnd_is_there(node: Node) -> None:
    """The start waits for nothing, and the first version in a directory made later is stored."""
    node.lnd_in("/srv/scb")
    node.set_up()
    node.systemctl("start", "lnd-backup")
    assert node.is_active()
    node.box.run("install", "-d", "-o", "bitcoin", "-g", "lnd-backup", "-m", "2750", "/srv/scb")
    node.systemctl("start", "lnd")
    node.wait_for_stored()


def test_metrics_are_readable_by_others_and_stay(node: Node) -> None:
    """METRICS_FILE in the runtime directory can be read by anybody, also after a stop."""
    metrics = "/run/lnd-backup/metrics.prom"
    node.set_up(METRICS_FILE=metrics)
    node.start()
    stored = f"grep -Eq '^lnd_backup_last_stored_timestamp_seconds [1-9]' {metrics}"
    told = partial(node.box.run_as, "nobody", stored, check=False)
    until("the metrics tell of it", lambda: told().returncode == 0)
    node.systemctl("stop", "lnd-backup")
    node.box.run_as("nobody", stored)
    node.box.run("lnd-backup", "once")
    node.box.run_as("nobody", stored)


def test_a_daemon_that_hangs_is_replaced(node: Node) -> None:
    """The watchdog ends it, without a core dump, and another process goes on."""
    node.box.drop_in("lnd-backup.service", "[Service]\nWatchdogSec=3\nRestartSec=100ms\n")
    node.start()
    frozen = node.pid()
    node.systemctl("kill", "--signal=STOP", "--kill-whom=main", "lnd-backup")
    node.wait_for_another_process(frozen)
    assert node.box.show("lnd-backup", "NRestarts") == "1"
    log = node.box.journal("lnd-backup")
    assert "Watchdog timeout" in log
    assert "core-dump" not in log.replace("code=dumped", "")
    node.wait_for_stored(node.lnd_writes())


def test_it_stops_in_time_while_s3_hangs(node: Node, hanging_s3: S3Server) -> None:
    """A stop during an upload that hangs is in order, although the grace is longer than the unit's
    time-out: the program asks for more. What is staged goes out after the next start.
    """
    node.box.drop_in("lnd-backup.service", "[Service]\nTimeoutStopSec=2\n")
    node.set_up(SHUTDOWN_GRACE_SECONDS="5")
    node.start_and_stage()
    node.systemctl("stop", "lnd-backup")
    ended = [node.box.show("lnd-backup", name) for name in ("Result", "ExecMainStatus")]
    assert ended == ["success", "0"]
    assert node.staged()
    hanging_s3.resume()
    node.systemctl("start", "lnd-backup")
    node.wait_for_nothing_staged()


def test_a_wrong_configuration_does_not_loop(posted: Alerts, node: Node) -> None:
    """Exit 78 is not tried again at once; somebody hears why, and what the log says."""
    node.set_up(S3_BUCKET_NAME="")
    failed = node.systemctl("start", "lnd-backup", check=False)
    assert failed.returncode != 0
    until("the alert came", posted.posts)
    names = ("ActiveState", "ExecMainStatus", "NRestarts")
    assert [node.box.show("lnd-backup", name) for name in names] == ["failed", "78", "0"]
    (body,) = posted.posts()
    sentence = "lnd-backup has stopped: its settings are wrong. New versions of channel.backup"
    assert body.startswith(f"box: {sentence}")
    assert "S3_BUCKET_NAME=: is not set" in body
    assert node.is_active("lnd-backup.timer")


def test_a_refused_key_is_told_once_and_its_end_as_well(alerts: Alerts, node: Node) -> None:
    """The service stays up; by mail and by POST there is one message, and one at the end."""
    node.start()
    node.wait_for_checks(1)
    assert alerts.subjects() == []
    node.revoke()
    node.lnd_writes()
    subject = alerts.wait_for(1)
    assert re.match("box: lnd-backup: (NOT BACKED UP|UNKNOWN): .*s3://", subject)
    body = alerts.mails()[0].get_content()
    assert body.startswith(subject)
    assert "\nhint: " in body
    assert "operations.md" in body
    assert node.is_active()
    node.wait_for_checks(2)
    assert len(alerts.subjects()) == 1
    node.revoke("Active")
    node.wait_for_stored()
    assert alerts.wait_for(2).startswith("box: lnd-backup: BACKED UP again: ")
    node.wait_for_checks(2)
    assert len(alerts.subjects()) == 2
    assert node.box.sh("cat /var/lib/lnd-backup-alert/*") == "{}"


def test_many_checks_in_a_row_are_no_failure(alerts: Alerts, node: Node) -> None:
    """Ten checks within seconds start as often, each is told of, and the journal stays quiet."""
    node.start()
    since = node.box.sh("date +%s.%N").strip()
    for _ in range(10):
        node.systemctl("start", "lnd-backup-check@lnd-backup")
    node.wait_for_checks(1)
    assert alerts.subjects() == []
    assert node.box.show(CHECK, "Result") == "success"
    told = ["--boot", "--priority=warning", "--quiet", f"--since=@{since}"]
    assert node.box.journal("lnd-backup-check@*", *told, "--unit=lnd-backup-alert@*") == ""


def test_a_deleted_bucket_is_told_and_an_outage_changes_nothing(alerts: Alerts, node: Node) -> None:
    """A bucket that is gone is told; that S3 is away then is neither an alert nor the end of one;
    a bucket that is back is. The key may list, so that S3 says it; else the receipt does, later.
    """
    node.key = node.s3.read_write_user(node.bucket)
    node.set_up()
    node.start()
    for key in node.s3.objects(node.bucket):
        node.s3.admin.delete_object(Bucket=node.bucket, Key=key)
    node.s3.admin.delete_bucket(Bucket=node.bucket)
    node.lnd_writes()
    subject = alerts.wait_for(1)
    assert re.match("box: lnd-backup: (NOT BACKED UP|UNKNOWN): .*bucket", subject)
    node.s3.stop()
    try:
        node.wait_for_checks(1)
        said = node.said_by_the_last_check()
    finally:
        node.s3.start()  # which makes the bucket again
    assert "UNKNOWN: " in said
    assert len(alerts.subjects()) == 1
    node.wait_for_stored()
    assert alerts.wait_for(2).startswith("box: lnd-backup: BACKED UP again: ")


def test_the_check_sees_what_the_service_sees_and_writes_nothing(
    alerts: Alerts, node: Node
) -> None:
    """It runs as the service's user with its credentials; if it cannot start, that is told."""
    node.set_up_with_a_stored_key()
    node.start()
    node.wait_for_checks(1)
    assert "BACKED UP: " in node.said_by_the_last_check()
    modes = node.box.sh("stat -c %U:%a /run/lnd-backup-check/lnd-backup")
    assert modes == "lnd-backup:700\n"
    used = [
        int(node.box.show(unit, "CPUUsageNSec")) / 1e9
        for unit in (CHECK, f"lnd-backup-alert@{CHECK}.service")
    ]
    with (BOXES / f"figures-{node.box.suite}").open("a", encoding="utf-8") as figures:
        figures.write(f"CPU: a check {used[0]:.2f} s, its alert {used[1]:.2f} s\n")
    node.box.run("mv", SETTINGS, f"{SETTINGS}.away")
    subject = alerts.wait_for(1)
    node.box.run("mv", f"{SETTINGS}.away", SETTINGS)
    assert subject == (
        "box: lnd-backup: UNKNOWN: the check did not run: "
        "systemd could not start it, perhaps because the settings file is missing"
    )
    assert alerts.wait_for(2).startswith("box: lnd-backup: BACKED UP again: ")


def test_a_test_alert_goes_out_by_every_way(alerts: Alerts, node: Node) -> None:
    """It says which ways it went, and what sendmail says of a mail that it cannot send."""
    done = node.box.run("lnd-backup", "test-alert")
    assert "sent: ALERT_MAIL" in done.stderr
    assert "sent: ALERT_URL" in done.stderr
    assert "a test of lnd-backup's alerts" in alerts.wait_for(1)
    broken = "#!/bin/sh\necho sendmail: wrong password >&2; exit 77\n"
    node.box.write("/usr/sbin/sendmail", broken, "0755")
    failed = node.box.run("lnd-backup", "test-alert", check=False)
    assert failed.returncode == 1
    assert "sendmail: wrong password" in failed.stderr
    assert "cannot send the message by ALERT_MAIL" in failed.stderr
    assert "secret-topic" not in failed.stderr


def test_after_the_start_limit_the_timer_tries_again(posted: Alerts, node: Node) -> None:
    """What fails again and again is one alert; the timer never starts it beside a stop."""
    limit = "[Unit]\nStartLimitIntervalSec=10s\n"
    node.box.drop_in("lnd-backup.service", limit + FAST + FAILS_UNTIL_HEALED)
    ticks = "[Timer]\nOnCalendar=\nOnCalendar=*:*:0/3\nRandomizedDelaySec=0\nAccuracySec=100ms\n"
    node.box.drop_in("lnd-backup.timer", ticks)
    node.systemctl("start", "--no-block", "lnd-backup")
    until("the alert came", posted.posts)
    assert posted.posts()[0].startswith("box: lnd-backup has stopped: ")
    assert node.box.show("lnd-backup", "NRestarts") in {"7", "8"}
    until("a tick came too early", lambda: "repeated too quickly" in node.box.log())
    node.box.run("touch", "/run/healed")
    until("the timer has started it", node.is_active)
    assert len(posted.posts()) == 1
    running = node.pid()
    node.wait_for_tick("lnd-backup.timer")
    assert node.pid() == running
    node.systemctl("stop", "lnd-backup")
    node.wait_for_tick("lnd-backup.timer")
    assert node.box.show("lnd-backup", "ActiveState") == "inactive"


def test_the_lines_of_the_page_start_what_failed_too_often(node: Node) -> None:
    """After the start limit systemd refuses a mere start, although the cause is gone."""
    node.box.drop_in("lnd-backup.service", FAST + FAILS_UNTIL_HEALED)
    node.systemctl("start", "--no-block", "lnd-backup")
    until("systemd gave up", lambda: "repeated too quickly" in node.box.log())
    node.box.run("touch", "/run/healed")
    assert node.systemctl("start", "lnd-backup", check=False).returncode != 0
    node.box.sh(block_of("operations", "If the service has stopped"))
    assert node.is_active()


def block_of(page: str, heading: str) -> str:
    """Return the first block of commands of a page after these words, as root types them."""
    text = (CHECKOUT / f"docs/{page}.md").read_text(encoding="utf-8")
    return text.partition(heading)[2].split("\n\n")[1].replace("sudo ", "")


def test_credentials_come_from_the_store_unless_the_environment_has_some(node: Node) -> None:
    """The key in /etc/credstore is used; one in the settings wins, and the log says so."""
    node.set_up_with_a_stored_key()
    node.start()
    assert "credentials: shared-credentials-file" in node.box.log()
    assert "S3 confirmed it" in node.box.run("lnd-backup", "check").stdout
    node.set_up(AWS_SECRET_ACCESS_KEY="stale")
    node.systemctl("restart", "lnd-backup")
    until("the log says which are used", lambda: "credentials: env" in node.box.log())


def test_the_service_sees_what_it_needs(node: Node) -> None:
    """In its mounts it can write its own directory alone, and execute nothing there."""
    node.systemctl("start", "lnd-backup")
    node.run_inside(f"touch {STAGING}/.probe && rm {STAGING}/.probe")
    for forbidden in (
        f"touch {SCB}/channel.backup",
        "touch /opt/lnd-backup/probe",
        f"cp /usr/bin/true {STAGING}/.probe && {STAGING}/.probe",
        "ls /home/bitcoin",
        f"cat {SETTINGS}",
    ):
        assert node.run_inside(forbidden, check=False).returncode != 0, forbidden


# --- the command ---


def test_the_command_runs_as_the_service_and_as_the_caller(node: Node) -> None:
    """`once` and `check` act as the service's user; `list` and `restore` as root, with a key."""
    node.systemctl("start", "lnd")
    once = node.box.run("lnd-backup", "once")
    assert f"stored s3://{node.bucket}/{PREFIX}" in once.stderr
    node.wait_for_stored()
    modes = set(node.box.sh(f"stat -c '%U %a' {STAGING} {STAGING}/.??*").splitlines())
    assert modes == {"lnd-backup 700", "lnd-backup 600"}
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
    node.box.run("env", *key, "lnd-backup", "restore", "--output", "/root/restored")
    assert node.box.read("/root/restored") in node.stored()
    assert node.box.sh("stat -c '%U %a' /root/restored") == "root 600\n"


def test_another_node_on_the_same_host(alerts: Alerts, node: Node) -> None:
    """It has settings, a prefix, a staging directory and a check of its own."""
    node.systemctl("start", "lnd", "lnd-backup")
    told = node.install_another("alice", node.bucket, "alice/", "LND_USER=bitcoin")
    assert "sudo lnd-backup @alice check" in told
    settings = "/etc/default/lnd-backup@alice-env"
    assert node.box.sh(f"stat -c '%U %a' {settings} {SCB}@alice") == "root 600\nbitcoin 2750\n"
    assert node.box.show("lnd-backup@alice", "UnitFileState") == "enabled"
    node.check_often("lnd-backup@alice")
    node.box.sh(f"cp {SCB}/channel.backup {SCB}@alice/; chmod 0640 {SCB}@alice/channel.backup")
    node.systemctl("start", "lnd-backup@alice")
    until("it is stored", lambda: node.s3.objects(node.bucket, "alice/"))
    for timer in ("lnd-backup@alice.timer", "lnd-backup-check@lnd-backup@alice.timer"):
        assert node.is_active(timer)
    node.box.run("lnd-backup", "@alice", "check")
    assert "lnd-backup" in node.box.sh("stat -c %U /var/lib/lnd-backup@alice")
    node.systemctl("stop", "lnd-backup@alice")
    node.systemctl("disable", "lnd-backup@alice")
    told = node.box.make("install", "NODE=alice").stdout
    assert "lnd-backup@alice does not start at boot" in told
    assert node.box.show("lnd-backup@alice", "UnitFileState") == "disabled"
    node.box.run("rm", f"{SCB}@alice/channel.backup")
    assert alerts.wait_for(1).startswith("box: lnd-backup@alice: ")


def test_a_second_bucket_is_a_second_instance_on_the_same_file(node: Node) -> None:
    """Each version reaches both buckets, and one bucket that is gone does not hold up the other."""
    second = node.s3.create_bucket()
    node.install_another("second", second, PREFIX, f"MONITOR_FILE_PATH={SCB}/channel.backup")
    node.systemctl("start", "lnd", "lnd-backup", "lnd-backup@second")
    for _ in range(2):
        data = node.lnd_writes()
        node.wait_for_stored(data)
        node.wait_for_stored(data, second)
    node.revoke()
    node.wait_for_stored(node.lnd_writes(), second)


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
        box.sh(f"mknod /root/stick b {os.major(number)} {os.minor(number)}")
        box.run("mkdir", "-p", self.mount_point)

    def install(self) -> str:
        """Let the installer open it for the service, and return what that says."""
        self.put_in()
        self.box.run("mkdir", self.directory)
        return self.box.make("install", f"COPY_DIRECTORY={self.directory}").stdout

    def put_in(self) -> None:
        self.box.run("mount", "/root/stick", self.mount_point)

    def pull_out(self) -> None:
        """Unmount it; fails if somebody still has it open, or any process still sees it."""
        self.box.run("umount", self.mount_point)
        seen = self.box.sh("cat /proc/[0-9]*/mountinfo 2>/dev/null || :")
        assert "/root/stick" not in seen

    def wait_for(self, data: bytes) -> None:
        """Wait until this version is on it."""
        versions = f"{self.directory}/2*Z-*"
        until("the stick holds it", lambda: data in self.box.read(versions), 90)

    def throw_away(self) -> None:
        """Let go of the device."""
        self.box.sh(f"umount -l {self.mount_point} 2>/dev/null || :; rm -f /root/stick")
        host_run("losetup", "--detach", self.device)


def host_run(*command: str) -> str:
    """Run a command on the machine that the boxes run on."""
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def stick(node: Node, tmp_path: Path) -> Iterator[Stick]:
    """Return a stick that is not put in."""
    stick = Stick(node.box, tmp_path)
    yield stick
    node.systemctl("stop", "lnd-backup")
    stick.throw_away()


def test_every_version_is_on_the_stick_as_well(node: Node, stick: Stick) -> None:
    """Without the stick a version is in the bucket; when the stick is back, it is on both, also
    after a start without it. Nothing keeps the stick busy, and nothing beside it is open.
    """
    told = stick.install()
    assert f"chown lnd-backup:lnd-backup {stick.directory}" in told
    assert "left to do: let the user lnd-backup write" not in told
    node.systemctl("start", "lnd", "lnd-backup")
    stick.wait_for(node.lnd_writes())
    for started_without_it in (False, True, False):
        stick.pull_out()
        if started_without_it:
            node.systemctl("restart", "lnd-backup")
        data = node.lnd_writes()
        node.wait_for_stored(data)
        until("the status says so", lambda: "copy" in node.box.show("lnd-backup", "StatusText"))
        stick.put_in()
        stick.wait_for(data)
    assert node.run_inside("touch /mnt/probe", check=False).returncode != 0
    node.systemctl("stop", "lnd-backup")
    data = node.lnd_writes()
    node.box.run("lnd-backup", "once")
    stick.wait_for(data)


def test_a_folder_that_another_user_carries_away(node: Node) -> None:
    """A directory made as the page says can be read by that user, and by nobody else."""
    folder = "/srv/lnd-copies"
    page = (CHECKOUT / "docs/second-copy.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^    sudo (install -d .*{folder})", page, re.MULTILINE)
    node.box.sh(line.replace("-g me", "-g bitcoin"))
    node.box.make("install", f"COPY_DIRECTORY={folder}")
    node.systemctl("start", "lnd", "lnd-backup")
    node.wait_for_stored(node.lnd_writes())
    until("the copy is there", lambda: node.box.sh(f"ls {folder}"))
    read = f"cat {folder}/2* >/dev/null"
    node.box.run_as("bitcoin", read)
    assert node.box.run_as("nobody", read, check=False).returncode != 0


# --- a file left in LND's directory ---


def test_a_file_left_in_lnd_s_directory(node: Node) -> None:
    """Only that directory is seen, a macaroon in it cannot be read, a new one is noticed."""
    directory = "/home/bitcoin/.lnd/data/chain/bitcoin/mainnet"
    node.box.run_as(
        "bitcoin",
        f"umask 077; mkdir -p {directory}; umask 022; cd {directory}; "
        "echo m >admin.macaroon; chmod 0640 admin.macaroon; echo k >/home/bitcoin/.lnd/tls.key",
    )
    node.lnd_in(directory)
    node.set_up()
    node.box.make("install", f"LND_DIRECTORY={directory}")
    node.box.drop_in(
        "lnd-backup-mounts@lnd-backup.timer",
        "[Timer]\nOnActiveSec=3\nOnUnitInactiveSec=3\nAccuracySec=100ms\n",
    )
    node.start()
    command = block_of("access", "**Can the service read")
    assert node.box.sh(command.replace("admin.macaroon", "channel.backup"))
    refused = node.box.run("sh", "-euc", command, check=False)
    assert "admin.macaroon: Permission denied" in refused.stderr
    assert node.run_inside("ls /home/bitcoin/.lnd/tls.key", check=False).returncode != 0
    node.box.run("lnd-backup", "check")
    node.systemctl("stop", "lnd")
    before = node.pid()
    node.box.sh(
        f"mv {directory} {directory}.old; cp -a {directory}.old {directory}; "
        f"setfacl -m u:lnd-backup:rx {directory}"
    )
    node.wait_for_another_process(before)
    node.systemctl("start", "lnd")
    node.wait_for_stored(node.lnd_writes())
    node.systemctl("start", CHECK)
    assert node.box.show(CHECK, "ExecMainStatus") == "0"
    settled = node.pid()
    node.wait_for_tick("lnd-backup-mounts@lnd-backup.timer")
    assert node.pid() == settled


# --- upgrade, reboot, removal ---


def copy_of_the_checkout(box: Box, line: str) -> str:
    """Return a checkout in the box whose program has this line more."""
    source = "/root/newer"
    box.sh(
        f"rm -rf {source}; mkdir {source}; cd /src; cp -a Makefile docs systemd requirements.txt "
        f"lnd-backup.service lnd-backup-env.example {SCRIPT.name} {source}/"
    )
    program = SCRIPT.read_text(encoding="utf-8")
    text = program.replace("\nif __name__ ==", f"\n{line}\nif __name__ ==")
    assert text != program
    box.write(f"{source}/{SCRIPT.name}", text)
    return source


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
    assert node.box.show(CHECK, "Result") == "success"


def test_an_upgrade_keeps_what_is_staged(node: Node, hanging_s3: S3Server) -> None:
    """The new version takes the place of the old one, and sends what that staged."""
    node.start_and_stage()
    staged, old = node.staged(), node.pid()
    source = copy_of_the_checkout(node.box, "# newer")
    node.box.make("install", source=source)
    assert node.is_active()
    assert node.pid() != old
    assert set(staged) <= set(node.staged())
    assert all(line.startswith("lnd-backup 600 ") for line in node.staged())
    hanging_s3.resume()
    node.wait_for_nothing_staged()


def test_an_upgrade_that_does_not_start_is_taken_back(node: Node) -> None:
    """A new version that is installed and then fails, by its program and by its unit, makes way for
    the one before.
    """
    node.start()
    unit = node.box.read("/etc/systemd/system/lnd-backup.service")
    version = node.box.sh("readlink /opt/lnd-backup/current")
    node.box.drop_in("lnd-backup.service", "[Unit]\nStartLimitBurst=3\n" + FAST)
    source = copy_of_the_checkout(node.box, "if os.environ.get('NOTIFY_SOCKET'):\n    sys.exit(1)")
    node.box.sh(f"sed -i '/^ExecStart=/i ExecStartPre=/bin/false' {source}/lnd-backup.service")
    failed = node.box.make("install", check=False, source=source)
    assert failed.returncode != 0
    assert "the new version did not start" in failed.stderr
    assert "the previous version runs again" in failed.stderr
    assert node.box.read("/etc/systemd/system/lnd-backup.service") == unit
    assert node.box.sh("readlink /opt/lnd-backup/current") == version
    assert node.is_active()
    node.wait_for_stored(node.lnd_writes())


def test_lnd_s_last_write_before_a_reboot_is_stored(node: Node) -> None:
    """At a shutdown LND stops first; after the boot everything runs again."""
    node.systemctl("--quiet", "enable", "lnd", "lnd-backup")
    node.start()
    before = node.current()
    node.box.control("down")
    last = (node.box.directory / f"changes{SCB}/channel.backup").read_bytes()
    stored = node.stored()
    node.box.up()
    assert last != before
    assert last in stored
    timers = ("lnd-backup.timer", "lnd-backup-check@lnd-backup.timer")
    for unit in ("lnd-backup", "lnd", *timers):
        until(f"{unit} runs again", partial(node.is_active, unit))
    assert node.current() != last
    node.wait_for_stored()
    node.systemctl("--quiet", "disable", "lnd")


def test_removal_keeps_settings_and_staged_versions(node: Node, hanging_s3: S3Server) -> None:
    """`make uninstall` leaves what cannot be had again; another installation sends it; `make purge`
    refuses while something waits, and then leaves nothing.
    """
    node.start_and_stage()
    data = node.current()
    node.box.make("uninstall")
    places = "/etc/systemd /run/systemd/system /usr/local /opt"
    assert node.box.sh(f"find {places} -name '*lnd-backup*'") == ""
    assert node.box.show("lnd-backup", "LoadState") == "not-found"
    assert node.staged()
    hanging_s3.resume()
    node.box.make("install")
    node.systemctl("start", "lnd-backup")
    node.wait_for_stored(data)
    node.wait_for_nothing_staged()
    node.s3.suspend()
    node.lnd_writes()
    until("a version is staged", node.staged)
    assert node.box.make("purge", check=False).returncode != 0
    assert node.is_active(), "nothing was stopped"
    node.box.make("purge", "FORCE=1")
    left = node.box.sh(
        "find / -xdev -name '*lnd-backup*' "
        "! -path '/src/*' ! -path '/proc/*' ! -path '/root/newer/*'"
    )
    assert left == ""
    assert node.box.run("getent", "passwd", "lnd-backup", check=False).returncode != 0
    assert node.current()


# --- the alert rules ---


@pytest.mark.parametrize("command", ["check rules alerts.yml", "test rules alerts_test.yml"])
def test_the_alert_rules_are_right(command: str, tmp_path: Path) -> None:
    """The tool of Prometheus accepts them, and they fire in the cases of alerts_test.yml."""
    for name in ("docs/alerts.yml", "tests/systemd/alerts_test.yml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    done = run_command("promtool", *command.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
