"""A server whose connections can be cut, so that no thread of it outlives the test."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import Any


class CuttingServer(socketserver.ThreadingTCPServer):
    """A TCP server on the loopback address, with a thread for each connection, that can cut them
    all.
    """

    daemon_threads = False
    block_on_close = True

    def __init__(self, handler: type[socketserver.BaseRequestHandler]) -> None:
        """Listen on a free port."""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.02,), name=type(self).__module__
        )

    @property
    def port(self) -> int:
        """Return the port."""
        return int(self.server_address[1])

    def begin(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def end(self) -> None:
        """Accept nothing more, cut all connections, and wait for their threads."""
        self.shutdown()
        self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the base class
        """Remember the connection."""
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as in the base class
        """Forget the connection."""
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)
