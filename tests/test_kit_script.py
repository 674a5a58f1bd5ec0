"""The program runs as users run it, and all that it writes can be waited for."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
from kit import NotifySocket, Script, run_script
from kit import script as script_module
from kit.output import Text

PROGRAM = """
import json, os, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
print(json.dumps(dict(os.environ)), flush=True)
print(" ".join(sys.argv[1:]), sys.stdin.read(), flush=True)
for number in range(3):
    print("line", number, file=sys.stderr, flush=True)
if "NOTIFY_SOCKET" in os.environ:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"STATUS=up\\nREADY=1", os.environ["NOTIFY_SOCKET"])
if "stay" in sys.argv:
    signal.pause()
"""


@pytest.fixture
def _program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a small program in the place of the real one."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(script_module, "SCRIPT", tmp_path / "program.py")


@pytest.mark.usefixtures("_program")
def test_the_program_runs_with_a_scrubbed_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program sees the given settings, the bare minimum, and nothing else of the caller's."""
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("COVERAGE_PROCESS_START", "")
    result = run_script({"A": "b"}, "one", "two")
    assert result.returncode == 0
    assert result.stderr.splitlines() == ["line 0", "line 1", "line 2"]
    environment, arguments = result.stdout.splitlines()
    assert arguments == "one two "
    assert '"A": "b"' in environment
    assert "AWS_EC2_METADATA_DISABLED" in environment
    assert "AWS_PROFILE" not in environment
    assert os.environ["HOME"] not in environment.split('"HOME": ')[1].split(",")[0]


def test_all_that_was_written_is_read_however_slow_the_reader_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was written, or sent to systemd, before one asks is in the answer, though the thread has
    read nothing.
    """
    woken, follow = threading.Event(), Text._follow  # noqa: SLF001 - what the thread does

    def wait_and_follow(text: Text) -> None:
        woken.wait()
        follow(text)

    monkeypatch.setattr(Text, "_follow", wait_and_follow)
    out, into = os.pipe()
    with NotifySocket() as notify, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service:
        log = Text("the log", out)
        for number in range(5):
            service.sendto(b"%d" % number, notify.path)
            os.write(into, b"%d\nbegin" % number)
        try:
            assert notify.messages == ["0", "1", "2", "3", "4"]
            assert str(log) == "0\nbegin1\nbegin2\nbegin3\nbegin4\n"
            os.write(into, "\u00fc\n".encode())
            assert log.wait_for("^begin\u00fc$", timeout=0, count=1)
        finally:
            woken.set()
            os.close(into)
            log.join()
            os.close(out)


@pytest.mark.usefixtures("_program")
def test_the_log_of_a_running_program_can_be_waited_for() -> None:
    """What the program writes and tells systemd can be waited for, and so can its end."""
    with NotifySocket() as notify, Script({"NOTIFY_SOCKET": notify.path}, "stay") as script:
        assert script.wait_for_log(r"^line (\d)$", count=3)[1] == "2"
        notify.wait_for("^READY=1$")
        assert notify.messages == ["STATUS=up\nREADY=1"]
        assert script.returncode is None
        with pytest.raises(AssertionError, match=r"line 0\nline 1\nline 2"):
            script.wait_for_log("never", timeout=0.01)
        script.signal(signal.SIGTERM)
        assert script.wait() == script.returncode == 3
        with pytest.raises(AssertionError, match="until it ended"):
            script.wait_for_log("never")
        assert script.stdout.endswith("stay \n")


@pytest.mark.usefixtures("_program")
def test_a_program_left_running_is_killed() -> None:
    """Leaving the block kills the program and removes its home."""
    with Script({}, "stay") as script:
        script.wait_for_log("line 2")
        home = Path(f"/proc/{script.pid}/cwd").readlink()
        assert home.is_dir()
    assert script.returncode == -signal.SIGKILL
    assert not home.exists()
