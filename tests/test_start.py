"""What a start needs: a Python, the libraries, right usage; and what it does not wait for."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from kit import SCRIPT, Lnd, NotifySocket, Script, run_script
from kit import script as script_module
from shared import AWAY, WRONG_CONFIGURATION, start

import s3_backup_lnd_channels as program

if TYPE_CHECKING:
    from functools import partial

    from shared import Session

pytestmark = pytest.mark.cold

# --- Readiness ---


def test_it_is_ready_although_nothing_is_there(session: Session, lnd: Lnd) -> None:
    """With LND's directory and S3 missing the daemon is ready, and stops in order."""
    lnd.directory.rmdir()
    with session(AWAY) as daemon:
        assert daemon.systemd.messages[0] == "READY=1"
        assert daemon.stop() == 0
        daemon.systemd.wait_for("STOPPING=1")


def test_it_is_not_ready_with_a_wrong_configuration(
    env: dict[str, str], check: partial[None]
) -> None:
    """With a fault in the configuration systemd hears nothing."""
    with NotifySocket() as systemd:
        done = run_script(env | {"S3_BUCKET_NAME": "s3://wrong", "NOTIFY_SOCKET": systemd.path})
        assert done.returncode == WRONG_CONFIGURATION
        assert systemd.messages == []
    check()


# --- The Python ---


def test_a_python_that_is_too_old_says_so(env: dict[str, str], check: partial[None]) -> None:
    """A Python before 3.11, which `datetime` tells by the lack of UTC, ends with 78 and says which
    one is needed.
    """
    older = (
        "import datetime, runpy, sys\ndel datetime.UTC\nrunpy.run_path(sys.argv.pop(1), "
        "run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", older, str(script_module.SCRIPT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == WRONG_CONFIGURATION
    assert re.fullmatch(
        r"cannot start: cannot import name 'UTC' .*\nhint: .*Python 3\.11 or newer.*\n", done.stderr
    )
    check()


# --- The command line ---


USAGE = [
    ["nonsense"],
    ["--nonsense"],
    ["--env-file"],
    ["run", "more"],
    ["--vers"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is no command and no option is told with the usage, and exits 2."""
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: s3_backup_lnd_channels.py")


def test_wrong_usage_of_the_real_program_exits_2(good: dict[str, str]) -> None:
    """The process itself exits 2 before it reads a setting."""
    start({"BACKUP_DIRECTORY": good["BACKUP_DIRECTORY"]}, "nonsense", code=2)


def test_version_is_printed() -> None:
    """--version needs no settings and prints the program's version."""
    done = run_script({}, "--version")
    assert (done.returncode, done.stdout) == (
        0,
        f"s3_backup_lnd_channels.py {program.__version__}\n",
    )


# --- Without the packages ---


BARE = [sys.executable, "-I", "-S", str(SCRIPT)]


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (("--help",), "(?s)usage: .*check.*restore"),
        (("-h",), "usage: "),
        (("restore", "--help"), "(?s)usage: .*--before"),
        (("--version",), r"\d+\.\d+"),
    ],
)
def test_help_without_the_packages(args: tuple[str, ...], pattern: str) -> None:
    """What the program is, and its version, is told by any Python."""
    with Script({}, *args, command=BARE) as script:
        assert script.wait() == 0, script.log
    assert re.search(pattern, script.stdout)
    assert script.log == ""


@pytest.mark.unmeasured
@pytest.mark.parametrize("args", [(), ("list", "--json")])
def test_commands_without_the_packages(written_env: dict[str, str], args: tuple[str, ...]) -> None:
    """Everything else says in one line what is missing, and names the two commands that make a
    place where the packages are.
    """
    with Script(written_env, *args, command=BARE) as script:
        assert script.wait() == WRONG_CONFIGURATION
    assert re.fullmatch(r"cannot start: No module named '\w+'\nhint: .*\n", script.log)
    assert re.search(r"-m venv \S", script.log)
    assert re.search(r"pip install .*requirements\.txt", script.log)
