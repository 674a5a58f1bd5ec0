"""Servers of asyncio that run beside the test, in a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Self, TypeVar

from .s3 import PATIENCE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

_Result = TypeVar("_Result")


class Background:
    """An event loop in a thread; it runs inside `with`, and once."""

    def __init__(self, name: str) -> None:
        """Give the thread this name."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, whatever its tasks do."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def call(self, coroutine: Coroutine[None, None, _Result]) -> _Result:
        """Run a coroutine in the loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_SECONDS)


async def deafen(server: asyncio.Server) -> None:
    """Accept nothing more; serve what was accepted a moment ago, which asyncio 3.11 would never
    close otherwise.
    """
    for listening in server.sockets:
        asyncio.get_running_loop().remove_reader(listening)
    await asyncio.sleep(0)
    server.close()


async def end_all(server: asyncio.Server | None, cut: Callable[[], None]) -> None:
    """Accept nothing more, and cut what is open until every other task of the loop has ended."""
    if server:
        await deafen(server)
    while len(asyncio.all_tasks()) > 1:
        cut()
        await asyncio.sleep(0)  # the last ones have yet to begin
