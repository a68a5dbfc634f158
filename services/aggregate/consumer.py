"""Folding a batch of events into the summaries of their country-days.

The order of effects, and why it loses and repeats nothing:

1. take a batch, then read which generations are live and building (in this order: a rebuild that sets its pointer
   before it takes the end of the topic then knows that every later batch is folded into both);
2. for each country-day and generation: fold, and swap the summary in; lost the race → read again, fold again;
3. publish the live summaries, again if another process has changed them meanwhile, and for records that were already
   superseded when they came, what the bucket holds (the compacted topics would otherwise end in stale records);
4. publish ``CityFolded`` for every event that a request caused, also when it changed nothing;
5. commit.

A crash after any step leaves a batch that comes again, and folding it again changes nothing.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Callable, Sequence

import msgspec

from services.aggregate.fold import StatEvent, as_stat_event, empty_summary, fold, join, superseded
from shared.domain import keys, objects
from shared.domain.events import Cause, CityFolded, CountryDayPlanned, CountryDaySummary, Event, cause_of
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer, Manifest, Plan, Summary
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.kafka.consumer import decode_batch
from shared.kafka.producer import ConsumedRecord, OutgoingEvent, Publisher
from shared.runtime import metrics
from shared.runtime.lru import LruCache
from shared.runtime.retry import run_all
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository

FOLDS_AT_ONCE_MAX = 32
ENTRY_BYTES = 1_500
ALONE_S = 0.5
"""How soon after a swap nobody else can have taken the partition over, folded and published."""


class _Cached(msgspec.Struct):
    summary: Summary
    etag: str
    body_bytes: int
    ours: bool = False  # this process wrote it, rather than read it
    alone_at_s: float | None = None  # when it was swapped in over what was ours, too
    published: bool = False

    @property
    def memory_bytes(self) -> int:
        """What it takes in memory, as measured: twice its JSON, and as much as is in none."""
        return ENTRY_BYTES + 2 * self.body_bytes


class _Caused(msgspec.Struct, frozen=True):
    event: StatEvent
    cause: Cause | None


class SummaryWriter:
    """Changes summaries by compare-and-swap: lost the race → read again, change again.

    A summary that is not in the cache is taken to be as the last such one was. If that was missing, it is created
    without being looked for, which fails if it is there: new dates and new generations take one request, not two.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        cache_bytes: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._last_was_missing = False
        # What this process wrote or read last, so a steady state costs one PUT a fold. A stale entry loses its swap.
        self._cache: LruCache[str, _Cached] = LruCache(cache_bytes, lambda _, entry: entry.memory_bytes)
        self._clock_s = clock_s

    async def fold(self, generation: int, events: Sequence[StatEvent]) -> _Cached:
        """Fold events of one country-day into its summary of a generation; return what is stored then."""
        date, country = events[0].date, events[0].country
        return await self._change(generation, empty_summary(date, country), lambda before: fold(before, events))

    async def join(self, generation: int, other: Summary) -> None:
        """Join another summary into that of its country-day in a generation."""
        await self._change(generation, empty_summary(other.date, other.country), lambda before: join(before, other))

    async def _change(self, generation: int, empty: Summary, change: Callable[[Summary], Summary]) -> _Cached:
        key = keys.summary(generation, empty.date, empty.country)
        lost = False
        while True:
            known = self._cache.get(key)
            guessed = known is None and self._last_was_missing and not lost
            if known is None and not guessed:
                known = await self._read(key)
                self._last_was_missing = known is None
            before = known.summary if known else empty
            after = change(before)
            if known and after is before:
                # A cached summary ages, and what is superseded is asked of the present one.
                found = await self._store.get(key, first_bytes=1)
                if found is None or found.etag == known.etag:
                    return known
                self._cache.drop(key)
                continue
            body = objects.encode(after)
            try:
                etag = await self._store.compare_and_swap(key, body, etag=known.etag if known else None)
            except CasConflict:
                if not guessed:
                    metrics.cas_conflicts.labels("summary").inc()
                self._cache.drop(key)
                lost = True
                continue
            except BaseException:
                self._cache.drop(key)
                raise
            alone_at_s = self._clock_s() if known and known.ours else None
            written = _Cached(after, etag, len(body), ours=True, alone_at_s=alone_at_s)
            self._cache.keep(key, written)
            return written

    async def _read(self, key: str) -> _Cached | None:
        found = await self._store.get(key)
        if found is None:
            return None
        entry = _Cached(objects.decode(Summary, found.body, key), found.etag, len(found.body))
        self._cache.keep(key, entry)
        return entry


class Folder:
    """Folds batches of ``city-stats``. Any number can run side by side: the swap of each summary decides."""

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        *,
        cache_bytes: int,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._objects = Repository(store)
        self._publisher = publisher
        self._clock_s = clock_s
        self._summaries = SummaryWriter(store, cache_bytes=cache_bytes, clock_s=clock_s)

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        """Fold a batch. When it returns, all its effects have happened and it can be committed."""
        groups: dict[tuple[dt.date, CountrySlug], list[_Caused]] = {}
        for record, event in (
            (item.record, as_stat_event(item.event)) for item in await decode_batch(batch, self._publisher)
        ):
            caused = _Caused(event, cause_of(dict(record.headers)))
            groups.setdefault((event.date, event.country), []).append(caused)
        current = await read_current(self._store)
        room = asyncio.Semaphore(FOLDS_AT_ONCE_MAX)

        async def fold_one(group: list[_Caused]) -> None:
            async with room:
                await self._fold_group(group, current)

        await run_all(fold_one(group) for group in groups.values())
        await self._publisher.publish(
            OutgoingEvent(_folded(item.event, item.cause))
            for group in groups.values()
            for item in group
            if item.cause is not None and not isinstance(item.event, CountryDayPlanned)
        )

    async def _fold_group(self, group: list[_Caused], current: GenerationPointer) -> None:
        events = [item.event for item in group]
        # Live comes last: whoever compares the two after a look at the live one never finds it ahead.
        for generation in reversed(current.folded):
            entry = await self._summaries.fold(generation, events)
        await self._publisher.publish(map(OutgoingEvent, await self._current_of_superseded(events, entry.summary)))
        if not entry.published:
            await self._publish(current.live, entry)
            entry.published = True

    async def _publish(self, generation: int, entry: _Cached) -> None:
        """Publish a live summary, and what it has become if another process has changed it meanwhile.

        That one's record may have come before ours, and the compacted topic is to end in the latest. The steady state
        is not asked for it: what was swapped in over a swap of our own, a moment ago, is nobody else's.
        """
        key = keys.summary(generation, entry.summary.date, entry.summary.country)
        summary, etag = entry.summary, entry.etag
        while True:
            # Version 0 is a country-day of which only a part of a plan is known: there is nothing to tell.
            if summary.version:
                await self._publisher.publish([OutgoingEvent(summary_event(summary))])
            if entry.alone_at_s is not None and self._clock_s() - entry.alone_at_s < ALONE_S:
                return
            present = await self._store.get(key, first_bytes=1)
            if present is None or present.etag == etag:
                return
            found = await self._store.get(key)
            if found is None:
                return
            summary, etag = objects.decode(Summary, found.body, key), found.etag

    async def _current_of_superseded(self, events: Sequence[StatEvent], summary: Summary) -> list[Event]:
        """Return what the bucket holds for each key whose last record of this batch is already superseded."""
        if not any(superseded(summary, event) for event in events):
            return []  # nearly always, and much cheaper than the keys
        last_of_key = {event.key: event for event in events}
        stale = [event for event in last_of_key.values() if superseded(summary, event)]
        current: list[Event] = []
        if any(isinstance(event, CountryDayPlanned) for event in stale):
            plan = await self._objects.get(Plan, keys.plan(summary.date))
            if plan and (summary.country in plan.countries or summary.country in plan.gone):
                current += (again for again in events_of_plan(plan, summary.country) if not superseded(summary, again))
        for event in stale:
            if isinstance(event, CountryDayPlanned):
                continue
            manifest = await self._objects.get(Manifest, keys.manifest(event.date, event.city_id))
            if manifest is not None:
                current += (
                    again
                    for again in events_of_manifest(manifest)
                    if again.key == event.key and not superseded(summary, again)
                )
        return current


def summary_event(summary: Summary) -> CountryDaySummary:
    """Return what downstream consumers are told of a summary: its totals, not its ledger."""
    return CountryDaySummary(
        date=summary.date,
        country=summary.country,
        country_name=summary.country_name,
        version=summary.version,
        totals=summary.totals,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
        complete=summary.complete,
        last_ingested_at=summary.last_ingested_at,
    )


def _folded(event: StatEvent, cause: Cause | None) -> CityFolded:
    assert cause is not None
    assert not isinstance(event, CountryDayPlanned)
    return CityFolded(
        request_id=cause.request_id,
        date=event.date,
        city_id=event.city_id,
        plan_revision=cause.plan_revision,
        position=cause.position,
        country=event.country,
        revision=event.revision,
    )
