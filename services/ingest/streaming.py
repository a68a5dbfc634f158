"""One file on its way: from the upstream into the bucket, hashed, parsed and folded as the bytes pass.

The event loop moves bytes; a thread hashes and parses them. Between the two stands a queue of bounded size, so a
slow side slows the other down, and memory stays the same for a file of any size.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

import msgspec

from services.ingest.parser import DEFAULT_RULES, FileRules, FoldedFile, fold_trip_file
from shared.store import Upload

CHUNK_BYTES = 256 * 1024
CHUNKS_QUEUED_MAX = 4


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file once all of it has passed."""

    sha256: str
    size_bytes: int
    folded: FoldedFile


class Meter:
    """How far a stream has come: read by whoever reports progress."""

    def __init__(self) -> None:
        self.bytes_done = 0
        self.bytes_total: int | None = None
        self.trips_done = 0

    def count_trips(self, trips: int) -> None:
        """Note that ``trips`` have been folded so far."""
        self.trips_done = trips


class _Bridge:
    """A bounded queue of chunks from the event loop to one thread."""

    def __init__(self) -> None:
        self._chunks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(CHUNKS_QUEUED_MAX)
        self._loop = asyncio.get_running_loop()
        self.sha256 = hashlib.sha256()

    async def put(self, chunk: bytes) -> None:
        await self._room.acquire()
        self._chunks.put(chunk)

    def end(self) -> None:
        self._chunks.put(b"")

    def read(self) -> bytes:
        """Take the next chunk, in the thread; ``b""`` at the end."""
        chunk = self._chunks.get()
        if chunk:
            self.sha256.update(chunk)
            self._loop.call_soon_threadsafe(self._room.release)
        return chunk


async def stream_file(
    chunks: AsyncIterator[bytes],
    upload: Upload,
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    meter: Meter,
    threads: Executor,
) -> Streamed:
    """Pass a file through: each chunk to the upload, and to the thread that hashes and folds it.

    The upload is left to be completed or aborted. Raises InvalidTripFile as soon as the file is known to be bad, and
    whatever ``chunks`` and ``upload`` raise.
    """
    bridge = _Bridge()
    loop = asyncio.get_running_loop()
    parsing = loop.run_in_executor(
        threads, lambda: fold_trip_file(bridge.read, date=date, rules=rules, progress=meter.count_trips)
    )
    try:
        async for chunk in _gathered(chunks):
            await _put_unless_parsed(bridge, chunk, parsing)
            await upload.write(chunk)
            meter.bytes_done += len(chunk)
    finally:
        bridge.end()
        await asyncio.wait([parsing])
        parsing.exception()  # retrieved, should the stream's own error go first
    folded = await parsing
    return Streamed(sha256=bridge.sha256.hexdigest(), size_bytes=meter.bytes_done, folded=folded)


async def _gathered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small chunks, so that neither thread switches nor copies are paid for each packet."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        if len(buffer) >= CHUNK_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


async def _put_unless_parsed(bridge: _Bridge, chunk: bytes, parsing: asyncio.Future[FoldedFile]) -> None:
    """Queue a chunk for the thread; if it ended meanwhile, its verdict on the file is raised here."""
    putting = asyncio.ensure_future(bridge.put(chunk))
    either: list[asyncio.Future[Any]] = [putting, parsing]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not putting.done():
        putting.cancel()
    if parsing.done():
        parsing.result()
