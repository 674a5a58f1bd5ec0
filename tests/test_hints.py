"""What is said to be wrong, and what to do: S3's own words decide, and a source of credentials that
fails is named.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import sys
from typing import TYPE_CHECKING, Any

import pytest
from kit import (
    PATIENCE_SECONDS,
    SCRIPT,
    Answer,
    Daemon,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    hurried,
    reader_settings,
    run_script,
)
from kit.raw_s3 import error

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

ACCESS_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
PAGE = b"<html><head><title>403</title></head><body><center>nginx</center></body></html>"
NO_KEY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
BLAMES_KEY = re.compile(r"(?i)check the (access )?key|the key.s policy|key and its secret")
BLAMES_NETWORK = re.compile(r"(?i)check the network|portal|out of reach|unreachable")


@pytest.fixture
def env(fake_env: dict[str, str], lnd: Lnd) -> dict[str, str]:
    """Return the settings for the scripted S3, with a version on disk."""
    lnd.write()
    return fake_env


def run(env: dict[str, str], *args: str, code: int) -> subprocess.CompletedProcess[str]:
    """Run a command that fails with this code, without a traceback, and with something to do."""
    done = run_script(env, *args)
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert done.returncode == code, done.stderr
    assert "hint: " in done.stderr
    return done


def say(fake: FakeS3, status: int, body: bytes, content_type: str = "application/xml") -> None:
    """Let S3 answer everything like this."""
    for method in ("PUT", "GET", "HEAD", "POST"):
        answer = Answer(status, headers={"Content-Type": content_type}, body=body, etag=False)
        fake.set_default(answer, method)


def statements(text: str) -> list[dict[str, Any]]:
    """Return the policy statements in a text."""
    return [json.loads(found) for found in re.findall(r'\{[^{}]*"Effect"[^{}]*\}', text)]


# --- S3's words ---


@pytest.mark.parametrize(
    ("status", "s3_code", "message", "code", "pattern"),
    [
        (403, "InvalidAccessKeyId", "It does not exist.", 1, "access.key"),
        (403, "SignatureDoesNotMatch", "Check your key and signing method.", 1, "secret"),
        (400, "ExpiredToken", "The provided token has expired.", 1, "expired"),
        (404, "NoSuchBucket", "The bucket does not exist.", 1, "bucket"),
        (403, "QuotaExceeded", "Your quota is used up.", 1, "quota"),
        (403, "RequestTimeTooSkewed", "The difference is too large.", 75, "clock"),
        (400, "AuthorizationHeaderMalformed", "expecting 'eu-west-1'", 1, "region"),
        (400, "KMS.DisabledException", "arn:aws:kms:eu:1:key/abc is disabled", 1, "KMS|kms"),
        (501, "NotImplemented", "A header implies it.", 1, "NotImplemented"),
    ],
)
def test_the_hint_for_a_code(
    fake: FakeS3,
    env: dict[str, str],
    started_by: Callable[[str], None],
    status: int,
    s3_code: str,
    message: str,
    code: int,
    pattern: str,
) -> None:
    """Code, words and status of S3 are shown, and what to do fits them."""
    started_by(hurried(20))
    say(fake, status, error(s3_code, message))
    said = run(env, "once", code=code).stderr
    assert any(
        all(word in line for word in (s3_code, message, str(status))) for line in said.splitlines()
    )
    assert re.search(f"(?i){pattern}", said)
    assert not statements(said)


@pytest.mark.parametrize(
    ("status", "s3_code", "message"),
    [
        (403, "AllAccessDisabled", "All access to this object has been disabled."),
        (403, "AccountProblem", "There is a problem with your account."),
        (403, "UserSuspended", "This user is suspended."),
        (403, "SomethingElse", "Nobody knows this code."),
    ],
)
def test_an_account_is_no_matter_of_the_key(
    fake: FakeS3, env: dict[str, str], status: int, s3_code: str, message: str
) -> None:
    """An account that is closed, or a code that nobody knows, is told in S3's words, and sends to
    the provider; the key is not blamed.
    """
    say(fake, status, error(s3_code, message))
    said = run(env, "once", code=1).stderr
    assert all(word in said for word in (s3_code, message, "provider"))
    assert not BLAMES_KEY.search(said)
    assert not statements(said)


@pytest.mark.parametrize(
    ("command", "status", "body", "content_type"),
    [
        ("once", 403, PAGE, "text/html"),
        ("once", 400, PAGE, "text/html"),
        ("once", 407, PAGE, "text/html"),
        ("once", 403, b"Forbidden by administrative rules\n", "text/plain"),
        ("list", 403, PAGE, "text/html"),
        ("restore", 404, PAGE, "text/html"),
    ],
)
def test_an_answer_that_is_not_of_s3(
    fake: FakeS3,
    env: dict[str, str],
    started_by: Callable[[str], None],
    command: str,
    status: int,
    body: bytes,
    content_type: str,
) -> None:
    """A web page with any status is something between here and S3: it may be tried again, and the
    key is not blamed.
    """
    started_by(hurried(20))
    say(fake, status, body, content_type)
    said = run(env, command, code=75).stderr
    assert str(status) in said
    assert not re.search(r": : |:  \(HTTP", said)
    assert not BLAMES_KEY.search(said)
    assert not statements(said)
    assert "s3:PutObject" not in said


# --- Permissions ---


def test_a_put_that_is_denied(fake: FakeS3, env: dict[str, str]) -> None:
    """Where S3 names nothing, the statement to add is that of a put below the prefix."""
    say(fake, 403, error("AccessDenied", "Access Denied"))
    (statement,) = statements(run(env, "once", code=1).stderr)
    assert statement == {
        "Effect": "Allow",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::some-bucket/alice/*",
    }


@pytest.mark.parametrize(
    "action",
    ["kms:GenerateDataKey", "s3:PutObjectTagging"],
)
def test_the_action_that_s3_names(fake: FakeS3, env: dict[str, str], action: str) -> None:
    """The action that S3 names is the one that is missing, not the one that one would guess."""
    message = (
        f"User: arn:aws:iam::123456789012:user/node is not authorized to perform: {action} on "
        "resource: arn:aws:x because no identity-based policy allows the action"
    )
    say(fake, 403, error("AccessDenied", message))
    said = run(env, "once", code=1).stderr
    hints = [line for line in said.splitlines() if "hint: " in line]
    assert any(action in line for line in hints)
    assert not any(re.search(r"s3:PutObject\b(?!\w)", line) for line in hints)


@pytest.mark.parametrize("kind", ["a resource-based policy", "a service control policy"])
def test_an_explicit_deny(fake: FakeS3, env: dict[str, str], kind: str) -> None:
    """Against an explicit deny no Allow helps, and none is proposed."""
    message = (
        "User: arn:aws:iam::123456789012:user/node is not authorized to perform: s3:PutObject on "
        f"resource: arn:aws:s3:::some-bucket/alice/x with an explicit deny in {kind}"
    )
    say(fake, 403, error("AccessDenied", message))
    said = run(env, "once", code=1).stderr
    assert not statements(said)
    assert any(re.search("(?i)den(y|ies)", line) for line in said.splitlines() if "hint: " in line)


@pytest.mark.parametrize(
    ("more", "resource"),
    [
        ({"S3_BUCKET_NAME": ACCESS_POINT}, f"{ACCESS_POINT}/object/alice/*"),
        ({"AWS_REGION": "cn-north-1"}, "arn:aws-cn:s3:::some-bucket/alice/*"),
        ({"AWS_REGION": "us-gov-west-1"}, "arn:aws-us-gov:s3:::some-bucket/alice/*"),
        ({"S3_BACKUP_PREFIX": "node ö"}, "arn:aws:s3:::some-bucket/node ö/*"),
    ],
    ids=["access point", "china", "gov", "blank"],
)
def test_the_resource_of_the_statement(
    fake: FakeS3, env: dict[str, str], more: dict[str, str], resource: str
) -> None:
    """The statement is right for an access point, another partition, and any prefix."""
    say(fake, 403, error("AccessDenied", "Access Denied"))
    at = {"AWS_ENDPOINT_URL_S3": "http://s3.example.org", "HTTP_PROXY": fake.endpoint}
    (statement,) = statements(run(env | at | more, "once", code=1).stderr)
    assert statement["Resource"] == resource


@pytest.mark.parametrize(
    "args", [("list",), ("restore",), ("restore", "--key", "20260301T120000.000000Z-a1b2c3")]
)
def test_the_nodes_key_is_never_to_read(
    s3: S3Server, bucket: str, prefix: str, args: tuple[str, ...]
) -> None:
    """Who reads with the node's key, or under another prefix, is sent to the reader's key and the
    prefix; no policy is to be widened.
    """
    env = reader_settings(s3, bucket, prefix, s3.put_only_user(bucket, prefix))
    done = run(env, *args, code=1)
    assert not statements(done.stderr)
    assert not re.search(r"(?i)\badd\b.*s3:(ListBucket|GetObject)", done.stderr)
    assert re.search("(?i)reader|reading", done.stderr)
    assert prefix in done.stderr
    assert done.stdout == ""


# --- Sources of credentials ---

SSO = "sso_start_url = https://x.example.org\nsso_region = eu-west-1\n"
SSO_ROLE = "sso_account_id = 123456789012\nsso_role_name = backup\n"
ROLE = "role_arn = arn:aws:iam::123456789012:role/backup\nsource_profile = base\n"
BASE = "[profile base]\naws_access_key_id = AKIDBASE\naws_secret_access_key = base-secret\n"
SOURCES: dict[str, tuple[dict[str, str], str, str]] = {  # environment, config file, what is named
    "token file": (
        {
            "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere/token",
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/backup",
        },
        "",
        "/nowhere/token",
    ),
    "container": (
        {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1/creds",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/nowhere/token",
        },
        "",
        "/nowhere/token|AWS_CONTAINER",
    ),
    "sso": ({}, f"[default]\n{SSO}{SSO_ROLE}", "(?i)sso"),
    "sso expired": ({}, f"[default]\n{SSO}{SSO_ROLE}", "(?i)sso"),
    "program absent": (
        {},
        "[default]\ncredential_process = /nowhere/program\n",
        "credential_process|/nowhere/program|custom-process",
    ),
    "program fails": (
        {},
        "[default]\ncredential_process = false\n",
        "credential_process|custom-process",
    ),
    "program babbles": (
        {},
        "[default]\ncredential_process = echo rubbish\n",
        "credential_process|custom-process",
    ),
    "program forgets": (
        {},
        '[default]\ncredential_process = echo \'{"Version": 1, "AccessKeyId": "x"}\'\n',
        "credential_process|custom-process",
    ),
    "mfa": (
        {},
        f"[default]\n{ROLE}mfa_serial = arn:aws:iam::123456789012:mfa/me\n{BASE}",
        "(?i)mfa",
    ),
    "role": ({}, f"[default]\n{ROLE}{BASE}", "sts:AssumeRole"),
    "no profile": ({}, f"[default]\n{ROLE}", "base"),
    "half a key": ({"AWS_ACCESS_KEY_ID": "AKIDHALF"}, "", "AWS_SECRET_ACCESS_KEY|secret"),
    "none": ({}, "", "(?i)credentials"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_of_credentials_that_fails(
    fake: FakeS3, env: dict[str, str], tmp_path: Path, source: str
) -> None:
    """A source of credentials that fails is named, loudly, and as what it is: no network problem,
    no matter of a policy of S3; nothing is asked on a terminal.
    """
    more, config, names = SOURCES[source]
    (tmp_path / "config").write_text(config)
    if source == "sso expired":
        more = more | {"HOME": str(tmp_path), "AWS_ENDPOINT_URL_SSO": fake.endpoint}
        cache = tmp_path / ".aws/sso/cache"
        cache.mkdir(parents=True)
        name = hashlib.sha1(b"https://x.example.org", usedforsecurity=False).hexdigest()
        token = {"accessToken": "x", "expiresAt": "2026-01-01T00:00:00Z"}
        (cache / f"{name}.json").write_text(json.dumps(token))
    denied = (
        "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>User: base is "
        "not authorized to perform: sts:AssumeRole on resource: arn:aws:iam::123456789012:role/"
        "backup</Message></Error></ErrorResponse>"
    )
    say(fake, 403, denied.encode())
    at = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_ENDPOINT_URL_STS": fake.endpoint}
    done = run_script(env | NO_KEY | at | more, "once")
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert done.returncode in ((1, 78) if source == "no profile" else (1,)), done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert any(re.search(names, line) for line in errors), done.stderr
    assert not any(re.search("cannot store: anything", line) for line in errors)
    assert not BLAMES_NETWORK.search(done.stderr)
    assert not statements(done.stderr)
    assert not re.search("^Enter MFA", done.stderr, re.MULTILINE)
    assert "getpass" not in done.stderr.lower()
    assert "base-secret" not in done.stderr
    assert not any(request.method == "PUT" for request in fake.requests)


def test_a_daemon_without_credentials_is_loud(
    env: dict[str, str], lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """While a source of credentials fails, the daemon says so as an error, and captures."""
    (tmp_path / "config").write_text(f"[default]\n{SSO}{SSO_ROLE}")
    env = env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    with Daemon(env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        said = daemon.wait_for_log(r"^.*error: .*(?i:sso).*$").group()
        assert not BLAMES_NETWORK.search(said)
        daemon.wait_for_captured(lnd.write())
        assert daemon.stop() == 0
    assert len(list(staging.glob("2*"))) == 2


def test_nobody_is_asked_on_the_terminal(env: dict[str, str], tmp_path: Path) -> None:
    """A role that wants a one-time code fails at once also where there is a terminal to ask at."""
    (tmp_path / "config").write_text(SOURCES["mfa"][1])
    env = env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    typescript = tmp_path / "typescript"
    command = ["script", "-q", "-e", "-E", "never", "-c", 'exec "$PYTHON" "$SCRIPT" once']
    env |= {"PYTHON": sys.executable, "SCRIPT": str(SCRIPT)}
    with Script(env, command=[*command, str(typescript)]) as script:
        assert script.wait(15) == 1
    said = typescript.read_text(errors="replace") + script.log + script.stdout
    assert not re.search("^Enter MFA", said, re.MULTILINE)


@pytest.fixture
def fifos(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Return a fifo that nobody writes, until the end, and one that the test reads."""
    for name in ("never", "begun"):
        os.mkfifo(tmp_path / name)
    yield tmp_path / "never", tmp_path / "begun"
    with contextlib.suppress(OSError):  # nobody hangs
        os.close(os.open(tmp_path / "never", os.O_WRONLY | os.O_NONBLOCK))


def test_a_program_that_hung_and_works(
    env: dict[str, str],
    lnd: Lnd,
    tmp_path: Path,
    fifos: tuple[Path, Path],
    started_by: Callable[[str], None],
) -> None:
    """A credential program that hung again and again, and then works, is used again, while those
    that hang go on hanging.
    """
    started_by(hurried(60))
    never, begun = fifos
    well, program = tmp_path / "well", tmp_path / "program"
    keys = json.dumps({"Version": 1, "AccessKeyId": "AKIDLATE", "SecretAccessKey": "late-secret"})
    program.write_text(
        f"#!/bin/sh\nif [ -e {well} ]; then echo '{keys}'; exit; fi\necho >{begun}\ncat {never}\n"
    )
    program.chmod(0o700)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {program}\n")
    env = env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    events = os.open(begun, os.O_RDWR)
    try:
        with Daemon(env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
            for _ in range(3):
                assert select.select([events], [], [], PATIENCE_SECONDS)[0], daemon.log
                os.read(events, 1)
                daemon.wait_for_captured(lnd.write(1))
            well.touch()
            daemon.wait_for_stored(lnd.written[-1])
            assert re.search("(?i)credential", daemon.log)
            assert daemon.stop() == 0
    finally:
        os.close(events)
