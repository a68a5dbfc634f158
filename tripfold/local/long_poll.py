"""Long polling for a broker that has none: a relay of Kafka's protocol that holds back empty fetch responses.

Kafka holds a fetch request until there is a record or ``fetch.max.wait.ms`` is over. The embedded broker responds at
once, so an idle consumer would send thousands of requests a second. This relay stands before the broker. It holds an
empty response until a client produces a record, or HOLD_S is over. Clients notice nothing: the relay replaces the
broker's address in responses by its own.

Format: https://kafka.apache.org/protocol (frames of a 4-byte size; a request begins with its API key, API version and
correlation id, a response with its correlation id).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from typing import NamedTuple

HOLD_S = 0.5
FRAME_BYTES_MAX = 64 * 1024**2

_PRODUCE = 0
_FETCH = 1
_ADDRESS_BEARING = frozenset({3, 10})  # Metadata, FindCoordinator


class _Request(NamedTuple):
    """A request in progress: its API key, its size, and the number of produce responses before it."""

    api_key: int
    size_bytes: int
    produced: int


class Relay:
    """Relays connections from ``host:port`` to the broker on ``broker_port`` of the same host."""

    def __init__(self, host: str, port: int, broker_port: int) -> None:
        self._host = host
        self._broker_port = broker_port
        self._broker_address = host.encode() + broker_port.to_bytes(4, "big")
        self._own_address = host.encode() + port.to_bytes(4, "big")
        self._produced = 0
        self._news = asyncio.Event()

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side ends it."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            broker_reader, broker_writer = await asyncio.open_connection(self._host, self._broker_port)
            requests: dict[bytes, _Request] = {}
            ways = [
                asyncio.create_task(self._requests(reader, broker_writer, requests)),
                asyncio.create_task(self._responses(broker_reader, writer, requests)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                broker_writer.close()
        writer.close()

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: dict[bytes, _Request]
    ) -> None:
        while True:
            frame = await _read_frame(reader)
            requests[frame[4:8]] = _Request(int.from_bytes(frame[:2], "big"), len(frame), self._produced)
            await _write_frame(writer, frame)

    async def _responses(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: dict[bytes, _Request]
    ) -> None:
        # Offsets have a fixed size, so the shortest response to requests of one size has no records.
        # A mistake is harmless: it only delays a response a little.
        shortest: dict[int, int] = {}
        while True:
            frame = await _read_frame(reader)
            request = requests.pop(frame[:4])
            if request.api_key == _FETCH:
                shortest[request.size_bytes] = min(len(frame), shortest.get(request.size_bytes, len(frame)))
                if len(frame) == shortest[request.size_bytes]:
                    await self._hold(request.produced)
            elif request.api_key in _ADDRESS_BEARING:
                frame = frame.replace(self._broker_address, self._own_address)
            await _write_frame(writer, frame)
            if request.api_key == _PRODUCE:
                self._produced += 1
                self._news.set()
                self._news = asyncio.Event()

    async def _hold(self, produced: int) -> None:
        """Wait for the next produce response after ``produced`` of them, for at most HOLD_S."""
        if self._produced == produced:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), HOLD_S)


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    if size > FRAME_BYTES_MAX:
        raise OSError(f"a frame of {size} bytes: at most {FRAME_BYTES_MAX} are relayed")
    return await reader.readexactly(size)


async def _write_frame(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(len(frame).to_bytes(4, "big") + frame)
    await writer.drain()


async def relay_until_stopped(host: str, port: int, broker_port: int) -> None:
    """Relay until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = await asyncio.start_server(Relay(host, port, broker_port).relay, host, port)
    await stop.wait()
    server.close()


def main() -> None:
    """Run the relay as a program: ``python -m tripfold.local.long_poll --port P --broker-port P``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--broker-port", type=int, required=True)
    arguments = parser.parse_args()
    asyncio.run(relay_until_stopped(arguments.host, arguments.port, arguments.broker_port))


if __name__ == "__main__":
    main()
