"""What is said to be wrong, and what to do: S3's own words decide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import botocore.exceptions as sdk
import pytest
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st
from kit import FakeS3, S3Server, hurried, reader_settings, run_script
from kit.answers import error
from shared import say, statements

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

STATEMENT = '{"Effect": "Allow"}'
ACCESS_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
PAGE = b"<html><head><title>403</title></head><body><center>nginx</center></body></html>"
BLAMES_KEY = re.compile(r"(?i)check the (access )?key|the key.s policy|key and its secret")


def run(written_env: dict[str, str], *args: str, code: int) -> subprocess.CompletedProcess[str]:
    """Run a command that fails with this code, without a traceback, and with something to do."""
    done = run_script(written_env, *args)
    assert "Traceback" not in done.stderr
    assert "fault of this program" not in done.stderr
    assert done.returncode == code, done.stderr
    assert "hint: " in done.stderr
    return done


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
    for fault in (
        RuntimeError(text),
        ValueError(text),
        OSError(text),
        sdk.HTTPClientError(error=text),
        sdk.SSLError(endpoint_url=text, error=text),
        sdk.CredentialRetrievalError(provider=text, error_msg=text),
        sdk.ParamValidationError(report=text),
        sdk.ClientError({}, text),
    ):
        assert program.classify_s3_error("cannot store: x", fault).hint


# --- S3's words ---


@pytest.mark.unmeasured
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
    written_env: dict[str, str],
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
    said = run(written_env, "once", code=code).stderr
    assert any(
        all(word in line for word in (s3_code, message, str(status))) for line in said.splitlines()
    )
    assert re.search(f"(?i){pattern}", said)
    assert not statements(said)


@pytest.mark.unmeasured
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
    fake: FakeS3, written_env: dict[str, str], status: int, s3_code: str, message: str
) -> None:
    """An account that is closed, or a code that nobody knows, is told in S3's words, and sends to
    the provider; the key is not blamed.
    """
    say(fake, status, error(s3_code, message))
    said = run(written_env, "once", code=1).stderr
    assert all(word in said for word in (s3_code, message, "provider"))
    assert not BLAMES_KEY.search(said)
    assert not statements(said)


@pytest.mark.unmeasured
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
    written_env: dict[str, str],
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
    said = run(written_env, command, code=75).stderr
    assert str(status) in said
    assert not re.search(r": : |:  \(HTTP", said)
    assert not BLAMES_KEY.search(said)
    assert not statements(said)
    assert "s3:PutObject" not in said


# --- Permissions ---


@pytest.mark.unmeasured
def test_a_put_that_is_denied(fake: FakeS3, written_env: dict[str, str]) -> None:
    """Where S3 names nothing, the statement to add is that of a put below the prefix."""
    say(fake, 403, error("AccessDenied", "Access Denied"))
    (statement,) = statements(run(written_env, "once", code=1).stderr)
    assert statement == {
        "Effect": "Allow",
        "Action": "s3:PutObject",
        "Resource": "arn:aws:s3:::some-bucket/alice/*",
    }


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "action",
    ["kms:GenerateDataKey", "s3:PutObjectTagging"],
)
def test_the_action_that_s3_names(fake: FakeS3, written_env: dict[str, str], action: str) -> None:
    """The action that S3 names is the one that is missing, not the one that one would guess."""
    message = (
        f"User: arn:aws:iam::123456789012:user/node is not authorized to perform: {action} on "
        "resource: arn:aws:x because no identity-based policy allows the action"
    )
    say(fake, 403, error("AccessDenied", message))
    said = run(written_env, "once", code=1).stderr
    hints = [line for line in said.splitlines() if "hint: " in line]
    assert any(action in line for line in hints)
    assert not any(re.search(r"s3:PutObject\b(?!\w)", line) for line in hints)


@pytest.mark.unmeasured
@pytest.mark.parametrize("kind", ["a resource-based policy", "a service control policy"])
def test_an_explicit_deny(fake: FakeS3, written_env: dict[str, str], kind: str) -> None:
    """Against an explicit deny no Allow helps, and none is proposed."""
    message = (
        "User: arn:aws:iam::123456789012:user/node is not authorized to perform: s3:PutObject on "
        f"resource: arn:aws:s3:::some-bucket/alice/x with an explicit deny in {kind}"
    )
    say(fake, 403, error("AccessDenied", message))
    said = run(written_env, "once", code=1).stderr
    assert not statements(said)
    assert any(re.search("(?i)den(y|ies)", line) for line in said.splitlines() if "hint: " in line)


@pytest.mark.unmeasured
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
    fake: FakeS3, written_env: dict[str, str], more: dict[str, str], resource: str
) -> None:
    """The statement is right for an access point, another partition, and any prefix."""
    say(fake, 403, error("AccessDenied", "Access Denied"))
    at = {"AWS_ENDPOINT_URL_S3": "http://s3.example.org", "HTTP_PROXY": fake.endpoint}
    (statement,) = statements(run(written_env | at | more, "once", code=1).stderr)
    assert statement["Resource"] == resource


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "args", [("list",), ("restore",), ("restore", "--key", "20260301T120000.000000Z-a1b2c3")]
)
def test_the_nodes_key_is_never_to_read(
    s3: S3Server, bucket: str, prefix: str, args: tuple[str, ...]
) -> None:
    """Who reads with the node's key, or under another prefix, is sent to the reader's key and the
    prefix; no policy is to be widened.
    """
    written_env = reader_settings(s3, bucket, prefix, s3.put_only_user(bucket, prefix))
    done = run(written_env, *args, code=1)
    assert not statements(done.stderr)
    assert not re.search(r"(?i)\badd\b.*s3:(ListBucket|GetObject)", done.stderr)
    assert re.search("(?i)reader|reading", done.stderr)
    assert prefix in done.stderr
    assert done.stdout == ""
