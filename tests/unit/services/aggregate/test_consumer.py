"""The consumer of city-stats: its topics end in the latest summary, and each fold costs few calls."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import pytest

from services.aggregate.consumer import CityStatsConsumer
from services.aggregate.fold import as_stat_event
from services.aggregate.replay.generations import begin
from services.aggregate.summary_writer import SummaryWriter
from shared.domain import events, keys, objects
from shared.domain.events import Cause, CityFolded, CountryDaySummary, Event
from shared.domain.ids import CountrySlug
from shared.domain.objects import ChangeCounters, CorruptObject, GenerationPointer, Summary
from shared.domain.topics import Topic
from shared.kafka.records import OutgoingEvent
from shared.storage.change_index import ChangeCounter
from shared.storage.object_store import ObjectInfo, StoreUnavailable
from tests.fakes.bucket import DAY, NOON, REQUEST, FakeBucket, trips
from tests.fakes.handling import handle_all
from tests.fakes.log import MemoryPublisher
from tests.fakes.metrics import value


class LatePublisher(MemoryPublisher):
    """A publisher that lets another action happen once before it publishes a summary."""

    def __init__(self, bucket: FakeBucket) -> None:
        super().__init__(bucket.log)
        self.before: Callable[[], Awaitable[None]] | None = None

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        items = list(outgoing)
        if self.before is not None and any(isinstance(item.event, CountryDaySummary) for item in items):
            before, self.before = self.before, None
            await before()
        await super().publish(items)


class Aggregate:
    """An aggregate whose publishing can be delayed."""

    def __init__(self, bucket: FakeBucket) -> None:
        self._bucket = bucket
        self.publisher = LatePublisher(bucket)
        self._folder = CityStatsConsumer(bucket.store, self.publisher, cache_bytes=100_000)

    async def fold(self, published: Iterable[Event]) -> None:
        await handle_all(self._folder.process, [self._bucket.record_of(event) for event in published])


def bucket_with_trusted_counters() -> FakeBucket:
    """Return a bucket whose pointer says that every process counts its changes."""
    bucket = FakeBucket()
    bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(changes_counted_since=NOON)))
    return bucket


def last_version(bucket: FakeBucket) -> int:
    last = [record for record in bucket.log.appended if record.topic is Topic.COUNTRY_DAY_SUMMARIES][-1]
    event = events.decode(last.topic, last.value)
    assert isinstance(event, CountryDaySummary)
    return event.version


@pytest.mark.parametrize("before", ["itself", "another", "nobody"])
async def test_a_paused_aggregate_leaves_no_stale_summary_in_the_topic(before: str) -> None:
    """An aggregate that is paused between its write and its publish also publishes the latest summary."""
    bucket = bucket_with_trusted_counters()
    paused, other = Aggregate(bucket), Aggregate(bucket)
    if before != "nobody":
        await (paused if before == "itself" else other).fold(bucket.plan(1, {"armenia": [1, 2]}))
    first, second = bucket.store_file(1, 11, trips(1)), bucket.store_file(2, 12, trips(2))

    async def pause() -> None:
        await other.fold(first)
        await other.fold(second)

    paused.publisher.before = pause
    await paused.fold(first)
    assert last_version(bucket) == (await bucket.summary()).version == 23 + (before != "nobody")


async def test_a_writer_that_does_not_count_leaves_no_stale_summary_in_the_topic() -> None:
    """While the pointer does not say that every process counts, the summaries themselves are looked at."""
    bucket = FakeBucket()
    paused, writer = Aggregate(bucket), SummaryWriter(bucket.store, cache_bytes=0)
    await paused.fold(bucket.plan(1, {"armenia": [1, 2]}))
    later = [as_stat_event(event) for event in bucket.store_file(2, 12, trips(2))]

    async def change() -> None:
        await writer.fold(1, later)

    paused.publisher.before = change
    await paused.fold(bucket.store_file(1, 11, trips(1)))
    assert last_version(bucket) == (await bucket.summary()).version == 1 + 11 + 12


async def test_batches_that_come_at_once_are_folded_one_after_another() -> None:
    """A batch that comes while another is published leaves no stale summary in the topic."""
    bucket = bucket_with_trusted_counters()
    aggregate = Aggregate(bucket)
    await aggregate.fold(bucket.plan(1, {"armenia": [1, 2]}))
    first, second = bucket.store_file(1, 11, trips(1)), bucket.store_file(2, 12, trips(2))
    too_early: list[asyncio.Task[None]] = []

    async def take_the_next() -> None:
        too_early.append(asyncio.create_task(aggregate.fold(second)))
        for _ in range(100):
            await asyncio.sleep(0)

    aggregate.publisher.before = take_the_next
    await aggregate.fold(first)
    await too_early[0]
    assert last_version(bucket) == (await bucket.summary()).version == 1 + 11 + 12


def last_of_key(bucket: FakeBucket, key: str) -> Event:
    """Return the record of a ``city-stats`` key that compaction keeps."""
    last = [record for record in bucket.log.records(Topic.CITY_STATS) if record.key == key.encode()][-1]
    return events.decode(last.topic, last.value)


async def test_a_stale_last_record_is_followed_by_the_current_one() -> None:
    """If the last record of a key is stale, the current event of the manifest is published after it."""
    bucket = FakeBucket()
    aggregate = Aggregate(bucket)
    [stale], [present] = bucket.store_file(1, 11, trips(1)), bucket.store_file(1, 12, trips(2))
    await aggregate.fold([present, stale])
    assert last_of_key(bucket, present.key) == present
    records = len(bucket.log.records(Topic.CITY_STATS))
    await aggregate.fold([stale, present])
    assert len(bucket.log.records(Topic.CITY_STATS)) == records + 2, "a batch that ends well needs no answer"


async def test_a_stale_plan_is_followed_by_the_current_one() -> None:
    """The topic ends in the bucket's plan, also for a country that has left the plan."""
    bucket = FakeBucket()
    aggregate = Aggregate(bucket)
    stale = bucket.plan(1, {"armenia": [1]})
    [present] = bucket.plan(2, {"armenia": [1, 2]})
    await aggregate.fold([present])
    await aggregate.fold(stale)
    assert last_of_key(bucket, present.key) == present


async def test_a_restored_older_manifest_is_not_published() -> None:
    """A restored manifest or plan that is stale itself is not published: its record would come back for ever."""
    bucket = FakeBucket()
    aggregate = Aggregate(bucket)
    await aggregate.fold([*bucket.store_file(1, 12, trips(2)), *bucket.plan(2, {"armenia": [1, 2]})])
    restored = [*bucket.store_file(1, 11, trips(1)), *bucket.plan(1, {"armenia": [1]})]
    records = len(bucket.log.records(Topic.CITY_STATS))
    await aggregate.fold(restored)
    assert len(bucket.log.records(Topic.CITY_STATS)) == records + len(restored)


@pytest.mark.parametrize("new_revision", [None, 13])
async def test_a_vanished_summary_is_written_again_with_all_its_cities(new_revision: int | None) -> None:
    """An aggregate writes a summary that was deleted as it knows it, also the cities that no event names."""
    bucket = bucket_with_trusted_counters()
    aggregate = Aggregate(bucket)
    first, second = bucket.store_file(1, 11, trips(1)), bucket.store_file(2, 12, trips(2))
    await aggregate.fold([*bucket.plan(1, {"armenia": [1, 2]}), *first, *second])
    counters = bucket.store.bodies(keys.CHANGES)
    del bucket.store.objects[await bucket.summary_key()]
    await aggregate.fold(bucket.store_file(2, new_revision, trips(2)) if new_revision else second)
    summary = await bucket.summary()
    assert {city: entry.revision for city, entry in summary.ledger.items()} == {"1": 11, "2": new_revision or 12}
    assert bucket.store.bodies(keys.CHANGES) != counters, "a reader must list the month again"


async def test_nothing_counts_as_folded_before_its_summary_is_written() -> None:
    """While a summary cannot be written, no CityFolded event is published."""
    bucket = FakeBucket()
    folder = CityStatsConsumer(bucket.store, bucket.publisher, cache_bytes=100_000)
    cause = Cause(request_id=REQUEST, plan_revision=1, position=0)
    [stats] = bucket.store_file(1, 11, trips(1))
    headers = events.headers_of(stats, source="test", cause=cause)
    record = bucket.log.append(stats.topic, stats.key.encode(), events.encode(stats), headers)
    compare_and_swap = bucket.store.compare_and_swap

    async def refuse(key: str, body: bytes, *, etag: str | None) -> str:
        del body, etag
        raise StoreUnavailable(key)

    bucket.store.compare_and_swap = refuse  # type: ignore[method-assign]  # a full disk
    with pytest.raises(StoreUnavailable):
        await handle_all(folder.process, [record])
    assert bucket.log.records(Topic.REQUEST_PROGRESS) == []
    bucket.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # as it was
    await handle_all(folder.process, [record])
    [folded] = [events.decode(one.topic, one.value) for one in bucket.log.records(Topic.REQUEST_PROGRESS)]
    assert isinstance(folded, CityFolded)
    assert (folded.country, folded.revision) == ("armenia", 11)


async def test_each_fold_costs_one_call_in_a_steady_state() -> None:
    """An aggregate that alone writes makes one compare-and-swap for each fold. It counts and lists once for a batch."""
    bucket = bucket_with_trusted_counters()
    alone = Aggregate(bucket)
    await alone.fold(bucket.plan(1, {"armenia": [1]}))
    key = await bucket.summary_key()
    calls: list[str] = []
    get, compare_and_swap, list_objects = bucket.store.get, bucket.store.compare_and_swap, bucket.store.list

    async def counted_get(key: str, *, first_bytes: int | None = None) -> object:
        calls.append(f"get {key}")
        return await get(key, first_bytes=first_bytes)

    async def counted_swap(key: str, body: bytes, *, etag: str | None) -> str:
        calls.append(f"swap {key}")
        return await compare_and_swap(key, body, etag=etag)

    def counted_list(prefix: str) -> AsyncIterator[ObjectInfo]:
        calls.append(f"list {prefix}")
        return list_objects(prefix)

    bucket.store.get, bucket.store.compare_and_swap = counted_get, counted_swap  # type: ignore[method-assign,assignment]  # counted
    bucket.store.list = counted_list  # type: ignore[method-assign,assignment]  # counted
    hits = value("tripfold_cache_requests_total", cache="summaries", result="hit")
    published = bucket.store_file(1, 11, trips(1))
    await alone.fold(published)
    counted = next(iter(bucket.store.bodies(keys.CHANGES)))
    assert calls == ["get state/current.json", f"swap {key}", f"swap {counted}", "list state/changes/generation=1/"]
    assert value("tripfold_cache_requests_total", cache="summaries", result="hit") == hits + 1


async def test_new_dates_cost_one_call_each() -> None:
    """After a missing summary, the next unknown summary is created without a read."""
    bucket = FakeBucket()
    first, *others = (
        [as_stat_event(event) for event in bucket.store_file(city, 10 + city, trips(city), f"country-{city}")]
        for city in range(1, 5)
    )
    writer = SummaryWriter(bucket.store, cache_bytes=0)
    await writer.fold(1, first)

    async def no_get(key: str, *, first_bytes: int | None = None) -> object:
        raise AssertionError(f"{key} was read, {first_bytes} bytes")

    bucket.store.get = no_get  # type: ignore[method-assign,assignment]  # a read is an error here
    for following in others:
        await writer.fold(1, following)
    assert len(bucket.store.bodies(keys.summaries_of_generation(1))) == 4


@pytest.mark.parametrize("cache_bytes", [0, 100_000])
async def test_an_existing_summary_is_found_by_the_conflict(cache_bytes: int) -> None:
    """A writer that guesses a summary to be missing finds it by the conflict of its write."""
    bucket = FakeBucket()
    first, second, third = (
        [as_stat_event(event) for event in bucket.store_file(city, 10 + city, trips(city))] for city in (1, 2, 3)
    )
    await SummaryWriter(bucket.store, cache_bytes=0).fold(1, first)
    writer = SummaryWriter(bucket.store, cache_bytes=cache_bytes)
    await writer.fold(2, first)
    await writer.fold(1, second)
    await writer.fold(1, third)
    assert (await bucket.summary()).version == 11 + 12 + 13


async def test_the_live_generation_is_never_ahead_of_the_building_one() -> None:
    """A comparison that reads the live summary first finds each of its events in the built one, too."""
    bucket = FakeBucket()
    aggregate = Aggregate(bucket)
    current = await begin(bucket.store, "token", take_over=False)
    building = keys.summary(current.highest, DAY, CountrySlug("armenia"))
    live = await bucket.summary_key()
    ahead: list[int] = []
    compare_and_swap = bucket.store.compare_and_swap

    async def compared_after(key: str, body: bytes, *, etag: str | None) -> str:
        written = await compare_and_swap(key, body, etag=etag)
        if key == live:
            built = bucket.store.objects.get(building)
            version = objects.decode(Summary, built.body, building).version if built else 0
            ahead.append(objects.decode(Summary, body, key).version - version)
        return written

    bucket.store.compare_and_swap = compared_after  # type: ignore[method-assign]  # a rebuild reads at any moment
    await aggregate.fold(bucket.store_file(1, 11, trips(1)))
    await aggregate.fold(bucket.store_file(2, 12, trips(2)))
    assert ahead == [0, 0]


class ObservedEffects(MemoryPublisher):
    """A publisher that notes for each publish which months are counted at that moment."""

    def __init__(self, bucket: FakeBucket) -> None:
        super().__init__(bucket.log)
        self._bucket = bucket
        self.counted: list[tuple[str, dict[str, int]]] = []

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        items = list(outgoing)
        self.counted += [(type(item.event).__name__, counted(self._bucket)) for item in items]
        await super().publish(items)


def counted(bucket: FakeBucket, generation: int = 1) -> dict[str, int]:
    """Return the sums of all counters of a generation."""
    sums = Counter[str]()
    for key, body in bucket.store.bodies(keys.changes_of_generation(generation)).items():
        sums.update(objects.decode(ChangeCounters, body, key).months)
    return dict(sums)


async def test_a_change_is_counted_before_anything_follows_from_it() -> None:
    """All months of a batch are counted by one write before its summaries and CityFolded events are published."""
    bucket = FakeBucket()
    publisher = ObservedEffects(bucket)
    consumer = CityStatsConsumer(bucket.store, publisher, cache_bytes=100_000)
    published = [
        event
        for number, date in enumerate((DAY, DAY + dt.timedelta(days=1), DAY + dt.timedelta(days=31)))
        for event in bucket.store_file(number, 11, trips(1), date=date)
    ]
    cause = Cause(request_id=REQUEST, plan_revision=1, position=0)
    await handle_all(
        consumer.process,
        [
            bucket.log.append(
                event.topic,
                event.key.encode(),
                events.encode(event),
                events.headers_of(event, source="test", cause=cause),
            )
            for event in published
        ],
    )
    both = {"2024-05": 1, "2024-06": 1}
    assert publisher.counted == [("CountryDaySummary", both)] * 3 + [("CityFolded", both)] * 3
    assert len(bucket.store.bodies(keys.CHANGES)) == 1


async def test_an_unchanged_fold_is_counted_by_a_process_that_did_not_count_it() -> None:
    """A process counts each version once, also one that an earlier process wrote and may not have counted."""
    bucket = FakeBucket()
    published = bucket.store_file(1, 11, trips(1))
    await SummaryWriter(bucket.store, cache_bytes=0).fold(1, [as_stat_event(event) for event in published])
    aggregate = Aggregate(bucket)
    for _ in range(2):
        await aggregate.fold(published)
        assert counted(bucket) == {"2024-05": 1}
    await aggregate.fold(bucket.store_file(1, 12, trips(2)))
    assert counted(bucket) == {"2024-05": 2}


async def test_the_building_generation_is_counted_too() -> None:
    """Each generation that a batch is folded into has counters of its own."""
    bucket = FakeBucket()
    current = await begin(bucket.store, "token", take_over=False)
    await Aggregate(bucket).fold(bucket.store_file(1, 11, trips(1)))
    assert counted(bucket, 1) == counted(bucket, current.highest) == {"2024-05": 1}


async def test_a_version_of_another_process_is_counted_before_it_is_published() -> None:
    """A process that publishes the summary of another counts it, since the other may have crashed before its count."""
    bucket = bucket_with_trusted_counters()
    aggregate = Aggregate(bucket)
    writer = SummaryWriter(bucket.store, cache_bytes=0)
    later = [as_stat_event(event) for event in bucket.store_file(2, 12, trips(2))]

    async def change() -> None:
        await writer.fold(1, later)
        await ChangeCounter(bucket.store).count(1, ["2024-06"])  # for another change of its batch

    aggregate.publisher.before = change
    await aggregate.fold(bucket.store_file(1, 11, trips(1)))
    assert (bucket.published_versions(), counted(bucket)) == ([11, 23], {"2024-05": 2, "2024-06": 1})


async def test_a_summary_that_cannot_be_folded_keeps_no_other_back() -> None:
    """The other summaries of a batch are counted and published; then the error is raised, and the batch comes again."""
    bucket = FakeBucket()
    published = [*bucket.store_file(1, 11, trips(1)), *bucket.store_file(2, 12, trips(1), "brasil")]
    bucket.store.write(await bucket.summary_key("brasil"), b"{")
    with pytest.raises(CorruptObject):
        await Aggregate(bucket).fold(published)
    assert (bucket.published_versions(), counted(bucket)) == ([11], {"2024-05": 1})
