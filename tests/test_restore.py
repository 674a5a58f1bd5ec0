"""What `restore` does on the worst day: the right version, verified, and what to do with it."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from kit import (
    CHECKOUT,
    PATIENCE_SECONDS,
    SCRIPT,
    Answer,
    FakeS3,
    FaultProxy,
    RawS3,
    Request,
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
    command_for_the_one_before,
    env_file,
    restore,
    restored_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from functools import partial
    from pathlib import Path

    from shared import Env

UNKNOWN = "20260301T120000.000000Z-a1b2c3"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C reach what is started, also where the tests themselves are deaf to it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


# --- Which version ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_trap(put: partial[str], reader: Env, home: Path) -> None:
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


@pytest.mark.parametrize("prefix", ["", "alice/"], ids=["key", "name"])
def test_a_key(put: partial[str], reader: Env, home: Path, prefix: str) -> None:
    """`--key` takes the whole key, which need not lie under the prefix, and the name alone."""
    wanted = channel_backup(5)
    key = put(NOON, wanted).removeprefix(prefix)
    put(NOON + HOUR, channel_backup(6))
    env = reader | {"S3_BACKUP_PREFIX": prefix or "bob/"}
    assert restored_bytes(env, home, "--key", key) == wanted


@pytest.mark.parametrize("key", [f"alice/{UNKNOWN}", UNKNOWN, "no such"])
def test_an_unknown_key(put: partial[str], reader: Env, home: Path, key: str) -> None:
    """It is named, and the hint is how to find another version, not to try again."""
    put(NOON, channel_backup(5))
    done = restore(reader, home, "--key", key, code=1)
    error, hint = (line for line in done.stderr.splitlines() if "error: " in line)
    assert key in error
    assert "NoSuchKey" in error
    assert re.search(r"\blist\b|--before", hint)
    assert not re.search("stag|retr|again", error + hint)


def test_an_empty_key(put: partial[str], reader: Env, home: Path) -> None:
    """An empty key, as from a variable that is not set, is no order to take the newest."""
    put(NOON, channel_backup(5))
    restore(reader, home, "--key", "", code=1)


@pytest.mark.parametrize(
    ("before", "zone", "expected"),
    [
        ("2026-03-03", "", 2),
        ("2026-03-03T00:00", "XST+05", 3),
        ("2026-03-03", "XST-05", 1),
        ("2026-03-02T21:00Z", "XST-05", 1),
        ("2026-03-02T21:00:00.000001Z", "", 2),
        ("2026-03-02T16:00:00.000001-05:00", "", 2),
        ("2099-01-01", "", 3),
    ],
)
def test_before(
    put: partial[str], reader: Env, home: Path, before: str, zone: str, expected: int
) -> None:
    """`--before` takes a date or a time, local or with its offset, and means strictly before."""
    data = {count: channel_backup(count) for count in (1, 2, 3)}
    put(datetime(2026, 3, 1, 12, tzinfo=UTC), data[1])
    put(datetime(2026, 3, 2, 21, tzinfo=UTC), data[2])
    put(datetime(2026, 3, 3, 3, tzinfo=UTC), data[3])
    env = reader | ({"TZ": zone} if zone else {})
    assert restored_bytes(env, home, "--before", before) == data[expected]


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(seconds=20), timedelta(days=365)])
def test_before_a_name(put: partial[str], reader: Env, home: Path, ahead: timedelta) -> None:
    """A version's name, as `list` prints it, never means that version, whatever its clock."""
    older = channel_backup(1)
    first = put(NOON, older).removeprefix("alice/")
    second = put(datetime.now(UTC) + ahead, channel_backup(2)).removeprefix("alice/")
    said = restore(reader, home, "--before", first, code=1).stderr
    assert "alice/: there is no version before" in said
    assert restored_bytes(reader, home, "--before", second) == older


@pytest.mark.parametrize("args", [("--before", "2026-03-01", "--key", "x"), ("surplus",)])
def test_wrong_usage(reader: Env, home: Path, args: tuple[str, ...]) -> None:
    """Options that exclude each other or are unknown are wrong usage."""
    assert "usage:" in restore(reader, home, *args, code=2).stderr


@pytest.mark.parametrize(
    "time", ["yesterday", "", "1772366400", "0001-01-01T00:00+05:00", "9999-12-31T23:59-05:00"]
)
def test_a_time_that_cannot_be_read(reader: Env, home: Path, time: str) -> None:
    """A time that cannot be read or reckoned with is wrong usage, and how to write it is shown."""
    done = restore(reader, home, "--before", time, code=2)
    assert re.search(r"--before: write it like \d{4}-\d\d-\d\d\b", done.stderr)


def test_no_version_has_channels(put: partial[str], reader: Env, home: Path) -> None:
    """When no version holds channels it is exit 1 with the key that restores one."""
    put(NOON, channel_backup(0))
    wanted = channel_backup(0)
    key = put(NOON + HOUR, wanted)
    assert f"--key {key}" in restore(reader, home, code=1).stderr
    assert restored_bytes(reader, home, "--key", key) == wanted


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
def test_a_damaged_version(put: partial[str], reader: Env, home: Path, damage: str) -> None:
    """Nothing is written, by choice or by key, and no command leads in a circle."""
    bad = put_damaged(put, NOON, damage)
    done = restore(reader, home, code=1)
    assert re.search(f"{bad}.*damaged", done.stderr)
    assert command_for_the_one_before(done) == []
    assert re.search(f"{bad}.*damaged", restore(reader, home, "--key", bad, code=1).stderr)


def test_too_short_to_be_a_version(put: partial[str], reader: Env, home: Path) -> None:
    """An object under 45 bytes is not restored, also not by key, and is not what the hint names."""
    bad = put(NOON, os.urandom(44))
    assert f"--key {bad}" not in restore(reader, home, code=1).stderr
    assert bad in restore(reader, home, "--key", bad, code=1).stderr


def test_several_damaged_versions(
    put: partial[str], reader: Env, home: Path, tmp_path: Path
) -> None:
    """The commands run as they are printed, and lead from each to the next good one."""
    wanted = channel_backup(5)
    put(NOON, channel_backup(4))
    put(NOON + HOUR, wanted)
    bad = [put_damaged(put, NOON + HOUR * hours, damage) for hours, damage in enumerate(DAMAGES, 2)]
    directory = tmp_path / "my reader's"
    directory.mkdir()
    done = run_script({}, "--env-file", env_file(directory, reader), "restore", cwd=home)
    for key in reversed(bad):
        assert (done.returncode, list(home.iterdir())) == (1, [])
        assert re.search(f"{key}.*damaged", done.stderr)
        done = run_script({}, *command_for_the_one_before(done), cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == wanted


DATA = channel_backup(7)
SHA256 = hashlib.sha256(DATA)
METADATA = {
    "metadata": {
        "x-amz-meta-sha256": SHA256.hexdigest(),
        "x-amz-checksum-sha256": base64.b64encode(SHA256.digest()).decode(),
    },
    "metadata in capitals": {"X-Amz-Meta-Sha256": SHA256.hexdigest().upper()},
}


@pytest.mark.parametrize("headers", METADATA.values(), ids=METADATA)
def test_a_bit_flipped_on_the_way(
    fake: FakeS3, fake_reader: Env, home: Path, headers: dict[str, str]
) -> None:
    """Bytes that change on the way are refused; the digest counts however a store writes it."""
    key = f"alice/{version_name(DATA, NOON)}"
    flipped = DATA[:99] + bytes([DATA[99] ^ 4]) + DATA[100:]
    fake.set_default(Answer(headers=headers, body=flipped), "GET")
    assert "damaged" in restore(fake_reader, home, "--key", key, code=1).stderr
    fake.set_default(Answer(headers=headers, body=DATA), "GET")
    assert "only the six digits" not in restore(fake_reader, home, "--key", key).stderr
    assert (home / "channel.backup").read_bytes() == DATA


# --- Faults on the way ---


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_s3_away_in_the_middle(
    put: partial[str], s3: S3Server, s3_line: FaultProxy, reader: Env, home: Path
) -> None:
    """When the download is cut it is exit 75, nothing is left, and the next try works."""
    data = os.urandom(2 << 20)
    put(NOON, data)
    s3_line.set("throttle", bps=400_000)
    env = reader | {"AWS_ENDPOINT_URL_S3": s3_line.endpoint(s3.scheme)}
    with Script(env, "restore", cwd=home) as script:
        s3_line.wait_until(lambda counts: counts.bytes_down > 200_000)
        s3_line.set("pass", cut=True)
        assert script.wait() == 75, script.log
    assert (script.stdout, list(home.iterdir())) == ("", [])
    assert "Traceback" not in script.log
    assert restored_bytes(reader, home) == data


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "begin",
    [b"", answers.head(headers={"Content-Length": "718"}) + bytes(99)],
    ids=["asking", "downloading"],
)
def test_an_interrupt(reader: Env, home: Path, begin: bytes) -> None:
    """Ctrl-C while S3 keeps one waiting leaves nothing behind, and says nothing but exit 130."""
    begun = threading.Event()

    def reply(_: Request) -> Iterator[bytes | float]:
        yield begin
        begun.set()
        yield PATIENCE_SECONDS

    with RawS3(reply) as raw:
        env = reader | {"AWS_ENDPOINT_URL_S3": raw.endpoint}
        with Script(env, "restore", "--key", UNKNOWN, cwd=home) as script:
            assert begun.wait(PATIENCE_SECONDS)
            script.signal(signal.SIGINT)
            assert script.wait() == 130
    assert (script.stdout, list(home.iterdir())) == ("", [])
    assert not re.search("Traceback|fault", script.log)


@pytest.mark.parametrize(
    ("portal", "code"), [(answers.PORTAL, 75), (answers.PORTAL_WITH_ETAG, 1)], ids=["page", "etag"]
)
def test_a_captive_portal(
    fake: FakeS3, fake_reader: Env, home: Path, portal: Answer, code: int
) -> None:
    """It is no bucket without versions, nor a version; with an ETag it seems damaged."""
    fake.set_default(portal, "GET")
    assert "the answer is not S3's" in restore(fake_reader, home, code=75).stderr
    said = restore(fake_reader, home, "--key", UNKNOWN, code=code).stderr
    assert ("the answer is not S3's" if code == 75 else "damaged") in said


# --- Permissions ---


@pytest.mark.parametrize(
    ("may", "command"),
    [("put", "list"), ("put", "restore"), ("put", f"restore --key {UNKNOWN}"), ("list", "restore")],
)
def test_a_key_that_may_not_read(
    put: partial[str], s3: S3Server, bucket: str, prefix: str, home: Path, may: str, command: str
) -> None:
    """The hint is to use the reader's key; nobody is told to let the node's key read."""
    put(NOON, channel_backup(5))
    lister, put_only = s3.user(allow("s3:ListBucket", bucket)), s3.put_only_user(bucket, prefix)
    env = reader_settings(s3, bucket, prefix, lister if may == "list" else put_only)
    done = run_script(env, *command.split(), cwd=home)
    assert (done.returncode, done.stdout, list(home.iterdir())) == (1, "", [])
    assert "Traceback" not in done.stderr
    assert re.search(r"hint: .*\breader('s)? key", done.stderr)
    assert not re.search('"Effect"|"Allow"', done.stderr)


# --- What to do next ---


@pytest.mark.parametrize("output", ["channel.backup", "two words.backup", "it's $HOME;#.backup"])
def test_the_next_steps(put: partial[str], reader: Env, home: Path, output: str) -> None:
    """What is printed can be pasted: the path, quoted, in each command; verifying first."""
    wanted = channel_backup(5)
    put(NOON, wanted)
    done = restore(reader, home, "--output", output)
    assert {path.name: path.read_bytes() for path in home.iterdir()} == {output: wanted}
    path = shlex.quote(str(home / output))
    steps = ["verifychanbackup", "restorechanbackup"]
    places = [done.stdout.index(f"lncli {step} --multi_file {path}\n") for step in steps]
    assert places == sorted(places)
    for never in ("channel.db", "two nodes of one seed", "scbforceclose"):
        assert never in done.stdout
    assert done.stdout.count("never") == 3
    assert len(done.stdout.splitlines()) < 25


@pytest.mark.parametrize("when", ["in time", "named later than stored", "by key"])
def test_the_version_before(put: partial[str], reader: Env, home: Path, when: str) -> None:
    """The printed command for the version before restores that version beside the first."""
    older = channel_backup(4)
    put(NOON, older)
    late = datetime.now(UTC) + timedelta(days=365)
    key = put(late if when == "named later than stored" else NOON + HOUR, channel_backup(5))
    if when == "by key":
        put(NOON + 2 * HOUR, channel_backup(6))
    chosen = ("--key", key) if when == "by key" else ()
    done = restore(reader, home, "--output", "two words.backup", *chosen)
    again = run_script(reader, *command_for_the_one_before(done), cwd=home)
    assert again.returncode == 0, again.stderr
    assert (home / "two words.backup.before").read_bytes() == older


def test_the_steps_of_the_recovery_page(
    put: partial[str], s3: S3Server, bucket: str, reader: Env, home: Path
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
    (home / "venv").symlink_to(sys.prefix)
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
