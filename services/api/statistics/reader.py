"""Reading summaries: the heads of a range of dates, and the ledger of one country-day.

Nothing served is stale: every answer is made from a fresh listing, and of the summaries it names only those are
fetched whose ETag was not seen before. Queries that come together share a listing that was begun after them, what is
picked from it, and what has to be fetched. Every answer is of one whole generation: the pointer to the live one is read
before and after, and if a rebuild moved it in between, the reading starts again. A summary that cannot be read is named
beside the others.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.statistics.single_flight import SingleFlight
from services.api.unreadable import UnreadableObject, read_if_readable
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import BucketObject, Countries, Manifest, Plan, Summary, SummaryHead
from shared.runtime.concurrency import bounded_map
from shared.runtime.lru import LruCache
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectInfo, ObjectStore, StoreUnavailable
from shared.storage.repository import Repository

HEAD_BYTES = 4096
GENERATION_READS_MAX = 5
RANGE_DEADLINE_S = 60.0
LEDGER_DEADLINE_S = 30.0
RANGES_AT_ONCE_MAX = 8
LISTINGS_AT_ONCE_MAX = 8
GETS_AT_ONCE_MAX = 16
ENTRY_OVERHEAD_BYTES = 750  # what a head takes in memory beyond the characters of its key and ETag, measured

_Result = TypeVar("_Result")
_Stored = TypeVar("_Stored", bound=BucketObject)


class HeadCache:
    """The heads that were fetched last, each with the ETag it was fetched under: a key has one ETag at a time."""

    def __init__(self, bytes_max: int) -> None:
        self._entries: LruCache[str, tuple[str, SummaryHead]] = LruCache(
            bytes_max, lambda key, entry: _entry_bytes(key, entry[0])
        )

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, etag: str) -> SummaryHead | None:
        """Return the head that ``key`` had under ``etag``, or None if it is not kept."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] == etag else None

    def keep(self, key: str, etag: str, head: SummaryHead) -> None:
        """Keep a head in place of the one before it."""
        self._entries.keep(key, (etag, head))


class Reading(NamedTuple):
    """What a range of dates held at one moment.

    Equal tags mean equal heads. ``heads`` are in no particular order; None: the tag was all that was wanted.
    ``unreadable`` are the summaries that are missing among the heads because they cannot be read.
    """

    tag: str
    heads: list[SummaryHead] | None
    unreadable: tuple[UnreadableObject, ...] = ()


class _Part(NamedTuple):
    """Some of the summaries of a month, sorted by key, and the tag of them."""

    tag: str
    listed: list[ObjectInfo]


class _Month:
    """The summaries of a month as one listing names them; what is picked of it is kept for the others who share it."""

    def __init__(self, generation: int, listed: list[ObjectInfo]) -> None:
        self._named_from = len(keys.summaries_of_generation(generation))
        self._listed = [
            (*named, one)
            for one in sorted(listed, key=lambda one: one.key)
            if (named := keys.parse_summary(one.key)) is not None
        ]
        self._parts: dict[tuple[dt.date, dt.date, CountrySlug | None], _Part] = {}

    def part(self, days: DateRange, country: CountrySlug | None) -> _Part:
        """Return the summaries of a range, or those of one country. The tag says no generation: a rebuild keeps it."""
        first, last = days.first, days.last
        part = self._parts.get((first, last, country))
        if part is None:
            picked = [one for date, named, one in self._listed if first <= date <= last and country in {None, named}]
            tag = _tag_of(f"{one.key[self._named_from :]} {one.etag}" for one in picked)
            part = self._parts[first, last, country] = _Part(tag, picked)
        return part


class _Read(NamedTuple):
    etag: str
    head: SummaryHead | UnreadableObject


class SummaryReader:
    """Reads the summaries of the live generation."""

    def __init__(self, store: ObjectStore, *, cache_bytes: int) -> None:
        self._store = store
        self._cache = HeadCache(cache_bytes)
        self._ranges = asyncio.Semaphore(RANGES_AT_ONCE_MAX)
        self._listings = SingleFlight[_Month]()
        self._fetching: dict[str, asyncio.Event] = {}
        self._pointers = SingleFlight[int]()

    async def read(
        self,
        days: DateRange,
        country: CountrySlug | None = None,
        *,
        suffices: Callable[[str], bool] = lambda _: False,
    ) -> Reading:
        """Return the heads of all country-days in a range, or of one country's.

        If ``suffices`` says so of the tag that the listing has, the heads are neither fetched nor returned.
        """
        async with deadline(RANGE_DEADLINE_S, f"Reading the summaries from {days.first} to {days.last}"):
            return await self._of_one_generation(lambda generation: self._read(generation, days, country, suffices))

    async def summary(self, country: CountrySlug, date: dt.date) -> Summary | None:
        """Return one country-day with its ledger, or None if there is none."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the ledger of {country} on {date}"):
            return await self._of_one_generation(lambda generation: self._summary(generation, country, date))

    async def manifests(
        self, date: dt.date, city_ids: Sequence[CityId]
    ) -> tuple[dict[CityId, Manifest], list[UnreadableObject]]:
        """Return the manifests of those of the cities that have one on ``date``, and those that cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading {len(city_ids)} manifests of {date}"):
            found = await bounded_map(
                lambda city_id: self._readable(Manifest, keys.manifest(date, city_id)),
                city_ids,
                limit=GETS_AT_ONCE_MAX,
            )
        manifests = {manifest.city_id: manifest for manifest in found if isinstance(manifest, Manifest)}
        return manifests, [one for one in found if isinstance(one, UnreadableObject)]

    async def city_names(self, date: dt.date, country: CountrySlug) -> dict[CityId, str]:
        """Return the names that the date's plan gives to the cities of a country; none, if it cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, f"Reading the plan of {date}"):
            plan = await self._readable(Plan, keys.plan(date))
        if not isinstance(plan, Plan) or country not in plan.countries:
            return {}
        return {city.city_id: city.name for city in plan.countries[country].cities}

    async def countries(self) -> dict[str, CountrySlug]:
        """Return the slug of every country that was ever planned, by its name; none, if they cannot be read."""
        async with deadline(LEDGER_DEADLINE_S, "Reading the countries"):
            countries = await self._readable(Countries, keys.COUNTRIES)
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
        self, generation: int, days: DateRange, country: CountrySlug | None, suffices: Callable[[str], bool]
    ) -> Reading:
        months = list(days.months())
        listings = await bounded_map(lambda month: self._month(generation, month), months, limit=LISTINGS_AT_ONCE_MAX)
        parts = [month.part(days, country) for month in listings]
        tag = _tag_of(part.tag for part in parts)
        if suffices(tag):
            return Reading(tag, None)
        listed = [one for part in parts for one in part.listed]
        read = {one.key: self._cache.get(one.key, one.etag) for one in listed}
        unseen = [one for one in listed if read[one.key] is None]
        if not unseen:
            return Reading(tag, [head for head in read.values() if head is not None])
        async with self._ranges:
            fetched = await bounded_map(self._unseen, unseen, limit=GETS_AT_ONCE_MAX)
        read |= {
            one.key: found.head if found is not None and isinstance(found.head, SummaryHead) else None
            for one, found in zip(unseen, fetched, strict=True)
        }
        heads = [head for head in read.values() if head is not None]
        unreadable = tuple(
            found.head for found in fetched if found is not None and isinstance(found.head, UnreadableObject)
        )
        as_listed = all(
            found is not None and found.etag == one.etag for one, found in zip(unseen, fetched, strict=True)
        )
        if as_listed and not unreadable:
            return Reading(tag, heads)
        # What changed since it was listed, and what cannot be read, is shown under a tag of its own, which no listing
        # has: a later version of this service may read it.
        found_so = [f"{one.key} {found.etag if found else ''}" for one, found in zip(unseen, fetched, strict=True)]
        return Reading(_tag_of([tag, *found_so, *(one.key for one in unreadable)]), heads, unreadable)

    async def _month(self, generation: int, month: str) -> _Month:
        prefix = keys.summaries_of_month(generation, month)
        return await self._listings.run(prefix, lambda: self._listing(generation, prefix))

    async def _listing(self, generation: int, prefix: str) -> _Month:
        return _Month(generation, [listed async for listed in self._store.list(prefix)])

    async def _unseen(self, listed: ObjectInfo) -> _Read | None:
        """Fetch a head, unless another query has fetched it since it was found missing, or is about to."""
        name = f"{listed.key} {listed.etag}"
        under_way = self._fetching.get(name)
        if under_way is not None:
            await under_way.wait()
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
            return None  # deleted since it was listed: with its whole generation, which the pointer will tell
        head = read_if_readable(lambda: objects.decode_head(found.body, listed.key))
        if isinstance(head, SummaryHead):
            self._cache.keep(listed.key, found.etag, head)
        return _Read(found.etag, head)

    async def _summary(self, generation: int, country: CountrySlug, date: dt.date) -> Summary | None:
        return await Repository(self._store).get(Summary, keys.summary(generation, date, country))

    async def _readable(self, kind: type[_Stored], key: str) -> _Stored | UnreadableObject | None:
        found = await self._store.get(key)
        return read_if_readable(lambda: objects.decode(kind, found.body, key)) if found else None


def _tag_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()  # no key and no ETag has a line break in it


def _entry_bytes(key: str, etag: str) -> int:
    return len(key) + len(etag) + ENTRY_OVERHEAD_BYTES
