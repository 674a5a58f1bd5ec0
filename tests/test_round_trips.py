"""Every round trip counts on a line with latency: none is spent that the network does not need."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from kit import PATIENCE_SECONDS, FaultProxy, Lnd, S3Server, Script, channel_backup, settings_at

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# TCP's handshake, TLS 1.3's, and the request; a connection that is open needs the request alone.
COLD = {"http": 2, "https": 3}
WARM = 1


@pytest.fixture(params=["http", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Return http and then https, which has round trips of its own."""
    scheme: str = request.param
    return scheme


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    """Return a line to S3 that counts."""
    with FaultProxy(s3.host, s3.port) as counting:
        yield counting


@pytest.fixture
def through(env: dict[str, str], s3: S3Server, proxy: FaultProxy) -> dict[str, str]:
    """Return the settings of the program that lead over that line."""
    return env | {"AWS_ENDPOINT_URL_S3": proxy.endpoint(s3.scheme)}


@contextlib.contextmanager
def uploading(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[program.Uploader]:
    """Yield an uploader with these settings, and close its connection."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    settings, bucket = program.configure()
    try:
        yield program.Uploader(program.Staging(settings.staging), bucket)
    finally:
        if bucket.client:
            bucket.client.close()


def test_round_trips_of_an_update(
    s3: S3Server, through: dict[str, str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update costs the handshakes and one round trip, and each one after it a single
    round trip.
    """
    with uploading(through, monkeypatch) as uploader:
        proxy.reset_counts()
        for expected in (COLD[s3.scheme], WARM, WARM, WARM):
            uploader.staging.stage(channel_backup(10))
            assert asyncio.run(uploader.send_staged()) is None
            assert proxy.counts.round_trips == expected
            proxy.reset_counts()


def test_round_trips_of_a_backlog(
    s3: S3Server, through: dict[str, str], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog goes over one connection, with a single round trip for each version."""
    with uploading(through, monkeypatch) as uploader:
        for _ in range(10):
            uploader.staging.stage(channel_backup(10))
        proxy.reset_counts()
        assert asyncio.run(uploader.send_staged()) is None
        assert (proxy.counts.connections, proxy.counts.round_trips) == (
            1,
            COLD[s3.scheme] + 9 * WARM,
        )


def test_round_trips_of_the_daemon(
    s3: S3Server, through: dict[str, str], proxy: FaultProxy, lnd: Lnd
) -> None:
    """The daemon as users run it spends no other round trips, neither at its start nor at an
    update.
    """
    lnd.write()
    with Script(through) as script:
        script.wait_for_log("stored s3://")
        assert (proxy.counts.connections, proxy.counts.round_trips) == (1, COLD[s3.scheme])
        for number in range(2, 5):
            proxy.reset_counts()
            lnd.write()
            script.wait_for_log("stored s3://", count=number)
            assert (proxy.counts.connections, proxy.counts.round_trips) == (0, WARM)
        assert script.stop() == 0
        assert (proxy.counts.connections, proxy.counts.round_trips) == (0, WARM)


class WatchedServer:
    """Stores whatever it gets, and tells when a connection was closed."""

    def __init__(self) -> None:
        """Prepare to serve in the running loop."""
        self.closed = asyncio.Event()
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
                writer.write(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n')
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.closed.set()


def test_an_idle_connection_is_closed(
    lnd: Lnd, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection outlives a short pause and is closed after a long one, since a NAT would
    forget it in silence.
    """
    idle_seconds = 0.6
    monkeypatch.setattr(program, "CONNECTION_IDLE_SECONDS", idle_seconds)

    async def scenario() -> None:
        watched = WatchedServer()
        server = await asyncio.start_server(watched.serve, "127.0.0.1", 0)
        env = settings_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", lnd, staging)
        stored: asyncio.Queue[program.Stored] = asyncio.Queue()
        with uploading(env, monkeypatch) as uploader:
            discard = uploader.staging.discard

            def note(receipt: program.Stored) -> None:
                discard(receipt)
                stored.put_nowait(receipt)

            monkeypatch.setattr(uploader.staging, "discard", note)
            running = asyncio.create_task(uploader.run(asyncio.Event()))
            for _ in range(3):
                uploader.staging.stage(channel_backup(1))
                await asyncio.wait_for(stored.get(), PATIENCE_SECONDS)
                await asyncio.sleep(idle_seconds / 4)
            assert (watched.connections, watched.closed.is_set()) == (1, False)
            began = asyncio.get_running_loop().time()
            await asyncio.wait_for(watched.closed.wait(), PATIENCE_SECONDS)
            assert asyncio.get_running_loop().time() - began > idle_seconds / 2
            watched.closed.clear()
            uploader.staging.stage(channel_backup(1))
            await asyncio.wait_for(stored.get(), PATIENCE_SECONDS)
            assert watched.connections == 2
            running.cancel()
            await asyncio.wait([running])
        await asyncio.wait_for(watched.closed.wait(), PATIENCE_SECONDS)
        server.close()
        await server.wait_closed()

    asyncio.run(scenario())
