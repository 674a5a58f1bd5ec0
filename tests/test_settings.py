"""Every setting: what is accepted, and that faults are told all at once, with what to do."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import boto3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    NOBODY,
    SCRIPT,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    as_nobody,
    channel_backup,
    run_script,
    settings_at,
)
from shared import done_well, refused, start

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from pathlib import Path

REQUIRED = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "S3_BUCKET_NAME")
SESSION = boto3.Session(region_name="us-east-1")


@pytest.fixture(autouse=True)
def _one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the SDK's session once for all tests inside this process; a new one takes a while."""
    monkeypatch.setattr(boto3, "Session", lambda **_: SESSION)


def faults(environ: dict[str, str]) -> dict[str, program.ConfigError]:
    """Return the faults of a configuration by variable; each is wrong configuration and says what
    to do.
    """
    failures: list[program.ConfigError] = []
    try:
        program.load_settings(environ, "run")
    except* program.ConfigError as group:
        failures = [each for each in group.exceptions if isinstance(each, program.ConfigError)]
    found = {re.split("[ =:]+", str(failure))[1]: failure for failure in failures}
    assert len(found) == len(failures)
    assert all(failure.exit_code == 78 and failure.hint for failure in failures)
    return found


def warnings(done: subprocess.CompletedProcess[str]) -> str:
    """Return the warnings, each with its hint."""
    lines = done.stderr.splitlines()
    return "\n".join(line for line in lines if "warning: " in line or "hint: " in line)


# --- Each variable ---


def test_good_settings_are_taken_as_they_are(good: dict[str, str], lnd: Lnd, staging: Path) -> None:
    """Settings without a fault are returned with the defaults of the others."""
    found = program.load_settings(good, "run")
    assert (found.file, found.staging, found.bucket, found.prefix) == (
        lnd.path,
        staging,
        "bucket",
        "",
    )
    times = (found.rescan_seconds, found.refresh_seconds, found.grace_seconds)
    assert times == (60.0, 86400.0, 10.0)
    assert "geheim" not in repr(found)


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("value", [None, ""])
def test_required_variable_that_is_absent_or_empty_is_a_fault(
    name: str, value: str | None, good: dict[str, str]
) -> None:
    """A required variable must be there, and an empty one is not there."""
    del good[name]
    found = faults(good if value is None else good | {name: value})
    assert list(found) == [name]
    assert "is not set" in str(found[name])


OPTIONAL = [name for name in program.SETTINGS if name not in REQUIRED] + ["STATE_DIRECTORY"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_variable_that_is_empty_counts_as_absent(name: str, good: dict[str, str]) -> None:
    """An empty optional variable means its default; the SDK's: see EMPTY in test_s3."""
    absent = program.load_settings(good, "run")
    assert program.load_settings(good | {name: ""}, "run") == absent


WRONG = {
    "MONITOR_FILE_PATH": ["~/.lnd/channel.backup", "~lnd/channel.backup", "/a\nb"],
    "BACKUP_DIRECTORY": ["~/backup", "/a\nb"],
    "S3_BUCKET_NAME": [
        "s3://bucket",
        "bucket/",
        "bucket/a",
        "ab",
        "my bucket",
        "bucket ",
        "${B}",
        '"b"',
        "b#c",
        "a\nb",
    ],
    "S3_BACKUP_PREFIX": ["/", "/a", "a\nb", "x" * 1025],
    "RESCAN_SECONDS": [
        "0",
        "0.0",
        "-1",
        "1e3",
        "60s",
        " 60",
        "60 ",
        "nan",
        "inf",
        "\u0663",
        "1,5",
        "0x10",
        "9" * 400,
    ],
    "REFRESH_SECONDS": ["-1", "-0", "daily", "nan", "inf", "1_000", "1\n"],
    "SHUTDOWN_GRACE_SECONDS": ["-1", "ten", "nan", "inf", "+1"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_wrong_value_is_a_fault_that_shows_it(name: str, value: str, good: dict[str, str]) -> None:
    """A value that cannot be used is a fault with the variable and the value, and the only one."""
    found = faults(good | {name: value})
    assert list(found) == [name]
    assert f"{name}={value}" in str(found[name])


RIGHT: list[tuple[str, str, str, object]] = [
    ("S3_BUCKET_NAME", "abc", "bucket", "abc"),
    ("S3_BUCKET_NAME", "my.bucket-1", "bucket", "my.bucket-1"),
    ("S3_BUCKET_NAME", "My_Old_Bucket", "bucket", "My_Old_Bucket"),
    (
        "S3_BUCKET_NAME",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
        "bucket",
        "arn:aws:s3:us-east-1:123456789012:accesspoint/mine",
    ),
    ("S3_BACKUP_PREFIX", "node1", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "node1/", "prefix", "node1/"),
    ("S3_BACKUP_PREFIX", "a/b/c", "prefix", "a/b/c/"),
    ("S3_BACKUP_PREFIX", ".hidden/a..b", "prefix", ".hidden/a..b/"),
    ("S3_BACKUP_PREFIX", """a b#${A}"'\\ü""", "prefix", """a b#${A}"'\\ü/"""),
    ("RESCAN_SECONDS", "0.5", "rescan_seconds", 0.5),
    ("RESCAN_SECONDS", "3600", "rescan_seconds", 3600.0),
    ("REFRESH_SECONDS", "0", "refresh_seconds", 0.0),
    ("REFRESH_SECONDS", "604800", "refresh_seconds", 604800.0),
    ("SHUTDOWN_GRACE_SECONDS", "0", "grace_seconds", 0.0),
    ("SHUTDOWN_GRACE_SECONDS", "2.25", "grace_seconds", 2.25),
]


@pytest.mark.parametrize(("name", "value", "field", "expected"), RIGHT)
def test_right_value_is_taken(
    name: str, value: str, field: str, expected: object, good: dict[str, str]
) -> None:
    """A value within the rules is taken, and a prefix gets the slash that it lacks."""
    assert getattr(program.load_settings(good | {name: value}, "run"), field) == expected


@pytest.mark.parametrize(
    "name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
)
@pytest.mark.parametrize("value", [" geheim", "geheim ", "ge heim", "geheim\n", "\tgeheim"])
def test_blank_in_a_key_is_a_fault_that_does_not_show_it(
    name: str, value: str, good: dict[str, str]
) -> None:
    """A blank that was copied along with a key is a fault with the variable, and without the
    value.
    """
    found = faults(good | {name: value})
    assert list(found) == [name]
    assert "heim" not in f"{found[name]!r} {found[name]} {found[name].hint}"


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from(list(program.SETTINGS)),
    st.text(st.characters(exclude_characters="\0", codec="utf-8")),
)
def test_any_value_is_taken_or_a_fault(name: str, value: str) -> None:
    """No text in a setting ends in anything but settings or faults."""
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


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_file_that_must_never_be_copied_is_a_fault(
    name: str, lnd: Lnd, good: dict[str, str], *, linked: bool
) -> None:
    """A name of what must never be restored, or never leave the node, is a fault, also behind a
    link.
    """
    path = lnd.directory / name
    path.write_bytes(b"secret")
    if linked:
        path = lnd.directory / "channel.backup"
        path.symlink_to(name)
    found = faults(good | {"MONITOR_FILE_PATH": str(path)})
    assert list(found) == ["MONITOR_FILE_PATH"]
    assert "channel.backup" in found["MONITOR_FILE_PATH"].hint


@pytest.mark.parametrize(
    "name", ["channel.backup", "channels.backup", "my.db", "macaroon", "sqlite", "channel.db.txt"]
)
def test_any_other_name_is_taken(name: str, lnd: Lnd, good: dict[str, str]) -> None:
    """A file that is not one of the forbidden ones may have any name, and need not be there."""
    assert faults(good | {"MONITOR_FILE_PATH": str(lnd.directory / name)}) == {}


@pytest.mark.parametrize("name", ["", "/"])
def test_directory_in_place_of_the_file_is_a_fault(
    name: str, lnd: Lnd, good: dict[str, str]
) -> None:
    """A directory in place of the file is a fault, with the name of the file in it."""
    found = faults(good | {"MONITOR_FILE_PATH": str(lnd.directory) + name})
    assert str(lnd.path) in found["MONITOR_FILE_PATH"].hint


def test_loop_of_links_is_no_crash(lnd: Lnd, good: dict[str, str]) -> None:
    """A file that is a link to itself ends in settings or faults, and not in a traceback."""
    lnd.path.symlink_to(lnd.path)
    assert set(faults(good)) <= {"MONITOR_FILE_PATH"}


# --- BACKUP_DIRECTORY ---


def staging_fault(good: dict[str, str], path: Path | str) -> program.ConfigError:
    """Return the fault of this staging directory, which must be the only one and name it."""
    found = faults(good | {"BACKUP_DIRECTORY": str(path)})
    assert list(found) == ["BACKUP_DIRECTORY"]
    assert str(path) in str(found["BACKUP_DIRECTORY"])
    return found["BACKUP_DIRECTORY"]


@pytest.mark.parametrize("below", ["", "backup", "chan-backup-archives/backup"])
def test_lnds_own_directory_is_a_fault(below: str, lnd: Lnd, good: dict[str, str]) -> None:
    """The directory of the file, and any below it, is not for staging."""
    assert "LND" in str(staging_fault(good, lnd.directory / below))


def test_lnds_own_directory_behind_a_link_is_a_fault(
    lnd: Lnd, good: dict[str, str], tmp_path: Path
) -> None:
    """LND's directory is recognised behind a link on either path."""
    (tmp_path / "link").symlink_to(lnd.directory)
    staging_fault(good, tmp_path / "link" / "backup")
    staging_fault(
        good | {"MONITOR_FILE_PATH": str(tmp_path / "link" / "channel.backup")},
        lnd.directory / "backup",
    )


def test_directory_of_a_linked_file_is_a_fault(
    lnd: Lnd, good: dict[str, str], tmp_path: Path
) -> None:
    """Where the file is a link, neither the link's directory nor its target's is for staging."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(lnd.directory)
    lnd.path.symlink_to(tmp_path / "elsewhere" / "channel.backup")
    good["MONITOR_FILE_PATH"] = str(tmp_path / "link" / "channel.backup")
    staging_fault(good, tmp_path / "elsewhere")
    staging_fault(good, lnd.directory / "backup")


@pytest.mark.parametrize(
    "name", ["wallet.db", "channel.db", "readonly.macaroon", "chan-backup-archives"]
)
def test_directory_with_lnds_files_is_a_fault(
    name: str, staging: Path, good: dict[str, str]
) -> None:
    """A directory that holds what LND keeps is not for staging, whatever MONITOR_FILE_PATH says."""
    (staging / name).touch()
    assert "LND" in str(staging_fault(good, staging))


def test_metrics_beside_lnds_files_are_a_fault(good: dict[str, str], tmp_path: Path) -> None:
    """A file of metrics is not written into a directory that holds what LND keeps."""
    (tmp_path / "wallet.db").touch()
    found = faults(good | {"METRICS_FILE": str(tmp_path / "lnd.prom")})
    assert "LND" in str(found["METRICS_FILE"])


def test_directory_with_lnds_files_that_cannot_be_listed_is_a_fault(
    public: Path, good: dict[str, str]
) -> None:
    """A directory of LND's is recognised by its files also where the user may enter it and not list
    it.
    """
    (public / "lnd").mkdir()
    (public / "lnd" / "wallet.db").touch()
    (public / "lnd").chmod(0o111)
    good["MONITOR_FILE_PATH"] = str(public / "channel.backup")
    with as_nobody():
        assert "LND" in str(staging_fault(good, public / "lnd"))
    (public / "lnd").chmod(0o755)


@pytest.mark.parametrize("target", ["real", "nothing", "link"])
def test_link_as_staging_directory_is_a_fault(
    target: str, good: dict[str, str], tmp_path: Path
) -> None:
    """A link, also a dangling one and a loop, is not for staging."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(target)
    assert re.search("link|directory", str(staging_fault(good, tmp_path / "link")))


def test_file_as_staging_directory_is_a_fault(good: dict[str, str], tmp_path: Path) -> None:
    """A file is not for staging."""
    (tmp_path / "file").touch(mode=0o600)
    assert re.search("link|directory", str(staging_fault(good, tmp_path / "file")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_a_fault(staging: Path, good: dict[str, str]) -> None:
    """A directory that belongs to somebody else is not for staging, and the fault says who that
    is.
    """
    os.chown(staging, NOBODY, NOBODY)
    assert str(NOBODY) in str(staging_fault(good, staging))


def test_effective_user_must_own_the_directory(
    staging: Path, good: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the effective user; the hint names a directory that it can make itself."""
    monkeypatch.setattr(os, "geteuid", lambda: staging.stat().st_uid + 1)
    failure = staging_fault(good, staging)
    assert str(staging.stat().st_uid) in str(failure)
    assert re.search(rf"{re.escape(str(staging))}/[\w.-]*\w", failure.hint)


def test_a_directory_to_watch_is_the_one_fault(lnd: Lnd, good: dict[str, str]) -> None:
    """LND's directory in the place of its file is named, and what lies beside that directory is not
    blamed for it.
    """
    assert faults(good | {"MONITOR_FILE_PATH": str(lnd.directory)}).keys() == {"MONITOR_FILE_PATH"}


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o770, 0o777, 0o1777])
def test_directory_that_others_can_write_is_a_fault(
    mode: int, staging: Path, good: dict[str, str]
) -> None:
    """A directory that group or others may write is not for staging, until the hint was
    followed.
    """
    staging.chmod(mode)
    follow(staging_fault(good, staging).hint)
    assert faults(good) == {}


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_directory_that_others_can_only_read_is_taken(
    mode: int, staging: Path, good: dict[str, str]
) -> None:
    """A directory that only its owner may write is for staging, such as the one that systemd
    makes.
    """
    staging.chmod(mode)
    assert faults(good) == {}


@pytest.mark.parametrize("mode", [0o000, 0o500, 0o600])
def test_directory_that_its_owner_cannot_use_is_a_fault(
    mode: int, public: Path, good: dict[str, str]
) -> None:
    """A directory that its owner may not list, enter and write is not for staging."""
    staging = public / "staging"
    staging.mkdir()
    if os.geteuid() == 0:
        os.chown(staging, NOBODY, NOBODY)
    staging.chmod(mode)
    good["MONITOR_FILE_PATH"] = str(public / "lnd" / "channel.backup")
    with as_nobody():
        staging_fault(good, staging)
    staging.chmod(0o700)


def test_missing_directory_is_made_later(tmp_path: Path, good: dict[str, str]) -> None:
    """A directory whose parent is there is no fault, and reading the settings does not make it."""
    directory = tmp_path / "new"
    assert (
        program.load_settings(good | {"BACKUP_DIRECTORY": str(directory)}, "run").staging
        == directory
    )
    assert not directory.exists()


def test_missing_directory_in_a_parent_that_cannot_be_written_is_a_fault(
    public: Path, good: dict[str, str]
) -> None:
    """A directory that the user could not make is a fault."""
    public.chmod(0o555)
    good["MONITOR_FILE_PATH"] = str(public / "lnd" / "channel.backup")
    with as_nobody():
        staging_fault(good, public / "new")
    public.chmod(0o755)


def follow(hint: str) -> None:
    """Run the command that the hint names, as the user that runs the tests."""
    match = re.search(r"run: (?:sudo )?(.*)", hint)
    assert match, hint
    subprocess.run(shlex.split(match[1]), check=True)


@pytest.mark.parametrize("name", ["parent", "a parent", "it's"])
def test_hint_for_a_missing_parent_mends_it(
    name: str, tmp_path: Path, good: dict[str, str]
) -> None:
    """A directory without a parent is a fault, and the command in the hint makes it as it must
    be.
    """
    directory = tmp_path / name / "staging"
    follow(staging_fault(good, directory).hint)
    assert faults(good | {"BACKUP_DIRECTORY": str(directory)}) == {}


def test_directory_that_systemd_made_is_the_default(staging: Path, good: dict[str, str]) -> None:
    """STATE_DIRECTORY is the staging directory where BACKUP_DIRECTORY is absent or empty; of
    several, the first.
    """
    del good["BACKUP_DIRECTORY"]
    for given_ in ({}, {"BACKUP_DIRECTORY": ""}):
        for state in (str(staging), f"{staging}:/elsewhere/second"):
            found = program.load_settings(good | given_ | {"STATE_DIRECTORY": state}, "run")
            assert found.staging == staging


def test_backup_directory_wins_over_the_one_that_systemd_made(
    staging: Path, good: dict[str, str]
) -> None:
    """STATE_DIRECTORY means nothing beside BACKUP_DIRECTORY."""
    found = program.load_settings(good | {"STATE_DIRECTORY": "/elsewhere"}, "run")
    assert found.staging == staging


def test_fault_of_the_directory_that_systemd_made_names_it(lnd: Lnd, good: dict[str, str]) -> None:
    """STATE_DIRECTORY is held to the same rules, and the fault shows the path."""
    del good["BACKUP_DIRECTORY"]
    found = faults(good | {"STATE_DIRECTORY": str(lnd.directory)})
    assert str(lnd.directory) in str(found["BACKUP_DIRECTORY"])


# --- All faults at once ---


@pytest.mark.parametrize("command", [[], ["once"]])
def test_all_faults_are_told_at_once(command: list[str], lnd: Lnd) -> None:
    """Each fault is a line with variable and value, and one with what to do; then exit 78, and
    nothing was made.
    """
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
    secret = {"AWS_SECRET_ACCESS_KEY": "ge heim", "AWS_ACCESS_KEY_ID": " heim"}
    lines = start(wrong | secret | {"HEARTBEAT_URL": "geheim"}, *command)
    for name, value in wrong.items():
        assert sum(f" {name}={value}: " in line for line in lines) == 1, name
    for name in (*secret, "HEARTBEAT_URL"):
        assert sum(f"{name}=" in line for line in lines) == 1, name
    assert not any("heim" in line for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 12
    assert list(lnd.directory.iterdir()) == []


AWS_FAULTS = [
    {"AWS_PROFILE": "nix"},
    {"AWS_REQUEST_CHECKSUM_CALCULATION": "bogus"},
    {"AWS_REGION": "us east"},
    {"AWS_CONFIG_FILE": str(SCRIPT)},
    {"AWS_CA_BUNDLE": "/nowhere/ca.pem"},
    {"AWS_ENDPOINT_URL": "https://s3. example.org"},
    *[
        {"AWS_ENDPOINT_URL_S3": url}
        for url in (
            "s3.example.org",
            "//s3.example.org",
            "ftp://s3.example.org",
            "http://host:port",
            "https:///a",
            "HTTPS",
        )
    ],
]


@pytest.mark.parametrize("wrong", AWS_FAULTS, ids=str)
def test_value_that_the_sdk_cannot_use_is_a_fault_that_shows_it(
    wrong: dict[str, str], good: dict[str, str], tmp_path: Path
) -> None:
    """What the AWS SDK cannot use is told beside a fault of ours, before anything is made, with
    exit 78, the value, and what to do.
    """
    good["BACKUP_DIRECTORY"] = str(tmp_path / "new")
    if "AWS_ENDPOINT_URL" in wrong:
        del good["AWS_ENDPOINT_URL_S3"]
    lines = start(good | wrong | {"RESCAN_SECONDS": "0"}, "once")
    assert any("RESCAN_SECONDS=0" in line for line in lines)
    assert any(value in line for value in wrong.values() for line in lines)
    assert ["hint: " in line for line in lines] == [False, True] * 2
    assert not (tmp_path / "new").exists()


EMPTY = [
    *[
        "AWS_PROFILE",
        "AWS_DEFAULT_REGION",
        "AWS_CA_BUNDLE",
        "AWS_CONFIG_FILE",
        "AWS_SHARED_CREDENTIALS_FILE",
    ],
    *[
        "AWS_SESSION_TOKEN",
        "AWS_ENDPOINT_URL",
        "AWS_MAX_ATTEMPTS",
        "AWS_RETRY_MODE",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ],
    *["AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "NO_PROXY"],
    *["HEARTBEAT_URL", "METRICS_FILE", "RESCAN_SECONDS"],
]


def test_empty_variables_count_as_not_set(fake: FakeS3, fake_env: dict[str, str], lnd: Lnd) -> None:
    """Settings that are left empty, as in a file of examples, change nothing."""
    lnd.write()
    done = run_script(fake_env | dict.fromkeys(EMPTY, ""), "once")
    assert (done.returncode, len(fake.requests)) == (0, 1), done.stderr


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

IN_A_FILE = MISSPELT | {
    "AWS_REGOIN": "AWS_REGION",
    "AWS_SECRET_ACESS_KEY": "AWS_SECRET_ACCESS_KEY",
    "ENDPOINT": "",
    "PREFIX": "",
    "BUCKET_NAME": "",
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("where", ["environment", "file"])
def test_misspelt_names_are_warned_of(
    fake: FakeS3, written_env: dict[str, str], tmp_path: Path, where: str
) -> None:
    """Each name that is none is warned of, with the likely one, in the environment and in a file;
    its value, which may be a secret, is not shown.
    """
    names = MISSPELT if where == "environment" else IN_A_FILE
    values = dict.fromkeys(names, "https://hc.example.org/s3cret")
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    if where == "environment":
        done = done_well(written_env | values)
    else:
        done = done_well(written_env, "--env-file", str(tmp_path / "env"), "once")
    told = warnings(done)
    for name, likely in names.items():
        assert re.search(rf"\b{name}\b", told), name
        assert re.search(rf"\b{likely}\b", told), likely
    assert "s3cret" not in done.stderr
    assert len(fake.objects("some-bucket", "alice/")) == 1


@pytest.mark.unmeasured
def test_right_names_are_not_warned_of(written_env: dict[str, str], tmp_path: Path) -> None:
    """Neither our names, nor the SDK's, nor those of the system are taken for misspelt."""
    ours = {"RESCAN_SECONDS": "60", "REFRESH_SECONDS": "86400", "SHUTDOWN_GRACE_SECONDS": "10"}
    of_the_sdk = {
        "AWS_MAX_ATTEMPTS": "3",
        "AWS_RETRY_MODE": "standard",
        "AWS_DEFAULT_REGION": "eu-west-1",
        "AWS_SDK_UA_APP_ID": "node",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_METADATA_SERVICE_TIMEOUT": "1",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
        "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:1",
        "NO_PROXY": "127.0.0.1",
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }
    of_the_system = {"PYTHONUNBUFFERED": "1", "STATE_DIRECTORY": "/x", "INVOCATION_ID": "1"}
    (tmp_path / "env").write_text(
        "".join(f"{name}={value}\n" for name, value in (ours | of_the_sdk).items())
    )
    assert "warning: " not in done_well(written_env | ours | of_the_sdk | of_the_system).stderr
    done = done_well(written_env | of_the_system, "--env-file", str(tmp_path / "env"), "once")
    assert "warning: " not in done.stderr


# --- Paths and characters ---


@pytest.mark.unmeasured
@pytest.mark.parametrize("how", ['"{}"', "'{}'", "$HOME{}", "${{HOME}}{}", " {}", ".{}", "~{}"])
def test_paths_that_are_not_absolute(written_env: dict[str, str], tmp_path: Path, how: str) -> None:
    """A path in quotes that were kept, with a variable that nobody replaced, or below the working
    directory is refused, with the value.
    """
    names = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "METRICS_FILE", "COPY_DIRECTORY")
    values = {name: how.format(written_env.get(name, str(tmp_path / name))) for name in names}
    said = refused(written_env | values, *names)
    assert all(value in said for value in values.values())
    assert re.search("absolute|whole|full path", said)


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
    "AWS_SECRET_ACCESS_KEY": "s3cret\n",
    "AWS_SESSION_TOKEN": "s3cret\r",
    "AWS_PROFILE": "default\n",
    "AWS_CA_BUNDLE": "/etc/ssl/certs/ca-certificates.crt\n",
    "HTTPS_PROXY": "http://bob:s3cret@127.0.0.1:1\n",
}


@pytest.mark.unmeasured
def test_control_characters(written_env: dict[str, str]) -> None:
    """No value holds a control character, such as the line break that `echo` left; all faults are
    told at once, and no secret is shown.
    """
    said = refused(written_env | CONTROL, *CONTROL)
    assert all(character.isprintable() for character in said if character != "\n")
    assert "s3cret" not in said
    refused(written_env | {"AWS_REGION": "eu-central-1\n"}, "AWS_REGION")


@pytest.mark.unmeasured
@pytest.mark.parametrize("arn", ["arn:aws:s3:::some-bucket", "arn:aws-cn:s3:::some-bucket/*"])
def test_a_bucket_by_its_arn(fake: FakeS3, written_env: dict[str, str], arn: str) -> None:
    """The ARN of a bucket is refused, with the name to write."""
    said = refused(written_env | {"S3_BUCKET_NAME": arn}, f"S3_BUCKET_NAME={arn}")
    (hint,) = (line for line in said.splitlines() if "hint: " in line)
    assert re.search(r"(?<!:)\bsome-bucket\b", hint)
    assert not fake.requests


@pytest.mark.unmeasured
def test_where_the_seed_is_kept(written_env: dict[str, str], lnd: Lnd) -> None:
    """The file in which BTCPay keeps the seed never leaves the node."""
    path = lnd.directory / "walletunlock.json"
    path.write_bytes(channel_backup(1))
    refused(written_env | {"MONITOR_FILE_PATH": str(path)}, "MONITOR_FILE_PATH")
    lnd.path.unlink()
    lnd.path.symlink_to(path)
    refused(written_env, "MONITOR_FILE_PATH")


# --- Prefixes ---


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "prefix", ["node one äöü/", "ノード#%20&b+c=d;e:f/", 'it\'s "here" $x{y}/']
)
def test_a_prefix_of_any_characters(
    s3: S3Server, bucket: str, lnd: Lnd, staging: Path, tmp_path: Path, prefix: str
) -> None:
    """A prefix may hold whatever S3 takes: the version is stored, listed, checked and restored."""
    version = lnd.write()
    user = s3.read_write_user(bucket)
    written_env = settings_at(
        s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix[:-1], user=user
    )
    done_well(written_env)
    ((key, stored),) = s3.objects(bucket).items()
    assert key.startswith(prefix)
    assert stored.data == version.data
    assert [row["key"] for row in json.loads(done_well(written_env, "list", "--json").stdout)] == [
        key
    ]
    done_well(written_env, "check")
    done_well(written_env, "restore", "--output", str(tmp_path / "restored"))
    assert (tmp_path / "restored").read_bytes() == version.data


@pytest.mark.unmeasured
@pytest.mark.parametrize("prefix", ["x" * 1025, "ü" * 513])
def test_a_prefix_that_is_too_long(written_env: dict[str, str], prefix: str) -> None:
    """A prefix with which no key fits into S3's 1,024 bytes is refused."""
    refused(written_env | {"S3_BACKUP_PREFIX": prefix}, "S3_BACKUP_PREFIX")


# --- Volumes ---


@pytest.mark.unmeasured
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a volume of root's")
@pytest.mark.parametrize("mode", [0o2775, 0o777])
def test_a_volume_that_belongs_to_root(fake: FakeS3, public: Path, mode: int) -> None:
    """On a volume of root's that the group may write, the hint names a directory inside it, which
    the program makes itself.
    """
    volume = public / "volume"
    volume.mkdir()
    os.chown(volume, 0, NOBODY)
    volume.chmod(mode)
    lnd = Lnd(public / "lnd")
    lnd.write()
    for path in (lnd.directory, *lnd.directory.iterdir()):
        os.chown(path, NOBODY, NOBODY)
    written_env = settings_at(fake.endpoint, lnd, volume)
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*nobody, sys.executable, str(SCRIPT), "once"]
    with Script(written_env, command=command, cwd=public) as script:
        assert script.wait() == 78, script.log
    (hint,) = (line for line in script.log.splitlines() if "hint: " in line)
    assert "#0" not in hint
    inside = re.search(rf"{re.escape(str(volume))}/[\w.-]*\w", hint)
    assert inside, hint
    with Script(
        written_env | {"BACKUP_DIRECTORY": inside[0]}, command=command, cwd=public
    ) as script:
        assert script.wait() == 0, script.log
    assert len(fake.objects("some-bucket")) == 1


def test_no_time_is_spent_on_the_network_to_find_faults() -> None:
    """RESCAN_SECONDS=0 is refused with every other fault of the settings, which the installer
    lists.
    """
    done = run_script({"RESCAN_SECONDS": "0", "S3_BUCKET_NAME": "a b"}, "check")
    assert done.returncode == 78
    faults = re.findall(r"configuration: (\w+)=", done.stderr)
    assert sorted(faults) == ["MONITOR_FILE_PATH", "RESCAN_SECONDS", "S3_BUCKET_NAME"]
