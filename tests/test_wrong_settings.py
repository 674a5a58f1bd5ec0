"""Settings that cannot be right are refused or warned of, and what is right is taken, whatever it
looks like.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
from kit import (
    NOBODY,
    SCRIPT,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    channel_backup,
    run_script,
    settings_at,
)

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = pytest.mark.unmeasured


@pytest.fixture
def env(fake_env: dict[str, str], lnd: Lnd) -> dict[str, str]:
    """Return the settings for the scripted S3, with a version on disk."""
    lnd.write()
    return fake_env


def refused(env: dict[str, str], *names: str, args: tuple[str, ...] = ("once",)) -> str:
    """Run a command that is refused, each of these settings being named, and return what it
    says.
    """
    done = run_script(env, *args)
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if re.search("error: (?!hint)", line)]
    for name in names:
        assert any(name in line for line in errors), done.stderr
    assert done.stderr.count("hint: ") >= len(names)
    return done.stderr


def done_well(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    """Run a command that works."""
    done = run_script(env, *(args or ("once",)))
    assert done.returncode == 0, done.stderr
    return done


def warnings(done: subprocess.CompletedProcess[str]) -> str:
    """Return the warnings, each with its hint."""
    lines = done.stderr.splitlines()
    return "\n".join(line for line in lines if "warning: " in line or "hint: " in line)


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


@pytest.mark.parametrize("where", ["environment", "file"])
def test_misspelt_names_are_warned_of(
    fake: FakeS3, env: dict[str, str], tmp_path: Path, where: str
) -> None:
    """Each name that is none is warned of, with the likely one, in the environment and in a file;
    its value, which may be a secret, is not shown.
    """
    names = MISSPELT if where == "environment" else IN_A_FILE
    values = dict.fromkeys(names, "https://hc.example.org/s3cret")
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    if where == "environment":
        done = done_well(env | values)
    else:
        done = done_well(env, "--env-file", str(tmp_path / "env"), "once")
    told = warnings(done)
    for name, likely in names.items():
        assert re.search(rf"\b{name}\b", told), name
        assert re.search(rf"\b{likely}\b", told), likely
    assert "s3cret" not in done.stderr
    assert len(fake.objects("some-bucket", "alice/")) == 1


def test_right_names_are_not_warned_of(env: dict[str, str], tmp_path: Path) -> None:
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
    assert "warning: " not in done_well(env | ours | of_the_sdk | of_the_system).stderr
    done = done_well(env | of_the_system, "--env-file", str(tmp_path / "env"), "once")
    assert "warning: " not in done.stderr


# --- Paths and characters ---


@pytest.mark.parametrize("how", ['"{}"', "'{}'", "$HOME{}", "${{HOME}}{}", " {}", ".{}", "~{}"])
def test_paths_that_are_not_absolute(env: dict[str, str], tmp_path: Path, how: str) -> None:
    """A path in quotes that were kept, with a variable that nobody replaced, or below the working
    directory is refused, with the value.
    """
    names = ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "METRICS_FILE", "COPY_DIRECTORY")
    values = {name: how.format(env.get(name, str(tmp_path / name))) for name in names}
    said = refused(env | values, *names)
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


def test_control_characters(env: dict[str, str]) -> None:
    """No value holds a control character, such as the line break that `echo` left; all faults are
    told at once, and no secret is shown.
    """
    said = refused(env | CONTROL, *CONTROL)
    assert all(character.isprintable() for character in said if character != "\n")
    assert "s3cret" not in said
    refused(env | {"AWS_REGION": "eu-central-1\n"}, "AWS_REGION")


@pytest.mark.parametrize("arn", ["arn:aws:s3:::some-bucket", "arn:aws-cn:s3:::some-bucket/*"])
def test_a_bucket_by_its_arn(fake: FakeS3, env: dict[str, str], arn: str) -> None:
    """The ARN of a bucket is refused, with the name to write."""
    said = refused(env | {"S3_BUCKET_NAME": arn}, f"S3_BUCKET_NAME={arn}")
    (hint,) = (line for line in said.splitlines() if "hint: " in line)
    assert re.search(r"(?<!:)\bsome-bucket\b", hint)
    assert not fake.requests


def test_where_the_seed_is_kept(env: dict[str, str], lnd: Lnd) -> None:
    """The file in which BTCPay keeps the seed never leaves the node."""
    path = lnd.directory / "walletunlock.json"
    path.write_bytes(channel_backup(1))
    refused(env | {"MONITOR_FILE_PATH": str(path)}, "MONITOR_FILE_PATH")
    lnd.path.unlink()
    lnd.path.symlink_to(path)
    refused(env, "MONITOR_FILE_PATH")


# --- What the SDK has settled on ---


def profile(tmp_path: Path, endpoint: str, how: str) -> dict[str, str]:
    """Return the settings that lead to an endpoint by the SDK's own ways."""
    config = {
        "profile": f"[profile node]\nendpoint_url = {endpoint}\n",
        "service": f"[profile node]\nservices = at\n[services at]\ns3 =\n"
        f"  endpoint_url = {endpoint}\n",
    }
    more = {"AWS_ENDPOINT_URL_S3": ""}
    if how not in config:
        return more | {how: endpoint}
    (tmp_path / "config").write_text(config[how])
    return more | {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "node"}


@pytest.mark.parametrize(
    ("how", "path", "command"),
    [
        ("AWS_ENDPOINT_URL_S3", "/s3/some-bucket/", "once"),
        ("AWS_ENDPOINT_URL", "/some-bucket", "once"),
        ("profile", "/some-bucket/", "once"),
        ("service", "/some-bucket", "list"),
    ],
)
def test_an_endpoint_that_ends_with_the_bucket(
    fake: FakeS3, env: dict[str, str], tmp_path: Path, how: str, path: str, command: str
) -> None:
    """An endpoint whose path ends with the bucket's name is refused, wherever it comes from, and
    nothing is sent.
    """
    at = profile(tmp_path, fake.endpoint + path, how)
    said = refused(env | at, "some-bucket", args=(command,))
    assert "endpoint" in said.lower()
    assert not fake.requests


@pytest.mark.parametrize("how", ["AWS_ENDPOINT_URL", "service"])
def test_an_endpoint_that_is_right(
    fake: FakeS3, env: dict[str, str], tmp_path: Path, how: str
) -> None:
    """A path that merely resembles the bucket's name is right, and one that is not in use is not
    judged.
    """
    done = done_well(env | profile(tmp_path, f"{fake.endpoint}/not-some-bucket", how))
    assert "warning: " not in done.stderr
    unused = profile(tmp_path, "http://127.0.0.1:1/some-bucket", how)
    unused |= {"AWS_ENDPOINT_URL_S3": fake.endpoint}
    done_well(env | unused)
    assert len(fake.requests) == 2


@pytest.mark.parametrize("how", ["AWS_ENDPOINT_URL_S3", "profile"])
def test_an_endpoint_that_begins_with_the_bucket(
    fake: FakeS3, env: dict[str, str], tmp_path: Path, how: str
) -> None:
    """An endpoint whose host begins with the bucket's name, as some providers show it, is warned
    of.
    """
    at = profile(tmp_path, "https://some-bucket.fra1.example.com", how) | {
        "HTTPS_PROXY": fake.endpoint,
        "SHUTDOWN_GRACE_SECONDS": "0",
    }
    with Script(env | at) as script:
        said = script.wait_for_log(r"(?i)warning: .*some-bucket\.").group()
        script.wait_for_log("cannot store: ")
        script.wait_for_log("captured")  # signals are minded from then on
        assert script.stop() == 0
    assert "endpoint" in said.lower() or "host" in said.lower()


@pytest.mark.parametrize(
    ("line", "name"),
    [("ca_bundle = /nowhere/ca.pem", "/nowhere/ca.pem"), ("region = eu 1", "eu 1")],
)
def test_a_wrong_value_in_the_sdks_file(
    env: dict[str, str], tmp_path: Path, line: str, name: str
) -> None:
    """A CA bundle that is not there, or a region that is none, is found in the SDK's file, too."""
    (tmp_path / "config").write_text(f"[default]\n{line}\n")
    at = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_REGION": ""}
    at |= {"AWS_ENDPOINT_URL_S3": "https://127.0.0.1:1"}
    refused(env | at, name)


# --- Prefixes ---


@pytest.mark.parametrize(
    "prefix", ["node one äöü/", "ノード#%20&b+c=d;e:f/", 'it\'s "here" $x{y}/']
)
def test_a_prefix_of_any_characters(
    s3: S3Server, bucket: str, lnd: Lnd, staging: Path, tmp_path: Path, prefix: str
) -> None:
    """A prefix may hold whatever S3 takes: the version is stored, listed, checked and restored."""
    version = lnd.write()
    user = s3.read_write_user(bucket)
    env = settings_at(s3.endpoint, lnd, staging, bucket=bucket, prefix=prefix[:-1], user=user)
    done_well(env)
    ((key, stored),) = s3.objects(bucket).items()
    assert key.startswith(prefix)
    assert stored.data == version.data
    assert [row["key"] for row in json.loads(done_well(env, "list", "--json").stdout)] == [key]
    done_well(env, "check")
    done_well(env, "restore", "--output", str(tmp_path / "restored"))
    assert (tmp_path / "restored").read_bytes() == version.data


@pytest.mark.parametrize("prefix", ["x" * 1025, "ü" * 513])
def test_a_prefix_that_is_too_long(env: dict[str, str], prefix: str) -> None:
    """A prefix with which no key fits into S3's 1,024 bytes is refused."""
    refused(env | {"S3_BACKUP_PREFIX": prefix}, "S3_BACKUP_PREFIX")


# --- S3_PUT_EXTRA_ARGS ---


def test_more_arguments_of_the_put(fake: FakeS3, env: dict[str, str]) -> None:
    """What a bucket's policy demands goes along with the put, beside checksum and digest."""
    key = "arn:aws:kms:eu-west-1:1:key/a-b"
    more = {
        "ServerSideEncryption": ("aws:kms", "x-amz-server-side-encryption"),
        "SSEKMSKeyId": (key, "x-amz-server-side-encryption-aws-kms-key-id"),
        "ACL": ("bucket-owner-full-control", "x-amz-acl"),
        "StorageClass": ("STANDARD_IA", "x-amz-storage-class"),
        "Tagging": ("project=lnd", "x-amz-tagging"),
    }
    value = ",".join(f"{name}={value}" for name, (value, _) in more.items())
    done_well(env | {"S3_PUT_EXTRA_ARGS": value})
    (request,) = fake.requests
    assert {header: request.headers.get(header) for _, header in more.values()} == {
        header: value for value, header in more.values()
    }
    assert {"x-amz-meta-sha256", "content-md5"} <= request.headers.keys()


@pytest.mark.parametrize(
    "value",
    [
        "NoSuchArgument=1",
        "acl=private",
        "StorageClass",
        "Bucket=other",
        "Body=other",
        "Metadata=other",
        "ChecksumSHA256=other",
        "IfNoneMatch=*",
        "BucketKeyEnabled=true",
    ],
)
def test_arguments_that_cannot_be(fake: FakeS3, env: dict[str, str], value: str) -> None:
    """An argument that put_object does not know, or that is the program's own, is refused."""
    said = refused(env | {"S3_PUT_EXTRA_ARGS": value}, "S3_PUT_EXTRA_ARGS")
    assert value.partition("=")[0] in said
    assert not fake.requests


# --- Volumes ---


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
    env = settings_at(fake.endpoint, lnd, volume)
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command = [*nobody, sys.executable, str(SCRIPT), "once"]
    with Script(env, command=command, cwd=public) as script:
        assert script.wait() == 78, script.log
    (hint,) = (line for line in script.log.splitlines() if "hint: " in line)
    assert "#0" not in hint
    inside = re.search(rf"{re.escape(str(volume))}/[\w.-]*\w", hint)
    assert inside, hint
    with Script(env | {"BACKUP_DIRECTORY": inside[0]}, command=command, cwd=public) as script:
        assert script.wait() == 0, script.log
    assert len(fake.objects("some-bucket")) == 1


# --- The file of settings, and the command line ---


def test_a_byte_order_mark(fake: FakeS3, env: dict[str, str], tmp_path: Path) -> None:
    """A file that begins with a byte order mark is taken, or the mark is named."""
    text = "".join(f"{name}={value}\n" for name, value in env.items())
    (tmp_path / "env").write_text(text, encoding="utf-8-sig")
    done = run_script({}, "--env-file", str(tmp_path / "env"), "once")
    if done.returncode:
        assert done.returncode == 78
        said = done.stderr.replace(str(tmp_path), "")  # which bears the name of this test
        assert re.search("(?i)byte.order.mark|BOM", said)
    else:
        assert len(fake.objects("some-bucket")) == 1


def test_a_file_of_another_encoding(env: dict[str, str], tmp_path: Path) -> None:
    """A file in UTF-16, as an editor of Windows writes it, is refused as that."""
    text = "".join(f"{name}={value}\n" for name, value in env.items())
    (tmp_path / "env").write_text(text, encoding="utf-16")
    done = run_script({}, "--env-file", str(tmp_path / "env"), "once")
    assert done.returncode == 78
    assert "UTF-8" in done.stderr


def test_the_env_file_before_and_after_the_command(
    fake: FakeS3, env: dict[str, str], tmp_path: Path
) -> None:
    """`--env-file` is taken before and after the command; one that is not there is exit 78."""
    file = str(tmp_path / "env")
    (tmp_path / "env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    for args in (("--env-file", file, "once"), ("once", "--env-file", file)):
        done = run_script({}, *args)
        assert done.returncode == 0, done.stderr
    assert len(fake.requests) == 2
    for options in (("--env-file", file, "--json"), ("--json", f"--env-file={file}")):
        assert run_script({}, "check", *options).returncode == 0
    for args in (("--env-file", "/nowhere", "once"), ("once", "--env-file", "/nowhere")):
        done = run_script(env, *args)
        assert done.returncode == 78
        assert "/nowhere" in done.stderr
    assert run_script(env, "once", "--env-file").returncode == 2


BARE = [sys.executable, "-I", "-S", str(SCRIPT)]


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (("--help",), "(?s)usage: .*check.*restore"),
        (("-h",), "usage: "),
        (("restore", "--help"), "(?s)usage: .*--before"),
        (("--version",), r"\d+\.\d+"),
    ],
)
def test_help_without_the_packages(args: tuple[str, ...], pattern: str) -> None:
    """What the program is, and its version, is told by any Python."""
    with Script({}, *args, command=BARE) as script:
        assert script.wait() == 0, script.log
    assert re.search(pattern, script.stdout)
    assert script.log == ""


@pytest.mark.parametrize("args", [(), ("list", "--json")])
def test_commands_without_the_packages(env: dict[str, str], args: tuple[str, ...]) -> None:
    """Everything else names the two commands that make a place where the packages are."""
    with Script(env, *args, command=BARE) as script:
        assert script.wait() not in (0, 2)
    assert "Traceback" not in script.log
    assert re.search(r"-m venv \S", script.log)
    assert re.search(r"pip install .*requirements\.txt", script.log)


def test_an_empty_variable_hides_the_one_in_the_file(
    fake: FakeS3, env: dict[str, str], tmp_path: Path
) -> None:
    """The file never overrides the environment, in which an empty variable counts as not set."""
    file = tmp_path / "settings"
    file.write_text("S3_BACKUP_PREFIX=bob/\n")
    done = run_script(env | {"S3_BACKUP_PREFIX": ""}, "--env-file", str(file), "once")
    assert done.returncode == 0, done.stderr
    (request,) = fake.requests
    assert "/bob/" not in request.path
