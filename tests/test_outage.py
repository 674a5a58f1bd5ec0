"""S3 fails in every way that it, and the line to it, can fail: the log says why, capture goes on,
and all is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
from kit import Answer, Daemon, FakeS3, FaultProxy, RawS3, answers, assert_nothing_lost
from kit.script import LATE_ENOUGH, altered
from kit.tls_front import TlsFront
from shared import AT_ONCE, SELDOM, expect_newest_last, staged_data

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kit import Lnd, Mode, Request
    from shared import Env, StartedBy

# Names are resolved unless a file says that they are not.
DEAD_DNS = """
import os, socket
resolve = socket.getaddrinfo
def getaddrinfo(*arguments, **more):
    if os.path.exists({!r}):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return resolve(*arguments, **more)
socket.getaddrinfo = getaddrinfo
"""


class Outage:
    """S3 behind a line: both fail on demand, and are well again on demand."""

    def __init__(self, directory: Path, scheme: str) -> None:
        """Make the server, and what stands before it: an impostor has a certificate from an
        authority that nobody trusts.
        """
        self.scheme = scheme
        self.dns_is_dead = directory / "dns-is-dead"
        self.fake = FakeS3()
        secure, other = scheme == "https", directory / "impostor"
        other.mkdir()
        self.front = TlsFront(self.fake.port, directory, name="localhost", tls=secure)
        self.impostor = TlsFront(self.fake.port, other, name="localhost", tls=secure)
        self.proxy = FaultProxy("127.0.0.1", 0)

    def settings(self) -> Env:
        """Return what the program needs to get there; the name is resolved at each connection."""
        endpoint = self.proxy.endpoint(self.scheme).replace("127.0.0.1", "localhost")
        return {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_CA_BUNDLE": str(self.front.ca_file or "")}

    def certificate(self) -> None:
        """Let somebody else answer."""
        self.proxy.upstream = ("127.0.0.1", self.impostor.port)
        self.proxy.cut_all()

    def end(self) -> None:
        """Let everything be well again."""
        self.dns_is_dead.unlink(missing_ok=True)
        self.proxy.upstream = ("127.0.0.1", self.front.port)
        self.fake.set_default(answers.STORED)
        # A cut in the middle of an answer would be a second fault, with words of its own.
        self.proxy.set("pass", cut=self.proxy.mode != "pass")


class Fault(NamedTuple):
    """One way to fail: how it begins, what the log must say, and what the hint must say."""

    begin: Callable[[Outage], None]
    says: str
    hint: str = "(are kept|tried again)"
    schemes: tuple[str, ...] = ("http", "https")


def _line(mode: Mode, **settings: float) -> Callable[[Outage], None]:
    """Return what lets the line fail."""
    return lambda outage: outage.proxy.set(mode, cut=True, **settings)


def _answer(answer: Answer) -> Callable[[Outage], None]:
    """Return what lets S3 answer like this."""
    return lambda outage: outage.fake.set_default(answer)


CUT = "reset by peer|Connection was closed|SSL|Broken pipe"
HANGS = "timed? ?out|given up"
FAULTS = {
    "refused": Fault(_line("refuse"), "Could not connect.*refused"),
    "black-holed": Fault(_line("blackhole"), HANGS),
    "reset at once": Fault(_line("rst"), CUT),
    "reset in mid-body": Fault(_line("rst_after_up", n=4000), CUT),
    "stalled in mid-body": Fault(_line("stall_after_up", n=4000), HANGS),
    "answers lost": Fault(_line("swallow_response"), HANGS),
    "a byte per second": Fault(_line("throttle", bps=1), HANGS),
    "500": Fault(_answer(answers.INTERNAL_ERROR), r"InternalError.*HTTP 500"),
    "503": Fault(_answer(Answer(503, etag=False)), "503", "(are kept|in S3's place)"),
    "slow down": Fault(_answer(answers.SLOW_DOWN), "SlowDown"),
    "another region": Fault(_answer(answers.WRONG_REGION), "PermanentRedirect.*301", "AWS_REGION"),
    "expired": Fault(_answer(answers.EXPIRED_TOKEN), "ExpiredToken.*403", "check the access key"),
    "revoked": Fault(_answer(answers.UNKNOWN_KEY), "InvalidAccessKeyId.*403", "the access key"),
    "denied": Fault(_answer(answers.ACCESS_DENIED), "AccessDenied.*403", "s3:PutObject"),
    "skewed": Fault(_answer(answers.CLOCK_SKEW), "RequestTimeTooSkewed.*403", "set the clock"),
    "bucket gone": Fault(_answer(answers.NO_SUCH_BUCKET), "NoSuchBucket.*404", "check the bucket"),
    "bit flipped": Fault(_answer(Answer(400, "BadDigest")), "BadDigest.*400"),
    "captive portal": Fault(_answer(answers.PORTAL), "is no receipt", "captive portal"),
    "portal with an ETag": Fault(_answer(answers.PORTAL_WITH_ETAG), "is no receipt", "portal"),
    "resolver dead": Fault(
        lambda outage: outage.dns_is_dead.touch(), "Could not connect.*name resolution"
    ),
    "certificate changed": Fault(
        Outage.certificate, "CERTIFICATE_VERIFY_FAILED", "AWS_CA_BUNDLE", ("https",)
    ),
}
CASES = [
    pytest.param(fault, scheme, id=f"{name.replace(' ', '-')}-{scheme}")
    for name, fault in FAULTS.items()
    for scheme in fault.schemes
]


@pytest.fixture
def outage(tmp_path: Path, scheme: str) -> Iterator[Outage]:
    made = Outage(tmp_path, scheme)
    with made.fake, made.front, made.impostor, made.proxy:
        made.end()
        yield made


@pytest.mark.unmeasured
@pytest.mark.parametrize(("fault", "scheme"), CASES)
def test_a_fault_is_told_survived_and_over(
    fault: Fault, outage: Outage, fake_env: Env, lnd: Lnd, staging: Path, started_by: StartedBy
) -> None:
    """It is told once; each version is sent once when it is over, the newest also as the last."""
    # Where nothing hangs, a busy machine must not be taken for a second fault.
    seconds = 0.5 if fault.says == HANGS else 60
    started_by(altered(DEAD_DNS.format(str(outage.dns_is_dead)), ATTEMPT_SECONDS=seconds))
    fault.begin(outage)
    lnd.write()
    with Daemon(fake_env | AT_ONCE | SELDOM | outage.settings()) as daemon:
        daemon.wait_for_log(rf"cannot store: .*({fault.says}).*\n.*hint: .*{fault.hint}")
        daemon.wait_for_captured(lnd.write())
        assert daemon.stored_names() == []
        outage.end()
        before = len(outage.fake.requests)
        for version in lnd.written:
            daemon.wait_for_stored(version)
        assert daemon.stop() == 0
        expect_newest_last(daemon, lnd.written[-1])
        told = re.findall(".*cannot store.*", daemon.log)
        # the end of a fault may cut an attempt short
        told = [line for line in told if re.search(fault.says, line) or not re.search(CUT, line)]
        assert len(told) == 1, daemon.log
        assert len(re.findall(r"S3 stores versions again, after \d+ s", daemon.log)) == 1
    # one may have been on its way when the fault ended
    assert len(outage.fake.requests) - before <= len(lnd.written) + 2
    assert_nothing_lost(lnd, outage.fake, "some-bucket", "alice/", staging, refreshes=1)


@pytest.mark.unmeasured
def test_it_never_gives_up(fake: FakeS3, fake_env: Env, lnd: Lnd, started_by: StartedBy) -> None:
    started_by(altered("import random\nrandom.uniform = lambda *_: 0.002"))  # the pauses
    fake.script(*[answers.SLOW_DOWN] * 7)
    version = lnd.write()
    with Daemon(fake_env | SELDOM) as daemon:
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
        assert "(failures: 7)" in daemon.log
        assert daemon.log.count("cannot store") == 1, daemon.log
    assert len(fake.requests) == 8


@pytest.mark.unmeasured
def test_it_does_not_storm(fake_env: Env, lnd: Lnd, staging: Path) -> None:
    """The pauses are 1, 2 and 4 s, half of it by chance."""
    came_at = []

    def fail(_: Request) -> Iterator[bytes]:
        came_at.append(time.monotonic())
        return answers.framed([answers.error("InternalError")], status="500 Internal Server Error")

    version = lnd.write()
    with (
        RawS3(fail) as raw,
        Daemon(fake_env | SELDOM | {"AWS_ENDPOINT_URL_S3": raw.endpoint}) as daemon,
    ):
        raw.wait_for_requests(4)
        daemon.signal(signal.SIGKILL)
        daemon.wait()
    pauses = [later - earlier for earlier, later in itertools.pairwise(came_at)]
    # A busy machine makes a pause longer, and never shorter.
    for pause, shortest in zip(pauses, [0.45, 0.95, 1.95], strict=True):
        assert pause > shortest
    assert staged_data(staging) == [version.data]


@pytest.mark.parametrize(
    ("kind", "longest"), [(program.TransientError, 60), (program.BackupError, 300)]
)
def test_the_pause_after_a_failure_has_an_end(
    mute_daemon: Callable[[], program.Daemon], kind: type[program.BackupError], longest: float
) -> None:
    """It is a minute, or five where the settings are at fault."""

    async def fail() -> program.Receipt:
        raise kind("cannot store", "wait")

    async def scenario() -> float:
        one = mute_daemon()
        one.failures = 10
        one.upload = asyncio.create_task(fail())
        await asyncio.wait([one.upload])
        began = time.monotonic()
        one.finish_upload()
        return float(one.retry_at) - began

    assert longest / 2 <= asyncio.run(scenario()) < longest + 1


@pytest.mark.unmeasured
def test_no_thread_can_be_started(
    fake_env: Env, fake: FakeS3, lnd: Lnd, started_by: StartedBy
) -> None:
    started_by(f"""{LATE_ENOUGH}
import threading
start = threading.Thread.start
left = [3]
def refuse(thread):
    if left[0]:
        left[0] -= 1
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = refuse
""")
    version = lnd.write()
    with Daemon(fake_env | AT_ONCE) as daemon:
        daemon.wait_for_log("warning: cannot store: can't start new thread\n.*hint: ")
        daemon.wait_for_stored(version)
        assert daemon.stop() == 0
    assert {request.body for request in fake.requests} == {version.data}
