"""A TCP relay in front of a server that can simulate a broken network.

The relay is mainly for Kafka. Clients learn the broker's address from the broker, so the broker must advertise the
relay's port (``scripts/apache-kafka start --advertised-port``). Then no client can bypass the relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Self

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class NetworkState(enum.Enum):
    """How the relay behaves."""

    OPEN = "open"
    DOWN = "down"
    """The relay resets open and new connections, like a server that is down."""
    BLACKHOLED = "blackholed"
    """Connections stay open but no byte passes in either direction, like a cut cable."""


class Relay:
    """Relays ``127.0.0.1:port`` to ``target_port``; use it as an async context manager. Port 0 picks a free port.

    ``serve`` can replace the plain copying of bytes; then the relay cannot be blackholed.
    """

    def __init__(self, target_port: int, *, port: int = 0, serve: Serve | None = None) -> None:
        self.target_port = target_port
        self.serve = serve or self._copy
        self._socket = socket.create_server((HOST, port))
        self.port = int(self._socket.getsockname()[1])
        self._open = asyncio.Event()
        self._open.set()
        self._network = NetworkState.OPEN
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._reset_all()
        await self._server.wait_closed()

    async def set_state(self, network: NetworkState) -> None:
        """Change how the relay behaves from now on."""
        self._network = network
        if network is NetworkState.BLACKHOLED:
            self._open.clear()
            return
        if network is NetworkState.DOWN:
            await self._reset_all()
        self._open.set()

    async def _reset_all(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._network is NetworkState.DOWN:
            reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError):
                await self.serve(reader, writer)
        except asyncio.CancelledError:
            reset(writer)  # only ``_reset_all`` cancels this task, so it ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            target_reader, target_writer = await asyncio.open_connection(HOST, self.target_port)
        except OSError:
            reset(writer)
            raise
        try:
            directions = [self._pump(reader, target_writer), self._pump(target_reader, writer)]
            tasks = [asyncio.create_task(direction) for direction in directions]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for one in tasks:
                    one.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            target_writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK_BYTES):
            await self._open.wait()
            writer.write(chunk)
            await writer.drain()


class Network:
    """The relays in front of the brokers of a cluster, one each, which behave alike."""

    def __init__(self, relays: Sequence[Relay]) -> None:
        self._relays = relays

    @property
    def address(self) -> str:
        """The bootstrap address for clients."""
        return ",".join(f"{HOST}:{relay.port}" for relay in self._relays)

    async def set_state(self, state: NetworkState) -> None:
        """Change how all relays behave from now on."""
        for relay in self._relays:
            await relay.set_state(state)


def reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection with a TCP reset."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
