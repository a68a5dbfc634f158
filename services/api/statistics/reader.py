"""Reads summaries: the heads of a range of dates, and the ledger of one country-day.

- **Fresh.** Every response comes from a fresh listing. Only summaries whose ETag is not cached are fetched.
- **Shared.** Concurrent queries share listings, selections from them, and fetches. A shared listing begins after each
  query that uses it.
- **One generation.** The pointer to the live generation is read before and after. If a rebuild moved it in between, the
  read starts again.
- **Cold.** Most heads of a month come from its Parquet table, if a row has the ETag of the listing (`table_heads`).
- **Tolerant.** An unreadable summary is named beside the others.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.http.unreadable import UnreadableObject, get_if_readable, read_if_readable
from services.api.statistics.cache import HeadCache
from services.api.statistics.table_heads import TableHeads
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Countries, Manifest, Plan, Summary, SummaryHead
from shared.runtime import metrics
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectInfo, ObjectStore, StoreUnavailable
from shared.storage.repository import Repository

HEAD_BYTES = 4096
GENERATION_READS_MAX = 5
RANGE_DEADLINE_S = 60.0
LEDGER_DEADLINE_S = 30.0
CONCURRENT_RANGES_MAX = 8
CONCURRENT_LISTINGS_MAX = 8
CONCURRENT_GETS_MAX = 16

_Result = TypeVar("_Result")


class Reading(NamedTuple):
    """The content of a range of dates at one moment.

    Equal tags mean equal heads. ``heads`` are unordered, and None if the tag sufficed. ``unreadable`` names the
    summaries that cannot be read; ``heads`` lacks them.
    """

    tag: str
    heads: list[SummaryHead] | None
    unreadable: tuple[UnreadableObject, ...] = ()


class _Part(NamedTuple):
    """A selection of the summaries of a month, sorted by key, and its tag."""

    tag: str
    listed: list[ObjectInfo]


class _Month:
    """The summaries in one listing of a month. It keeps its selections for the queries that share it."""

    def __init__(self, generation: int, listed: list[ObjectInfo]) -> None:
        self._named_from = len(keys.summaries_of_generation(generation))
        self._listed = [
            (*named, one)
            for one in sorted(listed, key=lambda one: one.key)
            if (named := keys.parse_summary(one.key)) is not None
        ]
        self._parts: dict[tuple[dt.date, dt.date, CountrySlug | None], _Part] = {}

    def part(self, days: DateRange, country: CountrySlug | None) -> _Part:
        """Return the summaries of a range, or those of one country. The tag is the same in every generation."""
        first, last = days.first, days.last
        part = self._parts.get((first, last, country))
        if part is None:
            selected = [one for date, named, one in self._listed if first <= date <= last and country in {None, named}]
            tag = _tag_of(f"{one.key[self._named_from :]} {one.etag}" for one in selected)
            part = self._parts[first, last, country] = _Part(tag, selected)
        return part


class _Read(NamedTuple):
    etag: str
    head: SummaryHead | UnreadableObject


class SummaryReader:
    """Reads the summaries of the live generation."""

    def __init__(self, store: ObjectStore, *, cache_bytes: int) -> None:
        self._store = store
        self._cache = HeadCache(cache_bytes)
        self._ranges = asyncio.Semaphore(CONCURRENT_RANGES_MAX)
        self._listings = SingleFlight[_Month]()
        self._fetching: dict[str, asyncio.Event] = {}
        self._tables = TableHeads(store)
        self._pointers = SingleFlight[int]()

    async def read(
        self,
        days: DateRange,
        country: CountrySlug | None = None,
        *,
        tag_suffices: Callable[[str], bool] = lambda _: False,
    ) -> Reading:
        """Return the heads of all country-days in a range, or of one country's.

        If ``tag_suffices`` returns true for the tag of the listing, the heads are neither fetched nor returned.
        """
        async with deadline(RANGE_DEADLINE_S, f"Reading the summaries from {days.first} to {days.last}"):
            return await self._of_one_generation(lambda generation: self._read(generation, days, country, tag_suffices))

    async def summary(self, country: CountrySlug, date: dt.date) -> Summary | None:
        """Return one country-day with its ledger, or None if there is none."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the ledger of {country} on {date}"):
            return await self._of_one_generation(lambda generation: self._summary(generation, country, date))

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

    async def _of_one_generation(self, read: Callable[[int], Awaitable[_Result]]) -> _Result:
        live = await self._live()
        for _ in range(GENERATION_READS_MAX):
            result = await read(live)
            before, live = live, await self._live()
            if live == before:
                return result
        raise StoreUnavailable(f"the live generation changed {GENERATION_READS_MAX} times while it was being read")

    async def _live(self) -> int:
        return await self._pointers.run("live", self._read_live)

    async def _read_live(self) -> int:
        return (await read_current(self._store)).live

    async def _read(
        self, generation: int, days: DateRange, country: CountrySlug | None, tag_suffices: Callable[[str], bool]
    ) -> Reading:
        months = list(days.months())
        listings = await bounded_map(
            lambda month: self._month(generation, month), months, limit=CONCURRENT_LISTINGS_MAX
        )
        parts = [month.part(days, country) for month in listings]
        tag = _tag_of(part.tag for part in parts)
        if tag_suffices(tag):
            return Reading(tag, None)
        listed = [one for part in parts for one in part.listed]
        read = {one.key: self._cache.get(one.key, one.etag) for one in listed}
        uncached = [one for one in listed if read[one.key] is None]
        metrics.count_lookups("heads", hits=len(listed) - len(uncached), misses=len(uncached))
        of_tables = await self._tables.heads(generation, {one.key: one.etag for one in uncached})
        for one in uncached:
            if one.key in of_tables:
                read[one.key] = of_tables[one.key]
                self._cache.keep(one.key, one.etag, of_tables[one.key])
        uncached = [one for one in uncached if one.key not in of_tables]
        if not uncached:
            return Reading(tag, [head for head in read.values() if head is not None])
        async with self._ranges:
            fetched = await bounded_map(self._fetch_once, uncached, limit=CONCURRENT_GETS_MAX)
        read |= {
            one.key: found.head if found is not None and isinstance(found.head, SummaryHead) else None
            for one, found in zip(uncached, fetched, strict=True)
        }
        heads = [head for head in read.values() if head is not None]
        unreadable = tuple(
            found.head for found in fetched if found is not None and isinstance(found.head, UnreadableObject)
        )
        as_listed = all(
            found is not None and found.etag == one.etag for one, found in zip(uncached, fetched, strict=True)
        )
        if as_listed and not unreadable:
            return Reading(tag, heads)
        # Heads that changed since the listing, and unreadable ones, get a tag that no listing has. A later version of
        # this service may be able to read them.
        current = [f"{one.key} {found.etag if found else ''}" for one, found in zip(uncached, fetched, strict=True)]
        return Reading(_tag_of([tag, *current, *(one.key for one in unreadable)]), heads, unreadable)

    async def _month(self, generation: int, month: str) -> _Month:
        prefix = keys.summaries_of_month(generation, month)
        return await self._listings.run(prefix, lambda: self._listing(generation, prefix))

    async def _listing(self, generation: int, prefix: str) -> _Month:
        return _Month(generation, [listed async for listed in self._store.list(prefix)])

    async def _fetch_once(self, listed: ObjectInfo) -> _Read | None:
        """Fetch a head, or wait for another query that fetches it."""
        name = f"{listed.key} {listed.etag}"
        pending = self._fetching.get(name)
        if pending is not None:
            await pending.wait()
        head = self._cache.get(listed.key, listed.etag)
        if head is not None:
            return _Read(listed.etag, head)
        fetched = self._fetching[name] = asyncio.Event()
        try:
            return await self._fetch(listed)
        finally:
            self._fetching.pop(name, None)
            fetched.set()

    async def _fetch(self, listed: ObjectInfo) -> _Read | None:
        found = await self._store.get(listed.key, first_bytes=HEAD_BYTES)
        if found is None:
            return None  # deleted with its whole generation since the listing, which the pointer will show
        head = read_if_readable(lambda: objects.decode_head(found.body, listed.key))
        if isinstance(head, SummaryHead):
            self._cache.keep(listed.key, found.etag, head)
        return _Read(found.etag, head)

    async def _summary(self, generation: int, country: CountrySlug, date: dt.date) -> Summary | None:
        return await Repository(self._store).get(Summary, keys.summary(generation, date, country))


def _tag_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()  # keys and ETags have no line breaks
