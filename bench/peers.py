"""The contestants: this program, and what operators would run in its place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

from kit import CHECKOUT, SCRIPT, install, script_environment
from stores.servers import NotInstalledError, make_venv, packages, run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kit import Installed, Written
    from kit.line import Stored

    from bench.world import Place

HERE = Path(__file__).resolve().parent
REGION = "us-east-1"
PATIENCE_SECONDS = 30.0
WARM_UPS = 3


class NotReadyError(Exception):
    """A contestant that stored nothing of what was written before it was measured."""


class Debian(NamedTuple):
    """A package of Debian, and the command in it."""

    package: str
    command: str

    @property
    def path(self) -> Path:
        """Return where the package puts its command, whatever else PATH has under that name."""
        return Path("/usr/bin", self.command)

    @property
    def version(self) -> str:
        """Return the version that is installed."""
        return run(["dpkg-query", "--show", "--showformat", "${Version}", self.package]).strip()


def install_debian(wanted: Sequence[Debian]) -> None:
    """Install those packages that are missing; raises NotInstalledError with the reason."""
    missing = [each.package for each in wanted if not each.path.exists()]
    if not missing:
        return
    if not shutil.which("apt-get") or os.geteuid():
        raise NotInstalledError(
            f"{', '.join(missing)} missing; as root on Debian it would be installed"
        )
    run(["apt-get", "update", "-qq"])
    run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing])


class Running:
    """A contestant at work: a process group of its own, whose every upload ends with a line of
    output.
    """

    def __init__(self, contestant: Contestant, place: Place) -> None:
        """Start it at its place."""
        self.contestant, self.place = contestant, place
        self.lines: list[str] = []
        self._done = 0
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            list(map(str, contestant.command(place))),
            env=script_environment(contestant.environment(place), str(place.home)),
            cwd=place.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        """Return it when it has stored a version and is idle."""
        try:
            self._warm_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    @property
    def name(self) -> str:
        """Return the name of the contestant."""
        return self.contestant.name

    @property
    def output(self) -> str:
        """Return what it said until now."""
        with self._changed:
            return "".join(self.lines)

    @property
    def done(self) -> int:
        """Return how many uploads have ended, well or not."""
        with self._changed:
            return self._done

    def wait_until_ready(self) -> None:
        """Block until its watch is armed; raises NotReadyError."""
        pattern = self.contestant.ready
        with self._changed:
            if not self._changed.wait_for(
                lambda: any(re.search(pattern, line) for line in self.lines), PATIENCE_SECONDS
            ):
                raise NotReadyError(f"{self.name} did not begin to watch:\n{''.join(self.lines)}")

    def wait_for_done(self, count: int, timeout: float = PATIENCE_SECONDS) -> bool:
        """Block until so many uploads have ended; tell whether they did."""
        with self._changed:
            return self._changed.wait_for(lambda: self._done >= count, timeout)

    def pids(self) -> list[int]:
        """Return the processes of its group."""
        group = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    group.append(int(stat.parent.name))
        return sorted(group)

    def update(
        self, channels: int = 10, timeout: float = PATIENCE_SECONDS
    ) -> tuple[Written, Stored | None]:
        """Let LND write one version, and return it when it is stored and the contestant is idle
        again.
        """
        done = self.done
        version = self.place.lnd.write(channels)
        stored = self.place.line.wait_for(version.sha256, timeout)
        if stored:
            self.wait_for_done(done + 1)
        return version, stored

    def stop(self) -> None:
        """End the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(
                    BrokenPipeError
                ):  # it ended by itself, and its output says why
                    stream.close()

    def _warm_up(self) -> None:
        """Write until a version is stored: one of them says that it watches a little too early."""
        self.wait_until_ready()
        for _ in range(WARM_UPS):
            if self.update(timeout=PATIENCE_SECONDS / WARM_UPS)[1]:
                return
        raise NotReadyError(f"{self.name} stored nothing:\n{self.output}")

    def _read(self) -> None:
        """Take its output to the end."""
        for line in self.process.stdout or ():
            with self._changed:
                self.lines.append(line)
                self._done += bool(re.search(self.contestant.done, line))
                self._changed.notify_all()


class Contestant:
    """What watches LND's file and puts it into S3."""

    name: ClassVar[str]
    ready: ClassVar[str] = r"^watching"  # in the line that says that the watch is armed
    done: ClassVar[str] = r"^(uploaded|failed)"  # in the line that ends each upload
    keeps_connection: ClassVar[bool] = False
    fast: ClassVar[bool] = True  # takes part in every round

    def __init__(self) -> None:
        """Prepare; nothing is installed, and nothing runs."""
        self.version = ""

    def install(self) -> None:
        """Install what is missing, and find out the version; raises NotInstalledError."""
        raise NotImplementedError

    def command(self, place: Place) -> Sequence[str | Path]:
        """Return the command."""
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

    def start(self, place: Place) -> Running:
        """Start it at a place; inside `with` it has stored its first version."""
        return Running(self, place)


class Program(Contestant):
    """This program, as its service runs it."""

    name = "this program"
    ready = done = r" stored s3://"
    keeps_connection = True

    installed: Installed

    def install(self) -> None:
        """Install it beside the venv that runs the benchmark, and find out the version."""
        self.installed = install(CHECKOUT / ".cache/bench-program")
        said = run([sys.executable, SCRIPT, "--version"]).split()[-1]
        self.version = f"{said}, boto3 {packages(Path(sys.prefix), 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:  # noqa: ARG002 - all is in the environment
        """Return the command."""
        return self.installed.command

    def environment(self, place: Place) -> dict[str, str]:
        """Return its settings."""
        return (
            super().environment(place)
            | self.installed.environment
            | {
                "MONITOR_FILE_PATH": str(place.lnd.path),
                "BACKUP_DIRECTORY": str(place.staging),
                "S3_BUCKET_NAME": place.bucket,
                "S3_BACKUP_PREFIX": place.prefix,
            }
        )


class Loop(Contestant):
    """A shell loop that starts a tool for each event, as the guides for node operators have it, at
    its best.

    It watches the directory for renames, and goes on watching while it uploads. The loops that most
    guides show watch the file itself, or not while they upload, and lose more.
    """

    ready = r"^Watches established"
    fast = False
    tool: ClassVar[Debian]
    watcher = Debian("inotify-tools", "inotifywait")
    loop: ClassVar[str] = """
        inotifywait --monitor --event moved_to --format %f {directory} |
        while read -r name; do
            [ "$name" = channel.backup ] || continue
            if {upload}; then echo uploaded; else echo failed; fi
        done
    """

    def install(self) -> None:
        """Install the watcher and the tool from Debian."""
        install_debian([self.watcher, self.tool])
        self.version = f"{self.tool.version}, inotify-tools {self.watcher.version}"

    def command(self, place: Place) -> Sequence[str | Path]:
        """Return the loop."""
        file = shlex.quote(str(place.lnd.path))
        upload = self.upload(place, file, f'{place.prefix}"$(date +%s%N)".backup')
        return [
            "sh",
            "-c",
            self.loop.format(directory=shlex.quote(str(place.lnd.directory)), upload=upload),
        ]

    def upload(self, place: Place, file: str, key: str) -> str:
        """Return the command that puts a file under a key."""
        raise NotImplementedError


class AwsV1(Loop):
    """The AWS command line, version 1, of PyPI."""

    name = "aws s3 cp v1"
    tool = Debian("inotify-tools", "inotifywait")
    aws: Path

    def install(self) -> None:
        """Install the watcher from Debian and the tool from PyPI, with its byte code compiled."""
        super().install()
        venv = make_venv("aws")
        self.aws = venv / "bin/aws"
        self.version = f"{packages(venv, 'awscli')}, inotify-tools {self.watcher.version}"

    def upload(self, place: Place, file: str, key: str) -> str:
        """Return the command."""
        return " ".join([shlex.quote(str(self.aws)), *self.arguments(place, file, key)])

    def arguments(self, place: Place, file: str, key: str) -> list[str]:
        """Return the arguments, the same for both versions."""
        # version 2 of Debian 12 knows no variable for it
        endpoint = f"--endpoint-url {place.line.endpoint}"
        return [endpoint, "s3 cp --only-show-errors", file, f"s3://{place.bucket}/{key}"]


class AwsV2(AwsV1):
    """The AWS command line, version 2, of Debian."""

    name = "aws s3 cp v2"
    tool = Debian("awscli", "aws")

    def install(self) -> None:
        """Install both from Debian."""
        Loop.install(self)
        self.aws = self.tool.path
        if not self.version.startswith("2"):
            raise NotInstalledError(f"this Debian's awscli is {self.version}")


class Rclone(Loop):
    """Rclone, which checks after the upload what was stored."""

    name = "rclone copyto"
    tool = Debian("rclone", "rclone")

    def environment(self, place: Place) -> dict[str, str]:
        """Return where its settings are."""
        settings = place.home / "rclone.conf"
        settings.write_text(f"""[s3]
type = s3
provider = Other
endpoint = {place.line.endpoint}
region = {REGION}
access_key_id = {place.key.access_key}
secret_access_key = {place.key.secret_key}
no_check_bucket = true
""")
        ca_file = {"RCLONE_CA_CERT": str(place.line.ca_file)} if place.line.ca_file else {}
        return ca_file | {"RCLONE_CONFIG": str(settings)}

    def upload(self, place: Place, file: str, key: str) -> str:
        """Return the command."""
        return f"{self.tool.path} copyto {file} s3:{place.bucket}/{key}"


class S3cmd(Loop):
    """s3cmd."""

    name = "s3cmd put"
    tool = Debian("s3cmd", "s3cmd")

    def environment(self, place: Place) -> dict[str, str]:
        """Write its settings; it needs no variable."""
        host = place.line.endpoint.partition("//")[2]
        (place.home / "s3cfg").write_text(f"""[default]
access_key = {place.key.access_key}
secret_key = {place.key.secret_key}
host_base = {host}
host_bucket = {host}
bucket_location = {REGION}
use_https = {place.line.scheme == "https"}
ca_certs_file = {place.line.ca_file or ""}
""")
        return {}

    def upload(self, place: Place, file: str, key: str) -> str:
        """Return the command."""
        settings = shlex.quote(str(place.home / "s3cfg"))
        return f"{self.tool.path} --config {settings} --quiet put {file} s3://{place.bucket}/{key}"


class Curl(Loop):
    """curl, which signs since 7.75."""

    name = "curl --aws-sigv4"
    fast = True
    tool = Debian("curl", "curl")

    def upload(self, place: Place, file: str, key: str) -> str:
        """Return the command."""
        ca_file = f"--cacert {shlex.quote(str(place.line.ca_file))}" if place.line.ca_file else ""
        sign = (
            f"--aws-sigv4 aws:amz:{REGION}:s3 --user {place.key.access_key}:{place.key.secret_key}"
        )
        # S3 wants it, and curl 7.88 does not send it
        sign += " --header 'x-amz-content-sha256: UNSIGNED-PAYLOAD'"
        url = f"{place.line.endpoint}/{place.bucket}/{key}"
        return (
            f"{self.tool.path} --fail --silent --show-error {ca_file} {sign} "
            f"--upload-file {file} {url}"
        )


class Script(Contestant):
    """A script around a watcher of PyPI and one boto3 client that stays warm."""

    package: ClassVar[str]
    keeps_connection = True

    def install(self) -> None:
        """Install the watcher and boto3 from PyPI."""
        venv = make_venv("watchers", HERE)
        self.python = venv / "bin/python"
        self.version = f"{packages(venv, self.package)}, boto3 {packages(venv, 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:
        """Return the command."""
        script = HERE / f"loops/{self.package}_boto3.py"
        return [self.python, script, place.lnd.directory, place.bucket, place.prefix]


class Watchdog(Script):
    """Watchdog, whose thread reads inotify."""

    name = "watchdog + boto3"
    package = "watchdog"


class Watchfiles(Script):
    """Watchfiles, which collects changes for 50 ms."""

    name = "watchfiles + boto3"
    fast = False
    package = "watchfiles"


CONTESTANTS: list[type[Contestant]] = [
    Program,
    Watchdog,
    Watchfiles,
    Curl,
    Rclone,
    S3cmd,
    AwsV1,
    AwsV2,
]


def install_all() -> tuple[list[Contestant], dict[str, str]]:
    """Install all contestants; return those that can run, and the reason for each that cannot."""
    ready: list[Contestant] = []
    missing: dict[str, str] = {}
    for make in CONTESTANTS:
        contestant = make()
        try:
            contestant.install()
        except NotInstalledError as error:
            missing[contestant.name] = str(error)
        else:
            ready.append(contestant)
    return ready, missing


class Floor(Contestant):
    """A bare put by a warm client: no watching, no staging, no retry; it is told of each file."""

    ready, done = r"^ready", r"^put "
    keeps_connection = True
    kind: ClassVar[str]

    def install(self) -> None:
        """Find out the version; it is installed in the venv that runs the benchmark."""
        self.version = f"boto3 {packages(Path(sys.prefix), 'boto3')}"

    def command(self, place: Place) -> Sequence[str | Path]:
        """Return the command."""
        return [sys.executable, HERE / "loops/bare.py", self.kind, place.bucket, place.prefix]

    def start(self, place: Place) -> Running:
        """Start it at a place."""
        return RunningFloor(self, place)


class RunningFloor(Running):
    """A floor at work: an update begins when it begins its put, and not with the rename."""

    def update(
        self, channels: int = 10, timeout: float = PATIENCE_SECONDS
    ) -> tuple[Written, Stored | None]:
        """Let LND write one version, tell of it, and return it, as if renamed when the put
        began.
        """
        done = self.done
        version = self.place.lnd.write(channels)
        if not self.process.stdin:
            raise RuntimeError("it cannot be told")
        with contextlib.suppress(BrokenPipeError):  # it ended by itself, and its output says why
            self.process.stdin.write(f"{self.place.lnd.path}\n")
            self.process.stdin.flush()
        stored = self.place.line.wait_for(version.sha256, timeout)
        if not stored or not self.wait_for_done(done + 1):
            return version, None
        began = re.findall(r"^put (\S+)", self.output, re.MULTILINE)[-1]
        return dataclasses.replace(version, renamed_at=float(began)), stored


class BareSdk(Floor):
    """A bare put_object."""

    name = "bare put_object"
    kind = "sdk"


class BareHttp(Floor):
    """A PUT of the standard library's http.client."""

    name = "bare HTTP PUT"
    kind = "http"


FLOORS: list[type[Floor]] = [BareSdk, BareHttp]


def install_floors() -> list[Contestant]:
    """Return the floors, which need nothing more than this program."""
    floors: list[Contestant] = []
    for make in FLOORS:
        floor = make()
        floor.install()
        floors.append(floor)
    return floors
