"""Unreadable objects of every kind are found and mended; those of a later build stay."""

from __future__ import annotations

import pytest

from services.aggregate.audit.mend import KINDS, OF_DATES, mend, mend_objects, sampled_faults
from shared.domain import keys, objects
from shared.domain.backfills import new_backfill
from shared.domain.ids import CityId, CountrySlug, derive_request_id
from shared.domain.objects import BucketEpoch, Countries, GenerationPointer, OpenBackfills, SchemaSwitch
from shared.domain.requests import new_record
from shared.storage.backfills import read_open
from tests.fakes.bucket import ALL, DAY, REQUEST, FakeBucket, trips
from tests.fakes.builders import daily_schedule

BACKFILL = derive_request_id(FakeBucket().clock(), "backfill")


@pytest.fixture
async def bucket() -> FakeBucket:
    """Return a bucket with an object of each kind."""
    bucket = FakeBucket()
    await bucket.fold([*bucket.plan(1, {"armenia": [1]}), *bucket.store_file(1, 11, trips(3))])
    backfill = new_backfill(BACKFILL, DAY, DAY, now=bucket.clock())
    for key, stored in {
        keys.BUCKET_EPOCH: BucketEpoch(revision_floor=10, born_at=bucket.clock()),
        keys.COUNTRIES: Countries(slugs={"Armenia": CountrySlug("armenia")}),
        keys.OPEN_BACKFILLS: OpenBackfills(backfill_ids=(BACKFILL,)),
        keys.SCHEMA_SWITCH: SchemaSwitch(),
        keys.active_requests(DAY): objects.ActiveRequests(date=DAY),
        keys.request(REQUEST): new_record(REQUEST, DAY),
        keys.backfill(BACKFILL): backfill,
        keys.schedule("daily"): daily_schedule(bucket.clock()),
        keys.idempotency("0" * 64): objects.BucketObject(),
    }.items():
        bucket.store.write(key, objects.encode(stored))
    return bucket


async def faults(bucket: FakeBucket) -> set[str]:
    return {fault.key async for fault in sampled_faults(bucket.store)}


async def test_every_unreadable_object_is_named_and_mended(bucket: FakeBucket) -> None:
    """The sample names one of each kind. All are mended, and their bytes are kept."""
    bucket.store.write(keys.quarantine_report(DAY, CityId("1"), "attempt"), b"{")
    damaged = {key for key in bucket.store.objects if key.startswith(tuple(KINDS)) and key != keys.request(REQUEST)}
    assert {prefix for prefix in KINDS if not any(key.startswith(prefix) for key in damaged)} == {keys.REQUESTS}
    for key in damaged - {keys.CURRENT}:
        bucket.store.write(key, b"{")
    assert await faults(bucket) == damaged - {keys.CURRENT}
    bucket.store.write(keys.CURRENT, b"{")
    mended = {one.key async for one in mend_objects(bucket.store, ALL, bucket.clock)}
    of_dates = {key for key in damaged if key.startswith(OF_DATES)}
    assert mended == damaged - of_dates
    assert {key for key in of_dates if await mend(bucket.store, key, bucket.clock) is not None} == of_dates
    assert await faults(bucket) == set()
    assert all(bucket.store.objects[keys.damaged(key)].body == b"{" for key in damaged)


async def test_state_is_made_again(bucket: FakeBucket) -> None:
    """From plans, backfills, summaries and the clock."""
    for key in (keys.BUCKET_EPOCH, keys.COUNTRIES, keys.OPEN_BACKFILLS, keys.CURRENT):
        bucket.store.write(key, b"{")
    bucket.store.write(keys.summary(4, DAY, CountrySlug("armenia")), b"{}")
    assert len([one async for one in mend_objects(bucket.store, ALL, bucket.clock)]) == 5  # the list is filled too

    def read(kind: type[objects.BucketObject], key: str) -> objects.BucketObject:
        return objects.decode(kind, bucket.store.objects[key].body, key)

    epoch = read(BucketEpoch, keys.BUCKET_EPOCH)
    pointer = read(GenerationPointer, keys.CURRENT)
    assert isinstance(epoch, BucketEpoch)
    assert isinstance(pointer, GenerationPointer)
    assert (epoch.revision_floor > 11, pointer.live, pointer.highest) == (True, 4, 4)
    assert read(Countries, keys.COUNTRIES) == Countries(slugs={"Armenia": CountrySlug("armenia")})
    assert await read_open(bucket.store) == (BACKFILL,)


async def test_a_lost_pointer_is_made_again(bucket: FakeBucket) -> None:
    """It is missing although there is a second generation."""
    del bucket.store.objects[keys.CURRENT]
    bucket.store.write(keys.summary(2, DAY, CountrySlug("armenia")), b"{}")
    [one] = [one async for one in mend_objects(bucket.store, ALL, bucket.clock)]
    assert (one.key, one.done) == (keys.CURRENT, "made again: generation 2 is live")


async def test_an_object_of_a_later_build_stays(bucket: FakeBucket) -> None:
    """It is named and not touched."""
    newer = b'{"schema_version":9}'
    bucket.store.write(keys.schedule("daily"), newer)
    assert await faults(bucket) == {keys.schedule("daily")}
    assert [one async for one in mend_objects(bucket.store, ALL, bucket.clock)] == []
    assert bucket.store.objects[keys.schedule("daily")].body == newer
