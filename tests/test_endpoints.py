"""Endpoints, certificates, clocks, regions and stores that are not as they should be, and what the
program says.
"""

from __future__ import annotations

import hashlib
import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from kit import (
    Answer,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    channel_backup,
    hurried,
    run_script,
    settings_at,
    settings_for,
)
from stores.front import TlsFront

if TYPE_CHECKING:
    from collections.abc import Callable

EMPTY_LIST = (
    b'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Name>some-bucket</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
)


@pytest.fixture
def some_env(lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return settings that lack the endpoint, with a file to back up."""
    lnd.write()
    env = settings_at("", lnd, staging) | {"SHUTDOWN_GRACE_SECONDS": "0"}
    del env["AWS_ENDPOINT_URL_S3"]
    return env


def failure_of(env: dict[str, str]) -> str:
    """Return what the daemon logs when it cannot store, with the hint; it goes on, and is
    stopped.
    """
    with Script(env) as script:
        said = script.wait_for_log(r"\w+: cannot store: .*\n.*hint: .*").group()
        assert script.stop() == 0
    return said


# --- the endpoint ---


def test_a_path_in_the_endpoint_is_kept(some_env: dict[str, str]) -> None:
    """A store below a path of its host is asked there."""
    with FakeS3() as fake:
        done = run_script(
            some_env | {"AWS_ENDPOINT_URL_S3": f"{fake.endpoint}/storage/v1/s3"}, "once"
        )
        assert done.returncode == 0, done.stderr
        assert fake.requests[0].path.startswith("/storage/v1/s3/some-bucket/alice/")


def test_a_host_may_be_called_like_the_bucket(some_env: dict[str, str]) -> None:
    """An endpoint whose host bears the bucket's name is right: only a path that ends with it is
    not.
    """
    with FakeS3() as fake:
        named = {"AWS_ENDPOINT_URL_S3": "http://some-bucket", "HTTP_PROXY": fake.endpoint}
        done = run_script(some_env | named, "once")
        assert len(fake.requests) == 1, done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["once", "list"])
def test_a_portal_that_redirects_may_be_passed_later(
    some_env: dict[str, str], started_by: Callable[[str], None], command: str
) -> None:
    """What sends every request elsewhere, and so the SDK in circles, is out of reach, and no fault
    of the program.
    """
    started_by(hurried(20))
    elsewhere = Answer(
        302, headers={"Location": "http://portal.example.org/"}, body=b"", etag=False
    )
    with FakeS3(defaults=dict.fromkeys(("PUT", "GET", "HEAD"), elsewhere)) as fake:
        done = run_script(some_env | {"AWS_ENDPOINT_URL_S3": fake.endpoint}, command)
    assert done.returncode == 75, done.stderr
    assert "a fault of this program" not in done.stderr


def test_the_log_says_at_the_start_what_is_in_use(some_env: dict[str, str]) -> None:
    """Endpoint, region and credentials stand in the daemon's log also while LND has written
    nothing.
    """
    Path(some_env["MONITOR_FILE_PATH"]).unlink()
    with FakeS3() as fake, Script(some_env | {"AWS_ENDPOINT_URL_S3": fake.endpoint}) as script:
        script.wait_for_log(f"using endpoint {fake.endpoint}, region us-east-1, credentials: env$")
        assert script.stop() == 0
        assert not fake.requests


def test_credentials_that_come_late_end_the_trouble(
    some_env: dict[str, str], tmp_path: Path
) -> None:
    """A credential program that fails is told of before there is anything to send; when it works,
    all is well again.
    """
    Path(some_env["MONITOR_FILE_PATH"]).unlink()
    key = tmp_path / "key.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {key}\n")
    env = some_env | {
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


# --- TLS ---


class OtherFront(TlsFront):
    """A front with a certificate of another name or time."""

    def __init__(self, port: int, directory: Path, name: str = "127.0.0.1", days: int = 0) -> None:
        """Make the certificate: for one day, which began so many days from now."""
        super().__init__(port, directory)
        authority, begins = trustme.CA(), datetime.now(UTC) + timedelta(days=days, minutes=-1)
        self.ca_file.unlink()
        authority.cert_pem.write_to_path(str(self.ca_file))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate = authority.issue_cert(
            name, not_before=begins, not_after=begins + timedelta(days=1)
        )
        certificate.configure_cert(self._context)

    def env(self) -> dict[str, str]:
        """Return the settings that lead here."""
        return {
            "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{self.port}",
            "AWS_CA_BUNDLE": str(self.ca_file),
        }


@pytest.mark.parametrize(("days", "words"), [(-2, "has expired"), (2, "not yet valid")])
def test_a_certificate_of_another_time_is_a_matter_of_the_clock(
    some_env: dict[str, str], s3_http: S3Server, tmp_path: Path, days: int, words: str
) -> None:
    """A certificate that has expired, or is not valid yet, leads to the clock, and so do the
    words.
    """
    with OtherFront(s3_http.port, tmp_path, days=days) as front:
        said = failure_of(some_env | front.env())
    assert words in said
    assert "clock" in said.partition("hint: ")[2]


def test_a_self_signed_certificate_is_refused(some_env: dict[str, str], s3_https: S3Server) -> None:
    """A certificate of an authority that nobody named is an error that names AWS_CA_BUNDLE, and
    nothing is sent.
    """
    said = failure_of(some_env | {"AWS_ENDPOINT_URL_S3": s3_https.endpoint})
    assert said.startswith("error: ")
    assert "certificate verify failed" in said
    assert "AWS_CA_BUNDLE" in said


def test_a_certificate_for_another_name_is_refused(
    s3_http: S3Server, some_env: dict[str, str], tmp_path: Path
) -> None:
    """A certificate for another name is an error that says so."""
    with OtherFront(s3_http.port, tmp_path, name="s3.example.org") as front:
        said = failure_of(some_env | front.env())
    assert said.startswith("error: "), said
    assert "hostname '127.0.0.1' doesn't match 's3.example.org'" in said


@pytest.mark.parametrize(
    "content", [b"", b"no certificate\n", None], ids=["empty", "rubbish", "directory"]
)
def test_a_ca_bundle_without_a_certificate_is_wrong_configuration(
    some_env: dict[str, str], tmp_path: Path, content: bytes | None
) -> None:
    """A CA bundle that holds no certificate, or is a directory, is told at the start, with its
    name.
    """
    bundle = tmp_path / "bundle"
    bundle.mkdir() if content is None else bundle.write_bytes(content)
    env = some_env | {"AWS_ENDPOINT_URL_S3": "https://127.0.0.1:9", "AWS_CA_BUNDLE": str(bundle)}
    done = run_script(env, "once")
    assert done.returncode == 78, done.stderr
    assert str(bundle) in done.stderr


# --- the clock ---


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_clock_that_is_wrong_for_the_signature(
    env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None], hours: int
) -> None:
    """When S3 compares the time of the signature with its own and refuses it, the message says to
    set the clock.
    """
    lnd.write()
    started_by(
        "import datetime, botocore.auth\n"
        "now = botocore.auth.get_current_datetime\n"
        f"botocore.auth.get_current_datetime = lambda *a, **k: now(*a, **k) + "
        f"datetime.timedelta(hours={hours})"
    )
    said = failure_of(env | {"SHUTDOWN_GRACE_SECONDS": "0"})
    assert "RequestTimeTooSkewed" in said
    assert "clock" in said.partition("hint: ")[2]


# --- the bucket ---


def test_a_bucket_in_another_region_is_found(
    s3: S3Server, bucket: str, prefix: str, lnd: Lnd, staging: Path
) -> None:
    """With a wrong AWS_REGION, or none, and a put-only key the version is stored where S3 says that
    the bucket is.
    """
    env = settings_for(s3, bucket, prefix, lnd, staging)
    for region in ("eu-north-1", ""):
        lnd.write()
        done = run_script(env | {"AWS_REGION": region}, "once")
        assert done.returncode == 0, done.stderr
    stored = [entry.data for _, entry in sorted(s3.objects(bucket).items())]
    assert stored == [version.data for version in lnd.written]


def test_a_default_retention_locks_what_is_put(
    s3: S3Server, prefix: str, lnd: Lnd, staging: Path
) -> None:
    """A bucket with a default retention, which refuses puts without a check, takes the version and
    locks it.
    """
    bucket = s3.create_bucket(ObjectLockEnabledForBucket=True)
    retention = {"Mode": "GOVERNANCE", "Days": 1}
    s3.admin.put_object_lock_configuration(
        Bucket=bucket,
        ObjectLockConfiguration={
            "ObjectLockEnabled": "Enabled",
            "Rule": {"DefaultRetention": retention},
        },
    )
    lnd.write()
    done = run_script(settings_for(s3, bucket, prefix, lnd, staging), "once")
    assert done.returncode == 0, done.stderr
    [key] = s3.objects(bucket)
    assert s3.admin.head_object(Bucket=bucket, Key=key)["ObjectLockMode"] == "GOVERNANCE"


def test_a_store_that_does_not_keep_what_it_acknowledged_is_found_out(
    some_env: dict[str, str], staging: Path
) -> None:
    """A 200 for what was not kept passes for a receipt; `check` with a key that may read tells the
    truth.
    """
    with FakeS3(defaults={"GET": Answer(body=EMPTY_LIST)}) as forgetful:
        env = some_env | {"AWS_ENDPOINT_URL_S3": forgetful.endpoint}
        assert run_script(env, "once").returncode == 0
        assert list(staging.glob("2*")) == []
        done = run_script(env, "check", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["current"], told["proof"]) == (False, "bucket")


def test_the_names_of_metadata_have_no_case(some_env: dict[str, str], tmp_path: Path) -> None:
    """A store that writes X-Amz-Meta-Sha256 with capitals, as those in Go do, keeps the SHA-256 all
    the same.
    """
    data = channel_backup(1)
    digest = hashlib.sha256(data).hexdigest()
    kept = Answer(
        headers={"X-Amz-Meta-Sha256": digest, "Last-Modified": "Fri, 20 Nov 2026 21:55:59 GMT"},
        body=data,
    )
    name = f"20261120T215558.123456Z-{digest[-6:]}"
    with FakeS3(defaults={"GET": kept}) as fake:
        env = some_env | {"AWS_ENDPOINT_URL_S3": fake.endpoint}
        done = run_script(env, "restore", "--key", name, "--output", str(tmp_path / "restored"))
    assert done.returncode == 0, done.stderr
    assert "six digits" not in done.stderr
