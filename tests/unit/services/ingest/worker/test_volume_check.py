"""Comparing a new file with the manifests of earlier weeks."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from services.ingest.worker.volume_check import VolumeCheck
from shared.domain import keys, objects
from shared.domain.ids import utc_now
from shared.domain.objects import Manifest
from shared.domain.volume import VolumeRules
from shared.storage.object_store import StoreUnavailable
from tests.fakes.api import ObservedStore, manifest_of, stats
from tests.fakes.store import MemoryStore

DATE = dt.date(2024, 5, 1)
RULES = VolumeRules(trips_min=10)


def manifest(weeks_ago: int, trips: int) -> Manifest:
    """Return the manifest of a city-day some weeks before DATE."""
    event = stats("armenia", DATE - dt.timedelta(weeks=weeks_ago), trips=trips)
    return manifest_of(msgspec.structs.replace(event, size_bytes=100 * trips))


def store_with(*trips_before: int, store: MemoryStore | None = None) -> MemoryStore:
    """Return a store with the manifests of the weeks before DATE, the latest first."""
    store = store or MemoryStore(utc_now)
    for weeks_ago, trips in enumerate(trips_before, start=1):
        one = manifest(weeks_ago, trips)
        store.write(keys.manifest(one.date, one.city_id), objects.encode(one))
    return store


async def test_a_new_file_is_compared_with_the_earlier_weeks() -> None:
    """A file of half the usual trips is suspicious; one of the usual trips is not."""
    check = VolumeCheck(store_with(100, 101, 99), RULES)
    assert await check.suspicion_of(manifest(0, 50)) == "50 trips; usual on a Wednesday are 100"
    assert await check.suspicion_of(manifest(0, 100)) is None


async def test_earlier_days_that_are_missing_or_unreadable_are_left_out() -> None:
    """Three readable days of eight suffice to judge the file; two do not."""
    store = store_with(100, 100, 100, 100)
    store.write(keys.manifest(manifest(1, 1).date, manifest(1, 1).city_id), b"{")
    assert await VolumeCheck(store, RULES).suspicion_of(manifest(0, 50)) is not None
    store.write(keys.manifest(manifest(2, 1).date, manifest(2, 1).city_id), b'{"schema_version":99}')
    assert await VolumeCheck(store, RULES).suspicion_of(manifest(0, 50)) is None


async def test_an_outage_of_the_store_is_no_judgement() -> None:
    """The worker retries the city-day, instead of storing it without a judgement."""
    store = ObservedStore()
    store_with(100, 100, 100, store=store)
    store.down = True
    with pytest.raises(StoreUnavailable):
        await VolumeCheck(store, RULES).suspicion_of(manifest(0, 50))


async def test_without_rules_nothing_is_read() -> None:
    """A worker that does not check volumes pays no request for it."""
    store = ObservedStore()
    store_with(100, 100, 100, store=store)
    assert await VolumeCheck(store, None).suspicion_of(manifest(0, 0)) is None
    assert store.reads == []
