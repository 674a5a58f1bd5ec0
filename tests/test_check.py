"""What `check` answers: is the version on disk now in the bucket, byte for byte, and how is that
known?
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from kit import (
    SCRIPT,
    Answer,
    FakeS3,
    Lnd,
    S3Server,
    allow,
    answers,
    hurried,
    reader_settings,
    run_script,
)
from shared import NOON, NOWHERE, done_well, ordinary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from functools import partial
    from pathlib import Path

    from shared import Env, Session

FIVE_HOURS = 5 * 3600
TEN_MINUTES = 600
VERDICTS = {0: True, 1: False, 75: None}
NO_OBJECT: dict[str, Any] = {"key": None, "captured_at": None, "stored_at": None}


@pytest.fixture
def key(s3: S3Server, bucket: str, env: Env, lnd: Lnd) -> str:
    """Store the version on disk, and return its key."""
    lnd.write()
    done_well(env)
    return max(s3.objects(bucket))


@pytest.fixture
def stored_node(fake_env: Env, lnd: Lnd, started_by: Callable[[str], None]) -> Env:
    """Return the settings of a node with little patience, whose version on disk is stored."""
    lnd.write()
    done_well(fake_env)
    started_by(hurried(20))
    return fake_env


def check(
    env: Env, code: int, *, command: Sequence[str] = (), **expected: object
) -> dict[str, Any]:
    """Run `check --json`, expect this exit code and these fields, and return all fields."""
    done = run_script(env, "check", "--json", command=command)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    fields: dict[str, Any] = json.loads(done.stdout)
    assert fields | expected | {"current": VERDICTS[code]} == fields
    return fields


def expect_verdict(env: Env, verdict: str, code: int) -> str:
    """Run `check`, expect one line with this verdict and a reason, and return all it says."""
    done = run_script(env, "check")
    assert "Traceback" not in done.stderr
    assert re.fullmatch(rf"{verdict}: .*\w+ \w+.*\n", done.stdout), done.stderr
    assert done.returncode == code, done.stdout
    return done.stdout + done.stderr


def age(lnd: Lnd, seconds: float) -> str:
    """Let the file be as old as that, and return since when it is there, to the minute."""
    since = time.time() - seconds
    os.utime(lnd.path, (since, since))
    return f"{datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M}"


def edit_receipt(staging: Path, **fields: object) -> None:
    """Change some of the last receipt's fields."""
    receipt = staging / ".receipt"
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | fields))


# --- By the bucket ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_stored(key: str, node_reader: Env) -> None:
    """When the bucket holds the version on disk it is exit 0, proved by the bucket."""
    answer = check(node_reader, 0, proof="bucket", key=key, staged=0)
    captured, stored = (
        datetime.fromisoformat(answer[field]) for field in ("captured_at", "stored_at")
    )
    assert (captured.utcoffset(), stored.utcoffset()) == (timedelta(0), timedelta(0))
    assert f"{captured:%Y%m%dT%H%M%S}" in key
    assert abs(stored - captured) < timedelta(minutes=1)


def test_a_newer_version_is_told(
    s3: S3Server, bucket: str, node_reader: Env, env: Env, lnd: Lnd, key: str
) -> None:
    """When the version on disk is stored, but is not the newest there, both are named."""
    lnd.write()
    done_well(env)
    assert "newer" not in check(node_reader, 0)["reason"]
    lnd.place(lnd.written[0].data)
    answer = check(node_reader, 0, key=key)
    assert f"{max(s3.objects(bucket))} is newer" in answer["reason"]


def test_one_damaged_copy_of_two(
    s3: S3Server, bucket: str, node_reader: Env, env: Env, key: str
) -> None:
    """Of several keys of a version, as restarts leave them, one that is whole is enough."""
    done_well(env)
    newest = max(s3.objects(bucket))
    s3.admin.put_object(Bucket=bucket, Key=newest, Body=bytes(718))
    check(node_reader, 0, key=key)
    s3.admin.put_object(Bucket=bucket, Key=key, Body=bytes(718))
    assert "damaged" in check(node_reader, 1, proof="bucket", key=newest)["reason"]


def test_a_receipt_does_not_outweigh_the_bucket(
    put: partial[str], s3: S3Server, bucket: str, node_reader: Env, lnd: Lnd, key: str
) -> None:
    """A deleted object is missed; the same bytes under another prefix do not count."""
    s3.admin.delete_object(Bucket=bucket, Key=key)
    put(NOON, lnd.written[0].data, prefix="alice/other/")
    check(node_reader, 1, proof="bucket", **NO_OBJECT)


# --- By the last receipt ---


def test_a_put_only_key(key: str, env: Env, lnd: Lnd) -> None:
    """The last receipt decides; a version without one is NOT BACKED UP after a long time, or if
    its time is to come.
    """
    answer = check(env, 0, proof="receipt", key=key, staged=0)
    assert "S3 confirmed it at" in answer["reason"]
    for field in ("captured_at", "stored_at"):
        assert datetime.fromisoformat(answer[field]).utcoffset() == timedelta(0)
    lnd.write()
    ahead = age(lnd, -FIVE_HOURS)
    assert ahead in check(env, 1, proof="receipt", key=key)["reason"]
    since = age(lnd, FIVE_HOURS)
    assert since in check(env, 1, proof="receipt", key=key)["reason"]


@pytest.mark.usefixtures("key")
def test_a_receipt_of_another_place_proves_nothing(env: Env, fake: FakeS3) -> None:
    """It counts for the store, the bucket and the prefix that are set now."""
    check(env, 0)
    for place in (
        {"S3_BACKUP_PREFIX": "another-one"},
        {"S3_BUCKET_NAME": "another-one"},
        {"AWS_ENDPOINT_URL_S3": f"http://localhost:{fake.port}"},
        {"AWS_ENDPOINT_URL_S3": fake.endpoint},
    ):
        check(env | place, 75, proof="receipt", key=None)


@pytest.mark.usefixtures("key")
def test_a_receipt_for_a_version_that_waited_long_proves_nothing(env: Env, staging: Path) -> None:
    """Such a version may not be the newest in the bucket: it is put again."""
    fields = json.loads((staging / ".receipt").read_text())
    name = "20260101T000000.000000Z" + fields["name"][-7:]
    edit_receipt(staging, name=name, key=fields["key"].replace(fields["name"], name))
    check(env, 75)


@pytest.mark.usefixtures("key")
def test_a_put_only_key_without_a_staging_directory(env: Env) -> None:
    """Without BACKUP_DIRECTORY there is no receipt, and that is what is told."""
    del env["BACKUP_DIRECTORY"]
    reason = check(env, 75, proof="receipt", staged=None)["reason"]
    assert "/dev/null" not in reason
    assert "BACKUP_DIRECTORY" in reason


def test_list_without_get(s3: S3Server, bucket: str, env: Env, lnd: Lnd, key: str) -> None:
    """With a key that may list but not get, the last receipt decides."""
    user = s3.user(allow("s3:ListBucket", bucket))
    lister = env | reader_settings(s3, bucket, "alice/", user)
    check(lister, 0, proof="receipt", key=key)
    lnd.write()
    check(lister, 1)  # as the list tells


def test_a_broken_receipt(env: Env, staging: Path, lnd: Lnd) -> None:
    """A receipt that is not there or cannot be read proves nothing, and is no traceback."""
    lnd.write()
    check(env, 75, key=None)
    (staging / ".receipt").write_bytes(b"rubbish")
    check(env, 75, key=None)
    age(lnd, FIVE_HOURS)
    check(env, 1, proof="receipt", key=None)


@pytest.mark.usefixtures("key")
def test_a_receipt_cannot_forge_lines(env: Env, staging: Path) -> None:
    """What a receipt holds is escaped before it is shown."""
    edit_receipt(staging, key="evil\x1b[31m\nstored")
    assert expect_verdict(env, "UNKNOWN", 75).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("proof", "code", "reason"),
    [("bucket", 0, "holds"), ("receipt", 75, "this user can read no receipt in BACKUP_DIRECTORY")],
)
@pytest.mark.usefixtures("key")
def test_a_staging_directory_of_somebody_else(
    env: Env, reader: Env, staging: Path, lnd: Lnd, proof: str, code: int, reason: str
) -> None:
    """The number staged is unknown, and so is the verdict where the receipt would decide."""
    if proof == "bucket":
        env |= reader
    age(lnd, FIVE_HOURS)
    staging.chmod(0)
    try:
        command = [*ordinary(), sys.executable, str(SCRIPT)]
        answer = check(env, code, command=command, proof=proof, staged=None)
    finally:
        staging.chmod(0o700)
    assert reason in answer["reason"]


# --- What is staged, and the daemon beside it ---


def test_staged_versions_are_counted(node_reader: Env, env: Env, staging: Path, lnd: Lnd) -> None:
    """Versions that still wait to be sent are counted, and files of others are not."""
    for _ in range(2):
        lnd.write()
        assert run_script(env | {"AWS_SECRET_ACCESS_KEY": "wrong"}, "once").returncode == 1
    (staging / "notes.txt").touch()
    check(node_reader, 1, staged=2)


def test_beside_the_daemon(backed_up: Session, node_reader: Env, env: Env, lnd: Lnd) -> None:
    """It takes no lock: it answers while the daemon runs, and the daemon goes on."""
    with backed_up() as daemon:
        check(node_reader, 0, proof="bucket")
        check(env, 0, proof="receipt")
        daemon.wait_for_stored(lnd.write())
        check(node_reader, 0)


@pytest.mark.usefixtures("key")
def test_nothing_is_written(
    node_reader: Env, env: Env, staging: Path, lnd: Lnd, home: Path
) -> None:
    """It writes nothing anywhere: not in LND's directory, not in staging, not in the home."""
    lnd.leave_decoys()
    places = [lnd, Lnd(staging), Lnd(home)]
    before = [place.fingerprint() for place in places]
    for settings in (node_reader, env, node_reader | {"AWS_ENDPOINT_URL_S3": NOWHERE}):
        run_script(settings, "check", cwd=home)
    assert [place.fingerprint() for place in places] == before


def test_a_staging_directory_is_not_made(node_reader: Env, staging: Path, lnd: Lnd) -> None:
    """Also where the bucket is empty; what the daemon needs to report is no matter."""
    staging.rmdir()
    lnd.write()
    check(node_reader | {"METRICS_FILE": "/nowhere/lnd.prom"}, 1, **NO_OBJECT)
    assert not staging.exists()


@pytest.mark.parametrize("content", [None, b"", b"short"])
@pytest.mark.usefixtures("key")
def test_no_version_on_disk(node_reader: Env, env: Env, lnd: Lnd, content: bytes | None) -> None:
    """Without a file that can be a backup it is exit 1, whatever bucket and receipt say."""
    lnd.path.unlink() if content is None else lnd.place(content)
    for settings in (node_reader, env):
        assert str(lnd.path) in expect_verdict(settings, "UNKNOWN", 1)


def test_a_secret_in_the_endpoint_is_masked(env: Env, lnd: Lnd) -> None:
    """Neither form of the verdict repeats the user of an endpoint's URL."""
    lnd.write()
    env["AWS_ENDPOINT_URL_S3"] = "http://somebody:some-secret@127.0.0.1:1"
    for options in ([], ["--json"]):
        done = run_script(env, "check", *options)
        assert "127.0.0.1:1" in done.stdout
        assert "some" not in done.stdout + done.stderr


# --- The verdict in words ---


def test_backed_up(key: str, node_reader: Env, lnd: Lnd) -> None:
    """A version that is not in the bucket is told with the newest that is there."""
    known = f"newest version, by the bucket: {key}"
    assert known in expect_verdict(node_reader, "BACKED UP", 0)
    lnd.write()
    check(node_reader, 1, proof="bucket", key=key)
    assert known in expect_verdict(node_reader, "NOT BACKED UP", 1)


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_verdict_that_nobody_reads(node_reader: Env, lnd: Lnd, options: str) -> None:
    """`check | true` keeps its exit code."""
    lnd.write()
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w") as unread:
        env = node_reader | {"PYTHONUNBUFFERED": "1"}
        done = run_script(env, "check", *options.split(), stdout=unread)
    assert done.returncode == 1, done.stderr
    assert not re.search("Traceback|BrokenPipe|fault of this program", done.stderr)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("answer", "code", "verdict", "seconds"),
    [
        (answers.SLOW_DOWN, 75, "UNKNOWN", TEN_MINUTES - 120),
        (answers.CLOCK_SKEW, 75, "UNKNOWN", 0),
        (replace(answers.PORTAL, status=403), 75, "UNKNOWN", 0),
        (answers.DROPPED, 75, "UNKNOWN", 0),
        (answers.NO_SUCH_BUCKET, 1, "UNKNOWN", 0),
        (answers.UNKNOWN_KEY, 1, "UNKNOWN", 0),
        (Answer(403, "AllAccessDisabled"), 1, "UNKNOWN", 0),
        (answers.SLOW_DOWN, 1, "NOT BACKED UP", TEN_MINUTES + 60),
        (answers.UNKNOWN_KEY, 1, "NOT BACKED UP", TEN_MINUTES + 60),
    ],
)
def test_s3_cannot_be_asked(
    fake: FakeS3, stored_node: Env, lnd: Lnd, answer: Answer, code: int, verdict: str, seconds: int
) -> None:
    """UNKNOWN, unless the version has waited for ten minutes by the receipt alone."""
    lnd.write()
    age(lnd, seconds)
    fake.set_default(answer, "GET")
    assert "hint: " in expect_verdict(stored_node, verdict, code)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("asked", "verdict", "code"),
    [(answers.ACCESS_DENIED, "BACKED UP", 0), (answers.SLOW_DOWN, "UNKNOWN", 75)],
    ids=["denied", "slow"],
)
def test_nothing_was_stored_for_twice_the_refresh(
    fake: FakeS3, stored_node: Env, staging: Path, asked: Answer, verdict: str, code: int
) -> None:
    """The receipt for the version on disk is that old; without a refresh it never is."""
    fake.set_default(asked, "GET")
    edit_receipt(staging, stored_at="2026-01-01T00:00:00+00:00")
    assert "2026-01-01" in expect_verdict(stored_node, "NOT BACKED UP", 1)
    expect_verdict(stored_node | {"REFRESH_SECONDS": "0"}, verdict, code)


def test_no_credentials_to_check_with(stored_node: Env, lnd: Lnd) -> None:
    """Without any credentials S3 cannot be asked, and trying again does not help. The receipt is
    enough to say that a version has waited for too long.
    """
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    expect_verdict(stored_node | none, "UNKNOWN", 1)
    lnd.write()
    age(lnd, TEN_MINUTES + 60)
    assert "newest version, by the receipt: " in expect_verdict(
        stored_node | none, "NOT BACKED UP", 1
    )
