"""A pass with the change index lists only the months that moved, and misses no change."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

import pytest

from services.aggregate.tables.builder import TableBuilder
from services.aggregate.tables.moved_months import ALL_MONTHS_EVERY
from shared.domain import keys, objects
from shared.domain.objects import GenerationPointer
from shared.domain.tables import CITY_DAYS
from shared.storage.change_index import ChangeCounter
from shared.storage.object_store import ObjectInfo
from tests.fakes.bucket import DAY, NOON, FakeBucket, trips
from tests.fakes.store import MemoryStore

MAY, JUNE = "2024-05", "2024-06"
ALL = keys.summaries_of_generation(1)
JUNE_FIRST = dt.date(2024, 6, 1)


class ListingStore(MemoryStore):
    """A store that records the prefixes of summaries that were listed."""

    def __init__(self, bucket: FakeBucket) -> None:
        super().__init__(bucket.clock)
        self.objects = bucket.store.objects
        self.listed: list[str] = []

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        if prefix.startswith(keys.SUMMARIES):
            self.listed.append(prefix)
        async for one in super().list(prefix, after=after):
            yield one


class Aggregate:
    """An aggregate that builds tables of two months, in a bucket whose change index is trusted."""

    def __init__(self, bucket: FakeBucket) -> None:
        self.bucket = bucket
        self.store = ListingStore(bucket)
        self.builder = TableBuilder(self.store, clock=bucket.clock)

    async def build(self) -> tuple[list[str], list[str]]:
        """Run a pass; return the months that it built, and the prefixes that it listed to find them."""
        self.store.listed.clear()
        built = sorted(await self.builder.once())
        return built, self.store.listed[: len(self.store.listed) - len(built)]


@pytest.fixture
async def aggregate() -> Aggregate:
    """Give an aggregate that has built both months."""
    bucket = FakeBucket()
    bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(changes_counted_since=NOON)))
    await bucket.fold(
        [*bucket.plan(1, {"armenia": (1,)}), *bucket.plan(1, {"armenia": (1,)}, JUNE_FIRST)],
        bucket.store_file(1, 2, trips(3)),
        bucket.store_file(1, 2, trips(4), date=JUNE_FIRST),
    )
    aggregate = Aggregate(bucket)
    assert await aggregate.build() == ([MAY, JUNE], [ALL])
    return aggregate


async def correct_a_file(aggregate: Aggregate, revision: int = 3, date: dt.date = DAY) -> None:
    await aggregate.bucket.fold(aggregate.bucket.store_file(1, revision, trips(revision + 20), date=date))


async def test_a_pass_without_changes_lists_no_summary(aggregate: Aggregate) -> None:
    """It reads the pointer and the record of the tables, and lists the index and the files."""
    assert await aggregate.build() == ([], [])


async def test_only_the_months_that_moved_are_listed(aggregate: Aggregate) -> None:
    """A new writer, and one that counts again."""
    await correct_a_file(aggregate)
    assert await aggregate.build() == ([MAY], [keys.summaries_of_month(1, MAY)])
    await correct_a_file(aggregate, date=JUNE_FIRST)
    assert await aggregate.build() == ([JUNE], [keys.summaries_of_month(1, JUNE)])
    assert await aggregate.build() == ([], [])


async def test_a_count_without_a_change_builds_nothing(aggregate: Aggregate) -> None:
    """A writer may count more often than it changes something."""
    await ChangeCounter(aggregate.store).count(1, [MAY])
    assert await aggregate.build() == ([], [keys.summaries_of_month(1, MAY)])


async def test_a_counted_month_without_summaries_gets_no_files(aggregate: Aggregate) -> None:
    """A repair counts every month that it verified, and the summaries of one may all be missing."""
    await ChangeCounter(aggregate.store).count(1, ["2024-07"])
    assert await aggregate.build() == ([], [keys.summaries_of_month(1, "2024-07")])


async def test_a_month_that_was_not_built_is_listed_again(aggregate: Aggregate) -> None:
    """A build that another process overtook leaves its month for the next pass."""
    await correct_a_file(aggregate)
    build = aggregate.builder.build

    async def overtaken(generation: int, month: str) -> None:
        del generation, month

    aggregate.builder.build = overtaken  # type: ignore[method-assign,assignment]  # as after a conflict
    assert await aggregate.builder.once() == []
    aggregate.builder.build = build  # type: ignore[method-assign]  # as it was
    assert await aggregate.build() == ([MAY], [keys.summaries_of_month(1, MAY)])


@pytest.mark.parametrize("damage", ["a writer is gone", "a writer is unreadable", "another switch", "an hour later"])
async def test_every_month_is_listed_if_the_index_may_miss_something(aggregate: Aggregate, damage: str) -> None:
    """Counters that vanished or cannot be read, an index that is trusted anew, and once an hour in any case."""
    store = aggregate.bucket.store
    [key, *_] = store.bodies(keys.changes_of_generation(1))
    match damage:
        case "a writer is gone":
            await store.delete(key)
        case "a writer is unreadable":
            store.write(key, b"{")
        case "another switch":
            later = GenerationPointer(changes_counted_since=NOON + dt.timedelta(seconds=1))
            store.write(keys.CURRENT, objects.encode(later))
        case _:
            aggregate.bucket.clock.advance(ALL_MONTHS_EVERY.total_seconds())
    summary = await aggregate.bucket.summary()
    changed = objects.encode(summary).replace(b'"trips":3', b'"trips":9')
    store.write(await aggregate.bucket.summary_key(), changed)  # nobody counts this
    assert await aggregate.build() == ([MAY], [ALL])


async def test_without_the_switch_every_pass_lists_all(aggregate: Aggregate) -> None:
    """Some writers of an older build do not count."""
    aggregate.bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer()))
    assert await aggregate.build() == ([], [ALL])
    assert await aggregate.build() == ([], [ALL])


async def test_a_lost_file_or_record_is_found_without_a_count(aggregate: Aggregate) -> None:
    """The files of all months are looked at in each pass."""
    store = aggregate.bucket.store
    await store.delete(CITY_DAYS.key(JUNE))
    assert await aggregate.build() == ([JUNE], [])
    await store.delete(keys.TABLES)
    assert await aggregate.build() == ([MAY, JUNE], [ALL])
