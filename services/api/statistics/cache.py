"""Caches of the statistics: heads of summaries, encoded months, and response bodies.

Nothing here is ever stale. Each query computes its strong ETag from a fresh listing of S3, and the ETag names the exact
bytes. A cached body under this ETag equals a new one. Entries leave a cache only when it is full.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

from services.api.http.date_range import DateRange
from services.api.http.unreadable import UnreadableObject
from services.api.statistics.formats import EncodedMonth
from shared.domain.objects import SummaryHead
from shared.runtime.lru import LruCache

EncodedMonthKey = tuple[str, DateRange, str, bool]
"""The tag of a month, its days, the media type, and whether it is detailed."""

ENTRY_OVERHEAD_BYTES = 750  # the measured memory of a head beside the characters of its key and ETag


class Body:
    """A body that is complete or being made. Slow readers do not delay it."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.done = False
        self._parts: list[bytes] = []
        self._error: Exception | None = None
        self._grown = asyncio.Condition()

    async def make(self, parts: Iterator[bytes]) -> None:
        """Collect the parts in a thread. An error is raised to the readers."""
        try:
            async for part in iterate_in_thread(parts):
                async with self._grown:
                    self._parts.append(part)
                    self.size_bytes += len(part)
                    self._grown.notify_all()
        except Exception as error:  # noqa: BLE001 - every error is raised to the readers of the body
            self._error = error
        async with self._grown:
            self.done = True
            self._grown.notify_all()

    @property
    def failed(self) -> bool:
        """Whether making the body failed."""
        return self._error is not None

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield all parts from the first on, as they are made."""
        index = 0
        while True:
            async with self._grown:
                while index == len(self._parts) and not self.done:
                    await self._grown.wait()
            for part in self._parts[index:]:
                index += 1
                yield part
            if self.done and index == len(self._parts):
                break
        if self._error is not None:
            raise self._error

    async def whole(self) -> bytes:
        """Return the whole body."""
        return b"".join([part async for part in self.parts()])


class ResponseCache:
    """The most recently used bodies, and as many bytes of the encoded months that they are made of.

    A body that is being made counts with its expected size, and is never evicted.

    So LruCache, whose entries have their size when they come and may all be evicted, does not fit.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bodies: OrderedDict[str, Body] = OrderedDict()
        self._expected_bytes: dict[str, int] = {}
        self._making: set[asyncio.Task[None]] = set()
        self.months = EncodedMonths(bytes_max)

    def find(self, etag: str) -> Body | None:
        """Return the body under an ETag, or None."""
        body = self._bodies.get(etag)
        if body is not None:
            self._bodies.move_to_end(etag)
        return body

    def begin(self, etag: str, parts: Iterator[bytes], *, expected_bytes: int) -> Body | None:
        """Start to make a body from its parts. Return None, and consume no part, if the cache has no room."""
        if not self._has_room(expected_bytes):
            return None
        body = self._bodies[etag] = Body()
        self._expected_bytes[etag] = expected_bytes
        task = asyncio.create_task(self._make(etag, body, parts))
        self._making.add(task)
        task.add_done_callback(self._making.discard)
        return body

    async def _make(self, etag: str, body: Body, parts: Iterator[bytes]) -> None:
        await body.make(parts)
        del self._expected_bytes[etag]
        if body.failed or not self._has_room(0):
            self._bodies.pop(etag, None)

    def _has_room(self, wanted_bytes: int) -> bool:
        """Evict the least recently used bodies until there is room. Bodies that are being made stay."""
        used_bytes = sum(self._expected_bytes.get(etag, body.size_bytes) for etag, body in self._bodies.items())
        for etag in [etag for etag in self._bodies if etag not in self._expected_bytes]:
            if used_bytes + wanted_bytes <= self._bytes_max:
                break
            used_bytes -= self._bodies.pop(etag).size_bytes
        return used_bytes + wanted_bytes <= self._bytes_max


async def iterate_in_thread(parts: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield parts that a thread makes, because each takes long enough to block the event loop."""
    while (part := await asyncio.to_thread(next, parts, None)) is not None:
        yield part


class EncodedMonths:
    """The most recently used encoded months, by their tag, days, media type and detail.

    A response that changed is made from those that did not. Threads that make responses share it.
    """

    def __init__(self, bytes_max: int) -> None:
        self._months: LruCache[EncodedMonthKey, EncodedMonth] = LruCache(bytes_max, lambda _, month: month.size_bytes)
        self._lock = threading.Lock()

    def get(self, key: EncodedMonthKey) -> EncodedMonth | None:
        """Return an encoded month, or None."""
        with self._lock:
            return self._months.get(key)

    def keep(self, key: EncodedMonthKey, month: EncodedMonth) -> None:
        """Store an encoded month."""
        with self._lock:
            self._months.keep(key, month)


class ReadHead(NamedTuple):
    """A head as it was read, under the ETag that it had."""

    etag: str
    head: SummaryHead | UnreadableObject


class HeadCache:
    """The most recently used heads. A key has one ETag at a time."""

    def __init__(self, bytes_max: int) -> None:
        self._entries: LruCache[str, ReadHead] = LruCache(bytes_max, lambda key, read: _entry_bytes(key, read.etag))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, etag: str) -> ReadHead | None:
        """Return the head of ``key`` with this ETag, or None."""
        read = self._entries.get(key)
        return read if read is not None and read.etag == etag else None

    def keep(self, key: str, read: ReadHead) -> None:
        """Store a head; it replaces the previous one of the key."""
        self._entries.keep(key, read)


def _entry_bytes(key: str, etag: str) -> int:
    return len(key) + len(etag) + ENTRY_OVERHEAD_BYTES
