"""Streams one file from the upstream into the bucket, and hashes, checks and totals its bytes on the way.

The event loop moves bytes; a thread hashes and parses them. A bounded queue connects the two. The slower side slows
the other one down, so memory use does not depend on the size of the file.
"""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import hashlib
import queue
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Protocol

import msgspec

from services.ingest.parsing.parser import DEFAULT_RULES, FileRules, FileTotals, InvalidTripFile, total_trip_file
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from shared.storage.object_store import Upload

BATCH_BYTES = 256 * 1024
BATCHES_QUEUED_MAX = 4

MMAP_THRESHOLD_BYTES = 1024 * 1024
TRIM_THRESHOLD_BYTES = 4 * 1024 * 1024
ARENAS_MAX = 1

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


class StreamedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A valid file that was received whole: its hash, its size and its totals."""

    sha256: str
    size_bytes: int
    totals: FileTotals


class CrashingFile(RuntimeError):
    """The file is not parsed again: each process that parsed it alone crashed."""


class FileRefused(RuntimeError):
    """The file is not a valid trip file; ``fault`` says why. All bytes that the upstream sent were uploaded.

    ``broke_off`` is the upstream's error if the file did not arrive whole.
    """

    def __init__(
        self, fault: InvalidTripFile | CrashingFile, *, sha256: str, size_bytes: int, broke_off: Exception | None
    ) -> None:
        super().__init__(str(fault))
        self.fault = fault
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.broke_off = broke_off


class FileParser(Protocol):
    """Parses one file: `total_trip_file`, or a function that refuses every file."""

    def __call__(
        self, read: Callable[[], bytes], *, date: str, rules: FileRules, progress: Callable[[int], None]
    ) -> FileTotals:
        """Total the bytes from ``read``, in a thread. Raises InvalidTripFile, and CrashingFile if it refuses."""


def refuse_crashing_file(crashes: int) -> FileParser:
    """Return a parser that refuses a file unread, because ``crashes`` processes crashed while they parsed it."""

    def refuse(
        read: Callable[[], bytes], *, date: str, rules: FileRules, progress: Callable[[int], None]
    ) -> FileTotals:
        del read, date, rules, progress
        raise CrashingFile(f"{crashes} processes crashed, one after the other, while each parsed this file alone")

    return refuse


class StreamProgress:
    """How much of a file was streamed and parsed so far."""

    def __init__(self) -> None:
        self.bytes_done = 0
        self.bytes_total: int | None = None
        self.trips_done = 0

    def count_trips(self, trips: int) -> None:
        """Set the number of trips totalled so far."""
        self.trips_done = trips


class _ChunkQueue:
    """A bounded queue of batches of chunks, from the event loop to one thread."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(BATCHES_QUEUED_MAX)
        self._loop = asyncio.get_running_loop()
        self._parsing: asyncio.Future[FileTotals | _Refusal] | None = None
        self.sha256 = hashlib.sha256()
        self.exhausted = False

    def watch(self, parsing: asyncio.Future[FileTotals | _Refusal]) -> None:
        """Release a waiting ``put`` when the thread ends."""
        self._parsing = parsing
        parsing.add_done_callback(lambda _: self._room.release())

    async def put(self, batch: list[bytes]) -> None:
        """Queue chunks for the thread. If the thread has failed, raise its error."""
        await self._room.acquire()
        if self._parsing is not None and self._parsing.done():
            self._parsing.result()
        self._batches.put(batch)

    def end(self) -> None:
        self._batches.put([])

    def read(self) -> bytes:
        """Return the next bytes, or ``b""`` at the end. The thread calls this."""
        batch = self._batches.get()
        if not batch:
            self.exhausted = True
            return b""
        # The thread joins the chunks, to spare the loop, and before hashing: each update releases and retakes the GIL.
        joined = b"".join(batch)
        self.sha256.update(joined)
        self._loop.call_soon_threadsafe(self._room.release)
        return joined


class _Refusal(msgspec.Struct, frozen=True):
    """The fault of a file, and whether the parser needed all received bytes to find it."""

    fault: InvalidTripFile | CrashingFile
    at_the_end: bool


async def stream_file(
    chunks: AsyncIterator[bytes],
    upload: Upload,
    *,
    date: str,
    rules: FileRules = DEFAULT_RULES,
    progress: StreamProgress,
    threads: Executor,
    parse: FileParser = total_trip_file,
) -> StreamedFile:
    """Send each chunk of a file to the upload, and to a thread that hashes and totals it.

    An invalid file is received to its end too, so that quarantine holds all of it. The caller completes or aborts the
    upload. Raises FileRefused for an invalid file, and every error of ``chunks`` and ``upload``.
    """
    chunk_queue = _ChunkQueue()
    loop = asyncio.get_running_loop()

    def hash_and_parse() -> FileTotals | _Refusal:
        try:
            return parse(chunk_queue.read, date=date, rules=rules, progress=progress.count_trips)
        except (InvalidTripFile, CrashingFile) as error:
            refusal = _Refusal(error, chunk_queue.exhausted)
            while not chunk_queue.exhausted:
                chunk_queue.read()
            return refusal

    parsing = loop.run_in_executor(threads, hash_and_parse)
    chunk_queue.watch(parsing)
    broke_off: Exception | None = None
    try:
        async for batch in _batches(chunks):
            await chunk_queue.put(batch)
            for chunk in batch:
                await upload.write(chunk)
                progress.bytes_done += len(chunk)
    except (TransientUpstreamError, UpstreamDown, PermanentUpstreamError) as error:
        broke_off = error
    finally:
        chunk_queue.end()
        await asyncio.wait([parsing])
        parsing.exception()  # mark it as retrieved, in case the stream's own error is raised first
    parsed = await parsing
    # A file that arrived in part is not at fault for an error that only its end showed.
    if broke_off is not None and not (isinstance(parsed, _Refusal) and not parsed.at_the_end):
        raise broke_off
    sha256 = chunk_queue.sha256.hexdigest()
    if isinstance(parsed, _Refusal):
        raise FileRefused(
            parsed.fault, sha256=sha256, size_bytes=progress.bytes_done, broke_off=broke_off
        ) from parsed.fault
    return StreamedFile(sha256=sha256, size_bytes=progress.bytes_done, totals=parsed)


async def _batches(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Gather small chunks into batches, because each batch costs a switch of threads.

    An upstream error is raised after the chunks that came before it.
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


def tune_allocator() -> None:
    """Set glibc's allocator so that streams reuse their memory: map only large buffers, and share one heap.

    By default glibc maps buffers over 128 KiB, and raises this threshold up to 32 MiB whenever a large buffer is freed.
    The buffers of upload parts then come from the heap and fragment it: 20 MB more for one stream, as measured.
    A threshold fixed at 128 KiB costs 600,000 page faults per gigabyte instead of 20,000. The kernel then maps,
    clears and unmaps every batch and every parser window. A heap that is trimmed at once, or one heap per thread,
    costs as much. Other C libraries have no such settings and stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
        libc.mallopt(_M_ARENA_MAX, ARENAS_MAX)
