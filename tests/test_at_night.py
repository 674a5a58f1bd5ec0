"""What a person reads who is woken by it: `check`, `list`, `restore` and `once`, in words that
need no thought.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import stat
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from kit import (
    Answer,
    FakeS3,
    Lnd,
    RawS3,
    Request,
    S3Server,
    channel_backup,
    hurried,
    reader_settings,
    run_script,
    settings_at,
    version_name,
)
from kit.fake_s3 import ACCESS_DENIED, HTML, STORED
from kit.raw_s3 import error, framed, listing

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterable
    from pathlib import Path

pytestmark = pytest.mark.unmeasured

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
TEN_MINUTES = 600
AWAY = "http://127.0.0.1:1"
PAGE = Answer(403, headers={"Content-Type": "text/html"}, body=HTML, etag=False)


def put(server: S3Server, bucket: str, at: datetime, data: bytes, prefix: str = "alice/") -> str:
    """Store a version that was captured at this time, and return its key."""
    return server.put_version(bucket, prefix + version_name(data, at), data)


# --- check ---


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
def node(lnd: Lnd, staging: Path, fake: FakeS3) -> dict[str, str]:
    """Return the settings of a node, with a put-only key, whose version on disk is stored."""
    lnd.write()
    env = settings_at(fake.endpoint, lnd, staging)
    assert run_script(env, "once").returncode == 0
    return env


def replace(lnd: Lnd, seconds: float) -> None:
    """Let LND have written another version, so many seconds ago."""
    lnd.write()
    os.utime(lnd.path, (time.time() - seconds,) * 2)


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
    replace(lnd, TEN_MINUTES + 60)
    expect_verdict(env, "NOT BACKED UP", 1)


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
    node: dict[str, str],
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
    replace(lnd, seconds)
    fake.set_default(answer, "GET")
    if seconds > TEN_MINUTES:
        expect_verdict(node, "NOT BACKED UP", 1)
    else:
        done = expect_verdict(node, "UNKNOWN", code)
        assert "hint: " in done.stderr


def test_s3_is_out_of_reach(node: dict[str, str], lnd: Lnd) -> None:
    """When nobody listens it is UNKNOWN, also if the last receipt is for the version on disk; a
    version that has waited for long is NOT BACKED UP.
    """
    expect_verdict(node | {"AWS_ENDPOINT_URL_S3": AWAY}, "UNKNOWN", 75)
    replace(lnd, TEN_MINUTES - 120)
    expect_verdict(node | {"AWS_ENDPOINT_URL_S3": AWAY}, "UNKNOWN", 75)
    replace(lnd, TEN_MINUTES + 60)
    expect_verdict(node | {"AWS_ENDPOINT_URL_S3": AWAY}, "NOT BACKED UP", 1)


@pytest.mark.parametrize("asked", ["denied", "slow"])
def test_nothing_was_stored_for_twice_the_refresh(
    fake: FakeS3, node: dict[str, str], started_by: Callable[[str], None], asked: str
) -> None:
    """A receipt for the version on disk that is older than twice REFRESH_SECONDS says that nothing
    is stored any more; without a refresh it never does.
    """
    started_by(hurried(20))
    fake.set_default(ACCESS_DENIED if asked == "denied" else Answer(503, "SlowDown"), "GET")
    expect_verdict(node | {"REFRESH_SECONDS": "0.001"}, "NOT BACKED UP", 1)
    never = node | {"REFRESH_SECONDS": "0"}
    if asked == "denied":
        expect_verdict(never, "BACKED UP", 0)
    else:
        expect_verdict(never, "UNKNOWN", 75)


def test_no_file_to_check(node: dict[str, str], lnd: Lnd) -> None:
    """Without a file, or with one that cannot be a channel backup, nothing is backed up: exit 1,
    and not BACKED UP.
    """
    for data in (None, b"short"):
        lnd.path.unlink() if data is None else lnd.place(data)
        done = run_script(node, "check")
        assert done.returncode == 1
        assert not done.stdout.startswith("BACKED UP")
        assert "Traceback" not in done.stderr
        assert str(lnd.path) in done.stdout + done.stderr


def test_no_credentials_to_check_with(node: dict[str, str]) -> None:
    """Without any credentials S3 cannot be asked, and trying again does not help."""
    none = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    expect_verdict(node | none, "UNKNOWN", 1)


# --- list ---


def test_drops_are_marked(s3: S3Server, bucket: str, reader: dict[str, str]) -> None:
    """A version that is at least 300 bytes smaller than the one before it is marked, an empty one
    counts, and no other is.
    """
    sizes = [1000, 700, 401, 2000, 1300, 1300, 45, 700, 401, 101, 45, 45]
    dropped = [False, True, False, False, True, False, True, False, False, True, False, False]
    for hours, size in enumerate(sizes):
        put(s3, bucket, NOON + HOUR * hours, os.urandom(size))
    done = run_script(reader, "list")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[:0:-1]  # without the head
    words = "(?i)smaller|drop|shr[aiu]nk|lack|fewer|less"
    assert [bool(re.search(words, line)) for line in lines] == dropped
    assert [bool(re.search("no channels", line)) for line in lines] == [
        size == 45 for size in sizes
    ]


@pytest.mark.parametrize("prefix", ["", "bob/regtest"])
def test_folders_in_place_of_versions(s3: S3Server, bucket: str, prefix: str) -> None:
    """A list without a version names the folders that are there, escaped, and no key that lies in
    them.
    """
    for folder in ("Alice/", "bob/mainnet/", "carol\x1b[31m/"):
        key = put(s3, bucket, NOON, channel_backup(1), prefix=folder)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(reader, "list")
    assert done.returncode == 0
    assert not re.search(r"\d{8}T", done.stdout)
    for folder in ("Alice/", "bob/", "carol"):
        assert folder in done.stderr
    assert key[-30:] not in done.stderr
    assert all(character.isprintable() for character in done.stderr if character != "\n")


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


# --- restore ---


def history(s3: S3Server, bucket: str, *sizes: int) -> list[bytes]:
    """Store a version of each size, one after the other, and return them."""
    data = [os.urandom(size) for size in sizes]
    for hours, each in enumerate(data):
        put(s3, bucket, NOON + HOUR * hours, each)
    return data


def restore(
    reader: dict[str, str], home: Path, *args: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `restore` in that directory."""
    done = run_script(reader, "restore", *args, cwd=home)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def restored(home: Path) -> dict[str, bytes]:
    """Return what is in the directory, by the end of its name."""
    return {path.name.removeprefix("channel.backup"): path.read_bytes() for path in home.iterdir()}


def lncli(done: subprocess.CompletedProcess[str], step: str = "restorechanbackup") -> list[str]:
    """Return the files that LND is to be given by the printed lines, in order."""
    lines = re.findall(rf"lncli {step} --multi_file (.*)", done.stdout)
    return [shlex.split(line)[0] for line in lines]


SHRINKING: dict[str, tuple[list[int], dict[str, int]]] = {  # sizes; which is in which file
    "no drop": ([700, 1400, 1400], {"": 2}),
    "one": ([2000, 1400, 1400, 1500], {"": 3, ".2": 0}),
    "the latest three of five": (
        [9000, 8000, 7000, 7000, 6000, 6500, 5000, 4000],
        {"": 7, ".2": 6, ".3": 5, ".4": 3},
    ),
    "a drop and nothing after": ([2000, 1700], {"": 1, ".2": 0}),
    "no drop by a byte": ([2000, 1701], {"": 1}),
    "a recovery under the old prefix": (
        [5000, 1179, 801, 423, 45],
        {"": 3, ".2": 2, ".3": 1, ".4": 0},
    ),
    "an empty version between": ([5000, 45, 900], {"": 2, ".2": 0}),
}


@pytest.mark.parametrize("case", SHRINKING)
def test_the_versions_before_the_drops(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, case: str
) -> None:
    """The last version before each of the three latest drops is restored as well, and all of them
    are given to LND in order.
    """
    sizes, expected = SHRINKING[case]
    data = history(s3, bucket, *sizes)
    done = restore(reader, home)
    assert restored(home) == {name: data[number] for name, number in expected.items()}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in home.iterdir())
    assert lncli(done) == [str(home / f"channel.backup{name}") for name in expected]
    assert set(lncli(done)) <= set(lncli(done, "verifychanbackup"))


@pytest.mark.parametrize("which", ["key", "before", "output"])
def test_which_drops_count(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, which: str
) -> None:
    """With `--key` there is one file; with `--before` drops count up to that time; the numbers
    follow the name of the output.
    """
    data = history(s3, bucket, 5000, 4000, 3000, 2000)
    if which == "key":
        restore(reader, home, "--key", version_name(data[2], NOON + 2 * HOUR))
        assert restored(home) == {"": data[2]}
    elif which == "before":
        restore(reader, home, "--before", (NOON + 2 * HOUR).isoformat())
        assert restored(home) == {"": data[1], ".2": data[0]}
    else:
        restore(reader, home, "--output", "my file")
        names = ["my file", "my file.2", "my file.3", "my file.4"]
        assert restored(home) == dict(zip(names, data[::-1], strict=True))


@pytest.mark.parametrize("fault", ["damaged", "too short", "unreadable"])
def test_a_version_before_a_drop_that_cannot_be_had(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, fault: str
) -> None:
    """If one of them cannot be had, a warning names it, its number is left out, and it is
    exit 0.
    """
    data = history(s3, bucket, 5000, 4000, 3000, 2000)
    key = "alice/" + version_name(data[1], NOON + HOUR)
    if fault == "unreadable":
        statement = {"Effect": "Deny", "Action": "s3:GetObject"}
        may = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        user = s3.user(may, statement | {"Resource": [f"arn:aws:s3:::{bucket}/{key}"]})
        reader = reader_settings(s3, bucket, "alice/", user)
    else:
        body = data[1][::-1] if fault == "damaged" else data[1][:3500]
        s3.admin.put_object(Bucket=bucket, Key=key, Body=body)
    done = restore(reader, home)
    assert restored(home) == {"": data[3], ".2": data[2], ".4": data[0]}
    assert any("warning: " in line and key in line for line in done.stderr.splitlines())
    assert lncli(done) == [str(home / f"channel.backup{name}") for name in ("", ".2", ".4")]


def test_a_file_that_is_there_is_not_overwritten(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """What bears the name of one of the other files is left as it is."""
    data = history(s3, bucket, 5000, 4000, 3000)
    (home / "channel.backup.2").write_bytes(b"mine")
    done = run_script(reader, "restore", cwd=home)
    found = restored(home)
    assert found.pop(".2") == b"mine"
    assert str(home / "channel.backup.2") in done.stderr
    assert found in ({}, {"": data[2], ".3": data[0]})
    assert done.returncode == (0 if found else 1)


# --- once ---


@pytest.mark.parametrize(
    "answer",
    [
        STORED,
        ACCESS_DENIED,
        Answer(400, body=error("Odd", "odd words"), etag=False),
        Answer(503, "SlowDown"),
        PAGE,
    ],
    ids=["stored", "denied", "odd", "slow", "page"],
)
def test_once_says_what_it_does(
    fake: FakeS3,
    fake_env: dict[str, str],
    lnd: Lnd,
    started_by: Callable[[str], None],
    answer: Answer,
) -> None:
    """`once` does not watch, speaks of no next start, and says once what failed."""
    started_by(hurried(20))
    lnd.write()
    fake.set_default(answer)
    done = run_script(fake_env, "once")
    again = answer.status == 503 or answer is PAGE
    assert done.returncode == (0 if answer == STORED else 75 if again else 1)
    assert not re.search("(?i)watching|next start", done.stderr)
    assert not re.search(r"\b1 versions", done.stderr)
    errors = [line for line in done.stderr.splitlines() if re.search(r"cannot store", line)]
    assert len(errors) == (answer != STORED), done.stderr
    if answer.code:
        assert len(re.findall(answer.code, done.stderr)) == 1


@pytest.mark.parametrize("content", [None, b"x" * 44])
def test_once_without_a_file_sends_what_is_staged(
    fake: FakeS3, fake_env: dict[str, str], lnd: Lnd, content: bytes | None
) -> None:
    """Without a file, or with one that cannot be a channel backup, it is exit 1, and what was
    staged is sent all the same.
    """
    version = lnd.write()
    fake.set_default(ACCESS_DENIED)
    assert run_script(fake_env, "once").returncode == 1
    fake.set_default(STORED)
    lnd.path.unlink() if content is None else lnd.place(content)
    done = run_script(fake_env, "once")
    assert done.returncode == 1
    assert [each.data for each in fake.objects("some-bucket").values()] == [version.data]
    assert str(lnd.path) in done.stderr
