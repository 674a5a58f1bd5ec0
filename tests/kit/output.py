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
from typing import TYPE_CHECKING, Self

from .s3_server import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator


class Text:
    """What a process writes to a pipe.

    A thread takes it in, so that the process never waits; whoever asks for it takes in the rest
    before, so that all that was written until then is in the answer, whatever the thread has come
    to.
    """

    def __init__(self, what: str, source: int) -> None:
        self._what = what
        self._source = source
        self._text = ""
        self._line = b""  # the beginning of one
        self._ended = False
        self._changed = threading.Condition()
        os.set_blocking(source, False)
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()

    def __str__(self) -> str:
        """Return everything up to now."""
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
                raise AssertionError(
                    f"{pattern!r} came {len(found)} of {count} times in {self._what} "
                    f"until {why}:\n{self._text}"
                )
            return found[count - 1]

    def _follow(self) -> None:
        """Take in what comes, until the end."""
        something = select.poll()
        something.register(self._source, select.POLLIN)
        while not self._ended:
            something.poll()
            with self._changed:
                self._take_in()

    def _take_in(self) -> None:
        """Take in what is there, and wake those who wait; with the lock held."""
        with contextlib.suppress(BlockingIOError):
            while not self._ended:
                data = os.read(self._source, 65536)
                self._ended = not data
                self._text += self._decode(data)
                self._changed.notify_all()

    def _decode(self, data: bytes) -> str:
        """Return the lines that are complete with this."""
        lines, newline, self._line = (
            (self._line + data).rpartition(b"\n") if data else (self._line, b"", b"")
        )
        return (lines + newline).decode(errors="replace")


class Messages(Text):
    """What a process sends to a datagram socket."""

    def __init__(self, what: str, source: int) -> None:
        self._messages: list[str] = []
        super().__init__(what, source)

    def __iter__(self) -> Iterator[str]:
        """Return the messages up to now, each as it was sent."""
        with self._changed:
            self._take_in()
            return iter(self._messages[:])

    def _decode(self, data: bytes) -> str:
        """Return one message as lines."""
        if not data:
            return ""
        self._messages.append(data.decode(errors="replace"))
        return self._messages[-1].rstrip("\n") + "\n"


class NotifySocket:
    """The socket on which systemd listens for the state of a service."""

    def __init__(self) -> None:
        """Listen below /tmp, since the path of a socket is limited to 107 bytes."""
        self._directory = tempfile.mkdtemp(prefix="kit-", dir="/tmp")
        self.path = str(Path(self._directory, "notify"))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._messages = Messages("the messages to systemd", self._socket.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", self.path)  # what the end of a pipe reads as
        self._messages.join()
        self._socket.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def messages(self) -> list[str]:
        return list(self._messages)

    def wait_for(
        self, pattern: str, timeout: float = PATIENCE_SECONDS, count: int = 1
    ) -> re.Match[str]:
        """Block until the pattern has occurred so many times in what was sent; `^` and `$` match at
        lines.
        """
        return self._messages.wait_for(pattern, timeout, count)
