"""What `check` answers: is the version on disk now in the bucket, byte for byte, and how is that
known?
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from kit import (
    SCRIPT,
    Answer,
    Credentials,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    allow,
    hurried,
    reader_settings,
    run_script,
)
from kit.answers import ACCESS_DENIED, HTML
from shared import NOWHERE

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

FIELDS = {"current", "proof", "key", "captured_at", "stored_at", "staged", "reason"}
FIVE_HOURS = 5 * 3600
VERDICTS = {0: True, 1: False, 75: None}


def with_key(env: dict[str, str], user: Credentials) -> dict[str, str]:
    """Return the settings with another access key."""
    return env | {"AWS_ACCESS_KEY_ID": user.access_key, "AWS_SECRET_ACCESS_KEY": user.secret_key}


@pytest.fixture
def node_reader(s3: S3Server, bucket: str, env: dict[str, str]) -> dict[str, str]:
    """Return the settings with a key that may list and get."""
    return with_key(env, s3.reader_user(bucket))


@dataclass(frozen=True)
class Verdict:
    """What `check --json` printed, and its exit code."""

    code: int
    fields: dict[str, Any]
    stderr: str

    @property
    def reason(self) -> str:
        """Return the reason in words."""
        return str(self.fields["reason"])


def check(env: dict[str, str]) -> Verdict:
    """Run `check --json`, expect all its fields, and an exit code that agrees with them: 75 where
    it is too early for a verdict, or where S3 could not be asked.
    """
    done = run_script(env, "check", "--json")
    assert "Traceback" not in done.stderr
    assert done.returncode in VERDICTS, done.stderr
    fields: dict[str, Any] = json.loads(done.stdout)
    assert fields.keys() >= FIELDS
    assert fields["current"] is VERDICTS[done.returncode]
    return Verdict(done.returncode, fields, done.stderr)


def line(env: dict[str, str], code: int) -> str:
    """Run `check` as people do, and return its one line."""
    done = run_script(env, "check")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (only,) = done.stdout.splitlines()
    return only


def back_up(env: dict[str, str]) -> None:
    """Let the program store the version on disk."""
    assert run_script(env, "once", measured=False).returncode == 0


def age(lnd: Lnd, seconds: float) -> None:
    """Let the file be as old as that."""
    os.utime(lnd.path, (time.time() - seconds, time.time() - seconds))


def edit_receipt(staging: Path, **fields: object) -> None:
    """Change some of the last receipt's fields."""
    receipt = staging / ".receipt"
    receipt.write_text(json.dumps(json.loads(receipt.read_text()) | fields))


def newest_key(server: S3Server, bucket: str) -> str:
    """Return the newest key."""
    return max(server.objects(bucket))


EMPTY_LIST = (
    b'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Name>some-bucket</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
)
TEN_MINUTES = 600
PAGE = Answer(403, headers={"Content-Type": "text/html"}, body=HTML, etag=False)


# --- By the bucket ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_stored(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """When the bucket holds the version on disk it is exit 0, proved by the bucket."""
    lnd.write()
    back_up(env)
    answer, key = check(node_reader), newest_key(s3, bucket)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (0, "bucket", key)
    assert answer.fields["staged"] == 0
    captured, stored = (
        datetime.fromisoformat(answer.fields[field]) for field in ("captured_at", "stored_at")
    )
    assert (captured.utcoffset(), stored.utcoffset()) == (timedelta(0), timedelta(0))
    assert f"{captured:%Y%m%dT%H%M%S}" in key
    assert abs(stored - captured) < timedelta(minutes=1)
    only = line(node_reader, 0)
    assert key in only
    assert "bucket" in only


def test_a_version_put_again_is_stored(
    node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """A version that lies under several keys, as after restarts, is stored."""
    lnd.write()
    back_up(env)
    back_up(env)
    assert check(node_reader).code == 0


def test_a_newer_version_is_told(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """When the version on disk is stored, but is not the newest there, it is exit 0, naming
    both.
    """
    first = lnd.write()
    back_up(env)
    key = newest_key(s3, bucket)
    lnd.write()
    back_up(env)
    newer = newest_key(s3, bucket)
    assert "newer" not in check(node_reader).reason
    lnd.place(first.data)
    answer = check(node_reader)
    assert (answer.code, answer.fields["key"]) == (0, key)
    assert f"{newer} is newer" in answer.reason
    only = line(node_reader, 0)
    assert key in only
    assert f"{newer} is newer" in only


def test_lnd_has_written_since(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """A version written a moment ago that is not in the bucket is told as that, with the newest
    that is there.
    """
    lnd.write()
    back_up(env)
    lnd.write()
    answer = check(node_reader)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (
        1,
        "bucket",
        newest_key(s3, bucket),
    )
    assert newest_key(s3, bucket) in line(node_reader, 1)


def test_a_file_from_the_future(node_reader: dict[str, str], lnd: Lnd) -> None:
    """A file whose time is ahead, as after a clock was set back, is reported without a negative
    age.
    """
    lnd.write()
    age(lnd, -FIVE_HOURS)
    answer = check(node_reader)
    assert answer.code == 1
    assert "-" not in answer.reason


def test_an_empty_bucket(node_reader: dict[str, str], lnd: Lnd) -> None:
    """With nothing in the bucket it is exit 1, and the fields that need an object are null."""
    lnd.write()
    age(lnd, FIVE_HOURS)
    answer = check(node_reader)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (1, "bucket", None)
    assert (answer.fields["captured_at"], answer.fields["stored_at"]) == (None, None)


@pytest.mark.parametrize("damage", ["bytes", "metadata", "truncated"])
def test_a_damaged_object(
    s3: S3Server,
    bucket: str,
    node_reader: dict[str, str],
    env: dict[str, str],
    lnd: Lnd,
    damage: str,
) -> None:
    """An object that does not hold the bytes of its name, or bears other metadata, is told as
    damaged.
    """
    data = lnd.write().data
    back_up(env)
    key = newest_key(s3, bucket)
    digest = hashlib.sha256(b"" if damage == "metadata" else data).hexdigest()
    body = {"bytes": bytes([data[0] ^ 1]) + data[1:], "metadata": data, "truncated": data[:-1]}[
        damage
    ]
    s3.admin.put_object(Bucket=bucket, Key=key, Body=body, Metadata={"sha256": digest})
    answer = check(node_reader)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (1, "bucket", key)
    assert "damaged" in answer.reason
    assert "damaged" in line(node_reader, 1)


def test_a_receipt_does_not_outweigh_the_bucket(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """An object that was deleted after its receipt is missed where the key may look."""
    lnd.write()
    back_up(env)
    s3.admin.delete_object(Bucket=bucket, Key=newest_key(s3, bucket))
    answer = check(node_reader)
    assert (answer.code, answer.fields["proof"]) == (1, "bucket")


def test_a_secret_in_the_endpoint_is_masked(env: dict[str, str], lnd: Lnd) -> None:
    """Neither form of the verdict repeats the user of an endpoint's URL."""
    lnd.write()
    env["AWS_ENDPOINT_URL_S3"] = "http://somebody:some-secret@127.0.0.1:1"
    for options in ([], ["--json"]):
        done = run_script(env, "check", *options)
        assert "127.0.0.1:1" in done.stdout
        assert "some" not in done.stdout
        assert "some" not in done.stderr


def test_one_damaged_copy_of_two(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """The bucket holds the version when one of two keys does."""
    lnd.write()
    back_up(env)
    back_up(env)
    s3.admin.put_object(
        Bucket=bucket, Key=newest_key(s3, bucket), Body=b"damaged", Metadata={"sha256": "0" * 64}
    )
    assert check(node_reader).code == 0


def test_other_nodes_do_not_count(
    s3: S3Server, bucket: str, node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """The same bytes under another prefix are no backup of this node's."""
    lnd.write()
    back_up(env | with_key(env, s3.read_write_user(bucket)) | {"S3_BACKUP_PREFIX": "alice/other/"})
    answer = check(node_reader)
    assert (answer.code, answer.fields["key"]) == (1, None)


# --- By the last receipt ---


def test_a_put_only_key(s3: S3Server, bucket: str, env: dict[str, str], lnd: Lnd) -> None:
    """With a key that may only put, the last receipt decides, and the answer says so; a version
    without one is NOT BACKED UP only when it has been waiting for long, and since when is told.
    """
    lnd.write()
    back_up(env)
    key = newest_key(s3, bucket)
    answer = check(env)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (0, "receipt", key)
    assert answer.fields["staged"] == 0
    for field in ("captured_at", "stored_at"):
        assert datetime.fromisoformat(answer.fields[field]).utcoffset() == timedelta(0)
    assert "S3 confirmed it at" in line(env, 0)
    lnd.write()
    answer = check(env)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (75, "receipt", key)
    age(lnd, FIVE_HOURS)
    answer = check(env)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (1, "receipt", key)
    assert (
        f"{datetime.fromtimestamp(lnd.path.stat().st_mtime, UTC):%Y-%m-%d %H:%M}" in answer.reason
    )


@pytest.mark.parametrize("other", ["S3_BACKUP_PREFIX", "S3_BUCKET_NAME", "host", "port"])
def test_a_receipt_of_another_place_proves_nothing(
    env: dict[str, str], lnd: Lnd, fake: FakeS3, other: str
) -> None:
    """A receipt counts for the store, the bucket and the prefix that are set now, and for no
    other: another store may answer at another port.
    """
    lnd.write()
    back_up(env)
    assert check(env).code == 0
    place = {
        "host": {"AWS_ENDPOINT_URL_S3": f"http://localhost:{fake.port}"},
        "port": {"AWS_ENDPOINT_URL_S3": fake.endpoint},
    }.get(other, {other: "another-one"})
    answer = check(env | place)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (75, "receipt", None)


def test_a_receipt_for_a_version_that_waited_long_proves_nothing(
    env: dict[str, str], lnd: Lnd, staging: Path
) -> None:
    """A put that began long after the time in the name does not prove that the version is the
    newest there: it is put again.
    """
    lnd.write()
    back_up(env)
    fields = json.loads((staging / ".receipt").read_text())
    name = "20260101T000000.000000Z" + fields["name"][-7:]
    edit_receipt(staging, name=name, key=fields["key"].replace(fields["name"], name))
    assert check(env).code == 75


def test_a_put_only_key_without_a_receipt(env: dict[str, str], lnd: Lnd) -> None:
    """With a key that may only put and no receipt it is exit 1, and not the bucket's fault."""
    lnd.write()
    age(lnd, FIVE_HOURS)
    answer = check(env)
    assert (answer.code, answer.fields["proof"], answer.fields["key"]) == (1, "receipt", None)


def test_a_put_only_key_without_a_staging_directory(env: dict[str, str], lnd: Lnd) -> None:
    """Without BACKUP_DIRECTORY there is no receipt to judge by: UNKNOWN, saying what is missing,
    not a made-up path.
    """
    lnd.write()
    back_up(env)
    del env["BACKUP_DIRECTORY"]
    answer = check(env)
    assert (answer.code, answer.fields["proof"], answer.fields["staged"]) == (75, "receipt", None)
    seen = answer.stderr + answer.reason + line(env, 75)
    assert "/dev/null" not in seen
    assert "BACKUP_DIRECTORY" in seen


def test_list_without_get(s3: S3Server, bucket: str, env: dict[str, str], lnd: Lnd) -> None:
    """With a key that may list but not get, the last receipt decides."""
    lister = with_key(env, s3.user(allow("s3:ListBucket", bucket)))
    lnd.write()
    back_up(env)
    answer = check(lister)
    assert (answer.code, answer.fields["proof"]) == (0, "receipt")
    assert answer.fields["key"] == newest_key(s3, bucket)
    lnd.write()
    assert check(lister).code == 1  # as the list tells


def test_get_without_list(s3: S3Server, bucket: str, env: dict[str, str], lnd: Lnd) -> None:
    """With a key that may get but not list, the last receipt decides."""
    getter = with_key(env, s3.user(allow("s3:GetObject", f"{bucket}/*")))
    lnd.write()
    back_up(env)
    assert check(getter).fields["proof"] == "receipt"


@pytest.mark.parametrize("content", [b"", b"rubbish", b'{"name": 1}', b"[" * 100_000, b"\xff"])
def test_a_broken_receipt(env: dict[str, str], staging: Path, lnd: Lnd, content: bytes) -> None:
    """A receipt that cannot be read proves nothing, and is no traceback."""
    lnd.write()
    (staging / ".receipt").write_bytes(content)
    answer = check(env)
    assert (answer.code, answer.fields["key"]) == (75, None)


@pytest.mark.parametrize("field", ["stored_at", "sha256", "key"])
def test_a_receipt_with_a_wrong_field(
    env: dict[str, str], staging: Path, lnd: Lnd, field: str
) -> None:
    """A receipt of which one field is wrong is no traceback."""
    lnd.write()
    back_up(env)
    edit_receipt(staging, **{field: 7})
    check(env)


def test_a_staging_directory_of_somebody_else(
    node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """A staging directory that may not be read does not stop the check: the number staged is
    unknown.
    """
    lnd.write()
    back_up(env)
    ordinary = (
        ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    )
    os.chmod(env["BACKUP_DIRECTORY"], 0)
    try:
        command = [*ordinary, sys.executable, str(SCRIPT)]
        done = run_script(node_reader, "check", "--json", command=command)
    finally:
        os.chmod(env["BACKUP_DIRECTORY"], 0o700)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["staged"] is None


# --- What is staged, and the daemon beside it ---


def test_staged_versions_are_counted(
    node_reader: dict[str, str], env: dict[str, str], staging: Path, lnd: Lnd
) -> None:
    """Versions that still wait to be sent are counted, and files of others are not."""
    lnd.write()
    assert run_script(env | {"AWS_SECRET_ACCESS_KEY": "wrong"}, "once").returncode == 1
    lnd.write()
    assert run_script(env | {"AWS_SECRET_ACCESS_KEY": "wrong"}, "once").returncode == 1
    (staging / "notes.txt").touch()
    answer = check(node_reader)
    assert (answer.code, answer.fields["staged"]) == (1, 2)


def test_beside_the_daemon(node_reader: dict[str, str], env: dict[str, str], lnd: Lnd) -> None:
    """It takes no lock: it answers while the daemon runs, and the daemon goes on."""
    lnd.write()
    with Script(env) as daemon:
        daemon.wait_for_log("stored s3://")
        assert check(node_reader).code == 0
        assert check(env).fields["proof"] == "receipt"
        lnd.write()
        daemon.wait_for_log("stored s3://", count=2)
        assert check(node_reader).code == 0
        assert check(env).code == 0
        assert daemon.stop() == 0


def test_nothing_is_written(
    node_reader: dict[str, str], env: dict[str, str], staging: Path, lnd: Lnd, tmp_path: Path
) -> None:
    """It writes nothing anywhere: not in LND's directory, not in staging, not in the home."""
    lnd.leave_decoys()
    lnd.write()
    back_up(env)
    home = tmp_path / "home"
    home.mkdir()
    places = [lnd, Lnd(staging), Lnd(home)]
    before = [place.fingerprint() for place in places]
    for settings in (node_reader, env, node_reader | {"AWS_ENDPOINT_URL_S3": NOWHERE}):
        run_script(settings, "check", cwd=home)
    assert [place.fingerprint() for place in places] == before


def test_a_staging_directory_is_not_made(
    node_reader: dict[str, str], staging: Path, lnd: Lnd
) -> None:
    """A staging directory that is not there stays so."""
    staging.rmdir()
    lnd.write()
    assert check(node_reader).code == 1
    assert not staging.exists()


# --- What keeps it from an answer ---


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["line", "json"])
def test_an_answer_that_cannot_be_printed(
    node_reader: dict[str, str], env: dict[str, str], lnd: Lnd, options: tuple[str]
) -> None:
    """When stdout takes nothing it is exit 1 and one line, though the version is stored: nobody was
    told.
    """
    lnd.write()
    back_up(env)
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run_script(node_reader, "check", *options, stdout=full)
    assert done.returncode == 1
    assert len(re.findall("error: (?!hint)", done.stderr)) == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [{"S3_BUCKET_NAME": ""}, {"MONITOR_FILE_PATH": ""}, {"MONITOR_FILE_PATH": "/x/wallet.db"}],
    ids=["bucket", "file", "forbidden"],
)
def test_wrong_configuration(node_reader: dict[str, str], lnd: Lnd, wrong: dict[str, str]) -> None:
    """A wrong configuration is exit 78, with the variable."""
    lnd.write()
    done = run_script(node_reader | wrong, "check")
    assert (done.returncode, done.stdout) == (78, "")
    assert next(iter(wrong)) in done.stderr


def test_what_reporting_needs_is_not_checked(
    node_reader: dict[str, str], env: dict[str, str], lnd: Lnd
) -> None:
    """It reports to nobody, so that where and how the daemon does is no matter, as to another
    user.
    """
    lnd.write()
    back_up(env)
    assert check(node_reader | {"METRICS_FILE": "/nowhere/lnd.prom"}).code == 0


def test_a_wrong_key(env: dict[str, str], lnd: Lnd) -> None:
    """A key that S3 does not know is exit 1, and no matter of receipts."""
    lnd.write()
    back_up(env)
    done = run_script(env | {"AWS_SECRET_ACCESS_KEY": "wr0ng-s3cr3t"}, "check")
    assert (done.returncode, done.stdout.split()[0].strip(":")) == (1, "UNKNOWN")
    assert "access_key" in done.stderr.lower().replace(" ", "_")
    assert "wr0ng-s3cr3t" not in done.stderr


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_no_version_on_disk(
    node_reader: dict[str, str], env: dict[str, str], lnd: Lnd, content: bytes | None
) -> None:
    """Without a file that can be a channel backup nothing is backed up: exit 1, with the path,
    whatever the bucket or the receipt say.
    """
    lnd.write()
    back_up(env)
    lnd.path.unlink() if content is None else lnd.place(content)
    for settings in (node_reader, env):
        done = run_script(settings, "check")
        assert done.returncode == 1
        assert not done.stdout.startswith("BACKED UP")
        assert str(lnd.path) in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_names_are_escaped(node_reader: dict[str, str], lnd: Lnd, tmp_path: Path) -> None:
    """A path with control characters is escaped before it is shown."""
    lnd.write()
    done = run_script(node_reader | {"MONITOR_FILE_PATH": str(tmp_path / "a\x1b[31mb")}, "check")
    assert all(
        character.isprintable() for character in done.stdout + done.stderr if character != "\n"
    )


def test_a_receipt_cannot_forge_lines(env: dict[str, str], staging: Path, lnd: Lnd) -> None:
    """What a receipt holds is escaped before it is shown."""
    lnd.write()
    back_up(env)
    edit_receipt(staging, key="evil\x1b[31m\nstored")
    assert line(env, 75).isprintable()


def test_a_store_that_does_not_keep_what_it_acknowledged_is_found_out(
    bare_env: dict[str, str], staging: Path
) -> None:
    """A 200 for what was not kept passes for a receipt; `check` with a key that may read tells the
    truth.
    """
    with FakeS3(defaults={"GET": Answer(body=EMPTY_LIST)}) as forgetful:
        env = bare_env | {"AWS_ENDPOINT_URL_S3": forgetful.endpoint}
        assert run_script(env, "once").returncode == 0
        assert list(staging.glob("2*")) == []
        done = run_script(env, "check", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert (told["current"], told["proof"]) == (False, "bucket")


# --- The verdict in words ---


def expect_verdict(
    env: dict[str, str], verdict: str, code: int
) -> subprocess.CompletedProcess[str]:
    """Run `check`, and expect its first words, a reason behind them, and this exit code."""
    done = run_script(env, "check")
    assert "Traceback" not in done.stderr
    assert re.match(rf"{verdict}\b.*\w+ \w+", done.stdout.replace("\n", " ")), (
        f"{done.stdout}\n{done.stderr}"
    )
    assert done.returncode == code, done.stdout
    return done


@pytest.fixture
def stored_node(fake_env: dict[str, str], lnd: Lnd) -> dict[str, str]:
    """Return the settings of a node, with a put-only key, whose version on disk is stored."""
    lnd.write()
    back_up(fake_env)
    return fake_env


@pytest.mark.unmeasured
@pytest.mark.parametrize("proof", ["bucket", "receipt"])
def test_backed_up(
    s3: S3Server, bucket: str, prefix: str, env: dict[str, str], lnd: Lnd, proof: str
) -> None:
    """The version on disk is in the bucket, by its bytes or by the last receipt: BACKED UP, and a
    version that is not: NOT BACKED UP.
    """
    lnd.write()
    assert run_script(env, "once").returncode == 0
    if proof == "bucket":
        env |= reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = expect_verdict(env, "BACKED UP", 0)
    assert len(done.stdout.splitlines()) < 5
    assert json.loads(run_script(env, "check", "--json").stdout)["proof"] == proof
    lnd.write()
    age(lnd, TEN_MINUTES + 60)
    expect_verdict(env, "NOT BACKED UP", 1)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("answer", "code", "seconds"),
    [
        (Answer(503, "SlowDown"), 75, 0),
        (Answer(403, "RequestTimeTooSkewed"), 75, 0),
        (PAGE, 75, 0),
        (Answer(drop=True), 75, 0),
        (Answer(404, "NoSuchBucket"), 1, 0),
        (Answer(403, "InvalidAccessKeyId"), 1, 0),
        (Answer(403, "AllAccessDisabled"), 1, 0),
        (Answer(503, "SlowDown"), 1, TEN_MINUTES + 60),
        (Answer(403, "InvalidAccessKeyId"), 1, TEN_MINUTES + 60),
    ],
)
def test_s3_cannot_be_asked(
    fake: FakeS3,
    stored_node: dict[str, str],
    lnd: Lnd,
    started_by: Callable[[str], None],
    answer: Answer,
    code: int,
    seconds: int,
) -> None:
    """If S3 cannot be asked the verdict is UNKNOWN, unless the receipt alone tells that the version
    on disk has been waiting for more than ten minutes.
    """
    started_by(hurried(20))
    lnd.write()
    age(lnd, seconds)
    fake.set_default(answer, "GET")
    if seconds > TEN_MINUTES:
        expect_verdict(stored_node, "NOT BACKED UP", 1)
    else:
        done = expect_verdict(stored_node, "UNKNOWN", code)
        assert "hint: " in done.stderr


@pytest.mark.unmeasured
def test_s3_is_out_of_reach(stored_node: dict[str, str], lnd: Lnd) -> None:
    """When nobody listens it is UNKNOWN, also if the last receipt is for the version on disk; a
    version that has waited for long is NOT BACKED UP.
    """
    away = stored_node | {"AWS_ENDPOINT_URL_S3": NOWHERE}
    expect_verdict(away, "UNKNOWN", 75)
    assert check(away).code == 75
    lnd.write()
    age(lnd, TEN_MINUTES - 120)
    expect_verdict(away, "UNKNOWN", 75)
    age(lnd, TEN_MINUTES + 60)
    expect_verdict(away, "NOT BACKED UP", 1)


@pytest.mark.unmeasured
@pytest.mark.parametrize("asked", ["denied", "slow"])
def test_nothing_was_stored_for_twice_the_refresh(
    fake: FakeS3,
    stored_node: dict[str, str],
    staging: Path,
    started_by: Callable[[str], None],
    asked: str,
) -> None:
    """A receipt for the version on disk that is older than twice REFRESH_SECONDS says that nothing
    is stored any more; without a refresh it never does.
    """
    started_by(hurried(20))
    fake.set_default(ACCESS_DENIED if asked == "denied" else Answer(503, "SlowDown"), "GET")
    edit_receipt(staging, stored_at="2026-01-01T00:00:00+00:00")
    assert "2026-01-01" in expect_verdict(stored_node, "NOT BACKED UP", 1).stdout
    never = stored_node | {"REFRESH_SECONDS": "0"}
    if asked == "denied":
        expect_verdict(never, "BACKED UP", 0)
    else:
        expect_verdict(never, "UNKNOWN", 75)


@pytest.mark.unmeasured
def test_no_credentials_to_check_with(stored_node: dict[str, str]) -> None:
    """Without any credentials S3 cannot be asked, and trying again does not help."""
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    expect_verdict(stored_node | none, "UNKNOWN", 1)
