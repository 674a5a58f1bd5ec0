"""The program runs as users run it, and all that it writes can be waited for."""

from __future__ import annotations

import json
import os
import socket
import threading
from typing import TYPE_CHECKING

from kit import NotifySocket, run_script
from kit import script as script_module
from kit.output import Text

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PROGRAM = """
import json, os, sys
print(json.dumps([dict(os.environ), sys.argv[1:], sys.stdin.read()]))
"""


def test_the_program_runs_with_a_scrubbed_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program sees the given settings, the bare minimum, and nothing else of the caller's."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(script_module, "SCRIPT", tmp_path / "program.py")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("COVERAGE_PROCESS_START", "")
    done = run_script({"A": "b"}, "one", "two")
    environment, arguments, stdin = json.loads(done.stdout)
    assert (arguments, stdin) == (["one", "two"], "")
    assert environment["A"] == "b"
    assert "AWS_PROFILE" not in environment
    assert environment["HOME"] != os.environ["HOME"]


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
        log = Text(out)
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
