"""Clocks that are wrong, jump, or are put right: names increase, and the newest comes last."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
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
    reader_settings,
    run_script,
    settings_for,
    version_name,
)
from shared import (
    AT_ONCE,
    NOON,
    expect_last,
    failure_of,
)

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable

DAY = 86400
LIBFAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))


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
            return cls.fromtimestamp(datetime.now(tz).timestamp() - 86400, tz)

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


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_clock_that_is_wrong_for_the_signature(
    env: dict[str, str], lnd: Lnd, started_by: Callable[[str], None], hours: int
) -> None:
    """When S3 compares the time of the signature with its own and refuses it, the message says to
    set the clock.
    """
    lnd.write()
    started_by(
        "import datetime, botocore.auth\n"
        "now = botocore.auth.get_current_datetime\n"
        f"botocore.auth.get_current_datetime = lambda *a, **k: now(*a, **k) + "
        f"datetime.timedelta(hours={hours})"
    )
    said = failure_of(env | {"SHUTDOWN_GRACE_SECONDS": "0"})
    assert "RequestTimeTooSkewed" in said
    assert "clock" in said.partition("hint: ")[2]


SHIFTED = """
import datetime, time
def shift():
    return float(open({path!r}).read() or 0)
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


class Clock:
    """The program's clock, which is so many seconds ahead of the right one, or behind it."""

    def __init__(self, file: Path, settings: dict[str, str]) -> None:
        """Begin with the right time; the settings make the program go by this clock."""
        self.file = file
        self.settings = settings
        self.set(0)

    def set(self, seconds: int) -> None:
        """Let it jump, also under a program that runs."""
        part = self.file.with_suffix(".part")
        part.write_text(f"{seconds:+d}")
        part.rename(self.file)


@pytest.fixture(params=["libfaketime", "python"])
def clock(
    request: pytest.FixtureRequest, tmp_path: Path, started_by: Callable[[str], None]
) -> Clock:
    """Return the clock of what is started: of the whole process, or of its Python alone."""
    file = tmp_path / "clock"
    if request.param == "python":
        started_by(SHIFTED.format(path=str(file)))
        return Clock(file, {})
    if not LIBFAKETIME:
        pytest.skip("libfaketime is not installed")
    return Clock(
        file,
        {
            "LD_PRELOAD": str(LIBFAKETIME[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        },
    )


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_versions_captured_under_a_wrong_clock(
    s3: S3Server,
    bucket: str,
    prefix: str,
    lnd: Lnd,
    staging: Path,
    home: Path,
    clock: Clock,
    days: int,
) -> None:
    """Versions captured under a wrong clock while S3 was away are stored once it is back, and the
    version on disk is what `restore` takes then: put last, under the newest name.
    """
    before = channel_backup(3)  # stored under the right clock
    s3.put_version(bucket, prefix + version_name(before, NOON), before)
    with FaultProxy(s3.host, s3.port) as proxy:
        proxy.set("refuse")
        env = settings_for(s3, bucket, prefix, lnd, staging, endpoint=proxy.endpoint())
        env |= clock.settings | {"SHUTDOWN_GRACE_SECONDS": "0"}
        clock.set(days * DAY)
        with Daemon(env) as daemon:
            for channels in (5, 6, 7):
                daemon.wait_for_captured(lnd.write(channels))
            assert daemon.stop() == 0
        clock.set(0)
        proxy.set("pass")
        done = run_script(env | {"SHUTDOWN_GRACE_SECONDS": "10"}, "once")
        assert done.returncode == 0, done.stderr
    wanted, objects = lnd.written[-1].data, s3.objects(bucket, prefix)
    assert objects[max(objects)].data == wanted
    assert max(objects.values(), key=lambda each: (each.last_modified, each.key)).data == wanted
    assert {each.data for each in lnd.written} == {each.data for each in objects.values()} - {
        before
    }
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == wanted


@pytest.mark.unmeasured
@pytest.mark.parametrize("days", [-730, 400], ids=["behind", "ahead"])
def test_a_clock_that_is_put_right_while_the_daemon_runs(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock, days: int
) -> None:
    """A daemon that captured under a wrong clock puts the version on disk again when the clock is
    right, and that is all.
    """
    clock.set(days * DAY)
    fake.set_default(Answer(503, "SlowDown"))
    with Daemon(fake_env | clock.settings | AT_ONCE) as daemon:
        version = lnd.write()
        daemon.wait_for_captured(version)
        daemon.wait_for_log("SlowDown")
        clock.set(0)
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
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock
) -> None:
    """After a receipt under a clock that ran ahead, names go on from there, also after a
    restart.
    """
    env = fake_env | clock.settings
    for days in (400, -730, 0):
        clock.set(days * DAY)
        lnd.write()
        assert run_script(env, "once").returncode == 0
        expect_last(fake, lnd.written[-1].data)


@pytest.mark.unmeasured
def test_a_receipt_from_the_future(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, clock: Clock
) -> None:
    """A receipt that a clock dated 400 days ahead proves nothing, neither to `check` nor to the
    daemon.
    """
    env = fake_env | clock.settings
    lnd.write()
    os.utime(lnd.path, (time.time() - 3600,) * 2)  # it would have been backed up by now
    clock.set(400 * DAY)
    assert run_script(env, "once").returncode == 0
    assert run_script(env, "check").returncode == 0
    clock.set(0)
    done = run_script(env, "check")
    assert done.returncode == 1
    assert not done.stdout.startswith("BACKED UP")
    assert json.loads(run_script(env, "check", "--json").stdout)["current"] is False
    assert run_script(env, "once").returncode == 0
    assert run_script(env, "check").returncode == 0
    assert len(fake.objects("some-bucket")) == 2
