"""Writes summaries by compare-and-swap, and publishes stored objects until their topics end in the latest version."""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial

import msgspec

from services.aggregate.fold import StatEvent, empty_summary, fold, join
from shared.domain import keys, objects
from shared.domain.events import CountryDaySummary, Event
from shared.domain.ids import CountrySlug
from shared.domain.objects import Summary
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.runtime.lru import LruCache
from shared.storage.change_index import ChangeCounter
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import CasConflict, ObjectStore

CACHE_ENTRY_BYTES = 1_500


class Handled(msgspec.Struct):
    """The steps that this process has taken with one version of a summary."""

    counted: bool = False
    published: bool = False


class CachedSummary(msgspec.Struct):
    """A summary as this process last read or wrote it."""

    summary: Summary
    etag: str
    body_bytes: int
    handled: Handled = msgspec.field(default_factory=Handled)

    @property
    def memory_bytes(self) -> int:
        """The measured use of memory: a fixed part, and twice the JSON."""
        return CACHE_ENTRY_BYTES + 2 * self.body_bytes


class SummaryWriter:
    """Changes summaries by compare-and-swap. After a conflict it reads the summary again and changes it again.

    A summary that has vanished from the bucket is written again, as this process last knew it.

    If the last summary that was not in the cache did not exist, the next one is created without a read. The write fails
    if it exists. So new dates and new generations take one request each, not two.
    """

    def __init__(self, store: ObjectStore, *, cache_bytes: int) -> None:
        self._store = store
        self._last_was_missing = False
        # The last versions are in memory, so a fold costs one PUT. A stale entry ends in a conflict.
        self._cache: LruCache[str, CachedSummary] = LruCache(cache_bytes, lambda _, entry: entry.memory_bytes)

    async def fold(self, generation: int, events: Sequence[StatEvent]) -> CachedSummary:
        """Fold events of one country-day into its summary of a generation, and return the stored summary."""
        date, country = events[0].date, events[0].country
        return await self._change(generation, empty_summary(date, country), lambda before: fold(before, events))

    async def join(self, generation: int, other: Summary) -> None:
        """Join another summary into that of its country-day in a generation."""
        await self._change(generation, empty_summary(other.date, other.country), lambda before: join(before, other))

    async def _change(self, generation: int, empty: Summary, change: Callable[[Summary], Summary]) -> CachedSummary:
        key = keys.summary(generation, empty.date, empty.country)
        conflicted = False
        base = empty
        while True:
            known = self._cache.get(key)
            metrics.count_lookups("summaries", hits=known is not None, misses=known is None)
            guessed = known is None and self._last_was_missing and not conflicted
            if known is None and not guessed:
                known = await self._read(key)
                self._last_was_missing = known is None
            base = known.summary if known else base
            stored_etag = known.etag if known else None
            after = change(base)
            if known and after is base:
                # A cached summary may be stale, and the caller compares revisions with the stored one.
                found = await self._store.get(key, first_bytes=0)
                stored_etag = found.etag if found else None
                if stored_etag == known.etag:
                    return known
                if found is not None:
                    self._cache.drop(key)
                    continue
            body = objects.encode(after)
            try:
                etag = await self._store.compare_and_swap(key, body, etag=stored_etag)
            except CasConflict:
                if not guessed:
                    metrics.cas_conflicts.labels("summary").inc()
                self._cache.drop(key)
                conflicted = True
                continue
            except BaseException:
                self._cache.drop(key)
                raise
            written = CachedSummary(after, etag, len(body))
            self._cache.keep(key, written)
            return written

    async def _read(self, key: str) -> CachedSummary | None:
        found = await self._store.get(key)
        if found is None:
            return None
        entry = CachedSummary(objects.decode(Summary, found.body, key), found.etag, len(found.body))
        self._cache.keep(key, entry)
        return entry


def summary_event(summary: Summary) -> CountryDaySummary:
    """Return the event of a summary for downstream consumers: its totals without its ledger."""
    return CountryDaySummary(
        date=summary.date,
        country=summary.country,
        country_name=summary.country_name,
        version=summary.version,
        totals=summary.totals,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
        cities_suspicious=summary.cities_suspicious,
        complete=summary.complete,
        last_ingested_at=summary.last_ingested_at,
    )


async def publish_summary(
    store: ObjectStore,
    publisher: Publisher,
    changes: ChangeCounter,
    *,
    generation: int,
    date: dt.date,
    country: CountrySlug,
    traceparent: str | None = None,
) -> int:
    """Publish a live summary as it is stored, and again if another generation was made live meanwhile.

    ``generation`` is the one that the caller found live. Each version is counted first: its writer may have crashed.
    Returns the number of the summary's events.
    """

    def events_of(body: bytes) -> list[Event]:
        summary = objects.decode(Summary, body, key)
        return [summary_event(summary)] if summary.version else []

    while True:
        count = partial(changes.count, generation, [keys.month_of(date)])
        key = keys.summary(generation, date, country)
        published = await publish_as_stored(
            store, publisher, key, events_of, before_publish=count, traceparent=traceparent
        )
        live = (await read_current(store)).live
        if live == generation:
            return published
        generation = live


async def publish_as_stored(
    store: ObjectStore,
    publisher: Publisher,
    key: str,
    events_of: Callable[[bytes], Iterable[Event]],
    *,
    before_publish: Callable[[], Awaitable[None]] | None = None,
    traceparent: str | None = None,
) -> int:
    """Publish the events of a stored object, and again if it changed meanwhile; return their number.

    Otherwise these records could follow those of the change, and compaction would keep the older ones.
    ``before_publish`` runs after each read.
    """
    found = await store.get(key)
    while found is not None:
        outgoing = [OutgoingEvent(event, traceparent=traceparent) for event in events_of(found.body)]
        if before_publish is not None:
            await before_publish()
        await publisher.publish(outgoing)
        again = await store.get(key, first_bytes=0)
        if again is not None and again.etag == found.etag:
            return len(outgoing)
        found = await store.get(key)
    return 0
