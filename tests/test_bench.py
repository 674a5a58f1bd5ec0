"""The harness of the benchmark: what it measures with is right. The benchmark itself is `make bench`."""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
from typing import TYPE_CHECKING

import pytest
from kit import Answer, FakeS3

from bench.line import Line, content

if TYPE_CHECKING:
    from pathlib import Path


def put(line: Line, *bodies: bytes) -> float:
    """Put these bodies over one connection, and return the seconds of the last."""
    connection = http.client.HTTPConnection(line.endpoint.partition("//")[2], timeout=10)
    began = 0.0
    for number, body in enumerate(bodies):
        began = time.monotonic()
        connection.request("PUT", f"/bucket/{number}", body)
        connection.getresponse().read()
    taken = time.monotonic() - began
    connection.close()
    return taken


def digest(data: bytes) -> str:
    """Return the SHA-256 of the data."""
    return hashlib.sha256(data).hexdigest()


def test_a_line_tells_what_is_stored_when(tmp_path: Path) -> None:
    """Each PUT that S3 acknowledged is told with its key, size and digest; one that it refused is not."""
    with FakeS3() as fake, Line(fake.port, tmp_path) as line:
        began = time.monotonic()
        put(line, b"first", b"", b"x" * 1_000_000)
        fake.script(Answer(503, "SlowDown"))
        put(line, b"refused")
        stored = [line.wait_for(digest(data)) for data in (b"first", b"", b"x" * 1_000_000)]
        assert [(each.key, each.size) for each in stored if each] == [
            ("/bucket/0", 5),
            ("/bucket/1", 0),
            ("/bucket/2", 1_000_000),
        ]
        times = [began, *(each.at for each in stored if each), time.monotonic()]
        assert times == sorted(times)
        assert line.wait_for(digest(b"refused"), 0) is None
        assert len(line.stored()) == 3


@pytest.mark.parametrize("seconds", [0.04, 0.15])
def test_a_line_delays_and_counts(tmp_path: Path, seconds: float) -> None:
    """A request takes a round trip, a connection one more, and so they are counted; stored is in the middle."""
    with FakeS3() as fake, Line(fake.port, tmp_path, far=True) as line:
        line.set_round_trip(seconds)
        assert put(line, b"cold") >= 2 * seconds
        assert line.counts.round_trips == 2
        line.reset_counts()
        began = time.monotonic()
        assert put(line, b"one", b"two") >= seconds
        assert line.counts.round_trips == 3
        ended = time.monotonic()
        stored = line.wait_for(digest(b"two"))
        assert stored
        assert began + 2.5 * seconds <= stored.at <= ended - 0.5 * seconds


def test_a_line_is_down_and_up(tmp_path: Path) -> None:
    """In an outage connections are cut and refused; after it all is as before."""
    with FakeS3() as fake, Line(fake.port, tmp_path, far=True) as line:
        put(line, b"before")
        line.take_down()
        with pytest.raises(ConnectionError):
            put(line, b"while")
        line.bring_up()
        put(line, b"after")
        assert [each.sha256 for each in line.stored()] == [digest(b"before"), digest(b"after")]


@pytest.mark.parametrize("far", [False, True])
def test_a_line_cuts(tmp_path: Path, far: bool) -> None:  # noqa: FBT001 - a case
    """What is cut is closed for both sides."""
    with FakeS3() as fake, Line(fake.port, tmp_path, far=far) as line:
        connection = http.client.HTTPConnection(line.endpoint.partition("//")[2], timeout=10)
        connection.request("PUT", "/bucket/key", b"data")
        connection.getresponse().read()
        timer = threading.Timer(0.05, line.cut)
        timer.start()
        try:
            assert connection.sock.recv(1) == b""
        except ConnectionResetError:
            assert far
        timer.join()
        connection.close()


def test_chunks_of_the_sdk_are_put_together() -> None:
    """What the SDK sends in chunks with a checksum behind it is told by its content."""
    head = b"PUT / HTTP/1.1\r\nContent-Encoding: aws-chunked\r\nx-amz-decoded-content-length: 5"
    assert content(head, b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n") == b"abcde"
    assert content(b"PUT / HTTP/1.1", b"3\r\nabc\r\n0\r\n\r\n") == b"3\r\nabc\r\n0\r\n\r\n"
