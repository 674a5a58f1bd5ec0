"""The unit files as systemd reads them, the lnd-backup command, and what the hourly check tells.

The same on a systemd that runs: `make test-systemd`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from kit import CHECKOUT, Answer, FakeS3, RawS3, answers
from shared import run_command, section, write_script

import s3_backup_lnd_channels as program
from systemd import alert

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Wrapper = Callable[..., subprocess.CompletedProcess[str]]

UNIT = CHECKOUT / "lnd-backup.service"
SYSTEMD = CHECKOUT / "systemd"
CHECK_UNIT = SYSTEMD / "lnd-backup-check@.service"
EXPOSURE_MAX = "12"  # ten times the score
needs_systemd_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze (Debian: systemd)"
)


# --- The units ---


def seconds(value: str) -> float:
    """Return a time span of a unit file in seconds."""
    spans = re.findall(r"([0-9]+) ?([a-z]*)", value)
    return sum(
        float(number) * {"": 1, "s": 1, "min": 60, "h": 3600}[unit] for number, unit in spans
    )


def default_of(setting: str) -> float:
    return float(program.SETTINGS[setting][0] or "")


def test_the_times_of_the_unit_fit_each_other_and_the_program() -> None:
    """A stop outlasts the grace, the watchdog three looks, a tick of the timer the start limit."""
    unit, service = section(UNIT, "Unit"), section(UNIT, "Service")
    assert seconds(service["TimeoutStopSec"]) > default_of("SHUTDOWN_GRACE_SECONDS") + 1
    assert seconds(service["WatchdogSec"]) >= 3 * default_of("RESCAN_SECONDS")
    assert service["RestartPreventExitStatus"] == str(program.EXIT_CONFIG)
    assert seconds(service["TimeoutStartSec"]) > seconds(service["RestartSec"])
    window, tries = seconds(unit["StartLimitIntervalSec"]), int(unit["StartLimitBurst"])
    assert tries * seconds(service["RestartSec"]) < window, (
        "the start limit is never reached: no alert"
    )
    steps = section(SYSTEMD / "restart-steps.conf", "Service")
    first, last = seconds(service["RestartSec"]), seconds(steps["RestartMaxDelaySec"])
    growth = (last / first) ** (1 / int(steps["RestartSteps"]))
    assert sum(first * growth**n for n in range(tries)) < window / 2, (
        "with growing delays the start limit is hardly reached: no alert"
    )
    minutes = section(SYSTEMD / "lnd-backup.timer", "Timer")["OnCalendar"].removeprefix("*:0/")
    assert int(minutes) * 60 > window, "two ticks in one window of the start limit"


def test_the_unit_outlives_lnd_and_is_ready_without_it() -> None:
    """The unit is ordered before LND alone, and waits for no network."""
    unit = section(UNIT, "Unit")
    assert unit["Before"] == "lnd.service"
    assert "online" not in unit["After"]
    assert "lnd" not in unit["After"]
    assert section(UNIT, "Service")["Type"] == "notify"


def test_the_template_is_the_unit() -> None:
    """An instance shares every line with the plain service."""
    assert (SYSTEMD / "lnd-backup@.service").resolve() == UNIT
    assert (SYSTEMD / "lnd-backup@.timer").resolve() == SYSTEMD / "lnd-backup.timer"


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a directory with the unit files; systemd rejects a template that is a link to one."""
    for path in (UNIT, *SYSTEMD.glob("*.service"), *SYSTEMD.glob("*.timer")):
        shutil.copy(path, tmp_path)
    return tmp_path


def analyze(*args: str | Path, units: Path) -> subprocess.CompletedProcess[str]:
    return run_command("systemd-analyze", *args, env={"SYSTEMD_UNIT_PATH": f"{units}:"})


@needs_systemd_analyze
def test_systemd_has_nothing_to_say_of_the_units(units: Path) -> None:
    """`systemd-analyze verify` knows every key and value; the programs are not installed here."""
    told = analyze("verify", "--man=no", *units.iterdir(), units=units)
    lines = [line for line in told.stderr.splitlines() if "/opt/lnd-backup/current/" not in line]
    assert (told.stdout, lines) == ("", [])


def test_the_check_is_hardened_like_the_service_and_writes_nothing() -> None:
    """It has every restriction of the service's, and may not even write what is staged."""
    service, check = section(UNIT, "Service"), section(CHECK_UNIT, "Service")
    own = {
        "Type", "NotifyAccess", "ExecStart", "Environment", "EnvironmentFile", "StateDirectory",
        "StateDirectoryMode", "RuntimeDirectory", "RuntimeDirectoryMode", "SyslogIdentifier",
        "Restart", "RestartSec", "RestartPreventExitStatus", "WatchdogSec", "TimeoutStartSec",
        "TimeoutStopSec", "NoExecPaths",
    }  # fmt: skip
    shared = set(service) - own
    assert len(shared) > 35
    assert {name: check.get(name) for name in shared} == {name: service[name] for name in shared}
    assert check["EnvironmentFile"] == service["EnvironmentFile"].replace("%N", "%i")
    assert "StateDirectory" not in check
    assert check["NoExecPaths"] == "/"
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    several = {line for line in lines if line.startswith(("SystemCallFilter", "Environment=AWS"))}
    assert several <= set(CHECK_UNIT.read_text(encoding="utf-8").splitlines())
    assert "75" in check["SuccessExitStatus"].split()
    unit = section(CHECK_UNIT, "Unit")
    assert unit["OnFailure"] == section(UNIT, "Unit")["OnFailure"]
    assert unit["OnSuccess"] == unit["OnFailure"].replace("@", "@over-")


def test_the_times_of_the_check_fit() -> None:
    """It runs hourly, not right after the start; what it waits for fits into its time."""
    timer = section(SYSTEMD / "lnd-backup-check@.timer", "Timer")
    assert seconds(timer["OnUnitInactiveSec"]) == 3600
    assert seconds(timer["OnActiveSec"]) > 10 * 60, "until then a version may wait"
    assert seconds(timer["RandomizedDelaySec"]) >= 300
    again = re.search(r"^Environment=AGAIN_SECONDS=(\d+)$", CHECK_UNIT.read_text(), re.MULTILINE)
    assert again
    assert seconds(section(CHECK_UNIT, "Service")["TimeoutStartSec"]) > 2 * 60 + int(again[1])
    messenger = section(SYSTEMD / "lnd-backup-alert@.service", "Service")
    assert seconds(messenger["TimeoutStartSec"]) > 5 * alert.PATIENCE_SECONDS


@needs_systemd_analyze
@pytest.mark.parametrize("drop_in", ["", "lnd-directory.conf"])
def test_the_exposure_is_low(drop_in: str, units: Path) -> None:
    """The score of `systemd-analyze security` is 1.2 or better, with the shipped drop-in too."""
    if drop_in:
        (units / "lnd-backup.service.d").mkdir()
        shutil.copy(SYSTEMD / drop_in, units / "lnd-backup.service.d")
    options = ("--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager")
    services = (units / UNIT.name, units / CHECK_UNIT.name)
    told = analyze("security", *options, *services, units=units)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr
    assert re.search(r"Overall exposure level for lnd-backup.service: [01]\.[0-9]", told.stdout)


def test_every_restriction_is_there() -> None:
    """Lines that protect and do not count in the score stay."""
    service = section(UNIT, "Service")
    names = ("NoExecPaths", "ExecPaths", "LimitCORE", "UMask")
    assert [service[name] for name in names] == ["/ %S/%N", "/usr", "0", "0077"]


# --- The lnd-backup command ---


@pytest.fixture
def wrapper(tmp_path: Path) -> Wrapper:
    """Return what runs the wrapper among programs that print what they were given."""
    text = (SYSTEMD / "lnd-backup").read_text(encoding="utf-8")
    places = {"/opt/lnd-backup/current": "/opt", "/etc/default": "", "/etc/credstore": ""}
    for place, instead in places.items():
        assert place in text
        text = text.replace(place, f"{tmp_path}{instead}")
    stubs = {
        "lnd-backup": text,
        "bin/id": "echo ${TEST_UID-0}",
        "bin/uname": "echo box",
        "bin/systemctl": "case $* in *ProtectHome*) echo tmpfs ;; esac",
        "bin/systemd-run": 'echo systemd-run; printf "%s\\n" "$@"; exit 75',
        "opt/venv/bin/python": """
[ "$3" != --version ] || { echo "s3_backup_lnd_channels.py 0.1.0"; exit; }
echo python
printf "%s\\n" "$@"
env | grep ^AWS_ | sort
exit 78
""",
    }
    for name, content in stubs.items():
        write_script(tmp_path / name, content)
    (tmp_path / "opt/s3_backup_lnd_channels.py").write_text("the program\n", encoding="utf-8")
    for name in ("lnd-backup-env", "lnd-backup@alice-env"):
        (tmp_path / name).write_text("S3_BUCKET_NAME=b\n", encoding="utf-8")

    def run_wrapper(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path}/bin:/usr/bin:/bin"
        return run_command(tmp_path / "lnd-backup", *args, env={"PATH": path} | env)

    return run_wrapper


@pytest.fixture
def stored_key(tmp_path: Path) -> Path:
    """Return the key in the credential store of that machine."""
    key = tmp_path / "aws-credentials"
    key.touch()
    return key


@pytest.mark.parametrize("command", ["once", "check"])
def test_once_and_check_run_as_the_service(
    command: str, wrapper: Wrapper, stored_key: Path, tmp_path: Path
) -> None:
    """They get the service's user, settings, mounts and stored key; their exit code is kept."""
    done = wrapper(command, "--json")
    told = done.stdout.splitlines()
    assert done.returncode == 75
    assert told[0] == "systemd-run"
    assert {
        "--property=User=lnd-backup",
        f"--property=EnvironmentFile={tmp_path}/lnd-backup-env",
        f"--property=LoadCredential=aws-credentials:{stored_key}",
        "--property=ProtectHome=tmpfs",
        "--property=UMask=0077",
    } <= set(told)
    program = [f"{tmp_path}/opt/venv/bin/python", "-I", f"{tmp_path}/opt/s3_backup_lnd_channels.py"]
    assert told[-5:] == [*program, command, "--json"]


def test_another_node_has_other_settings(wrapper: Wrapper, tmp_path: Path) -> None:
    """@NODE names the instance, for both kinds of commands; one without settings is refused."""
    told = wrapper("@alice", "check").stdout.splitlines()
    assert f"--property=EnvironmentFile={tmp_path}/lnd-backup@alice-env" in told
    assert "--property=StateDirectory=lnd-backup@alice" in told
    assert f"\n{tmp_path}/lnd-backup@alice-env\n" in wrapper("@alice", "list").stdout
    assert wrapper("@bob", "once").returncode == 78


def test_list_and_restore_run_as_the_caller(
    wrapper: Wrapper, stored_key: Path, tmp_path: Path
) -> None:
    """They are started directly, with the service's settings and stored keys."""
    done = wrapper("restore", "--output", "a b")
    assert done.returncode == 78
    assert done.stdout.splitlines() == [
        *("python", "-I", f"{tmp_path}/opt/s3_backup_lnd_channels.py"),
        *("--env-file", f"{tmp_path}/lnd-backup-env"),
        *("restore", "--output", "a b"),
        f"AWS_SHARED_CREDENTIALS_FILE={stored_key}",
    ]


@pytest.mark.usefixtures("stored_key")
def test_credentials_of_the_caller_stand_alone(wrapper: Wrapper) -> None:
    """Who names a profile or a key gets nothing of the service's: empty variables keep it out."""
    told = wrapper("list", AWS_PROFILE="reader's").stdout
    assert re.findall("^AWS_.*", told, re.MULTILINE) == [
        "AWS_ACCESS_KEY_ID=",
        "AWS_PROFILE=reader's",
        "AWS_SECRET_ACCESS_KEY=",
        "AWS_SESSION_TOKEN=",
        "AWS_SHARED_CREDENTIALS_FILE=",
    ]


def test_settings_of_the_caller_stand_alone(wrapper: Wrapper, tmp_path: Path) -> None:
    """With an --env-file of the caller's the service's is left out."""
    (tmp_path / "aws-credentials").touch()  # the service's key is left out, too
    for line in (["--env-file", "mine", "list"], ["list", "--env-file", "mine"]):
        assert wrapper(*line).stdout.splitlines()[3:] == line


def test_a_node_that_is_not_there(wrapper: Wrapper) -> None:
    """A misspelt name is told, for the commands of the caller as well."""
    done = wrapper("@bob", "list", TEST_UID="1000")
    assert (done.returncode, done.stdout) == (78, "")


@pytest.mark.parametrize("command", ["check", "@alice check", "card", "test-alert"])
def test_the_wrapper_wants_root(command: str, wrapper: Wrapper) -> None:
    """An ordinary user is told what to type."""
    refused = wrapper(*command.split(), TEST_UID="1000")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"sudo lnd-backup {command}" in refused.stderr


@pytest.mark.parametrize(
    "line", ["run", "", "--env-file mine", "--env-file=mine once", "check --env-file mine"]
)
def test_what_the_wrapper_refuses(line: str, wrapper: Wrapper) -> None:
    """It does not run the daemon, nor a command of the service's with settings of the caller's."""
    done = wrapper(*line.split())
    assert (done.returncode, done.stdout) == (2, "")


def test_help_needs_nobody(wrapper: Wrapper) -> None:
    assert wrapper("--help", TEST_UID="1000").stdout.endswith("\n--help\n")


def test_the_card_is_that_of_the_recovery_page_and_holds_no_secret(
    wrapper: Wrapper, tmp_path: Path
) -> None:
    """Line by line it is the card of docs/recovery.md, filled in with what the settings hold."""
    secret = "wJalrXUtnFEMI"
    (tmp_path / "lnd-backup@alice-env").write_text(
        "S3_BUCKET_NAME=old\nS3_BUCKET_NAME=my-bucket\nS3_BACKUP_PREFIX='node 1/'\n"
        f"AWS_ENDPOINT_URL_S3=https://me:{secret}@s3.example.org\nAWS_REGION=eu-central-1\n"
        f"AWS_ACCESS_KEY_ID=AKIA{secret}\nAWS_SECRET_ACCESS_KEY={secret}\n"
        f"HEARTBEAT_URL=https://hc.example.org/{secret}\n",
        encoding="utf-8",
    )
    done = wrapper("@alice", "card")
    assert done.returncode == 0, done.stderr
    card = done.stdout
    assert secret not in card
    assert {
        "node (name, public key)  box, alice, " + "_" * 51,
        "bucket   my-bucket",
        "prefix   node 1/",
        "endpoint https://s3.example.org",
        "region   eu-central-1",
    } <= set(card.splitlines())
    assert re.search("version  0.1.0  from", card)
    assert hashlib.sha256(b"the program\n").hexdigest() in card
    page = (CHECKOUT / "docs/recovery.md").read_text(encoding="utf-8")
    blank = page.partition("## Recovery card")[2].split("```")[1].removeprefix("text\n")
    labels = re.split("_{3,}|\n", blank)
    assert len(labels) > 15
    for name in map(str.strip, labels):
        assert name in card, name
    aws = wrapper("card").stdout
    assert "endpoint AWS\n" in aws
    assert "node (name, public key)  box, ___" in aws


# --- What the check says, and who hears of it ---


@pytest.mark.parametrize(
    ("codes", "level"),
    [("0", 6), ("75", 5), ("1 0", 6), ("1 75", 5), ("1 1", 3), ("78 78", 3)],
)
def test_a_check_that_fails_is_asked_again(codes: str, level: int, tmp_path: Path) -> None:
    """Only what fails twice is a failure; the last words reach the journal and the alert."""
    code = int(codes.rsplit(maxsplit=1)[-1])
    left = tmp_path / "codes"
    left.write_text(f"{codes}\n", encoding="utf-8")
    check = write_script(
        tmp_path / "check",
        f"""
read -r code left <{left}
echo "$left" >{left}
echo "run with $code"
echo "hint: of $code" >&2
exit "$code"
""",
    )
    env = {"RUNTIME_DIRECTORY": str(tmp_path), "INVOCATION_ID": "abc", "AGAIN_SECONDS": "0"}
    done = run_command(SYSTEMD / "check-twice", check, env=env)
    assert done.returncode == code
    assert done.stdout.endswith(f"<{level}>run with {code}\n<{level}>hint: of {code}\n")
    kept = (tmp_path / "said").read_text(encoding="utf-8")
    assert kept == f"abc\nrun with {code}\nhint: of {code}\n"
    assert left.read_text(encoding="utf-8") == "\n", "no more than twice"


class Teller:
    """alert.py with a clock, a mail and a POST that are made up."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.directory = monkeypatch, directory
        self.now, self.state = 1_800_000_000.0, "active"
        self.mails: list[str] = []
        self.posts: list[str] = []
        self.broken: set[str] = set()
        self.failure: type[BaseException] = OSError
        monkeypatch.setenv("STATE_DIRECTORY", str(directory))
        monkeypatch.setenv("ALERT_MAIL", "me@example.org")
        monkeypatch.setenv("ALERT_URL", "https://ntfy.example.org/secret")
        monkeypatch.setattr(alert, "SAID", directory)
        monkeypatch.setattr(alert, "output", lambda *_: self.state)
        monkeypatch.setattr(alert, "send_mail", partial(self.keep, "ALERT_MAIL", self.mails))
        monkeypatch.setattr(alert, "post", partial(self.keep, "ALERT_URL", self.posts))
        monkeypatch.setattr("socket.gethostname", lambda: "box")

    def keep(self, way: str, into: list[str], _: str, subject: str, __: str) -> None:
        """Keep the subject of a message, or fail."""
        if way in self.broken:
            raise self.failure("secret")
        into.append(subject)

    def ended(self, unit: str, status: int | str, *said: str, result: str = "exit-code") -> int:
        """Let a unit end with this exit code, having said this, and return the alert's own."""
        result = "success" if status in {0, 75} else result
        self.monkeypatch.setenv("MONITOR_SERVICE_RESULT", result)
        self.monkeypatch.setenv("MONITOR_EXIT_STATUS", str(status))
        self.monkeypatch.setenv("MONITOR_INVOCATION_ID", "i")
        if check := re.fullmatch("lnd-backup-check@(.+).service", unit):
            said_by_it = self.directory / check[1] / "said"
            said_by_it.parent.mkdir(exist_ok=True)
            said_by_it.write_text("\n".join(("i", *said)), encoding="utf-8")
        return alert.main(unit, lambda: self.now)


CHECK = "lnd-backup-check@lnd-backup.service"
REFUSED = "NOT BACKED UP: S3 has refused the key since 14:05 (HTTP 403)"
FINE = "BACKED UP: s3://b/box/x holds these bytes, stored 3 s ago"


@pytest.fixture
def teller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Teller:
    return Teller(tmp_path, monkeypatch)


def test_a_failure_is_told_once_a_day_and_its_end_once(teller: Teller) -> None:
    """The first failed check tells, those of the next day do not, the one after that does; a check
    that could not ask changes nothing; the first good one tells that it is over.
    """
    for _ in range(23):
        assert teller.ended(CHECK, 1, REFUSED, "hint: make a new key") == 0
        teller.now += 3600
    assert teller.mails == teller.posts == [f"box: lnd-backup: {REFUSED}"]
    assert teller.ended(CHECK, 75, "UNKNOWN: S3 is out of reach") == 0
    teller.now += 3300  # the timer's delay is random: a little early
    teller.ended(CHECK, 1, REFUSED)
    assert teller.mails == teller.posts == [f"box: lnd-backup: {REFUSED}"] * 2
    for _ in range(2):
        teller.now += 3600
        assert teller.ended(CHECK, 0, FINE) == 0
    again = "box: lnd-backup: BACKED UP again: s3://b/box/x holds these bytes, stored 3 s ago"
    assert teller.mails == teller.posts == [f"box: lnd-backup: {REFUSED}"] * 2 + [again]
    teller.now += 3600
    teller.ended(CHECK, 1, REFUSED)
    assert len(teller.mails) == len(teller.posts) == 4


@pytest.mark.parametrize("full", ["STATE_DIRECTORY", "RUNTIME_DIRECTORY"])
def test_a_full_disk_does_not_make_it_hourly(
    teller: Teller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """What went out is remembered in two directories, of which one is enough, also at the end."""
    for name in ("STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / full / f"{CHECK}.partial").mkdir()  # no file can be written there, not even by root
    for status, said in ((1, REFUSED), (1, REFUSED), (0, FINE), (0, FINE)):
        assert teller.ended(CHECK, status, said) == 0
        teller.now += 3600
    assert teller.mails == teller.posts
    assert [mail.split()[2] for mail in teller.mails] == ["NOT", "BACKED"]


def test_a_way_that_works_is_remembered_before_the_next_is_tried(teller: Teller) -> None:
    """It may be ended while the other side of the next way hangs."""
    teller.broken = {"ALERT_URL"}
    teller.failure = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        teller.ended(CHECK, 1, REFUSED)
    teller.broken = set()
    teller.ended(CHECK, 1, REFUSED)
    assert (len(teller.mails), len(teller.posts)) == (1, 1)


def test_nobody_hears_of_what_is_well_or_passes(teller: Teller) -> None:
    """Neither a good check nor one that could not ask is told, however often."""
    for said, status in ((FINE, 0), ("UNKNOWN: S3 is out of reach", 75)) * 3:
        assert teller.ended(CHECK, status, said) == 0
    assert teller.mails == teller.posts == []


def test_each_way_is_told_by_itself(teller: Teller, capsys: pytest.CaptureFixture[str]) -> None:
    """A way that fails is tried again after the next check, the other is not bothered again; so it
    is with the end. No secret is printed.
    """
    teller.broken = {"ALERT_URL"}
    assert teller.ended(CHECK, 1, REFUSED) == 1
    teller.broken = set()
    assert teller.ended(CHECK, 1, REFUSED) == 0
    assert len(teller.mails) == len(teller.posts) == 1
    teller.broken = {"ALERT_MAIL"}
    assert teller.ended(CHECK, 0, FINE) == 1
    teller.broken = set()
    assert teller.ended(CHECK, 0, FINE) == 0
    assert len(teller.mails) == len(teller.posts) == 2
    printed = capsys.readouterr().out
    assert "<3>cannot send the message by ALERT_URL: OSError" in printed
    assert "secret" not in printed
    assert f"<2>box: lnd-backup: {REFUSED}" in printed


def test_each_node_is_told_of_by_its_name(teller: Teller) -> None:
    """The check of one node says nothing of another."""
    teller.ended(CHECK, 1, REFUSED)
    teller.ended("lnd-backup-check@lnd-backup@alice.service", 1, "NOT BACKED UP: no bucket")
    teller.ended("lnd-backup-check@lnd-backup@alice.service", 0, FINE)
    assert [mail.split(": ")[1:3] for mail in teller.mails] == [
        ["lnd-backup", "NOT BACKED UP"],
        ["lnd-backup@alice", "NOT BACKED UP"],
        ["lnd-backup@alice", "BACKED UP again"],
    ]


@pytest.mark.parametrize(
    ("status", "result", "words"),
    [
        (78, "exit-code", "its settings are wrong"),
        (1, "start-limit-hit", "it failed or was restarted eight times in ten minutes"),
        (1, "watchdog", "it did not look at channel.backup for three minutes"),
        (226, "exit-code", "a directory that a drop-in names is missing"),
        (1, "exit-code", "it ended with exit code 1"),
        ("", "exit-code", "it did not start"),
        ("SEGV", "signal", "the signal SEGV ended it"),
        ("", "protocol", 'systemd calls the reason "protocol"'),
    ],
)
def test_a_service_that_stopped_is_told_in_words(
    status: int | str, result: str, words: str, teller: Teller
) -> None:
    """Its failure is told at once, and that it is over only when a check is good and it runs."""
    teller.ended("lnd-backup.service", status, result=result)
    told = f"box: lnd-backup has stopped: {words}. New versions of channel.backup are not stored"
    assert teller.mails == [told]
    teller.state = "failed"
    teller.ended(CHECK, 0, FINE)
    assert teller.mails == [told]
    teller.state = "active"
    teller.ended(CHECK, 0, FINE)
    assert len(teller.mails) == 2
    assert teller.mails[1].startswith("box: lnd-backup: BACKED UP again: ")


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["2026-11-28 14:04:00 using x", "NOT BACKED UP: a"], "NOT BACKED UP: a"),
        (["2026-11-28 14:05:00 error: cannot store: b", "hint: c", "UNKNOWN: d"], "UNKNOWN: d"),
        (["NOT BACKED UP: \x1b[2Je"], "NOT BACKED UP: ?[2Je"),
        (["2026-11-28 14:04:00 using x", "hint: h",
          "2026-11-28 14:05:00 error: configuration: X=: is not set"],
         "UNKNOWN: the check could not ask S3: configuration: X=: is not set"),
        ([], "UNKNOWN: the check did not run: its settings are wrong"),
    ],
)  # fmt: skip
def test_the_sentence_is_what_the_check_said(
    said: list[str], sentence: str, teller: Teller
) -> None:
    """The verdict is the subject; without one it is what went wrong, in one line."""
    teller.ended(CHECK, 78, *said)
    assert teller.mails == [f"box: lnd-backup: {sentence}"]


def test_what_an_earlier_check_said_counts_no_more(teller: Teller) -> None:
    """A check that did not come to speak is not told in the words of the one before."""
    teller.ended(CHECK, 0, FINE)
    assert alert.what_it_said("lnd-backup", "i") == [FINE]
    assert alert.what_it_said("lnd-backup", "another") == []


@pytest.mark.parametrize(
    "kept", ["", "[]", '{"journal": "x"}', '{"journal": null}', "\x00", '{"ALERT_MAIL": 9e9}']
)
def test_a_state_that_cannot_be_read_is_none(kept: str, teller: Teller) -> None:
    """Rather told twice than not at all; nothing was told at a time in the future."""
    (teller.directory / f"{CHECK}.json").write_text(kept, encoding="utf-8")
    assert teller.ended(CHECK, 1, REFUSED) == 0
    assert len(teller.mails) == 1


def test_a_test_goes_out_by_every_way(
    teller: Teller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent by each way, and says so; a way that fails, and no way at all, is a failure."""
    assert alert.main("test-alert") == 0
    assert len(teller.mails) == len(teller.posts) == 1
    assert "<5>sent: ALERT_MAIL\n<5>sent: ALERT_URL\n" in capsys.readouterr().out
    assert not list(teller.directory.iterdir()), "it is no incident"
    teller.broken = {"ALERT_MAIL"}
    assert alert.main("test-alert") == 1
    monkeypatch.delenv("ALERT_MAIL")
    monkeypatch.delenv("ALERT_URL")
    capsys.readouterr()
    assert alert.main("test-alert") == 1
    assert "hint: sudoedit /etc/default/lnd-backup-alert" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sendmail", "told"),
    [(None, "there is no {}"), ("exit 75", "{} ended with exit code 75")],
    ids=["none", "one that fails"],
)
def test_a_mail_that_fails_says_how(
    sendmail: str | None,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What became of sendmail is told, without the address."""
    path = tmp_path / "sendmail"
    if sendmail:
        write_script(path, sendmail)
    monkeypatch.setattr(alert, "SENDMAIL", str(path))
    monkeypatch.setenv("ALERT_MAIL", "me@example.org")
    assert alert.main("test-alert") == 1
    printed = capsys.readouterr().out
    assert printed == f"<3>cannot send the message by ALERT_MAIL: {told.format(path)}\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "HTTP 404 Not Found"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "HTTP 302 Found"),
        (b"220 this is a mail server\r\n", "BadStatusLine"),
    ],
)
def test_a_post_that_fails_says_how(
    answer: bytes, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the other side answered is told, without the URL; also if it does not speak HTTP."""
    with RawS3(lambda _: [answer]) as server:
        monkeypatch.setenv("ALERT_URL", f"{server.endpoint}/secret")
        assert alert.main("test-alert") == 1
    printed = capsys.readouterr().out
    assert printed == f"<3>cannot send the message by ALERT_URL: {told}\n"


def test_a_post_that_never_ends_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each part of the answer is in time; systemd would end the alert before it remembers."""
    monkeypatch.setattr(alert, "PATIENCE_SECONDS", 0.5)
    with RawS3(lambda _: islice(answers.continuing(), 1000)) as server:  # it lasts for 10 s
        monkeypatch.setenv("ALERT_URL", f"{server.endpoint}/secret")
        assert alert.main("test-alert") == 1
    assert capsys.readouterr().out == "<3>cannot send the message by ALERT_URL: TimeoutError\n"


def test_a_message_is_posted_whole_and_not_too_long() -> None:
    """The body is UTF-8, begins with the sentence, and is cut between two characters."""
    with FakeS3(defaults={"POST": Answer()}) as server:
        alert.post(f"{server.endpoint}/x", "NOT BACKED UP: ü", "ü" * 5000)
    (request,) = server.requests
    assert request.body.decode().startswith("NOT BACKED UP: ü\n\nüü")
    assert 3400 < len(request.body) <= 3500
    with pytest.raises(ValueError, match="not http"):
        alert.post("file:///etc/passwd", "x", "y")
