"""Fixtures: one S3 server per scheme for the whole session, and a fresh bucket, user and LND for each test."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from kit import Lnd, S3Server, foreign_settings, settings_for
from kit import script as script_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of what runs inside this process."""
    for name in foreign_settings():
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


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


@pytest.fixture(params=["http", "https"])
def s3(request: pytest.FixtureRequest) -> S3Server:
    """Return the session's server, over http and then over https, since the SDK takes another path over each."""
    server: S3Server = request.getfixturevalue(f"s3_{request.param}")
    return server


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """Return a server over http of this test alone, to be stopped, suspended and killed."""
    with S3Server(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """Return a fresh bucket."""
    return s3.create_bucket()


@pytest.fixture
def prefix() -> str:
    """Return the prefix of the program's keys."""
    return "alice/"


@pytest.fixture
def lnd(tmp_path: Path) -> Lnd:
    """Return an LND that has not written yet."""
    return Lnd(tmp_path / "lnd")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    """Return an empty staging directory."""
    directory = tmp_path / "staging"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def env(s3: S3Server, bucket: str, prefix: str, lnd: Lnd, staging: Path) -> dict[str, str]:
    """Return the settings of the program, with a key that may put below the prefix and nothing else."""
    return settings_for(s3, bucket, prefix, lnd, staging)


@pytest.fixture
def started_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return what makes some Python code run before the program, in its process."""

    def prepare(code: str) -> None:
        script = str(script_module.SCRIPT)
        launcher = tmp_path / "launcher.py"
        launcher.write_text(f"import runpy\nSCRIPT = {script!r}\n{code}\nrunpy.run_path(SCRIPT, run_name='__main__')\n")
        monkeypatch.setattr(script_module, "SCRIPT", launcher)

    return prepare
