"""The kept listings of months: what a query lists, and when it lists again."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

import pytest

from services.api.http.date_range import DateRange
from services.api.statistics.cache import HeadCache
from services.api.statistics.listings import LISTING_BYTES, MonthListing
from services.api.statistics.reader import LISTINGS_PART, SummaryReader
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer
from shared.storage.change_index import LOOKS_APART_MAX_S, ChangeCounter
from shared.storage.object_store import ObjectInfo
from tests.fakes.api import NOW, ObservedStore, World, stats

QUARTER = DateRange(dt.date(2024, 4, 1), dt.date(2024, 6, 30))
APRIL, MAY, JUNE = (f"2024-0{month}" for month in (4, 5, 6))
PLENTY_BYTES = 1 << 20


class ListedStore(ObservedStore):
    """A store that records what is listed."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        self.listed.append(prefix)
        async for listed in super().list(prefix, after=after):
            yield listed


class IndexedWorld(World):
    """A world of three months, whose change index is trusted, a writer that counts, and a reader."""

    def __init__(self, *, cache_bytes: int = PLENTY_BYTES) -> None:
        self.listed_store = ListedStore()
        super().__init__(self.listed_store)
        self.now_s = 0.0
        self.trust()
        self.writer = ChangeCounter(self.store)
        self.reader = SummaryReader(self.store, cache_bytes=cache_bytes, clock_s=lambda: self.now_s)
        for month in (APRIL, MAY, JUNE):
            self.change(month, trips=1)

    def trust(self, live: int = 1, since: dt.datetime | None = NOW) -> None:
        """Set the pointer."""
        pointer = GenerationPointer(live=live, highest=live)
        if since is not None:
            pointer = GenerationPointer(live=live, highest=live, changes_counted_since=since)
        self.store.write(keys.CURRENT, objects.encode(pointer))

    def change(self, month: str, *, trips: int, generation: int = 1) -> None:
        """Change a summary of a month, without counting it."""
        self.fold_in(stats("armenia", dt.date.fromisoformat(f"{month}-02"), trips=trips), generation=generation)

    async def change_and_count(self, month: str, *, trips: int) -> None:
        """Change a summary of a month as a writer does."""
        self.change(month, trips=trips)
        await self.writer.count(1, [month])

    async def query(self) -> tuple[list[int], list[str], list[str]]:
        """Return the trips of each month, the months that the query listed, and what it read."""
        self.listed_store.listed.clear()
        self.store.reads.clear()
        heads = (await self.reader.read(QUARTER)).heads
        listed = sorted(prefix[-8:-1] for prefix in self.listed_store.listed if prefix.startswith(keys.SUMMARIES))
        return [head.totals.trips for head in sorted(heads, key=lambda head: head.date)], listed, self.store.reads[:]


async def test_an_unchanged_query_reads_the_pointer_and_lists_the_index() -> None:
    """If nothing was counted, nothing else is read."""
    world = IndexedWorld()
    assert (await world.query())[1] == [APRIL, MAY, JUNE]
    assert await world.query() == ([1, 1, 1], [], [keys.CURRENT])
    assert world.listed_store.listed == [keys.changes_of_generation(1)]


async def test_a_counted_change_lists_only_its_month() -> None:
    """Only the months whose counters moved are listed; the next query lists nothing."""
    world = IndexedWorld()
    await world.writer.count(1, [APRIL, MAY, JUNE])
    await world.query()
    await world.change_and_count(MAY, trips=2)
    figures, listed, read = await world.query()
    (counters,) = world.store.bodies(keys.CHANGES)
    assert (figures, listed) == ([1, 2, 1], [MAY])
    assert read == [keys.CURRENT, counters, keys.summary(1, dt.date(2024, 5, 2), CountrySlug("armenia")), keys.CURRENT]
    assert await world.query() == ([1, 2, 1], [], [keys.CURRENT])


async def test_a_new_writer_lists_the_months_that_it_counted() -> None:
    """The counters of a process that has just begun to count are all new."""
    world = IndexedWorld()
    await world.query()
    world.change(JUNE, trips=3)
    await ChangeCounter(world.store).count(1, [JUNE])
    assert (await world.query())[:2] == ([1, 1, 3], [JUNE])


async def test_a_vanished_writer_lists_every_month() -> None:
    """The counters that are gone may have moved before."""
    world = IndexedWorld()
    await world.writer.count(1, [APRIL])
    await world.query()
    await world.change_and_count(MAY, trips=2)
    for key in world.store.bodies(keys.CHANGES):
        await world.store.delete(key)
    assert (await world.query())[:2] == ([1, 2, 1], [APRIL, MAY, JUNE])


async def test_unreadable_counters_list_every_month_when_they_change() -> None:
    """Counters that cannot be read are not read again until they change."""
    world = IndexedWorld()
    key = keys.changes(1, "of a later build")
    await world.query()
    for body in (b"{", b'{"schema_version":99}'):
        world.store.write(key, body)
        assert (await world.query())[1] == [APRIL, MAY, JUNE]
        assert await world.query() == ([1, 1, 1], [], [keys.CURRENT])


async def test_without_the_switch_every_query_lists_its_months() -> None:
    """An untrusted index is not read, and nothing that was kept before is used after it was off."""
    world = IndexedWorld()
    await world.query()
    world.trust(since=None)
    for trips in (2, 3):
        world.change(MAY, trips=trips)
        assert (await world.query())[:2] == ([1, trips, 1], [APRIL, MAY, JUNE])
    assert keys.changes_of_generation(1) not in world.listed_store.listed
    world.trust()
    assert (await world.query())[:2] == ([1, 3, 1], [APRIL, MAY, JUNE])
    world.change(MAY, trips=4)  # by a build that does not count, while the switch was off and nobody asked
    world.trust(since=NOW + dt.timedelta(seconds=1))
    assert (await world.query())[:2] == ([1, 4, 1], [APRIL, MAY, JUNE])


async def test_another_generation_is_listed_anew() -> None:
    """A generation that becomes live has listings and counters of its own."""
    world = IndexedWorld()
    await world.query()
    for month in (APRIL, MAY, JUNE):
        world.change(month, trips=5, generation=2)
    world.trust(live=2)
    assert (await world.query())[:2] == ([5, 5, 5], [APRIL, MAY, JUNE])
    assert (await world.query())[1] == []


async def test_a_reader_that_has_not_looked_for_long_lists_every_month() -> None:
    """Counters may have come and gone since its last look."""
    world = IndexedWorld()
    await world.query()
    world.now_s += LOOKS_APART_MAX_S
    assert (await world.query())[1] == []
    world.now_s += LOOKS_APART_MAX_S + 1
    assert (await world.query())[1] == [APRIL, MAY, JUNE]


async def test_a_summary_that_has_changed_since_its_listing_is_listed_again() -> None:
    """A version that is found by chance before it is counted makes its month stale."""
    world = IndexedWorld()
    await world.query()
    world.change(MAY, trips=2)
    world.reader._cache = HeadCache(0)
    assert (await world.query())[:2] == ([1, 2, 1], [])
    assert (await world.query())[:2] == ([1, 2, 1], [MAY])


async def test_listings_without_room_are_not_kept() -> None:
    """Without memory every query lists its months."""
    world = IndexedWorld(cache_bytes=0)
    for _ in range(2):
        assert (await world.query())[:2] == ([1, 1, 1], [APRIL, MAY, JUNE])


async def test_listings_of_empty_months_have_a_limit() -> None:
    """Months without data take memory too, so the oldest of many are not kept."""
    kept_max = 5
    world = IndexedWorld(cache_bytes=LISTINGS_PART * LISTING_BYTES * kept_max)
    await world.reader.read(DateRange(dt.date(2001, 1, 1), dt.date(2003, 12, 31)))
    listings = world.reader.listings.indexed(await world.reader.pointer())
    assert listings is not None
    assert len(listings.kept_months()) == kept_max


@pytest.mark.parametrize("country", [None, CountrySlug("armenia")])
def test_a_listing_keeps_a_few_selections(country: CountrySlug | None) -> None:
    """A selection is kept while it is used, and has the days and the country that were asked for."""
    listed = [
        ObjectInfo(
            key=keys.summary(1, dt.date(2024, 5, day), CountrySlug(of)),
            etag=f'"{day}"',
            size_bytes=1,
            last_modified=NOW,
        )
        for day in (3, 1, 2)
        for of in ("brasil", "armenia")
    ]
    listing = MonthListing(1, listed)
    days = DateRange(dt.date(2024, 5, 2), dt.date(2024, 5, 3))
    part = listing.part(days, country)
    assert [(one.date.day, one.country) for one in part.entries] == [
        (day, of) for day in (2, 3) for of in ("armenia", "brasil") if country in {None, of}
    ]
    assert listing.part(days, country) is part
