"""Runs the program as users do: as a process of its own, with nothing of the caller's
environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from .output import NotifySocket, Text
from .s3_server import CHECKOUT, PATIENCE_SECONDS
from .warm import WarmProcess, WarmServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .lnd import Written

SCRIPT = CHECKOUT / "s3_backup_lnd_channels.py"
STUCK_SECONDS = 90.0

MEASURED = ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
_COVERAGE = (*MEASURED, "COVERAGE_FILE", "COVERAGE_CORE")

# Begins code that may run when the program's libraries are loaded; other code may change them.
LATE_ENOUGH = "# changes the program alone"

warm_server: WarmServer | None = None  # where nobody asks for warm starts, there are none


def script_environment(env: dict[str, str], home: str) -> dict[str, str]:
    """Return the program's environment: settings, the bare minimum, what coverage needs."""
    minimum = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": home,
        "LANG": "C.UTF-8",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return minimum | {name: os.environ[name] for name in _COVERAGE if name in os.environ} | env


@contextlib.contextmanager
def warm_starts() -> Iterator[None]:
    """Start the program warm in this block, wherever that makes no difference."""
    global warm_server  # noqa: PLW0603 - all of a test run share the one server
    home = tempfile.gettempdir()  # nothing is there that a library reads while it is loaded
    with WarmServer(SCRIPT, script_environment({}, home)) as server:
        warm_server = server
        try:
            yield
        finally:
            warm_server = None


def start(
    env: Mapping[str, str],
    *args: str,
    cwd: str | Path,
    streams: Sequence[int],
    launcher: Path | None = None,
    command: Sequence[str] = (),
) -> subprocess.Popen[bytes] | WarmProcess:
    """Start the program, a launcher of it, or another command, in exactly this environment, with
    these descriptors as stdin, stdout and stderr.
    """
    script = str(launcher or SCRIPT)
    if warm_server and not command and warm_server.can_start(env):
        return warm_server.start([script, *args], env, str(cwd), streams)
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        [*(command or (sys.executable, script)), *args],
        env=env,
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


def run_script(
    env: dict[str, str],
    *args: str,
    timeout: float = STUCK_SECONDS,
    cwd: Path | None = None,
    stdout: IO[str] | None = None,
    command: Sequence[str] = (),
    measured: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end; not measured, it costs less."""
    unmeasured = {} if measured else dict.fromkeys(MEASURED, "")
    with Script(env | unmeasured, *args, cwd=cwd, stdout=stdout, command=command) as script:
        code = script.wait(timeout)
        return subprocess.CompletedProcess(list(args), code, script.stdout, script.log)


def run_on_terminal(env: dict[str, str], *args: str, log: bool = False) -> tuple[int, str]:
    """Run the program with a terminal for its output, and for its log if that is wanted, and return
    the exit code and what is seen.
    """
    screen, terminal = os.openpty()
    with (
        tempfile.TemporaryDirectory() as home,
        open(os.devnull, "r+b") as null,
        open(screen, "rb", buffering=0) as output,
    ):
        nowhere = null.fileno()
        streams = (nowhere, terminal, terminal if log else nowhere)
        process = start(script_environment(env, home), *args, cwd=home, streams=streams)
        os.close(terminal)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while part := output.read(65536):
                seen += part
        return process.wait(STUCK_SECONDS), seen.decode(errors="replace")


def write_launcher(path: Path, code: str) -> Path:
    """Write a script that runs some Python code, and then the program in the same process."""
    path.write_text(
        f"import runpy\nSCRIPT = {str(SCRIPT)!r}\n{code}\nrunpy.run_path(SCRIPT, "
        f"run_name='__main__')\n"
    )
    return path


def unlistable_while(there: Path) -> str:
    """Return code that keeps the program from listing its staging directory for as long as this
    path exists.
    """
    return f"""{LATE_ENOUGH}
import os
listed = os.scandir
def scandir(path="."):
    if isinstance(path, int) and os.path.exists({str(there)!r}):
        raise OSError(5, os.strerror(5))
    return listed(path)
os.scandir = scandir
"""


def hurried(factor: float) -> str:
    """Return code that runs the program with each `*_SECONDS` so many times shorter, with two
    attempts as the most that may hang, and with 100 pages as the most of a list. LATE_SECONDS
    stays: operators are told how long it is.

    How long a test has to wait for the end of an attempt is then up to the test.
    """
    return f"""{LATE_ENOUGH}
import re, sys
text = open(SCRIPT, encoding="utf-8").read()
text = re.sub(r"(?m)^((?!LATE)[A-Z_]+_SECONDS = [0-9.]+)", r"\\1 / {factor}", text)
text = re.sub(r"(?m)^([A-Z_]*THREADS[A-Z_]*) = [0-9]+", r"\\1 = 2", text)
text = re.sub(r"(?m)^PAGES_MAX = [0-9]+", "PAGES_MAX = 100", text)
sys.argv[0] = SCRIPT
module = sys.modules["__main__"]
module.__file__ = SCRIPT
exec(compile(text, SCRIPT, "exec"), vars(module))
"""


def altered(code: str = "", **constants: float) -> str:
    """Return code that runs the program with other constants, and after more code, in which it is
    the module `program`.
    """
    return f"""{LATE_ENOUGH}
import importlib.util, sys
spec = importlib.util.spec_from_file_location("program", SCRIPT)
program = sys.modules["program"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)
for name, value in {constants!r}.items():
    assert name in vars(program), name
    setattr(program, name, value)
{code}
sys.exit(program.main())
"""


class Script:
    """The program, running; leaving the `with` block kills what is left of it."""

    def __init__(
        self,
        env: dict[str, str],
        *args: str,
        cwd: Path | None = None,
        stdout: IO[str] | None = None,
        launcher: Path | None = None,
        command: Sequence[str] = (),
    ) -> None:
        """Start it with these settings and arguments, by default in an empty directory and with a
        pipe for its stdout; or start its launcher, or another command.
        """
        self._home = tempfile.mkdtemp(prefix="kit-home-")
        out, err = os.pipe(), os.pipe()
        opened = nothing, into_out, into_err = os.open(os.devnull, os.O_RDONLY), out[1], err[1]
        try:
            self.process = start(
                script_environment(env, self._home),
                *args,
                cwd=cwd or self._home,
                streams=(nothing, stdout.fileno() if stdout else into_out, into_err),
                launcher=launcher,
                command=command,
            )
        finally:
            for descriptor in opened:
                os.close(descriptor)
        self._stdout, self._log = Text(out[0]), Text(err[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.poll()

    @property
    def log(self) -> str:
        return str(self._log)

    @property
    def stdout(self) -> str:
        return str(self._stdout)

    def wait_for_log(
        self, pattern: str, timeout: float = PATIENCE_SECONDS, count: int = 1
    ) -> re.Match[str]:
        """Block until the pattern is so many times in the log; `^` and `$` match at lines."""
        return self._log.wait_for(pattern, timeout, count)

    def signal(self, sig: signal.Signals) -> None:
        self.process.send_signal(sig)

    def wait(self, timeout: float = STUCK_SECONDS) -> int:
        """Wait until it has ended and its output is complete, and return the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the program did not end within {timeout} s:\n{self.log}"
            ) from None
        for text in (self._log, self._stdout):
            text.join(timeout)
        return code

    def stop(self, timeout: float = STUCK_SECONDS) -> int:
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for text in (self._log, self._stdout):
            text.join()
        shutil.rmtree(self._home, ignore_errors=True)


class Daemon(Script):
    """The running daemon, and systemd, to which it tells of every look at the file."""

    def __init__(self, env: dict[str, str], command: Sequence[str] = ()) -> None:
        self.systemd = NotifySocket()
        super().__init__(
            env | {"NOTIFY_SOCKET": self.systemd.path, "WATCHDOG_USEC": "3000000000"},
            command=command,
        )

    def __enter__(self) -> Self:
        """Return it when it has tried to watch."""
        try:
            self.systemd.wait_for("READY=1")
        except AssertionError:
            self.close()
            raise
        return self

    def close(self) -> None:
        super().close()
        self.systemd.__exit__()

    def wait_for_captured(self, version: Written, count: int = 1) -> None:
        """Block until these bytes have got so many names."""
        self.wait_for_log(rf"captured \S+-{version.sha256[-6:]}\b", count=count)

    def wait_for_stored(self, version: Written, count: int = 1) -> None:
        """Block until S3 has given so many receipts for these bytes."""
        self.wait_for_log(rf"stored s3://\S+-{version.sha256[-6:]}\b", count=count)

    def wait_for_looks(self, more: int = 3) -> None:
        """Block until it has looked at the file so many times more; the first of them may have
        begun before.
        """
        looked = "\n".join(self.systemd.messages).count("WATCHDOG=1")
        self.systemd.wait_for("WATCHDOG=1", count=looked + more)

    def begin_to_stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """Send the first signal, and return when another one would be the second."""
        self.signal(sig)
        self.systemd.wait_for("STOPPING=1")

    def stored_names(self) -> list[str]:
        """Return the names of the versions in the order of their receipts."""
        return re.findall(r"stored s3://\S+/(\S+-[0-9a-f]{6})\b", self.log)

    def assert_watches_only(self, directory: Path) -> None:
        """Fail unless the kernel keeps one watch for it, on this directory; call it when a version
        from there is stored.
        """
        inodes = []
        for entry in Path(f"/proc/{self.pid}/fdinfo").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inodes += re.findall(r"^inotify wd:\S+ ino:(\S+)", entry.read_text(), re.MULTILINE)
        assert [int(inode, 16) for inode in inodes] == [directory.stat().st_ino]
