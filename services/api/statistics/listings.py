"""Listings of months, kept for as long as the change index says that they are current (`shared.storage.change_index`).

- **Fresh.** Every query looks at the index, and concurrent queries share a look that began after each of them. A month
  whose counters moved is listed again, and every month if the counters of a writer are gone.
- **Often enough.** gc deletes the counters of writers that have ended. A reader that has not looked for an hour may
  have missed some, so it lists every month again.
- **In order.** A look comes before the listings that count as newer. So a listing has every change that was counted
  when its look began.
- **Trusted only by consent.** Without the switch in the pointer, every query lists its months.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from msgspec import UNSET

from services.api.http.date_range import DateRange
from shared.domain import keys
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer
from shared.runtime.clock import suspend_counting_s
from shared.runtime.concurrency import SingleFlight, bounded_map
from shared.runtime.lru import LruCache
from shared.storage.change_index import LOOKS_APART_MAX_S, WriterCounters, moved_months, read_counters
from shared.storage.object_store import ObjectInfo, ObjectStore

CONCURRENT_LISTINGS_MAX = 8
ENTRY_BYTES = 220  # the measured memory of an entry of a listing
LISTING_BYTES = 1_000  # that of a listing without entries: empty months are bounded too
SELECTIONS_MAX = 16


class Entry(NamedTuple):
    """A summary in a listing. `keys.summary` gives its key."""

    date: dt.date
    country: CountrySlug
    etag: str


class MonthPart(NamedTuple):
    """The summaries of some days of a month, sorted, and a tag of them. The tag is the same in every generation."""

    days: DateRange
    tag: str
    entries: Sequence[Entry]


class MonthListing:
    """The summaries in one listing of a month. It keeps its latest selections."""

    def __init__(self, generation: int, listed: Iterable[ObjectInfo]) -> None:
        entries = (
            Entry(named[0], CountrySlug(sys.intern(named[1])), one.etag)
            for one in listed
            if (named := keys.parse_summary(one.key)) is not None and one.key == keys.summary(generation, *named)
        )
        self.entries = sorted(entries)
        self._by_country: dict[CountrySlug, list[Entry]] = {}
        self._parts: LruCache[tuple[dt.date, dt.date, CountrySlug | None], MonthPart] = LruCache(
            SELECTIONS_MAX, lambda *_: 1
        )

    def part(self, days: DateRange, country: CountrySlug | None) -> MonthPart:
        """Return the summaries of some days of the month, of all countries or of one."""
        name = (days.first, days.last, country)
        part = self._parts.get(name)
        if part is None:
            entries = self.entries if country is None else self._of(country)
            selected = [one for one in entries if one.date in days]
            part = MonthPart(days, tag_of(f"{date}/{of} {etag}" for date, of, etag in selected), selected)
            if self.entries:
                self._parts.keep(name, part)
        return part

    def _of(self, country: CountrySlug) -> list[Entry]:
        if not self._by_country:
            for one in self.entries:
                self._by_country.setdefault(one.country, []).append(one)
        return self._by_country.get(country, [])


class _Kept(NamedTuple):
    look: int
    listing: MonthListing


class MonthListings:
    """The listings of the live generation; ``bytes_max`` bounds the memory of those that are kept."""

    def __init__(
        self, store: ObjectStore, *, bytes_max: int, clock_s: Callable[[], float] = suspend_counting_s
    ) -> None:
        self._store = store
        self._bytes_max = bytes_max
        self._clock_s = clock_s
        self._trusted: IndexedListings | None = None
        self._unkept = SingleFlight[MonthListing]()

    def indexed(self, pointer: GenerationPointer) -> IndexedListings | None:
        """Return the listings that the change index keeps current, or None if it is not trusted."""
        since = pointer.changes_counted_since
        if since is UNSET:
            self._trusted = None
        elif self._trusted is None or self._trusted.of != (pointer.live, since):
            self._trusted = IndexedListings(
                self._store, pointer.live, since, bytes_max=self._bytes_max, clock_s=self._clock_s
            )
        return self._trusted

    async def months(self, pointer: GenerationPointer, months: Sequence[str]) -> tuple[list[MonthListing], bool]:
        """Return listings of months, each begun after this call or unchanged since; and whether any was begun."""
        indexed = self.indexed(pointer)
        if indexed is None:
            listed = await bounded_map(partial(self._listing, pointer.live), months, limit=CONCURRENT_LISTINGS_MAX)
            return listed, True
        await indexed.look()
        kept = [indexed.kept(month) for month in months]
        if all(kept):
            return [one for one in kept if one is not None], False
        return await bounded_map(indexed.listing, months, limit=CONCURRENT_LISTINGS_MAX), True

    def forget(self, pointer: GenerationPointer, month: str) -> None:
        """List a month again at the next query, because it is known to have changed."""
        indexed = self.indexed(pointer)
        if indexed is not None:
            indexed.forget(month)

    async def _listing(self, generation: int, month: str) -> MonthListing:
        return await self._unkept.run(
            keys.summaries_of_month(generation, month), lambda: list_month(self._store, generation, month)
        )


class IndexedListings:
    """The kept listings of one generation, and what the change index said at the last look."""

    def __init__(
        self,
        store: ObjectStore,
        generation: int,
        since: dt.datetime,
        *,
        bytes_max: int,
        clock_s: Callable[[], float],
    ) -> None:
        self.of = (generation, since)
        self._clock_s = clock_s
        self._looked_at_s = clock_s()
        self._store = store
        self._generation = generation
        self._kept: LruCache[str, _Kept] = LruCache(
            bytes_max, lambda _, kept: LISTING_BYTES + ENTRY_BYTES * len(kept.listing.entries)
        )
        self._counters: dict[str, WriterCounters] = {}
        self._looks = 0
        self._moved: dict[str, int] = {}
        """The last look at which the counters of a month had moved."""
        self._all_moved = 0
        self._shared_looks = SingleFlight[None]()
        self._listings = SingleFlight[MonthListing]()

    async def look(self) -> None:
        """Look at the index, or share a look that begins after this call."""
        await self._shared_looks.run("look", self._look)

    def kept(self, month: str) -> MonthListing | None:
        """Return the kept listing of a month if it was current at the last look."""
        kept = self._kept.get(month)
        if kept is None or kept.look < max(self._all_moved, self._moved.get(month, 0)):
            return None
        return kept.listing

    async def listing(self, month: str) -> MonthListing:
        """Return the kept listing of a month, or a new one, which is kept."""
        return self.kept(month) or await self._listings.run(month, partial(self._list, month))

    def forget(self, month: str) -> None:
        """List a month again at the next query."""
        self._kept.drop(month)

    def kept_months(self) -> list[str]:
        """Return the months that have a kept listing."""
        return sorted(self._kept)

    async def unexplained(self, month: str) -> set[Entry]:
        """Return how a new listing of a month differs from the kept one, if the index says that nothing has changed.

        An entry that the new listing lacks has an empty ETag.
        """
        kept = self.kept(month)
        if kept is None:
            return set()
        fresh = await list_month(self._store, self._generation, month)
        await self.look()
        if self.kept(month) is not kept:
            return set()
        listed = {(one.date, one.country) for one in fresh.entries}
        gone = {one._replace(etag="") for one in kept.entries if (one.date, one.country) not in listed}
        return (set(fresh.entries) - set(kept.entries)) | gone

    async def _list(self, month: str) -> MonthListing:
        look = self._looks  # of those that have ended: a later one may find changes that this listing lacks
        listing = await list_month(self._store, self._generation, month)
        self._kept.keep(month, _Kept(look, listing))
        return listing

    async def _look(self) -> None:
        look = self._looks + 1
        began_s = self._clock_s()
        before = self._counters
        self._counters = await read_counters(self._store, self._generation, before)
        moved = moved_months(before, self._counters)
        if moved is None or self._clock_s() - self._looked_at_s > LOOKS_APART_MAX_S:
            self._all_moved = look
        self._moved |= dict.fromkeys(moved or (), look)
        self._looks, self._looked_at_s = look, began_s


async def list_month(store: ObjectStore, generation: int, month: str) -> MonthListing:
    """List the summaries of a month."""
    return MonthListing(generation, [one async for one in store.list(keys.summaries_of_month(generation, month))])


def tag_of(parts: Iterable[str]) -> str:
    """Return a hash of parts, which have no line breaks."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
