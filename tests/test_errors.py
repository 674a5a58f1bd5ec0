"""What is said to be wrong, and what to do: S3's own words decide."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import botocore.exceptions as sdk
import pytest
from botocore.parsers import ResponseParserError
from hypothesis import given
from hypothesis import strategies as st
from kit import FakeS3, hurried, run_script
from kit.answers import error
from shared import say, statements

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable

    from shared import Done, Env

STATEMENT = '{"Effect": "Allow"}'
ACCESS_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/mine"
PAGE = b"<html><head><title>403</title></head><body><center>nginx</center></body></html>"
BLAMES_KEY = re.compile(r"(?i)check the (access )?key|the key.s policy|key and its secret")


def run(written_env: Env, *args: str, code: int) -> Done:
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


URL = "https://s3.example.org"
FAILED, AGAIN, DENIED = program.BackupError, program.TransientError, program.AccessDeniedError
CODES = [  # kind, hint, status, codes
    (AGAIN, "network", 400, "RequestTimeout Throttling ThrottlingException"),
    (AGAIN, "network", 400, "BadDigest XAmzContentSHA256Mismatch"),
    (AGAIN, "network", 409, "OperationAborted"),
    (AGAIN, "network", 429, "TooManyRequests"),
    (AGAIN, "network", 500, "InternalError"),
    (AGAIN, "network", 503, "SlowDown ServiceUnavailable"),
    (AGAIN, "clock", 400, "RequestExpired"),
    (AGAIN, "clock", 403, "RequestTimeTooSkewed"),
    (FAILED, "access key", 400, "ExpiredToken InvalidToken TokenRefreshRequired"),
    (FAILED, "access key", 403, "InvalidAccessKeyId SignatureDoesNotMatch"),
    (DENIED, STATEMENT, 403, "AccessDenied"),
    (FAILED, "bucket", 400, "InvalidBucketName"),
    (FAILED, "bucket", 404, "NoSuchBucket"),
    (FAILED, "quota", 403, "QuotaExceeded"),
    (FAILED, "quota", 507, "QuotaExceeded"),
    (FAILED, "quota", 400, "XMinioAdminBucketQuotaExceeded"),
    (FAILED, "AWS_REGION", 301, "PermanentRedirect"),
    (FAILED, "AWS_REGION", 400, "AuthorizationHeaderMalformed"),
    (FAILED, "provider", 400, "InvalidRequest InvalidArgument EntityTooLarge"),
    (FAILED, "provider", 400, "KMS.DisabledException"),
    (FAILED, "provider", 403, "UserSuspended AccountProblem AllAccessDisabled"),
    (FAILED, "provider", 412, "PreconditionFailed"),
    (FAILED, "provider", 501, "NotImplemented"),
]
STS_CLOCK = (
    "Signature expired: 20261128T000000Z is now earlier than 20261128T001500Z",
    "Signature not yet current: 20261128T003000Z is still later than 20261128T001500Z",
)
NOT_S3S = (301, 400, 401, 403, 404, 407, 408, 429, 500, 502, 503, 504, 507, 520)
KINDS: list[tuple[type[program.BackupError], str, Exception]] = [  # kind, hint, error
    (AGAIN, "portal", ResponseParserError("Unable to parse response (not well-formed): line 1")),
    (AGAIN, "portal", RecursionError("maximum recursion depth exceeded")),
    (AGAIN, "network", sdk.EndpointConnectionError(endpoint_url=URL, error="refused")),
    (AGAIN, "network", sdk.ConnectTimeoutError(endpoint_url=URL, error="timed out")),
    (AGAIN, "network", sdk.ProxyConnectionError(proxy_url="http://proxy.example.org", error="no")),
    (AGAIN, "network", sdk.SSLError(endpoint_url=URL, error="EOF occurred")),
    (AGAIN, "network", sdk.HTTPClientError(error="something else")),
    (AGAIN, "network", sdk.ConnectionClosedError(endpoint_url=URL)),
    (AGAIN, "network", sdk.ReadTimeoutError(endpoint_url=URL, error="timed out")),
    (AGAIN, "network", sdk.ResponseStreamingError(error="IncompleteRead")),
    (FAILED, "AWS_CA_BUNDLE", sdk.SSLError(endpoint_url=URL, error="CERTIFICATE_VERIFY_FAILED")),
    (FAILED, "AWS_", sdk.NoCredentialsError()),
    (FAILED, "AWS_", sdk.PartialCredentialsError(provider="env", cred_var="AWS_SECRET")),
    (FAILED, "AWS_", sdk.ProfileNotFound(profile="node")),
    (FAILED, "AWS_", sdk.ConfigParseError(path="/etc/aws/config")),
    (FAILED, "AWS_", sdk.NoRegionError()),
    (FAILED, "AWS_", sdk.EndpointResolutionError(msg="no such endpoint")),
    (FAILED, "AWS_", sdk.ParamValidationError(report="Invalid bucket name")),
    (
        FAILED,
        "AWS_",
        sdk.InvalidChecksumConfigError(config_key="", config_value="", valid_options=""),
    ),
    *[(AGAIN, "clock", client_error("SignatureDoesNotMatch", 403, text)) for text in STS_CLOCK],
    *[(AGAIN, "portal", client_error(str(status), status, "")) for status in NOT_S3S],
    *[
        (kind, hint, client_error(code, status))
        for kind, hint, status, codes in CODES
        for code in codes.split()
    ],
]


@pytest.mark.parametrize(("kind", "hint", "error"), KINDS)
def test_errors_have_kinds(kind: type[program.BackupError], hint: str, error: Exception) -> None:
    """It says what, on what and why; the hint names what has to be changed."""
    found = program.classify_s3_error("cannot store: s3://bucket/key", error, STATEMENT)
    assert type(found) is kind
    what, on_what, why = str(found).split(": ", 2)
    assert (what, on_what) == ("cannot store", "s3://bucket/key")
    assert why.strip(" :")
    assert "\n" not in str(found)
    assert hint in found.hint


def test_an_object_of_python_s_is_not_told() -> None:
    """urllib3 names one where a connection is not made in time."""
    cause = "(<AWSHTTPConnection(host='10.0.0.1', port=80) at 0x7f12>, 'timed out')"
    error = sdk.ConnectTimeoutError(endpoint_url=URL, error=cause)
    assert program.reason(error) == f'Connect timeout on endpoint URL: "{URL}"'


def test_the_reader_s_key_may_lack_the_key_of_kms() -> None:
    """S3 names the action; only where it names none of KMS, the key may be the node's."""
    text = "User: x is not authorized to perform: {} on resource: y"
    for action, hint in (("kms:Decrypt", "the reader's key needs"), ("s3:GetObject", "the node's")):
        denied = client_error("AccessDenied", 403, text.format(action))
        assert program.classify_s3_error("x", denied, program.READER).hint.startswith(hint)


TEXTS = st.text(max_size=100)


@given(code=TEXTS, message=TEXTS, status=st.integers(0, 999), statement=TEXTS)
def test_no_answer_is_too_strange(code: str, message: str, status: int, statement: str) -> None:
    """There is an explanation with S3's words in it, and a hint."""
    error = client_error(code, status, message)
    found = program.classify_s3_error("cannot store: x", error, statement)
    assert code in str(found)
    assert message in str(found)
    assert found.hint


@given(text=TEXTS)
def test_no_exception_is_too_strange(text: str) -> None:
    """There is a hint, also for an answer that lacks all parts of an error."""
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


def denied(action: str, why: str) -> str:
    return f"User: x is not authorized to perform: {action} on resource: arn:aws:x {why}"


NOT_ALLOWED = "because no policy allows the action"
BY_BUCKET = "with an explicit deny in a resource-based policy"
BY_ACCOUNT = "with an explicit deny in a service control policy"
NOT_TO_READ = "the node's own key is not meant to read"


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("command", "code", "message", "hint"),
    [
        ("once", "QuotaExceeded", "Your quota is used up.", "raise the quota"),
        ("once", "KMS.DisabledException", "arn:aws:kms:eu:1:key/abc is disabled", "provider"),
        ("once", "SomethingElse", "Nobody knows this code.", "provider"),
        ("once", "AccessDenied", denied("kms:GenerateDataKey", NOT_ALLOWED), "GenerateDataKey"),
        ("once", "AccessDenied", denied("s3:PutObjectTagging", NOT_ALLOWED), "s3:PutObjectTagging"),
        ("once", "AccessDenied", denied("s3:PutObject", BY_BUCKET), "find that Deny"),
        ("once", "AccessDenied", denied("s3:PutObject", BY_ACCOUNT), "find that Deny"),
        ("list", "AccessDenied", denied("s3:ListBucket", BY_BUCKET), NOT_TO_READ),
        ("restore --key x", "AccessDenied", denied("s3:GetObject", BY_BUCKET), NOT_TO_READ),
    ],
)
def test_the_hint_for_a_code(
    fake: FakeS3, written_env: Env, command: str, code: str, message: str, hint: str
) -> None:
    """S3's own words are shown, and say what is missing; the key is not blamed for the rest."""
    say(fake, 403, error(code, message))
    said = run(written_env, *command.split(), code=1).stderr
    assert f"{code}: {message} (HTTP 403)" in said
    hints = "\n".join(re.findall("hint: .*", said))
    assert hint in hints
    assert not re.search(r"s3:PutObject\b", hints)
    assert not BLAMES_KEY.search(said)
    assert not statements(said)


@pytest.mark.parametrize(
    ("command", "status", "body", "words"),
    [
        ("once", 302, PAGE, "a redirect that names no region"),
        ("list", 302, PAGE, "a redirect that names no region"),
        ("once", 403, PAGE, "403"),
        ("once", 403, b"Forbidden by administrative rules\n", "403"),
        ("list", 403, PAGE, "403"),
        ("restore", 404, PAGE, "404"),
    ],
)
def test_an_answer_that_is_not_of_s3(
    fake: FakeS3,
    written_env: Env,
    started_by: Callable[[str], None],
    command: str,
    status: int,
    body: bytes,
    words: str,
) -> None:
    """Something stands between here and S3: it may be tried again."""
    started_by(hurried(20))
    say(fake, status, body, "text/html")
    said = run(written_env, command, code=75).stderr
    assert words in said
    assert not re.search(r": : |:  \(HTTP", said)
    assert not BLAMES_KEY.search(said)
    assert not statements(said)
    assert "s3:PutObject" not in said


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("more", "resource"),
    [
        ({}, "arn:aws:s3:::some-bucket/alice/*"),
        ({"S3_BUCKET_NAME": ACCESS_POINT}, f"{ACCESS_POINT}/object/alice/*"),
        ({"AWS_REGION": "cn-north-1"}, "arn:aws-cn:s3:::some-bucket/alice/*"),
        ({"AWS_REGION": "us-gov-west-1"}, "arn:aws-us-gov:s3:::some-bucket/alice/*"),
        ({"S3_BACKUP_PREFIX": "node ö"}, "arn:aws:s3:::some-bucket/node ö/*"),
    ],
    ids=["plain", "access point", "china", "gov", "blank"],
)
def test_the_resource_of_the_statement(
    fake: FakeS3, written_env: Env, more: Env, resource: str
) -> None:
    """Where S3 names nothing, the statement to add is that of a put below the prefix."""
    say(fake, 403, error("AccessDenied", "Access Denied"))
    at = {"AWS_ENDPOINT_URL_S3": "http://s3.example.org", "HTTP_PROXY": fake.endpoint}
    (statement,) = statements(run(written_env | at | more, "once", code=1).stderr)
    assert statement == {"Effect": "Allow", "Action": "s3:PutObject", "Resource": resource}
