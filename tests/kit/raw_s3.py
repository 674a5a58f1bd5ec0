"""A scripted S3 of bare bytes: for answers that no decent server gives."""

from __future__ import annotations

import http.server
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from .cutting import CuttingServer
from .fake_s3 import Request
from .s3 import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

ENOUGH = 256 << 20  # what has no end ends here, lest it takes the machine along
BLOCK = 1 << 16


class RawS3:
    """Sends to each request the bytes that `reply` gives for it, and closes the connection.

    A number among the pieces is a pause in seconds. What was sent is counted, up to the moment in
    which the client went away.
    """

    def __init__(self, reply: Callable[[Request], Iterable[bytes | float]]) -> None:
        """Answer by this function, which may be replaced at any time."""
        self.reply = reply
        self.requests: list[Request] = []
        self.sent = 0
        self.asked_at = 0.0  # when the first request came, by the monotonic clock
        self.ended = threading.Event()
        self._changed = threading.Condition()
        self._server = _Server(self)

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._server.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut all connections and end."""
        self.ended.set()
        self._server.end()

    @property
    def endpoint(self) -> str:
        """Return the URL of the server."""
        return f"http://127.0.0.1:{self._server.port}"

    def take(self, request: Request) -> Iterator[bytes | float]:
        """Record a request, and return the answer; for the handler."""
        with self._changed:
            self.asked_at = self.asked_at or time.monotonic()
            self.requests.append(request)
            self._changed.notify_all()
        return iter(self.reply(request))

    def count(self, sent: int) -> None:
        """Count what was sent; for the handler."""
        with self._changed:
            self.sent += sent

    def wait_for_requests(self, count: int, timeout: float = PATIENCE_SECONDS) -> None:
        """Block until so many requests have arrived."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= count, timeout):
                raise AssertionError(f"{len(self.requests)} of {count} requests arrived")


class _Server(CuttingServer):
    """Knows the scripted S3 that its connections are for."""

    def __init__(self, raw: RawS3) -> None:
        self.raw = raw
        super().__init__(_Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        """Keep quiet about clients that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Takes a request in as HTTP, and answers with bytes."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def answer(self) -> None:
        """Take in one request and send its answer, piece by piece."""
        raw = self.server.raw
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.close_connection = True
        for piece in raw.take(Request(self.command, self.path, headers, body)):
            if raw.ended.is_set():
                return
            if isinstance(piece, bytes):
                self.wfile.write(piece)
                raw.count(len(piece))
            else:
                raw.ended.wait(piece)

    do_PUT = do_GET = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the names of the base class

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of the base class
        """Write nothing."""


def head(status: str = "200 OK", headers: Mapping[str, str] | None = None) -> bytes:
    """Return a status line and the headers, with the blank line that ends them."""
    headers = {"Connection": "close"} | dict(headers or {})
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def framed(
    body: Iterable[bytes],
    how: str = "length",
    status: str = "200 OK",
    headers: Mapping[str, str] | None = None,
) -> Iterator[bytes]:
    """Return an answer whose body ends by its `length`, by the last of its chunks (`chunked`), or
    with the connection (`close`).
    """
    more = dict(headers or {})
    if how == "length":
        body = [b"".join(body)]
        more["Content-Length"] = str(len(body[0]))
    elif how == "chunked":
        more["Transfer-Encoding"] = "chunked"
    yield head(status, more)
    for part in body:
        yield b"%x\r\n%s\r\n" % (len(part), part) if how == "chunked" else part
    if how == "chunked":
        yield b"0\r\n\r\n"


def endless(begin: bytes = b"", more: bytes = b"x" * BLOCK) -> Iterator[bytes]:
    """Return a body that goes on for as long as somebody reads, and at most for 256 MiB."""
    yield begin
    for _ in range(ENOUGH // len(more)):
        yield more


def dripping(begin: bytes, every: float = 0.02) -> Iterator[bytes | float]:
    """Return an answer that begins like this, and goes on with a byte now and then, for ever."""
    yield begin
    while True:
        yield every
        yield b"x"


def continuing(every: float = 0.02) -> Iterator[bytes | float]:
    """Return an answer that for ever asks to go on."""
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n"
        yield every


def error(code: str, message: str = "scripted") -> bytes:
    """Return S3's error document."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


def entry(
    key: str, size: object = 718, stored_at: str = "2026-03-01T12:00:00.000Z", missing: str = ""
) -> str:
    """Return one entry of a list, without the field that is missing."""
    fields = {"Key": key, "LastModified": stored_at, "ETag": '"x"', "Size": size}
    fields = {name: value for name, value in fields.items() if name != missing}
    inside = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    return f"<Contents>{inside}</Contents>"


def listing(*entries: str, truncated: str = "false", token: str | None = None) -> bytes:
    """Return a page of a list; with a token, there are more."""
    following = "" if token is None else f"<NextContinuationToken>{token}</NextContinuationToken>"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>some-bucket</Name>'
        f"<Prefix>alice/</Prefix><KeyCount>{len(entries)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>{truncated}</IsTruncated>{following}{''.join(entries)}</ListBucketResult>"
    ).encode()
