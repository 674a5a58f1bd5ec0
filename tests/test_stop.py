"""Signals: what is on its way is finished, the grace period is kept, and nothing spoils the end."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from kit import Answer, Daemon, FakeS3, Script, answers
from kit.script import altered
from shared import SELDOM, changing, done_well, staged, write_unseen

if TYPE_CHECKING:
    from functools import partial
    from pathlib import Path

    from kit import FaultProxy, Lnd, Mode
    from shared import Env, Session, StartedBy, SteppedS3


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_daemon(backed_up: Session, sig: signal.Signals) -> None:
    with backed_up() as daemon:
        daemon.signal(sig)
        assert daemon.wait() == 0
        assert "Traceback" not in daemon.log


def test_an_upload_in_flight_is_finished(
    env: Env, lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None], staging: Path
) -> None:
    """So is a version that LND writes after the signal."""
    first = lnd.write()
    with Daemon(SELDOM | env) as daemon:
        stepped.wait_for_requests(1)
        daemon.begin_to_stop()
        second = lnd.write()
        daemon.wait_for_captured(second)
        stepped.let(2)
        assert daemon.wait() == 0
        assert stepped.hashes() == [first.sha256[-6:], second.sha256[-6:]]
        assert staged(staging) == []
    check_stepped()


@pytest.mark.parametrize(("mode", "grace"), [("blackhole", 0), ("blackhole", 1), ("refuse", 1)])
def test_the_grace_period_is_kept(
    env: Env, lnd: Lnd, s3_line: FaultProxy, session: Session, staging: Path, mode: Mode, grace: int
) -> None:
    """The next start sends the rest."""
    s3_line.set(mode)
    version = lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": str(grace)}) as daemon:
        if mode == "blackhole":
            s3_line.wait_until(lambda counts: counts.bytes_up > len(version.data))
        else:
            daemon.wait_for_log("cannot store")
        assert daemon.stop(timeout=grace + 4) == 0
        assert len(staged(staging)) == 1
    s3_line.set("pass", cut=True)
    with session() as daemon:
        daemon.wait_for_stored(version)


def test_it_looks_after_the_signal_and_before_it_leaves(
    backed_up: Session, lnd: Lnd, s3_line: FaultProxy, staging: Path
) -> None:
    with backed_up({"SHUTDOWN_GRACE_SECONDS": "1"}) as daemon:
        s3_line.set("blackhole", cut=True)
        second = write_unseen(lnd)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_captured(second)
        third = write_unseen(lnd)
        assert daemon.wait() == 0
        daemon.wait_for_captured(third)
        assert [name[-6:] for name in staged(staging)] == [second.sha256[-6:], third.sha256[-6:]]


@pytest.mark.unmeasured
def test_it_looks_once_more_while_it_still_tells(
    fake: FakeS3, fake_env: Env, lnd: Lnd, staging: Path, started_by: StartedBy
) -> None:
    """A heartbeat that hangs takes the last moments; what LND writes in them is staged."""
    started_by(altered(LAST_SECONDS=4.0))
    first = lnd.write()
    with FakeS3() as beat, Daemon(fake_env | SELDOM | {"HEARTBEAT_URL": beat.endpoint}) as daemon:
        beat.hold()
        daemon.wait_for_stored(first)
        beat.wait_for_requests(1, method="GET")
        daemon.begin_to_stop()
        last = write_unseen(lnd)
        assert daemon.wait() == 0
        assert "staged for the next start: 1" in daemon.log
    assert [name[-6:] for name in staged(staging)] == [last.sha256[-6:]]
    assert len(fake.requests) == 1


@pytest.mark.unmeasured
def test_a_stop_begins_the_back_off_anew(
    fake: FakeS3, fake_env: Env, lnd: Lnd, started_by: StartedBy
) -> None:
    """After a long outage it would otherwise outlast the grace period, with S3 back again."""
    started_by(altered("import random\nrandom.uniform = lambda *_: 0.1"))
    fake.set_default(answers.SLOW_DOWN)
    version = lnd.write()
    with Daemon(fake_env | SELDOM | {"SHUTDOWN_GRACE_SECONDS": "5"}) as daemon:
        fake.wait_for_requests(6)  # the next but one is sent after more than five seconds
        fake.script(answers.SLOW_DOWN)
        fake.set_default(Answer())
        assert daemon.stop() == 0
        daemon.wait_for_stored(version)


@pytest.mark.unmeasured
def test_a_file_that_changes_at_the_stop_is_read_again(
    backed_up: Session, lnd: Lnd, tmp_path: Path, started_by: StartedBy
) -> None:
    left = tmp_path / "changes"
    left.touch()
    started_by(changing(left))
    with backed_up() as daemon:
        last = write_unseen(lnd)
        left.write_bytes(b"x")
        assert daemon.stop() == 0
        assert "it changed while it was read" in daemon.log
        daemon.wait_for_stored(last)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(
    env: Env, lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None], second: signal.Signals
) -> None:
    lnd.write()
    with Daemon(SELDOM | env | {"SHUTDOWN_GRACE_SECONDS": "300"}) as daemon:
        stepped.wait_for_requests(1)
        daemon.begin_to_stop()
        daemon.signal(second)
        assert daemon.wait() == 128 + second
    check_stepped()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_once_ends_at_the_first_signal(
    env: Env, lnd: Lnd, stepped: SteppedS3, check_stepped: partial[None], sig: signal.Signals
) -> None:
    """`once` is stopping from its beginning, so the first signal ends it; its version is staged."""
    lnd.write()
    with Script(env, "once") as script:
        stepped.wait_for_requests(1)
        script.signal(sig)
        assert script.wait() == 128 + sig
        assert "Traceback" not in script.log
    check_stepped()


CHATTER = """
import os, sys, threading, time

def chatter():
    while not os.path.exists({!r}):
        time.sleep(0.001)
    while True:
        sys.stderr.write("chatter\\n")
        sys.stderr.flush()

threading.Thread(target=chatter, daemon=True).start()
"""


def test_a_thread_that_was_left_behind_cannot_spoil_the_end(
    env: Env, lnd: Lnd, staging: Path, started_by: StartedBy
) -> None:
    """It may write to the log while the program ends; Python alone would abort."""
    receipt = staging / ".receipt"
    started_by(CHATTER.format(str(receipt)))
    lnd.write()
    for _ in range(3):
        done_well(env)
        receipt.unlink()
