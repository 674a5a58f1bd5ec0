"""Which files `restore` writes and where: new ones alone, and those before a drop as well."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    SCRIPT,
    FakeS3,
    FaultProxy,
    Lnd,
    S3Server,
    Script,
    channel_backup,
    reader_settings,
    run_script,
    version_name,
)
from shared import HOUR, NOON, Done, expect_tidy, put_version, restore

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

SLOW_BYTES_PER_SECOND = 400_000


def wrapped(env: dict[str, str], home: Path, wrapper: Sequence[str], *args: str) -> Done:
    """Run the program by another command, in that directory."""
    return run_script(env, *args, cwd=home, command=[*wrapper, sys.executable, str(SCRIPT)])


DATA = channel_backup(1)


# --- Where it is written ---


def test_the_output(s3: S3Server, bucket: str, reader: dict[str, str], home: Path) -> None:
    """`--output` names the file, and nothing else appears beside it."""
    wanted = channel_backup(5)
    put_version(s3, bucket, NOON, wanted)
    restore(reader, home, "--output", "sub.backup")
    assert [path.name for path in home.iterdir()] == ["sub.backup"]
    assert (home / "sub.backup").read_bytes() == wanted


@pytest.mark.parametrize("what", ["file", "empty", "directory", "dangling", "fifo"])
def test_the_output_exists(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, what: str
) -> None:
    """What exists is never overwritten, followed or written into."""
    put_version(s3, bucket, NOON, channel_backup(5))
    output = home / "channel.backup"
    if what == "directory":
        output.mkdir()
    elif what == "dangling":
        output.symlink_to(home / "elsewhere")
    elif what == "fifo":
        os.mkfifo(output)
    else:
        output.write_bytes(b"mine" if what == "file" else b"")
    before = Lnd(home).fingerprint()
    assert str(output) in restore(reader, home, code=1).stderr
    restore(reader, home, "--output", str(output), code=1)
    assert Lnd(home).fingerprint() == before


def test_the_output_appears_meanwhile(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """A file that appears while the version is being downloaded is not overwritten, either."""
    put_version(
        s3, bucket, NOON, os.urandom(2 << 20)
    )  # some seconds are left when the file appears
    with FaultProxy(s3.host, s3.port) as proxy:
        proxy.set("throttle", bps=SLOW_BYTES_PER_SECOND)
        with Script(
            reader | {"AWS_ENDPOINT_URL_S3": proxy.endpoint()}, "restore", cwd=home
        ) as script:
            proxy.wait_until(lambda counts: counts.bytes_down > SLOW_BYTES_PER_SECOND // 2)
            (home / "channel.backup").write_bytes(b"mine")
            assert script.wait() == 1
            assert "Traceback" not in script.log
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [
        ("channel.backup", b"mine")
    ]


@pytest.mark.parametrize(
    ("mark", "way"),
    [
        ("wallet.db", "direct"),
        ("channel.db", "direct"),
        ("readonly.macaroon", "direct"),
        ("chan-backup-archives", "direct"),
        ("wallet.db", "link"),
        ("wallet.db", "working directory"),
    ],
)
def test_the_output_in_lnds_directory(
    s3: S3Server, bucket: str, reader: dict[str, str], tmp_path: Path, mark: str, way: str
) -> None:
    """Nothing is written into a directory that looks like LND's, by whatever way it is named."""
    put_version(s3, bucket, NOON, channel_backup(5))
    directory = tmp_path / "data"
    directory.mkdir()
    (directory / mark).touch()
    (tmp_path / "link").symlink_to(directory)
    before = Lnd(directory).fingerprint()
    output = {"direct": directory, "link": tmp_path / "link", "working directory": Path()}[
        way
    ] / "restored"
    done = run_script(reader, "restore", "--output", str(output), cwd=directory)
    assert (done.returncode, done.stdout) == (1, "")
    assert "LND" in done.stderr
    assert Lnd(directory).fingerprint() == before


@pytest.mark.parametrize("way", ["direct", "link", "monitored by link", "file is a link"])
def test_the_output_beside_the_monitored_file(
    s3: S3Server, bucket: str, reader: dict[str, str], tmp_path: Path, way: str
) -> None:
    """Nothing is written beside the monitored file, also where links hide that it is there."""
    put_version(s3, bucket, NOON, channel_backup(5))
    lnd = Lnd(tmp_path / "lnd")
    lnd.write()
    (tmp_path / "link").symlink_to(lnd.directory)
    (tmp_path / "channel.backup").symlink_to(lnd.path)
    monitored = {
        "monitored by link": tmp_path / "link/channel.backup",
        "file is a link": tmp_path / "channel.backup",
    }
    output = (tmp_path / "link" if way == "link" else lnd.directory) / "restored"
    before = lnd.fingerprint()
    env = reader | {"MONITOR_FILE_PATH": str(monitored.get(way, lnd.path))}
    done = run_script(env, "restore", "--output", str(output))
    assert (done.returncode, done.stdout) == (1, "")
    assert "LND" in done.stderr
    assert lnd.fingerprint() == before


def test_a_missing_directory(s3: S3Server, bucket: str, reader: dict[str, str], home: Path) -> None:
    """A directory that is not there is exit 1, and is not made."""
    put_version(s3, bucket, NOON, channel_backup(5))
    assert "nowhere" in restore(reader, home, "--output", "nowhere/channel.backup", code=1).stderr


@pytest.mark.parametrize(
    "which", [(), ("--key", "alice/20260301T120000.000000Z-a1b2c3")], ids=["newest", "key"]
)
def test_an_output_that_cannot_be_costs_no_download(
    reader: dict[str, str], home: Path, which: tuple[str, ...]
) -> None:
    """A missing directory, or a file that is there, is told before S3 is asked for anything, with
    what to do.
    """
    (home / "there").touch()
    with FakeS3() as fake:
        env = reader | {"AWS_ENDPOINT_URL_S3": fake.endpoint}
        for output in ("nowhere/channel.backup", "there"):
            done = run_script(env, "restore", "--output", output, *which, cwd=home)
            assert (done.returncode, done.stdout) == (1, "")
            assert str(home / output) in done.stderr
            assert re.search("hint: .*--output", done.stderr)
        assert fake.requests == []
    assert [path.name for path in home.iterdir()] == ["there"]


def test_no_permission_to_write(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """Without permission to write it is exit 1 with the path and the reason."""
    put_version(s3, bucket, NOON, channel_backup(5))
    ordinary = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    home.chmod(0o500)
    try:
        done = wrapped(reader, home, ordinary, "restore")
    finally:
        home.chmod(0o700)
    assert done.returncode == 1
    assert f"{home / 'channel.backup'}: Permission denied" in done.stderr
    expect_tidy(home, done, set())


def test_a_full_disk(s3: S3Server, bucket: str, reader: dict[str, str], home: Path) -> None:
    """When the disk takes only a part it is exit 1 and nothing is left; with room it works."""
    data = os.urandom(1 << 20)
    put_version(s3, bucket, NOON, data)
    limited = ["/bin/sh", "-c", 'ulimit -f 1024; exec "$@"', "sh"]  # blocks of 512 bytes
    done = wrapped(reader, home, limited, "restore")
    assert done.returncode == 1
    assert str(home / "channel.backup") in done.stderr
    expect_tidy(home, done, set())
    restore(reader, home)
    assert (home / "channel.backup").read_bytes() == data


@pytest.mark.parametrize("umask", ["000", "022", "077", "777"])
def test_the_mode(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, umask: str
) -> None:
    """The file is its owner's alone, whatever the umask."""
    put_version(s3, bucket, NOON, channel_backup(5))
    done = wrapped(reader, home, ["/bin/sh", "-c", f'umask {umask}; exec "$@"', "sh"], "restore")
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600


def test_the_mode_after_a_crash(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """What was left under the temporary name, open to all, neither stops a restore nor becomes the
    file.
    """
    wanted = channel_backup(5)
    put_version(s3, bucket, NOON, wanted)
    left = home / ".channel.backup.partial"
    left.write_bytes(b"left")
    left.chmod(0o666)
    with left.open("rb+") as held:
        run_script(reader, "restore", cwd=home)
        held.write(b"forged")
    assert (home / "channel.backup").read_bytes() == wanted
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600


def test_next_steps_that_cannot_be_printed(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """When stdout takes nothing it is exit 1 and one line, and what is at the path is the whole
    version or nothing.
    """
    wanted = channel_backup(5)
    put_version(s3, bucket, NOON, wanted)
    done = wrapped(reader, home, ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"], "restore")
    assert done.returncode == 1
    assert len(re.findall("error: (?!hint)", done.stderr)) == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.read_bytes() for path in home.iterdir()] in ([], [wanted])


# --- The versions before a drop ---


def history(s3: S3Server, bucket: str, *sizes: int) -> list[bytes]:
    """Store a version of each size, one after the other, and return them."""
    data = [os.urandom(size) for size in sizes]
    for hours, each in enumerate(data):
        put_version(s3, bucket, NOON + HOUR * hours, each)
    return data


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


@pytest.mark.unmeasured
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


@pytest.mark.unmeasured
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


@pytest.mark.unmeasured
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
    told, hint = done.stderr.splitlines()[-2:]
    assert re.search(rf"warning: left out: .*channel\.backup\.3: .*{key}", told)
    assert lncli(done) == [str(home / f"channel.backup{name}") for name in ("", ".2", ".4")]
    _, *words = shlex.split(hint.partition(" is the version before it: ")[2])
    assert run_script(reader, *words[1:], cwd=home).returncode == 0
    assert restored(home)[".3"] == data[0]


@pytest.mark.unmeasured
def test_the_newest_is_damaged_and_the_drops_count(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """The command of the hint restores the version before, and those before the drops as well."""
    data = history(s3, bucket, 5000, 4000, 3000)
    key = "alice/" + version_name(data[2], NOON + 2 * HOUR)
    s3.admin.put_object(Bucket=bucket, Key=key, Body=data[2][::-1])
    done = restore(reader, home, code=1)
    _, *words = shlex.split(done.stderr.partition(" is the version before it: ")[2])
    assert run_script(reader, *words[1:], cwd=home).returncode == 0
    assert restored(home) == {"": data[1], ".2": data[0]}


@pytest.mark.unmeasured
@pytest.mark.parametrize("drops", [3, 4])
def test_more_drops_than_three_are_told(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path, drops: int
) -> None:
    """What is not restored although it precedes a drop is worth a warning."""
    history(s3, bucket, *(9000 - 1000 * number for number in range(drops + 1)))
    assert ("more drops than three" in restore(reader, home).stderr) == (drops > 3)


@pytest.mark.unmeasured
def test_every_file_is_told_with_its_key_and_digest(
    s3: S3Server, bucket: str, reader: dict[str, str], home: Path
) -> None:
    """Somebody who compares the files with the bucket finds them all in the output."""
    data = history(s3, bucket, 5000, 4000)
    lines = restore(reader, home).stdout.splitlines()
    for line, number, end in zip(lines, (1, 0), ("", ".2"), strict=False):
        key = "alice/" + version_name(data[number], NOON + number * HOUR)
        digest = hashlib.sha256(data[number]).hexdigest()
        file = home / f"channel.backup{end}"
        told = f"restored {key} as {file}: {len(data[number])} bytes, SHA-256 {digest}"
        assert line == told


@pytest.mark.unmeasured
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


# --- File systems that lack something ---


LACKING = {
    "links": "os.link = refusing(os.link, errno.EPERM)",
    "modes": "os.chmod = os.fchmod = refusing(os.chmod, errno.EPERM)",
    "sync of a directory": """
synced = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    synced(descriptor)
os.fsync = fsync""",
}

LACKING |= {"everything": "\n".join(LACKING.values())}

REFUSING = """
import errno, os, stat
def refusing(_, number):
    def call(*arguments, **more):
        {first}
        raise OSError(number, os.strerror(number))
    return call
"""


@pytest.mark.unmeasured
@pytest.mark.parametrize("lacking", LACKING)
def test_a_file_system_that_lacks_something(
    s3: S3Server,
    bucket: str,
    prefix: str,
    home: Path,
    started_by: Callable[[str], None],
    lacking: str,
) -> None:
    """Where there are no hard links (exFAT, SMB), no modes, or no sync of a directory, the version
    is written whole, and nothing is overwritten.
    """
    wanted = channel_backup(2)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    started_by(REFUSING.format(first="pass") + LACKING[lacking])
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [
        ("channel.backup", wanted)
    ]
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600
    (home / "channel.backup").write_bytes(b"mine")
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 1
    assert [path.read_bytes() for path in home.iterdir()] == [b"mine"]


@pytest.mark.unmeasured
@pytest.mark.parametrize("what", ["file", "empty", "link"])
def test_what_appears_meanwhile_without_links(
    s3: S3Server,
    bucket: str,
    prefix: str,
    home: Path,
    started_by: Callable[[str], None],
    what: str,
) -> None:
    """Also without hard links, nothing that appears in the last moment is overwritten or
    followed.
    """
    wanted = channel_backup(2)
    s3.put_version(bucket, prefix + version_name(wanted, NOON), wanted)
    reader = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    path = str(home / "channel.backup")
    first = {
        "file": f'open({path!r}, "w").write("mine")',
        "empty": f'open({path!r}, "w").close()',
        "link": f"os.symlink({str(home / 'elsewhere')!r}, {path!r})",
    }[what]
    started_by(REFUSING.format(first=first) + LACKING["links"])
    done = run_script(reader, "restore", cwd=home)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (only,) = home.iterdir()
    assert only.is_symlink() == (what == "link")
    assert what == "link" or only.read_bytes() == (b"mine" if what == "file" else b"")


@pytest.mark.unmeasured
def test_garbage_does_not_hide_a_drop(home: Path, s3: S3Server) -> None:
    """An object too short to be a version, stored between two of them, hides no lost channel."""
    bucket, prefix = s3.create_bucket(), "alice/"
    both, one = channel_backup(2), channel_backup(1)
    for data in (both, b"garbage", one):
        s3.put_version(bucket, prefix + version_name(data, datetime.now(UTC)), data)
    raw_env = reader_settings(s3, bucket, prefix, s3.reader_user(bucket))
    done = run_script(raw_env, "restore", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "channel.backup").read_bytes() == one
    assert (home / "channel.backup.2").read_bytes() == both
    listed = json.loads(run_script(raw_env, "list", "--json").stdout)
    assert [each["size_bytes"] for each in listed] == [len(one), len(both)]
