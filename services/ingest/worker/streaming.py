"""One file on its way: from the upstream into the bucket, hashed, parsed and folded as the bytes pass.

The event loop moves bytes; a thread hashes and parses them. Between the two stands a queue of bounded size, so a
slow side slows the other down, and memory stays the same for a file of any size.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol

import msgspec

from services.ingest.parsing.parser import DEFAULT_RULES, FileRules, FoldedFile, InvalidTripFile, total_trip_file
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from shared.storage.object_store import Upload

BATCH_BYTES = 256 * 1024
BATCHES_QUEUED_MAX = 4


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a file once all of it has passed."""

    sha256: str
    size_bytes: int
    folded: FoldedFile


class DeadlyFile(RuntimeError):
    """A file that is not parsed any more, because workers have died while they parsed it."""


class FileRefused(RuntimeError):
    """The file is no trip file, and all of it that came has passed: ``fault`` is what is wrong with it.

    ``broke_off`` is why not all of it came, if it did not.
    """

    def __init__(
        self, fault: InvalidTripFile | DeadlyFile, *, sha256: str, size_bytes: int, broke_off: Exception | None
    ) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.broke_off = broke_off


class Fold(Protocol):
    """Folds one file: `total_trip_file`, or what refuses to."""

    def __call__(
        self, read: Callable[[], bytes], *, date: str, rules: FileRules, progress: Callable[[int], None]
    ) -> FoldedFile:
        """Fold what ``read`` gives, in a thread. Raises InvalidTripFile, and DeadlyFile if it can."""


def deadly_file(deaths: int, deaths_alone: int) -> Fold:
    """Return what refuses a file unread, because of so many deaths."""

    def refuse(
        read: Callable[[], bytes], *, date: str, rules: FileRules, progress: Callable[[int], None]
    ) -> FoldedFile:
        del read, date, rules, progress
        raise DeadlyFile(f"{deaths} workers died while they parsed this file; {deaths_alone} of them parsed it alone")

    return refuse


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
        self._parsing: asyncio.Future[FoldedFile | _Verdict] | None = None
        self.sha256 = hashlib.sha256()
        self.exhausted = False

    def watch(self, parsing: asyncio.Future[FoldedFile | _Verdict]) -> None:
        """Let no ``put`` wait for a thread that has ended."""
        self._parsing = parsing
        parsing.add_done_callback(lambda _: self._room.release())

    async def put(self, batch: list[bytes]) -> None:
        """Queue chunks for the thread. It ends before the file does by an error of its own alone: that is raised."""
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
            self.exhausted = True
            return b""
        # Joined here, not in the loop, and before hashing: each update gives up the interpreter and awaits it again.
        joined = b"".join(batch)
        self.sha256.update(joined)
        self._loop.call_soon_threadsafe(self._room.release)
        return joined


class _Verdict(msgspec.Struct, frozen=True):
    """What is wrong with a file, and whether all that came had to be read to know it."""

    fault: InvalidTripFile | DeadlyFile
    at_the_end: bool


async def stream_file(
    chunks: AsyncIterator[bytes],
    upload: Upload,
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    meter: Meter,
    threads: Executor,
    fold: Fold = total_trip_file,
) -> Streamed:
    """Pass a file through: each chunk to the upload, and to the thread that hashes and folds it.

    A file that is known to be bad is received to its end all the same, so that all of it can be put aside. The upload
    is left to be completed or aborted. Raises FileRefused for a bad file, and whatever ``chunks`` and ``upload`` raise.
    """
    bridge = _Bridge()
    loop = asyncio.get_running_loop()

    def parse() -> FoldedFile | _Verdict:
        try:
            return fold(bridge.read, date=date, rules=rules, progress=meter.count_trips)
        except (InvalidTripFile, DeadlyFile) as error:
            verdict = _Verdict(error, bridge.exhausted)
            while not bridge.exhausted:
                bridge.read()
            return verdict

    parsing = loop.run_in_executor(threads, parse)
    bridge.watch(parsing)
    broke_off: Exception | None = None
    try:
        async for batch in _batches(chunks):
            await bridge.put(batch)
            for chunk in batch:
                await upload.write(chunk)
                meter.bytes_done += len(chunk)
    except (TransientUpstreamError, UpstreamDown, PermanentUpstreamError) as error:
        broke_off = error
    finally:
        bridge.end()
        await asyncio.wait([parsing])
        parsing.exception()  # retrieved, should the stream's own error go first
    parsed = await parsing
    # What only the end of the file shows is no fault of a file that has not come to its end.
    if broke_off is not None and not (isinstance(parsed, _Verdict) and not parsed.at_the_end):
        raise broke_off
    sha256 = bridge.sha256.hexdigest()
    if isinstance(parsed, _Verdict):
        raise FileRefused(
            parsed.fault, sha256=sha256, size_bytes=meter.bytes_done, broke_off=broke_off
        ) from parsed.fault
    return Streamed(sha256=sha256, size_bytes=meter.bytes_done, folded=parsed)


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Gather small chunks, so that no switch of threads is paid for each packet.

    What came before a fault of the upstream is given before the fault is raised.
    """
    batch: list[bytes] = []
    batch_bytes = 0
    fault: Exception | None = None
    try:
        async for chunk in chunks:
            batch.append(chunk)
            batch_bytes += len(chunk)
            if batch_bytes >= BATCH_BYTES:
                yield batch
                batch, batch_bytes = [], 0
    except (TransientUpstreamError, UpstreamDown, PermanentUpstreamError) as error:
        fault = error
    if batch:
        yield batch
    if fault is not None:
        raise fault
