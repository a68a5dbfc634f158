"""Reads summaries: the heads of a range of dates, and the ledger of one country-day.

- **Fresh.** Every response comes from listings that are current (`listings`). Only summaries whose ETag is not cached
  are fetched.
- **Shared.** Concurrent queries share looks at the change index, listings, selections from them, and fetches. A shared
  look or listing begins after each query that uses it.
- **One generation.** The pointer to the live generation is read before, and after if anything of the generation was
  read. If a rebuild moved it in between, the read starts again.
- **Cold.** Most heads of a month come from its Parquet table, if a row has the ETag of the listing (`table_heads`).
- **Tolerant.** An unreadable summary is named beside the others.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.http.unreadable import UnreadableObject, get_if_readable, read_if_readable
from services.api.statistics.cache import HeadCache, ReadHead
from services.api.statistics.listings import Entry, MonthListings, MonthPart, tag_of
from services.api.statistics.table_heads import TableHeads
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Countries, GenerationPointer, Manifest, Plan, Summary, SummaryHead
from shared.runtime import metrics
from shared.runtime.clock import suspend_counting_s
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore, StoreUnavailable
from shared.storage.repository import Repository

HEAD_BYTES = 4096
GENERATION_READS_MAX = 5
RANGE_DEADLINE_S = 60.0
LEDGER_DEADLINE_S = 30.0
CONCURRENT_RANGES_MAX = 8
LISTINGS_PART = 4
"""Kept listings may take a quarter of the memory of heads: an entry takes less than a quarter of a head."""
CONCURRENT_GETS_MAX = 16

_Result = TypeVar("_Result")


class MonthReading(NamedTuple):
    """The content of some days of a month at one moment.

    Equal tags mean equal heads. ``heads`` are unordered, and None if the tag sufficed. ``unreadable`` names the
    summaries that cannot be read; ``heads`` lacks them.
    """

    days: DateRange
    tag: str
    heads: list[SummaryHead] | None
    unreadable: tuple[UnreadableObject, ...] = ()


class Reading(NamedTuple):
    """The content of a range of dates at one moment, by month. ``months`` is None if the tag sufficed."""

    tag: str
    months: list[MonthReading] | None
    country_days: int = 0

    @property
    def heads(self) -> list[SummaryHead]:
        """The heads of all months that have them."""
        return [head for month in self.months or () for head in month.heads or ()]

    @property
    def unreadable(self) -> tuple[UnreadableObject, ...]:
        """The summaries that cannot be read."""
        return tuple(one for month in self.months or () for one in month.unreadable)


class SummaryReader:
    """Reads the summaries of the live generation."""

    def __init__(
        self, store: ObjectStore, *, cache_bytes: int, clock_s: Callable[[], float] = suspend_counting_s
    ) -> None:
        self._store = store
        self._cache = HeadCache(cache_bytes)
        self._ranges = asyncio.Semaphore(CONCURRENT_RANGES_MAX)
        self.listings = MonthListings(store, bytes_max=cache_bytes // LISTINGS_PART, clock_s=clock_s)
        self._fetching: dict[str, asyncio.Event] = {}
        self._tables = TableHeads(store)
        self._pointers = SingleFlight[GenerationPointer]()

    async def read(
        self,
        days: DateRange,
        country: CountrySlug | None = None,
        *,
        tag_suffices: Callable[[str], bool] = lambda _: False,
        month_suffices: Callable[[MonthPart], bool] = lambda _: False,
    ) -> Reading:
        """Return the heads of all country-days in a range, or of one country's.

        If ``tag_suffices`` returns true for the tag of the listings, no heads are fetched or returned. If
        ``month_suffices`` returns true for a month, those of that month are not.
        """
        async with deadline(RANGE_DEADLINE_S, f"Reading the summaries from {days.first} to {days.last}"):
            return await self._of_one_generation(
                lambda pointer: self._read(pointer, days, country, tag_suffices, month_suffices)
            )

    async def summary(self, country: CountrySlug, date: dt.date) -> Summary | None:
        """Return one country-day with its ledger, or None if there is none."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the ledger of {country} on {date}"):
            return await self._of_one_generation(lambda pointer: self._summary(pointer, country, date))

    async def manifests(
        self, date: dt.date, city_ids: Sequence[CityId]
    ) -> tuple[dict[CityId, Manifest], list[UnreadableObject]]:
        """Return the manifests that the cities have on ``date``, and the manifests that cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading {len(city_ids)} manifests of {date}"):
            found = await bounded_map(
                lambda city_id: get_if_readable(self._store, Manifest, keys.manifest(date, city_id)),
                city_ids,
                limit=CONCURRENT_GETS_MAX,
            )
        manifests = {manifest.city_id: manifest for manifest in found if isinstance(manifest, Manifest)}
        return manifests, [one for one in found if isinstance(one, UnreadableObject)]

    async def city_names(self, date: dt.date, country: CountrySlug) -> dict[CityId, str]:
        """Return the names of a country's cities in the date's plan; empty if it cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the plan of {date}"):
            plan = await get_if_readable(self._store, Plan, keys.plan(date))
        if not isinstance(plan, Plan) or country not in plan.countries:
            return {}
        return {city.city_id: city.name for city in plan.countries[country].cities}

    async def planned_countries(self, date: dt.date) -> frozenset[CountrySlug] | None:
        """Return the countries of the date's plan, or None if it cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the plan of {date}"):
            plan = await get_if_readable(self._store, Plan, keys.plan(date))
        return frozenset(plan.countries) if isinstance(plan, Plan) else None

    async def countries(self) -> dict[str, CountrySlug]:
        """Return the slugs of all countries that were ever planned, by name; empty if they cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, "Reading the countries"):
            countries = await get_if_readable(self._store, Countries, keys.COUNTRIES)
        return countries.slugs if isinstance(countries, Countries) else {}

    async def pointer(self) -> GenerationPointer:
        """Return the pointer to the live generation, read after this call."""
        return await self._pointers.run("live", lambda: read_current(self._store))

    async def _of_one_generation(self, read: Callable[[GenerationPointer], Awaitable[tuple[_Result, bool]]]) -> _Result:
        """Return the result of ``read``, which also says whether it read from the generation.

        If not, it has no part of a later generation, and all that was counted before the pointer was read.
        """
        pointer = await self.pointer()
        for _ in range(GENERATION_READS_MAX):
            result, read_generation = await read(pointer)
            if not read_generation:
                return result
            before, pointer = pointer, await self.pointer()
            if pointer.live == before.live:
                return result
        raise StoreUnavailable(f"the live generation changed {GENERATION_READS_MAX} times while it was being read")

    async def _read(
        self,
        pointer: GenerationPointer,
        days: DateRange,
        country: CountrySlug | None,
        tag_suffices: Callable[[str], bool],
        month_suffices: Callable[[MonthPart], bool],
    ) -> tuple[Reading, bool]:
        months = dict(days.by_month())
        listings, listed = await self.listings.months(pointer, list(months))
        parts = [listing.part(part, country) for part, listing in zip(months.values(), listings, strict=True)]
        tag = tag_of(part.tag for part in parts)
        country_days = sum(len(part.entries) for part in parts)
        if tag_suffices(tag):
            return Reading(tag, None, country_days), listed
        wanted = {place: part for place, part in enumerate(parts) if not month_suffices(part)}
        heads, fetched = await self._heads(pointer.live, [one for part in wanted.values() for one in part.entries])
        read = [
            _month_of(part, heads) if place in wanted else MonthReading(part.days, part.tag, None)
            for place, part in enumerate(parts)
        ]
        for month, part in zip(read, parts, strict=True):
            if month.tag != part.tag:
                tag = tag_of([tag, month.tag])
        for changed in {keys.month_of(one.date) for one, now in heads.items() if now is None or now.etag != one.etag}:
            self.listings.forget(pointer, changed)
        return Reading(tag, read, country_days), listed or fetched

    async def _heads(self, generation: int, entries: Sequence[Entry]) -> tuple[dict[Entry, ReadHead | None], bool]:
        """Return the heads of listed summaries, and whether any was fetched. None: it is gone."""
        named = {one: keys.summary(generation, one.date, one.country) for one in entries}
        heads: dict[Entry, ReadHead | None] = {
            one: read for one, key in named.items() if (read := self._cache.get(key, one.etag)) is not None
        }
        uncached = [one for one in entries if one not in heads]
        metrics.count_lookups("heads", hits=len(heads), misses=len(uncached))
        of_tables = await self._tables.heads(generation, {named[one]: one.etag for one in uncached})
        for one in uncached:
            head = of_tables.get(named[one])
            if head is not None:
                heads[one] = read = ReadHead(one.etag, head)
                self._cache.keep(named[one], read)
        uncached = [one for one in uncached if one not in heads]
        if uncached:
            async with self._ranges:
                fetched = await bounded_map(
                    lambda one: self._fetch_once(named[one], one.etag), uncached, limit=CONCURRENT_GETS_MAX
                )
            heads |= zip(uncached, fetched, strict=True)
        return heads, bool(uncached)

    async def _fetch_once(self, key: str, etag: str) -> ReadHead | None:
        """Fetch a head, or wait for another query that fetches it."""
        name = f"{key} {etag}"
        pending = self._fetching.get(name)
        if pending is not None:
            await pending.wait()
        read = self._cache.get(key, etag)
        if read is not None:
            return read
        fetched = self._fetching[name] = asyncio.Event()
        try:
            return await self._fetch(key)
        finally:
            self._fetching.pop(name, None)
            fetched.set()

    async def _fetch(self, key: str) -> ReadHead | None:
        found = await self._store.get(key, first_bytes=HEAD_BYTES)
        if found is None:
            return None  # deleted with its whole generation since the listing, which the pointer will show
        read = ReadHead(found.etag, read_if_readable(lambda: objects.decode_head(found.body, key)))
        if isinstance(read.head, SummaryHead):
            self._cache.keep(key, read)
        return read

    async def _summary(
        self, pointer: GenerationPointer, country: CountrySlug, date: dt.date
    ) -> tuple[Summary | None, bool]:
        key = keys.summary(pointer.live, date, country)
        summary = await Repository(self._store).get(Summary, key)
        if summary is not None:
            objects.require_exact(summary, key)
        return summary, True


def _month_of(part: MonthPart, heads: Mapping[Entry, ReadHead | None]) -> MonthReading:
    """Return the heads of a month as they were fetched.

    Heads that changed since the listing, and unreadable ones, get a tag that no listing has. A later version of this
    service may be able to read them.
    """
    read = [(one, heads[one]) for one in part.entries]
    found = [now.head for _, now in read if now is not None and isinstance(now.head, SummaryHead)]
    unreadable = tuple(now.head for _, now in read if now is not None and isinstance(now.head, UnreadableObject))
    others = [f"{one} {now.etag if now else ''}" for one, now in read if now is None or now.etag != one.etag]
    if not others and not unreadable:
        return MonthReading(part.days, part.tag, found)
    tag = tag_of([part.tag, *others, *(one.key for one in unreadable)])
    return MonthReading(part.days, tag, found, unreadable)
