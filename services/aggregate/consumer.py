"""Consumes ``city-stats``: folds each batch of events into the summaries of their country-days.

The order of effects, which loses nothing and repeats nothing:

1. Take a batch, then read which generations are live and building. A rebuild sets its pointer before it takes the end
   of the topic, so every batch after that end is folded into both generations.
2. For each country-day and generation: fold the events, and write the summary by compare-and-swap. After a conflict,
   read the summary again and fold again.
3. Count the written versions in the change index, by one write for each generation. A version that the fold left
   unchanged is counted too, unless this process has counted it: another process may have crashed before its count.
4. Publish the live summaries, and publish them again if another process has changed them meanwhile. For a record that
   was already superseded, publish what the bucket holds. Otherwise the compacted topics would end in stale records.
   Only if another process has counted since the batch before are the summaries looked at again.
5. Publish ``CityFolded`` for every event that a request caused, also when the event changed nothing.
6. Commit.

After a crash at any step Kafka redelivers the batch, and folding it again changes nothing. A summary that cannot be
folded keeps no other from steps 3 and 4.

The change index is enough for step 4. Our record is stale if another process writes the summary after our fold, and
publishes it before our record. That process counts in between. So our next listing of the index differs from the one
after the batch before.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
import structlog
from msgspec import UNSET

from services.aggregate.fold import StatEvent, as_stat_event, superseded
from services.aggregate.summary_writer import Handled, SummaryWriter, publish_summary, summary_event
from shared.domain import keys
from shared.domain.events import (
    Cause,
    CityDayRetracted,
    CityDayStats,
    CityFolded,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    cause_of,
)
from shared.domain.ids import CountrySlug
from shared.domain.objects import BucketObject, CorruptObject, GenerationPointer, Manifest, Plan, Summary
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.domain.topics import Topic
from shared.kafka.consumer import DecodedRecord, decode_by_key, handle_keys
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent, process_span, traceparent_of
from shared.runtime import tracing
from shared.runtime.retry import run_all
from shared.storage.change_index import ChangeCounter
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

FOLDS_AT_ONCE_MAX = 32

_Item = TypeVar("_Item")
_Stored = TypeVar("_Stored", bound=BucketObject)
_log = structlog.get_logger()


class _Folded(msgspec.Struct, frozen=True, kw_only=True):
    """A folded country-day without its ledger, which may be large: a batch has many.

    ``handled`` is that of its version in each generation. ``event`` is None while only a part of the plan is known, so
    there is nothing to publish. ``newer`` are the bucket's events for records that are superseded, ``ended`` the
    ``CityFolded`` of each event that a request caused.
    """

    generation: int
    date: dt.date
    country: CountrySlug
    etag: str
    event: CountryDaySummary | None
    handled: dict[int, Handled]
    newer: list[Event]
    traceparent: str | None
    ended: list[OutgoingEvent]


class CityStatsConsumer:
    """Folds batches of ``city-stats``. Any number can run side by side: each summary is written by compare-and-swap."""

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        *,
        cache_bytes: int,
    ) -> None:
        self._store = store
        self._objects = Repository(store)
        self._publisher = publisher
        self._summaries = SummaryWriter(store, cache_bytes=cache_bytes)
        self._changes = ChangeCounter(store)
        self._one_batch = asyncio.Lock()  # a consumer that is restarted may take the next batch too early

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Fold a batch. When this returns, all effects have happened and the batch can be committed."""
        async with self._one_batch:
            return await self._process(batch)

    async def _process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        groups = await decode_by_key(batch, self._publisher, country_day_of)
        current = await read_current(self._store)
        folded: list[_Folded] = []

        async def fold(group: Sequence[DecodedRecord]) -> None:
            folded.append(await self._fold_group(group, current))

        try:
            results = await handle_keys(groups, fold, at_once_max=FOLDS_AT_ONCE_MAX)
        except Exception:
            await self._count_and_publish(folded, current)
            raise
        await self._count_and_publish(folded, current)
        await self._publisher.publish(ended for one in folded for ended in one.ended)
        return results

    async def _fold_group(self, group: Sequence[DecodedRecord], current: GenerationPointer) -> _Folded:
        events = [as_stat_event(item.event) for item in group]
        headers = [dict(item.record.headers) for item in group]
        causes = [cause_of(one) for one in headers]
        date, country = events[0].date, events[0].country
        traceparents = [traceparent_of(one) for one in headers]
        with process_span(Topic.CITY_STATS, traceparents, date=str(date), country=country, events=len(events)):
            handled = {}
            # The live summary comes last, so a rebuild that reads it first never finds it ahead of the built one.
            for generation in reversed(current.folded):
                entry = await self._summaries.fold(generation, events)
                handled[generation] = entry.handled
            request_ids = {cause.request_id for cause in causes if cause is not None}
            if request_ids:
                _log.info(
                    "country_day_folded",
                    date=str(date),
                    country=country,
                    version=entry.summary.version,
                    cities_reported=entry.summary.cities_reported,
                    cities_expected=entry.summary.cities_expected,
                    request_id=", ".join(sorted(request_ids)),
                )
            return _Folded(
                generation=current.live,
                date=date,
                country=country,
                etag=entry.etag,
                event=_event_of(entry.summary),
                handled=handled,
                newer=await self._current_of_superseded(events, entry.summary),
                traceparent=tracing.traceparent(),
                ended=[
                    OutgoingEvent(_city_folded(event, cause), traceparent=traceparent)
                    for event, cause, traceparent in zip(events, causes, traceparents, strict=True)
                    if cause is not None and not isinstance(event, CountryDayPlanned)
                ],
            )

    async def _count_and_publish(self, folded: Sequence[_Folded], current: GenerationPointer) -> None:
        await self._count(folded)
        await self._publish(folded, current)

    async def _count(self, folded: Sequence[_Folded]) -> None:
        """Count the versions that this process has not counted yet, by one write for each generation."""
        uncounted: dict[int, list[_Folded]] = {}
        for one in folded:
            for generation, handled in one.handled.items():
                if not handled.counted:
                    uncounted.setdefault(generation, []).append(one)
        for generation, of_generation in uncounted.items():
            await self._changes.count(generation, {keys.month_of(one.date) for one in of_generation})
            for one in of_generation:
                one.handled[generation].counted = True

    async def _publish(self, folded: Sequence[_Folded], current: GenerationPointer) -> None:
        """Publish the live summaries, and publish those again that another process has changed meanwhile.

        The record of the other process may come before ours, and the compacted topic must end in the latest.
        """
        await self._publisher.publish(
            OutgoingEvent(event, traceparent=one.traceparent) for one in folded for event in one.newer
        )
        unpublished = [one for one in folded if not one.handled[one.generation].published]
        await self._publisher.publish(
            OutgoingEvent(one.event, traceparent=one.traceparent) for one in unpublished if one.event is not None
        )
        not_all_count = current.changes_counted_since is UNSET
        if unpublished and (not_all_count or await self._changes.others_have_counted(current.live)):
            await _for_each(self._publish_if_changed, unpublished)
        for one in unpublished:
            one.handled[one.generation].published = True

    async def _publish_if_changed(self, folded: _Folded) -> None:
        generation, date, country = folded.generation, folded.date, folded.country
        present = await self._store.get(keys.summary(generation, date, country), first_bytes=0)
        if present is None or present.etag == folded.etag:
            return
        try:
            await publish_summary(
                self._store,
                self._publisher,
                self._changes,
                generation=generation,
                date=date,
                country=country,
                traceparent=folded.traceparent,
            )
        except CorruptObject as error:
            _leave_to_repair(error)

    async def _current_of_superseded(self, events: Sequence[StatEvent], summary: Summary) -> list[Event]:
        """Return the bucket's events for each key whose last record in this batch is already superseded."""
        if not any(superseded(summary, event) for event in events):
            return []  # nearly always, and much cheaper than building the keys
        last_of_key = {event.key: event for event in events}
        stale = [event for event in last_of_key.values() if superseded(summary, event)]
        current: list[Event] = []
        if any(isinstance(event, CountryDayPlanned) for event in stale):
            plan = await self._readable(Plan, keys.plan(summary.date))
            if plan and (summary.country in plan.countries or summary.country in plan.gone):
                current += (again for again in events_of_plan(plan, summary.country) if not superseded(summary, again))
        for event in stale:
            if isinstance(event, CountryDayPlanned):
                continue
            manifest = await self._readable(Manifest, keys.manifest(event.date, event.city_id))
            if manifest is not None:
                current += (
                    again
                    for again in events_of_manifest(manifest)
                    if again.key == event.key and not superseded(summary, again)
                )
        return current

    async def _readable(self, kind: type[_Stored], key: str) -> _Stored | None:
        try:
            return await self._objects.get(kind, key)
        except CorruptObject as error:
            _leave_to_repair(error)
            return None


def _leave_to_repair(error: CorruptObject) -> None:
    """Log an unreadable object of one date: `repair` publishes what it should have held."""
    if not error.harms_alone:
        raise error
    _log.error("object_unreadable", key=error.key, error=str(error))


async def _for_each(work: Callable[[_Item], Awaitable[None]], items: Iterable[_Item]) -> None:
    limit = asyncio.Semaphore(FOLDS_AT_ONCE_MAX)

    async def run(item: _Item) -> None:
        async with limit:
            await work(item)

    await run_all(map(run, items))


def country_day_of(event: Event) -> str:
    """Return the country-day of an event, which is the key that is folded."""
    stat = as_stat_event(event)
    return f"{stat.date}/{stat.country}"


def _event_of(summary: Summary) -> CountryDaySummary | None:
    return summary_event(summary) if summary.version else None


def _city_folded(event: CityDayStats | CityDayRetracted, cause: Cause) -> CityFolded:
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
    """Run the garbage collector after 50,000 new objects instead of 700.

    A batch has thousands of records and events, and reference counts free them all. Yet each run of the collector
    visits them: an eighth of the processor time of a rebuild. Peak memory does not grow (`bench.fold`).
    """
    gc.set_threshold(YOUNG_OBJECTS_MAX)
