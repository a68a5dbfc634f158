"""The change index: counters that tell a reader which months of summaries have changed since it listed them.

Each process that writes summaries has one object for each generation, ``state/changes/generation=G/{writer}.json``,
with a counter for each month. It counts each version of a summary after its compare-and-swap, and before it publishes
anything that follows from that version. The rules that keep the index exact:

- No object has two writers: its key has an id that was made for it.
- It is written by compare-and-swap on the ETag of the write before. So a late write cannot take a counter back.
- A counter never falls, and each write raises one. So equal ETags mean that nothing was counted in between.
- An object that gc deleted is created again with all its counters. A reader that misses an object lists every month.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from shared.domain import keys, objects
from shared.domain.objects import ChangeCounters, CorruptObject, NewerObject
from shared.runtime.clock import suspend_counting_s
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.storage.object_store import CasConflict, ObjectStore

COUNTERS_AGE_MIN = dt.timedelta(days=1)
"""gc deletes no younger counters, so that a reader that looks every hour has seen the last state of all."""
LOOKS_APART_MAX_S = 3600.0
"""Less than `COUNTERS_AGE_MIN`. In a longer time between two looks, counters may come, and gc may delete them.

The time in which the host of a reader is suspended counts: gc goes on elsewhere."""
GENERATIONS_MAX = 4
"""A process writes the live and the building generation. It counts one that it has forgotten in a new object."""
CONCURRENT_GETS_MAX = 8


class ChangeCounter:
    """Counts changed months in the objects of one process. One write of an object is in flight; callers share the next.

    A writer that was refused or interrupted counts again. An extra count only makes readers list a month once more.
    """

    def __init__(self, store: ObjectStore, *, clock_s: Callable[[], float] = suspend_counting_s) -> None:
        self._store = store
        self._clock_s = clock_s
        self._own: dict[int, _OwnCounters] = {}
        self._writes = SingleFlight[None]()
        self._others: _Others | None = None

    async def count(self, generation: int, months: Iterable[str]) -> None:
        """Count a change of each month, and return when the counters are stored. Does nothing without a month."""
        changed = Counter(set(months))
        if not changed:
            return
        own = self._own.get(generation)
        if own is None:
            own = self._own[generation] = _OwnCounters(self._store, generation)
            if len(self._own) > GENERATIONS_MAX:
                del self._own[next(iter(self._own))]
        own.months += changed
        await self._writes.run(own.key, own.write)

    async def others_have_counted(self, generation: int) -> bool:
        """Return whether another writer may have counted a change of a generation since the last call. Lists them.

        The first call returns True, and so does one long after the last, or after one for another generation.
        """
        before, began_s = self._others, self._clock_s()
        own = self._own.get(generation)
        listed = self._store.list(keys.changes_of_generation(generation))
        etags = {one.key: one.etag async for one in listed if own is None or one.key != own.key}
        self._others = _Others(generation, began_s, etags)
        if before is None or began_s - before.began_s > LOOKS_APART_MAX_S:
            return True
        return (generation, etags) != (before.generation, before.etags)


class _OwnCounters:
    def __init__(self, store: ObjectStore, generation: int) -> None:
        self._store = store
        self._etag: str | None = None
        self.key = keys.changes(generation, uuid.uuid4().hex)
        self.months = Counter[str]()

    async def write(self) -> None:
        body = objects.encode(ChangeCounters(months=dict(sorted(self.months.items()))))
        while True:
            try:
                self._etag = await self._store.compare_and_swap(self.key, body, etag=self._etag)
            except CasConflict:
                # The response to an earlier write was lost, gc deleted the object, or the store was undecided.
                stored = await self._store.get(self.key)
                self._etag = stored.etag if stored else None
                if stored is None or stored.body != body:
                    continue
            return


class _Others(NamedTuple):
    """The ETags of the counters of all other writers of a generation, by key, as listed from a time on."""

    generation: int
    began_s: float
    etags: dict[str, str]


class WriterCounters(NamedTuple):
    """The counters of one writer as they were read; ``months`` is None if they cannot be read."""

    etag: str
    months: Mapping[str, int] | None


async def read_counters(
    store: ObjectStore, generation: int, known: Mapping[str, WriterCounters]
) -> dict[str, WriterCounters]:
    """Return the counters of all writers of a generation by their keys. Only those with a new ETag are read."""
    listed = {one.key: one.etag async for one in store.list(keys.changes_of_generation(generation))}
    counters = {key: known[key] for key, etag in listed.items() if key in known and known[key].etag == etag}
    changed = [key for key in listed if key not in counters]
    read = await bounded_map(lambda key: _read_counters(store, key), changed, limit=CONCURRENT_GETS_MAX)
    return counters | dict(zip(changed, read, strict=True))


async def _read_counters(store: ObjectStore, key: str) -> WriterCounters:
    found = await store.get(key)
    if found is None:  # deleted since the listing
        return WriterCounters("deleted", None)
    try:
        return WriterCounters(found.etag, objects.decode(ChangeCounters, found.body, key).months)
    except (CorruptObject, NewerObject):
        return WriterCounters(found.etag, None)


def moved_months(before: Mapping[str, WriterCounters], after: Mapping[str, WriterCounters]) -> set[str] | None:
    """Return the months that were counted between two looks at the index.

    Returns None if any month may have been: a writer is gone, or its counters cannot be read.
    """
    moved: set[str] = set()
    for key in before.keys() | after.keys():
        then, now = before.get(key, _NO_COUNTERS), after.get(key)
        if now is None or (now.etag != then.etag and (now.months is None or then.months is None)):
            return None
        if now.etag != then.etag:
            moved |= {month for month, _ in (now.months or {}).items() ^ (then.months or {}).items()}
    return moved


_NO_COUNTERS = WriterCounters("", {})
