"""The scripted S3 answers as it is told, and remembers what it was asked."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from kit import PATIENCE_SECONDS, Credentials, FakeS3, answers, make_client

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def fake_client(fake: FakeS3) -> Iterator[Any]:
    client = make_client("s3", fake.endpoint, Credentials("key", "secret"))
    yield client
    client.close()


def test_a_scripted_error_comes_once() -> None:
    """The scripted error is what the client sees, and the next put succeeds; both are recorded."""
    with FakeS3(answers.SLOW_DOWN) as fake, fake_client(fake) as client:
        with pytest.raises(ClientError, match="SlowDown"):
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        assert client.put_object(Bucket="bucket", Key="a", Body=b"data")["ETag"]
        first, second = fake.wait_for_requests(2)
        assert (first.method, first.path, first.body) == ("PUT", "/bucket/a", b"data")
        assert second.headers["content-length"] == "4"


def test_scripted_oddities() -> None:
    """Success without ETag, a portal's page, a redirect and a drop are as they are named."""
    with FakeS3(answers.NO_ETAG, answers.PORTAL_WITH_ETAG) as fake, fake_client(fake) as client:
        assert "ETag" not in client.put_object(Bucket="bucket", Key="a", Body=b"data")
        portal = client.put_object(Bucket="bucket", Key="a", Body=b"data")
        assert portal["ETag"]
        assert portal["ResponseMetadata"]["HTTPHeaders"]["content-length"] == str(len(answers.HTML))
        fake.script(answers.DROPPED)
        with pytest.raises(ConnectionClosedError):
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        fake.set_default(answers.WRONG_REGION)
        with pytest.raises(ClientError, match="PermanentRedirect"):
            client.put_object(Bucket="bucket", Key="a", Body=b"data")
        with pytest.raises(ClientError, match="AccessDenied"):
            client.list_objects_v2(Bucket="bucket")


def test_answers_can_be_held_back() -> None:
    """A held answer comes when it is released, or when the block is left."""
    with FakeS3(hold=True) as fake, fake_client(fake) as client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.put_object, Bucket="bucket", Key="a", Body=b"")
        fake.wait_for_requests(1)
        assert not answer.done()
        fake.release()
        assert answer.result(PATIENCE_SECONDS)
        fake.hold()
        with socket.create_connection(("127.0.0.1", fake.port)) as connection:
            connection.sendall(b"PUT /a HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
            fake.wait_for_requests(2)
    with pytest.raises(AssertionError, match="2 of 3 requests"):
        fake.wait_for_requests(3, timeout=0)
