"""Fixtures: one S3 server per scheme for the whole session, and a fresh bucket, user and LND for
each test.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from inside import NoS3
from kit import (
    NOBODY,
    Daemon,
    FakeS3,
    FaultProxy,
    Lnd,
    S3Server,
    assert_nothing_lost,
    foreign_settings,
    reader_settings,
    settings_at,
    settings_for,
)
from kit import script as script_module
from kit.script import LATE_ENOUGH, MEASURED, warm_starts, write_launcher
from shared import NOWHERE, SELDOM, SteppedS3, leave, put_version

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shared import Session


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of what runs inside this process."""
    for name in foreign_settings():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    program.new_session.cache_clear()  # of another test's settings


@pytest.fixture(autouse=True)
def _measured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the coverage of what a test starts in the first of its cases alone; a start costs
    twice as much with it.

    What only a later case reaches is missed, and so the report can be too low by that, and never
    too high.
    """
    case = getattr(request.node, "callspec", None)
    if (case and any(case.indices.values())) or request.node.get_closest_marker("unmeasured"):
        for name in MEASURED:
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="session")
def _warm_starts() -> Iterator[None]:
    """Load the program's libraries once for all tests of this process."""
    with warm_starts():
        yield


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the program cold where a test says that the start, memory or time is its subject."""
    if any(map(request.node.get_closest_marker, ("alone", "cold"))):
        monkeypatch.setattr(script_module, "warm_server", None)


@pytest.fixture(scope="session")
def s3_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return the session's server over http; tests must not stop or suspend it."""
    with S3Server(tmp_path_factory.mktemp("s3-http")) as server:
        yield server


@pytest.fixture(scope="session")
def s3_https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return the session's server over https; tests must not stop or suspend it."""
    with S3Server(tmp_path_factory.mktemp("s3-https"), tls=True) as server:
        yield server


@pytest.fixture
def scheme() -> str:
    """Return http; a test for which TLS makes a difference is run with both."""
    return "http"


@pytest.fixture
def s3(request: pytest.FixtureRequest, scheme: str) -> S3Server:
    server: S3Server = request.getfixturevalue(f"s3_{scheme}")
    return server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.create_bucket()


@pytest.fixture
def prefix() -> str:
    return "alice/"


@pytest.fixture
def lnd(tmp_path: Path) -> Lnd:
    """Return an LND that has not written yet."""
    return Lnd(tmp_path / "lnd")


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Path]:
    """Return an empty staging directory, which is let go of at the end."""
    directory = tmp_path / "staging"
    directory.mkdir(mode=0o700)
    yield directory
    leave(directory)


@pytest.fixture
def small_disk(staging: Path) -> Iterator[Path]:
    """Put the staging directory on a file system of its own, with room for a few versions."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(staging)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield staging
    subprocess.run(["umount", "--lazy", str(staging)], check=True)  # noqa: S607


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the working directory of the one who restores."""
    directory = tmp_path / "home"
    directory.mkdir()
    return directory


@pytest.fixture
def env(s3: S3Server, bucket: str, prefix: str, lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return the program's settings, with a key that may put below the prefix alone."""
    return settings_for(s3, bucket, prefix, lnd, staging)


@pytest.fixture
def reader(s3: S3Server, bucket: str, prefix: str) -> dict[str, str]:
    """Return the bucket's settings with a key that may list and get."""
    return reader_settings(s3, bucket, prefix, s3.reader_user(bucket))


@pytest.fixture
def node_reader(env: dict[str, str], reader: dict[str, str]) -> dict[str, str]:
    """Return the settings of a node with a key that may list and get."""
    return env | reader


@pytest.fixture
def put(s3: S3Server, bucket: str) -> partial[str]:
    return partial(put_version, s3, bucket)


@pytest.fixture
def check(lnd: Lnd, s3: S3Server, bucket: str, prefix: str, staging: Path) -> partial[None]:
    return partial(assert_nothing_lost, lnd, s3, bucket, prefix, staging)


@pytest.fixture
def session(env: dict[str, str], check: partial[None]) -> Session:
    """Return what runs the daemon, which has events alone to go by unless told otherwise, stops it
    in order, and then holds it to the invariant.
    """

    @contextlib.contextmanager
    def run(more: dict[str, str] = SELDOM, **allowed: Any) -> Iterator[Daemon]:  # noqa: ANN401 - passed on
        with Daemon(SELDOM | env | more) as daemon:
            yield daemon
            assert daemon.stop() == 0
        check(**allowed)

    return run


@pytest.fixture
def backed_up(session: Session, lnd: Lnd) -> Session:
    """Return what runs the daemon as `session` does, with LND's first version stored."""

    @contextlib.contextmanager
    def run(*args: Any, **allowed: Any) -> Iterator[Daemon]:  # noqa: ANN401 - passed on
        first = lnd.write()
        with session(*args, **allowed) as daemon:
            daemon.wait_for_stored(first)
            yield daemon

    return run


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    """Return a scripted S3 that stores everything unless it is told otherwise."""
    with FakeS3() as server:
        yield server


@pytest.fixture
def fake_env(fake: FakeS3, lnd: Lnd, staging: Path, prefix: str) -> dict[str, str]:
    return settings_at(fake.endpoint, lnd, staging, prefix=prefix)


@pytest.fixture
def fake_reader(fake: FakeS3, reader: dict[str, str]) -> dict[str, str]:
    return reader | {"AWS_ENDPOINT_URL_S3": fake.endpoint}


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a directory with a short path that every user can reach, and that the unprivileged one
    owns.
    """
    directory = Path(tempfile.mkdtemp(prefix="kit-", dir="/tmp"))
    directory.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(directory, NOBODY, NOBODY)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def started_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what makes some Python code run before the program, in its process."""

    def prepare(code: str) -> None:
        if not code.startswith(LATE_ENOUGH):
            monkeypatch.setattr(script_module, "warm_server", None)
        launcher = write_launcher(tmp_path / "launcher.py", code)
        monkeypatch.setattr(script_module, "SCRIPT", launcher)

    return prepare


@pytest.fixture
def unshared(started_by: Callable[[str], None]) -> Callable[..., None]:
    """Return what starts the program in namespaces of its own, after a command of the shell."""

    def prepare(*options: str, command: str = ":") -> None:
        unshare = ["unshare", *options, "sh", "-c", f'{command} && exec "$@"', "sh"]
        if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
            pytest.skip(f"there is no unshare {' '.join(options)} for this user")
        program = [*unshare, sys.executable]
        started_by(f"import os, sys\nos.execvp('unshare', [*{program!r}, SCRIPT, *sys.argv[1:]])")

    return prepare


@pytest.fixture
def stepped(env: dict[str, str]) -> Iterator[SteppedS3]:
    """Return a scripted S3 that holds its answers back, and let the program use it."""
    with SteppedS3() as fake:
        env["AWS_ENDPOINT_URL_S3"] = fake.endpoint
        yield fake


@pytest.fixture
def check_stepped(
    lnd: Lnd, stepped: SteppedS3, bucket: str, prefix: str, staging: Path
) -> partial[None]:
    return partial(assert_nothing_lost, lnd, stepped, bucket, prefix, staging)


@pytest.fixture
def s3_line(s3: S3Server, env: dict[str, str]) -> Iterator[FaultProxy]:
    """Return a line to the server that fails on demand and counts, and let the program use it."""
    with FaultProxy(s3.host, s3.port) as line:
        env["AWS_ENDPOINT_URL_S3"] = line.endpoint(s3.scheme)
        yield line


@pytest.fixture
def written_env(fake_env: dict[str, str], lnd: Lnd) -> dict[str, str]:
    """Return the settings for the scripted S3, with a version on disk."""
    lnd.write()
    return fake_env


@pytest.fixture
def bare_env(lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return settings that lack the endpoint, with a file to back up."""
    lnd.write()
    env = settings_at("", lnd, staging) | {"SHUTDOWN_GRACE_SECONDS": "0"}
    del env["AWS_ENDPOINT_URL_S3"]
    return env


@pytest.fixture
def good(lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return settings without a fault, for an S3 that is not there."""
    return {
        "MONITOR_FILE_PATH": str(lnd.path),
        "BACKUP_DIRECTORY": str(staging),
        "S3_BUCKET_NAME": "bucket",
        "AWS_ENDPOINT_URL_S3": NOWHERE,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "geheim",
    }


@pytest.fixture
def queue(staging: Path) -> program.Staging:
    return program.Staging(staging)


@pytest.fixture
def mute_daemon(lnd: Lnd, staging: Path) -> Callable[[], program.Daemon]:
    env = settings_at(NOWHERE, lnd, staging) | {"RESCAN_SECONDS": "0.05"}
    settings = program.load_settings(env, "run")
    return lambda: program.Daemon(settings, NoS3("some-bucket", "alice/", {}))


@pytest.fixture
def look(mute_daemon: Callable[[], program.Daemon], staging: Path) -> Callable[[], None]:
    """Return what looks at the file once, as `once` does, and stages what is to be staged."""

    async def scenario() -> None:
        (one := mute_daemon()).stop.set()
        await one.run()

    def once() -> None:
        leave(staging)
        asyncio.run(scenario())

    return once


@pytest.fixture
def _log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lnd-backup")
