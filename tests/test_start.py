"""What a start needs: a Python, the libraries, right usage; and what it does not wait for."""

from __future__ import annotations

import re
import sys

import pytest
from kit import SCRIPT, Daemon, Lnd, NotifySocket, run_script
from shared import WRONG_CONFIGURATION, Env

pytestmark = pytest.mark.cold

# --- Readiness ---


def test_it_is_ready_although_nothing_is_there(good: Env, lnd: Lnd) -> None:
    """LND's directory and S3 are missing; it stops in order."""
    lnd.directory.rmdir()
    with Daemon(good) as daemon:
        assert daemon.systemd.messages[0] == "READY=1"
        assert daemon.stop() == 0
        daemon.systemd.wait_for("STOPPING=1")


def test_it_is_not_ready_with_a_wrong_configuration(good: Env) -> None:
    with NotifySocket() as systemd:
        done = run_script(good | {"S3_BUCKET_NAME": "s3://wrong", "NOTIFY_SOCKET": systemd.path})
        assert done.returncode == WRONG_CONFIGURATION
        assert systemd.messages == []


# --- The Python ---


def test_a_python_that_is_too_old_says_so(good: Env) -> None:
    """`datetime` tells it by the lack of UTC."""
    older = "import datetime, runpy, sys\ndel datetime.UTC\n"
    older += "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = run_script(good, command=[sys.executable, "-I", "-c", older, str(SCRIPT)])
    assert done.returncode == WRONG_CONFIGURATION
    told = r"cannot start: cannot import name 'UTC' .*\nhint: .*Python 3\.11 or newer.*\n"
    assert re.fullmatch(told, done.stderr)


# --- Without the packages ---


BARE = [sys.executable, "-I", "-S", str(SCRIPT)]


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["--env-file"], ["run", "more"], ["--vers"]],
    ids=" ".join,
)
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    """What is no command and no option is told with the usage, and exits 2."""
    done = run_script({}, *arguments, command=BARE)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: s3_backup_lnd_channels.py")


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
    done = run_script({}, *args, command=BARE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(pattern, done.stdout)


@pytest.mark.unmeasured
@pytest.mark.parametrize("args", [(), ("list", "--json")])
def test_commands_without_the_packages(written_env: Env, args: tuple[str, ...]) -> None:
    """They say what is missing, and which two commands make a place for the packages."""
    done = run_script(written_env, *args, command=BARE)
    assert done.returncode == WRONG_CONFIGURATION
    hint = r"hint: .*-m venv \S.*pip install .*requirements\.txt\n"
    assert re.fullmatch(rf"cannot start: No module named '\w+'\n{hint}", done.stderr)
