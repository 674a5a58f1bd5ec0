"""Whom the program talks to: the endpoint, the configured source of credentials, and nobody else; a
proxy hides both.

Every look-up of a name and every connection of the program's process is recorded, as Python's audit
events tell them. What would leave this machine fails instead.
"""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING

import pytest
from kit import (
    CHECKOUT,
    PATIENCE_SECONDS,
    Answer,
    Daemon,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    reader_settings,
    run_script,
    settings_for,
)
from kit.tunnel import ConnectProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

NAME = "s3.example.org"
TARGET = f"{NAME}:443"
METADATA = "169.254.169.254"
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


@pytest.fixture
def talk(tmp_path: Path, started_by: Callable[[str], None]) -> Callable[[], Talk]:
    """Return what gives all look-ups and connections until now, as kind, host and port."""
    file = tmp_path / "talk"
    started_by(f"TALK = {str(file)!r}\n{RECORD}")

    def told() -> Talk:
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(json.loads(line)) for line in lines]

    return told


@pytest.fixture
def proxy(s3_https: S3Server) -> Iterator[ConnectProxy]:
    """Return a proxy that knows the endpoint's name, which nobody else does."""
    with ConnectProxy({TARGET: (s3_https.host, s3_https.port)}) as server:
        yield server


def test_through_a_proxy_only_the_proxy_hears_of_the_program(
    s3_https: S3Server,
    proxy: ConnectProxy,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
    staging: Path,
) -> None:
    """With HTTPS_PROXY every command talks to the proxy alone, looks up no name, and the proxy sees
    one target.
    """
    bucket = s3_https.create_bucket()
    through = {"AWS_ENDPOINT_URL_S3": f"https://{NAME}", "HTTPS_PROXY": proxy.url}
    env = settings_for(s3_https, bucket, prefix, lnd, staging) | through
    version = lnd.write()
    with Daemon(env) as daemon:
        daemon.wait_for_stored(version)
        version = lnd.write()
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    reader = reader_settings(s3_https, bucket, prefix, s3_https.reader_user(bucket)) | through
    output = lnd.directory.parent / "restored"
    for command in (["list"], ["check"], ["restore", "--output", str(output)]):
        done = run_script(reader | {"MONITOR_FILE_PATH": str(lnd.path)}, *command)
        assert done.returncode == 0, done.stderr
    assert output.read_bytes() == version.data
    assert {(host, port) for _, host, port in talk()} == {proxy.address}
    assert set(proxy.asked) == {f"CONNECT {TARGET}"}
    connections = [host for kind, host, _ in talk() if kind == "connection"]
    # The daemon keeps its connection for what comes at once; each of the others has one.
    assert len(connections) == len(proxy.asked) == 4


def test_the_heartbeat_goes_through_the_proxy_too(
    s3_https: S3Server,
    proxy: ConnectProxy,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
    staging: Path,
) -> None:
    """The heartbeat is the only other request, its name is looked up by nobody but the proxy, and
    it loses nothing.
    """
    env = settings_for(s3_https, s3_https.create_bucket(), prefix, lnd, staging)
    through = {
        "AWS_ENDPOINT_URL_S3": f"https://{NAME}",
        "HTTPS_PROXY": proxy.url,
        "HTTP_PROXY": proxy.url,
    }
    version = lnd.write()
    with Daemon(env | through | {"HEARTBEAT_URL": "http://heartbeat.example.org/ping"}) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_log("cannot reach HEARTBEAT_URL")  # this proxy knows CONNECT alone
        assert daemon.stop() == 0
    assert {(host, port) for _, host, port in talk()} == {proxy.address}
    assert set(proxy.asked) == {f"CONNECT {TARGET}", "GET http://heartbeat.example.org/ping"}


def test_without_a_proxy_only_the_endpoint_is_asked(
    s3: S3Server, env: dict[str, str], talk: Callable[[], Talk], lnd: Lnd
) -> None:
    """Without a proxy a put is one look-up of the endpoint's name and one connection to it, and
    nothing else.
    """
    lnd.write()
    done = run_script(env | {"AWS_EC2_METADATA_DISABLED": ""}, "once")
    assert done.returncode == 0, done.stderr
    assert talk() == [("name", s3.host, s3.port), ("connection", s3.host, s3.port)]


def test_an_endpoint_in_no_proxy_is_asked_itself(
    s3_https: S3Server,
    proxy: ConnectProxy,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
    staging: Path,
) -> None:
    """NO_PROXY is honoured: the endpoint that it names is asked without the proxy."""
    env = settings_for(s3_https, s3_https.create_bucket(), prefix, lnd, staging)
    lnd.write()
    assert (
        run_script(env | {"HTTPS_PROXY": proxy.url, "NO_PROXY": "127.0.0.1"}, "once").returncode
        == 0
    )
    assert {port for _, _, port in talk()} == {s3_https.port}
    assert proxy.asked == []


@pytest.mark.parametrize("there", [True, False], ids=["unknown name", "no proxy"])
def test_a_proxy_that_fails_is_never_passed_by(
    s3_https: S3Server,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
    staging: Path,
    *,
    there: bool,
) -> None:
    """When the proxy refuses the name, or is not there, nothing goes out by another way, and the
    message names it.
    """
    env = settings_for(s3_https, s3_https.create_bucket(), prefix, lnd, staging)
    versions = [lnd.write()]
    with ConnectProxy({}) as proxy:
        if not there:
            proxy.__exit__()
        through = {
            "AWS_ENDPOINT_URL_S3": f"https://{NAME}",
            "HTTPS_PROXY": proxy.url,
            "SHUTDOWN_GRACE_SECONDS": "0",
        }
        with Script(env | through) as script:
            script.wait_for_log(f"cannot store: .*proxy.*{proxy.url}")
            tried = len(talk())
            versions.append(lnd.write())  # it is tried at once
            deadline = time.monotonic() + PATIENCE_SECONDS
            while len(talk()) == tried:
                assert time.monotonic() < deadline, script.log
                time.sleep(0.02)
            assert script.stop() == 0
    assert {(host, port) for _, host, port in talk()} == {proxy.address}
    assert [path.read_bytes() for path in sorted(staging.glob("2*"))] == [
        version.data for version in versions
    ]


def test_the_configured_source_of_credentials_is_asked(
    s3_https: S3Server,
    proxy: ConnectProxy,
    talk: Callable[[], Talk],
    prefix: str,
    lnd: Lnd,
    staging: Path,
) -> None:
    """Credentials that a container's service gives are fetched from it, and from nowhere else."""
    env = settings_for(s3_https, s3_https.create_bucket(), prefix, lnd, staging)
    key, secret = env.pop("AWS_ACCESS_KEY_ID"), env.pop("AWS_SECRET_ACCESS_KEY")
    given = {
        "AccessKeyId": key,
        "SecretAccessKey": secret,
        "Token": "",
        "Expiration": "2099-01-01T00:00:00Z",
    }
    lnd.write()
    with FakeS3(defaults={"GET": Answer(body=json.dumps(given).encode())}) as service:
        through = {
            "AWS_ENDPOINT_URL_S3": f"https://{NAME}",
            "HTTPS_PROXY": proxy.url,
            "AWS_EC2_METADATA_DISABLED": "",
        }
        source = {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{service.endpoint}/role"}
        done = run_script(env | through | source, "once")
        assert done.returncode == 0, done.stderr
        assert {(host, port) for _, host, port in talk()} == {
            proxy.address,
            ("127.0.0.1", service.port),
        }
        assert {request.path for request in service.requests} == {"/role"}
    assert set(proxy.asked) == {f"CONNECT {TARGET}"}


@pytest.mark.parametrize(("choice", "asked"), [("false", {METADATA}), ("true", set())])
def test_the_metadata_service_is_asked_only_by_choice(
    env: dict[str, str], talk: Callable[[], Talk], lnd: Lnd, choice: str, asked: set[str]
) -> None:
    """Without credentials the metadata service is asked only where AWS_EC2_METADATA_DISABLED, which
    the unit sets and the example explains, does not say otherwise.
    """
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    lnd.write()
    assert run_script(env | {"AWS_EC2_METADATA_DISABLED": choice}, "once").returncode == 1
    assert {host for _, host, _ in talk()} == asked
    unit = (CHECKOUT / "lnd-backup.service").read_text(encoding="utf-8")
    assert re.search(r"^Environment=.*AWS_EC2_METADATA_DISABLED=true", unit, re.MULTILINE)
    assert "AWS_EC2_METADATA_DISABLED=" in (CHECKOUT / "lnd-backup-env.example").read_text()


def test_a_metadata_service_of_ones_own_is_asked(
    env: dict[str, str], talk: Callable[[], Talk], lnd: Lnd
) -> None:
    """Who names a metadata service, as a helper on this machine is, has chosen it: no default
    stands in its way.
    """
    del env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"]
    lnd.write()
    own = {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1",
        "AWS_EC2_METADATA_DISABLED": "",
    }
    assert run_script(env | own, "once").returncode == 1
    assert ("connection", "127.0.0.1", 1) in talk()
