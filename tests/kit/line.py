"""The line to S3: it delays, counts, fails when told, and knows to the moment when S3 had stored
what it was sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

from .fault_proxy import FaultProxy, content_length, header
from .s3_server import PATIENCE_SECONDS
from .tls_front import TlsFront

if TYPE_CHECKING:
    from pathlib import Path

    from .fault_proxy import Counts

_INTERIM, _GOOD = range(100, 200), range(200, 300)
_NO_BODY = {204, 304}


class Stored(NamedTuple):
    """One PUT that S3 acknowledged, with the moment at which its answer left S3."""

    at: float
    key: str
    size: int
    sha256: str


class _Request(NamedTuple):
    method: str
    target: str
    body: bytes


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """Return the body of a message as it is on the line."""
    if header(head, b"transfer-encoding") != b"chunked":
        return await reader.readexactly(content_length(head))
    parts = []
    size = -1
    while size:
        parts.append(await reader.readuntil(b"\r\n"))
        size = int(parts[-1].partition(b";")[0], 16)
        parts.append(await reader.readexactly(size + 2))
    return b"".join(parts)


def content(head: bytes, body: bytes) -> bytes:
    """Return what a body carries; the SDK may have sent it in chunks with a checksum."""
    if header(head, b"transfer-encoding") == b"chunked":
        body = _unchunked(body)
    by_sdk = header(head, b"x-amz-decoded-content-length")
    if by_sdk or b"aws-chunked" in header(head, b"content-encoding"):
        body = _unchunked(body)
    return body


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            break
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


class Line(TlsFront):
    """One line to S3, over http or https; a `far` one has a settable round-trip time, and can be
    down.

    The delays are made in user space: half of the round trip in each direction, and one more before
    the first bytes of a connection, which stands for TCP's handshake, since accept(2) in user space
    costs none.
    """

    def __init__(self, port: int, directory: Path, *, tls: bool = False, far: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(port, directory, tls=tls)
        self.scheme = "https" if tls else "http"
        self.round_trip = 0.0
        self._far = far
        self._proxy: FaultProxy | None = None
        self._changed = threading.Condition()
        self._stored: dict[str, Stored] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        if self._far:
            self._proxy = FaultProxy("127.0.0.1", self.port).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._proxy:
            self._proxy.__exit__()
        super().__exit__()

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{(self._proxy or self).port}"

    @property
    def proxy(self) -> FaultProxy:
        """Return what delays and fails, of a far line."""
        assert self._proxy
        return self._proxy

    @property
    def counts(self) -> Counts:
        return self.proxy.counts

    def reset_counts(self) -> None:
        self.proxy.reset_counts()

    def set_round_trip(self, seconds: float) -> None:
        """Take this time for a round trip from now on; open connections are cut."""
        self.round_trip = seconds
        self.bring_up(cut=True)

    def cut(self) -> None:
        """Close every connection, as a router and a server do that have seen nothing for ten
        minutes.
        """
        (self._proxy or self).cut_all()

    def take_down(self) -> None:
        """Begin an outage: connections are cut, and new ones refused."""
        self.proxy.set("refuse", cut=True)

    def bring_up(self, *, cut: bool = False) -> None:
        self.proxy.set("latency", cut=cut, up=self.round_trip / 2, down=self.round_trip / 2)

    def wait_for(self, sha256: str, timeout: float = PATIENCE_SECONDS) -> Stored | None:
        """Block until an object of these bytes is stored; None if the time ran out."""
        with self._changed:
            self._changed.wait_for(lambda: sha256 in self._stored, timeout)
            return self._stored.get(sha256)

    def stored(self) -> list[Stored]:
        """Return the first PUT of each content that was acknowledged until now."""
        with self._changed:
            return list(self._stored.values())

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass requests and answers, and read them."""
        answers, requests = await self.connect(("127.0.0.1", self.target))
        asked: deque[_Request] = deque()
        async with asyncio.TaskGroup() as ways:
            ways.create_task(self._pass_requests(reader, requests, asked))
            ways.create_task(self._pass_answers(answers, writer, asked))

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[_Request]
    ) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(head)  # before the body, for which the client may await a 100
            body = await _body(reader, head)
            writer.write(body)
            method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ")
            asked.append(_Request(method, target, content(head, body)))
            await writer.drain()

    async def _pass_answers(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: deque[_Request]
    ) -> None:
        while True:
            answer = await reader.readuntil(b"\r\n\r\n")
            status = int(answer.split(b" ")[1])
            request = None if status in _INTERIM else asked.popleft()
            if request and request.method != "HEAD" and status not in _NO_BODY:
                answer += await _body(reader, answer)
            at = time.monotonic()
            writer.write(answer)
            if request and request.method == "PUT" and status in _GOOD:
                self._note(at, request)  # after the answer, so that it delays nothing
            await writer.drain()

    def _note(self, at: float, request: _Request) -> None:
        digest = hashlib.sha256(request.body).hexdigest()
        with self._changed:
            self._stored.setdefault(digest, Stored(at, request.target, len(request.body), digest))
            self._changed.notify_all()
