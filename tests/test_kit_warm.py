"""A program that was started warm cannot be told from one that was started cold."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest
from coverage import Coverage, CoverageData
from kit import CHECKOUT, SCRIPT, Script, as_nobody, hurried, run_script, script_environment
from kit import script as script_module
from kit.warm import WarmProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

# Tells what a program can know of its own process, and then spoils what it can.
PROGRAM = """
import gc, json, locale, os, resource, signal, sys, threading
opened = [os.open("/", os.O_RDONLY) for _ in range(9)]
gc.collect()  # whatever is left of the process before may close what is not its own
descriptors = [number for number in range(1024) if os.path.exists(f"/proc/self/fd/{number}")]
print(json.dumps({
    "arguments": [sys.argv, sys.orig_argv],
    "descriptors": [(number, os.fstat(number).st_mode) for number in descriptors],
    "directory": os.getcwd(),
    "environment": dict(os.environ),
    "flags": str(sys.flags),
    "limits": [resource.getrlimit(number) for number in range(16)],
    "locale": locale.setlocale(locale.LC_ALL),
    "main": [__name__, __file__, sys.modules["__main__"].__dict__ is globals()],
    "masked": [str(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "path": sys.path,
    "process": [os.getpgid(0), os.getsid(0), os.getresuid(), os.getgroups(), os.umask(0)],
    "signals": [str(signal.getsignal(number)) for number in signal.valid_signals()],
    "spoilt": hasattr(json, "spoilt"),
    "streams": [
        (name, stream.encoding, stream.errors, stream.line_buffering, stream is same)
        for name, stream, same in (
            ("stdin", sys.stdin, sys.__stdin__),
            ("stdout", sys.stdout, sys.__stdout__),
            ("stderr", sys.stderr, sys.__stderr__),
        )
    ],
    "threads": threading.active_count(),
}), flush=True)
json.spoilt = os.environ["SPOILT"] = "yes"
os.chdir("/")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))
sys.stderr.write("begun ")  # a line is what makes it visible
if "stay" in sys.argv:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests are deaf to it
    print("", file=sys.stderr)
    signal.pause()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(script_module, "SCRIPT", path)
    return path


def warm(script: Script) -> bool:
    return isinstance(script.process, WarmProcess)


@pytest.mark.unmeasured
def test_a_warm_process_is_like_a_cold_one_and_leaves_nothing_to_the_next(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program can know of its process is the same, whatever the one before has done."""
    settings, told = {"S3_BUCKET_NAME": "b\u00fcck\udcff", "HOME": str(tmp_path)}, []
    for server in (script_module.warm_server, script_module.warm_server, None):
        monkeypatch.setattr(script_module, "warm_server", server)
        with Script(settings, "7", "\udcff", cwd=tmp_path) as script:
            assert warm(script) == bool(server)
            assert script.wait() == 7
            assert script.log == "begun "
            told.append(json.loads(script.stdout))
    assert told[0] == told[1] == told[2]
    assert told[0]["environment"].items() >= settings.items()
    assert told[0]["arguments"][0] == [str(program), "7", "\udcff"]


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT, signal.SIGALRM])
def test_signals_end_a_warm_process(sig: signal.Signals) -> None:
    """A signal reaches the process itself, and its end tells of it."""
    with Script({}, "stay") as script:
        script.wait_for_log("begun")
        assert warm(script)
        assert script.returncode is None
        script.signal(sig)
        assert script.wait() == script.returncode == -sig
        script.signal(sig)  # to nobody


def test_a_traceback_is_that_of_the_program(program: Path) -> None:
    """An error that nobody caught ends a warm process as any other."""
    program.write_text("import nowhere\n")
    done = run_script({})
    assert done.returncode == 1
    assert f'File "{program}", line 1, in <module>' in done.stderr
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'nowhere'\n")


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("name", ["PYTHONPATH", "SSL_CERT_FILE"])
def test_what_may_be_read_at_the_start_makes_it_cold(name: str) -> None:
    with Script({name: ""}, "0") as script:
        assert not warm(script)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Ignore a signal, which a child then does as well."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGUSR2, before)


@contextlib.contextmanager
def private() -> Iterator[None]:
    """Let new files be the owner's alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.parametrize("change", [deaf, private, as_nobody])
def test_what_a_child_takes_over_makes_it_cold(
    tmp_path: Path, change: Callable[[], AbstractContextManager[None]]
) -> None:
    server, env = script_module.warm_server, script_environment({}, str(tmp_path))
    assert server
    assert server.can_start(env)
    changes = change is not as_nobody or os.geteuid() == 0
    with change():
        assert server.can_start(env) != changes
    assert server.can_start(env)


@pytest.mark.parametrize("code", ["import datetime", hurried(2)], ids=["any", "hurried"])
def test_code_that_runs_before_makes_it_cold(
    program: Path, started_by: Callable[[str], None], code: str
) -> None:
    """What is changed before the program begins is changed before its libraries are loaded."""
    program.write_text("import sys\nsys.exit(7)\n")
    started_by(code)
    with Script({}) as script:
        assert warm(script) == (code != "import datetime")
        assert script.wait() == 7


@pytest.mark.cold
@pytest.mark.usefixtures("program")
def test_a_test_can_ask_for_a_cold_start() -> None:
    with Script({}, "0") as script:
        assert not warm(script)


def test_a_warm_process_is_measured(written_env: dict[str, str], tmp_path: Path) -> None:
    """Its coverage is that of the first line and of the last, which is `os._exit`."""
    config = str(CHECKOUT / "pyproject.toml")
    measured = Coverage(data_file=str(tmp_path / "data"), config_file=config)
    told = {"COVERAGE_PROCESS_CONFIG": measured.config.serialize()}
    with Script(written_env | told, "once") as script:
        assert warm(script)
        assert script.wait() == 0
    (file,) = tmp_path.glob("data.*")
    lines = CoverageData(str(file))
    lines.read()
    source = SCRIPT.read_text().splitlines()
    seen = {source[number - 1].strip() for number in lines.lines(str(SCRIPT)) or []}
    assert {"from __future__ import annotations", "return code", "os._exit(main())"} <= seen
