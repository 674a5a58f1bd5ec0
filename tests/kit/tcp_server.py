"""A TCP server of asyncio in a thread of its own: what every proxy of the kit is built on."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Self, TypeVar

from .s3_server import PATIENCE_SECONDS

if TYPE_CHECKING:
    import ssl
    from collections.abc import Coroutine

    Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CHUNK = 65536

_Result = TypeVar("_Result")


class TcpServer:
    """Listens on the loopback address; it runs inside `with`, and once.

    A subclass says in `serve` what becomes of a connection. Nothing outlives the block: each
    connection is cut at its end, and so is what was opened for it by `connect`.
    """

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        """Listen on a free port from `with` on, with TLS if there is a context for it."""
        self.port = 0
        self.loop = asyncio.new_event_loop()
        self._context = context
        self._thread = threading.Thread(target=self.loop.run_forever, name=type(self).__name__)
        self._listening: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self.listen())
        return self

    def __exit__(self, *_: object) -> None:
        if self.loop.is_closed():
            return
        self.call(self._end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side ends it."""
        raise NotImplementedError

    def call(self, coroutine: Coroutine[None, None, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_SECONDS)

    def cut_all(self) -> None:
        self.loop.call_soon_threadsafe(self._abort)

    async def connect(self, address: tuple[str, int]) -> Streams:
        """Return a connection to another server, which ends with the one that is served."""
        reader, writer = await asyncio.open_connection(*address)
        self._open[_this_task()].append(writer)
        return reader, writer

    async def listen(self) -> None:
        """Accept connections, always at the same port."""
        if self._listening:
            return
        self._listening = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, ssl=self._context, limit=CHUNK
        )
        self.port = self._listening.sockets[0].getsockname()[1]

    async def deafen(self) -> None:
        """Accept nothing more; serve what was accepted, which asyncio 3.11 would never close."""
        if not self._listening:
            return
        for listening in self._listening.sockets:
            self.loop.remove_reader(listening)
        await asyncio.sleep(0)
        self._listening.close()
        self._listening = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection to its end, however it ends."""
        task = _this_task()
        self._open[task] = [writer]
        try:
            await self.serve(reader, writer)
        except* (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            for each in self._open[task]:
                each.close()
                with contextlib.suppress(OSError):
                    await each.wait_closed()
            del self._open[task]

    def _abort(self) -> None:
        for writers in self._open.values():
            for writer in writers:
                writer.transport.abort()

    async def _end(self) -> None:
        """Accept nothing more, and cut what is open until the loop has no other task."""
        await self.deafen()
        ended: set[asyncio.Task[None]] = set()
        while len(asyncio.all_tasks()) > 1:
            for task in self._open.keys() - ended:
                task.cancel()  # once, since it has to wait for its streams then
                ended.add(task)
            self._abort()
            await asyncio.sleep(0)  # the last ones have yet to begin


def _this_task() -> asyncio.Task[None]:
    task: asyncio.Task[None] | None = asyncio.current_task()
    assert task
    return task


async def pass_both(one: Streams, other: Streams) -> None:
    """Pass bytes both ways until either side ends."""
    async with asyncio.TaskGroup() as ways:
        ways.create_task(_pass_on(one[0], other[1]))
        ways.create_task(_pass_on(other[0], one[1]))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    raise EOFError  # the end of one way is that of the other
