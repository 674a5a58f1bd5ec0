"""The world of a run: one S3 server, lines to it, and a place with an LND of its own for each
contestant.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from kit import CHECKOUT, Credentials, Lnd, S3Server
from kit.line import Line

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = CHECKOUT / ".cache/bench"


class Place(NamedTuple):
    """Where one contestant works."""

    lnd: Lnd
    home: Path
    staging: Path
    line: Line
    bucket: str
    prefix: str
    key: Credentials


class World:
    """Everything that the contestants share; it runs inside `with`."""

    def __init__(self) -> None:
        """Prepare a world in a temporary directory."""
        self._stack = contextlib.ExitStack()
        self._numbers = itertools.count(1)
        self.directory = Path()
        self.bucket = ""

    def __enter__(self) -> Self:
        """Start the server, and make a bucket."""
        CACHE.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE)))
            self.server = stack.enter_context(S3Server(self.directory / "s3"))
            self.bucket = self.server.create_bucket()
            self.key = self.server.read_write_user(
                self.bucket
            )  # some of the peers look before or after they put
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the server, and remove everything."""
        self._stack.close()

    @contextlib.contextmanager
    def line(self, scheme: str = "http", *, far: bool = False) -> Iterator[Line]:
        """Yield a new line to the server; see Line."""
        directory = self.directory / f"line-{next(self._numbers)}"
        with Line(self.server.port, directory, tls=scheme == "https", far=far) as line:
            yield line

    def place(self, name: str, line: Line) -> Place:
        """Make a place at the near end of a line: an LND that has written once, and empty
        directories.
        """
        home = self.directory / f"{next(self._numbers)}-{name}"
        staging = home / "staging"
        staging.mkdir(mode=0o700, parents=True)
        lnd = Lnd(home / "lnd")
        lnd.write()
        return Place(lnd, home, staging, line, self.bucket, f"{home.name}/", self.key)
