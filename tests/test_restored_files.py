"""Which files `restore` writes and where: new ones alone, and those before a drop as well."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import (
    Answer,
    FakeS3,
    Lnd,
    S3Server,
    Script,
    channel_backup,
    reader_settings,
    run_script,
    version_name,
)
from kit.script import LATE_ENOUGH
from shared import (
    HOUR,
    NOON,
    command_for_the_one_before,
    restore,
    restored_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from functools import partial

    from shared import Done, Env


# --- Where it is written ---


THERE: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_bytes(b"mine"),
    "directory": Path.mkdir,
    "dangling": lambda path: path.symlink_to("elsewhere"),
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("make", THERE.values(), ids=THERE)
def test_the_output_exists(
    put: partial[str], reader: Env, home: Path, make: Callable[[Path], object]
) -> None:
    """What exists is never overwritten, followed or written into."""
    put(NOON, channel_backup(5))
    there = home / "channel.backup"
    make(there)
    before = Lnd(home).fingerprint()
    assert str(there) in restore(reader, home, code=1).stderr
    restore(reader, home, "--output", str(there), code=1)
    assert Lnd(home).fingerprint() == before


LNDS_DIRECTORIES = {  # what is there, what is to be written, and what is monitored
    "wallet": ("data/wallet.db", "data/restored", ""),
    "by a link": ("data/wallet.db", "link/restored", ""),
    "where it runs": ("data/wallet.db", "restored", ""),
    "below lnd.conf": ("data/lnd.conf", "data/below/restored", ""),
    "below .lnd": ("data/.lnd/any", "data/.lnd/below/restored", ""),
    "monitored": ("data/channel.backup", "data/restored", "data/channel.backup"),
    "monitored, by a link": ("data/channel.backup", "link/restored", "data/channel.backup"),
    "monitored by a link": ("data/channel.backup", "data/restored", "link/channel.backup"),
    "monitored is a link": ("data/channel.backup", "data/restored", "links/channel.backup"),
    "beside a link": ("data/channel.backup", "links/restored", "links/channel.backup"),
}


@pytest.mark.parametrize("case", LNDS_DIRECTORIES)
def test_the_output_in_lnds_directory(
    put: partial[str], reader: Env, tmp_path: Path, case: str
) -> None:
    """By whatever way it is named, and below LND's home also before there is a wallet."""
    put(NOON, channel_backup(5))
    there, output, monitored = LNDS_DIRECTORIES[case]
    directory = tmp_path / "data"
    for path in ("data/below", "data/.lnd/below", "links"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / there).touch()
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "links" / "channel.backup").symlink_to(directory / "channel.backup")
    before = Lnd(directory).fingerprint()
    given = output if output == "restored" else str(tmp_path / output)
    env = reader | ({"MONITOR_FILE_PATH": str(tmp_path / monitored)} if monitored else {})
    assert "directory of LND's" in restore(env, directory, "--output", given, code=1).stderr
    assert Lnd(directory).fingerprint() == before


def test_an_output_that_cannot_be_costs_no_download(
    fake: FakeS3, fake_reader: Env, home: Path
) -> None:
    """What cannot be written is told before S3 is asked for anything, with what to do."""
    (home / "there").touch()
    for output in ("nowhere/channel.backup", "there"):
        done = restore(fake_reader, home, "--output", output, code=1)
        assert str(home / output) in done.stderr
        assert re.search("hint: .*--output", done.stderr)
    assert fake.requests == []


def test_a_full_disk(put: partial[str], reader: Env, home: Path) -> None:
    """When the disk takes only a part it is exit 1 and nothing is left; with room it works."""
    data = os.urandom(1 << 20)
    put(NOON, data)
    limited = ["/bin/sh", "-c", 'ulimit -f 1024; exec "$@"', "sh"]  # blocks of 512 bytes
    done = restore(reader, home, code=1, wrapper=limited)
    assert f"{home}/channel.backup: File too large" in done.stderr
    assert restored_bytes(reader, home) == data


@pytest.mark.parametrize("umask", ["000", "777"])
def test_the_mode(put: partial[str], reader: Env, home: Path, umask: str) -> None:
    """The file is its owner's alone, whatever the umask, and whoever holds what a crash left."""
    wanted = channel_backup(5)
    put(NOON, wanted)
    left = home / ".channel.backup.partial"
    left.touch()
    with left.open("rb+") as held:
        restore(reader, home, wrapper=["/bin/sh", "-c", f'umask {umask}; exec "$@"', "sh"])
        held.write(b"forged")
    assert (home / "channel.backup").read_bytes() == wanted
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600


# --- The versions before a drop ---


def history(put: partial[str], *sizes: int) -> tuple[list[bytes], list[str]]:
    """Store a version of each size, one after the other, and return them and their keys."""
    data = [os.urandom(size) for size in sizes]
    keys = [put(NOON + HOUR * hours, each) for hours, each in enumerate(data)]
    return data, keys


def restored(home: Path) -> dict[str, bytes]:
    """Return what is in the directory, by the end of its name."""
    return {path.name.removeprefix("channel.backup"): path.read_bytes() for path in home.iterdir()}


def lncli(done: Done, step: str = "restorechanbackup") -> list[str]:
    """Return the files that LND is to be given by the printed lines, in order."""
    lines = re.findall(rf"lncli {step} --multi_file (.*)", done.stdout)
    return [shlex.split(line)[0] for line in lines]


ENDS = ("", ".2", ".3", ".4")
SHRINKING: dict[str, tuple[list[int], list[int]]] = {  # sizes; which of them are restored
    "no drop": ([700, 1400, 1400], [2]),
    "one": ([2000, 1400, 1400, 1500], [3, 0]),
    "the latest three of four": ([8000, 7000, 7000, 6000, 6500, 5000, 4000], [6, 5, 4, 2]),
    "a drop and nothing after": ([2000, 1700], [1, 0]),
    "no drop by a byte": ([2000, 1701], [1]),
    "a recovery under the old prefix": ([5000, 1179, 801, 423, 45], [3, 2, 1, 0]),
    "an empty version between": ([5000, 45, 900], [2, 0]),
    "garbage between": ([700, 7, 650], [2]),
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("case", SHRINKING)
def test_the_versions_before_the_drops(
    put: partial[str], reader: Env, home: Path, case: str
) -> None:
    """The last version before each of the three latest drops is restored as well, each is told with
    its key and digest, and all of them are given to LND in order. More drops are warned of.
    """
    sizes, numbers = SHRINKING[case]
    data, keys = history(put, *sizes)
    done = restore(reader, home)
    expected = dict(zip(ENDS, numbers, strict=False))
    assert restored(home) == {end: data[number] for end, number in expected.items()}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in home.iterdir())
    files = {f"{home}/channel.backup{end}": number for end, number in expected.items()}
    assert done.stdout.splitlines()[: len(files)] == [
        f"restored {keys[number]} as {file}: {sizes[number]} bytes, "
        f"SHA-256 {hashlib.sha256(data[number]).hexdigest()}"
        for file, number in files.items()
    ]
    assert lncli(done) == list(files)
    assert lncli(done, "verifychanbackup") == list(files)
    assert ("more drops than three" in done.stderr) == (case == "the latest three of four")


@pytest.mark.unmeasured
def test_which_drops_count(put: partial[str], reader: Env, home: Path) -> None:
    """With `--key` none, with `--before` those until then; the output's name is numbered."""
    data, keys = history(put, 5000, 4000, 3000, 2000)
    restore(reader, home, "--key", keys[2], "--output", "key")
    restore(reader, home, "--before", (NOON + 2 * HOUR).isoformat(), "--output", "before")
    restore(reader, home, "--output", "my file")
    assert restored(home) == {
        "key": data[2],
        "before": data[1],
        "before.2": data[0],
        "my file": data[3],
        "my file.2": data[2],
        "my file.3": data[1],
        "my file.4": data[0],
    }


@pytest.mark.unmeasured
def test_a_file_for_a_version_before_a_drop_is_there(
    put: partial[str], reader: Env, home: Path
) -> None:
    """It is left as it is, the others are written, and a warning names it."""
    data, _ = history(put, 5000, 4000, 3000)
    path = home / "channel.backup.2"
    path.write_bytes(b"mine")
    done = restore(reader, home)
    assert restored(home) == {"": data[2], ".2": b"mine", ".3": data[0]}
    assert f"warning: left out: {path}: cannot restore: {path}: File exists" in done.stderr
    assert lncli(done) == [f"{home}/channel.backup", f"{home}/channel.backup.3"]


@pytest.mark.unmeasured
@pytest.mark.parametrize("fault", ["damaged", "unreadable"])
def test_a_version_before_a_drop_that_cannot_be_had(
    put: partial[str], s3: S3Server, bucket: str, reader: Env, home: Path, fault: str
) -> None:
    """If one of them cannot be had, a warning names it, and its number is left out."""
    data, keys = history(put, 5000, 4000, 3000, 2000)
    if fault == "damaged":
        s3.admin.put_object(Bucket=bucket, Key=keys[1], Body=data[1][::-1])
    else:
        may = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        denied = [f"arn:aws:s3:::{bucket}/{keys[1]}"]
        user = s3.user(may, {"Effect": "Deny", "Action": "s3:GetObject", "Resource": denied})
        reader = reader_settings(s3, bucket, "alice/", user)
    done = restore(reader, home)
    assert restored(home) == {"": data[3], ".2": data[2], ".4": data[0]}
    told = done.stderr.splitlines()[-2]
    assert re.search(rf"warning: left out: .*channel\.backup\.3: .*{keys[1]}", told)
    assert lncli(done) == [f"{home}/channel.backup{end}" for end in ("", ".2", ".4")]
    assert run_script(reader, *command_for_the_one_before(done), cwd=home).returncode == 0
    assert restored(home)[".3"] == data[0]


# --- File systems that lack something ---


NO_LINKS = f"""{LATE_ENOUGH}
import errno, os, stat
def refuse(*_, **__):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
os.link = refuse
"""

FILES_AND_NOTHING_MORE = f"""{NO_LINKS}
os.chmod = os.fchmod = refuse
synced = os.fsync
def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        refuse()
    synced(descriptor)
os.fsync = fsync
"""


@pytest.mark.unmeasured
def test_a_file_system_that_lacks_something(
    put: partial[str], reader: Env, home: Path, started_by: Callable[[str], None]
) -> None:
    """Without links (exFAT, SMB), modes, and the sync of a directory it is written whole."""
    wanted = channel_backup(2)
    put(NOON, wanted)
    started_by(FILES_AND_NOTHING_MORE)
    assert restored_bytes(reader, home) == wanted
    assert stat.S_IMODE((home / "channel.backup").stat().st_mode) == 0o600
    restore(reader, home, code=1)
    assert restored(home) == {"": wanted}


@pytest.mark.unmeasured
@pytest.mark.parametrize("code", [LATE_ENOUGH, NO_LINKS], ids=["links", "no links"])
def test_the_output_appears_meanwhile(
    fake: FakeS3, fake_reader: Env, home: Path, started_by: Callable[[str], None], code: str
) -> None:
    """A file that appears while the version is being downloaded is not overwritten, either."""
    started_by(code)
    data = channel_backup(5)
    fake.set_default(Answer(body=data), "GET")
    fake.hold()
    with Script(fake_reader, "restore", "--key", version_name(data, NOON), cwd=home) as script:
        fake.wait_for_requests(1, method="GET")
        (home / "channel.backup").write_bytes(b"mine")
        fake.release()
        assert script.wait() == 1
        assert "Traceback" not in script.log
    assert restored(home) == {"": b"mine"}
