"""Clocks that are wrong, jump, or are put right: names increase, and the newest comes last."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Self

import pytest
from inside import discard, files, receipt, restart, true_name
from kit import (
    Answer,
    Daemon,
    FakeS3,
    FaultProxy,
    Lnd,
    S3Server,
    channel_backup,
    run_script,
    settings_for,
)
from kit.script import LATE_ENOUGH
from shared import AT_ONCE, NOON, done_well, expect_last, failure_of, put_version, restore

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DAY = 86400


# Run before the program: its clock is ahead by what the file says.
SHIFTED = """
import datetime, time
def shift():
    return float(open(CLOCK).read())
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
    """Return what sets the clock of the program so many seconds ahead of the right one, also while
    it runs.
    """
    file, part = tmp_path / "clock", tmp_path / "clock.part"

    def set_ahead(seconds: int) -> None:
        part.write_text(str(seconds))
        part.rename(file)

    started_by(f"{LATE_ENOUGH}\nCLOCK = {str(file)!r}{SHIFTED}")
    set_ahead(0)
    return set_ahead


@pytest.mark.parametrize("known", ["staged", "receipt", "newest of the receipt"])
def test_names_increase_when_the_clock_is_set_back(
    known: str,
    lnd: Lnd,
    staging: Path,
    look: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names increase across restarts with the clock set back by a day, whether the highest one is
    still staged, was sent last, or was sent before older ones.
    """

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time() - DAY, tz)

    lnd.write()
    look()
    ((name, data),) = files(staging).items()
    if known != "staged":
        last = name if known == "receipt" else true_name(data)
        discard(queue := restart(staging), name, data)
        queue.acknowledge(receipt(last, data, newest=name))
        queue.tidy()
    monkeypatch.setattr(program, "datetime", Yesterday)
    lnd.write()
    look()
    at = program.captured_at(name)
    assert at
    assert program.captured_at(max(files(staging))) == at + timedelta(microseconds=1)


def test_a_clock_that_is_wrong_for_the_signature(
    env: dict[str, str], lnd: Lnd, clock: Callable[[int], None]
) -> None:
    """When S3 compares the time of the signature with its own and refuses it, the message says to
    set the clock.
    """
    lnd.write()
    clock(2 * 3600)
    said = failure_of(env | {"SHUTDOWN_GRACE_SECONDS": "0"})
    assert "RequestTimeTooSkewed" in said
    assert "clock" in said.partition("hint: ")[2]


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_versions_captured_under_a_wrong_clock(
    s3: S3Server,
    bucket: str,
    prefix: str,
    lnd: Lnd,
    staging: Path,
    home: Path,
    reader: dict[str, str],
    clock: Callable[[int], None],
    days: int,
) -> None:
    """Versions captured under a wrong clock while S3 was away are stored once it is back, and the
    version on disk is what `restore` takes then: put last, under the newest name.
    """
    before = channel_backup(3)  # stored under the right clock
    put_version(s3, bucket, NOON, before)
    with FaultProxy(s3.host, s3.port) as proxy:
        proxy.set("refuse")
        env = settings_for(s3, bucket, prefix, lnd, staging, endpoint=proxy.endpoint())
        env |= {"SHUTDOWN_GRACE_SECONDS": "0"}
        clock(days * DAY)
        with Daemon(env) as daemon:
            for channels in (5, 6, 7):
                daemon.wait_for_captured(lnd.write(channels))
            assert daemon.stop() == 0
        clock(0)
        proxy.set("pass")
        done_well(env)
    wanted, objects = lnd.written[-1].data, s3.objects(bucket, prefix)
    assert objects[max(objects)].data == wanted
    assert max(objects.values(), key=lambda each: (each.last_modified, each.key)).data == wanted
    assert {each.data for each in lnd.written} == {each.data for each in objects.values()} - {
        before
    }
    restore(reader, home)
    assert (home / "channel.backup").read_bytes() == wanted


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_a_clock_that_is_put_right_while_the_daemon_runs(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Callable[[int], None], days: int
) -> None:
    """A daemon that captured under a wrong clock puts the version on disk again when the clock is
    right, and that is all.
    """
    clock(days * DAY)
    fake.set_default(Answer(503, "SlowDown"))
    with Daemon(fake_env | AT_ONCE) as daemon:
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("SlowDown")
        clock(0)
        fake.set_default(Answer())
        daemon.wait_for_stored(version, count=2 if days < 0 else 1)
        daemon.wait_for_looks()
        assert daemon.stop() == 0
    del fake.requests[: -2 if days < 0 else -1]
    expect_last(fake, version.data)
    stored = fake.objects("some-bucket")
    assert len(stored) == (2 if days < 0 else 1)


@pytest.mark.unmeasured
def test_names_increase_when_the_clock_jumps_back(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Callable[[int], None]
) -> None:
    """After a receipt under a clock that ran ahead, names go on from there, also after a
    restart.
    """
    for days in (400, -730, 0):
        clock(days * DAY)
        lnd.write()
        done_well(fake_env)
        expect_last(fake, lnd.written[-1].data)


@pytest.mark.unmeasured
def test_a_receipt_from_the_future(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Callable[[int], None]
) -> None:
    """A receipt that a clock dated 400 days ahead proves nothing, neither to `check` nor to the
    daemon.
    """
    lnd.write()
    os.utime(lnd.path, (time.time() - 3600,) * 2)  # it would have been backed up by now
    clock(400 * DAY)
    done_well(fake_env, "once")
    done_well(fake_env, "check")
    clock(0)
    done = run_script(fake_env, "check", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["current"] is False
    done_well(fake_env, "once")
    done_well(fake_env, "check")
    assert len(fake.objects("some-bucket")) == 2
