"""What goes to S3, what counts as its receipt, and what each of its errors leads to."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import botocore.credentials
import botocore.exceptions as sdk
import pytest
import urllib3
from botocore.awsrequest import AWSResponse, HeadersDict
from botocore.httpsession import URLLib3Session
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st
from kit import (
    MADE_UP,
    PATIENCE_SECONDS,
    Answer,
    FakeS3,
    FaultProxy,
    Lnd,
    S3Server,
    Script,
    allow,
    assert_nothing_lost,
    channel_backup,
    hurried,
    run_script,
    settings_for,
)
from kit import fake_s3 as answers

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "20261120T215558.123456Z-a1b2c3"
SECRET = MADE_UP.secret_key
STATEMENT = '{"Effect": "Allow"}'
ONE_MINUTE = 60.0


# --- Every error has a kind and something to do ---


def client_error(code: str, status: int, message: str = "said so") -> sdk.ClientError:
    """Return the error that botocore makes of S3's answer."""
    parsed = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return sdk.ClientError(parsed, "PutObject")


def verification(reason: str) -> sdk.SSLError:
    """Return the error of a certificate that is not trusted."""
    error = f"[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: {reason} (_ssl.c:992)"
    return sdk.SSLError(endpoint_url="https://s3.example.org", error=error)


URL = "https://s3.example.org"
REFUSED = sdk.EndpointConnectionError(endpoint_url=URL, error="[Errno 111] Connection refused")
SELF_SIGNED = verification("self-signed certificate")
FAILED, AGAIN, DENIED = program.BackupError, program.TransientError, program.AccessDeniedError
KINDS: list[tuple[type[program.BackupError], str, list[Exception]]] = [  # kind, hint, errors
    (
        AGAIN,
        "network|portal",
        [
            REFUSED,
            ResponseParserError("Unable to parse response (not well-formed): line 1"),
            RecursionError("maximum recursion depth exceeded"),
            sdk.ConnectTimeoutError(endpoint_url=URL, error="timed out"),
            sdk.ProxyConnectionError(proxy_url="http://proxy.example.org", error="refused"),
            sdk.SSLError(endpoint_url=URL, error="EOF occurred in violation of protocol"),
            sdk.HTTPClientError(error="something else"),
            sdk.ConnectionClosedError(endpoint_url=URL),
            sdk.ReadTimeoutError(endpoint_url=URL, error="timed out"),
            sdk.ResponseStreamingError(error="IncompleteRead"),
            sdk.IncompleteReadError(actual_bytes=1, expected_bytes=2),
            *[client_error(code, 503) for code in ("SlowDown", "ServiceUnavailable")],
            client_error("InternalError", 500),
            client_error("OperationAborted", 409),
            client_error("TooManyRequests", 429),
            *[
                client_error(code, 400)
                for code in ("RequestTimeout", "Throttling", "ThrottlingException")
            ],
            *[client_error(code, 400) for code in ("BadDigest", "XAmzContentSHA256Mismatch")],
        ],
    ),
    (  # without a code of S3's something else has answered
        AGAIN,
        "portal",
        [
            client_error(str(status), status, "")
            for status in (301, 400, 401, 403, 404, 407, 408, 429, 500, 502, 503, 504, 507, 520)
        ],
    ),
    (
        AGAIN,
        "clock",
        [
            client_error("RequestTimeTooSkewed", 403),
            client_error("RequestExpired", 400),
            verification("certificate is not yet valid"),
            verification("certificate has expired"),
        ],
    ),
    (
        FAILED,
        "access key",
        [
            *[client_error(code, 403) for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch")],
            *[
                client_error(code, 400)
                for code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
            ],
        ],
    ),
    (DENIED, re.escape(STATEMENT), [client_error("AccessDenied", 403)]),
    (
        FAILED,
        "AWS_",
        [
            sdk.NoCredentialsError(),
            sdk.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            sdk.ProfileNotFound(profile="node"),
            sdk.ConfigParseError(path="/etc/aws/config"),
            sdk.NoRegionError(),
            sdk.EndpointResolutionError(msg="no such endpoint"),
            sdk.ParamValidationError(report="Invalid bucket name"),
            sdk.InvalidChecksumConfigError(config_key="a", config_value="b", valid_options="c"),
        ],
    ),
    (
        FAILED,
        "AWS_CA_BUNDLE",
        [
            SELF_SIGNED,
            verification("Hostname mismatch, certificate is not valid for 's3.example.org'"),
        ],
    ),
    (FAILED, "bucket", [client_error("NoSuchBucket", 404), client_error("InvalidBucketName", 400)]),
    (FAILED, "quota", [client_error("QuotaExceeded", status) for status in (403, 507)]),
    (
        FAILED,
        "AWS_REGION",
        [client_error("AuthorizationHeaderMalformed", 400), client_error("PermanentRedirect", 301)],
    ),
    (
        FAILED,
        "provider",
        [
            *[
                client_error(code, 400)
                for code in ("InvalidRequest", "InvalidArgument", "EntityTooLarge")
            ],
            client_error("KMS.DisabledException", 400),
            client_error("NotImplemented", 501),
            client_error("UserSuspended", 403),
            client_error("PreconditionFailed", 412),
        ],
    ),
]


def label(error: Exception) -> str:
    """Name an error in the list of the tests."""
    if isinstance(error, sdk.ClientError):
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        return f"{error.response['Error']['Code']}-{status}"
    return f"{type(error).__name__}-{str(error).removesuffix(' (_ssl.c:992)')[-12:]}"


@pytest.mark.parametrize(
    ("kind", "hint", "error"),
    [
        pytest.param(kind, hint, error, id=f"{kind.__name__}-{label(error)}")
        for kind, hint, errors in KINDS
        for error in errors
    ],
)
def test_errors_have_kinds(kind: type[program.BackupError], hint: str, error: Exception) -> None:
    """An error of any class has the kind that decides what follows, says what, on what and why,
    and names what has to be changed: for a missing permission, the policy statement to add.
    """
    found = program.classify_s3_error("cannot store: s3://bucket/key", error, STATEMENT)
    assert type(found) is kind
    what, on_what, why = str(found).split(": ", 2)
    assert (what, on_what) == ("cannot store", "s3://bucket/key")
    assert why.strip(" :")
    assert "\n" not in str(found)
    assert re.search(hint, found.hint)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            client_error("InvalidAccessKeyId", 403, "does not exist"),
            ("InvalidAccessKeyId", "does not exist", "403"),
        ),
        (REFUSED, ("Connection refused",)),
        (SELF_SIGNED, ("self-signed certificate",)),
        (sdk.ParamValidationError(report="Invalid bucket name"), ("Invalid bucket name",)),
    ],
    ids=["answer", "connection", "certificate", "parameter"],
)
def test_reasons_are_told(error: Exception, words: tuple[str, ...]) -> None:
    """A message holds the reason itself, also where the SDK keeps it to itself or on a second
    line.
    """
    said = str(program.classify_s3_error("cannot store: s3://bucket/key", error))
    assert all(word in said for word in words)


TEXTS = st.text(max_size=100)


@given(code=TEXTS, message=TEXTS, status=st.integers(0, 999), statement=TEXTS)
def test_no_answer_is_too_strange(code: str, message: str, status: int, statement: str) -> None:
    """Whatever code, message and status S3 answers, there is an explanation with them in it and a
    hint.
    """
    error = client_error(code, status, message)
    found = program.classify_s3_error("cannot store: x", error, statement)
    assert code in str(found)
    assert message in str(found)
    assert found.hint


@given(text=TEXTS)
def test_no_exception_is_too_strange(text: str) -> None:
    """Whatever an exception says, and an answer that lacks all parts of an error, there is an
    explanation and a hint.
    """
    for error in (
        RuntimeError(text),
        ValueError(text),
        OSError(text),
        sdk.HTTPClientError(error=text),
        sdk.SSLError(endpoint_url=text, error=text),
        sdk.CredentialRetrievalError(provider=text, error_msg=text),
        sdk.ParamValidationError(report=text),
        sdk.ClientError({}, text),
    ):
        assert program.classify_s3_error("cannot store: x", error).hint


# --- A bucket in this process ---


@contextlib.contextmanager
def use(env: dict[str, str]) -> Iterator[program.Bucket]:
    """Put the settings into the environment, yield the bucket they describe, and close its
    connections.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        found = program.load_settings(os.environ, "once")
        bucket = program.Bucket(found.bucket, found.prefix, found.put_arguments)
        try:
            yield bucket
        finally:
            if bucket.client:
                bucket.client.close()


def staged_data(staging: Path) -> list[bytes]:
    """Return the staged versions, oldest first."""
    return [path.read_bytes() for path in sorted(staging.glob("2*"))]


def wait_until_staged(staging: Path, versions: list[bytes]) -> None:
    """Wait until these versions are staged, oldest first; the log tells of a capture a moment
    before.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while staged_data(staging) != versions:
        assert time.monotonic() < deadline, f"staged: {sorted(staging.iterdir())}"
        time.sleep(0.01)


def md5(data: bytes) -> str:
    """Return the value of Content-MD5."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def sha256(data: bytes) -> str:
    """Return the value of x-amz-checksum-sha256."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def assert_checked_by_md5(headers: dict[str, str], data: bytes) -> None:
    """Fail unless the request asks for the one check that every store honours, and for nothing that
    breaks some.
    """
    assert headers["content-md5"] == md5(data)
    assert headers["content-length"] == str(len(data))
    assert headers["x-amz-meta-sha256"] == hashlib.sha256(data).hexdigest()
    assert "expect" not in headers
    assert "transfer-encoding" not in headers
    assert "aws-chunked" not in headers.get("content-encoding", "")
    assert not [
        name
        for name in headers
        if name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer"))
    ]
    assert "STREAMING" not in headers.get("x-amz-content-sha256", "")


def assert_checked_by_sha256(headers: dict[str, str], data: bytes) -> None:
    """Fail unless the request makes AWS check and keep the SHA-256."""
    assert headers["x-amz-checksum-sha256"] == sha256(data)
    assert headers["x-amz-sdk-checksum-algorithm"] == "SHA256"
    assert headers["x-amz-meta-sha256"] == hashlib.sha256(data).hexdigest()
    assert headers["x-amz-content-sha256"] == hashlib.sha256(data).hexdigest()
    assert not {"content-md5", "expect", "x-amz-trailer", "transfer-encoding"} & headers.keys()


# --- What goes over the wire ---


def test_a_put_on_the_wire(fake: FakeS3, fake_env: dict[str, str]) -> None:
    """A put is one request with Content-MD5 and the metadata sha256, without Expect, flexible
    checksum or trailer.
    """
    data = channel_backup(10)
    with use(fake_env) as bucket:
        receipt = bucket.put(NAME, data)
    [request] = fake.requests
    assert (request.method, request.path, request.body) == (
        "PUT",
        f"/some-bucket/alice/{NAME}",
        data,
    )
    assert_checked_by_md5(request.headers, data)
    digest = hashlib.sha256(data).hexdigest()
    assert (receipt.name, receipt.key) == (NAME, f"alice/{NAME}")
    assert (receipt.sha256, receipt.size_bytes) == (digest, len(data))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_put_to_a_strict_server(env: dict[str, str], s3: S3Server, bucket: str) -> None:
    """Over http and https alike a put asks for the same check, and the object is the file's bytes
    with its SHA-256.
    """
    sent: list[dict[str, str]] = []

    def record(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore is not typed
        text = {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in request.headers.items()
        }
        sent.append({name.lower(): str(value) for name, value in text.items()})

    data = channel_backup(10)
    with use(env) as made:
        made.connect().meta.events.register("before-send.s3.PutObject", record)
        receipt = made.put(NAME, data)
    [headers] = sent
    assert_checked_by_md5(headers, data)
    [stored] = s3.objects(bucket).values()
    assert (stored.key, stored.data) == (receipt.key, data)
    assert stored.metadata == {"sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize(
    "host",
    [
        "s3.amazonaws.com",
        "s3.eu-central-1.amazonaws.com",
        "s3.cn-north-1.amazonaws.com.cn",
        "S3.AmazonAWS.com",
    ],
)
def test_aws_is_asked_for_sha256(fake: FakeS3, fake_env: dict[str, str], host: str) -> None:
    """At an endpoint of AWS a put carries the SHA-256 for S3 to check and keep, and no
    Content-MD5.
    """
    data = channel_backup(1)
    fake.script(Answer(headers={"x-amz-checksum-sha256": sha256(data)}))
    with use(
        fake_env | {"AWS_ENDPOINT_URL_S3": f"http://{host}", "HTTP_PROXY": fake.endpoint}
    ) as bucket:
        bucket.put(NAME, data)
    [request] = fake.requests
    assert request.path.lower().startswith("http://")
    assert host.lower() in request.path.lower()
    assert request.body == data
    assert_checked_by_sha256(request.headers, data)


@pytest.mark.parametrize(
    "host",
    [
        "amazonaws.com.example.org",
        "s3.amazonaws.com.example.org",
        "s3.amazonaws.com.cn.example.org",
        "notamazonaws.com",
        "example.org/s3.amazonaws.com",
    ],
)
def test_others_are_not_taken_for_aws(fake: FakeS3, fake_env: dict[str, str], host: str) -> None:
    """An endpoint that merely looks like one of AWS gets Content-MD5, as any other."""
    data = channel_backup(1)
    with use(
        fake_env | {"AWS_ENDPOINT_URL_S3": f"http://{host}", "HTTP_PROXY": fake.endpoint}
    ) as bucket:
        bucket.put(NAME, data)
    assert_checked_by_md5(fake.requests[0].headers, data)


@pytest.mark.parametrize(
    ("region", "domain"), [("eu-central-1", "amazonaws.com"), ("cn-north-1", "amazonaws.com.cn")]
)
def test_aws_without_an_endpoint(
    fake_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, region: str, domain: str
) -> None:
    """Without an endpoint a put goes to AWS in its region by https, signed as a whole and with its
    SHA-256.
    """
    data = channel_backup(1)
    sent: list[Any] = []

    def answer(_: object, request: Any) -> AWSResponse:  # noqa: ANN401 - botocore is not typed
        sent.append(request)
        raw = urllib3.HTTPResponse(body=io.BytesIO(), preload_content=False)
        return AWSResponse(
            request.url,
            200,
            HeadersDict({"ETag": '"x"', "x-amz-checksum-sha256": sha256(data)}),
            raw,
        )

    monkeypatch.setattr(URLLib3Session, "send", answer)
    with use(fake_env | {"AWS_ENDPOINT_URL_S3": "", "AWS_REGION": region}) as bucket:
        receipt = bucket.put(NAME, data)
    [request] = sent
    assert request.url == f"https://some-bucket.s3.{region}.{domain}/{receipt.key}"
    text = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in request.headers.items()
    }
    assert_checked_by_sha256({name.lower(): str(value) for name, value in text.items()}, data)


# --- What counts as a receipt ---

WRONG_ECHO = Answer(headers={"x-amz-checksum-sha256": sha256(b"other bytes")})


@pytest.mark.parametrize("host", ["", "http://s3.amazonaws.com"], ids=["store", "aws"])
@pytest.mark.parametrize(
    "answer",
    [answers.NO_ETAG, answers.PORTAL, answers.PORTAL_WITH_ETAG, WRONG_ECHO],
    ids=["no-etag", "portal", "portal-with-etag", "wrong-checksum"],
)
def test_false_receipts_are_refused(
    fake: FakeS3, fake_env: dict[str, str], answer: Answer, host: str
) -> None:
    """A 200 without ETag, with a body, or with the checksum of other bytes is no receipt, but a
    passing fault.
    """
    fake.script(answer)
    if host:
        fake_env |= {"AWS_ENDPOINT_URL_S3": host, "HTTP_PROXY": fake.endpoint}
    with use(fake_env) as bucket:
        with pytest.raises(AGAIN, match=r"cannot store: s3://some-bucket/.*: .*no receipt"):
            bucket.put(NAME, channel_backup(1))
        assert bucket.put(NAME, channel_backup(1))


def test_a_right_echo_is_a_receipt_everywhere(fake: FakeS3, fake_env: dict[str, str]) -> None:
    """A store that is not AWS and names the right SHA-256 of its own accord has given a receipt."""
    data = channel_backup(1)
    fake.script(Answer(headers={"x-amz-checksum-sha256": sha256(data)}))
    with use(fake_env) as bucket:
        assert bucket.put(NAME, data).sha256 == hashlib.sha256(data).hexdigest()


def test_a_portal_loses_nothing(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """The daemon keeps a version staged while a captive portal answers, and stores it when S3
    answers again.
    """
    fake.set_default(answers.PORTAL_WITH_ETAG)
    version = lnd.write()
    with Script(fake_env) as script:
        script.wait_for_log("no receipt")
        assert staged_data(staging) == [version.data]
        fake.set_default(answers.STORED)
        script.wait_for_log("stored s3://")
        assert script.stop() == 0
    assert len({request.path for request in fake.requests}) == 1
    assert staged_data(staging) == []


def test_flipped_bits_are_never_stored(
    s3_http: S3Server, prefix: str, lnd: Lnd, staging: Path
) -> None:
    """Bytes that change on the way are refused by S3, stay staged, and are stored once the line is
    sound.
    """
    bucket = s3_http.create_bucket()
    version = lnd.write()
    with FaultProxy(s3_http.host, s3_http.port) as proxy:
        proxy.set("corrupt")
        env = settings_for(s3_http, bucket, prefix, lnd, staging, endpoint=proxy.endpoint())
        with Script(env) as script:
            script.wait_for_log("BadDigest.*HTTP 400")
            assert s3_http.objects(bucket) == {}
            assert staged_data(staging) == [version.data]
            proxy.set("pass", cut=True)
            script.wait_for_log("stored s3://")
            assert script.stop() == 0
    assert len(s3_http.objects(bucket)) == 1
    assert_nothing_lost(lnd, s3_http, bucket, prefix, staging)


# --- The user's choices ---


def test_the_users_checksums_win(fake: FakeS3, fake_env: dict[str, str]) -> None:
    """AWS_REQUEST_CHECKSUM_CALCULATION=when_supported adds the SDK's own checksum, as the user
    wants it.
    """
    with use(fake_env | {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"}) as bucket:
        bucket.put(NAME, channel_backup(1))
    assert "x-amz-checksum-crc32" in fake.requests[0].headers


@pytest.mark.parametrize(
    ("choice", "attempts"),
    [({}, 1), ({"AWS_MAX_ATTEMPTS": "2"}, 2), ({"AWS_RETRY_MODE": "standard"}, 3)],
    ids=["default", "max-attempts", "retry-mode"],
)
def test_the_users_attempts_win(
    fake: FakeS3, fake_env: dict[str, str], choice: dict[str, str], attempts: int
) -> None:
    """The SDK tries once, since the loop has its own patience, unless AWS_MAX_ATTEMPTS or
    AWS_RETRY_MODE is set.
    """
    fake.set_default(answers.SLOW_DOWN)
    with use(fake_env | choice) as bucket, pytest.raises(AGAIN, match="SlowDown"):
        bucket.put(NAME, channel_backup(1))
    assert len(fake.requests) == attempts


def test_a_profile_wins(fake: FakeS3, fake_env: dict[str, str], tmp_path: Path) -> None:
    """Endpoint, region, attempts and checksums of a profile in AWS_CONFIG_FILE are used, and its
    credentials.
    """
    config, keys = tmp_path / "config", tmp_path / "credentials"
    config.write_text(
        "[profile node]\n"
        f"endpoint_url = {fake.endpoint}\n"
        "region = eu-west-3\n"
        "max_attempts = 2\n"
        "request_checksum_calculation = when_supported\n"
    )
    keys.write_text(
        f"[default]\naws_access_key_id = AKIDDEFAULT\naws_secret_access_key = {SECRET}\n"
        f"[node]\naws_access_key_id = AKIDNODE\naws_secret_access_key = {SECRET}\n"
    )
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del fake_env[name]
    profile = {
        "AWS_CONFIG_FILE": str(config),
        "AWS_SHARED_CREDENTIALS_FILE": str(keys),
        "AWS_PROFILE": "node",
    }
    fake.script(answers.SLOW_DOWN)
    with use(fake_env | profile) as bucket:
        bucket.put(NAME, channel_backup(1))
    assert len(fake.requests) == 2
    headers = fake.requests[1].headers
    assert "x-amz-checksum-crc32" in headers
    assert "Credential=AKIDNODE/" in headers["authorization"]
    assert "/eu-west-3/s3/" in headers["authorization"]


@pytest.mark.parametrize(
    ("choice", "region"),
    [
        ({"AWS_REGION": "eu-north-1"}, "eu-north-1"),
        ({"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "eu-south-2"}, "eu-north-1"),
        ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-south-2"}, "eu-south-2"),
        ({"AWS_REGION": ""}, "us-east-1"),
    ],
    ids=["region", "both", "default-region", "none"],
)
def test_regions_are_honoured(
    fake: FakeS3, fake_env: dict[str, str], choice: dict[str, str], region: str
) -> None:
    """Requests are signed for AWS_REGION, else AWS_DEFAULT_REGION, else us-east-1."""
    with use(fake_env | choice) as bucket:
        bucket.put(NAME, channel_backup(1))
    assert f"/{region}/s3/aws4_request" in fake.requests[0].headers["authorization"]


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


# --- What the log says, and never says ---


@pytest.mark.parametrize(
    ("in_file", "method"),
    [(False, "env"), (True, "shared-credentials-file")],
    ids=["environment", "file"],
)
def test_the_log_says_what_is_in_use(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, tmp_path: Path, method: str, *, in_file: bool
) -> None:
    """The log says endpoint, region and credential method, and never the secret."""
    lnd.write()
    if in_file:
        keys = tmp_path / "credentials"
        key, secret = (
            fake_env.pop(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        )
        keys.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        fake_env["AWS_SHARED_CREDENTIALS_FILE"] = str(keys)
    done = run_script(fake_env, "once")
    assert done.returncode == 0
    [line] = [line for line in done.stderr.splitlines() if "endpoint" in line]
    assert fake.endpoint in line
    assert "us-east-1" in line
    assert method in line
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "HTTP_PROXY"])
def test_passwords_in_urls_are_masked(fake_env: dict[str, str], lnd: Lnd, name: str) -> None:
    """A user name and password in the URL of endpoint or proxy never get into the log, also when it
    fails.
    """
    lnd.write()
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        url = f"http://bob:hunter2@127.0.0.1:{refusing.getsockname()[1]}"
        with Script({**fake_env, name: url, "SHUTDOWN_GRACE_SECONDS": "0"}) as script:
            script.wait_for_log("using .*endpoint")
            script.wait_for_log("cannot store: .*\n.*hint: ")
            assert script.stop() == 0
    assert "hunter2" not in script.log
    assert "bob" not in script.log


# --- Wrong credentials, a missing bucket: loud, and versions are captured ---


def test_an_edited_credentials_file_is_picked_up(
    s3_http: S3Server, prefix: str, lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """With a wrong secret the daemon is loud and captures, and once the credentials file is
    corrected all goes out.
    """
    bucket = s3_http.create_bucket()
    env = settings_for(s3_http, bucket, prefix, lnd, staging)
    key, secret = env.pop("AWS_ACCESS_KEY_ID"), env.pop("AWS_SECRET_ACCESS_KEY")
    keys = tmp_path / "credentials"
    text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {{}}\n"
    keys.write_text(text.format("wrong" + secret))
    lnd.write()
    with Script(env | {"AWS_SHARED_CREDENTIALS_FILE": str(keys)}) as script:
        script.wait_for_log("error: cannot store: .*SignatureDoesNotMatch")
        script.wait_for_log("hint: .*access key")
        lnd.write()
        wait_until_staged(staging, [version.data for version in lnd.written])
        keys.write_text(text.format(secret))
        lnd.write()
        script.wait_for_log("stored s3://", count=3)
        script.wait_for_log("again, after")
        assert script.stop() == 0
        assert secret not in script.log
    assert staged_data(staging) == []
    assert_nothing_lost(lnd, s3_http, bucket, prefix, staging, refreshes=1)


def test_a_corrected_credential_program_is_picked_up(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd
) -> None:
    """With a credential program that is not there the daemon is loud, and it uses the one that the
    file names next.
    """
    config = lnd.directory.parent / "config"
    config.write_text("[default]\ncredential_process = /nowhere/credentials\n")
    del fake_env["AWS_ACCESS_KEY_ID"], fake_env["AWS_SECRET_ACCESS_KEY"]
    answer = json.dumps({"Version": 1, "AccessKeyId": "AKIDPROGRAM", "SecretAccessKey": SECRET})
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


def test_no_credentials_at_all(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
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


# --- How a one-shot ends ---


@pytest.fixture
def once(fake_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Return what runs `once` in this process with less patience, and returns its exit code."""
    monkeypatch.setattr(program, "ONE_SHOT_SECONDS", 5.0)
    monkeypatch.setattr(program.TransientError, "retry_seconds_max", 0.1)
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    for source in ("ProcessProvider", "AssumeRoleProvider"):  # which the program limits
        monkeypatch.setattr(botocore.credentials, source, getattr(botocore.credentials, source))
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(**settings: str) -> int:
        for name, value in (fake_env | settings).items():
            monkeypatch.setenv(name, value)
        return program.main(["once"])

    yield run
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("answer", "exit_code", "words"),
    [
        (answers.CLOCK_SKEW, 75, "clock"),
        (answers.NO_SUCH_BUCKET, 1, "NoSuchBucket"),
        (answers.UNKNOWN_KEY, 1, "InvalidAccessKeyId"),
        (answers.EXPIRED_TOKEN, 1, "ExpiredToken"),
        (answers.ACCESS_DENIED, 1, "s3:PutObject"),
        (answers.SLOW_DOWN, 75, "SlowDown"),
        (Answer(503, etag=False), 75, "503"),
        (answers.PORTAL, 75, "portal"),
        (answers.DROPPED, 75, "closed"),
    ],
    ids=[
        "clock",
        "bucket",
        "key",
        "expired",
        "denied",
        "slow-down",
        "empty-503",
        "portal",
        "dropped",
    ],
)
def test_exit_codes_of_once(
    fake: FakeS3,
    once: Callable[..., int],
    lnd: Lnd,
    staging: Path,
    capfd: pytest.CaptureFixture[str],
    answer: Answer,
    exit_code: int,
    words: str,
) -> None:
    """`once` tells by its exit code whether trying again may help, says why, and keeps the version
    staged.
    """
    version = lnd.write()
    fake.set_default(answer)
    assert once() == exit_code
    assert words in capfd.readouterr().err
    assert staged_data(staging) == [version.data]


def test_once_outlasts_a_short_fault(
    fake: FakeS3, once: Callable[..., int], lnd: Lnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`once` tries again when S3 was out of reach for a moment, under the same key."""
    monkeypatch.setattr(program, "ONE_SHOT_SECONDS", PATIENCE_SECONDS)
    lnd.write()
    fake.script(answers.SLOW_DOWN, answers.DROPPED)
    assert once() == 0
    assert len(fake.requests) == 3
    assert len({request.path for request in fake.requests}) == 1


@pytest.mark.parametrize("mode", ["refuse", "rst", "blackhole", "stall_after_up"])
def test_once_gives_up(
    fake: FakeS3,
    once: Callable[..., int],
    lnd: Lnd,
    mode: Any,  # noqa: ANN401 - one of the kit's modes
) -> None:
    """`once` exits 75 when S3 refuses the connection, resets it, or is silent; how soon, the next
    test shows.
    """
    lnd.write()
    with FaultProxy("127.0.0.1", fake.port) as proxy:
        proxy.set(mode, n=1000)
        assert once(AWS_ENDPOINT_URL_S3=proxy.endpoint()) == 75


def test_once_ends_within_a_minute(fake_env: dict[str, str], lnd: Lnd, staging: Path) -> None:
    """`once` as users run it exits 75 within a minute, whether connections are refused or nobody
    answers them.
    """
    # Takes some 40 s: the one test with the real limits, both cases at the same time.
    lnd.write()
    with socket.socket() as refusing, socket.socket() as silent:
        for listener in (refusing, silent):
            listener.bind(("127.0.0.1", 0))
        silent.listen()
        endpoints = [
            f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in (refusing, silent)
        ]
        results: dict[str, tuple[int, float]] = {}

        def run(endpoint: str) -> None:
            began = time.monotonic()
            own = {
                "AWS_ENDPOINT_URL_S3": endpoint,
                "BACKUP_DIRECTORY": f"{staging}-{endpoint.rpartition(':')[2]}",
            }
            code = run_script(fake_env | own, "once").returncode
            results[endpoint] = code, time.monotonic() - began

        threads = [threading.Thread(target=run, args=(endpoint,)) for endpoint in endpoints]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [results[endpoint][0] for endpoint in endpoints] == [75, 75]
    assert max(seconds for _, seconds in results.values()) < ONE_MINUTE


# --- Silence, slowness and lost answers ---


def test_a_silent_server_is_given_up(
    fake: FakeS3, fake_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt without progress is given up, and the next one, over a new connection, stores."""
    monkeypatch.setattr(program, "SILENCE_SECONDS", 0.5)
    data = channel_backup(10)
    with (
        FaultProxy("127.0.0.1", fake.port) as proxy,
        use(fake_env | {"AWS_ENDPOINT_URL_S3": proxy.endpoint()}) as made,
    ):
        proxy.set("blackhole")
        began = time.monotonic()
        with pytest.raises(AGAIN):
            made.put(NAME, data)
        assert 0.4 < time.monotonic() - began < 5
        proxy.set("pass", cut=True)
        assert made.put(NAME, data).sha256 == hashlib.sha256(data).hexdigest()


class TricklingServer:
    """Takes in one large put piece by piece, through a small buffer, and then answers."""

    def __init__(self, pieces: int, pause_seconds: float) -> None:
        """Listen; so many pieces with such a pause after each."""
        self.pieces, self.pause_seconds, self.received = pieces, pause_seconds, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        self.thread = threading.Thread(target=self.serve)
        self.endpoint = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def serve(self) -> None:
        """Serve one connection."""
        connection, _ = self.socket.accept()
        with connection, connection.makefile("rb") as stream:
            length = 0
            while (line := stream.readline()).strip():
                length = (
                    int(line.split()[1]) if line.lower().startswith(b"content-length") else length
                )
            for number in range(self.pieces):
                time.sleep(self.pause_seconds)
                part = length * (number + 1) // self.pieces - length * number // self.pieces
                self.received += len(stream.read(part))
            connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n')


def test_a_slow_uplink_is_not_given_up(
    fake_env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None]
) -> None:
    """An upload that goes on steadily may take longer than the silence, and than the time, after
    which an attempt is given up.
    """
    started_by(hurried(40))  # 0.75 s of silence, 3 s for an attempt
    lnd.write(data=os.urandom(15 << 20))  # socket buffers take some 4 MiB at once
    server = TricklingServer(pieces=100, pause_seconds=0.035)
    server.thread.start()
    with server.socket, Script(fake_env | {"AWS_ENDPOINT_URL_S3": server.endpoint}) as script:
        began = time.monotonic()
        script.wait_for_log("stored s3://")
        assert time.monotonic() - began > 3
        assert "cannot store" not in script.log
        assert server.received == 15 << 20
        script.signal(signal.SIGKILL)
    server.thread.join()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_lost_answer_leaves_one_object(
    s3: S3Server, env: dict[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that was stored while its answer got lost is no receipt, is sent again under the
    same key, and is there once.
    """
    monkeypatch.setattr(program, "SILENCE_SECONDS", 1.0)
    data = channel_backup(10)
    with (
        FaultProxy(s3.host, s3.port) as proxy,
        use(env | {"AWS_ENDPOINT_URL_S3": proxy.endpoint(s3.scheme)}) as made,
    ):
        proxy.set("swallow_response")
        with pytest.raises(AGAIN):
            made.put(NAME, data)
        assert [entry.data for entry in s3.objects(bucket).values()] == [data]
        proxy.set("pass", cut=True)
        receipt = made.put(NAME, data)
    assert list(s3.objects(bucket)) == [receipt.key]
