"""A relay in front of a Kafka broker, that damages the records of fetch responses.

Format: https://kafka.apache.org/protocol. A frame begins with its size (4 bytes), a request with its API key (2 bytes),
its version (2 bytes) and its correlation id (4 bytes), and a response with its correlation id.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

HOST = "127.0.0.1"
DAMAGED = b"damage this value"
"""The value of the records that can be damaged."""

_FETCH = 1
_WITH_ADDRESS = frozenset({3, 10})  # Metadata, FindCoordinator


class DamagingRelay:
    """Damages the next ``responses`` with a record of the value DAMAGED. Clients reach the broker only through it."""

    def __init__(self, broker_address: str) -> None:
        self.responses = 0
        self._host, port = broker_address.rsplit(":", 1)
        self._broker_port = int(port)
        self.port = 0
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Accept connections while the context is open. Yields the bootstrap address."""
        server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield f"{HOST}:{self.port}"
        finally:
            server.close()
            for one in self._connections:
                one.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._relay(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            broker_reader, broker_writer = await asyncio.open_connection(self._host, self._broker_port)
            kinds: dict[bytes, int] = {}
            with contextlib.closing(broker_writer):
                directions = [
                    asyncio.create_task(self._pass_requests(reader, broker_writer, kinds)),
                    asyncio.create_task(self._pass_responses(broker_reader, writer, kinds)),
                ]
                try:
                    await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in directions:
                        one.cancel()
                    await asyncio.gather(*directions, return_exceptions=True)

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kinds: dict[bytes, int]
    ) -> None:
        while True:
            frame = await _read_frame(reader)
            kinds[frame[4:8]] = int.from_bytes(frame[:2], "big")
            await _write_frame(writer, frame)

    async def _pass_responses(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kinds: dict[bytes, int]
    ) -> None:
        while True:
            frame = await _read_frame(reader)
            kind = kinds.pop(frame[:4])
            if kind in _WITH_ADDRESS:
                for host in (b"127.0.0.1", b"localhost"):
                    address = host + self._broker_port.to_bytes(4, "big")
                    frame = frame.replace(address, HOST.encode() + self.port.to_bytes(4, "big"))
            elif kind == _FETCH and self.responses and DAMAGED in frame:
                self.responses -= 1
                frame = frame.replace(DAMAGED, DAMAGED.swapcase())
            await _write_frame(writer, frame)


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


async def _write_frame(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(4, "big") + frame)
    await writer.drain()
