"""The proxy injects the faults that it promises, where no test of the program would fail without
them.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest
from kit import PATIENCE_SECONDS, FakeS3, FaultProxy, Mode
from kit.tcp_server import TcpServer
from kit.tls_front import TlsFront

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port))


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
        with connect(proxy) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number in range(200):
                connection.sendall(bytes([number]))
            received = connection.recv(200, socket.MSG_WAITALL)
            took = time.monotonic() - began
    assert received == bytes(range(200))
    assert 0.2 <= took < 200 * 0.05


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_an_answer_in_two_pieces_is_one_round_trip(listener: socket.socket) -> None:
    with (
        FaultProxy(*listener.getsockname()) as proxy,
        connect(proxy) as client,
        listener.accept()[0] as server,
    ):
        client.sendall(b"?")
        assert server.recv(1) == b"?"
        for piece in (b"a", b"b"):
            server.sendall(piece)
            assert client.recv(1) == piece
        assert proxy.counts.round_trips == 2  # that of the connection is one


@pytest.mark.parametrize(
    ("mode", "end"), [("rst_after_up", ConnectionResetError), ("stall_after_up", TimeoutError)]
)
def test_a_reset_or_stall_comes_after_so_many_bytes(
    listener: socket.socket, mode: Mode, end: type[OSError]
) -> None:
    """The server gets exactly the first bytes, and then a reset, or nothing at all."""
    with FaultProxy(*listener.getsockname()) as proxy:
        proxy.set(mode, n=10)
        with connect(proxy) as client, listener.accept()[0] as server:
            client.sendall(b"0123456")
            assert server.recv(7, socket.MSG_WAITALL) == b"0123456"
            client.sendall(b"789abc")
            assert server.recv(3, socket.MSG_WAITALL) == b"789"
            server.settimeout(0.1)
            with pytest.raises(end):
                server.recv(1)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_swallowed_response_leaves_the_object_stored(
    fake: FakeS3, tmp_path: Path, scheme: str
) -> None:
    """The server stores the object, and the client never hears of it, over http and over https."""
    with (
        TlsFront(fake.port, tmp_path, tls=scheme == "https") as front,
        FaultProxy("127.0.0.1", front.port) as proxy,
        ThreadPoolExecutor() as pool,
    ):
        client = http.client.HTTPConnection("127.0.0.1", proxy.port)
        if scheme == "https":
            trusting = ssl.create_default_context(cafile=front.ca_file)
            client = http.client.HTTPSConnection("127.0.0.1", proxy.port, context=trusting)
        proxy.set("swallow_response")
        with closing(client):
            client.request("PUT", "/bucket/a", b"data")
            answer = pool.submit(client.getresponse)
            proxy.wait_until(lambda counts: counts.swallowed > 0)
            assert fake.objects("bucket")["a"].data == b"data"
            assert not answer.done()
            proxy.cut_all()
            with pytest.raises(ConnectionResetError):
                answer.result(PATIENCE_SECONDS)


@pytest.mark.parametrize("etag", [0, 1])
def test_a_portal_answers_with_a_page(etag: int) -> None:
    """A captive portal answers every put with 200 and a page."""
    with FaultProxy("127.0.0.1", 1) as proxy:
        proxy.set("portal", etag=etag)
        with closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as client:
            for _ in range(2):
                client.request("PUT", "/bucket/a", b"data")
                answer = client.getresponse()
                assert b"<html>" in answer.read()
                assert (answer.status, "ETag" in answer.headers) == (200, bool(etag))


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
