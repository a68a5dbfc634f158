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
import gc
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from services.aggregate.fold import StatEvent, as_stat_event, superseded
from services.aggregate.summary_writer import CachedSummary, SummaryWriter, summary_event
from shared.domain import keys, objects
from shared.domain.events import Cause, CityFolded, CountryDayPlanned, Event, cause_of
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer, Manifest, Plan, Summary
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.kafka.consumer import decode_batch
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.runtime.retry import run_all
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

FOLDS_AT_ONCE_MAX = 32
ALONE_S = 0.5
"""How soon after a swap nobody else can have taken the partition over, folded and published."""


class _Caused(msgspec.Struct, frozen=True):
    event: StatEvent
    cause: Cause | None


class CityStatsConsumer:
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

    async def _publish(self, generation: int, entry: CachedSummary) -> None:
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


YOUNG_OBJECTS_MAX: Final = 50_000


def tune_collector() -> None:
    """Let Python look for cycles when 50,000 objects are new, rather than 700.

    A batch is thousands of records and events, all of them freed without that, and each look goes through those that
    are there: an eighth of the processor time of a rebuild. It takes no more memory at its peak (`bench.fold`).
    """
    gc.set_threshold(YOUNG_OBJECTS_MAX, *gc.get_threshold()[1:])
