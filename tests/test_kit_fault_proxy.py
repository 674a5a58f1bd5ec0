"""The proxy injects the faults that it promises, and counts what it says."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
)
from kit import PATIENCE_SECONDS, FaultProxy, Mode, S3Server, make_client
from kit.tcp_server import TcpServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


both = pytest.mark.parametrize("scheme", ["http", "https"])


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.host, s3.port) as running:
        yield running


@pytest.fixture
def put(s3: S3Server, bucket: str, proxy: FaultProxy) -> Iterator[Callable[[bytes], Any]]:
    """Return what puts an object through the proxy as the program does: one attempt, no Expect,
    with MD5.
    """
    client = make_client("s3", proxy.endpoint(s3.scheme), s3.put_only_user(bucket), s3.ca_file)
    client.meta.events.register("before-sign.s3.PutObject", _without_expect)

    def put_object(body: bytes) -> Any:  # noqa: ANN401 - botocore is not typed
        digest = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
        return client.put_object(Bucket=bucket, Key="a", Body=body, ContentMD5=digest)

    yield put_object
    client.close()


def _without_expect(request: Any, **_: object) -> None:  # noqa: ANN401 - botocore is not typed
    """Drop the header that costs a round trip."""
    if "Expect" in request.headers:
        del request.headers["Expect"]


@both
def test_round_trips_are_counted(
    s3: S3Server, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A cold put takes two round trips over http and three over https, a warm one takes one, of
    many packets, too.
    """
    cold = {"http": 2, "https": 3}[s3.scheme]
    modes: list[tuple[Mode, float, float]] = [("pass", 0.0, 0.0), ("latency", 0.03, 0.02)]
    for mode, up, down in modes:
        proxy.set(mode, cut=True, up=up, down=down)
        for expected, connections in ((cold, 1), (1, 0)):
            proxy.reset_counts()
            began = time.monotonic()
            put(os.urandom(100_000))
            took = time.monotonic() - began
            assert (proxy.counts.round_trips, proxy.counts.connections) == (expected, connections)
            assert took >= expected * (up + down)
    assert proxy.counts.bytes_up > 100_000
    assert proxy.counts.bytes_down > 0


class Echo(TcpServer):
    """Sends everything back."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1024):
            writer.write(data)


def test_latency_delays_without_slowing_down() -> None:
    """Many pieces arrive together after one delay, not after one delay each."""
    with Echo() as echo, FaultProxy("127.0.0.1", echo.port) as proxy:
        proxy.set("latency", up=0.05, down=0.05)
        began = time.monotonic()  # before the proxy takes the connection for open
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(200):
                connection.sendall(bytes([number]))
            received = connection.recv(200, socket.MSG_WAITALL)
            took = time.monotonic() - began
    assert received == bytes(range(200))
    assert 0.2 <= took < 200 * 0.05


@both
def test_refused_and_reset_connections_fail_at_once_and_recover(
    proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A refused connection is not accepted, a reset one is; the port works again after."""
    proxy.set("refuse")
    with pytest.raises(EndpointConnectionError):
        put(b"data")
    assert proxy.counts.connections == 0
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.1", proxy.port)) == errno.ECONNREFUSED
    proxy.set("rst")
    with pytest.raises((ConnectionClosedError, EndpointConnectionError)):
        put(b"data")
    assert proxy.counts.connections == 1
    proxy.set("pass")
    put(b"data")


def test_a_black_hole_accepts_and_says_nothing(proxy: FaultProxy) -> None:
    """A black hole takes bytes and gives none."""
    proxy.set("blackhole")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.1) as connection:
        connection.sendall(b"PUT / HTTP/1.1\r\n\r\n")
        assert proxy.wait_until(lambda counts: counts.bytes_up == 18).bytes_down == 0
        with pytest.raises(TimeoutError):
            connection.recv(1)


@both
def test_open_connections_can_be_cut_and_frozen(
    proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A connection that is cut is opened anew; a frozen one takes bytes and never answers."""
    put(b"data")
    proxy.cut_all()
    put(b"data")
    assert proxy.counts.connections == 2
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=0.1) as connection:
        connection.sendall(b"G")
        proxy.wait_until(lambda counts: counts.connections == 3)
        proxy.freeze_all()
        connection.sendall(b"ET / HTTP/1.0\r\n\r\n")
        with pytest.raises(TimeoutError):
            connection.recv(1)


@pytest.mark.parametrize(
    ("mode", "end"), [("rst_after_up", ConnectionResetError), ("stall_after_up", TimeoutError)]
)
def test_a_reset_or_stall_comes_after_so_many_bytes(mode: Mode, end: type[OSError]) -> None:
    """The server gets exactly the first bytes, and then a reset, or nothing at all."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        FaultProxy(*listener.getsockname()) as proxy,
    ):
        proxy.set(mode, n=10)
        with (
            socket.create_connection(("127.0.0.1", proxy.port)) as client,
            listener.accept()[0] as server,
        ):
            client.sendall(b"0123456")
            assert server.recv(7, socket.MSG_WAITALL) == b"0123456"
            client.sendall(b"789abc")
            assert server.recv(3, socket.MSG_WAITALL) == b"789"
            server.settimeout(0.1)
            with pytest.raises(end):
                server.recv(1)


@both
def test_a_swallowed_response_leaves_the_object_stored(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """The server stores the object, and the client never hears of it, over http and over https."""
    proxy.set("swallow_response")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(put, b"data")
        proxy.wait_until(lambda counts: counts.swallowed > 0)
        assert s3.objects(bucket)["a"].data == b"data"
        assert not answer.done()
        proxy.cut_all()
        with pytest.raises(ConnectionClosedError):
            answer.result(PATIENCE_SECONDS)


def test_a_throttled_line_is_slow(proxy: FaultProxy, put: Callable[[bytes], Any]) -> None:
    """Bytes take as long as the line's rate says."""
    proxy.set("throttle", bps=100_000)
    began = time.monotonic()
    put(b"x" * 20_000)
    assert time.monotonic() - began >= 0.2


def test_a_corrupted_body_is_refused(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A bit that flips on the way makes S3 refuse the object; the line is good again afterwards."""
    proxy.set("corrupt")
    for _ in range(2):
        with pytest.raises(ClientError, match="BadDigest"):
            put(os.urandom(100_000))
    assert s3.objects(bucket) == {}
    proxy.set("pass", cut=True)
    put(b"data")


def test_a_portal_answers_with_a_page(
    s3: S3Server, bucket: str, proxy: FaultProxy, put: Callable[[bytes], Any]
) -> None:
    """A captive portal answers every put with 200 and a page, and S3 never sees it."""
    for etag in (0, 1):
        proxy.set("portal", cut=True, etag=etag)
        for _ in range(2):
            assert ("ETag" in put(b"data")) == bool(etag)
    assert proxy.counts.connections == 2
    assert s3.objects(bucket) == {}


def test_an_unreachable_server_resets_the_client() -> None:
    """Where the proxy cannot reach the server, the client is cut off."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with (
        FaultProxy(*address) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE_SECONDS) as connection,
    ):
        connection.sendall(b"G")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_connection_of_the_last_moment_leaves_nothing_open() -> None:
    """A client that the proxy sees when it is about to end is cut off."""
    busy, free = threading.Event(), threading.Event()

    def be_busy() -> None:
        busy.set()
        free.wait()

    with socket.socket() as client:
        with FaultProxy("127.0.0.1", 1) as proxy:
            proxy.loop.call_soon_threadsafe(be_busy)  # it sees the client and the end at once
            busy.wait()
            client.connect(("127.0.0.1", proxy.port))
            threading.Timer(0.1, free.set).start()
        assert not asyncio.all_tasks(proxy.loop)  # what it left undone
        client.settimeout(PATIENCE_SECONDS)
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
