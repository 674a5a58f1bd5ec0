"""Beside what is the program measured? Here are the contestants: this program, what operators would
run in its place, and bare puts as the floor. This says how each is installed and started, and makes
the world in which they work: one S3 server, lines to it, and an LND of its own for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from kit import (
    CHECKOUT,
    SCRIPT,
    Credentials,
    Lnd,
    S3Server,
    channel_backup,
    install,
    script_environment,
    settings_at,
    version_name,
)
from kit.line import Line
from kit.output import Text
from stores.servers import NotInstalledError, install_from_debian, make_venv, packages, run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kit import Written
    from kit.line import Stored

PROGRAM, BARE, CURL, RCLONE = "this program", "bare put_object", "curl --aws-sigv4", "rclone copyto"
AWS_V1, AWS_V2 = "aws s3 cp v1", "aws s3 cp v2"
REGION = "us-east-1"
PATIENCE_SECONDS = 30.0
WARM_UPS = 3
STARTS_AT_ONCE = 4
HERE = Path(__file__).resolve().parent
CACHE = CHECKOUT / ".cache/bench"


class Place(NamedTuple):
    """Where one contestant works, at the near end of a line."""

    lnd: Lnd
    home: Path
    staging: Path
    line: Line
    bucket: str
    prefix: str
    key: Credentials

    def stage(self, count: int) -> list[str]:
        """Stage so many versions, as this program does; return their SHA-256, oldest first."""
        staged = list(versions(count))
        for name, data in staged:
            path = self.staging / name
            path.touch(mode=0o600)
            path.write_bytes(data)
        os.sync()  # what waits has long been on disk; else the program's own syncs would write it
        return [hashlib.sha256(data).hexdigest() for _, data in staged]


def versions(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield the names and bytes of so many versions, oldest first, a second apart until now."""
    first = datetime.now(UTC) - timedelta(seconds=count)
    for number in range(count):
        data = channel_backup(1)
        yield version_name(data, first + timedelta(seconds=number)), data


class World(NamedTuple):
    """What the contestants share."""

    contestants: list[Contestant]
    directory: Path
    server: S3Server
    bucket: str
    key: Credentials
    numbers: Iterator[int]

    def line(self, scheme: str = "http", *, far: bool = False) -> Line:
        directory = self.directory / f"line-{next(self.numbers)}"
        return Line(self.server.port, directory, tls=scheme == "https", far=far)

    def place(self, name: str, line: Line) -> Place:
        """Make a place: an LND that has written once, and empty directories."""
        home = self.directory / f"{next(self.numbers)}-{name.replace(' ', '-')}"
        staging = home / "staging"
        staging.mkdir(mode=0o700, parents=True)
        lnd = Lnd(home / "lnd")
        lnd.write()
        return Place(lnd, home, staging, line, self.bucket, f"{home.name}/", self.key)

    @contextlib.contextmanager
    def running(self, contestants: Iterable[Contestant], line: Line) -> Iterator[list[Running]]:
        """Start contestants on one line, and yield them when each has stored its first version."""
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(STARTS_AT_ONCE) as pool:

            def start(contestant: Contestant) -> Running:
                place = self.place(contestant.name, line)
                running = stack.enter_context(Running(contestant, place))
                running.warm_up()
                return running

            yield list(pool.map(start, contestants))


@contextlib.contextmanager
def new_world(contestants: list[Contestant]) -> Iterator[World]:
    """Start a server, and make a bucket and its key; remove everything at the end."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name, S3Server(Path(name, "s3")) as server:
        bucket = server.create_bucket()
        key = server.read_write_user(bucket)  # some of the peers look before or after they put
        yield World(contestants, Path(name), server, bucket, key, itertools.count(1))


@dataclasses.dataclass
class Contestant:
    """What puts LND's file into S3. One that is fast takes every turn."""

    name: str
    _: dataclasses.KW_ONLY
    fast: bool = True
    version: str = dataclasses.field(default="", init=False)

    ready: ClassVar = r"^watching"  # in the line that says that the watch is armed
    done: ClassVar = r"^(?:uploaded|failed)"  # in the line that ends each upload
    keeps_connection: ClassVar = True
    is_floor: ClassVar = False  # is told of each file on stdin

    def install(self) -> None:
        """Install what is missing, and find out the version; raises NotInstalledError."""
        raise NotImplementedError

    def command(self, place: Place) -> Sequence[str | Path]:
        """Return the command that stores each version."""
        raise NotImplementedError

    def environment(self, place: Place) -> dict[str, str]:
        """Return what it needs beside PATH and HOME."""
        ca_file = {"AWS_CA_BUNDLE": str(place.line.ca_file)} if place.line.ca_file else {}
        return ca_file | {
            "AWS_ACCESS_KEY_ID": place.key.access_key,
            "AWS_SECRET_ACCESS_KEY": place.key.secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL_S3": place.line.endpoint,
        }


class Program(Contestant):
    """This program, as its service runs it."""

    ready = done = r" stored s3://"

    def install(self) -> None:
        """Install it beside the venv that runs the benchmark."""
        self.installed = install(CHECKOUT / ".cache/bench-program")
        said = run([sys.executable, SCRIPT, "--version"]).split()[-1]
        self.version = f"{said}, boto3 {packages(Path(sys.prefix), 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:  # noqa: ARG002 - all is in the environment
        return self.installed.command

    def environment(self, place: Place) -> dict[str, str]:
        settings = settings_at(
            place.line.endpoint,
            place.lnd,
            place.staging,
            bucket=place.bucket,
            prefix=place.prefix,
            user=place.key,
        )
        return super().environment(place) | self.installed.environment | settings


class Script(Contestant):
    """A script around a watcher of PyPI and one boto3 client that stays warm."""

    def install(self) -> None:
        venv, watcher = make_venv("watchers", HERE), self.name.split()[0]
        self.start = [venv / "bin/python", HERE / f"loops/{watcher}_boto3.py"]
        self.version = f"{packages(venv, watcher)}, boto3 {packages(venv, 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:
        return [*self.start, place.lnd.directory, place.bucket, place.prefix]


@dataclasses.dataclass
class Floor(Contestant):
    """A bare put by a warm client. A twin has the program's settings for malloc."""

    kind: str
    twin_of: Program | None = None

    ready, done = r"^ready", r"^put "
    is_floor = True

    def install(self) -> None:
        """Find out the version; it is installed in the venv that runs the benchmark."""
        self.version = f"boto3 {packages(Path(sys.prefix), 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:
        return [sys.executable, HERE / "loops/bare.py", self.kind, place.bucket, place.prefix]

    def environment(self, place: Place) -> dict[str, str]:
        unit = self.twin_of.installed.environment if self.twin_of else {}
        malloc = {name: value for name, value in unit.items() if name.startswith("MALLOC_")}
        return super().environment(place) | malloc


@dataclasses.dataclass
class Loop(Contestant):
    """A shell loop around inotifywait that starts a tool for each event; see the script.

    The loops that most guides show watch the file itself, or not while they upload, and lose more.
    The tool comes from a package of Debian, or none: then it is the AWS command line of PyPI.
    """

    package: tuple[str, ...]
    arguments: str
    _: dataclasses.KW_ONLY
    http: str = ""  # more arguments with this scheme
    https: str = ""
    fast: bool = False

    ready = r"^Watches established"
    keeps_connection = False

    def install(self) -> None:
        _, watcher = of_debian("inotify-tools", "inotifywait")
        self.tool, version = of_debian(*self.package) if self.package else aws_of_pypi()
        self.version = f"{version}, inotify-tools {watcher}"

    def upload(self, place: Place) -> list[str | Path]:
        """Return the tool with its arguments, the last of which is where to put the file."""
        values = {
            "path": place.lnd.path,
            "endpoint": place.line.endpoint,
            "host": place.line.endpoint.partition("//")[2],
            "ca_file": place.line.ca_file,
            "key": place.key.access_key,
            "secret": place.key.secret_key,
            "target": f"{place.bucket}/{place.prefix}",
        }
        options = self.https if place.line.scheme == "https" else self.http
        words = shlex.split(f"{options} {self.arguments}")
        return [self.tool, *(word.format_map(values) for word in words)]

    def command(self, place: Place) -> Sequence[str | Path]:
        *upload, target = self.upload(place)
        return ["sh", HERE / "loops/inotifywait.sh", place.lnd.directory, target, *upload]

    def environment(self, place: Place) -> dict[str, str]:
        """Return nothing where the arguments say all: rclone fails where AWS_CA_BUNDLE is set."""
        return {} if "{key}" in self.arguments else super().environment(place)

    def once(self, place: Place) -> Sequence[str | Path]:
        """Return what puts the file as it is now."""
        *upload, target = self.upload(place)
        return [*upload, f"{target}once.backup"]


def of_debian(package: str, command: str = "", major: str = "") -> tuple[Path, str]:
    """Install a package of Debian unless its command is there; return command and version.

    Whatever else PATH has under that name is not taken. Raises NotInstalledError.
    """
    path = Path("/usr/bin", command or package)
    if not path.exists():
        install_from_debian(package)
    version = run(["dpkg-query", "--show", "--showformat", "${Version}", package]).strip()
    if not version.startswith(major):
        raise NotInstalledError(f"this Debian's {package} is {version}")
    return path, version


def aws_of_pypi() -> tuple[Path, str]:
    """Install version 1, with its byte code compiled."""
    venv = make_venv("aws")
    return venv / "bin/aws", packages(venv, "awscli")


# It signs since 7.75, and 7.88 does not send a header that S3 wants.
CURL_ARGUMENTS = (
    "--fail --silent --show-error --aws-sigv4 aws:amz:us-east-1:s3 --user {key}:{secret} "
    "--header 'x-amz-content-sha256: UNSIGNED-PAYLOAD' --upload-file {path} {endpoint}/{target}"
)
# After the upload it checks what was stored.
RCLONE_ARGUMENTS = (
    "copyto --s3-provider Other --s3-endpoint {endpoint} --s3-region us-east-1 "
    "--s3-access-key-id {key} --s3-secret-access-key {secret} --s3-no-check-bucket --config '' "
    "{path} :s3:{target}"
)
S3CMD_ARGUMENTS = (
    "--config /dev/null --host {host} --host-bucket {host} --region us-east-1 "
    "--access_key {key} --secret_key {secret} --quiet put {path} s3://{target}"
)
S3CMD_HTTPS = "--ssl --ca-certs {ca_file}"
# Of both versions; version 2 of Debian 12 has no variable for the URL.
AWS_ARGUMENTS = "--endpoint-url {endpoint} s3 cp --only-show-errors {path} s3://{target}"

THIS = Program(PROGRAM)
BARE_PUT = Floor(BARE, "sdk")
TWIN = Floor("bare put_object, the unit's malloc", "sdk", THIS)  # for its memory alone
CONTESTANTS: list[Contestant] = [
    THIS,
    Script("watchdog + boto3"),
    Script("watchfiles + boto3", fast=False),
    Loop(CURL, ("curl",), CURL_ARGUMENTS, https="--cacert {ca_file}", fast=True),
    Loop(RCLONE, ("rclone",), RCLONE_ARGUMENTS, https="--ca-cert {ca_file}"),
    Loop("s3cmd put", ("s3cmd",), S3CMD_ARGUMENTS, http="--no-ssl", https=S3CMD_HTTPS),
    Loop(AWS_V1, (), AWS_ARGUMENTS),
    Loop(AWS_V2, ("awscli", "aws", "2"), AWS_ARGUMENTS),
    BARE_PUT,
    Floor("bare HTTP PUT", "http"),
]


def install_all() -> tuple[list[Contestant], dict[str, str]]:
    """Install all contestants; return those that can run, and the reason for each that cannot."""
    ready: list[Contestant] = []
    missing: dict[str, str] = {}
    for contestant in CONTESTANTS:
        try:
            contestant.install()
        except NotInstalledError as error:
            missing[contestant.name] = str(error)
        else:
            ready.append(contestant)
    return ready, missing


class Running:
    """A contestant at work, by its own command or by another one: a process group of its own, whose
    every upload ends with a line of output.
    """

    def __init__(
        self, contestant: Contestant, place: Place, command: Sequence[str | Path] = ()
    ) -> None:
        self.contestant, self.place, self.name = contestant, place, contestant.name
        self.process = subprocess.Popen(
            list(map(str, command or contestant.command(place))),
            env=script_environment(contestant.environment(place), str(place.home)),
            cwd=place.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdin  # noqa: S101 - for mypy
        assert self.process.stdout  # noqa: S101 - for mypy
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._said = Text(os.dup(self._stdout.fileno()))  # which closes it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._said.join()
        self._stdout.close()
        with contextlib.suppress(BrokenPipeError):  # it ended by itself
            self._stdin.close()

    @property
    def output(self) -> str:
        return str(self._said)

    def wait_for(self, pattern: str, count: int = 1) -> None:
        """Block until its output has this so many times."""
        self._said.wait_for(pattern, PATIENCE_SECONDS, count)

    def warm_up(self) -> None:
        """Block until it has stored a version and is idle.

        That may take more than one: some say a little too early that they watch.
        """
        self.wait_for(self.contestant.ready)
        for _ in range(WARM_UPS):
            if self.update(timeout=PATIENCE_SECONDS / WARM_UPS)[1]:
                return
        raise RuntimeError(f"{self.name} stored nothing:\n{self.output}")

    def tell(self) -> None:
        if self.contestant.is_floor:
            with contextlib.suppress(BrokenPipeError):  # its output says why
                self._stdin.write(f"{self.place.lnd.path}\n".encode())
                self._stdin.flush()

    def update(
        self, channels: int = 10, timeout: float = PATIENCE_SECONDS
    ) -> tuple[Written, Stored | None]:
        """Let LND write one version; return it when it is stored and the contestant is idle again.

        For a floor, the version counts as renamed when the put began.
        """
        ended = len(re.findall(self.contestant.done, self.output, re.MULTILINE))
        version = self.place.lnd.write(channels)
        self.tell()
        stored = self.place.line.wait_for(version.sha256, timeout)
        if stored:
            self.wait_for(self.contestant.done, ended + 1)
            if self.contestant.is_floor:
                version = dataclasses.replace(version, renamed_at=self.puts()[-1][0])
        return version, stored

    def puts(self) -> list[tuple[float, float]]:
        """Return when each put of a floor began and ended."""
        found = re.findall(r"^put (\S+) (\S+)", self.output, re.MULTILINE)
        return [(float(began), float(ended)) for began, ended in found]
