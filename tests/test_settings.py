"""Every setting: what is accepted, and that faults are told all at once, with what to do."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import tempfile
from typing import TYPE_CHECKING

import boto3
import pytest
from botocore.configprovider import BOTOCORE_DEFAUT_SESSION_VARIABLES
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import CHECKOUT, SCRIPT, FakeS3, Lnd, S3Server, as_nobody, settings_at
from shared import UNPRINTABLE, done_well, env_file, refused, start

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from pathlib import Path

    from shared import Env

REQUIRED = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "S3_BUCKET_NAME")
SESSION = boto3.Session(region_name="us-east-1")
NEW_CLIENT = functools.cache(program.new_client)


@pytest.fixture(autouse=True)
def _one_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the SDK's client once for all tests inside this process, since that takes a while."""
    monkeypatch.setattr(boto3, "Session", lambda **_: SESSION)
    monkeypatch.setattr(program, "new_client", NEW_CLIENT)


def faults(environ: Env) -> dict[str, program.ConfigError]:
    """Return the faults by variable; each is wrong configuration and says what to do."""
    failures: list[program.ConfigError] = []
    try:
        program.load_settings(environ, "run")
    except* program.ConfigError as group:
        failures = [each for each in group.exceptions if isinstance(each, program.ConfigError)]
    found = {re.split("[ =:]+", str(failure))[1]: failure for failure in failures}
    assert len(found) == len(failures)
    assert all(failure.exit_code == 78 and failure.hint for failure in failures)
    return found


def only_fault(environ: Env, name: str, value: Path | str) -> program.ConfigError:
    """Return the fault of this value, which must be the only one and show it."""
    found = faults(environ | {name: str(value)})
    assert list(found) == [name]
    assert f"{name}={value}" in str(found[name])
    return found[name]


# --- Each variable ---


def test_good_settings_are_taken_as_they_are(good: Env, lnd: Lnd, staging: Path) -> None:
    found = program.load_settings(good, "run")
    assert found[:4] == (lnd.path, staging, "bucket", "")
    assert found[4:7] == (60.0, 86400.0, 10.0)
    assert "geheim" not in repr(found)


def test_required_variable_that_is_absent_or_empty_is_a_fault(good: Env) -> None:
    absent = {name: value for name, value in good.items() if name not in REQUIRED}
    for environ in (absent, good | dict.fromkeys(REQUIRED, "")):
        found = faults(environ)
        assert list(found) == list(REQUIRED)
        assert all("is not set" in str(fault) for fault in found.values())


OPTIONAL = [name for name in program.SETTINGS if name not in REQUIRED] + ["STATE_DIRECTORY"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_variable_that_is_empty_counts_as_absent(name: str, good: Env) -> None:
    absent = program.load_settings(good, "run")
    assert program.load_settings(good | {name: ""}, "run") == absent


PATHS = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "METRICS_FILE", "COPY_DIRECTORY")
WRONG = {
    **dict.fromkeys(PATHS, ('"/a"', "${HOME}/a", " /a", "./a", "~/a")),
    "S3_BUCKET_NAME": (
        "bucket/",
        "bucket/a",
        "arn:foo/bar",
        "ab",
        "my bucket",
        "bucket ",
        "${B}",
        '"b"',
        "b#c",
    ),
    "S3_BACKUP_PREFIX": ("/", "x" * 242, "ü" * 513),
    "RESCAN_SECONDS": ("0.0", "-1", "1e3", "60s", " 60", "60 ", "nan", "\u0663", "1,5", "9" * 400),
    "REFRESH_SECONDS": ("-0", "daily", "inf", "1_000"),
    "SHUTDOWN_GRACE_SECONDS": ("-1", "nan", "+1"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_a_fault_that_shows_it(name: str, value: str, good: Env) -> None:
    """A path has to be absolute."""
    hint = only_fault(good, name, value).hint
    assert ("absolute path" in hint) == (name in PATHS)


ARN = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
RIGHT: list[tuple[str, str, str, object]] = [
    ("S3_BUCKET_NAME", "abc", "bucket", "abc"),
    ("S3_BUCKET_NAME", "my.bucket-1", "bucket", "my.bucket-1"),
    ("S3_BUCKET_NAME", "My_Old_Bucket", "bucket", "My_Old_Bucket"),
    ("S3_BUCKET_NAME", ARN, "bucket", ARN),
    ("S3_BUCKET_NAME", ARN.replace("/", ":"), "bucket", ARN.replace("/", ":")),
    ("S3_BACKUP_PREFIX", "node1", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "node1/", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "a/b/c", "prefix", "a/b/c/"),
    ("S3_BACKUP_PREFIX", ".hidden/a..b", "prefix", ".hidden/a..b/"),
    ("S3_BACKUP_PREFIX", """a b#${A}"'\\ü""", "prefix", """a b#${A}"'\\ü/"""),
    ("S3_BACKUP_PREFIX", UNPRINTABLE, "prefix", f"{UNPRINTABLE}/"),
    ("S3_BACKUP_PREFIX", "ü" * 240, "prefix", "ü" * 240 + "/"),
    ("RESCAN_SECONDS", "0.5", "rescan_seconds", 0.5),
    ("RESCAN_SECONDS", "3600", "rescan_seconds", 3600.0),
    ("REFRESH_SECONDS", "0", "refresh_seconds", 0.0),
    ("REFRESH_SECONDS", "604800", "refresh_seconds", 604800.0),
    ("SHUTDOWN_GRACE_SECONDS", "0", "grace_seconds", 0.0),
    ("SHUTDOWN_GRACE_SECONDS", "2.25", "grace_seconds", 2.25),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), RIGHT)
def test_right_value_is_taken(
    name: str, value: str, field: str, expected: object, good: Env
) -> None:
    """A prefix gets the slash that it lacks."""
    assert getattr(program.load_settings(good | {name: value}, "run"), field) == expected


@settings(deadline=None)
@given(
    st.sampled_from(list(program.SETTINGS)),
    st.text(st.characters(exclude_characters="\0", codec="utf-8")),
)
def test_any_value_is_taken_or_a_fault(name: str, value: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        environ = {
            "MONITOR_FILE_PATH": f"{directory}/lnd/channel.backup",
            "BACKUP_DIRECTORY": f"{directory}/staging",
            "S3_BUCKET_NAME": "bucket",
        }
        assert set(faults(environ | {name: value})) <= {name, "BACKUP_DIRECTORY"}


# --- MONITOR_FILE_PATH ---


FORBIDDEN = [
    "channel.db",
    "wallet.db",
    "Wallet.DB",
    "channel.sqlite",
    "lnd.sqlite3-wal",
    "admin.macaroon",
    "x.MACAROON",
    "hsm_secret",
    "walletunlock.json",
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_file_that_must_never_be_copied_is_a_fault(name: str, lnd: Lnd, good: Env) -> None:
    """Its name is a fault also behind a link."""
    (lnd.directory / name).write_bytes(b"secret")
    lnd.path.symlink_to(name)
    for path in (lnd.directory / name, lnd.path):
        assert "channel.backup" in only_fault(good, "MONITOR_FILE_PATH", path).hint


@pytest.mark.parametrize(
    "name", ["channel.backup", "channels.backup", "my.db", "macaroon", "sqlite", "channel.db.txt"]
)
def test_any_other_name_is_taken(name: str, lnd: Lnd, good: Env) -> None:
    """The file need not be there."""
    assert faults(good | {"MONITOR_FILE_PATH": str(lnd.directory / name)}) == {}


@pytest.mark.parametrize("name", ["", "/"])
def test_directory_in_place_of_the_file_is_a_fault(name: str, lnd: Lnd, good: Env) -> None:
    """What lies beside that directory is not blamed for it."""
    fault = only_fault(good, "MONITOR_FILE_PATH", f"{lnd.directory}{name}")
    assert str(lnd.path) in fault.hint


def test_the_path_of_a_node_is_told(good: Env) -> None:
    """An @ alone makes no secret of it."""
    fault = only_fault(good, "METRICS_FILE", "/run/lnd-backup@alice/metrics.prom")
    assert "METRICS_FILE=/run/lnd-backup@alice/metrics.prom: " in str(fault)


def test_loop_of_links_is_no_crash(lnd: Lnd, good: Env) -> None:
    lnd.path.symlink_to(lnd.path)
    assert set(faults(good)) <= {"MONITOR_FILE_PATH"}


# --- BACKUP_DIRECTORY ---


@pytest.mark.parametrize(
    ("file", "directory"),
    [
        ("lnd", "lnd"),
        ("lnd", "lnd/backup"),
        ("lnd", "lnd/chan-backup-archives/backup"),
        ("lnd", "link/backup"),
        ("link", "lnd/backup"),
        ("link", "elsewhere"),
    ],
)
def test_lnds_own_directory_is_a_fault(
    file: str, directory: str, lnd: Lnd, good: Env, tmp_path: Path
) -> None:
    """So is that of what the file links to, and any below them, also behind a link."""
    (tmp_path / "link").symlink_to(lnd.directory)
    (tmp_path / "elsewhere").mkdir()
    lnd.path.symlink_to(tmp_path / "elsewhere" / "channel.backup")
    good["MONITOR_FILE_PATH"] = str(tmp_path / file / "channel.backup")
    assert "LND" in str(only_fault(good, "BACKUP_DIRECTORY", tmp_path / directory))


@pytest.mark.parametrize(
    "name", ["wallet.db", "channel.db", "readonly.macaroon", "chan-backup-archives"]
)
def test_directory_with_lnds_files_is_a_fault(name: str, staging: Path, good: Env) -> None:
    """Neither staging nor metrics go there, whatever MONITOR_FILE_PATH says."""
    (staging / name).touch()
    found = faults(good | {"METRICS_FILE": str(staging / "lnd.prom")})
    assert found.keys() == {"BACKUP_DIRECTORY", "METRICS_FILE"}
    assert all("LND" in str(fault) for fault in found.values())


def test_directory_with_lnds_files_that_cannot_be_listed_is_a_fault(
    public: Path, good: Env
) -> None:
    """The user may enter it, and so see a file whose name it knows."""
    (public / "lnd").mkdir()
    (public / "lnd" / "wallet.db").touch()
    (public / "lnd").chmod(0o111)
    good["MONITOR_FILE_PATH"] = str(public / "channel.backup")
    with as_nobody():
        assert "LND" in str(only_fault(good, "BACKUP_DIRECTORY", public / "lnd"))
    (public / "lnd").chmod(0o755)  # so that it can be removed


@pytest.mark.parametrize("name", ["link", "dangling", "loop", "file"])
def test_link_as_staging_directory_is_a_fault(name: str, good: Env, tmp_path: Path) -> None:
    """Nor is a file one."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch(mode=0o600)
    fault = only_fault(good, "BACKUP_DIRECTORY", tmp_path / name)
    assert "is a link or no directory" in str(fault)


def test_effective_user_must_own_the_directory(
    staging: Path, good: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the effective user; the hint names a directory that it can make itself."""
    monkeypatch.setattr(os, "geteuid", lambda: staging.stat().st_uid + 1)
    failure = only_fault(good, "BACKUP_DIRECTORY", staging)
    assert str(staging.stat().st_uid) in str(failure)
    [inside] = re.findall(rf"{staging}/\S+", failure.hint)
    assert faults(good | {"BACKUP_DIRECTORY": inside}) == {}


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o770, 0o777, 0o1777, 0o000, 0o500, 0o600])
def test_directory_that_others_can_write_is_a_fault(mode: int, staging: Path, good: Env) -> None:
    """So is one that its owner cannot use; it is taken when the hint was followed."""
    staging.chmod(mode)
    follow(only_fault(good, "BACKUP_DIRECTORY", staging).hint)
    assert faults(good) == {}


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_directory_that_others_can_only_read_is_taken(mode: int, staging: Path, good: Env) -> None:
    """The one that systemd makes is such a one."""
    staging.chmod(mode)
    assert faults(good) == {}


def test_directory_that_cannot_be_made_is_a_fault(public: Path, good: Env) -> None:
    good["MONITOR_FILE_PATH"] = str(public / "lnd" / "channel.backup")
    public.chmod(0o555)
    with as_nobody():
        only_fault(good, "BACKUP_DIRECTORY", public / "staging")


def test_missing_directory_is_made_later(tmp_path: Path, good: Env) -> None:
    """Reading the settings does not make it."""
    directory = tmp_path / "new"
    found = program.load_settings(good | {"BACKUP_DIRECTORY": str(directory)}, "run")
    assert found.staging == directory
    assert not directory.exists()


def follow(hint: str) -> None:
    """Run the command that the hint names, as the user that runs the tests."""
    match = re.search(r"run: (?:sudo )?(.*)", hint)
    assert match, hint
    subprocess.run(shlex.split(match[1]), check=True)


@pytest.mark.parametrize("name", ["parent", "a parent", "it's"])
def test_hint_for_a_missing_parent_mends_it(name: str, tmp_path: Path, good: Env) -> None:
    """The command in the hint makes the directory as it must be."""
    directory = tmp_path / name / "staging"
    follow(only_fault(good, "BACKUP_DIRECTORY", directory).hint)
    assert faults(good | {"BACKUP_DIRECTORY": str(directory)}) == {}


def test_directory_that_systemd_made_is_the_default(lnd: Lnd, staging: Path, good: Env) -> None:
    """It may be the first of several; beside BACKUP_DIRECTORY, it means nothing."""
    empty = good | {"BACKUP_DIRECTORY": ""}
    for environ, state in (good, "/elsewhere"), (empty, staging), (empty, f"{staging}:/elsewhere"):
        found = program.load_settings(environ | {"STATE_DIRECTORY": str(state)}, "run")
        assert found.staging == staging
    wrong = faults(empty | {"STATE_DIRECTORY": str(lnd.directory)})
    assert str(lnd.directory) in str(wrong["BACKUP_DIRECTORY"])


# --- All faults at once ---


@pytest.mark.parametrize("command", [[], ["once"]])
def test_all_faults_are_told_at_once(command: list[str], lnd: Lnd) -> None:
    """Each is a line with its value, unless that is a secret, and one with what to do."""
    wrong = {
        "MONITOR_FILE_PATH": str(lnd.directory),
        "BACKUP_DIRECTORY": str(lnd.directory / "missing" / "staging"),
        "S3_BUCKET_NAME": "s3://bucket",
        "S3_BACKUP_PREFIX": "/a",
        "RESCAN_SECONDS": "0",
        "REFRESH_SECONDS": "-1",
        "SHUTDOWN_GRACE_SECONDS": "ten",
        "METRICS_FILE": "metrics",
        "COPY_DIRECTORY": "copies",
    }
    secret = {
        "HEARTBEAT_URL": "geheim",
        "AWS_ACCESS_KEY_ID": " geheim",
        "AWS_SECRET_ACCESS_KEY": "ge heim",
        "AWS_SESSION_TOKEN": "geheim ",
    }
    lines = start(wrong | secret, *command)
    for name, value in wrong.items():
        assert sum(f" {name}={value}: " in line for line in lines) == 1, name
    for name in secret:
        assert sum(f"{name}=" in line for line in lines) == 1, name
    assert not any("heim" in line for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 13
    assert list(lnd.directory.iterdir()) == []


AWS_FAULTS = [
    {"AWS_PROFILE": "nix"},
    {"AWS_REQUEST_CHECKSUM_CALCULATION": "bogus"},
    {"AWS_REGION": "us east"},
    {"AWS_CONFIG_FILE": str(SCRIPT)},
    {"AWS_CA_BUNDLE": "/nowhere/ca.pem"},
    {"AWS_CA_BUNDLE": "/dev/null"},
    {"AWS_CA_BUNDLE": "/etc"},
    {"AWS_CA_BUNDLE": str(SCRIPT)},
    {"AWS_ENDPOINT_URL": "https://s3. example.org"},
    {"AWS_ENDPOINT_URL_S3": "s3.example.org"},
    {"AWS_ENDPOINT_URL_S3": "//s3.example.org"},
    {"AWS_ENDPOINT_URL_S3": "ftp://s3.example.org"},
    {"AWS_ENDPOINT_URL_S3": "http://host:port"},
    {"AWS_ENDPOINT_URL_S3": "https:///a"},
    {"AWS_ENDPOINT_URL_S3": "HTTPS"},
]


@pytest.mark.parametrize("wrong", AWS_FAULTS, ids=str)
def test_value_that_the_sdk_cannot_use_is_a_fault_that_shows_it(
    wrong: Env, good: Env, tmp_path: Path
) -> None:
    """It is told beside a fault of ours, before anything is made."""
    good["BACKUP_DIRECTORY"] = str(tmp_path / "new")
    if "AWS_ENDPOINT_URL" in wrong:
        del good["AWS_ENDPOINT_URL_S3"]
    lines = start(good | wrong | {"RESCAN_SECONDS": "0"}, "once")
    assert any("RESCAN_SECONDS=0" in line for line in lines)
    assert any(value in line for value in wrong.values() for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 2
    assert not (tmp_path / "new").exists()


# --- Misspelt names ---


MISSPELT = {
    "S3_PREFIX": "S3_BACKUP_PREFIX",
    "S3_BUCKET": "S3_BUCKET_NAME",
    "S3_PUT_EXTRA_ARG": "S3_PUT_EXTRA_ARGS",
    "HEARTBEAT_URl": "HEARTBEAT_URL",
    "REFRESH_SECOND": "REFRESH_SECONDS",
    "RESCAN_SECS": "RESCAN_SECONDS",
    "SHUTDOWN_GRACE_SECOND": "SHUTDOWN_GRACE_SECONDS",
    "METRIC_FILE": "METRICS_FILE",
    "COPY_DIRECTROY": "COPY_DIRECTORY",
    "BACKUP_DIRECTORIES": "BACKUP_DIRECTORY",
    "MONITORED_FILE_PATH": "MONITOR_FILE_PATH",
}
MISSPELT_IN_A_FILE = {
    "AWS_REGOIN": "AWS_REGION",
    "AWS_ENDPOINT_URL_S33": "AWS_ENDPOINT_URL_S3",
    "AWS_SECRET_ACESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "ENDPOINT": "",
    "PREFIX": "",
    "BUCKET_NAME": "",
}


@pytest.mark.unmeasured
def test_misspelt_names_are_warned_of(fake: FakeS3, written_env: Env, tmp_path: Path) -> None:
    """In the environment if they resemble one of ours, in a file always; the value may be a
    secret, and is not shown.
    """
    secret = "https://hc.example.org/s3cret"
    file = env_file(tmp_path, dict.fromkeys(MISSPELT_IN_A_FILE, secret))
    env = written_env | dict.fromkeys(MISSPELT, secret)
    said = done_well(env, "--env-file", file, "once").stderr
    for name, likely in (MISSPELT | MISSPELT_IN_A_FILE).items():
        assert re.search(rf"warning: {name} .*\b{likely}\b", said), name
    assert "s3cret" not in said
    assert len(fake.objects("some-bucket", "alice/")) == 1


def test_right_names_are_not_warned_of(fake: FakeS3, written_env: Env, tmp_path: Path) -> None:
    """Ours, those of the example, the SDK and the system; left empty, they count as not set."""
    example = (CHECKOUT / "lnd-backup-env.example").read_text(encoding="utf-8")
    names = {*OPTIONAL, *re.findall(r"^#?([A-Z_0-9]+)=", example, re.MULTILINE)}
    names |= set(re.findall(r"AWS_\w+", str(BOTOCORE_DEFAUT_SESSION_VARIABLES)))
    names |= {
        "AWS_ACCOUNT_ID",
        "AWS_CREDENTIAL_EXPIRATION",
        "AWS_ENDPOINT_URL_STS",
        "AWS_S3_USE_ARN_REGION",
        "AWS_SESSION_TOKEN",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "NO_PROXY",
    }
    empty = env_file(tmp_path, dict.fromkeys(names, ""))
    of_the_system = {"PYTHONUNBUFFERED": "1", "STATE_DIRECTORY": "/x", "INVOCATION_ID": "1"}
    done = done_well(written_env | of_the_system, "--env-file", empty, "once")
    assert "warning: " not in done.stderr
    assert len(fake.requests) == 1


# --- Odd characters ---


CONTROL = {
    "MONITOR_FILE_PATH": "/a\nb",
    "BACKUP_DIRECTORY": "/a\x7fb",
    "METRICS_FILE": "/srv/a\tb",
    "COPY_DIRECTORY": "/srv/a\x1b[31m",
    "S3_BUCKET_NAME": "some-bucket\n",
    "S3_BACKUP_PREFIX": "alice\r/",
    "S3_PUT_EXTRA_ARGS": "ACL=private\n",
    "HEARTBEAT_URL": "https://hc.example.org/s3cret\n",
    "RESCAN_SECONDS": "60\n",
    "AWS_REGION": "eu-central-1\n",
    "AWS_DEFAULT_REGION": "eu-central-1\n",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1\n",
    "AWS_ACCESS_KEY_ID": "AKID\n",
    "AWS_SECRET_ACCESS_KEY": "s3cret\u00a0",
    "AWS_SESSION_TOKEN": "s3cret\r",
    "AWS_PROFILE": "default\n",
    "AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt\n",
    "HTTPS_PROXY": "http://bob:s3cret@127.0.0.1:1\n",
    "HTTP_PROXY": "http://bob:s3cret@127.0.0.1:1\x85",
    "NO_PROXY": "a\udc80",
}


@pytest.mark.unmeasured
def test_control_characters(written_env: Env) -> None:
    """They are refused, as the line break that `echo` left; no secret is shown."""
    said = refused(written_env | CONTROL, *CONTROL)
    assert all(character.isprintable() for character in said if character != "\n")
    assert "s3cret" not in said


@pytest.mark.parametrize("arn", ["arn:aws:s3:::some-bucket", "arn:aws-cn:s3:::some-bucket/*"])
def test_a_bucket_by_its_arn(good: Env, arn: str) -> None:
    """The hint has the name to write."""
    hint = only_fault(good, "S3_BUCKET_NAME", arn).hint
    assert re.search(r"(?<!:)\bsome-bucket\b", hint)


ODD = 'it\'s "ノード" ä/#%20&b+c=d;e:f/$x{y}/' + UNPRINTABLE


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("prefix", "encoding"),
    [
        (ODD, {}),
        (ODD, {"PYTHONIOENCODING": "latin-1:strict"}),
        ("alice", {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}),
    ],
    ids=["utf-8", "latin", "C"],
)
def test_a_prefix_of_any_characters(
    s3: S3Server, bucket: str, lnd: Lnd, staging: Path, home: Path, prefix: str, encoding: Env
) -> None:
    """Every command takes whatever S3 takes, and escapes what its output cannot encode."""
    version = lnd.write()
    user = s3.read_write_user(bucket)
    env = settings_at(s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix, user=user)
    done_well(env)
    env |= encoding
    [(key, stored)] = s3.objects(bucket).items()
    assert key.startswith(f"{prefix}/")
    assert stored.data == version.data
    assert key.removeprefix(f"{prefix}/") in done_well(env, "list").stdout
    assert "BACKED UP" in done_well(env, "check").stdout
    restored = home / "копия"
    assert done_well(env, "restore", "--output", str(restored)).stdout
    assert restored.read_bytes() == version.data
