"""An HTTP proxy that knows CONNECT and nothing else, as Tor's HTTPTunnelPort: it alone turns names
into addresses.
"""

from __future__ import annotations

import contextlib
import http.server
import selectors
import socket
from typing import TYPE_CHECKING, Self

from .cutting import CuttingServer

if TYPE_CHECKING:
    from collections.abc import Mapping

CHUNK = 65536


class ConnectProxy:
    """Tunnels to the targets that it knows, refuses others, and remembers every request: `CONNECT
    host:port`.
    """

    def __init__(self, routes: Mapping[str, tuple[str, int]]) -> None:
        """Know these targets, `host:port`, and where they really are."""
        self.routes = dict(routes)
        self.asked: list[str] = []
        self._server = _Server(self)

    def __enter__(self) -> Self:
        """Begin to answer."""
        self._server.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Cut all tunnels and end."""
        self._server.end()

    @property
    def address(self) -> tuple[str, int]:
        """Return the address on loopback."""
        return "127.0.0.1", self._server.port

    @property
    def url(self) -> str:
        """Return what belongs into HTTPS_PROXY."""
        return f"http://127.0.0.1:{self.address[1]}"


class _Server(CuttingServer):
    """Knows the proxy that its connections are for."""

    def __init__(self, proxy: ConnectProxy) -> None:
        self.proxy = proxy
        super().__init__(_Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request: a tunnel, or a refusal."""

    server: _Server
    rbufsize = 0  # what follows the request belongs to the tunnel

    def do_CONNECT(self) -> None:
        """Open a tunnel to a known target and pass its bytes until either side ends it."""
        self.server.proxy.asked.append(f"CONNECT {self.path}")
        self.close_connection = True
        route = self.server.proxy.routes.get(self.path)
        if route is None:
            self.send_error(502, "no such name")
            return
        with socket.create_connection(route) as target:
            self.send_response_only(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                _pass_on(self.connection, target)

    def refuse(self) -> None:
        """Refuse, and remember, a request that should have been a tunnel."""
        self.server.proxy.asked.append(f"{self.command} {self.path}")
        self.send_error(405, "CONNECT only")

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = refuse  # noqa: N815 - the names of the base class

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the signature of the base class
        """Write nothing."""


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    """Pass bytes both ways until either side ends."""
    with selectors.DefaultSelector() as selector:
        selector.register(one, selectors.EVENT_READ, other)
        selector.register(other, selectors.EVENT_READ, one)
        while True:
            for key, _ in selector.select():
                data = key.fileobj.recv(CHUNK)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)
