"""LND as a service, inside the box: writes channel.backup when it starts, at SIGUSR1, and once more
while it stops.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kit"))
from lnd import Lnd  # type: ignore[import-not-found]

SIGNALS = {signal.SIGUSR1, signal.SIGTERM}
STOPPING_SECONDS = 0.5

signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
lnd = Lnd(Path(sys.argv[1]))
lnd.write()
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
    systemd.connect(os.environ["NOTIFY_SOCKET"])
    systemd.send(b"READY=1")
while signal.sigwait(SIGNALS) != signal.SIGTERM:
    lnd.write()
time.sleep(
    STOPPING_SECONDS
)  # it closes its peers and its database first; whoever stops beside it, stops before it
lnd.write()
