"""Clocks that are wrong, jump, or are put right: names increase, and the newest comes last."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from inside import discard, files, receipt, restart, true_name
from kit import Daemon, FakeS3, FaultProxy, Lnd, S3Server, answers, channel_backup, run_script
from kit.script import LATE_ENOUGH
from shared import AT_ONCE, NOON, done_well, expect_last, restored_bytes

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial
    from pathlib import Path

    from shared import Env

# Run before the program: its clock is ahead by as many days as the file says.
SHIFTED = """
import datetime, time
def shift():
    return float(open(CLOCK).read()) * 86400
class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.utcfromtimestamp(time.time())
right, right_ns = time.time, time.time_ns
time.time = lambda: right() + shift()
time.time_ns = lambda: right_ns() + int(shift() * 1e9)
datetime.datetime = Shifted
"""


@pytest.fixture
def clock(tmp_path: Path, started_by: Callable[[str], None]) -> Callable[[int], None]:
    """Return what sets the program's clock so many days ahead, also while it runs."""
    file, part = tmp_path / "clock", tmp_path / "clock.part"

    def set_ahead(days: int) -> None:
        part.write_text(str(days))
        part.rename(file)

    started_by(f"{LATE_ENOUGH}\nCLOCK = {str(file)!r}{SHIFTED}")
    set_ahead(0)
    return set_ahead


@pytest.mark.parametrize("known", ["staged", "sent before older ones"])
def test_names_increase_when_the_clock_is_set_back(
    known: str, lnd: Lnd, staging: Path, look: Callable[[], None]
) -> None:
    """Names increase across restarts with the clock set back by a day, wherever the highest is."""
    lnd.write()
    look()
    ((name, data),) = files(staging).items()
    if known != "staged":
        queue = restart(staging)
        discard(queue, name, data)
        queue.acknowledge(receipt(true_name(data), data, newest=name))
        queue.tidy()
    with mock.patch.object(program, "datetime", wraps=datetime) as clock:
        clock.now.return_value = datetime.now(UTC) - timedelta(days=1)
        lnd.write()
        look()
    at = program.captured_at(name)
    assert at
    assert program.captured_at(max(files(staging))) == at + timedelta(microseconds=1)


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_versions_captured_under_a_wrong_clock(
    put: partial[str],
    s3: S3Server,
    bucket: str,
    lnd: Lnd,
    env: Env,
    s3_line: FaultProxy,
    home: Path,
    reader: Env,
    clock: Callable[[int], None],
    days: int,
) -> None:
    """They are stored once S3 is back, and `restore` takes the version on disk."""
    before = channel_backup(3)  # stored under the right clock
    put(NOON, before)
    s3_line.set("refuse")
    clock(days)
    with Daemon(env | {"SHUTDOWN_GRACE_SECONDS": "0"}) as daemon:
        for channels in (5, 6, 7):
            daemon.wait_for_captured(lnd.write(channels))
        assert daemon.stop() == 0
    clock(0)
    s3_line.set("pass")
    done_well(env)
    objects = s3.objects(bucket)
    stored = {each.data for each in objects.values()}
    assert stored == {before} | {each.data for each in lnd.written}
    assert objects[max(objects)].data == lnd.written[-1].data
    assert restored_bytes(reader, home) == lnd.written[-1].data


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_a_clock_that_is_put_right_while_the_daemon_runs(
    fake: FakeS3, fake_env: Env, lnd: Lnd, clock: Callable[[int], None], days: int
) -> None:
    """The version on disk is put again when the clock is right, and that is all."""
    puts = 2 if days < 0 else 1
    clock(days)
    fake.set_default(answers.SLOW_DOWN)
    with Daemon(fake_env | AT_ONCE) as daemon:
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("SlowDown")
        clock(0)
        fake.set_default(answers.STORED)
        daemon.wait_for_stored(version, count=puts)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    del fake.requests[:-puts]
    expect_last(fake, version.data)
    assert len(fake.objects("some-bucket")) == puts


@pytest.mark.unmeasured
def test_names_increase_when_the_clock_jumps_back(
    fake: FakeS3, fake_env: Env, lnd: Lnd, clock: Callable[[int], None]
) -> None:
    """After a receipt under a clock that ran ahead, names go on from there, also at a restart."""
    for days in (400, -730, 0):
        clock(days)
        lnd.write()
        done_well(fake_env)
        expect_last(fake, lnd.written[-1].data)


@pytest.mark.unmeasured
def test_a_receipt_from_the_future(
    fake: FakeS3, fake_env: Env, lnd: Lnd, clock: Callable[[int], None]
) -> None:
    """It proves nothing, neither to `check` nor to the daemon."""
    lnd.write()
    os.utime(lnd.path, (time.time() - 3600,) * 2)  # it would have been backed up by now
    clock(400)
    done_well(fake_env, "once")
    done_well(fake_env, "check")
    clock(0)
    done = run_script(fake_env, "check")
    assert (done.returncode, done.stdout[:13]) == (1, "NOT BACKED UP")
    done_well(fake_env, "once")
    done_well(fake_env, "check")
    assert len(fake.objects("some-bucket")) == 2
