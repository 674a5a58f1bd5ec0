"""What `list` shows: what is in the bucket, newest first, and what deserves a look."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from kit import (
    SCRIPT,
    FakeS3,
    FaultProxy,
    Lnd,
    RawS3,
    Request,
    S3Server,
    Script,
    allow,
    answers,
    channel_backup,
    reader_settings,
    run_on_terminal,
    run_script,
)
from kit.answers import framed, listing
from shared import HOUR, NOON, NOWHERE, put_version, restore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

ONE_MINUTE = 60.0
CROWD = 2500
YEAR = timedelta(days=365)
FIELDS = {"key", "name", "captured_at", "stored_at", "size_bytes", "empty"}
EMPTY, AHEAD = "no channels", "named later than stored"


def put(
    server: S3Server, bucket: str, at: datetime, data: bytes | int = 10, prefix: str = "alice/"
) -> str:
    """Store a version, of a number of channels if no bytes are given, captured at this time, and
    return its name.
    """
    data = channel_backup(data) if isinstance(data, int) else data
    digest = hashlib.sha256(data).hexdigest()
    name = f"{at:%Y%m%dT%H%M%S.%f}Z-{digest[-6:]}"
    server.admin.put_object(
        Bucket=bucket, Key=prefix + name, Body=data, Metadata={"sha256": digest}
    )
    return name


def listed(env: dict[str, str]) -> list[dict[str, Any]]:
    """Return what `list --json` prints."""
    done = run_script(env, "list", "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def plain(env: dict[str, str]) -> list[str]:
    """Return the rows of the table that `list` prints into a pipe."""
    done = run_script(env, "list")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[1:]


def on_terminal(env: dict[str, str], *args: str) -> str:
    """Run the program with a terminal as its stdout, and return what is seen there."""
    code, seen = run_on_terminal(env, *args)
    assert code == 0, seen
    return seen


# --- Order and marks ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_newest_first(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """Versions are listed newest first, over http and over https, whatever the order in which they
    were stored.
    """
    names = [put(s3, bucket, NOON + HOUR * hours) for hours in (1, 3, 0, 2)]
    assert [row["name"] for row in listed(reader)] == sorted(names, reverse=True)


def test_a_year_ahead_is_not_the_newest(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """A version named a year ahead stands where S3's own time puts it, and is marked; one named in
    time is not.
    """
    ahead = put(s3, bucket, datetime.now(UTC) + YEAR)
    time.sleep(1.1)  # S3's own time is told in seconds
    latest, old = put(s3, bucket, datetime.now(UTC)), put(s3, bucket, NOON)
    assert [row["name"] for row in listed(reader)] == [latest, ahead, old]
    assert [line[:30] for line in plain(reader) if AHEAD in line] == [ahead]


def test_no_channels_are_marked(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """A version without channels is marked as that, and no other is."""
    put(s3, bucket, NOON)
    empty = put(s3, bucket, NOON + HOUR, 0)
    lines = plain(reader)
    assert [EMPTY in line for line in lines] == [True, False]
    assert empty in lines[0]
    assert [row["empty"] for row in listed(reader)] == [True, False]


# --- What is shown, and what is counted ---


def test_others_are_counted(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """Foreign files and the prefixes of other nodes, above and below, are counted or left out, and
    never shown.
    """
    name = put(s3, bucket, NOON)
    put(s3, bucket, NOON, prefix="bob/")
    put(s3, bucket, NOON, prefix="alice/regtest/")
    put(s3, bucket, NOON + HOUR, prefix="alice/regtest/")
    put(s3, bucket, NOON, prefix="alice")
    for key in (
        "alice/readme.txt",
        "alice/20260230T000000.000000Z-a1b2c3",
        "alice/20260301T120000Z-a1b2c3",
        "alice/",
    ):
        s3.admin.put_object(Bucket=bucket, Key=key, Body=b"foreign")
    done = run_script(reader, "list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == [name]
    assert re.search(r"version.*\b1\b.*other.*\b5\b|\b1 version.*\b5 other", done.stderr)


def test_an_empty_bucket(reader: dict[str, str]) -> None:
    """An empty bucket is no failure: nothing is printed, and an empty array as JSON."""
    assert listed(reader) == []
    assert plain(reader) == []


def test_an_empty_prefix(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """Without a prefix the versions at the top of the bucket are shown, and those below are not."""
    name = put(s3, bucket, NOON, prefix="")
    put(s3, bucket, NOON)
    assert [row["key"] for row in listed(reader | {"S3_BACKUP_PREFIX": ""})] == [name]


def test_what_a_delete_marker_hides_is_not_shown(
    s3: S3Server, bucket: str, reader: dict[str, str]
) -> None:
    """In a bucket with versioning the list shows what the bucket shows: not what a delete marker
    hides.
    """
    s3.admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    kept, hidden = put(s3, bucket, NOON), put(s3, bucket, NOON + HOUR)
    s3.admin.delete_object(Bucket=bucket, Key=f"alice/{hidden}")
    assert [row["name"] for row in listed(reader)] == [kept]


# --- Forms ---


def test_json(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """Each element tells key, name, size, whether it is empty, and both times in ISO 8601 and
    UTC.
    """
    name = put(s3, bucket, NOON + timedelta(microseconds=123456), os.urandom(1234))
    before = datetime.now(UTC)
    (row,) = listed(reader)
    assert row.keys() >= FIELDS
    assert (row["key"], row["name"], row["size_bytes"], row["empty"]) == (
        f"alice/{name}",
        name,
        1234,
        False,
    )
    captured, stored = (
        datetime.fromisoformat(row[field]) for field in ("captured_at", "stored_at")
    )
    assert captured == NOON + timedelta(microseconds=123456)
    assert (captured.utcoffset(), stored.utcoffset()) == (timedelta(0), timedelta(0))
    assert abs(stored - before) < timedelta(seconds=30)


def test_json_beside_a_terminal(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """`--json` is JSON on a terminal, too."""
    name = put(s3, bucket, NOON)
    assert [row["name"] for row in json.loads(on_terminal(reader, "list", "--json"))] == [name]


def test_the_table(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """On a terminal and in a pipe there is the same table: one line for each version, with its
    size and when it was stored.
    """
    names = [put(s3, bucket, NOON + HOUR, os.urandom(12_345_678)), put(s3, bucket, NOON, 0)]
    lines = plain(reader)
    assert on_terminal(reader, "list").splitlines()[1:] == lines
    assert [line.split()[0] for line in lines] == names
    assert [line.split()[1].replace(",", "") for line in lines] == ["12345678", "45"]
    assert all(f"{datetime.now(UTC):%Y-%m-%d}" in line for line in lines)
    assert all(line.isascii() and line.isprintable() for line in lines)


def test_foreign_keys_cannot_forge_lines(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """Keys and prefixes with control characters, whoever made them, reach neither the terminal nor
    the log.
    """
    name = put(s3, bucket, NOON)
    for key in (
        f"alice/{name}\n",
        f"alice/{name}\x1b[31m",
        "alice/\x1b]0;title\x07/x",
        "alice/\u202egnp",
    ):
        s3.admin.put_object(Bucket=bucket, Key=key, Body=b"foreign")
    done = run_script(reader, "list")
    seen = done.stdout + done.stderr + on_terminal(reader, "list").replace("\r\n", "\n")
    assert all(character.isprintable() for character in seen if character not in "\n\t")
    assert len(done.stdout.splitlines()) == 2  # the head, and a version


@pytest.mark.parametrize("answer", ["key", "message"])
def test_answers_cannot_forge_lines(reader: dict[str, str], answer: str) -> None:
    """What S3 says, be it a key or an error, is escaped before it is shown."""
    evil = (
        "evil%1B%5B31m%0Ahint: run this" if answer == "key" else "evil&#x202e;&#10;hint: run this"
    )
    document = (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix>alice/</Prefix>'
        "<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        f"<Contents><Key>alice/20260301T120000.000000Z-a1b2c3{evil}</Key><LastModified>2026-03-01T12:00:00.000Z"
        '</LastModified><ETag>"x"</ETag><Size>600</Size></Contents></ListBucketResult>'
        if answer == "key"
        else f"<Error><Code>InvalidArgument</Code><Message>{evil}</Message></Error>"
    )
    with FakeS3(
        defaults={"GET": answers.Answer(200 if answer == "key" else 400, body=document.encode())}
    ) as fake:
        done = run_script(reader | {"AWS_ENDPOINT_URL_S3": fake.endpoint}, "list")
    assert done.returncode == (0 if answer == "key" else 1)
    assert all(
        character.isprintable()
        for character in done.stdout + done.stderr
        if character not in "\n\t"
    )
    assert "\nhint: run this" not in done.stderr


# --- Thousands ---


def plant(server: S3Server, bucket: str, count: int) -> list[str]:
    """Put versions where a server that does not run yet keeps them, which is fast, and return their
    names in order.
    """
    directory = server.directory / "s3/000000000000" / bucket / "alice"
    directory.mkdir(parents=True)
    names = []
    for second in range(count):
        data, at = channel_backup(1), NOON + timedelta(seconds=second)
        digest = hashlib.sha256(data).hexdigest()
        names.append(f"{at:%Y%m%dT%H%M%S.%f}Z-{digest[-6:]}")
        (directory / names[-1]).write_bytes(data)
        facts = {
            "key": f"alice/{names[-1]}",
            "size": len(data),
            "etag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"',
            "last_modified": f"{at:%Y-%m-%dT%H:%M:%S}.000Z",
            "content_type": "application/octet-stream",
            "metadata": {"x-amz-meta-sha256": digest},
        }
        (directory / f"{names[-1]}.meta.json").write_text(json.dumps(facts))
    return names


def test_thousands_of_versions(tmp_path: Path, prefix: str) -> None:
    """All of 2,500 versions are listed in order, page by page, and the newest of them is
    restored.
    """
    server, bucket = S3Server(tmp_path / "s3"), "crowded"
    names = plant(server, bucket, CROWD)
    with server:
        put(server, bucket, NOON + HOUR, prefix="alice/bob/")
        reader = reader_settings(server, bucket, prefix, server.reader_user(bucket))
        assert [row["name"] for row in listed(reader)] == names[::-1]
        assert len(plain(reader)) == CROWD
        done = run_script(reader, "restore", "--output", str(tmp_path / "restored"))
    assert done.returncode == 0, done.stderr
    newest = (tmp_path / "restored").read_bytes()
    assert names[-1].endswith(hashlib.sha256(newest).hexdigest()[-6:])


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_goes_away(
    s3: S3Server, bucket: str, reader: dict[str, str], options: str
) -> None:
    """`list | head` is no fault: who has read enough is not shown a traceback."""
    for second in range(100):  # more than the buffer of stdout takes
        put(s3, bucket, NOON + timedelta(seconds=second), 1)
    piped = f'"{sys.executable}" "{SCRIPT}" list {options} | true'
    done = run_script(reader, command=["/bin/sh", "-c", piped])
    assert done.returncode == 0
    assert "using endpoint" in done.stderr
    assert not any(
        text in done.stderr for text in ("Traceback", "BrokenPipe", "fault of this program")
    )


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["lines", "json"])
@pytest.mark.parametrize("count", [1, 100], ids=["at the end", "in the middle"])
def test_a_list_that_cannot_be_printed(
    s3: S3Server, bucket: str, reader: dict[str, str], options: tuple[str, ...], count: int
) -> None:
    """When stdout takes nothing it is exit 1 and one line."""
    for second in range(count):  # the buffer of stdout takes some 50
        put(s3, bucket, NOON + timedelta(seconds=second), 1)
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = run_script(reader, "list", *options, stdout=full)
    assert done.returncode == 1
    assert len(re.findall("error: (?!hint)", done.stderr)) == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    closed = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, str(SCRIPT), "list", *options]
    with Script(reader, command=closed) as script:
        assert script.wait() == 0
        assert "a fault of this program" not in script.log


# --- What is missing, and what is not needed ---


def test_a_put_only_key(s3: S3Server, bucket: str, prefix: str) -> None:
    """A key that may only put is exit 1; the hint is to use the reader's key, and nobody is told
    to let the node's key read.
    """
    env = reader_settings(s3, bucket, prefix, s3.put_only_user(bucket, prefix))
    done = run_script(env, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert re.search(r"hint: .*\breader('s)? key", done.stderr)
    assert not re.search('"Effect"|"Allow"', done.stderr)


def test_a_list_needs_no_get(s3: S3Server, bucket: str, prefix: str) -> None:
    """With the permission to list alone, the list is there."""
    name = put(s3, bucket, NOON)
    user = s3.user(allow("s3:ListBucket", bucket))
    assert [row["name"] for row in listed(reader_settings(s3, bucket, prefix, user))] == [name]


@pytest.mark.parametrize("args", [("list", "--json"), ("restore",)], ids=["list", "restore"])
def test_s3_refuses_connections(reader: dict[str, str], args: tuple[str, ...]) -> None:
    """Exit 75 at once when nobody listens."""
    began = time.monotonic()
    done = run_script(reader | {"AWS_ENDPOINT_URL_S3": NOWHERE}, *args)
    assert (done.returncode, done.stdout) == (75, "")
    assert time.monotonic() - began < ONE_MINUTE
    assert "Traceback" not in done.stderr


def test_s3_does_not_answer(
    s3: S3Server, reader: dict[str, str], lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """Exit 75 within a minute, from `list`, `check` and `restore`, when connections are accepted
    and never answered.
    """
    lnd.write()
    with FaultProxy(s3.host, s3.port) as proxy, ThreadPoolExecutor(3) as pool:
        proxy.set("blackhole")
        env = reader | {"AWS_ENDPOINT_URL_S3": proxy.endpoint()}
        env |= {"MONITOR_FILE_PATH": str(lnd.path), "BACKUP_DIRECTORY": str(staging)}
        commands: Sequence[tuple[str, ...]] = (
            ("list",),
            ("check",),
            ("restore", "--output", str(tmp_path / "restored")),
        )
        began = time.monotonic()
        done = list(pool.map(lambda command: run_script(env, *command), commands))
        assert time.monotonic() - began < ONE_MINUTE
    assert [each.returncode for each in done] == [75, 75, 75]
    assert not any("Traceback" in each.stderr for each in done)
    assert not (tmp_path / "restored").exists()


def test_a_captive_portal_is_no_empty_bucket(reader: dict[str, str]) -> None:
    """The page of a captive portal is not taken for a list without versions."""
    with FakeS3(defaults={"GET": answers.PORTAL}) as fake:
        done = run_script(reader | {"AWS_ENDPOINT_URL_S3": fake.endpoint}, "list", "--json")
    assert (done.returncode, done.stdout) == (75, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (answers.SLOW_DOWN, 75),
        (answers.INTERNAL_ERROR, 75),
        (answers.CLOCK_SKEW, 75),
        (answers.DROPPED, 75),
        (answers.EXPIRED_TOKEN, 1),
        (answers.WRONG_REGION, 1),
    ],
    ids=["slow", "internal", "clock", "dropped", "expired", "region"],
)
def test_errors_of_s3(reader: dict[str, str], answer: answers.Answer, code: int) -> None:
    """What trying again may help is exit 75, what it will not is exit 1, each with something to
    do.
    """
    with FakeS3(defaults={"GET": answer}) as fake:
        done = run_script(reader | {"AWS_ENDPOINT_URL_S3": fake.endpoint}, "list")
    assert (done.returncode, done.stdout) == (code, "")
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_key(reader: dict[str, str]) -> None:
    """A wrong secret is exit 1 and a matter of the access key, not of permissions."""
    done = run_script(reader | {"AWS_SECRET_ACCESS_KEY": "wr0ng-s3cr3t"}, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "access_key" in done.stderr.lower().replace(" ", "_")
    assert "wr0ng-s3cr3t" not in done.stderr
    assert "Traceback" not in done.stderr


def test_no_credentials(reader: dict[str, str]) -> None:
    """Without any credentials it is exit 1, not a traceback."""
    env = {name: value for name, value in reader.items() if "KEY" not in name}
    done = run_script(env, "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr


def test_a_missing_bucket(s3: S3Server, prefix: str) -> None:
    """A bucket that is not there is exit 1."""
    bucket = "no-such-bucket"
    done = run_script(reader_settings(s3, bucket, prefix, s3.reader_user(bucket)), "list")
    assert (done.returncode, done.stdout) == (1, "")
    assert bucket in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"MONITOR_FILE_PATH": "", "BACKUP_DIRECTORY": ""},
        {"MONITOR_FILE_PATH": "~/nowhere", "BACKUP_DIRECTORY": "~/nowhere"},
        {"MONITOR_FILE_PATH": "/nowhere/wallet.db", "BACKUP_DIRECTORY": "/nowhere/at/all"},
        {"MONITOR_FILE_PATH": "/", "BACKUP_DIRECTORY": "/dev/null"},
        {"METRICS_FILE": "/nowhere/lnd.prom", "HEARTBEAT_URL": "nowhere"},
    ],
    ids=["absent", "empty", "tilde", "nowhere", "impossible", "reporting"],
)
def test_the_node_is_not_needed(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, node: dict[str, str]
) -> None:
    """The bucket's settings suffice for `list` and `restore`; the node's may be absent, empty or
    wrong, and nothing is said of them.
    """
    name = put(s3, bucket, NOON)
    done = run_script(reader | node, "list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)] == [name]
    said = done.stderr + restore(reader | node, home).stderr
    assert not any(text in said for text in ("MONITOR_FILE_PATH", "BACKUP_DIRECTORY", "nowhere"))


def test_a_wrong_bucket_name(reader: dict[str, str]) -> None:
    """What is needed must be right: a bucket that cannot be one is exit 78."""
    done = run_script(reader | {"S3_BUCKET_NAME": "s3://bucket/alice"}, "list")
    assert (done.returncode, done.stdout) == (78, "")
    assert "S3_BUCKET_NAME" in done.stderr


def test_wrong_usage(reader: dict[str, str]) -> None:
    """An option of another command is wrong usage."""
    assert run_script(reader, "list", "--key", "x").returncode == 2


# --- Drops and folders ---


@pytest.mark.unmeasured
def test_drops_are_marked(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """A version that is at least 300 bytes smaller than the one before it is marked, an empty one
    counts, and no other is.
    """
    sizes = [1000, 700, 401, 2000, 1300, 1300, 45, 700, 401, 101, 45, 45]
    dropped = [False, True, False, False, True, False, True, False, False, True, False, False]
    for hours, size in enumerate(sizes):
        put_version(s3, bucket, NOON + HOUR * hours, os.urandom(size))
    done = run_script(reader, "list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[:0:-1]  # without the head
    words = "(?i)smaller|drop|shr[aiu]nk|lack|fewer|less"
    assert [bool(re.search(words, line)) for line in lines] == dropped
    assert [bool(re.search("no channels", line)) for line in lines] == [
        size == 45 for size in sizes
    ]


@pytest.mark.unmeasured
@pytest.mark.parametrize("prefix", ["", "bob/regtest"])
def test_folders_in_place_of_versions(s3: S3Server, bucket: str, prefix: str) -> None:
    """A list without a version names the folders that are there, escaped, and no key that lies in
    them.
    """
    for folder in ("Alice/", "bob/mainnet/", "carol\x1b[31m/"):
        key = put_version(s3, bucket, NOON, channel_backup(1), prefix=folder)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader, "list")
    assert done.returncode == 0
    assert not re.search(r"\d{8}T", done.stdout)
    for folder in ("Alice/", "bob/", "carol"):
        assert folder in done.stderr
    assert key[-30:] not in done.stderr
    assert all(character.isprintable() for character in done.stderr if character != "\n")


@pytest.mark.unmeasured
def test_more_folders_than_anybody_reads(reader: dict[str, str]) -> None:
    """Of folders without end some are named."""
    pages = itertools.count()

    def page(request: Request) -> Iterable[bytes]:
        if "prefix=alice" in request.path:
            return framed([listing()])
        number = next(pages)
        names = (f"{'x' * 200}{number}-{each}/" for each in range(500))
        found = (f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" for name in names)
        return framed([listing(*found, truncated="true", token=f"token-{number}")])

    with RawS3(page) as raw:
        done = run_script(reader | {"AWS_ENDPOINT_URL_S3": raw.endpoint}, "list")
        assert len(raw.requests) < 20
    assert done.returncode == 0, done.stderr
    assert f"{'x' * 200}0-0/" in done.stderr
    assert max(map(len, done.stderr.splitlines())) < 10_000
