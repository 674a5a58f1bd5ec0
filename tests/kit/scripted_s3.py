"""A scripted S3: it answers as told, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socketserver
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Self

from .answers import ACCESS_DENIED, STORED, Answer, error
from .s3_server import PATIENCE_SECONDS, StoredObject

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class Request:
    """One request as it arrived; the names of the headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class ScriptedS3(socketserver.ThreadingTCPServer):
    """Takes requests in, remembers them, and lets a subclass answer.

    It runs inside `with`. Its connections are cut at the end, so that no thread outlives the test.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.asked_at = 0.0  # when the first request came, by the monotonic clock
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.02,), name=type(self).__name__
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Accept nothing more, cut all connections, and wait for their threads."""
        self.shutdown()
        self._thread.join()
        with self._changed:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(2)
        self.server_close()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for_requests(self, count: int, method: str = "PUT") -> list[Request]:
        """Block until so many requests of the method have arrived, and return all of them."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: len(self._of(method)) >= count, PATIENCE_SECONDS
            )
            assert enough, f"fewer than {count} requests arrived: {self.requests}"
            return self._of(method)

    def note(self, request: Request) -> None:
        with self._changed:
            self.asked_at = self.asked_at or time.monotonic()
            self.requests.append(request)
            self._changed.notify_all()

    def answer(self, request: Request, handler: _Handler) -> None:
        raise NotImplementedError

    def _of(self, method: str) -> list[Request]:
        return [request for request in self.requests if request.method == method]

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as in the base class
        with self._changed:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        if not isinstance(sys.exception(), OSError):  # a client may go away
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedS3

    def take_in(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.answer(Request(self.command, self.path, headers, body), self)

    do_PUT = do_GET = do_HEAD = do_POST = do_DELETE = take_in  # noqa: N815 - the names of the base class

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of the base class
        pass


class FakeS3(ScriptedS3):
    """Answers each PUT with the next of the scripted answers and then with success, and any other
    method by default. After `hold`, requests are taken in and recorded, and wait for `release`.
    """

    def __init__(self, *answers: Answer, defaults: dict[str, Answer] | None = None) -> None:
        """Script the answers; `defaults` gives by method what follows them (other methods than PUT:
        AccessDenied).
        """
        super().__init__()
        self._stored: dict[str, StoredObject] = {}
        self._answers = deque(answers)
        self._defaults = {"PUT": STORED} | (defaults or {})
        self._released = threading.Event()
        self._released.set()

    def __exit__(self, *_: object) -> None:
        self.release()
        super().__exit__()

    def objects(self, bucket: str, prefix: str = "") -> dict[str, StoredObject]:
        """Return by key what was answered as a good PUT is, as a server would show it."""
        start = f"/{bucket}/{prefix}"
        with self._changed:
            found = [entry for path, entry in self._stored.items() if path.startswith(start)]
        return {entry.key: entry for entry in found}

    def script(self, *answers: Answer) -> None:
        with self._changed:
            self._answers.extend(answers)

    def set_default(self, answer: Answer, method: str = "PUT") -> None:
        """Answer in this way from now on whenever nothing is scripted."""
        with self._changed:
            self._defaults[method] = answer

    def hold(self) -> None:
        self._released.clear()

    def release(self) -> None:
        """Answer what is waiting, and answer at once from now on."""
        self._released.set()

    def wait_for_leave(self) -> None:
        """Block until a request that was recorded may be answered."""
        self._released.wait()

    def answer(self, request: Request, handler: _Handler) -> None:
        with self._changed:
            self.note(request)
            answer = self._defaults.get(request.method, ACCESS_DENIED)
            if request.method == "PUT" and self._answers:
                answer = self._answers.popleft()
        self.wait_for_leave()
        if request.method == "PUT" and answer == STORED:
            self._store(request)
        if answer.drop:
            handler.close_connection = True
            return
        content = error(answer.code) if answer.code else answer.body or b""
        headers = {"Content-Length": str(len(content))}
        if answer.code:
            headers["Content-Type"] = "application/xml"
        elif answer.etag:
            headers["ETag"] = f'"{hashlib.md5(request.body, usedforsecurity=False).hexdigest()}"'
        handler.send_response(HTTPStatus(answer.status))
        for name, value in (headers | answer.headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if request.method != "HEAD":
            handler.wfile.write(content)

    def _store(self, request: Request) -> None:
        key = request.path.lstrip("/").partition("/")[2]
        metadata = {"sha256": request.headers.get("x-amz-meta-sha256", "")}
        stored = StoredObject(key, request.body, metadata, datetime.now(UTC))
        with self._changed:
            self._stored[request.path] = stored


class RawS3(ScriptedS3):
    """Sends to each request the bytes that `reply` gives for it, and closes the connection.

    A number among the pieces is a pause in seconds. What was sent is counted, up to the moment in
    which the client went away.
    """

    def __init__(self, reply: Callable[[Request], Iterable[bytes | float]]) -> None:
        super().__init__()
        self.reply = reply
        self.sent = 0
        self._ended = threading.Event()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        super().__exit__()

    def answer(self, request: Request, handler: _Handler) -> None:
        self.note(request)
        handler.close_connection = True
        for piece in self.reply(request):
            if self._ended.is_set():
                return
            if not isinstance(piece, bytes):
                self._ended.wait(piece)
                continue
            handler.wfile.write(piece)
            with self._changed:
                self.sent += len(piece)
