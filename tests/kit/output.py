"""What a process says: to a pipe, and to systemd."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import tempfile
import threading
from pathlib import Path
from typing import Self

from .s3_server import PATIENCE_SECONDS


class Text:
    """What a process writes to a pipe, which is closed when that ends.

    A thread takes it in, so that the process never waits; whoever asks for it takes in the rest
    before, so that all that was written until then is in the answer, whatever the thread has come
    to. `end` is put behind each datagram, and is empty for a pipe.
    """

    def __init__(self, source: int, end: bytes = b"") -> None:
        self._source, self._end = source, end
        self._text = ""
        self._line = b""  # the beginning of one
        self._ended = False
        self._changed = threading.Condition()
        os.set_blocking(source, False)
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()

    def __str__(self) -> str:
        with self._changed:
            self._take_in()
            return self._text

    def join(self, timeout: float | None = None) -> None:
        self._reader.join(timeout)

    def wait_for(self, pattern: str, timeout: float, count: int) -> re.Match[str]:
        """Block until the pattern has occurred so many times, and return that occurrence."""
        expression = re.compile(pattern, re.MULTILINE)
        found: list[re.Match[str]] = []

        def occurred() -> bool:
            found[:] = expression.finditer(self._text)
            return len(found) >= count or self._ended

        with self._changed:
            self._take_in()
            self._changed.wait_for(occurred, timeout)
            if len(found) < count:
                why = "it ended" if self._ended else f"{timeout} s passed"
                came = f"{pattern!r} came {len(found)} of {count} times until {why}"
                raise AssertionError(f"{came}:\n{self._text}")
            return found[count - 1]

    def _follow(self) -> None:
        something = select.poll()
        something.register(self._source, select.POLLIN)
        while not self._ended:
            something.poll()
            with self._changed:
                self._take_in()
        os.close(self._source)

    def _take_in(self) -> None:
        """Take in what is there, and wake those who wait; with the lock held."""
        with contextlib.suppress(BlockingIOError):
            while not self._ended:
                data = os.read(self._source, 65536)
                self._ended = not data
                data = self._line + (data + self._end if data else b"")
                whole = len(data) if self._ended else data.rfind(b"\n") + 1
                self._line = data[whole:]
                self._text += data[:whole].decode(errors="replace")
                self._changed.notify_all()


class NotifySocket:
    """The socket on which systemd listens for the state of a service."""

    def __init__(self) -> None:
        """Listen below /tmp, since the path of a socket is limited to 107 bytes."""
        self._directory = tempfile.mkdtemp(prefix="kit-", dir="/tmp")
        self.path = str(Path(self._directory, "notify"))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listening.bind(self.path)
        self._messages = Text(listening.detach(), end=b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self.path)  # what the end of a pipe reads as
        self._messages.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def messages(self) -> list[str]:
        """Return the lines of all messages up to now."""
        return str(self._messages).splitlines()

    def wait_for(self, pattern: str, count: int = 1) -> re.Match[str]:
        """Block until the pattern is so many times in what was sent; `^` and `$` match at lines."""
        return self._messages.wait_for(pattern, PATIENCE_SECONDS, count)
