"""What `list` shows: what is in the bucket, newest first, and what deserves a look."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from kit import (
    SCRIPT,
    FakeS3,
    Lnd,
    RawS3,
    S3Server,
    Script,
    answers,
    channel_backup,
    reader_settings,
    run_on_terminal,
    run_script,
    version_name,
)
from kit.answers import entry, framed, listing
from shared import HOUR, NOON, NOWHERE, done_well, listed, refused, restore, restored_bytes

if TYPE_CHECKING:
    from functools import partial
    from pathlib import Path

    from shared import Env

DATA = channel_backup(10)
SECOND = timedelta(seconds=1)


def keys(env: Env) -> list[str]:
    """Return the keys of the versions as they are listed."""
    return [row["key"] for row in listed(env)]


def plain(env: Env) -> list[str]:
    """Return the rows of the table that `list` prints into a pipe."""
    return done_well(env, "list").stdout.splitlines()[1:]


# --- Order and marks ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_newest_first(put: partial[str], reader: Env) -> None:
    """Versions are listed newest first, whatever the order in which they were stored."""
    stored = [put(NOON + HOUR * hours, DATA) for hours in (1, 3, 0, 2)]
    assert keys(reader) == sorted(stored, reverse=True)


def test_a_year_ahead_is_not_the_newest(put: partial[str], reader: Env, home: Path) -> None:
    """Named by a thief perhaps, it stands where S3's own time puts it, and is marked."""
    ahead = put(datetime.now(UTC) + timedelta(days=365), DATA)
    time.sleep(1.1)  # S3's own time is told in seconds
    data = channel_backup(3)
    latest, old = put(datetime.now(UTC), data), put(NOON, DATA)
    assert keys(reader) == [latest, ahead, old]
    marked = [line for line in plain(reader) if "named later than stored" in line]
    assert [f"alice/{line.split()[0]}" for line in marked] == [ahead]
    assert restored_bytes(reader, home) == data


@pytest.mark.unmeasured
def test_drops_are_marked(put: partial[str], reader: Env) -> None:
    """They are at least 300 bytes smaller than the one before; empty ones are marked, too."""
    sizes = [1000, 700, 401, 2000, 1300, 1300, 45, 700, 401, 101, 45, 45]
    dropped = [False, True, False, False, True, False, True, False, False, True, False, False]
    for hours, size in enumerate(sizes):
        put(NOON + HOUR * hours, os.urandom(size))
    lines = plain(reader)[::-1]
    assert ["smaller" in line for line in lines] == dropped
    empty = [size == 45 for size in sizes]
    assert ["no channels" in line for line in lines] == empty
    assert [row["empty"] for row in listed(reader)] == empty[::-1]


# --- What is shown, and what is counted ---


def test_others_are_counted(put: partial[str], reader: Env) -> None:
    """Foreign files and the prefixes of other nodes are counted or left out, never shown."""
    key = put(NOON, DATA)
    put(NOON + HOUR, DATA, prefix="alice/regtest/")
    for prefix in ("bob/", "alice/regtest/", "alice"):
        put(NOON, DATA, prefix=prefix)
    for name in ("readme.txt", "20260230T000000.000000Z-a1b2c3", "20260301T120000Z-a1b2c3"):
        put(NOON, b"foreign", name=name)
    put(NOON, b"foreign", prefix="", name="alice/")
    done = done_well(reader, "list", "--json")
    assert [row["key"] for row in json.loads(done.stdout)] == [key]
    assert "alice/: 1; other keys, not shown: 5" in done.stderr


def test_an_empty_prefix(put: partial[str], reader: Env) -> None:
    """Without a prefix the versions at the top of the bucket are shown, and those below are not."""
    key = put(NOON, DATA, prefix="")
    put(NOON, DATA)
    assert keys(reader | {"S3_BACKUP_PREFIX": ""}) == [key]


@pytest.mark.parametrize("prefix", ["bob/regtest", ""])
def test_folders_in_place_of_versions(put: partial[str], reader: Env) -> None:
    """A list without a version names the folders, escaped, and no key that lies in them."""
    for folder in ("Alice/", "bob/mainnet/", "carol\x1b[31m/"):
        key = put(NOON, DATA, prefix=folder)
    assert listed(reader) == []
    done = done_well(reader, "list")
    assert not re.search(r"\d{8}T", done.stdout)
    for folder in ("Alice/", "bob/", "carol"):
        assert folder in done.stderr
    assert key[-30:] not in done.stderr
    assert done.stderr.replace("\n", "").isprintable()


@pytest.mark.unmeasured
def test_more_folders_than_anybody_reads(reader: Env) -> None:
    """Of folders without end some are named."""
    folders = (f"<Prefix>{'x' * 200}{number}/</Prefix>" for number in range(500))
    found = [f"<CommonPrefixes>{folder}</CommonPrefixes>" for folder in folders]
    page = listing(*found, truncated="true", token="more")
    with RawS3(lambda asked: framed([listing() if "prefix=" in asked.path else page])) as raw:
        done = done_well(reader | {"AWS_ENDPOINT_URL_S3": raw.endpoint}, "list")
        assert len(raw.requests) == 2
    assert f"{'x' * 200}0/" in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 10_000


# --- Forms ---


def test_json(put: partial[str], reader: Env) -> None:
    """Each element tells key, name, size, and both times in ISO 8601 and UTC."""
    at = NOON + timedelta(microseconds=123456)
    key = put(at, os.urandom(1234))
    (row,) = listed(reader)
    expected = {"key": key, "name": key[-30:], "size_bytes": 1234, "empty": False}
    assert row | expected | {"captured_at": at.isoformat()} == row
    stored = datetime.fromisoformat(row["stored_at"])
    assert stored.utcoffset() == timedelta(0)
    assert abs(stored - datetime.now(UTC)) < timedelta(seconds=60)
    _, seen = run_on_terminal(reader, "list", "--json")
    assert json.loads(seen) == [row]


def test_the_table(put: partial[str], reader: Env) -> None:
    """It is the same on a terminal and in a pipe: a line for each version."""
    stored = [put(NOON + HOUR, os.urandom(12_345_678)), put(NOON, channel_backup(0))]
    lines = plain(reader)
    _, seen = run_on_terminal(reader, "list")
    assert seen.splitlines()[1:] == lines
    assert [f"alice/{line.split()[0]}" for line in lines] == stored
    assert [line.split()[1].replace(",", "") for line in lines] == ["12345678", "45"]
    assert all(f"{datetime.now(UTC):%Y-%m-%d}" in line for line in lines)
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_foreign_keys_cannot_forge_lines(put: partial[str], reader: Env) -> None:
    """Control characters in keys and prefixes reach neither the terminal nor the log."""
    key = put(NOON, DATA)
    for foreign in (f"{key}\n", f"{key}\x1b[31m", "alice/\x1b]0;title\x07/x", "alice/\u202egnp"):
        put(NOON, b"foreign", prefix="", name=foreign)
    done = done_well(reader, "list")
    _, seen = run_on_terminal(reader, "list", log=True)
    shown = done.stdout + done.stderr + seen.replace("\r", "")
    assert shown.replace("\n", "").isprintable()
    assert len(done.stdout.splitlines()) == 2  # the head, and a version


def test_thousands_of_versions(tmp_path: Path, prefix: str) -> None:
    """Versions of more than one page are listed in order, and the newest is restored."""
    server, bucket = S3Server(tmp_path / "s3"), "crowded"
    versions = [channel_backup(1) for _ in range(1100)]
    names = [version_name(data, NOON + n * SECOND) for n, data in enumerate(versions)]
    directory = server.directory / "s3/000000000000" / bucket / prefix
    directory.mkdir(parents=True)
    for name, data in zip(names, versions, strict=True):
        (directory / name).write_bytes(data)
    with server:
        reader = reader_settings(server, bucket, prefix, server.reader_user(bucket))
        assert keys(reader) == [prefix + name for name in reversed(names)]
        assert restored_bytes(reader, tmp_path) == versions[-1]


MANY = answers.Answer(  # more than the buffer of stdout takes
    body=listing(*(entry(f"alice/{version_name(DATA, NOON + n * SECOND)}") for n in range(100)))
)


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_goes_away(fake: FakeS3, fake_reader: Env, options: str) -> None:
    """`list | head` is no fault: who has read enough is not shown a traceback."""
    fake.set_default(MANY, "GET")
    piped = f'"{sys.executable}" "{SCRIPT}" list {options} | true'
    done = run_script(fake_reader, command=["/bin/sh", "-c", piped])
    assert done.returncode == 0
    assert "using endpoint" in done.stderr
    assert not re.search("Traceback|BrokenPipe|fault of this program", done.stderr)


@pytest.mark.parametrize("command", ["list", "list --json", "check", "check --json", "restore"])
def test_an_answer_that_cannot_be_printed(
    put: partial[str], fake: FakeS3, node_reader: Env, lnd: Lnd, home: Path, command: str
) -> None:
    """When stdout takes nothing it is exit 1 and one line; what is restored is the whole version or
    nothing. When there is no stdout, the exit code is enough.
    """
    newest = lnd.write()
    put(NOON, newest.data)
    if command.startswith("list"):
        fake.set_default(MANY, "GET")
        node_reader["AWS_ENDPOINT_URL_S3"] = fake.endpoint
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run_script(node_reader, *command.split(), cwd=home, stdout=full)
    assert done.returncode == 1
    assert len(re.findall("error: (?!hint)", done.stderr)) == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    for path in home.iterdir():
        assert path.read_bytes() == newest.data
        path.unlink()
    closed = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(SCRIPT)]
    with Script(node_reader, *command.split(), cwd=home, command=closed) as script:
        assert script.wait() == 0
        assert "a fault of this program" not in script.log


# --- What is missing, and what is not needed ---


@pytest.mark.parametrize("command", ["list", "check", "restore"])
def test_s3_refuses_connections(node_reader: Env, lnd: Lnd, command: str) -> None:
    """Exit 75 when nobody listens."""
    lnd.write()
    done = run_script(node_reader | {"AWS_ENDPOINT_URL_S3": NOWHERE}, command)
    assert done.returncode == 75
    assert done.stdout == "" or command == "check"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (answers.SLOW_DOWN, 75),
        (answers.INTERNAL_ERROR, 75),
        (answers.CLOCK_SKEW, 75),
        (answers.DROPPED, 75),
        (answers.PORTAL, 75),
        (answers.EXPIRED_TOKEN, 1),
        (answers.WRONG_REGION, 1),
        (answers.NO_SUCH_BUCKET, 1),
    ],
)
def test_errors_of_s3(fake: FakeS3, fake_reader: Env, answer: answers.Answer, code: int) -> None:
    """What trying again may help is exit 75, what it will not is exit 1, each with a hint."""
    fake.set_default(answer, "GET")
    done = run_script(fake_reader, "list")
    assert (done.returncode, done.stdout) == (code, "")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_key(reader: Env) -> None:
    """A wrong secret is exit 1 and a matter of the access key, not of permissions."""
    done = run_script(reader | {"AWS_SECRET_ACCESS_KEY": "wr0ng-s3cr3t"}, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "check the access key" in done.stderr
    assert "wr0ng-s3cr3t" not in done.stderr


def test_the_node_is_not_needed(put: partial[str], reader: Env, home: Path) -> None:
    """Its settings may be wrong for `list` and `restore`, and nothing is said of them."""
    key = put(NOON, DATA)
    env = reader | {"MONITOR_FILE_PATH": "/nowhere/wallet.db", "BACKUP_DIRECTORY": "~/nowhere"}
    env |= {"METRICS_FILE": "/nowhere/lnd.prom", "HEARTBEAT_URL": "nowhere"}
    assert keys(env) == [key]
    said = restore(env, home).stderr
    assert not re.search("MONITOR_FILE_PATH|BACKUP_DIRECTORY|nowhere", said)


def test_a_wrong_bucket_name(reader: Env) -> None:
    """What is needed must be right: a bucket that cannot be one is exit 78."""
    refused(reader | {"S3_BUCKET_NAME": "s3://bucket/alice"}, "S3_BUCKET_NAME", args=("list",))
