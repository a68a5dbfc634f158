"""Raising the revision floor: never below what the topic knows, never back."""

from __future__ import annotations

import pytest

from shared.domain import keys, objects
from shared.domain.ids import REVISION_MAX
from shared.domain.objects import BucketEpoch
from shared.domain.topics import Topic
from tests.fakes.bucket import NOON, FakeBucket, trips
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryTopicReader
from tests.fakes.store import MemoryStore
from tripfold.operate.restore import CannotRestore, Restored, TopicHighest, floor_at, highest_revision, raise_floor

BORN = NOON.replace(year=2023)
KNOWN = TopicHighest(revision=500, key="2024-05-01/armenia/7", records=10)


def store_with(floor: int | None) -> MemoryStore:
    store = MemoryStore(Clock(NOON))
    if floor is not None:
        store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=floor, born_at=NOON)))
    return store


async def raised(
    store: MemoryStore, *, topic: TopicHighest | None = KNOWN, wanted: int | None = None, dry_run: bool = False
) -> Restored:
    return await raise_floor(store, topic=topic, wanted=wanted, clock=Clock(NOON), dry_run=dry_run)


def base_of(store: MemoryStore) -> int | None:
    stored = store.objects.get(keys.BUCKET_EPOCH)
    return objects.decode(BucketEpoch, stored.body, keys.BUCKET_EPOCH).revision_floor if stored else None


@pytest.mark.parametrize(("before", "after"), [(None, 501), (10, 501), (500, 501), (501, 501), (900, 900)])
async def test_the_revision_floor_is_raised_above_the_topic(before: int | None, after: int) -> None:
    """By itself the floor becomes the topic's highest revision plus one, unless it is above that already."""
    store = store_with(before)
    restored = await raised(store)
    assert (restored.floor_before, restored.floor, base_of(store)) == (before, after, after)


async def test_a_given_revision_floor_must_be_above_the_topic() -> None:
    """A floor that was asked for is taken; one that the topic knows, or that would lower it, is refused by name."""
    store = store_with(600)
    for wanted, reason in ((500, "2024-05-01/armenia/7"), (550, "never falls")):
        with pytest.raises(CannotRestore, match=reason):
            await raised(store, wanted=wanted)
    assert base_of(store) == 600
    assert (await raised(store, wanted=700)).floor == base_of(store) == 700


@pytest.mark.parametrize("wanted", [None, 700])
async def test_a_revision_that_no_floor_can_exceed_is_named(wanted: int | None) -> None:
    """A forged record must not give the bucket revisions that nobody can read."""
    store = store_with(600)
    forged = TopicHighest(revision=REVISION_MAX, key="2024-05-01/armenia/7", records=1)
    with pytest.raises(CannotRestore, match="revision 4294967295 of 2024-05-01/armenia/7, which no bucket gives out"):
        await raised(store, topic=forged, wanted=wanted)
    assert base_of(store) == 600


async def test_the_present_time_is_a_floor_if_kafka_is_lost() -> None:
    """Without the topic the floor has to be given; the present time is above all that any bucket gave out."""
    store = store_with(10)
    with pytest.raises(CannotRestore, match="use --now"):
        await raised(store, topic=None)
    assert (await raised(store, topic=None, wanted=floor_at(NOON))).floor == base_of(store) == floor_at(NOON)


async def test_a_dry_run_raises_nothing() -> None:
    """A dry run says which floor it would write, and writes none."""
    store = store_with(10)
    assert (await raised(store, dry_run=True)).floor == 501
    assert base_of(store) == 10


async def test_the_floor_is_raised_despite_a_concurrent_write() -> None:
    """If a service writes the epoch just before, the floor is raised over that one, and the time of birth stays."""
    store = store_with(None)
    compare_and_swap = store.compare_and_swap

    async def overtaken(key: str, body: bytes, *, etag: str | None) -> str:
        store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
        store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=10, born_at=BORN)))
        return await compare_and_swap(key, body, etag=etag)

    store.compare_and_swap = overtaken  # type: ignore[method-assign]  # a service comes first
    assert (await raised(store)).floor_before == 10
    assert objects.decode(BucketEpoch, store.objects[keys.BUCKET_EPOCH].body, keys.BUCKET_EPOCH) == BucketEpoch(
        revision_floor=501, born_at=BORN
    )


async def test_the_highest_revision_counts_plans_and_ignores_poison() -> None:
    """Revisions of plans count as those of files do, and a record that is no event hides none behind it."""
    bucket = FakeBucket()
    bucket.log.append(Topic.CITY_STATS, b"2024-05-01/armenia", b"{")
    for event in (*bucket.store_file(1, 30, trips(1)), *bucket.plan(40, {"armenia": [1]})):
        bucket.record_of(event)
    topic = await highest_revision(
        MemoryTopicReader.of(bucket.log, Topic.CITY_STATS, batch_records_max=10), lambda *_: None
    )
    assert (topic.revision, topic.key, topic.records) == (40, "2024-05-01/armenia", 3)
