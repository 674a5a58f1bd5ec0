"""`once`: what it sends, what it says, how long it tries, and its exit code."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from kit import Answer, Daemon, RawS3, answers, channel_backup, hurried, run_script, version_name
from shared import AWAY, LARGEST, NOON, SELDOM, TRY_AGAIN, changing, done_well, staged, staged_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from functools import partial
    from pathlib import Path

    from kit import FakeS3, Lnd, Request
    from shared import Env, Session, StartedBy

HURRY = 10
A_MINUTE = 60 / HURRY


@pytest.mark.unmeasured
@pytest.mark.parametrize("size", [None, 0, 44, LARGEST + 1])
def test_once_without_a_backup_sends_what_is_staged_and_fails(
    size: int | None, fake: FakeS3, fake_env: Env, lnd: Lnd, staging: Path
) -> None:
    data = channel_backup(2)
    name = version_name(data, NOON)
    (staging / name).write_bytes(data)
    if size is not None:
        lnd.place(b"")
        os.truncate(lnd.path, size)
    before = lnd.fingerprint()
    done = run_script(fake_env, "once")
    assert done.returncode == 1
    assert f"cannot read channel.backup: {lnd.path}" in done.stderr
    assert staged(staging) == []
    (request,) = fake.requests
    assert (request.path, request.body) == (f"/some-bucket/alice/{name}", data)
    assert lnd.fingerprint() == before


@pytest.mark.unmeasured
def test_once_without_a_backup_fails_also_if_s3_is_away(
    fake: FakeS3, fake_env: Env, staging: Path, started_by: StartedBy
) -> None:
    """Trying again will not help; the staged version stays."""
    started_by(hurried(HURRY))
    data = channel_backup(2)
    (staging / version_name(data, NOON)).write_bytes(data)
    fake.set_default(answers.SLOW_DOWN)
    assert run_script(fake_env, "once").returncode == 1
    assert len(staged(staging)) == 1


# --- What is sent ---


def test_once_stores_the_version_and_what_was_staged(
    env: Env, lnd: Lnd, check: partial[None], staging: Path, prefix: str
) -> None:
    """The version on disk is put last; `once` names the keys in the log and prints nothing."""
    lnd.write()
    with Daemon(SELDOM | env | AWAY) as daemon:
        daemon.wait_for_log("cannot store")
        assert daemon.stop() == 0
    names = staged(staging)
    newest = lnd.write()
    done = done_well(env)
    keys = re.findall(rf"stored s3://\S+/{prefix}(\S+-[0-9a-f]{{6}})", done.stderr)
    assert (len(keys), done.stdout) == (3, "")
    assert keys[1:] == [names[0], max(keys)]
    assert not re.search("(?i)watching|next start", done.stderr)
    assert {keys[0][-6:], keys[2][-6:]} == {newest.sha256[-6:]}
    assert "stored s3://" in done_well(env).stderr, "an unchanged file is put again"
    check(refreshes=2)


@pytest.mark.parametrize("command", ["run", "once"])
def test_a_second_copy_does_not_start(
    env: Env, lnd: Lnd, backed_up: Session, staging: Path, command: str
) -> None:
    """It leaves alone what is being written, and the first one goes on."""
    partial = staging / f".{version_name(b'', NOON)}.partial"
    with backed_up() as daemon:
        partial.touch()
        done = run_script(env, command)
        assert done.returncode == TRY_AGAIN
        assert done.stdout == ""
        assert f"{staging}: another copy holds it" in done.stderr
        partial.unlink()
        daemon.wait_for_stored(lnd.write())


# --- How it ends ---


EXITS = {
    "bucket": (answers.NO_SUCH_BUCKET, 1, "NoSuchBucket"),
    "clock": (answers.CLOCK_SKEW, 75, "clock"),
    "key": (answers.UNKNOWN_KEY, 1, "InvalidAccessKeyId"),
    "expired": (answers.EXPIRED_TOKEN, 1, "ExpiredToken"),
    "denied": (answers.ACCESS_DENIED, 1, "s3:PutObject"),
    "slow-down": (answers.SLOW_DOWN, 75, "SlowDown"),
    "portal": (answers.PORTAL, 75, "portal"),
    "dropped": (answers.DROPPED, 75, "closed"),
    "odd": (Answer(400, body=answers.error("Odd", "odd words"), etag=False), 1, "odd words"),
}


@pytest.mark.parametrize(("answer", "exit_code", "words"), EXITS.values(), ids=EXITS)
def test_exit_codes_of_once(
    fake: FakeS3,
    fake_env: Env,
    lnd: Lnd,
    staging: Path,
    started_by: StartedBy,
    answer: Answer,
    exit_code: int,
    words: str,
) -> None:
    """It says why, once, and keeps the version staged."""
    if exit_code == TRY_AGAIN:
        started_by(hurried(HURRY))
    version = lnd.write()
    fake.set_default(answer)
    done = run_script(fake_env, "once")
    assert done.returncode == exit_code
    assert words in done.stderr
    assert done.stderr.count("cannot store") == 1
    assert not answer.code or done.stderr.count(answer.code) == 1
    assert (len(fake.requests) > 1) == (exit_code == TRY_AGAIN)
    assert staged_data(staging) == [version.data]


def test_once_ends_within_a_minute(fake_env: Env, lnd: Lnd, staging: Path) -> None:
    # Takes some 40 s: the one test with the real limits, both cases at the same time.
    version = lnd.write()
    with socket.socket() as refusing, socket.socket() as silent:
        for listener in (refusing, silent):
            listener.bind(("127.0.0.1", 0))
        silent.listen()

        def run(listener: socket.socket) -> tuple[int, float]:
            began = time.monotonic()
            host, port = listener.getsockname()
            at = {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}
            done = run_script(fake_env | at | {"BACKUP_DIRECTORY": f"{staging}-{port}"}, "once")
            return done.returncode, time.monotonic() - began

        with ThreadPoolExecutor() as pool:
            results = list(pool.map(run, (refusing, silent)))
    assert [code for code, _ in results] == [75, 75]
    assert max(seconds for _, seconds in results) < 60
    assert [staged_data(own) for own in staging.parent.glob("staging-*")] == [[version.data]] * 2


@pytest.mark.unmeasured
@pytest.mark.parametrize(("times", "code"), [(1, 0), (1_000_000, 75)], ids=["rests", "never"])
def test_once_while_the_file_changes(
    fake: FakeS3, written_env: Env, started_by: StartedBy, tmp_path: Path, times: int, code: int
) -> None:
    """A file that changes while it is read is read again, within the minute."""
    (tmp_path / "changes").write_bytes(bytes(times))
    started_by(changing(tmp_path / "changes") + hurried(HURRY))
    done = run_script(written_env, "once")
    assert done.returncode == code, done.stderr
    assert "it changed while it was read" in done.stderr
    assert len(fake.requests) == (code == 0)


# --- How long it goes on ---


def taking(seconds: float) -> Callable[[Request], Iterator[bytes | float]]:
    """Return what answers each put well, after so long."""

    def reply(_: Request) -> Iterator[bytes | float]:
        yield seconds
        yield from answers.framed([], headers={"ETag": '"x"'})

    return reply


@pytest.mark.unmeasured
def test_once_while_the_file_is_written_all_the_time(
    fake_env: Env, lnd: Lnd, started_by: StartedBy
) -> None:
    """It ends within a minute, though no put is as fast as the writer."""
    started_by(hurried(HURRY))
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(0.05):
            lnd.write(1)

    lnd.write(1)
    writing = threading.Thread(target=write)
    writing.start()
    try:
        with RawS3(taking(0.2)) as raw:
            done = run_script(fake_env | {"AWS_ENDPOINT_URL_S3": raw.endpoint}, "once", timeout=20)
            assert time.monotonic() - raw.asked_at < A_MINUTE + 2
    finally:
        ended.set()
        writing.join()
    assert done.returncode in (0, 75), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.unmeasured
def test_once_sends_a_backlog_however_long_it_takes(
    fake_env: Env, staging: Path, started_by: StartedBy
) -> None:
    """While S3 acknowledges one after another, `once` goes on beyond its minute."""
    started_by(hurried(4 * HURRY))
    left = [channel_backup(1) for _ in range(25)]
    for minute, data in enumerate(left):
        (staging / version_name(data, NOON + timedelta(minutes=minute))).write_bytes(data)
    with RawS3(taking(0.1)) as raw:
        done = run_script(fake_env | {"AWS_ENDPOINT_URL_S3": raw.endpoint}, "once")
        assert time.monotonic() - raw.asked_at > A_MINUTE / 4
    assert {request.body for request in raw.requests} == set(left)
    assert "waiting, and not sent" not in done.stderr
