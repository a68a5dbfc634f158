"""Reads what explains the completeness of a range: plans, requests, backfills and schedules.

- **Bounded.** A few listings for the range, and for each incomplete date at most the plan, the object that names its
  requests, and two request records. Plans and those objects are cached by their ETags.
- **Shared.** Concurrent clients of a range share one reading, which begins after each of them came.
- **Unchanged is cheap.** The latest grid of a range is kept with a hash of all that it was derived from. It is derived
  again only if this hash differs. The heads of the summaries are not read while their tag is the same.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import msgspec

from services.api.completeness.facts import (
    DateFacts,
    PlanLayout,
    awaited_dates,
    lacking_of,
    layout_of,
    missed_deadlines,
)
from services.api.completeness.states import grid_of
from services.api.http.conditional import EncodedJson
from services.api.http.date_range import DateRange, ProcessableDates
from services.api.http.deadline import deadline
from services.api.http.unreadable import UnreadableObject, get_if_readable, unreadable_header
from services.api.statistics.reader import Reading, SummaryReader
from shared.domain import keys
from shared.domain.ids import CountrySlug, RequestId, request_time_ms
from shared.domain.objects import ActiveRequests, Backfill, BucketObject, Plan, RequestRecord, Schedule
from shared.domain.requests import status_of
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.runtime.lru import LruCache
from shared.storage.backfills import read_open
from shared.storage.object_store import ObjectInfo, ObjectStore

READING_DEADLINE_S = 60.0
CONCURRENT_GETS_MAX = 16
LAYOUTS_BYTES = 16 * 1024**2
ACTIVE_BYTES = 2 * 1024**2
GRIDS_BYTES = 32 * 1024**2
ENTRY_BYTES = 500
COUNTRY_BYTES = 100
PUBLISHED_AFTER_MAX_MS = 600_000

_Stored = TypeVar("_Stored", bound=BucketObject)
_Value = TypeVar("_Value")
_Cache = LruCache[str, tuple[str, _Value]]  # by key, with the ETag


class _Read(NamedTuple, Generic[_Stored]):
    """Objects of one kind that can be read, and the reports on the others."""

    values: list[_Stored]
    unreadable: list[UnreadableObject]


class _Explanation(NamedTuple):
    """All that explains the summaries of a range: facts by date, reports on unreadable objects, names by country."""

    dates: list[DateFacts]
    unreadable: list[UnreadableObject]
    names: dict[CountrySlug, str]


class _KeptGrid(NamedTuple):
    """The latest grid of a range, the tag and the settled dates of its summaries, and the hash of its explanation."""

    tag: str
    settled: frozenset[dt.date]
    explanation_hash: bytes
    grid: EncodedJson


class CompletenessReader:
    """Reads the completeness of ranges of dates."""

    def __init__(
        self,
        store: ObjectStore,
        summaries: SummaryReader,
        processable: ProcessableDates,
        *,
        clock: Callable[[], dt.datetime],
    ) -> None:
        self._store = store
        self._summaries = summaries
        self._processable = processable
        self._clock = clock
        self._layouts: _Cache[PlanLayout] = LruCache(LAYOUTS_BYTES, _layout_bytes)
        self._active: _Cache[ActiveRequests] = LruCache(ACTIVE_BYTES, _active_bytes)
        self._grids: LruCache[DateRange, _KeptGrid] = LruCache(GRIDS_BYTES, _grid_bytes)
        self._readings = SingleFlight[EncodedJson]()

    async def read(self, days: DateRange) -> EncodedJson:
        """Return how complete the dates of a range are, by country: a CompletenessGrid as JSON."""
        return await self._readings.run(f"{days.first} {days.last}", partial(self._read, days))

    async def _read(self, days: DateRange) -> EncodedJson:
        async with deadline(READING_DEADLINE_S, f"Reading the completeness from {days.first} to {days.last}"):
            kept = self._grids.get(days)
            reading = await self._summaries.read(days, tag_suffices=lambda tag: kept is not None and tag == kept.tag)
            settled = kept.settled if kept is not None and reading.months is None else _settled_dates(reading)
            explanation = await self._explanation(days, settled)
            explanation_hash = await asyncio.to_thread(_hash_of, explanation)
            if kept is not None and (reading.tag, explanation_hash) == (kept.tag, kept.explanation_hash):
                return kept.grid
            if reading.months is None:
                tag, reading = reading.tag, await self._summaries.read(days)
                if reading.tag != tag:
                    settled = _settled_dates(reading)
                    explanation = await self._explanation(days, settled)
                    explanation_hash = await asyncio.to_thread(_hash_of, explanation)
        grid = await asyncio.to_thread(_encoded, reading, explanation)
        self._grids.keep(days, _KeptGrid(reading.tag, settled, explanation_hash, grid))
        return grid

    async def _explanation(self, days: DateRange, settled: Collection[dt.date]) -> _Explanation:
        """Read what explains the dates of a range. Nothing is read for settled dates that have a plan."""
        plans = await self._listed(keys.PLANS, keys.plan, days)
        active = await self._listed(keys.ACTIVE_REQUESTS, keys.active_requests, days)
        open_dates = [date for date in days.dates() if date not in plans or date not in settled]
        facts = await bounded_map(
            lambda date: self._facts(date, plans.get(date), active.get(date)), open_dates, limit=CONCURRENT_GETS_MAX
        )
        schedules = await self._read_all(Schedule, [one.key async for one in self._store.list(keys.SCHEDULES)])
        backfills = await self._read_all(Backfill, [keys.backfill(one) for one in await read_open(self._store)])
        slugs = await self._summaries.countries()
        missed = missed_deadlines(schedules.values, self._clock())
        awaited = awaited_dates(backfills.values, days)
        read = {one.date: one for one in facts}
        dates = [
            msgspec.structs.replace(
                read.get(date) or DateFacts(date=date, planned=True),
                backfill=awaited.get(date),
                deadline=missed.get(date),
                processable=self._processable.first <= date <= self._processable.last,
            )
            for date in days.dates()
        ]
        names = {slug: name for name, slug in slugs.items()}
        return _Explanation(dates, [*schedules.unreadable, *backfills.unreadable], names)

    async def facts_of(self, date: dt.date) -> DateFacts:
        """Return the plan and the latest request of one date, without backfills and deadlines."""
        days = DateRange(date, date)
        plans = await self._listed(keys.PLANS, keys.plan, days)
        active = await self._listed(keys.ACTIVE_REQUESTS, keys.active_requests, days)
        return await self._facts(date, plans.get(date), active.get(date))

    async def _listed(
        self, prefix: str, key_of: Callable[[dt.date], str], days: DateRange
    ) -> dict[dt.date, ObjectInfo]:
        """Return the objects of a range under a prefix that has one for each date."""
        listed: dict[dt.date, ObjectInfo] = {}
        before = days.first - dt.timedelta(days=1) if days.first > dt.date.min else None
        async for one in self._store.list(prefix, after=key_of(before) if before else ""):
            date = keys.parse_date(one.key)
            if date is not None and date > days.last:
                break
            if date is not None:
                listed[date] = one
        return listed

    async def _facts(self, date: dt.date, plan: ObjectInfo | None, active: ObjectInfo | None) -> DateFacts:
        named = ActiveRequests(date=date)
        if active is not None:
            named = await self._cached(self._active, active, ActiveRequests, lambda stored: stored) or named
        waiting = await self._record(named.waiting) if named.waiting else None
        running = await self._record(named.running) if named.running else None
        records = [record for record in (waiting, running) if record is not None]
        unended = [record for record in records if not status_of(record).ended]
        record = next(iter(unended + records), None)
        layout = None
        if plan is not None:
            layout = await self._cached(self._layouts, plan, Plan, layout_of)
        return DateFacts(
            date=date,
            planned=plan is not None,
            countries=layout.countries if layout else (),
            requested=waiting is None and named.waiting is not None and self._is_recent(named.waiting),
            record=record,
            lacking=lacking_of(record, layout) if record and not unended else {},
        )

    def _is_recent(self, request_id: RequestId) -> bool:
        """Return whether a request without a record may still be published. Its API may have crashed before that."""
        return self._clock().timestamp() * 1000 - request_time_ms(request_id) < PUBLISHED_AFTER_MAX_MS

    async def _record(self, request_id: RequestId) -> RequestRecord | None:
        record = await get_if_readable(self._store, RequestRecord, keys.request(request_id))
        return record if isinstance(record, RequestRecord) else None

    async def _cached(
        self,
        cache: _Cache[_Value],
        listed: ObjectInfo,
        kind: type[_Stored],
        derive: Callable[[_Stored], _Value],
    ) -> _Value | None:
        """Return what is derived from a listed object; None if it cannot be read."""
        known = cache.get(listed.key)
        if known is not None and known[0] == listed.etag:
            return known[1]
        found = await get_if_readable(self._store, kind, listed.key)
        if not isinstance(found, kind):
            return None
        value = derive(found)
        cache.keep(listed.key, (listed.etag, value))
        return value

    async def _read_all(self, kind: type[_Stored], found: Sequence[str]) -> _Read[_Stored]:
        read = await bounded_map(partial(get_if_readable, self._store, kind), found, limit=CONCURRENT_GETS_MAX)
        return _Read(
            [one for one in read if isinstance(one, kind)],
            [one for one in read if isinstance(one, UnreadableObject)],
        )


def _settled_dates(reading: Reading) -> frozenset[dt.date]:
    """Return the dates of which every summary is complete."""
    incomplete = {head.date for head in reading.heads if not head.complete}
    return frozenset({head.date for head in reading.heads if head.complete} - incomplete)


def _hash_of(explanation: _Explanation) -> bytes:
    return hashlib.sha256(msgspec.json.encode(explanation)).digest()


def _encoded(reading: Reading, explanation: _Explanation) -> EncodedJson:
    unreadable = [*reading.unreadable, *explanation.unreadable]
    grid = grid_of(explanation.dates, reading.heads, unreadable, explanation.names)
    return EncodedJson.of(grid, unreadable_header(unreadable))


def _grid_bytes(_: DateRange, kept: _KeptGrid) -> int:
    return len(kept.grid.body) + ENTRY_BYTES * (1 + len(kept.settled))


def _layout_bytes(key: str, entry: tuple[str, PlanLayout]) -> int:
    return len(key) + len(entry[0]) + ENTRY_BYTES + COUNTRY_BYTES * len(entry[1].countries)


def _active_bytes(key: str, entry: tuple[str, ActiveRequests]) -> int:
    return len(key) + len(entry[0]) + ENTRY_BYTES
