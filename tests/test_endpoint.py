"""Whom the program talks to: endpoint, region, profile, proxy and TLS, and nobody else.

For the tests of proxies, every look-up of a name and every connection of the program's process is
recorded, as Python's audit events tell them. What would leave this machine fails instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from inside import use
from kit import (
    CHECKOUT,
    Answer,
    Daemon,
    FakeS3,
    Lnd,
    S3Server,
    answers,
    channel_backup,
    reader_settings,
    run_script,
    settings_for,
)
from kit.connect_proxy import ConnectProxy
from kit.script import LATE_ENOUGH
from kit.tls_front import TlsFront
from shared import NOWHERE, Env, done_well, failure_of, refused

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SOME_NAME = "20261120T215558.123456Z-a1b2c3"
HOST = "s3.example.org"
TARGET = f"{HOST}:443"
# Local sockets (systemd's) have no port, and are left out.
RECORD = """
import json, os, sys

def record(event, arguments):
    if event == "socket.getaddrinfo":
        told = ["name", arguments[0], arguments[1]]
    elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
        told = ["name", arguments[0], 0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        told = ["connection", *arguments[1][:2]]
    else:
        return
    descriptor = os.open(TALK, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, json.dumps(told).encode() + b"\\n")
    os.close(descriptor)
    if told[1] != "127.0.0.1":
        raise OSError(f"{told[1]} is not on this machine")

sys.addaudithook(record)
"""
Talk = list[tuple[str, str, int]]


def places(talk: Talk) -> set[tuple[str, int]]:
    """Return the hosts and ports that were looked up or connected to."""
    return {(host, port) for _, host, port in talk}


@pytest.fixture
def talk(tmp_path: Path, started_by: Callable[[str], None]) -> Callable[[], Talk]:
    """Return what gives all look-ups and connections until now, as kind, host and port."""
    file = tmp_path / "talk"
    started_by(f"{LATE_ENOUGH}\nTALK = {str(file)!r}\n{RECORD}")

    def told() -> Talk:
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    return told


@pytest.fixture
def tunnel(s3_https: S3Server) -> Iterator[ConnectProxy]:
    """Return a proxy that knows the endpoint's name, which nobody else does."""
    with ConnectProxy({TARGET: (s3_https.host, s3_https.port)}) as server:
        yield server


@pytest.fixture
def named_env(
    s3_https: S3Server, tunnel: ConnectProxy, prefix: str, lnd: Lnd, staging: Path
) -> Env:
    """Return the settings with an endpoint whose name nobody but the proxy knows."""
    through = {"AWS_ENDPOINT_URL_S3": f"https://{HOST}", "HTTPS_PROXY": tunnel.url}
    return settings_for(s3_https, s3_https.create_bucket(), prefix, lnd, staging) | through


# --- What the user sets ---


@pytest.mark.parametrize(
    ("choice", "attempts"),
    [({}, 1), ({"AWS_MAX_ATTEMPTS": "2"}, 2), ({"AWS_RETRY_MODE": "standard"}, 3)],
    ids=["default", "max-attempts", "retry-mode"],
)
def test_the_users_attempts_win(fake: FakeS3, fake_env: Env, choice: Env, attempts: int) -> None:
    """By default the SDK tries once, since the loop has its own patience."""
    fake.set_default(answers.SLOW_DOWN)
    with use(fake_env | choice) as bucket, pytest.raises(program.TransientError, match="SlowDown"):
        bucket.put(SOME_NAME, channel_backup(1))
    assert len(fake.requests) == attempts


def test_a_profile_wins(fake: FakeS3, fake_env: Env, tmp_path: Path) -> None:
    """Its endpoint, region, attempts, checksums and credentials are used."""
    (tmp_path / "config").write_text(
        "[default]\naws_access_key_id = AKIDDEFAULT\naws_secret_access_key = made-up\n"
        "[profile node]\naws_access_key_id = AKIDNODE\naws_secret_access_key = made-up\n"
        f"endpoint_url = {fake.endpoint}\n"
        "region = eu-west-3\n"
        "max_attempts = 2\n"
        "request_checksum_calculation = when_supported\n"
    )
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del fake_env[name]
    profile = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "node"}
    fake.script(answers.SLOW_DOWN)
    with use(fake_env | profile) as bucket:
        bucket.put(SOME_NAME, channel_backup(1))
    assert len(fake.requests) == 2
    headers = fake.requests[1].headers
    assert "x-amz-checksum-crc32" in headers
    assert "Credential=AKIDNODE/" in headers["authorization"]
    assert "/eu-west-3/s3/" in headers["authorization"]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ({"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"}, "'x-amz-checksum-crc32': "),
        ({"AWS_REGION": "eu-north-1"}, "/eu-north-1/s3/"),
        ({"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "eu-south-2"}, "/eu-north-1/s3/"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-south-2"}, "/eu-south-2/s3/"),
        ({"AWS_REGION": ""}, "/us-east-1/s3/"),
    ],
    ids=["checksums", "region", "both", "default-region", "none"],
)
def test_regions_and_checksums_are_honoured(
    fake: FakeS3, fake_env: Env, choice: Env, sent: str
) -> None:
    """Requests are signed for AWS_REGION, else AWS_DEFAULT_REGION, else us-east-1."""
    with use(fake_env | choice) as bucket:
        bucket.put(SOME_NAME, channel_backup(1))
    assert sent in str(fake.requests[0].headers)


# --- What answers ---


@pytest.mark.parametrize(
    ("name", "days", "trusted", "pattern"),
    [
        ("127.0.0.1", -2, True, "warning: .*expired.*\n.*renew the certificate; or set the clock"),
        ("127.0.0.1", 2, True, "warning: .*not yet valid.*\n.*clock"),
        ("127.0.0.1", 0, False, "error: .*certificate verify failed.*\n.*AWS_CA_BUNDLE"),
        ("example.org", 0, True, "error: .*'127.0.0.1' doesn't match 'example.org'.*\n.*name"),
    ],
    ids=["expired", "not yet", "unknown authority", "other name"],
)
def test_a_certificate_that_is_refused(
    bare_env: Env,
    s3_http: S3Server,
    tmp_path: Path,
    name: str,
    days: int,
    pattern: str,
    *,
    trusted: bool,
) -> None:
    """One of another time may be right later."""
    starts = timedelta(days=days, minutes=-1)
    with TlsFront(s3_http.port, tmp_path, name=name, starts=starts) as front:
        bare_env["AWS_ENDPOINT_URL_S3"] = f"https://127.0.0.1:{front.port}"
        if trusted:
            bare_env["AWS_CA_BUNDLE"] = str(front.ca_file)
        assert re.match(pattern, failure_of(bare_env))


def test_a_bucket_in_another_region_is_found(s3: S3Server, bucket: str, env: Env, lnd: Lnd) -> None:
    """A put-only key is enough, with a wrong AWS_REGION, or none."""
    for region in ("eu-north-1", ""):
        lnd.write()
        done_well(env | {"AWS_REGION": region})
    stored = [entry.data for _, entry in sorted(s3.objects(bucket).items())]
    assert stored == [version.data for version in lnd.written]


# --- Endpoints and the bucket's name ---


CONFIG = {
    "profile": "[profile node]\nendpoint_url = {}\n",
    "service": "[profile node]\nservices = at\n[services at]\ns3 =\n  endpoint_url = {}\n",
}


At = Callable[[str, str], Env]


@pytest.fixture
def at(written_env: Env, tmp_path: Path) -> At:
    """Return what gives the settings that lead to an endpoint by one of the SDK's own ways."""

    def settings(how: str, endpoint: str) -> Env:
        settings = written_env | {"AWS_ENDPOINT_URL_S3": ""}
        if how not in CONFIG:
            return settings | {how: endpoint}
        (tmp_path / "config").write_text(CONFIG[how].format(endpoint))
        return settings | {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "node"}

    return settings


@pytest.mark.unmeasured
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
    fake: FakeS3, at: At, how: str, path: str, command: str
) -> None:
    """It is refused wherever it comes from, and nothing is sent."""
    said = refused(at(how, fake.endpoint + path), "some-bucket", args=(command,))
    assert "endpoint" in said.lower()
    assert not fake.requests


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("how", "endpoint", "path"),
    [
        ("AWS_ENDPOINT_URL_S3", "{}/storage/v1/s3", "/storage/v1/s3/some-bucket/alice/"),
        ("AWS_ENDPOINT_URL", "{}/not-some-bucket", "/not-some-bucket/some-bucket/alice/"),
        ("profile", "{}/some-bucket/v1/s3", "/some-bucket/v1/s3/some-bucket/alice/"),
        ("service", "{}/not-some-bucket", "/not-some-bucket/some-bucket/alice/"),
        ("AWS_ENDPOINT_URL_S3", "http://some-bucket", "http://some-bucket/some-bucket/alice/"),
    ],
)
def test_an_endpoint_that_is_right(
    fake: FakeS3, at: At, how: str, endpoint: str, path: str
) -> None:
    """Its path is kept, and may resemble the bucket's name, which the host may bear; NO_PROXY is
    heeded.
    """
    proxy = {"HTTP_PROXY": fake.endpoint, "NO_PROXY": "127.0.0.1"}
    done = done_well(at(how, endpoint.format(fake.endpoint)) | proxy)
    assert "warning: " not in done.stderr
    (request,) = fake.requests
    assert request.path.startswith(path)


@pytest.mark.unmeasured
@pytest.mark.parametrize("how", ["AWS_ENDPOINT_URL", "service"])
def test_an_endpoint_that_is_not_in_use(fake: FakeS3, at: At, how: str) -> None:
    """It is not judged, as another one overrides it."""
    unused = at(how, "http://127.0.0.1:1/some-bucket")
    done_well(unused | {"AWS_ENDPOINT_URL_S3": fake.endpoint})


@pytest.mark.unmeasured
@pytest.mark.parametrize("how", ["AWS_ENDPOINT_URL_S3", "profile"])
def test_an_endpoint_that_begins_with_the_bucket(at: At, how: str) -> None:
    """Some providers show it so: it is warned of."""
    begins = at(how, "https://some-bucket.fra1.example.com")
    done = run_script(begins | {"HTTPS_PROXY": NOWHERE}, "list")
    assert done.returncode == 75, done.stderr
    assert re.search(r"warning: the endpoint \S*some-bucket\.", done.stderr)


@pytest.mark.unmeasured
@pytest.mark.parametrize("line", ["ca_bundle = /nowhere/ca.pem", "region = eu 1"])
def test_a_file_of_the_sdks_that_is_wrong(written_env: Env, tmp_path: Path, line: str) -> None:
    (tmp_path / "config").write_text(f"[default]\n{line}\n")
    at = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_REGION": ""}
    refused(written_env | at, line.rpartition(" = ")[2])


# --- Whom it talks to ---


@pytest.mark.unmeasured
def test_through_a_proxy_only_the_proxy_hears_of_the_program(
    s3_https: S3Server,
    named_env: Env,
    tunnel: ConnectProxy,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
) -> None:
    """No command looks up a name; the proxy sees one target, and that of the heartbeat."""
    beating = {"HEARTBEAT_URL": "http://heartbeat.example.org/ping", "HTTP_PROXY": tunnel.url}
    version = lnd.write()
    with Daemon(named_env | beating) as daemon:
        daemon.wait_for_stored(version)
        version = lnd.write()
        daemon.wait_for_stored(version)
        daemon.wait_for_log("cannot reach HEARTBEAT_URL")  # this proxy knows CONNECT alone
        assert daemon.stop() == 0
    bucket = named_env["S3_BUCKET_NAME"]
    reader = named_env | reader_settings(s3_https, bucket, prefix, s3_https.reader_user(bucket))
    reader["AWS_ENDPOINT_URL_S3"] = named_env["AWS_ENDPOINT_URL_S3"]
    output = lnd.directory.parent / "restored"
    for command in (["list"], ["check"], ["restore", "--output", str(output)]):
        done_well(reader, *command)
    assert output.read_bytes() == version.data
    assert places(talk()) == {tunnel.address}
    assert set(tunnel.asked) == {f"CONNECT {TARGET}", "GET http://heartbeat.example.org/ping"}
    # The daemon keeps its connection for what comes at once; each of the others has one.
    assert tunnel.asked.count(f"CONNECT {TARGET}") == 4


@pytest.mark.unmeasured
@pytest.mark.cold  # what the libraries do while they are loaded is recorded as well
def test_without_a_proxy_only_the_endpoint_is_asked(
    s3: S3Server, env: Env, talk: Callable[[], Talk], lnd: Lnd
) -> None:
    """A put is one look-up of its name and one connection to it."""
    lnd.write()
    done_well(env | {"AWS_EC2_METADATA_DISABLED": ""})
    assert talk() == [("name", s3.host, s3.port), ("connection", s3.host, s3.port)]


@pytest.mark.unmeasured
@pytest.mark.parametrize("there", [True, False], ids=["unknown name", "no proxy"])
def test_a_proxy_that_fails_is_never_passed_by(
    named_env: Env, talk: Callable[[], Talk], *, there: bool
) -> None:
    with ConnectProxy({}) as failing:
        if not there:
            failing.__exit__()
        done = run_script(named_env | {"HTTPS_PROXY": failing.url}, "list")
    assert done.returncode == 75, done.stderr
    assert re.search(f"cannot list: .*proxy.*{failing.url}", done.stderr)
    assert places(talk()) == {failing.address}


@pytest.mark.unmeasured
def test_the_configured_source_of_credentials_is_asked(
    named_env: Env, tunnel: ConnectProxy, talk: Callable[[], Talk], lnd: Lnd
) -> None:
    """A container's service gives them, and nothing else is asked."""
    given = {
        "AccessKeyId": named_env.pop("AWS_ACCESS_KEY_ID"),
        "SecretAccessKey": named_env.pop("AWS_SECRET_ACCESS_KEY"),
        "Token": "",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    lnd.write()
    with FakeS3(defaults={"GET": Answer(body=json.dumps(given).encode())}) as service:
        source = {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{service.endpoint}/role",
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "Basic abcd",
            "AWS_EC2_METADATA_DISABLED": "",
        }
        done_well(named_env | source)
        assert places(talk()) == {tunnel.address, ("127.0.0.1", service.port)}
        (request,) = service.requests
        assert (request.path, request.headers["authorization"]) == ("/role", "Basic abcd")
    assert set(tunnel.asked) == {f"CONNECT {TARGET}"}


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("choice", "asked"),
    [
        ({"AWS_EC2_METADATA_DISABLED": "false"}, {("169.254.169.254", 80)}),
        ({"AWS_EC2_METADATA_DISABLED": "true"}, set()),
        ({"AWS_EC2_METADATA_SERVICE_ENDPOINT": NOWHERE}, {("127.0.0.1", 1)}),
    ],
    ids=["false", "true", "own"],
)
def test_the_metadata_service_is_asked_only_by_choice(
    env: Env, talk: Callable[[], Talk], lnd: Lnd, choice: Env, asked: set[tuple[str, int]]
) -> None:
    """The unit makes that choice, and the example explains it."""
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    lnd.write()
    assert run_script(env | {"AWS_EC2_METADATA_DISABLED": ""} | choice, "once").returncode == 1
    assert places(talk()) == asked
    unit = (CHECKOUT / "lnd-backup.service").read_text(encoding="utf-8")
    assert re.search(r"^Environment=.*AWS_EC2_METADATA_DISABLED=true", unit, re.MULTILINE)
    assert "AWS_EC2_METADATA_DISABLED=" in (CHECKOUT / "lnd-backup-env.example").read_text()
