"""A TCP relay that stands before a server and can be told to behave as a broken network does.

It is for Kafka in the first place: a client is told where the broker is by the broker itself, so the broker has to
advertise the relay's port (``scripts/apache-kafka start --advertised-port``); nothing then reaches it another way.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Self

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Network(enum.Enum):
    """How the relay behaves."""

    OPEN = "open"
    AWAY = "away"
    """Connections are reset, those that are there and those that come: a server that is down."""
    SILENT = "silent"
    """Connections stay, and nothing comes through, in either direction: a cable that is cut."""


class Relay:
    """Relays ``127.0.0.1:port`` to ``target_port``; use it as an async context manager. Port 0: any free one.

    ``serve`` may take the place of the plain copying of bytes; then the relay cannot be made silent.
    """

    def __init__(self, target_port: int, *, port: int = 0, serve: Serve | None = None) -> None:
        self.target_port = target_port
        self.serve = serve or self._copy
        self._socket = socket.create_server((HOST, port))
        self.port = int(self._socket.getsockname()[1])
        self._open = asyncio.Event()
        self._open.set()
        self._network = Network.OPEN
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._cut()
        await self._server.wait_closed()

    async def become(self, network: Network) -> None:
        """Behave so from here on."""
        self._network = network
        if network is Network.SILENT:
            self._open.clear()
            return
        if network is Network.AWAY:
            await self._cut()
        self._open.set()

    async def _cut(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._network is Network.AWAY:
            reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError):
                await self.serve(reader, writer)
        except asyncio.CancelledError:
            reset(writer)  # asked to by ``_cut`` alone: the task ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(HOST, self.target_port)
        except OSError:
            reset(writer)
            raise
        try:
            ways = [self._pump(reader, there_writer), self._pump(there_reader, writer)]
            tasks = [asyncio.create_task(way) for way in ways]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in tasks:
                    one.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            there_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await self._open.wait()
            writer.write(chunk)
            await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection with a TCP reset."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
