"""strace on the running program: it writes system calls down, and lets some fail or kill."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from pathlib import Path

    from kit import Script

# Every call with which the program captures and uploads, by the word for it in the table.
KINDS = {
    "open": ("openat",),
    "read": ("read",),
    "write": ("write",),
    "fsync": ("fsync",),
    "rename": ("rename", "renameat", "renameat2", "linkat"),
    "unlink": ("unlink", "unlinkat"),
    "lock, mode or directory": ("flock", "fchmod", "mkdir", "getdents64"),
    "watch": ("inotify_init1", "inotify_add_watch", "inotify_rm_watch"),
    "connect": ("socket", "connect"),
    "send": ("sendto", "sendmsg"),
    "receive": ("recvfrom", "recvmsg"),
}
KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls}
TURN = "epoll_wait"  # one for each turn of the event loop
END_SECONDS = 5.0


class Call(NamedTuple):
    """One system call as strace wrote it down."""

    thread: str
    name: str
    line: str


class Strace:
    """strace on one process and the threads that it will start; leaving the block lets go of it."""

    def __init__(self, program: Script, output: Path, inject: str = "") -> None:
        """Return when it is attached, and injects a fault, if one is given."""
        self.program, self.output = program, output
        options = ["-e", f"inject={inject}"] if inject else []
        calls = ",".join(["?" + name for name in KIND_OF] + [TURN])
        trace = ["strace", "-f", "-y", "-s", "300", "-o", str(output), "-e", f"trace={calls}"]
        command = [*trace, *options, "-p", str(program.pid)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if not (self.process.stderr and "attached" in (said := self.process.stderr.readline())):
            self.process.kill()
            raise RuntimeError(f"strace could not attach: {said}{self.process.stderr.read()}")  # type: ignore[union-attr]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the program go on without it."""
        if self.program.returncode is None:
            self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            # Told to let go just when its tracee died, it may wait for ever.
            self.process.kill()
            self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()

    def injected(self) -> int:
        """Return how many calls it let fail."""
        return self.output.read_text(errors="replace").count(" (INJECTED)")

    def calls(self) -> list[Call]:
        """Return the calls up to now, in the order in which they began; one that another thread
        interrupted is in one piece.
        """
        calls: list[Call] = []
        unfinished: dict[str, int] = {}
        for line in self.output.read_text(errors="replace").splitlines():
            thread, _, rest = line.partition(" ")
            if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest.lstrip()):
                if thread in unfinished:
                    number = unfinished.pop(thread)
                    calls[number] = calls[number]._replace(line=calls[number].line + resumed[1])
            elif call := re.match(r"(\w+)\(", rest.lstrip()):
                if line.endswith("<unfinished ...>"):
                    unfinished[thread] = len(calls)
                calls.append(Call(thread, call[1], line))
        return calls


def counts(calls: list[Call]) -> Counter[str]:
    """Return for each call how often one thread makes it at most: strace counts by thread."""
    most: Counter[str] = Counter()
    for thread in {call.thread for call in calls}:
        most |= Counter(call.name for call in calls if call.thread == thread)
    return most
