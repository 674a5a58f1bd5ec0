"""The line to S3: it delays, counts, fails when told, and knows to the moment when S3 had stored
what it was sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

from .fault_proxy import FaultProxy, content_length, header
from .s3_server import PATIENCE_SECONDS
from .tls_front import TlsFront

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from .fault_proxy import Counts
    from .tcp_server import Tap

_INTERIM, _GOOD = range(100, 200), range(200, 300)
_NO_BODY = {204, 304}


class Stored(NamedTuple):
    """One PUT that S3 acknowledged, with the moment at which its answer left S3."""

    at: float
    key: str
    size: int
    sha256: str


class _Request(NamedTuple):
    """One request as it went to S3."""

    method: str
    target: str
    body: bytes


class _Messages:
    """Takes the bytes of one direction apart into HTTP/1.1 messages."""

    def __init__(
        self, has_body: Callable[[bytes], bool], ended: Callable[[bytes, bytes], None]
    ) -> None:
        """Ask `has_body` of each head, and tell `ended` of each whole message."""
        self._has_body, self._ended = has_body, ended
        self._buffer = bytearray()
        self._parser = self._messages()

    def feed(self, data: bytes) -> None:
        self._buffer += data
        next(self._parser)

    def _messages(self) -> Iterator[None]:
        while True:
            head = yield from self._until(b"\r\n\r\n")
            body = b""
            if self._has_body(head):
                if header(head, b"transfer-encoding") == b"chunked":
                    body = yield from self._chunks()
                else:
                    body = yield from self._exactly(content_length(head))
            self._ended(head, body)

    def _chunks(self) -> Generator[None, None, bytes]:
        body = b""
        while size := int((yield from self._until(b"\r\n")).partition(b";")[0], 16):
            body += yield from self._exactly(size)
            yield from self._until(b"\r\n")
        yield from self._until(b"\r\n")
        return body

    def _until(self, mark: bytes) -> Generator[None, None, bytes]:
        while (end := self._buffer.find(mark)) < 0:
            yield
        taken = bytes(self._buffer[:end])
        del self._buffer[: end + len(mark)]
        return taken

    def _exactly(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def content(head: bytes, body: bytes) -> bytes:
    """Return what a body carries; the SDK may have sent it in chunks with a checksum."""
    if b"aws-chunked" not in header(head, b"content-encoding") and not header(
        head, b"x-amz-decoded-content-length"
    ):
        return body
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            break
        parts.append(body[:length])
        body = body[length + 2 :]
    return b"".join(parts)


class _Tap:
    """Listens to one connection."""

    def __init__(self, note: Callable[[float, _Request], None]) -> None:
        """Tell of each PUT that was acknowledged."""
        self._note = note
        self._asked: deque[_Request] = deque()
        self._at = 0.0
        self._up = _Messages(lambda _: True, self._request)
        self._down = _Messages(self._answer_has_body, self._answer)

    def up(self, data: bytes, _: float) -> None:
        self._up.feed(data)

    def down(self, data: bytes, at: float) -> None:
        """Take bytes from S3, which came at that moment."""
        self._at = at
        self._down.feed(data)

    def _request(self, head: bytes, body: bytes) -> None:
        method, target, _ = head.split(b"\r\n")[0].decode("latin-1").split(" ")
        self._asked.append(_Request(method, target, content(head, body)))

    def _answer_has_body(self, head: bytes) -> bool:
        status = int(head.split(b" ")[1])
        return status not in _INTERIM and status not in _NO_BODY and self._asked[0].method != "HEAD"

    def _answer(self, head: bytes, _: bytes) -> None:
        status = int(head.split(b" ")[1])
        if status in _INTERIM:
            return
        request = self._asked.popleft()
        if request.method == "PUT" and status in _GOOD:
            self._note(self._at, request)


class _Front(TlsFront):
    """The end of the line before S3, which listens to what passes."""

    def __init__(self, port: int, directory: Path, *, tls: bool) -> None:
        super().__init__(port, directory, tls=tls)
        self._changed = threading.Condition()
        self._stored: dict[str, Stored] = {}

    def wait_for(self, sha256: str, timeout: float) -> Stored | None:
        with self._changed:
            self._changed.wait_for(lambda: sha256 in self._stored, timeout)
            return self._stored.get(sha256)

    def stored(self) -> list[Stored]:
        with self._changed:
            return list(self._stored.values())

    def taps(self) -> tuple[Tap, Tap]:
        tap = _Tap(self._note)
        return tap.up, tap.down

    def _note(self, at: float, request: _Request) -> None:
        digest = hashlib.sha256(request.body).hexdigest()
        with self._changed:
            self._stored.setdefault(digest, Stored(at, request.target, len(request.body), digest))
            self._changed.notify_all()


class Line:
    """One line to S3, over http or https; a `far` one has a settable round-trip time, and can be
    down.

    The delays are made in user space: half of the round trip in each direction, and one more before
    the first bytes of a connection, which stands for TCP's handshake, since accept(2) in user space
    costs none.
    """

    def __init__(self, port: int, directory: Path, *, tls: bool = False, far: bool = False) -> None:
        """Prepare a line to the server at that port; it runs inside `with`."""
        directory.mkdir(parents=True, exist_ok=True)
        self.scheme = "https" if tls else "http"
        self.round_trip = 0.0
        self._far = far
        self._front = _Front(port, directory, tls=tls)
        self._proxy: FaultProxy | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._front)
            if self._far:
                self._proxy = stack.enter_context(FaultProxy("127.0.0.1", self._front.port))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def endpoint(self) -> str:
        """Return the URL of S3 at the near end."""
        return f"{self.scheme}://127.0.0.1:{self._proxy.port if self._proxy else self._front.port}"

    @property
    def ca_file(self) -> Path | None:
        """Return the authority of its certificate, None for http."""
        return self._front.ca_file if self.scheme == "https" else None

    @property
    def proxy(self) -> FaultProxy:
        """Return what delays and fails; a near line has none."""
        if self._proxy is None:
            raise RuntimeError("only a far line can do that")
        return self._proxy

    @property
    def counts(self) -> Counts:
        """Return connections, bytes and round trips of a far line since `reset_counts`."""
        return self.proxy.counts

    def reset_counts(self) -> None:
        self.proxy.reset_counts()

    def set_round_trip(self, seconds: float) -> None:
        """Take this time for a round trip from now on; open connections are cut."""
        self.round_trip = seconds
        self.proxy.set("latency", cut=True, up=seconds / 2, down=seconds / 2)

    def cut(self) -> None:
        """Close every connection, as a router and a server do that have seen nothing for ten
        minutes.
        """
        if self._proxy:
            self._proxy.cut_all()
        else:
            self._front.cut_all()

    def take_down(self) -> None:
        """Begin an outage: connections are cut, and new ones refused."""
        self.proxy.set("refuse", cut=True)

    def bring_up(self) -> None:
        self.proxy.set("latency", up=self.round_trip / 2, down=self.round_trip / 2)

    def wait_for(self, sha256: str, timeout: float = PATIENCE_SECONDS) -> Stored | None:
        """Block until an object of these bytes is stored; None if the time ran out."""
        return self._front.wait_for(sha256, timeout)

    def stored(self) -> list[Stored]:
        """Return the first PUT of each content that was acknowledged until now."""
        return self._front.stored()
