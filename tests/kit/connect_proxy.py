"""An HTTP proxy that knows CONNECT and nothing else, as Tor's HTTPTunnelPort: it alone turns names
into addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .tcp_server import TcpServer, pass_both

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping


class ConnectProxy(TcpServer):
    """Tunnels to the targets that it knows, refuses others, and remembers every request: `CONNECT
    host:port`.
    """

    def __init__(self, routes: Mapping[str, tuple[str, int]]) -> None:
        """Know these targets, `host:port`, and where they really are."""
        super().__init__()
        self.routes = dict(routes)
        self.asked: list[str] = []

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        """Return what belongs into HTTPS_PROXY."""
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, target, _ = head.split(maxsplit=2)
        self.asked.append(f"{method} {target}")
        if method != "CONNECT":
            writer.write(b"HTTP/1.1 405 CONNECT only\r\n\r\n")
        elif target not in self.routes:
            writer.write(b"HTTP/1.1 502 no such name\r\n\r\n")
        else:
            there = await self.connect(self.routes[target])
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await pass_both((reader, writer), there)
