"""The reader of summaries: fetches, caching, and one generation per response."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator

import pytest

from services.aggregate.fold import empty_summary, fold
from services.api.http.date_range import DateRange
from services.api.http.deadline import DeadlineExceeded
from services.api.statistics import cache as cache_module
from services.api.statistics import reader as reader_module
from services.api.statistics.cache import HeadCache, ReadHead
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import SummaryHead
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectInfo, StoredObject, StoreUnavailable
from tests.fakes.api import DAY, ObservedStore, World, planned, stats
from tests.fakes.metrics import value

MAY = DateRange(dt.date(2024, 5, 1), dt.date(2024, 5, 31))
PLENTY_BYTES = 1 << 20


def reader_of(world: World, *, cache_bytes: int = PLENTY_BYTES) -> SummaryReader:
    """Return a reader of the world's bucket."""
    return SummaryReader(world.store, cache_bytes=cache_bytes)


def heads_read(world: World) -> list[str]:
    """Return the keys of the summaries read so far, and forget them."""
    read = sorted(key for key in world.store.reads if key.startswith("summaries/"))
    world.store.reads.clear()
    return read


async def heads_of(
    reader: SummaryReader, days: DateRange = MAY, country: CountrySlug | None = None
) -> list[SummaryHead]:
    """Return the heads that a reader finds."""
    return (await reader.read(days, country)).heads


def trips(heads: list[SummaryHead]) -> dict[tuple[str, str], int]:
    """Return the trips by country and date."""
    return {(head.country, head.date.isoformat()): head.totals.trips for head in heads}


async def test_only_summaries_of_the_range_are_read() -> None:
    """Only the summaries of the range are read, though a month is listed whole."""
    world = World()
    for day in (1, 2, 3):
        world.fold_in(stats("armenia", dt.date(2024, 5, day), trips=day))
    heads = await heads_of(reader_of(world), DateRange(dt.date(2024, 5, 2), dt.date(2024, 5, 2)))
    assert trips(heads) == {("armenia", "2024-05-02"): 2}
    assert heads_read(world) == [keys.summary(1, dt.date(2024, 5, 2), CountrySlug("armenia"))]


async def test_only_summaries_of_the_country_are_read() -> None:
    """A query for one country reads no summary of other countries."""
    world = World()
    world.fold_in(stats("armenia"))
    world.fold_in(stats("belgium"))
    heads = await heads_of(reader_of(world), MAY, CountrySlug("belgium"))
    assert [head.country for head in heads] == ["belgium"]
    assert heads_read(world) == [keys.summary(1, DAY, CountrySlug("belgium"))]


async def test_only_the_head_is_fetched() -> None:
    """Only the first bytes of a summary with a long ledger are read."""
    sizes: list[int] = []

    class Measuring(ObservedStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            found = await super().get(key, first_bytes=first_bytes)
            if found is not None and key.startswith(keys.SUMMARIES):
                sizes.append(len(found.body))
            return found

    world = World(Measuring())
    city_ids = [str(number) for number in range(1_000)]
    world.fold_in(*(stats("armenia", city_id=city_id) for city_id in city_ids), planned("armenia", city_ids=city_ids))
    (head,) = await heads_of(reader_of(world), MAY)
    assert (head.cities_reported, head.totals.trips) == (1_000, 8_000)
    assert sizes == [4096]


async def test_unchanged_summaries_are_not_fetched_again() -> None:
    """Only new and changed summaries are fetched."""
    world = World()
    reader = reader_of(world)
    world.fold_in(stats("armenia", trips=1))
    world.fold_in(stats("belgium", trips=2))
    hits, misses = (value("tripfold_cache_requests_total", cache="heads", result=one) for one in ("hit", "miss"))
    assert len(await heads_of(reader, MAY)) == 2
    heads_read(world)
    assert len(await heads_of(reader, MAY)) == 2
    assert heads_read(world) == []
    assert value("tripfold_cache_requests_total", cache="heads", result="miss") == misses + 2
    assert value("tripfold_cache_requests_total", cache="heads", result="hit") == hits + 2
    world.fold_in(stats("belgium", trips=3, revision=6))
    world.fold_in(stats("chad", trips=4))
    assert trips(await heads_of(reader, MAY)) == {
        ("armenia", "2024-05-01"): 1,
        ("belgium", "2024-05-01"): 3,
        ("chad", "2024-05-01"): 4,
    }
    assert heads_read(world) == [keys.summary(1, DAY, CountrySlug(country)) for country in ("belgium", "chad")]


async def test_summary_that_changes_after_its_listing_is_served_as_fetched() -> None:
    """A summary that changes between listing and fetching is served and cached as fetched."""

    class Changing(ObservedStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            listed = [listed async for listed in super().list(prefix, after=after)]
            if len(self.reads) == 1:
                world.fold_in(stats("armenia", trips=2, revision=6))
            for entry in listed:
                yield entry

    world = World(Changing())
    world.fold_in(stats("armenia", trips=1))
    reader = reader_of(world)
    assert trips(await heads_of(reader, MAY)) == {("armenia", "2024-05-01"): 2}
    heads_read(world)
    assert trips(await heads_of(reader, MAY)) == {("armenia", "2024-05-01"): 2}
    assert heads_read(world) == []


async def test_summary_that_changes_after_its_listing_has_an_etag_of_its_own() -> None:
    """Numbers that no listing has named yet get an ETag that no listing has: one ETag never means two responses."""

    class Changing(ObservedStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            listed = [listed async for listed in super().list(prefix, after=after)]
            world.fold_in(stats("armenia", trips=2, revision=6))
            for entry in listed:
                yield entry

    before = World()
    before.fold_in(stats("armenia", trips=1))
    world = World(Changing())
    world.fold_in(stats("armenia", trips=1))
    reader = reader_of(world)
    tags = [(await reader_of(before).read(MAY)).tag, *[(await reader.read(MAY)).tag for _ in range(2)]]
    assert len(set(tags)) == 3


async def test_summary_deleted_after_its_listing_is_no_data() -> None:
    """A summary that is deleted between listing and fetching counts as no data."""

    class Deleting(ObservedStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            listed = [listed async for listed in super().list(prefix, after=after)]
            self.objects.clear()
            for entry in listed:
                yield entry

    world = World(Deleting())
    world.fold_in(stats("armenia"))
    assert await heads_of(reader_of(world), MAY) == []


async def test_keys_that_name_no_summary_are_ignored() -> None:
    """Keys under the prefix that name no summary are ignored."""
    world = World()
    world.fold_in(stats("armenia"))
    world.store.write("summaries/generation=1/date=2024-05-01/_SUCCESS", b"")
    world.store.write("summaries/generation=1/date=2024-05-99/country=x.json", b"")
    assert len(await heads_of(reader_of(world), MAY)) == 1


async def test_full_cache_evicts_the_least_recently_used_head() -> None:
    """A cache that holds two heads evicts the one used least recently."""
    world = World()
    entry_bytes = len(keys.summary(1, DAY, CountrySlug("armenia"))) + 34 + cache_module.ENTRY_OVERHEAD_BYTES
    reader = reader_of(world, cache_bytes=2 * entry_bytes)
    for country in ("armenia", "belgium", "estonia"):
        world.fold_in(stats(country))
        await heads_of(reader, MAY, CountrySlug(country))
    heads_read(world)
    await heads_of(reader, MAY, CountrySlug("estonia"))
    await heads_of(reader, MAY, CountrySlug("belgium"))
    assert heads_read(world) == []
    await heads_of(reader, MAY, CountrySlug("armenia"))
    assert len(heads_read(world)) == 1
    await heads_of(reader, MAY, CountrySlug("belgium"))
    assert heads_read(world) == []
    await heads_of(reader, MAY, CountrySlug("estonia"))
    assert len(heads_read(world)) == 1


async def test_cache_of_no_bytes_keeps_nothing() -> None:
    """A cache of no bytes keeps nothing, and everything is still served."""
    world = World()
    world.fold_in(stats("armenia"))
    reader = reader_of(world, cache_bytes=0)
    assert len(await heads_of(reader, MAY)) == len(await heads_of(reader, MAY)) == 1
    assert len(heads_read(world)) == 2


def test_cache_keeps_one_head_of_a_key() -> None:
    """A new head replaces the one before it, which is never found again and takes no memory."""
    summary = fold(empty_summary(DAY, CountrySlug("armenia")), [stats("armenia")])
    reads = [ReadHead(etag, objects.decode_head(objects.encode(summary), "a")) for etag in ('"1"', '"2"', '"3"')]
    cache = HeadCache(2 * (cache_module.ENTRY_OVERHEAD_BYTES + len("a") + len('"1"')))
    for read in reads:
        cache.keep("a", read)
    cache.keep("b", reads[0])
    assert [cache.get("a", read.etag) for read in reads] == [None, None, reads[2]]
    assert cache.get("b", '"1"') == reads[0]
    assert len(cache) == 2


async def test_the_live_generation_is_served() -> None:
    """The generation that the pointer names is served; without a pointer, the first one."""
    world = World()
    del world.store.objects[keys.CURRENT]
    world.fold_in(stats("armenia", trips=1), generation=1)
    reader = reader_of(world)
    assert trips(await heads_of(reader, MAY)) == {("armenia", "2024-05-01"): 1}
    world.fold_in(stats("armenia", trips=2), generation=2)
    world.make_live(2)
    assert trips(await heads_of(reader, MAY)) == {("armenia", "2024-05-01"): 2}


class FlippingStore(ObservedStore):
    """A store in which a rebuild goes live while summaries are listed, as often as ``flips`` says."""

    def __init__(self, flips: int) -> None:
        super().__init__()
        self.flips = flips
        self.live = 1
        self.world: World | None = None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        async for listed in super().list(prefix, after=after):
            yield listed
        if self.flips > 0:
            assert self.world is not None
            self.flips -= 1
            self.live += 1
            self.world.fold_in(stats("belgium", trips=self.live), generation=self.live)
            self.world.make_live(self.live)


def flipping_world(flips: int) -> World:
    """Return a world in which so many rebuilds go live, each while the one before is being read."""
    store = FlippingStore(flips)
    world = World(store)
    store.world = world
    world.fold_in(stats("armenia", trips=1), generation=1)
    return world


async def test_generation_that_changes_during_a_read_is_read_anew() -> None:
    """When a rebuild goes live during a read, the whole response comes from the new generation."""
    heads = await heads_of(reader_of(flipping_world(2)), MAY)
    assert trips(heads) == {("belgium", "2024-05-01"): 3}


async def test_reader_gives_up_on_a_generation_that_keeps_changing() -> None:
    """The reader retries only a limited number of times."""
    with pytest.raises(StoreUnavailable, match="changed"):
        await heads_of(reader_of(flipping_world(1_000)), MAY)


async def test_slow_range_exceeds_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that cannot be read in time is given up."""

    class Silent(ObservedStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            await asyncio.Event().wait()
            return await super().get(key, first_bytes=first_bytes)

    monkeypatch.setattr(reader_module, "RANGE_DEADLINE_S", 0.01)
    with pytest.raises(DeadlineExceeded, match="2024-05-01 to 2024-05-31"):
        await heads_of(reader_of(World(Silent())))


async def test_heads_are_fetched_concurrently_up_to_the_limit() -> None:
    """The reader fetches as many heads concurrently as the limit allows, and no more."""
    running = most = 0

    class Slow(ObservedStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(5):
                await asyncio.sleep(0)
            running -= 1
            return await super().get(key, first_bytes=first_bytes)

    world = World(Slow())
    for day in MAY.dates():
        world.fold_in(stats("armenia", day))
    assert len(await heads_of(reader_of(world), MAY)) == 31
    assert most == reader_module.CONCURRENT_GETS_MAX


async def test_concurrent_queries_share_listings_and_fetches() -> None:
    """Any number of concurrent queries list a month a few times and fetch no head twice."""
    listings: list[str] = []

    class Counting(ObservedStore):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
            listings.append(prefix)
            async for listed in super().list(prefix, after=after):
                yield listed

        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            for _ in range(50):  # so that the others have listed before a head is there
                await asyncio.sleep(0)
            return await super().get(key, first_bytes=first_bytes)

    world = World(Counting())
    for day in MAY.dates():
        world.fold_in(stats("armenia", day))
    reader = reader_of(world)
    readings = await asyncio.gather(*(reader.read(MAY) for _ in range(50)))
    assert all(len(reading.heads) == 31 for reading in readings)
    assert len({reading.tag for reading in readings}) == 1
    assert len(heads_read(world)) == 31
    assert len(listings) <= 3


async def test_a_known_etag_fetches_nothing() -> None:
    """A query that needs only the ETag fetches nothing; the ETag changes only with the summaries of the range."""
    world = World()
    world.fold_in(stats("armenia"))
    reader = reader_of(world)
    tag, months, _ = await reader.read(MAY, tag_suffices=lambda _: True)
    assert months is None
    assert heads_read(world) == []
    world.fold_in(stats("armenia", dt.date(2024, 6, 1)))
    assert (await reader.read(MAY)).tag == tag
    world.fold_in(stats("armenia", trips=9, revision=6))
    changed = (await reader.read(MAY)).tag
    assert changed != tag
    world.fold_in(stats("armenia", dt.date(2024, 5, 2)))
    assert (await reader.read(MAY)).tag not in {tag, changed}


async def test_a_rebuild_without_changes_keeps_the_etag() -> None:
    """A rebuild that changes no summary keeps the ETag."""
    world = World()
    world.fold_in(stats("armenia"), generation=1)
    world.fold_in(stats("armenia"), generation=2)
    world.make_live(1)
    reader = reader_of(world)
    before = await reader.read(MAY)
    world.make_live(2)
    assert (await reader.read(MAY)).tag == before.tag


async def test_bounded_map_keeps_the_order() -> None:
    """Results come in the order of the items, in whatever order they are ready."""

    async def slower_at_first(item: int) -> int:
        for _ in range(10 - item):
            await asyncio.sleep(0)
        return item * item

    assert await bounded_map(slower_at_first, range(10), limit=4) == [item * item for item in range(10)]
    assert await bounded_map(slower_at_first, [], limit=4) == []


async def test_bounded_map_raises_the_first_error() -> None:
    """The first error is raised itself, and ends the other calls."""
    begun: list[int] = []

    async def failing(item: int) -> None:
        begun.append(item)
        await asyncio.sleep(0)
        raise StoreUnavailable(str(item))

    with pytest.raises(StoreUnavailable, match="0"):
        await bounded_map(failing, range(100), limit=3)
    assert begun == [0, 1, 2]
