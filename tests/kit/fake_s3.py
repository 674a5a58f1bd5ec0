"""A scripted S3 over http: it answers as told, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import http.server
import ssl
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Self

from .cutting import CuttingServer
from .s3 import PATIENCE_SECONDS, StoredObject

HTML = b"<html><body>Please accept our terms of use.</body></html>"


@dataclass(frozen=True)
class Answer:
    """One answer: with a code, S3's error document; with a body, that body; else the empty answer
    to a good PUT.
    """

    status: int = 200
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    etag: bool = True
    drop: bool = False


STORED = Answer()
SLOW_DOWN = Answer(503, "SlowDown")
INTERNAL_ERROR = Answer(500, "InternalError")
ACCESS_DENIED = Answer(403, "AccessDenied")
EXPIRED_TOKEN = Answer(403, "ExpiredToken")
CLOCK_SKEW = Answer(403, "RequestTimeTooSkewed")
UNKNOWN_KEY = Answer(403, "InvalidAccessKeyId")
WRONG_SIGNATURE = Answer(403, "SignatureDoesNotMatch")
NO_SUCH_BUCKET = Answer(404, "NoSuchBucket")
WRONG_REGION = Answer(301, "PermanentRedirect", {"x-amz-bucket-region": "eu-central-1"})
NO_ETAG = Answer(etag=False)
PORTAL = Answer(200, headers={"Content-Type": "text/html"}, body=HTML, etag=False)
PORTAL_WITH_ETAG = Answer(200, headers={"Content-Type": "text/html"}, body=HTML)
DROPPED = Answer(drop=True)


@dataclass(frozen=True)
class Request:
    """One request as it arrived; the names of the headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class FakeS3:
    """Answers each PUT with the next of the scripted answers and then with success, and any other
    method by default.

    With `hold` requests are taken in and recorded, and answered only after `release`.
    """

    def __init__(
        self,
        *answers: Answer,
        defaults: dict[str, Answer] | None = None,
        hold: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Script the answers; `defaults` gives by method what follows them (other methods than PUT:
        AccessDenied).
        """
        self.requests: list[Request] = []
        self._stored: dict[str, StoredObject] = {}
        self._scheme = "https" if tls else "http"
        self._answers = deque(answers)
        self._defaults = {"PUT": STORED} | (defaults or {})
        self._changed = threading.Condition()
        self._released = threading.Event()
        if not hold:
            self._released.set()
        self._server = _Server(self, tls)

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._server.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut all connections and end."""
        self.release()
        self._server.end()

    @property
    def port(self) -> int:
        """Return the port on the loopback address."""
        return self._server.port

    @property
    def endpoint(self) -> str:
        """Return the URL of the server."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def objects(self, bucket: str, prefix: str = "") -> dict[str, StoredObject]:
        """Return by key what was answered as a good PUT is, as a server would show it."""
        start = f"/{bucket}/"
        with self._changed:
            found = {
                path.removeprefix(start): entry
                for path, entry in self._stored.items()
                if path.startswith(start)
            }
        return {key: entry for key, entry in found.items() if key.startswith(prefix)}

    def script(self, *answers: Answer) -> None:
        """Append answers for the PUTs to come."""
        with self._changed:
            self._answers.extend(answers)

    def set_default(self, answer: Answer, method: str = "PUT") -> None:
        """Answer in this way from now on whenever nothing is scripted."""
        with self._changed:
            self._defaults[method] = answer

    def hold(self) -> None:
        """Answer nothing until `release`."""
        self._released.clear()

    def release(self) -> None:
        """Answer what is waiting, and answer at once from now on."""
        self._released.set()

    def wait_for_requests(
        self, count: int, timeout: float = PATIENCE_SECONDS, *, method: str = "PUT"
    ) -> list[Request]:
        """Block until so many requests of the method have arrived, and return all of them."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._of(method)) >= count, timeout):
                raise AssertionError(
                    f"{len(self._of(method))} of {count} requests arrived: {self.requests}"
                )
            return self._of(method)

    def wait_for_leave(self) -> None:
        """Block until a request that was recorded may be answered."""
        self._released.wait()

    def take(self, request: Request) -> Answer:
        """Record a request, wait as long as answers are held, and return the answer; for the
        handler.
        """
        with self._changed:
            self.requests.append(request)
            answer = self._defaults.get(request.method, ACCESS_DENIED)
            if request.method == "PUT" and self._answers:
                answer = self._answers.popleft()
            self._changed.notify_all()
        self.wait_for_leave()
        if request.method == "PUT" and answer == STORED:
            self._store(request)
        return answer

    def _store(self, request: Request) -> None:
        """Keep what is acknowledged."""
        key = request.path.lstrip("/").partition("/")[2]
        metadata = {"sha256": request.headers.get("x-amz-meta-sha256", "")}
        etag = hashlib.md5(request.body, usedforsecurity=False).hexdigest()
        with self._changed:
            self._stored[request.path] = StoredObject(
                key, request.body, metadata, datetime.now(UTC), etag
            )
            self._changed.notify_all()

    def _of(self, method: str) -> list[Request]:
        """Return the requests of one method."""
        return [request for request in self.requests if request.method == method]


class _Connection(ssl.SSLSocket):
    """A connection that leaves nothing open when the client has reset it before it was accepted.

    `ssl.SSLSocket._create` (CPython 3.11.7) tries to read from it then, and raises without closing
    it.
    """

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Read, and close what was reset."""
        try:
            return super().recv(buflen, flags)
        except ConnectionResetError:
            self.close()
            raise


class _Server(CuttingServer):
    """Knows the scripted S3 that its connections are for."""

    def __init__(self, fake: FakeS3, tls: ssl.SSLContext | None) -> None:
        self.fake = fake
        super().__init__(_Handler)
        if tls:
            tls.sslsocket_class = _Connection
            # The handshake belongs to the thread of the connection.
            self.socket = tls.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        """Keep quiet about clients that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Turns scripted answers into HTTP."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def answer(self) -> None:
        """Take in one request and give its answer."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.fake.take(Request(self.command, self.path, headers, body))
        if answer.drop:
            self.close_connection = True
            return
        content = answer.body or b""
        self.send_response(HTTPStatus(answer.status))
        if answer.code:
            self.send_header("Content-Type", "application/xml")
            content = (
                f"<Error><Code>{answer.code}</Code><Message>scripted</Message></Error>".encode()
            )
        elif answer.etag:
            self.send_header("ETag", f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_PUT = do_GET = do_HEAD = do_POST = do_DELETE = answer  # noqa: N815 - the names of the base class

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of the base class
        """Write nothing."""
