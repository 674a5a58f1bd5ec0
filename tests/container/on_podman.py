"""The image, run by podman as docs/containers.md says: another user, no capabilities, a read-only
root and named volumes; against the kit's S3 server on loopback. See `make test-container`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
import time
from typing import TYPE_CHECKING, Self

import pytest
from container.prepare import CACHE, IMAGE, PODMAN
from kit import Lnd, S3Server, Script, Written, allow, reader_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PREFIX = "alice/"
STUCK_SECONDS = 90.0
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def podman(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*PODMAN, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, encoding="utf-8", timeout=STUCK_SECONDS
    )
    assert not check or done.returncode == 0, f"podman {arguments[0]}: {done.stderr}"
    return done


class Sidecar:
    """How the image is run: the settings, the volumes and the options of container/compose.yaml."""

    def __init__(self, server: S3Server, lnd: Lnd) -> None:
        """Make a bucket, a put-only key, and a volume of the bucket's name."""
        self.server, self.lnd, self.bucket = server, lnd, server.create_bucket()
        self.staging: str | Path = self.bucket
        self.user = "10001:10001"
        self.more: list[str] = []
        key = server.put_only_user(self.bucket, PREFIX)
        self.settings = reader_settings(server, self.bucket, PREFIX, key)
        podman("volume", "create", self.bucket)

    def options(self) -> list[str]:
        return [
            *("--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"),
            *("--network=host", "--cgroups=disabled", f"--ulimit=nofile={OPEN_FILES}:{OPEN_FILES}"),
            *("--ulimit=nproc=4096:4096", f"--user={self.user}"),
            f"--volume={self.lnd.directory}:/lnd-scb:ro",
            f"--volume={self.staging}:/staging",
            *(f"--env={name}={value}" for name, value in self.settings.items()),
            *self.more,
        ]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one command of the program in a container of its own."""
        return podman("run", "--rm", *self.options(), IMAGE, *arguments, check=False)

    def stored(self) -> list[bytes]:
        return [entry.data for entry in self.server.objects(self.bucket).values()]


class Running(Script):
    """The daemon in a container; leaving the `with` block removes it."""

    def __init__(self, sidecar: Sidecar) -> None:
        """Start it as compose does, without a command of its own."""
        self.name = sidecar.bucket
        command = [*PODMAN, "run", f"--name={self.name}", *sidecar.options()]
        super().__init__({}, IMAGE, command=command)

    def __enter__(self) -> Self:
        self.wait_for_log("watching")
        return self

    def close(self) -> None:
        podman("rm", "--force", "--time=0", self.name)
        super().close()

    def wait_until(self, verb: str, version: Written) -> None:
        """Block until the version is stored, or captured."""
        self.wait_for_log(rf"{verb} \S+-{version.sha256[-6:]}\b")

    def is_healthy(self) -> bool:
        """Run the image's health check once, as the engine would, and return its verdict."""
        code = podman("healthcheck", "run", self.name, check=False).returncode
        return {0: True, 1: False}[code]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return a server of this file's own, because it is suspended."""
    with S3Server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def sidecar(server: S3Server, tmp_path: Path) -> Iterator[Sidecar]:
    """Return a sidecar with everything new, beside an LND that has a directory for the file."""
    lnd = Lnd(tmp_path / "lnd-scb")
    lnd.directory.chmod(0o755)  # a volume is, and LND makes no directory there but its archive
    made = Sidecar(server, lnd)
    yield made
    podman("volume", "rm", "--force", made.bucket)


def test_the_image_runs_as_nobody_and_checks_its_health_seldom() -> None:
    [image] = json.loads(podman("image", "inspect", IMAGE).stdout)
    assert image["Config"]["User"] == "10001:10001"
    assert image["Config"]["Entrypoint"] == ["lnd-backup"]
    assert image["Healthcheck"]["Interval"] >= 300 * 10**9
    assert image["Healthcheck"]["Timeout"] > 60 * 10**9  # check gives up within a minute


def test_the_byte_code_is_in_the_image_and_pip_is_not(sidecar: Sidecar) -> None:
    """Nothing is compiled at a start, and nothing that installs packages is left."""
    sidecar.more = ["--entrypoint=/opt/lnd-backup/venv/bin/python"]
    told = sidecar.command("-I", "-v", "-m", "s3_backup_lnd_channels", "once").stderr
    ours = re.findall(r"^# code object from '?(/opt/\S+)", told, re.MULTILINE)
    assert any("s3_backup_lnd_channels" in name for name in ours)
    assert [name for name in ours if not name.rstrip("'").endswith(".pyc")] == []
    assert sidecar.command("-I", "-m", "pip", "--version").returncode == 1


@pytest.mark.parametrize("user", ["10001:10001", "1000:1000", "0:0"])
def test_a_new_volume_works_for_every_user(sidecar: Sidecar, user: str) -> None:
    """`once` and `check` succeed with a new volume, whoever the container runs as: the staging
    directory is the program's own, and LND's directory is not touched.
    """
    sidecar.user = user
    written = sidecar.lnd.write(3)
    before = sidecar.lnd.fingerprint()
    done = sidecar.command("once")
    assert done.returncode == 0, done.stderr
    assert sidecar.stored() == [written.data]
    staging = (CACHE / "store/volumes" / sidecar.bucket / "_data/lnd-backup").stat()
    assert f"{staging.st_uid}:{staging.st_gid}" == user
    assert staging.st_mode & 0o777 == 0o700
    assert sidecar.command("check").returncode == 0
    assert sidecar.lnd.fingerprint() == before


def test_a_reader_lists_and_restores(sidecar: Sidecar, tmp_path: Path) -> None:
    """With the reader's key and a directory to write to, the image is all that a recovery needs."""
    written = sidecar.lnd.write(3)
    assert sidecar.command("once").returncode == 0
    reader = sidecar.server.reader_user(sidecar.bucket)
    sidecar.settings = reader_settings(sidecar.server, sidecar.bucket, PREFIX, reader)
    out = tmp_path / "recovery"
    out.mkdir()
    os.chown(out, 10001, 10001)
    sidecar.more = [f"--volume={out}:/recovery"]
    assert sidecar.command("list").stdout.count(f"-{written.sha256[-6:]} ") == 1
    done = sidecar.command("restore", "--output", "/recovery/channel.backup")
    assert done.returncode == 0, done.stderr
    assert (out / "channel.backup").read_bytes() == written.data


def test_it_stops_after_lnd_in_order(sidecar: Sidecar) -> None:
    """The daemon, as process 1, stores each version and LND's last one, and leaves in time."""
    with Running(sidecar) as daemon:
        for channels in (1, 2, 3):
            daemon.wait_until("stored", sidecar.lnd.write(channels))
        sidecar.lnd.write(4)
        began = time.monotonic()
        podman("stop", "--time=30", daemon.name)
        assert time.monotonic() - began < 12
        assert daemon.wait() == 0
    assert set(sidecar.stored()) == {version.data for version in sidecar.lnd.written}


def test_a_second_signal_ends_process_1_at_once(sidecar: Sidecar) -> None:
    """The kernel spares process 1 what it does not handle; a second signal ends it all the same."""
    with Running(sidecar) as daemon:
        daemon.wait_until("stored", sidecar.lnd.write(1))
        sidecar.server.suspend()
        try:
            daemon.wait_until("captured", sidecar.lnd.write(2))
            podman("kill", "--signal=TERM", daemon.name)
            daemon.wait_for_log(r"(?i)stop")
            podman("kill", "--signal=TERM", daemon.name)
            assert daemon.wait() == 143
        finally:
            sidecar.server.resume()


def test_what_waits_outlives_the_container(sidecar: Sidecar) -> None:
    """Versions captured while S3 is away lie on the volume, and the next container sends them."""
    with Running(sidecar) as daemon:
        daemon.wait_until("stored", sidecar.lnd.write(1))
        with gone(sidecar.server):
            last = sidecar.lnd.write(2)
            daemon.wait_until("captured", last)
            podman("kill", "--signal=KILL", daemon.name)
    assert last.data not in sidecar.stored()
    assert sidecar.command("once").returncode == 0
    assert last.data in sidecar.stored()


def test_the_health_check_tells_a_refused_backup_from_an_absent_s3(sidecar: Sidecar) -> None:
    """Healthy: the bucket holds the version, or S3 cannot be asked (75). Unhealthy: it does not."""
    with Running(sidecar) as daemon:
        assert not daemon.is_healthy()  # LND has written nothing yet
        daemon.wait_until("stored", sidecar.lnd.write(1))
        assert daemon.is_healthy()
        with gone(sidecar.server):
            assert podman("exec", daemon.name, "lnd-backup", "check", check=False).returncode == 75
            assert daemon.is_healthy()
        refuse_puts(sidecar.server, sidecar.bucket)
        daemon.wait_until("captured", sidecar.lnd.write(2))
        assert daemon.is_healthy()  # it was written just now
        long_ago = time.time() - 11 * 60
        os.utime(sidecar.lnd.path, (long_ago, long_ago))
        assert not daemon.is_healthy()


@pytest.mark.parametrize(
    ("user", "group", "mode", "directory", "code"),
    [
        # A volume whose top the program may write to: it makes a directory of its own.
        pytest.param(0, 2000, 0o2775, "/staging/lnd-backup", 0, id="fsGroup"),
        pytest.param(1000, 1000, 0o755, "/staging/lnd-backup", 0, id="chowned"),
        pytest.param(1000, 1000, 0o700, "/staging", 0, id="chowned-itself"),
        pytest.param(1000, 1000, 0o755, "/staging", 0, id="chowned-itself-open"),
        # And one that it refuses.
        pytest.param(0, 2000, 0o2775, "/staging", 78, id="fsGroup-itself"),
        pytest.param(0, 0, 0o755, "/staging/lnd-backup", 78, id="root"),
    ],
)
def test_who_may_own_the_staging_volume(
    sidecar: Sidecar, tmp_path: Path, user: int, group: int, mode: int, directory: str, code: int
) -> None:
    """The table in docs/containers.md: which owners of the volume work, and which do not."""
    own_volume(sidecar, tmp_path / "volume", user, group, mode)
    sidecar.settings["BACKUP_DIRECTORY"] = directory
    sidecar.lnd.write(1)
    done = sidecar.command("once")
    assert done.returncode == code, done.stderr
    assert code == 0 or "BACKUP_DIRECTORY" in done.stderr


@pytest.mark.parametrize("user", ["10001:10001", "0:0"])
def test_a_new_volume_is_no_staging_directory_itself(sidecar: Sidecar, user: str) -> None:
    """Others may write to the top of a new volume, so it is refused, also when root runs it."""
    sidecar.user = user
    sidecar.settings["BACKUP_DIRECTORY"] = "/staging"
    sidecar.lnd.write(1)
    assert sidecar.command("once").returncode == 78


def test_fsgroup_applied_again_takes_the_staging_directory_away(
    sidecar: Sidecar, tmp_path: Path
) -> None:
    """Kubernetes lets the group write to all that is in the volume, at each start of a pod unless
    fsGroupChangePolicy is OnRootMismatch. A directory that others may write to is refused.
    """
    own_volume(sidecar, tmp_path / "volume", 0, 2000, 0o2775)
    sidecar.lnd.write(1)
    assert sidecar.command("once").returncode == 0
    staging = tmp_path / "volume" / "lnd-backup"
    staging.chmod(staging.stat().st_mode | 0o2770)  # what the kubelet does
    assert sidecar.command("once").returncode == 78


def own_volume(sidecar: Sidecar, directory: Path, user: int, group: int, mode: int) -> None:
    """Mount somebody's directory of the host, as it is, and run as user 1000 with its group."""
    directory.mkdir()
    os.chown(directory, user, group)
    directory.chmod(mode)
    sidecar.staging = directory
    sidecar.user = "1000:1000"
    sidecar.more = [f"--group-add={group}"]


@contextlib.contextmanager
def gone(server: S3Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


def refuse_puts(server: S3Server, bucket: str) -> None:
    statement = allow("s3:PutObject", f"{bucket}/*") | {"Effect": "Deny", "Principal": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    server.admin.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
