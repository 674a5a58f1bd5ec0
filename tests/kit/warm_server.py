"""The process behind `kit.warm`: its libraries are loaded, and it forks the program on request.

It runs as a script, so that nothing of the tests is in it. It never runs a line of the program
itself: each fork does that, from the first line on. One thing is not as it is after an exec: the
SDK finds its own data, megabytes of it, in memory.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import os
import selectors
import socket
import sys
from functools import cache
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypedDict

REQUEST_BYTES = 1 << 20  # more than a socket takes


class Request(TypedDict):
    """What is to be started, and how; its stdin, stdout and stderr come as descriptors."""

    command: list[str]
    env: dict[str, str]
    cwd: str


def load(program: Path) -> None:
    """Import what the program imports, and what its libraries import when they are first used."""
    for node in ast.walk(ast.parse(program.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            importlib.import_module(node.module)
        elif isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)
    sdk: Any = importlib.import_module("botocore.session")
    sdk.create_loader = cache(sdk.create_loader)
    key = {"aws_access_key_id": "-", "aws_secret_access_key": "-"}
    sdk.Session().create_client("s3", region_name="us-east-1", **key).close()
    importlib.import_module("coverage").Coverage(data_file=None)
    gc.freeze()


def serve(control: socket.socket, program: Path) -> list[str]:
    """Fork at each request and report each end; return in a fork alone, what it is to run."""
    waiting = selectors.DefaultSelector()
    waiting.register(control, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.data:
                waiting.unregister(key.fd)
                os.close(key.fd)
                pid, report = key.data
                os.write(report, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(report)
                continue
            request, (report, *streams) = receive(control)
            code_of(program, program.stat().st_mtime_ns)  # once for all forks
            pid = os.fork()
            if not pid:
                waiting.close()  # or they would be closed later, when the program owns the numbers
                control.close()
                become(request, streams)
                return request["command"]
            os.write(report, b"%d\n" % pid)
            waiting.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, report))
            for stream in streams:
                os.close(stream)


def receive(control: socket.socket) -> tuple[Request, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
    if not data:
        os._exit(0)  # whoever asked is gone
    return json.loads(data), descriptors


@cache
def code_of(path: Path, _: int) -> CodeType:
    """Return the code of a file that was last changed then."""
    return compile(path.read_bytes(), str(path), "exec", dont_inherit=True)


def become(request: Request, streams: list[int]) -> None:
    """Give this process, just forked, what Python has after an exec."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)  # of another kind of file
        new = os.fdopen(number, old.mode, 1 if number == 2 else -1, old.encoding, old.errors)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    sys.argv = request["command"]
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path[0] = os.path.dirname(sys.argv[0])
    if os.getenv("COVERAGE_PROCESS_START") or os.getenv("COVERAGE_PROCESS_CONFIG"):
        importlib.import_module("coverage").process_startup()


if __name__ == "__main__":
    PROGRAM = Path(sys.argv[2])
    sys.path[0] = ""
    load(PROGRAM)
    SCRIPT = Path(serve(socket.socket(fileno=int(sys.argv[1])), PROGRAM)[0])
    main = ModuleType("__main__")
    main.__file__ = str(SCRIPT)
    sys.modules["__main__"] = main
    exec(code_of(SCRIPT, SCRIPT.stat().st_mtime_ns), vars(main))  # noqa: S102 - as an exec does
