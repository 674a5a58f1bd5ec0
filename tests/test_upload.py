"""What a put sends, what counts as its receipt, and which attempts are given up."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import re
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from inside import digest, use
from kit import Answer, FaultProxy, RawS3, Script, answers, channel_backup
from kit.script import altered
from shared import AWAY, NOWHERE, done_well, refused, staged_data

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from pathlib import Path

    from kit import FakeS3, Lnd, S3Server
    from shared import Env, Session, StartedBy

SOME_NAME = "20261120T215558.123456Z-a1b2c3"


def sha256(data: bytes) -> str:
    """Return the value of x-amz-checksum-sha256."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def sent_by(bucket: program.Bucket) -> list[Any]:
    """Return the requests of its puts from now on, as they are signed."""
    sent: list[Any] = []
    events = bucket.connect().meta.events
    events.register("before-send.s3.PutObject", lambda request, **_: sent.append(request))
    return sent


def headers_of(request: Any) -> Env:  # noqa: ANN401 - botocore is not typed
    """Return the headers of a request of botocore's, with their names in lower case."""
    return {
        name.lower(): value.decode() if isinstance(value, bytes) else str(value)
        for name, value in request.headers.items()
    }


def assert_checked_by_md5(headers: Env, data: bytes) -> None:
    """Fail unless it asks for the check that every store honours, and nothing that breaks some."""
    md5 = hashlib.md5(data, usedforsecurity=False).digest()
    assert headers["content-md5"] == base64.b64encode(md5).decode()
    assert headers["content-length"] == str(len(data))
    assert headers["x-amz-meta-sha256"] == digest(data)
    assert not {"expect", "transfer-encoding"} & headers.keys()
    assert "aws-chunked" not in headers.get("content-encoding", "")
    assert not re.findall("(?m)^x-amz-(checksum|sdk-checksum|trailer).*", "\n".join(headers))
    assert "STREAMING" not in headers.get("x-amz-content-sha256", "")


def assert_checked_by_sha256(headers: Env, data: bytes) -> None:
    """Fail unless the request makes AWS check and keep the SHA-256."""
    assert headers["x-amz-checksum-sha256"] == sha256(data)
    assert headers["x-amz-sdk-checksum-algorithm"] == "SHA256"
    assert headers["x-amz-meta-sha256"] == digest(data)
    assert headers["x-amz-content-sha256"] == digest(data)
    assert not {"content-md5", "expect", "x-amz-trailer", "transfer-encoding"} & headers.keys()


# --- What goes over the wire ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_put_to_a_strict_server(env: Env, s3: S3Server, bucket: str) -> None:
    """A put is one request, and the object is the file's bytes with its SHA-256."""
    data = channel_backup(10)
    with use(env) as made:
        sent = sent_by(made)
        receipt = made.put(SOME_NAME, data)
    [request] = sent
    assert_checked_by_md5(headers_of(request), data)
    [stored] = s3.objects(bucket).values()
    assert (stored.key, stored.data) == (f"alice/{SOME_NAME}", data)
    assert stored.metadata == {"sha256": digest(data)}
    assert (receipt.name, receipt.key) == (SOME_NAME, stored.key)
    assert (receipt.sha256, receipt.size_bytes) == (digest(data), len(data))


@pytest.mark.parametrize(
    ("host", "is_aws"),
    [
        ("s3.amazonaws.com", True),
        ("s3.eu-central-1.amazonaws.com", True),
        ("s3.cn-north-1.amazonaws.com.cn", True),
        ("S3.AmazonAWS.com", True),
        ("amazonaws.com.example.org", False),
        ("s3.amazonaws.com.example.org", False),
        ("s3.amazonaws.com.cn.example.org", False),
        ("notamazonaws.com", False),
        ("example.org/s3.amazonaws.com", False),
    ],
)
def test_aws_is_asked_for_sha256(fake: FakeS3, fake_env: Env, host: str, *, is_aws: bool) -> None:
    """A host that only looks like AWS gets Content-MD5, as any other, and may echo a SHA-256."""
    data = channel_backup(1)
    fake.script(Answer(headers={"x-amz-checksum-sha256": sha256(data)}))
    through = {"AWS_ENDPOINT_URL_S3": f"http://{host}", "HTTP_PROXY": fake.endpoint}
    with use(fake_env | through) as bucket:
        assert bucket.put(SOME_NAME, data).sha256 == digest(data)
    [request] = fake.requests
    assert request.path.lower().startswith(f"http://{host}/".lower())
    assert request.body == data
    assert_checked = assert_checked_by_sha256 if is_aws else assert_checked_by_md5
    assert_checked(request.headers, data)


@pytest.mark.parametrize(
    ("region", "domain"), [("eu-central-1", "amazonaws.com"), ("cn-north-1", "amazonaws.com.cn")]
)
def test_aws_without_an_endpoint(fake_env: Env, region: str, domain: str) -> None:
    """A put goes to AWS in its region by https, signed as a whole and with its SHA-256."""
    data = channel_backup(1)
    aws = {"AWS_ENDPOINT_URL_S3": "", "AWS_REGION": region, "HTTPS_PROXY": NOWHERE}
    with use(fake_env | aws) as bucket:
        sent = sent_by(bucket)
        with pytest.raises(program.TransientError, match="proxy"):
            bucket.put(SOME_NAME, data)
    [request] = sent
    assert request.url == f"https://some-bucket.s3.{region}.{domain}/alice/{SOME_NAME}"
    assert_checked_by_sha256(headers_of(request), data)


# --- What counts as a receipt ---


WRONG_ECHO = Answer(headers={"x-amz-checksum-sha256": sha256(b"other bytes")})


@pytest.mark.parametrize("host", ["", "http://s3.amazonaws.com"], ids=["store", "aws"])
@pytest.mark.parametrize(
    "answer",
    [answers.NO_ETAG, answers.PORTAL, answers.PORTAL_WITH_ETAG, WRONG_ECHO],
    ids=["no-etag", "portal", "portal-with-etag", "wrong-checksum"],
)
def test_false_receipts_are_refused(fake: FakeS3, fake_env: Env, answer: Answer, host: str) -> None:
    """It is a passing fault."""
    fake.script(answer)
    if host:
        fake_env |= {"AWS_ENDPOINT_URL_S3": host, "HTTP_PROXY": fake.endpoint}
    refusal = r"cannot store: s3://some-bucket/.*: .*no receipt"
    with use(fake_env) as bucket:
        with pytest.raises(program.TransientError, match=refusal):
            bucket.put(SOME_NAME, channel_backup(1))
        assert bucket.put(SOME_NAME, channel_backup(1))


@pytest.mark.parametrize(
    ("status", "length", "why"),
    [
        ("101 Switching Protocols", 0, "cut short"),
        ("200 OK", 5, "cut short"),
        ("307 Temporary Redirect", 0, "names no region"),
    ],
    ids=["announced", "broken-off", "redirected"],
)
def test_an_answer_that_is_no_end_is_no_receipt(
    fake_env: Env, status: str, length: int, why: str
) -> None:
    """What redirects everything, as a captive portal does, is not asked where the bucket is."""
    answer = answers.head(status, {"ETag": '"x"', "Content-Length": str(length)})
    with RawS3(lambda _: [answer]) as raw:
        with (
            use(fake_env | {"AWS_ENDPOINT_URL_S3": raw.endpoint}) as bucket,
            pytest.raises(program.TransientError, match=why),
        ):
            bucket.put(SOME_NAME, channel_backup(1))
        assert len(raw.requests) == 1


def test_a_header_that_is_none_makes_no_traceback(written_env: Env) -> None:
    """A line without a colon among the headers is nothing that the log has to tell."""
    good = answers.head("200 OK", {"ETag": '"x"', "Content-Length": "0"})
    odd = good.replace(b"ETag", b"no header\r\nETag")
    with (
        RawS3(lambda _: [odd]) as raw,
        Script(written_env | AWAY | {"AWS_ENDPOINT_URL_S3": raw.endpoint}) as script,
    ):
        script.wait_for_log("no receipt")
        assert script.stop() == 0
        assert "Traceback" not in script.log


NO_CODECS = """
import os, sys
class Broken:
    def find_spec(self, name, *_):
        if name.startswith("encodings.") and os.path.exists({there!r}):
            raise ImportError(name)
sys.meta_path.insert(0, Broken())
"""


def test_a_codec_that_cannot_be_loaded_for_a_moment(
    fake: FakeS3, fake_env: Env, lnd: Lnd, tmp_path: Path, started_by: StartedBy
) -> None:
    """Python remembers such a codec as missing, so they are loaded before the first connection."""
    there = tmp_path / "broken"
    started_by(NO_CODECS.format(there=str(there)))
    with Script(fake_env) as script:
        script.wait_for_log("using endpoint")
        there.touch()
        lnd.write()
        script.wait_for_log("stored s3://")
        assert script.stop() == 0
    assert len(fake.requests) == 1


def test_flipped_bits_are_never_stored(
    session: Session, s3: S3Server, bucket: str, s3_line: FaultProxy, lnd: Lnd, staging: Path
) -> None:
    version = lnd.write()
    s3_line.set("corrupt")
    with session() as daemon:
        daemon.wait_for_log("BadDigest.*HTTP 400")
        assert s3.objects(bucket) == {}
        assert staged_data(staging) == [version.data]
        s3_line.set("pass", cut=True)
        daemon.wait_for_stored(version)


# --- Silence, slowness and lost answers ---


def test_a_silent_server_is_given_up(
    fake: FakeS3, fake_env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "SILENCE_SECONDS", 0.5)
    data = channel_backup(10)
    with (
        FaultProxy("127.0.0.1", fake.port) as proxy,
        use(fake_env | {"AWS_ENDPOINT_URL_S3": proxy.endpoint()}) as made,
    ):
        proxy.set("blackhole")
        with pytest.raises(program.TransientError):
            made.put(SOME_NAME, data)
        proxy.set("pass", cut=True)
        assert made.put(SOME_NAME, data).sha256 == digest(data)


class SlowServer(http.server.BaseHTTPRequestHandler):
    """Takes in a put piece by piece for four seconds, and then answers."""

    def do_PUT(self) -> None:
        for _ in range(200):
            time.sleep(0.02)
            self.rfile.read(int(self.headers["Content-Length"]) // 200)
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()


# Else megabytes wait in the kernel when everything is sent, and the server takes long to read them.
SMALL_BUFFER = """
import socket
connect = socket.socket.connect
def connect_with_a_small_buffer(self, address):
    self.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    return connect(self, address)
socket.socket.connect = connect_with_a_small_buffer
"""


def test_a_slow_uplink_is_not_given_up(fake_env: Env, lnd: Lnd, started_by: StartedBy) -> None:
    """A steady upload may take longer than the silence, and the time, allowed to an attempt."""
    started_by(altered(SMALL_BUFFER, SILENCE_SECONDS=1.5, ATTEMPT_SECONDS=3.0))
    lnd.write(data=os.urandom(200 * 25_000))
    with http.server.HTTPServer(("127.0.0.1", 0), SlowServer) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        threading.Thread(target=server.handle_request).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        with Script(fake_env | {"AWS_ENDPOINT_URL_S3": endpoint}) as script:
            began = time.monotonic()
            script.wait_for_log("stored s3://")
            assert time.monotonic() - began > 3
            assert "cannot store" not in script.log


# --- Stores with wishes of their own ---


@pytest.mark.unmeasured
def test_more_arguments_of_the_put(fake: FakeS3, written_env: Env) -> None:
    """What a bucket's policy demands goes along with the put, beside checksum and digest."""
    key = "arn:aws:kms:eu-west-1:1:key/a-b"
    more = {
        "x-amz-server-side-encryption": ("ServerSideEncryption", "aws:kms"),
        "x-amz-server-side-encryption-aws-kms-key-id": ("SSEKMSKeyId", key),
        "x-amz-acl": ("ACL", "bucket-owner-full-control"),
        "x-amz-storage-class": ("StorageClass", "STANDARD_IA"),
        "x-amz-tagging": ("Tagging", "project=lnd"),
    }
    done_well(written_env | {"S3_PUT_EXTRA_ARGS": ",".join(map("=".join, more.values()))})
    (request,) = fake.requests
    assert {header: value for header, (_, value) in more.items()}.items() <= request.headers.items()
    assert {"x-amz-meta-sha256", "content-md5"} <= request.headers.keys()


WRONG = "NoSuchArgument=1 acl=private StorageClass BucketKeyEnabled=true"
OWN = "Bucket=other Body=other Metadata=other ChecksumSHA256=other IfNoneMatch=*"


@pytest.mark.unmeasured
@pytest.mark.parametrize("value", [*WRONG.split(), *OWN.split()])
def test_arguments_that_cannot_be(fake: FakeS3, written_env: Env, value: str) -> None:
    """An argument that put_object does not know, or that is the program's own, is refused."""
    said = refused(written_env | {"S3_PUT_EXTRA_ARGS": value}, "S3_PUT_EXTRA_ARGS")
    assert value.partition("=")[0] in said
    assert not fake.requests
