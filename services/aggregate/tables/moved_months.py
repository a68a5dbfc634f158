"""Tells which months may have changed since their tables were current, by the change index.

The rules of the index are in `shared.storage.change_index`. A look comes before the listings and builds of a pass. So
each change that these miss is counted later, and the next look finds it. Once an hour every month is listed all the
same: then a mistake of the index lasts no longer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec
from msgspec import UnsetType

from shared.domain.objects import GenerationPointer
from shared.storage.change_index import WriterCounters, moved_months, read_counters
from shared.storage.object_store import ObjectStore

ALL_MONTHS_EVERY = dt.timedelta(hours=1)


class _Look(msgspec.Struct, frozen=True):
    """The index of a generation, which is trusted since a time, as it was found at another."""

    of: tuple[int, dt.datetime]
    counters: dict[str, WriterCounters]
    all_months_at: dt.datetime


class MovedMonths:
    """Compares the index with how it was when all tables were current last."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._clock = clock
        self._look: _Look | None = None
        self._settled: _Look | None = None

    async def look(self, pointer: GenerationPointer) -> set[str] | None:
        """Return the months that may have changed; None: any month may have."""
        since, now = pointer.changes_counted_since, self._clock()
        if isinstance(since, UnsetType):
            self._look = None
            return None
        before = self._settled
        if before is not None and before.of != (pointer.live, since):
            before = None
        known = before.counters if before else {}
        counters = await read_counters(self._store, pointer.live, known)
        moved = None
        if before is not None and self._clock() - before.all_months_at < ALL_MONTHS_EVERY:
            moved = moved_months(known, counters)
        all_months_at = before.all_months_at if before is not None and moved is not None else now
        self._look = _Look((pointer.live, since), counters, all_months_at)
        return moved

    def settle(self) -> None:
        """Note that all tables show at least what was counted before the last look."""
        self._settled = self._look
