"""Long polling for the embedded broker: a relay that delays empty fetch responses.

Kafka responds to a fetch request once it has records, or after ``fetch.max.wait.ms``. The embedded broker responds at
once, so a waiting consumer would send thousands of requests a second, and an idle stack would use two cores. The relay
delays an empty response until a client produces, or for as long as the request allows, at most HOLD_S. It replaces the
broker's address in responses by its own.

Format: https://kafka.apache.org/protocol. A frame begins with its size (4 bytes), a request with its API key, API
version and correlation id, a response with its correlation id. A fetch request up to version 11 then has the client id,
the replica (4 bytes) and the longest wait (4 bytes, in milliseconds). Later versions are held for HOLD_S.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NamedTuple

HOLD_S = 0.5

_PRODUCE = 0
_FETCH = 1
_FETCH_VERSION_MAX = 11
_WITH_ADDRESS = frozenset({3, 10})  # Metadata, FindCoordinator


class _Request(NamedTuple):
    """An unanswered request: its kind, its size, the count of produce requests before it, and its longest wait."""

    api_key: int
    size_bytes: int
    produced: int
    hold_s: float


class Relay:
    """Relays connections to ``host:port`` to the broker on ``broker_port`` of the same host."""

    def __init__(self, host: str, port: int, broker_port: int) -> None:
        self._host = host
        self._port = port
        self._broker_port = broker_port
        self._broker_address = host.encode() + broker_port.to_bytes(4, "big")
        self._own_address = host.encode() + port.to_bytes(4, "big")
        self._produced = 0
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        """Accept connections while the context is open."""
        server = await asyncio.start_server(self.relay, self._host, self._port)
        try:
            yield
        finally:
            server.close()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side closes it."""
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            broker_reader, broker_writer = await asyncio.open_connection(self._host, self._broker_port)
            requests: dict[bytes, _Request] = {}
            directions = [
                asyncio.create_task(self._relay_requests(reader, broker_writer, requests)),
                asyncio.create_task(self._relay_responses(broker_reader, writer, requests)),
            ]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in directions:
                    task.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
                broker_writer.close()

    async def _relay_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: dict[bytes, _Request]
    ) -> None:
        while True:
            frame = await _read_frame(reader)
            requests[frame[4:8]] = _Request(_int(frame, 0, 2), len(frame), self._produced, _hold_s(frame))
            await _write_frame(writer, frame)

    async def _relay_responses(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: dict[bytes, _Request]
    ) -> None:
        # Offsets have a fixed size, so the shortest response to requests of one size has no records. A response that is
        # taken for empty by mistake only arrives later.
        shortest: dict[int, int] = {}
        while True:
            frame = await _read_frame(reader)
            request = requests.pop(frame[:4])
            if request.api_key == _FETCH:
                shortest[request.size_bytes] = min(len(frame), shortest.get(request.size_bytes, len(frame)))
                if len(frame) == shortest[request.size_bytes] and request.produced == self._produced:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), request.hold_s)
            elif request.api_key in _WITH_ADDRESS:
                frame = frame.replace(self._broker_address, self._own_address)
            await _write_frame(writer, frame)
            if request.api_key == _PRODUCE:
                self._produced += 1
                self._news.set()
                self._news = asyncio.Event()


def _int(frame: bytes, start: int, size: int) -> int:
    return int.from_bytes(frame[start : start + size], "big")


def _hold_s(frame: bytes) -> float:
    """Return how long an empty response to a request may be delayed."""
    if _int(frame, 0, 2) != _FETCH or _int(frame, 2, 2) > _FETCH_VERSION_MAX:
        return HOLD_S
    client_id_bytes = _int(frame, 8, 2) % 0xFFFF  # 0xFFFF: none
    return min(_int(frame, 10 + client_id_bytes + 4, 4) / 1000, HOLD_S)


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


async def _write_frame(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(4, "big") + frame)
    await writer.drain()
