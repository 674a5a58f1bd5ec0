"""Wrong, missing or failing credentials, or no bucket: loud, and capture goes on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    MADE_UP,
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
    settings_for,
)
from shared import expect_newest_last, say, staged_data, statements, wait_until_staged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared import Env, Session

NO_KEY = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
BLAMES_NETWORK = re.compile(r"(?i)check the network|portal|out of reach|unreachable")


def test_wrong_credentials_are_put_right(
    env: Env, lnd: Lnd, session: Session, tmp_path: Path
) -> None:
    """With a wrong key versions are captured and the log is loud; when the file is mended all of
    them are stored.
    """
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


def test_a_corrected_credential_program_is_picked_up(fake: FakeS3, fake_env: Env, lnd: Lnd) -> None:
    """With a credential program that is not there the daemon is loud, and it uses the one that the
    file names next.
    """
    config = lnd.directory.parent / "config"
    config.write_text("[default]\ncredential_process = /nowhere/credentials\n")
    del fake_env["AWS_ACCESS_KEY_ID"], fake_env["AWS_SECRET_ACCESS_KEY"]
    answer = json.dumps(
        {"Version": 1, "AccessKeyId": "AKIDPROGRAM", "SecretAccessKey": MADE_UP.secret_key}
    )
    (lnd.directory.parent / "answer").write_text(answer)
    lnd.write()
    with Script(fake_env | {"AWS_CONFIG_FILE": str(config)}) as script:
        script.wait_for_log("error: .*/nowhere/credentials")
        config.write_text(
            f"[default]\ncredential_process = cat {lnd.directory.parent / 'answer'}\n"
        )
        lnd.write()
        script.wait_for_log("stored s3://", count=2)
        assert script.stop() == 0
    assert "Credential=AKIDPROGRAM/" in fake.requests[0].headers["authorization"]


def test_no_credentials_at_all(fake: FakeS3, fake_env: Env, lnd: Lnd, staging: Path) -> None:
    """Without any credentials the daemon runs, is loud and captures, and `once` exits 1."""
    del fake_env["AWS_ACCESS_KEY_ID"], fake_env["AWS_SECRET_ACCESS_KEY"]
    lnd.write()
    with Script(fake_env) as script:
        script.wait_for_log("error: .*[Cc]redentials")
        lnd.write()
        wait_until_staged(staging, [version.data for version in lnd.written])
        assert script.stop() == 0
    done = run_script(fake_env, "once")
    assert done.returncode == 1
    assert "credentials" in done.stderr
    assert fake.requests == []


def test_a_missing_bucket(s3_http: S3Server, prefix: str, lnd: Lnd, staging: Path) -> None:
    """Without its bucket the daemon is loud and captures, `once` exits 1, and once there is one all
    goes out.
    """
    bucket = "not-made-yet-" + os.urandom(4).hex()
    user = s3_http.user(allow("s3:PutObject", "*"))
    env = settings_for(s3_http, bucket, prefix, lnd, staging)
    env |= {"AWS_ACCESS_KEY_ID": user.access_key, "AWS_SECRET_ACCESS_KEY": user.secret_key}
    lnd.write()
    assert run_script(env, "once").returncode == 1
    with Script(env) as script:
        script.wait_for_log("error: cannot store: .*NoSuchBucket")
        script.wait_for_log("hint: .*bucket")
        lnd.write()
        wait_until_staged(staging, [version.data for version in lnd.written])
        s3_http.create_bucket(bucket)
        lnd.write()
        script.wait_for_log("stored s3://", count=3)
        assert script.stop() == 0
    assert staged_data(staging) == []
    assert_nothing_lost(lnd, s3_http, bucket, prefix, staging, refreshes=1)


def test_credentials_that_come_late_end_the_trouble(bare_env: Env, tmp_path: Path) -> None:
    """A credential program that fails is told of before there is anything to send; when it works,
    all is well again.
    """
    Path(bare_env["MONITOR_FILE_PATH"]).unlink()
    key = tmp_path / "key.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {key}\n")
    env = bare_env | {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
    }
    with FakeS3() as fake, Script(env | {"AWS_ENDPOINT_URL_S3": fake.endpoint}) as script:
        script.wait_for_log("error: .*custom-process")
        key.write_text(
            '{"Version": 1, "AccessKeyId": "AKIDLATE", "SecretAccessKey": "late-secret"}'
        )
        script.wait_for_log("again, after")
        assert script.stop() == 0


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


@pytest.mark.unmeasured
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_of_credentials_that_fails(
    fake: FakeS3, written_env: Env, tmp_path: Path, source: str
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
    done = run_script(written_env | NO_KEY | at | more, "once")
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


@pytest.mark.unmeasured
def test_a_daemon_without_credentials_is_loud(
    written_env: Env, lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """While a source of credentials fails, the daemon says so as an error, and captures."""
    (tmp_path / "config").write_text(f"[default]\n{SSO}{SSO_ROLE}")
    written_env = written_env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    with Daemon(written_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        said = daemon.wait_for_log(r"^.*error: .*(?i:sso).*$").group()
        assert not BLAMES_NETWORK.search(said)
        daemon.wait_for_captured(lnd.write())
        assert daemon.stop() == 0
    assert len(list(staging.glob("2*"))) == 2


@pytest.mark.unmeasured
def test_nobody_is_asked_on_the_terminal(written_env: Env, tmp_path: Path) -> None:
    """A role that wants a one-time code fails at once also where there is a terminal to ask at."""
    (tmp_path / "config").write_text(SOURCES["mfa"][1])
    written_env = written_env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    typescript = tmp_path / "typescript"
    command = ["script", "-q", "-e", "-E", "never", "-c", 'exec "$PYTHON" "$SCRIPT" once']
    written_env |= {"PYTHON": sys.executable, "SCRIPT": str(SCRIPT)}
    with Script(written_env, command=[*command, str(typescript)]) as script:
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


@pytest.mark.unmeasured
def test_a_program_that_hung_and_works(
    written_env: Env,
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
    written_env = written_env | NO_KEY | {"AWS_CONFIG_FILE": str(tmp_path / "config")}
    events = os.open(begun, os.O_RDWR)
    try:
        with Daemon(written_env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
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
