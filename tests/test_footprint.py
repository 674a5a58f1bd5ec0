"""What the daemon costs the node stays what it is: memory, modules and bytes, counted beside a bare
process with boto3.

The round trips are counted in test_round_trips.py, each one exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kit import Daemon, FakeS3, FaultProxy, Installed, Lnd, Script, channel_backup, install

if TYPE_CHECKING:
    from collections.abc import Iterator

GROWTH_MAX = 1.15  # of what is written down here; where it shrinks, the new figure belongs here
MEMORY = 1.03  # that no other process shares, of the twin's
PEAK = 1.05  # of the twin's
MODULES = 1.11  # of the twin's
HEAD_BYTES = 862  # sent with each version beside its bytes
MEMORY_WITH_10_000_STAGED = 1.1  # at most, of that with none

# A bare process with a boto3 client, after one put.
TWIN = """
import signal, sys, boto3
boto3.client("s3").put_object(Bucket="some-bucket", Key="key", Body=open(sys.argv[1], "rb").read())
print("stored s3://", file=sys.stderr, flush=True)
signal.pause()
"""


def kilobytes(pid: int, file: str, name: str) -> int:
    """Return a size that the kernel gives for a process."""
    return int(
        re.findall(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)[
            0
        ]
    )


def memory(pid: int) -> int:
    """Return the memory of a process that it shares with no other, and that is in no file: what it
    has allocated.
    """
    return kilobytes(pid, "smaps_rollup", "Anonymous")


def modules(script: Script) -> int:
    """Return how many modules a process has loaded that was told to say so."""
    return len(set(re.findall(r"^import time:.*\| *(\S+)$", script.log, re.MULTILINE)))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Return the program as the service runs it, and measure no coverage, which is memory too."""
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return install(tmp_path / "site")


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    """Return an S3 that stores everything."""
    with FakeS3() as fake:
        yield fake


@pytest.fixture
def twin_settings(fake: FakeS3) -> dict[str, str]:
    """Return what the twin needs, and the daemon too."""
    return {
        "AWS_ACCESS_KEY_ID": "AKID",
        "AWS_SECRET_ACCESS_KEY": "SECRET",
        "AWS_ENDPOINT_URL_S3": fake.endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@pytest.fixture
def settings(
    twin_settings: dict[str, str], installed: Installed, lnd: Lnd, staging: Path
) -> dict[str, str]:
    """Return what the daemon needs."""
    return (
        twin_settings
        | installed.environment
        | {
            "MONITOR_FILE_PATH": str(lnd.path),
            "BACKUP_DIRECTORY": str(staging),
            "S3_BUCKET_NAME": "some-bucket",
        }
    )


def wait_until_settled(daemon: Daemon) -> None:
    """Block until a version is stored, and all that follows is done."""
    daemon.systemd.wait_for("STATUS=stored .*, 0 staged")


def test_memory(
    settings: dict[str, str],
    twin_settings: dict[str, str],
    installed: Installed,
    lnd: Lnd,
    staging: Path,
) -> None:
    """Idle and at its peak, the daemon's memory is that part of a bare process's with a boto3
    client that it was.
    """
    lnd.write()
    with (
        Daemon(settings, installed.command) as daemon,
        Script(twin_settings, str(lnd.path), command=[sys.executable, "-c", TWIN]) as twin,
    ):
        twin.wait_for_log("stored s3://")
        wait_until_settled(daemon)
        ratio = memory(daemon.pid) / memory(twin.pid)
        peak = kilobytes(daemon.pid, "status", "VmHWM") / kilobytes(twin.pid, "status", "VmHWM")
    assert not list(staging.glob("2*"))
    print(f"memory {ratio:.3f}, peak {peak:.3f} of the twin's")  # noqa: T201
    assert ratio <= MEMORY * GROWTH_MAX
    assert peak <= PEAK * GROWTH_MAX


def test_modules(
    settings: dict[str, str], twin_settings: dict[str, str], installed: Installed, lnd: Lnd
) -> None:
    """Until its first version is stored, the daemon loads as many modules as it did, which is most
    of its start.
    """
    lnd.write()
    told = {"PYTHONPROFILEIMPORTTIME": "1"}
    with (
        Script(settings | told, command=installed.command) as script,
        Script(twin_settings | told, str(lnd.path), command=[sys.executable, "-c", TWIN]) as twin,
    ):
        script.wait_for_log("stored s3://")
        twin.wait_for_log("stored s3://")
        counts = modules(script), modules(twin)
    print(f"{counts[0]} modules, {counts[1]} of the twin")  # noqa: T201
    assert counts[0] <= counts[1] * MODULES * GROWTH_MAX


def test_bytes_of_an_update(
    settings: dict[str, str], fake: FakeS3, installed: Installed, lnd: Lnd
) -> None:
    """A version costs its own bytes on the line, and a head of the length that it had."""
    with FaultProxy("127.0.0.1", fake.port) as line, contextlib.ExitStack() as stack:
        through = settings | {"AWS_ENDPOINT_URL_S3": line.endpoint()}
        script = stack.enter_context(Script(through, command=installed.command))
        for number, channels in enumerate((0, 10, 100), 1):
            line.reset_counts()
            version = lnd.write(channels)
            script.wait_for_log("stored s3://", count=number)
            head = line.counts.bytes_up - len(version.data)
            print(f"{head} bytes beside {len(version.data)}")  # noqa: T201
            assert 0 < head <= HEAD_BYTES * GROWTH_MAX


def test_memory_with_many_staged(
    settings: dict[str, str], installed: Installed, lnd: Lnd, staging: Path, tmp_path: Path
) -> None:
    """Ten thousand staged versions that cannot be sent cost next to no memory, idle or at its
    peak.
    """
    lnd.write()
    other = tmp_path / "empty"
    other.mkdir(mode=0o700)
    for number in range(10_000):
        data = channel_backup(0)
        (
            staging / f"20260101T000000.{number:06}Z-{hashlib.sha256(data).hexdigest()[-6:]}"
        ).write_bytes(data)
    with FaultProxy("127.0.0.1", 9) as line:
        line.set("refuse")
        away = settings | {"AWS_ENDPOINT_URL_S3": line.endpoint()}
        with (
            Daemon(away, installed.command) as full,
            Daemon(away | {"BACKUP_DIRECTORY": str(other)}, installed.command) as empty,
        ):
            staged = [
                int(daemon.systemd.wait_for(r"STATUS=.*?(\d+) staged.*cannot store")[1])
                for daemon in (full, empty)
            ]
            ratios = [
                kilobytes(full.pid, file, name) / kilobytes(empty.pid, file, name)
                for file, name in (("smaps_rollup", "Anonymous"), ("status", "VmHWM"))
            ]
    print(f"{staged[0]} staged: {ratios[0]:.3f}, {ratios[1]:.3f} of the memory without")  # noqa: T201
    assert staged == [10_001, 1]
    assert max(ratios) <= MEMORY_WITH_10_000_STAGED
