"""Reading summaries: the heads of a range of dates, and the ledger of one country-day.

Nothing served is stale: every answer is made from a fresh listing, and of the summaries it names only those are
fetched whose ETag was not seen before. Queries that come together share a listing that was begun after them. Every
answer is of one whole generation: the pointer to the live one is read before and after, and if a rebuild moved it in
between, the reading starts again.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from services.api.impatience import within
from services.api.ranges import DateRange
from services.api.sharing import Shared
from shared import keys, objects
from shared.bounded import map_bounded
from shared.current import read_current
from shared.identity import CityId, CountrySlug
from shared.objects import Manifest, Summary, SummaryHead
from shared.store import Listed, ObjectStore, StoreUnavailable

HEAD_BYTES = 4096
GENERATION_READS_MAX = 5
RANGE_DEADLINE_S = 60.0
LEDGER_DEADLINE_S = 30.0
RANGES_AT_ONCE_MAX = 8
LISTINGS_AT_ONCE_MAX = 8
GETS_AT_ONCE_MAX = 16
ENTRY_OVERHEAD_BYTES = 750  # what a head takes in memory beyond the characters of its key and ETag, measured

_Result = TypeVar("_Result")


class HeadCache:
    """The heads that were fetched last, each with the ETag it was fetched under.

    Bounded in bytes of memory; the least recently used goes first. A key has one ETag at a time, so an older head is
    replaced and never found again.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._entries: OrderedDict[str, tuple[str, SummaryHead]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str, etag: str) -> SummaryHead | None:
        """Return the head that ``key`` had under ``etag``, or None if it is not kept."""
        entry = self._entries.get(key)
        if entry is None or entry[0] != etag:
            return None
        self._entries.move_to_end(key)
        return entry[1]

    def keep(self, key: str, etag: str, head: SummaryHead) -> None:
        """Keep a head in place of the one before it."""
        before = self._entries.pop(key, None)
        if before is not None:
            self._bytes -= _entry_bytes(key, before[0])
        self._entries[key] = (etag, head)
        self._bytes += _entry_bytes(key, etag)
        while self._bytes > self._bytes_max:
            oldest, (oldest_etag, _) = self._entries.popitem(last=False)
            self._bytes -= _entry_bytes(oldest, oldest_etag)


class TaggedHead(NamedTuple):
    """A head, and the ETag of the summary it was read from."""

    etag: str
    head: SummaryHead


class _Named(NamedTuple):
    date: dt.date
    country: CountrySlug
    listed: Listed


class _Month(NamedTuple):
    seen: list[TaggedHead]
    unseen: list[Listed]


class SummaryReader:
    """Reads the summaries of the live generation."""

    def __init__(self, store: ObjectStore, *, cache_bytes: int) -> None:
        self._store = store
        self._cache = HeadCache(cache_bytes)
        self._ranges = asyncio.Semaphore(RANGES_AT_ONCE_MAX)
        self._listings = Shared[list[_Named]]()
        self._pointers = Shared[int]()

    async def heads(self, days: DateRange, country: CountrySlug | None = None) -> list[TaggedHead]:
        """Return the heads of all country-days in a range, or of one country's, in no particular order."""
        async with within(RANGE_DEADLINE_S, f"Reading the summaries from {days.first} to {days.last}"), self._ranges:
            return await self._of_one_generation(lambda generation: self._heads(generation, days, country))

    async def summary(self, country: CountrySlug, date: dt.date) -> Summary | None:
        """Return one country-day with its ledger, or None if there is none."""
        async with within(LEDGER_DEADLINE_S, f"Reading the ledger of {country} on {date}"):
            return await self._of_one_generation(lambda generation: self._summary(generation, country, date))

    async def manifests(self, date: dt.date, city_ids: Sequence[CityId]) -> dict[CityId, Manifest]:
        """Return the manifests of those of the cities that have one on ``date``."""
        async with within(LEDGER_DEADLINE_S, f"Reading {len(city_ids)} manifests of {date}"):
            found = await map_bounded(
                lambda city_id: self._manifest(date, city_id), city_ids, at_once_max=GETS_AT_ONCE_MAX
            )
        return {manifest.city_id: manifest for manifest in found if manifest is not None}

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

    async def _heads(self, generation: int, days: DateRange, country: CountrySlug | None) -> list[TaggedHead]:
        months = await map_bounded(
            lambda month: self._month(generation, month, days, country),
            list(days.months()),
            at_once_max=LISTINGS_AT_ONCE_MAX,
        )
        unseen = [listed for month in months for listed in month.unseen]
        fetched = await map_bounded(self._fetch, unseen, at_once_max=GETS_AT_ONCE_MAX)
        heads = [head for month in months for head in month.seen]
        return heads + [head for head in fetched if head is not None]

    async def _month(self, generation: int, month: str, days: DateRange, country: CountrySlug | None) -> _Month:
        seen: list[TaggedHead] = []
        unseen: list[Listed] = []
        prefix = keys.summaries_of_month(generation, month)
        for date, named, listed in await self._listings.run(prefix, lambda: self._listing(prefix)):
            if date not in days or country not in {None, named}:
                continue
            head = self._cache.get(listed.key, listed.etag)
            if head is None:
                unseen.append(listed)
            else:
                seen.append(TaggedHead(listed.etag, head))
        return _Month(seen, unseen)

    async def _listing(self, prefix: str) -> list[_Named]:
        return [
            _Named(*named, listed)
            async for listed in self._store.list(prefix)
            if (named := keys.parse_summary(listed.key)) is not None
        ]

    async def _fetch(self, listed: Listed) -> TaggedHead | None:
        found = await self._store.get(listed.key, first_bytes=HEAD_BYTES)
        if found is None:
            return None  # deleted since it was listed: with its whole generation, which the pointer will tell
        head = objects.decode_head(found.body, listed.key)
        self._cache.keep(listed.key, found.etag, head)
        return TaggedHead(found.etag, head)

    async def _summary(self, generation: int, country: CountrySlug, date: dt.date) -> Summary | None:
        key = keys.summary(generation, date, country)
        found = await self._store.get(key)
        return objects.decode(Summary, found.body, key) if found else None

    async def _manifest(self, date: dt.date, city_id: CityId) -> Manifest | None:
        key = keys.manifest(date, city_id)
        found = await self._store.get(key)
        return objects.decode(Manifest, found.body, key) if found else None


def _entry_bytes(key: str, etag: str) -> int:
    return len(key) + len(etag) + ENTRY_OVERHEAD_BYTES
