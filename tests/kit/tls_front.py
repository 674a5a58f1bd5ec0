"""What stands before a server: TLS where it has none of its own."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trustme

from .tcp_server import TcpServer, pass_both

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path


class TlsFront(TcpServer):
    """Passes what comes to a port, and back; with TLS, what is in it."""

    def __init__(
        self,
        port: int,
        directory: Path,
        *,
        tls: bool = True,
        name: str = "127.0.0.1",
        starts: timedelta = timedelta(minutes=-1),
    ) -> None:
        """Prepare to stand before that port; with TLS, under a certificate for this name of an
        authority of its own, which is valid for a day.
        """
        self.target = port
        self.ca_file = context = None
        if tls:
            authority = trustme.CA()
            self.ca_file = directory / "ca.pem"
            authority.cert_pem.write_to_path(str(self.ca_file))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.num_tickets = 0  # they come unasked, and would be counted as an answer
            begin = datetime.now(UTC) + starts
            end = begin + timedelta(days=1)
            authority.issue_cert(name, not_before=begin, not_after=end).configure_cert(context)
        super().__init__(context)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await pass_both((reader, writer), await self.connect(("127.0.0.1", self.target)))
