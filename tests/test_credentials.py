"""Wrong, missing or failing credentials, or no bucket: loud, and capture goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import sys
from typing import TYPE_CHECKING

import pytest
from kit import (
    PATIENCE_SECONDS,
    SCRIPT,
    Daemon,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    allow,
    assert_nothing_lost,
    hurried,
    run_script,
    settings_at,
)
from kit.answers import error
from shared import TRY_AGAIN, expect_newest_last, say, staged_data, statements

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shared import Env, Session

NO_KEY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
LATE_KEY = '{"Version": 1, "AccessKeyId": "AKIDLATE", "SecretAccessKey": "late-secret"}'
PROGRAM = "[default]\ncredential_process ="
BLAMES_NETWORK = re.compile(r"(?i)check the network|portal|out of reach|unreachable")


@pytest.fixture
def configured(fake: FakeS3, fake_env: Env, tmp_path: Path) -> Callable[[str], Env]:
    """Return what gives settings without a key, and with this file of the SDK's."""

    def settings(text: str) -> Env:
        (tmp_path / "config").write_text(text)
        at = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_ENDPOINT_URL_STS": fake.endpoint}
        return fake_env | NO_KEY | at

    return settings


def test_wrong_credentials_are_put_right(
    env: Env, lnd: Lnd, session: Session, tmp_path: Path
) -> None:
    """The log is loud, versions are captured, and stored when the file is mended."""
    key, secret = env.pop("AWS_ACCESS_KEY_ID"), env.pop("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    content = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    file.write_text(content.format(key, "wrong"))
    with session({"AWS_SHARED_CREDENTIALS_FILE": str(file)}, refreshes=1) as daemon:
        for _ in range(3):
            daemon.wait_for_captured(lnd.write())
        daemon.wait_for_log(
            "error: cannot store: .*SignatureDoesNotMatch: .*\n.*hint: check the access key"
        )
        file.write_text(content.format(key, secret))
        daemon.wait_for_captured(lnd.write())
        for version in lnd.written:
            daemon.wait_for_stored(version)
        daemon.wait_for_log("again, after")
        assert secret not in daemon.log
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])


def test_no_credentials_at_all(fake: FakeS3, written_env: Env, lnd: Lnd) -> None:
    with Daemon(written_env | NO_KEY) as daemon:
        daemon.wait_for_log("error: .*[Cc]redentials")
        daemon.wait_for_captured(lnd.write())
        assert daemon.stop() == 0
    assert fake.requests == []


def test_a_missing_bucket(s3_http: S3Server, prefix: str, lnd: Lnd, staging: Path) -> None:
    """All goes out once there is a bucket."""
    bucket = "not-made-yet-" + os.urandom(4).hex()
    user = s3_http.user(allow("s3:PutObject", "*"))
    env = settings_at(s3_http.endpoint, lnd, staging, bucket=bucket, prefix=prefix, user=user)
    lnd.write()
    with Daemon(env) as daemon:
        daemon.wait_for_log("error: cannot store: .*NoSuchBucket.*\n.*hint: .*bucket")
        daemon.wait_for_captured(lnd.write())
        s3_http.create_bucket(bucket)
        lnd.write()
        daemon.wait_for_log("stored s3://", count=3)
        assert daemon.stop() == 0
    assert staged_data(staging) == []
    assert_nothing_lost(lnd, s3_http, bucket, prefix, staging, refreshes=1)


def test_credentials_that_come_late_end_the_trouble(
    fake: FakeS3, configured: Callable[[str], Env], lnd: Lnd, tmp_path: Path
) -> None:
    """The trouble is told before there is anything to send; changed files are read again."""
    (tmp_path / "answer").write_text(LATE_KEY)
    with Daemon(configured(f"{PROGRAM} /nowhere/credentials\n")) as daemon:
        daemon.wait_for_log("error: .*/nowhere/credentials")
        configured(f"{PROGRAM} cat {tmp_path}/answer\n")
        daemon.wait_for_log("again, after")
        daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
    assert "Credential=AKIDLATE/" in fake.requests[0].headers["authorization"]


# --- Sources of credentials ---


SSO = """[default]
sso_start_url = https://x.example.org
sso_region = eu-west-1
sso_account_id = 123456789012
sso_role_name = backup
"""
ROLE = "arn:aws:iam::123456789012:role/backup"
ASSUME = f"[default]\nrole_arn = {ROLE}\nsource_profile = base\n"
MFA = f"{ASSUME}mfa_serial = arn:aws:iam::123456789012:mfa/me\n"
BASE = "[profile base]\naws_access_key_id = AKIDBASE\naws_secret_access_key = base-secret\n"
NAMED = "credential_process|custom-process"
NULLS = """'{"Version": 1, "AccessKeyId": null, "SecretAccessKey": null}'"""
HALF_A_KEY = """'{"Version": 1, "AccessKeyId": "x"}'"""
TOKEN = {"AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token", "AWS_ROLE_ARN": ROLE}
CONTAINER = {
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/creds",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/nowhere/token",
}
SOURCES: dict[str, tuple[Env, str, str]] = {  # environment, config file, what is named
    "token file": (TOKEN, "", "/nowhere/token"),
    "container": (CONTAINER, "", "/nowhere/token|AWS_CONTAINER"),
    "sso": ({}, SSO, "sso"),
    "sso expired": ({}, SSO, "sso"),
    "program absent": ({}, f"{PROGRAM} /nowhere/program\n", "/nowhere/program"),
    "program fails": ({}, f"{PROGRAM} false\n", NAMED),
    "program babbles": ({}, f"{PROGRAM} echo rubbish\n", NAMED),
    "program forgets": ({}, f"{PROGRAM} echo {HALF_A_KEY}\n", NAMED),
    "program has none": ({}, f"{PROGRAM} echo {NULLS}\n", NAMED),
    "mfa": ({}, MFA + BASE, "mfa"),
    "role": ({}, ASSUME + BASE, "sts:AssumeRole"),
    "no profile": ({}, ASSUME, "base"),
    "half a key": ({"AWS_ACCESS_KEY_ID": "AKIDHALF"}, "", "AWS_SECRET_ACCESS_KEY|secret"),
    "none": ({}, "", "credentials"),
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.usefixtures("written_env")
def test_a_source_of_credentials_that_fails(
    fake: FakeS3, configured: Callable[[str], Env], tmp_path: Path, source: str
) -> None:
    """It is named, as no matter of the network or of a policy of S3."""
    more, config, names = SOURCES[source]
    if source == "sso expired":
        more = more | {"HOME": str(tmp_path), "AWS_ENDPOINT_URL_SSO": fake.endpoint}
        cache = tmp_path / ".aws/sso/cache"
        cache.mkdir(parents=True)
        name = hashlib.sha1(b"https://x.example.org", usedforsecurity=False).hexdigest()
        token = {"accessToken": "x", "expiresAt": "2026-01-01T00:00:00Z"}
        (cache / f"{name}.json").write_text(json.dumps(token))
    denied = f"User: base is not authorized to perform: sts:AssumeRole on resource: {ROLE}"
    answer = error("AccessDenied", denied).decode()
    say(fake, 403, f"<ErrorResponse>{answer}</ErrorResponse>".encode())
    done = run_script(configured(config) | more, "once")
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert done.returncode in ((1, 78) if source == "no profile" else (1,)), done.stderr
    assert re.search(f"(?i)error: .*({names})", done.stderr)
    assert not BLAMES_NETWORK.search(done.stderr)
    assert not statements(done.stderr)
    assert "base-secret" not in done.stderr
    assert not any(request.method == "PUT" for request in fake.requests)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("status", "code"), [(503, "ServiceUnavailable"), (400, "Throttling"), (400, "RequestExpired")]
)
def test_a_role_that_is_not_given_now(
    fake: FakeS3, configured: Callable[[str], Env], status: int, code: str
) -> None:
    """It may be given later."""
    say(fake, status, f"<ErrorResponse>{error(code).decode()}</ErrorResponse>".encode())
    done = run_script(configured(ASSUME + BASE) | {"AWS_MAX_ATTEMPTS": "1"}, "list")
    assert done.returncode == TRY_AGAIN, done.stderr
    assert re.search(f"error: cannot get credentials .*{code}", done.stderr)
    assert {request.method for request in fake.requests} == {"POST"}


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("list", r"cannot get credentials \(profile default, with .*\): no answer in time"),
        ("once", "still waiting: 1: S3 or the source of credentials does not answer"),
    ],
)
@pytest.mark.usefixtures("written_env")
def test_a_source_of_credentials_that_hangs(
    fake: FakeS3,
    configured: Callable[[str], Env],
    started_by: Callable[[str], None],
    command: str,
    words: str,
) -> None:
    """It is named, and may be tried again."""
    started_by(hurried(10))
    fake.hold()
    done = run_script(configured(ASSUME + BASE), command)
    assert done.returncode == 75, done.stderr
    assert re.search(f"error: .*{words}", done.stderr)
    assert {request.method for request in fake.requests} == {"POST"}


@pytest.mark.unmeasured
@pytest.mark.usefixtures("written_env")
def test_nobody_is_asked_on_the_terminal(configured: Callable[[str], Env], tmp_path: Path) -> None:
    """A role that wants a one-time code fails at once."""
    typescript = tmp_path / "typescript"
    command = ["script", "-q", "-e", "-E", "never", "-c", 'exec "$PYTHON" "$SCRIPT" once']
    env = configured(MFA + BASE) | {"PYTHON": sys.executable, "SCRIPT": str(SCRIPT)}
    with Script(env, command=[*command, str(typescript)]) as script:
        assert script.wait(15) == 1
    said = typescript.read_text(errors="replace") + script.log + script.stdout
    assert not re.search("^Enter MFA", said, re.MULTILINE)


@pytest.mark.unmeasured
def test_a_program_that_hung_and_works(
    configured: Callable[[str], Env], lnd: Lnd, tmp_path: Path, started_by: Callable[[str], None]
) -> None:
    """Each time that it hangs, the next version is captured all the same."""
    started_by(hurried(60))
    begun, well, program = (tmp_path / name for name in ("begun", "well", "program"))
    os.mkfifo(begun)
    program.write_text(
        f"#!/bin/sh\nif [ -e {well} ]; then echo '{LATE_KEY}'; exit; fi\n"
        f"echo >{begun}\nexec sleep 60\n"
    )
    program.chmod(0o700)
    lnd.write()
    env = configured(f"{PROGRAM} {program}\n") | {"SHUTDOWN_GRACE_SECONDS": "0"}
    with begun.open("r+b", buffering=0) as events, Daemon(env) as daemon:
        for _ in range(3):
            assert select.select([events], [], [], PATIENCE_SECONDS)[0], daemon.log
            events.read(1)
            daemon.wait_for_captured(lnd.write(1))
        well.touch()
        daemon.wait_for_stored(lnd.written[-1])
        assert re.search("cannot get credentials .*timeout: sending signal", daemon.log)
        assert daemon.stop() == 0
