"""COPY_DIRECTORY keeps every version in a second place, and its absence is a problem, no more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from inside import true_name
from kit import VERSION_NAME, Daemon, FakeS3
from kit.script import LATE_ENOUGH
from shared import done_well, refused

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kit import Lnd
    from shared import Env


@pytest.fixture
def copies(tmp_path: Path, fake_env: Env) -> Path:
    """Return the second place, which is set and there."""
    directory = tmp_path / "stick"
    directory.mkdir()
    fake_env |= {"COPY_DIRECTORY": str(directory), "RESCAN_SECONDS": "0.1"}
    return directory


def kept(copies: Path) -> set[bytes]:
    """Return the versions in the second place, and expect nothing but versions there."""
    files = list(copies.iterdir())
    assert all(VERSION_NAME.fullmatch(file.name) for file in files), files
    return {file.read_bytes() for file in files}


def test_once_copies_and_a_second_time_adds_nothing(fake_env: Env, lnd: Lnd, copies: Path) -> None:
    """`once` keeps the version in the second place; the same bytes are not kept again."""
    version = lnd.write()
    for _ in range(2):
        done_well(fake_env)
        (file,) = copies.iterdir()
        assert kept(copies) == {version.data}
        assert file.stat().st_mode & 0o137 == 0


def test_a_stick_that_is_missing_is_told_and_nothing_is_made(
    fake_env: Env, lnd: Lnd, fake: FakeS3, copies: Path
) -> None:
    """Without the directory S3 still stores, the problem is told, and the copy follows later."""
    copies.rmdir()
    version = lnd.write()
    with Daemon(fake_env) as daemon:
        daemon.wait_for_stored(version)
        daemon.wait_for_log("error: cannot copy to COPY_DIRECTORY: .*No such file")
        assert not copies.exists()
        copies.mkdir()
        daemon.wait_for_log("COPY_DIRECTORY keeps versions again")
        assert kept(copies) == {version.data}
        newer = lnd.write()
        daemon.wait_for_stored(newer)
        assert daemon.stop() == 0
    assert kept(copies) == {version.data, newer.data}
    assert len(fake.requests) == 2


def test_a_directory_of_lnds_is_refused(
    fake_env: Env, lnd: Lnd, copies: Path, staging: Path
) -> None:
    """So is the staging directory, and any with LND's data, also behind a link."""
    lnd.write()
    for wrong in (lnd.directory / "below", f"{staging}/"):
        refused(fake_env | {"COPY_DIRECTORY": str(wrong)}, f"COPY_DIRECTORY={wrong}")
    (copies / "other").mkdir()
    (copies / "other/wallet.db").touch()
    for wrong, left in (
        (staging, {".lock", ".receipt"}),
        (lnd.directory, {lnd.path.name}),
        (copies / "other", {"wallet.db"}),
    ):
        link = copies / f"to-{wrong.name}"
        link.symlink_to(wrong)
        done = done_well(fake_env | {"COPY_DIRECTORY": str(link)})
        assert "cannot copy to COPY_DIRECTORY" in done.stderr
        assert {file.name for file in wrong.iterdir()} == left


def leave_staged(lnd: Lnd, staging: Path) -> Path:
    """Let LND write a version, which an earlier run has staged, and return the staged file."""
    data = lnd.write().data
    file = staging / true_name(data)
    file.write_bytes(data)
    return file


def test_a_version_staged_before_a_restart_is_copied(
    fake_env: Env, lnd: Lnd, staging: Path, copies: Path
) -> None:
    """Also if an earlier run staged it, and this one only sends it."""
    file = leave_staged(lnd, staging)
    done_well(fake_env)
    assert not file.exists()
    assert kept(copies) == {lnd.written[-1].data}


def test_a_file_that_is_not_the_version_is_no_copy(
    fake_env: Env, lnd: Lnd, staging: Path, copies: Path
) -> None:
    """Empty, as a stick leaves it that was pulled out, it is told and not overwritten."""
    empty = copies / leave_staged(lnd, staging).name
    empty.touch()
    told = done_well(fake_env).stderr
    assert re.search("error: cannot copy to COPY_DIRECTORY: .*File exists", told)
    assert empty.read_bytes() == b""


def test_a_file_that_cannot_be_read_is_no_copy(fake_env: Env, lnd: Lnd, copies: Path) -> None:
    """What bears a later version's name and cannot be read keeps no version from being copied."""
    version = lnd.write()
    other = copies / "98000101T000000.000000Z-abcdef"
    other.mkdir()
    done_well(fake_env)
    other.rmdir()
    assert kept(copies) == {version.data}


def test_a_second_place_that_hangs_delays_nothing(
    fake_env: Env, lnd: Lnd, copies: Path, started_by: Callable[[str], None]
) -> None:
    """As on a mount whose server is gone; a stop is an orderly one, too."""
    started_by(f"""{LATE_ENOUGH}
import os, threading
listdir = os.listdir
def hang(path="."):
    if str(path) == {str(copies)!r}:
        threading.Event().wait()
    return listdir(path)
os.listdir = hang
""")
    with Daemon(fake_env) as daemon:
        for _ in range(3):
            daemon.wait_for_stored(lnd.write())
        assert daemon.stop() == 0
    assert kept(copies) == set()
