"""Faults between the program and S3: a TCP proxy that misbehaves on demand."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from .answers import HTML
from .s3_server import PATIENCE_SECONDS
from .tcp_server import CHUNK, TcpServer

if TYPE_CHECKING:
    from collections.abc import Callable

Mode = Literal[
    "pass",
    "refuse",
    "rst",
    "blackhole",
    "latency",
    "rst_after_up",
    "stall_after_up",
    "swallow_response",
    "throttle",
    "corrupt",
    "portal",
]

_LINGER_NONE = struct.pack("ii", 1, 0)
_TLS_HANDSHAKE, _TLS_DATA = 0x16, 0x17
_CONTINUE = b"HTTP/1.1 100"


@dataclass(frozen=True)
class Counts:
    """What went through the proxy since the counts were last reset."""

    connections: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    round_trips: int = 0
    swallowed: int = 0


class TlsRecords:
    """Tells requests from the handshake, in what a client sends over TLS 1.3."""

    def __init__(self) -> None:
        self._data_records = 0
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes; a record counts once it is complete."""
        self._buffer += data
        # The header has the type, the version and the length, in five bytes.
        while len(self._buffer) >= (end := 5 + int.from_bytes(self._buffer[3:5])):
            self._data_records += self._buffer[0] == _TLS_DATA
            self._buffer = self._buffer[end:]

    @property
    def requested(self) -> bool:
        """Tell whether a request has begun: the first record of data ends the handshake."""
        return self._data_records + bool(self._buffer) > 1


def header(head: bytes, name: bytes) -> bytes:
    """Return the value of an HTTP header, empty if it is not there."""
    found = re.search(rb"(?mi)^%s:[ \t]*(.*?)\s*$" % re.escape(name), head)
    return found[1] if found else b""


def content_length(head: bytes) -> int:
    return int(header(head, b"content-length") or 0)


def _reset(writers: list[asyncio.StreamWriter]) -> None:
    """Cut a connection hard, so that both sides see a reset."""
    for writer in writers:
        if not writer.transport.is_closing():
            connected = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
            writer.transport.abort()


class _Connection:
    """One client's connection and its counterpart to the server, in the mode of the moment of its
    acceptance.
    """

    def __init__(
        self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.proxy = proxy
        self.mode: Mode = proxy.mode
        self.settings = proxy.settings
        self.reader = reader
        self.writers = [writer]
        writer.transport.set_write_buffer_limits(0)
        self.opened = asyncio.get_running_loop().time()
        self.tls: TlsRecords | None = None
        self.asked = False
        self.up_bytes = 0

    async def serve(self) -> None:
        """Do what the mode says until either side ends the connection."""
        if self.mode == "rst":
            self.note_up(await self.reader.read(CHUNK))  # some clients see an earlier one too late
            _reset(self.writers)
        elif self.mode == "blackhole":
            while data := await self.reader.read(CHUNK):
                self.note_up(data)
        elif self.mode == "portal":
            await self.portal()
        else:
            await self.forward()

    async def forward(self) -> None:
        reader, writer = await self.proxy.connect(self.proxy.upstream)
        writer.transport.set_write_buffer_limits(0)
        self.writers.append(writer)
        async with asyncio.TaskGroup() as group:
            if self.mode == "corrupt":
                group.create_task(self.corrupt(writer))
            else:
                group.create_task(self.direction(self.reader, writer, upward=True))
            group.create_task(self.direction(reader, self.writers[0], upward=False))

    async def corrupt(self, writer: asyncio.StreamWriter) -> None:
        """Pass HTTP requests, and flip one bit in the middle of each body."""
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.note_up(head)
            writer.write(head)
            body = await self.reader.readexactly(content_length(head))
            self.note_up(body)
            if body:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
            writer.write(body)
            await writer.drain()

    async def direction(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upward: bool
    ) -> None:
        """Pass the bytes of one direction; the delay of the mode holds them back without slowing
        them down.
        """
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        up, down = self.settings.get("up", 0.0), self.settings.get("down", 0.0)
        delay = up if upward else down
        established = self.opened + up + down

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            transform = self.upward if upward else self.downward
            step = max(1, min(CHUNK, int(self.settings.get("bps", CHUNK * 20)) // 20))
            while data := await reader.read(step):
                passed = await transform(data)
                if self.mode == "throttle":
                    await asyncio.sleep(len(data) / self.settings["bps"])
                if passed:
                    queue.put_nowait((max(loop.time(), established) + delay, passed))
            queue.put_nowait((loop.time() + delay, b""))

    async def upward(self, data: bytes) -> bytes:
        """Take bytes from the client and return what the server gets of them."""
        before = self.up_bytes
        self.note_up(data)
        if self.mode not in ("rst_after_up", "stall_after_up"):
            return data
        passed = data[: max(0, int(self.settings["n"]) - before)]
        if self.mode == "rst_after_up" and self.up_bytes >= self.settings["n"]:
            self.writers[1].write(passed)
            await self.writers[1].drain()
            _reset(self.writers)
            return b""
        return passed

    async def downward(self, data: bytes) -> bytes:
        """Take bytes from the server and return what the client gets of them."""
        if self.mode == "swallow_response" and self.is_response(data):
            self.proxy.count(swallowed=len(data))
            return b""
        self.note_down(data)
        return data

    def is_response(self, data: bytes) -> bool:
        """Tell whether the bytes answer a request, and not a handshake or `Expect`."""
        return self.tls.requested if self.tls else not data.startswith(_CONTINUE)

    async def portal(self) -> None:
        writer = self.writers[0]
        etag = b'ETag: "5eb63bbbe01eeed093cb22bb8f5acdc3"\r\n' if self.settings.get("etag") else b""
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.note_up(head)
            if b"100-continue" in head.lower():
                writer.write(_CONTINUE + b" Continue\r\n\r\n")
            self.note_up(await self.reader.readexactly(content_length(head)))
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n" + etag
            answer = head + b"Content-Length: %d\r\n\r\n" % len(HTML) + HTML
            self.note_down(answer)
            writer.write(answer)
            await writer.drain()

    def note_up(self, data: bytes) -> None:
        """Count bytes from the client, which as a rule await an answer."""
        if not data:
            return
        if not self.up_bytes and data[0] == _TLS_HANDSHAKE:
            self.tls = TlsRecords()
        if self.tls:
            self.tls.feed(data)
        self.up_bytes += len(data)
        self.asked = True
        self.proxy.count(bytes_up=len(data))

    def note_down(self, data: bytes) -> None:
        """Count bytes for the client, and a round trip if it was waiting for them."""
        self.proxy.count(bytes_down=len(data), round_trips=int(self.asked))
        self.asked = False


class FaultProxy(TcpServer):
    """A TCP proxy on the loopback address whose mode decides what becomes of each new connection.

    - `pass`: nothing happens;
    - `refuse`: nobody listens; `rst`: reset at the first byte; `blackhole`: accepted, never
      answered;
    - `latency(up, down)`: a line with these delays in seconds, handshake included, of any
      throughput;
    - `throttle(bps)`: a line of so many bytes per second each way;
    - `rst_after_up(n)`, `stall_after_up(n)`: the server gets the first n bytes, then a reset, or
      nothing more;
    - `swallow_response`: the server gets everything, the client never hears;
    - `corrupt`: one bit of each HTTP body is flipped;
    - `portal(etag)`: every HTTP request is answered by a log-in page, with an ETag or without.
    """

    def __init__(self, host: str, port: int) -> None:
        """Prepare a proxy before that server; it runs inside `with`."""
        super().__init__()
        self.upstream = (host, port)
        self.mode: Mode = "pass"
        self.settings: dict[str, float] = {}
        self._counts = Counts()
        self._changed = threading.Condition()
        self._placeholder: socket.socket | None = None

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._placeholder:
            self._placeholder.close()

    @property
    def counts(self) -> Counts:
        with self._changed:
            return self._counts

    def endpoint(self, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.port}"

    def set(self, mode: Mode, *, cut: bool = False, **settings: float) -> None:
        """Treat new connections in this way from now on, and on request cut the others."""
        self.call(self._set(mode, settings))
        if cut:
            self.cut_all()

    def cut_all(self) -> None:
        self.call(self._reset_all())

    def reset_counts(self) -> None:
        with self._changed:
            self._counts = Counts()

    def wait_until(self, predicate: Callable[[Counts], bool]) -> None:
        """Block until the counts fulfil the predicate."""
        with self._changed:
            so = self._changed.wait_for(lambda: predicate(self._counts), PATIENCE_SECONDS)
            assert so, self._counts

    def count(self, **more: int) -> None:
        with self._changed:
            self._counts = replace(
                self._counts,
                **{name: getattr(self._counts, name) + number for name, number in more.items()},
            )
            self._changed.notify_all()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count(connections=1, round_trips=1)
        await _Connection(self, reader, writer).serve()

    async def _set(self, mode: Mode, settings: dict[str, float]) -> None:
        """Take over the mode; to refuse connections the port is kept, but not listened at."""
        self.mode, self.settings = mode, settings
        if self._placeholder:
            self._placeholder.close()
            self._placeholder = None
        if mode != "refuse":
            await self.listen()
            return
        await self.deafen()
        self._placeholder = socket.socket()
        self._placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._placeholder.bind(("127.0.0.1", self.port))

    async def _reset_all(self) -> None:
        for writers in self._open.values():
            _reset(writers)
