"""Every round trip counts on a line with latency: none is spent that the network does not need."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from kit import FaultProxy, Lnd, S3Server, Script, channel_backup, hurried, version_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# TCP's handshake, TLS 1.3's, and the request; a connection that is open needs the request alone.
COLD = {"http": 2, "https": 3}
WARM = 1
IDLE_SECONDS = 1.0


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


def test_round_trips_of_an_update(
    s3: S3Server, through: dict[str, str], proxy: FaultProxy, lnd: Lnd
) -> None:
    """The first update costs the handshakes and one round trip, each one after it a single round
    trip, and the end none.
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


def test_round_trips_of_a_backlog(
    s3: S3Server, through: dict[str, str], proxy: FaultProxy, lnd: Lnd, staging: Path
) -> None:
    """A backlog goes over one connection, with a single round trip for each version, and one for
    the newest, which is put last once more.
    """
    for hours in range(10):
        data = channel_backup(10)
        name = version_name(data, datetime.now(UTC) - timedelta(hours=10 - hours))
        (staging / name).write_bytes(data)
    lnd.write(data=data)
    with Script(through, "once") as script:
        assert script.wait() == 0
    trips = COLD[s3.scheme] + 10 * WARM
    assert (proxy.counts.connections, proxy.counts.round_trips) == (1, trips)


@pytest.mark.parametrize("scheme", ["http"])
def test_an_idle_connection_is_not_used_again(
    s3: S3Server,
    through: dict[str, str],
    proxy: FaultProxy,
    lnd: Lnd,
    started_by: Callable[[str], None],
) -> None:
    """The connection outlives a short pause, and after a long one another is made, since a NAT
    would have forgotten it in silence.
    """
    started_by(hurried(5 / IDLE_SECONDS))
    lnd.write()
    with Script(through) as script:
        script.wait_for_log("stored s3://")
        for number, pause, connections in ((2, 0.1, 0), (3, 1.2 * IDLE_SECONDS, 1)):
            proxy.reset_counts()
            threading.Event().wait(pause)
            lnd.write()
            script.wait_for_log("stored s3://", count=number)
            assert proxy.counts.connections == connections
        assert proxy.counts.round_trips == COLD[s3.scheme]
        assert script.stop() == 0
