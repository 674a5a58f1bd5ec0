"""What `restore` does on the worst day: the right version, verified, and what to do with it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    CHECKOUT,
    SCRIPT,
    Answer,
    FakeS3,
    FaultProxy,
    S3Server,
    Script,
    allow,
    answers,
    channel_backup,
    reader_settings,
    run_script,
    script_environment,
    version_name,
)
from shared import (
    HOUR,
    NOON,
    Done,
    command_for_the_one_before,
    expect_tidy,
    restore,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from functools import partial

UNKNOWN = "20260301T120000.000000Z-a1b2c3"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach what is started, also where the tests themselves run in the background and
    are deaf to it.
    """
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


# --- Which version ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_trap(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """A newest version without channels is passed over, which is told."""
    put(NOON, channel_backup(3))
    wanted = channel_backup(12)
    key = put(NOON + HOUR, wanted)
    empty = [put(NOON + HOUR * hours, channel_backup(0)) for hours in (2, 3)]
    done = restore(reader, home)
    assert (home / "channel.backup").read_bytes() == wanted
    assert f"restored {key}" in done.stdout
    for passed_over in empty:
        assert re.search(f"{passed_over}.*no channels", done.stderr)


@pytest.mark.parametrize("whole", [True, False], ids=["key", "name"])
def test_a_key(put: partial[str], reader: dict[str, str], home: Path, *, whole: bool) -> None:
    """`--key` takes the whole key, which need not lie under the prefix, and the name alone."""
    wanted = channel_backup(5)
    key = put(NOON, wanted)
    put(NOON + HOUR, channel_backup(6))
    if whole:
        restore(reader | {"S3_BACKUP_PREFIX": "bob/"}, home, "--key", key)
    else:
        restore(reader, home, "--key", key.removeprefix("alice/"))
    assert (home / "channel.backup").read_bytes() == wanted


@pytest.mark.parametrize("key", [f"alice/{UNKNOWN}", UNKNOWN, "no such"])
def test_an_unknown_key(put: partial[str], reader: dict[str, str], home: Path, key: str) -> None:
    """A key that is not there is exit 1, and is named; the hint is one for somebody who restores:
    how to find another version, nothing of staging or of trying again.
    """
    put(NOON, channel_backup(5))
    done = restore(reader, home, "--key", key, code=1)
    error, hint = (line for line in done.stderr.splitlines() if "error: " in line)
    assert key in error
    assert "NoSuchKey" in error
    assert re.search(r"\blist\b|--before", hint)
    assert not re.search("stag|retr|again", error + hint)


def test_an_empty_key(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """An empty key, as from a variable that is not set, is no order to take the newest."""
    put(NOON, channel_backup(5))
    done = run_script(reader, "restore", "--key", "", cwd=home)
    assert done.returncode in (1, 2)
    assert not list(home.iterdir())


def test_a_key_cannot_forge_lines(reader: dict[str, str], home: Path) -> None:
    """A key with control characters is escaped before it is shown."""
    done = restore(reader, home, "--key", "a\n\x1b[31mb\u202e", code=1)
    assert done.stderr.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("before", "zone", "expected"),
    [
        ("2026-03-03", "", 2),
        ("2026-03-03T00:00", "XST+05", 3),
        ("2026-03-03T00:00", "XST-05", 1),
        ("2026-03-03", "XST-05", 1),
        ("2026-03-02T21:00Z", "XST-05", 1),
        ("2026-03-02T21:00:00.000001Z", "", 2),
        ("2026-03-02T21:00:00.000001+00:00", "XST-05", 2),
        ("2026-03-02T16:00:00.000001-05:00", "", 2),
        ("2026-03-03 02:00+05:00", "", 1),
        ("20260303T000000Z", "", 2),
        ("2099-01-01", "", 3),
    ],
)
def test_before(
    put: partial[str],
    reader: dict[str, str],
    home: Path,
    before: str,
    zone: str,
    expected: int,
) -> None:
    """`--before` takes a date or a time, local or with its offset, and means strictly before."""
    data = {count: channel_backup(count) for count in (1, 2, 3)}
    put(datetime(2026, 3, 1, 12, tzinfo=UTC), data[1])
    put(datetime(2026, 3, 2, 21, tzinfo=UTC), data[2])
    put(datetime(2026, 3, 3, 3, tzinfo=UTC), data[3])
    restore(reader | ({"TZ": zone} if zone else {}), home, "--before", before)
    assert (home / "channel.backup").read_bytes() == data[expected]


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(seconds=20), timedelta(days=365)])
def test_before_a_name(
    put: partial[str], reader: dict[str, str], home: Path, ahead: timedelta
) -> None:
    """`--before` takes a version's name as well, as `list` prints it, and never means that version
    itself, wherever the clock was that named it.
    """
    older = channel_backup(1)
    put(NOON, older)
    key = put(datetime.now(UTC) + ahead, channel_backup(2))
    restore(reader, home, "--before", key.removeprefix("alice/"))
    assert (home / "channel.backup").read_bytes() == older


def test_before_the_first(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """When there is no version before that time it is exit 1."""
    put(NOON, channel_backup(5))
    assert "no version" in restore(reader, home, "--before", NOON.isoformat(), code=1).stderr


@pytest.mark.parametrize("args", [("--before", "2026-03-01", "--key", "x"), ("surplus",)])
def test_wrong_usage(reader: dict[str, str], home: Path, args: tuple[str, ...]) -> None:
    """Options that exclude each other or are unknown are wrong usage."""
    assert "usage:" in restore(reader, home, *args, code=2).stderr


@pytest.mark.parametrize(
    "time",
    [
        "yesterday",
        "",
        "2026-13-01",
        "1772366400",
        "12:00",
        "0001-01-01T00:00+05:00",
        "9999-12-31T23:59-05:00",
    ],
)
def test_a_time_that_cannot_be_read(reader: dict[str, str], home: Path, time: str) -> None:
    """A time that cannot be read or reckoned with is wrong usage, and how to write it is shown."""
    done = restore(reader, home, "--before", time, code=2)
    assert "usage:" in done.stderr
    assert re.search(r"--before: write it like \d{4}-\d\d-\d\d\b", done.stderr)


def test_no_version_has_channels(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """When no version holds channels it is exit 1 with the key that restores one."""
    put(NOON, channel_backup(0))
    wanted = channel_backup(0)
    key = put(NOON + HOUR, wanted)
    assert f"--key {key}" in restore(reader, home, code=1).stderr
    restore(reader, home, "--key", key)
    assert (home / "channel.backup").read_bytes() == wanted


def test_others_are_left_alone(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """Other nodes' versions and foreign files are not restored; the prefix is told."""
    put(NOON, channel_backup(5), name="regtest/" + version_name(b"", NOON))
    put(NOON, channel_backup(5), name="channel.backup")
    assert re.search("alice/: .*no version", restore(reader, home, code=1).stderr)


# --- Only what is verified ---


DAMAGES = ["bytes", "size", "metadata", "name"]


def put_damaged(put: partial[str], at: datetime, damage: str) -> str:
    """Store a version that disagrees with itself, and return its key."""
    data = channel_backup(7)
    name = version_name(data, at)
    metadata = {"sha256": hashlib.sha256(data).hexdigest()}
    if damage == "bytes":
        data = bytes([data[0] ^ 1]) + data[1:]
    elif damage == "size":
        data = data[:-1]
    elif damage == "metadata":
        metadata = {"sha256": hashlib.sha256(b"").hexdigest()}
    else:
        name = name[:-6] + f"{int(name[-6:], 16) ^ 1:06x}"
    return put(at, data, name=name, metadata=metadata)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version(
    put: partial[str], reader: dict[str, str], home: Path, damage: str
) -> None:
    """When bytes, size, metadata or name disagree nothing is written, by choice or by key."""
    bad = put_damaged(put, NOON, damage)
    for which in ((), ("--key", bad)):
        assert re.search(f"{bad}.*damaged", restore(reader, home, *which, code=1).stderr)


def test_all_are_damaged(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """When no good version is left it is exit 1 in the end, and no command leads in a circle."""
    older, newer = (put_damaged(put, NOON + HOUR * hours, "bytes") for hours in (1, 2))
    done = restore(reader, home, code=1)
    assert newer in done.stderr
    done = run_script(reader, *command_for_the_one_before(done), cwd=home)
    assert (done.returncode, list(home.iterdir())) == (1, [])
    assert older in done.stderr
    assert command_for_the_one_before(done) == []


def test_too_short_to_be_a_version(put: partial[str], reader: dict[str, str], home: Path) -> None:
    """An object under 45 bytes is not restored, also not by key, and is not what the hint names."""
    bad = put(NOON, os.urandom(44))
    assert f"--key {bad}" not in restore(reader, home, code=1).stderr
    assert bad in restore(reader, home, "--key", bad, code=1).stderr


@pytest.mark.parametrize("given", ["file", "environment"])
def test_several_damaged_versions(
    put: partial[str], reader: dict[str, str], home: Path, tmp_path: Path, given: str
) -> None:
    """Each damaged version is named, and so is an empty one that is passed over; the commands that
    are printed for the one before run as they are printed, and lead to the next good one.
    """
    wanted = channel_backup(5)
    put(NOON, channel_backup(4))
    put(NOON + HOUR, wanted)
    empty = put(NOON + HOUR * 9, channel_backup(0))
    bad = [put_damaged(put, NOON + HOUR * hours, damage) for hours, damage in enumerate(DAMAGES, 2)]
    env, options = reader, []
    if given == "file":
        file = tmp_path / "my reader's.env"
        file.write_text("".join(f"{key}={value}\n" for key, value in reader.items()))
        env, options = {}, ["--env-file", str(file)]
    done = run_script(env, *options, "restore", cwd=home)
    assert empty in done.stderr
    for key in reversed(bad):
        assert (done.returncode, list(home.iterdir())) == (1, [])
        assert re.search(f"{key}.*damaged", done.stderr)
        done = run_script(env, *command_for_the_one_before(done), cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == wanted


def answered(metadata: str, digest: str, body: bytes, **more: str) -> Answer:
    """Return a version as S3 gives it, with its digest in this entry of the metadata."""
    headers = {metadata: digest, "Last-Modified": "Sun, 01 Mar 2026 12:00:00 GMT"}
    return Answer(headers=headers | more, body=body)


def test_a_store_that_writes_metadata_in_capitals(
    fake: FakeS3, fake_reader: dict[str, str], home: Path
) -> None:
    """The name of the metadata entry and its digest may have capitals, and the digest counts."""
    data = channel_backup(7)
    key = f"alice/{version_name(data, NOON)}"
    entry, digest = "X-Amz-Meta-Sha256", hashlib.sha256(data).hexdigest()
    fake.set_default(answered(entry, digest.upper(), data), "GET")
    assert "only the six digits" not in restore(fake_reader, home, "--key", key).stderr
    fake.set_default(answered(entry, "0" * 64, data), "GET")
    done = restore(fake_reader, home, "--key", key, "--output", "other", code=1)
    assert "damaged" in done.stderr
    assert (home / "channel.backup").read_bytes() == data


def test_a_bit_flipped_on_the_way(fake: FakeS3, fake_reader: dict[str, str], home: Path) -> None:
    """Bytes that change on the way are refused."""
    data = channel_backup(7)
    flipped = data[:99] + bytes([data[99] ^ 4]) + data[100:]
    key = f"alice/{version_name(data, NOON)}"
    entry, digest = "x-amz-meta-sha256", hashlib.sha256(data).hexdigest()
    checksum = {"x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(digest)).decode()}
    fake.set_default(answered(entry, digest, flipped, **checksum), "GET")
    assert "damaged" in restore(fake_reader, home, "--key", key, code=1).stderr
    fake.set_default(answered(entry, digest, data, **checksum), "GET")
    restore(fake_reader, home, "--key", key)
    assert (home / "channel.backup").read_bytes() == data


# --- Faults on the way ---


@contextlib.contextmanager
def half_downloaded(
    server: S3Server, env: dict[str, str], home: Path
) -> Iterator[tuple[FaultProxy, Script]]:
    """Run `restore` over a slow line until a part of the version has come."""
    with FaultProxy(server.host, server.port) as line:
        line.set("throttle", bps=400_000)
        env = env | {"AWS_ENDPOINT_URL_S3": line.endpoint(server.scheme)}
        with Script(env, "restore", cwd=home) as script:
            line.wait_until(lambda counts: counts.bytes_down > 200_000)
            yield line, script


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_s3_away_in_the_middle(
    put: partial[str], s3: S3Server, reader: dict[str, str], home: Path
) -> None:
    """When the download is cut it is exit 75, nothing is left, and the next try works."""
    data = os.urandom(2 << 20)
    put(NOON, data)
    with half_downloaded(s3, reader, home) as (line, script):
        line.set("pass", cut=True)
        assert script.wait() == 75, script.log
        assert (script.stdout, list(home.iterdir())) == ("", [])
        assert "Traceback" not in script.log
    restore(reader, home)
    assert (home / "channel.backup").read_bytes() == data


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt(put: partial[str], s3: S3Server, reader: dict[str, str], home: Path) -> None:
    """Ctrl-C in the middle of the download leaves nothing behind, and says nothing but exit 130."""
    put(NOON, os.urandom(8 << 20))  # the download is not over before the signal
    with half_downloaded(s3, reader, home) as (_, script):
        script.signal(signal.SIGINT)
        assert script.wait() == 130
        assert (script.stdout, list(home.iterdir())) == ("", [])
        assert not re.search("Traceback|fault", script.log)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_asking(fake: FakeS3, fake_reader: dict[str, str], home: Path) -> None:
    """Ctrl-C while S3 keeps one waiting works at once, too."""
    fake.hold()
    with Script(fake_reader, "restore", cwd=home) as script:
        fake.wait_for_requests(1, method="GET")
        script.signal(signal.SIGINT)
        assert script.wait() == 130
        assert not re.search("Traceback|fault", script.log)
    assert not list(home.iterdir())


@pytest.mark.parametrize("args", [(), ("--key", UNKNOWN)], ids=["list", "get"])
@pytest.mark.parametrize(
    "portal", [answers.PORTAL, answers.PORTAL_WITH_ETAG], ids=["page", "page-with-etag"]
)
def test_a_captive_portal(
    fake: FakeS3, fake_reader: dict[str, str], home: Path, args: tuple[str, ...], portal: Answer
) -> None:
    """The page of a captive portal is not taken for a bucket without versions, nor for a version;
    with an ETag it may pass for a damaged one.
    """
    fake.set_default(portal, "GET")
    done = run_script(fake_reader, "restore", *args, cwd=home)
    if portal is answers.PORTAL or not args:
        assert done.returncode == 75
        assert "the answer is not S3's" in done.stderr
        assert "damaged" not in done.stderr
    assert done.returncode in (1, 75)
    expect_tidy(home, done, set())


# --- Permissions ---


@pytest.mark.parametrize("may", ["put", "put, by key", "list"])
def test_a_key_that_may_not_read(
    put: partial[str], s3: S3Server, bucket: str, prefix: str, home: Path, may: str
) -> None:
    """A key that may only put, or list and not get, is exit 1; the hint is to use the reader's key,
    and nobody is told to let the node's key read.
    """
    key = put(NOON, channel_backup(5))
    listing = may == "list"
    user = s3.user(allow("s3:ListBucket", bucket)) if listing else s3.put_only_user(bucket, prefix)
    which = ("--key", key) if may == "put, by key" else ()
    done = restore(reader_settings(s3, bucket, prefix, user), home, *which, code=1)
    assert re.search(r"hint: .*\breader('s)? key", done.stderr)
    assert not re.search('"Effect"|"Allow"', done.stderr)


def test_what_a_restore_needs(
    put: partial[str], s3: S3Server, bucket: str, prefix: str, home: Path
) -> None:
    """With leave to list the bucket and to get below the prefix, and nothing else, it works."""
    put(NOON, channel_backup(5))
    user = s3.user(allow("s3:ListBucket", bucket), allow("s3:GetObject", f"{bucket}/alice/*"))
    restore(reader_settings(s3, bucket, prefix, user), home)


# --- What to do next ---


def printed_command(done: Done, words: str) -> list[str]:
    """Return the words of the line that holds these, without Python and the script."""
    (line,) = (line for line in done.stdout.splitlines() if words in line)
    python, script, *command = shlex.split(line)
    assert (python, Path(script)) == (sys.executable, SCRIPT)
    return command


@pytest.mark.parametrize("output", ["channel.backup", "two words.backup", "it's $HOME;#.backup"])
def test_the_next_steps(put: partial[str], reader: dict[str, str], home: Path, output: str) -> None:
    """What is printed can be pasted: the path, quoted, in each command; verifying first."""
    put(NOON, channel_backup(5))
    done = restore(reader, home, "--output", output)
    path = shlex.quote(str(home / output))
    steps = ["verifychanbackup", "restorechanbackup"]
    places = [done.stdout.index(f"lncli {step} --multi_file {path}\n") for step in steps]
    assert places == sorted(places)
    for never in ("channel.db", "two nodes of one seed", "scbforceclose"):
        assert never in done.stdout
    assert done.stdout.count("never") == 3
    assert len(done.stdout.splitlines()) < 25


@pytest.mark.parametrize("when", ["in time", "named later than stored", "by key"])
def test_the_version_before(
    put: partial[str], reader: dict[str, str], home: Path, when: str
) -> None:
    """The printed command for the version before restores that version beside the first."""
    older = channel_backup(4)
    put(NOON, older)
    late = datetime.now(UTC) + timedelta(days=365)
    key = put(late if when == "named later than stored" else NOON + HOUR, channel_backup(5))
    if when == "by key":
        put(NOON + 2 * HOUR, channel_backup(6))
    chosen = ("--key", key) if when == "by key" else ()
    done = restore(reader, home, "--output", "two words.backup", *chosen)
    again = run_script(reader, *printed_command(done, "restore --"), cwd=home)
    assert again.returncode == 0, again.stderr
    (restored,) = (path for path in home.iterdir() if path.name != "two words.backup")
    assert restored.read_bytes() == older


def test_the_steps_of_the_recovery_page(
    put: partial[str], s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """The page's commands, pasted with one's own values, lead to the file."""
    wanted = channel_backup(5)
    put(NOON, wanted)
    page = (CHECKOUT / "docs" / "recovery.md").read_text(encoding="utf-8")
    day = page[page.index("### 5. ") : page.index("### 8. ")]
    steps = "".join(re.findall(r"^```sh\n(.*?)^```", day, re.MULTILINE | re.DOTALL))
    assert "channels.py list\n" in steps
    assert "channels.py restore --output ~/recovery/" in steps
    own = {
        "my-lnd-backups": bucket,
        "my-node/": "alice/",
        "eu-central-1": "us-east-1",
        "https://s3.example.org": s3.endpoint,
    }
    for example, value in own.items():
        assert example in steps
        steps = steps.replace(example, value)
    python = home / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o700)
    (home / SCRIPT.name).symlink_to(SCRIPT)
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-euc", steps],
        env=script_environment({}, str(home)),
        cwd=home,
        input=f"{reader['AWS_ACCESS_KEY_ID']}\n{reader['AWS_SECRET_ACCESS_KEY']}\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    restored = home / "recovery" / "channel.backup"
    assert restored.read_bytes() == wanted
    assert stat.S_IMODE(restored.parent.stat().st_mode) == 0o700
    assert f"lncli verifychanbackup --multi_file {restored}" in done.stdout
    assert reader["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
