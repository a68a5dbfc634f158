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

import msgspec

from services.ingest.parser import DEFAULT_RULES, FileRules, FoldedFile, fold_trip_file
from shared.store import Upload

BATCH_BYTES = 256 * 1024
BATCHES_QUEUED_MAX = 4


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
    """A bounded queue of batches of chunks, from the event loop to one thread."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(BATCHES_QUEUED_MAX)
        self._loop = asyncio.get_running_loop()
        self._parsing: asyncio.Future[FoldedFile] | None = None
        self.sha256 = hashlib.sha256()

    def watch(self, parsing: asyncio.Future[FoldedFile]) -> None:
        """Let no ``put`` wait for a thread that has ended."""
        self._parsing = parsing
        parsing.add_done_callback(lambda _: self._room.release())

    async def put(self, batch: list[bytes]) -> None:
        """Queue chunks for the thread; if it has ended, raise its verdict on the file."""
        await self._room.acquire()
        if self._parsing is not None and self._parsing.done():
            self._parsing.result()
        self._batches.put(batch)

    def end(self) -> None:
        self._batches.put([])

    def read(self) -> bytes:
        """Take the next bytes, in the thread; ``b""`` at the end."""
        batch = self._batches.get()
        if not batch:
            return b""
        # Joined here, not in the loop, and before hashing: each update gives up the interpreter and awaits it again.
        joined = b"".join(batch)
        self.sha256.update(joined)
        self._loop.call_soon_threadsafe(self._room.release)
        return joined


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
    bridge.watch(parsing)
    try:
        async for batch in _batches(chunks):
            await bridge.put(batch)
            for chunk in batch:
                await upload.write(chunk)
                meter.bytes_done += len(chunk)
    finally:
        bridge.end()
        await asyncio.wait([parsing])
        parsing.exception()  # retrieved, should the stream's own error go first
    folded = await parsing
    return Streamed(sha256=bridge.sha256.hexdigest(), size_bytes=meter.bytes_done, folded=folded)


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Gather small chunks, so that no switch of threads is paid for each packet."""
    batch: list[bytes] = []
    batch_bytes = 0
    async for chunk in chunks:
        batch.append(chunk)
        batch_bytes += len(chunk)
        if batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch
