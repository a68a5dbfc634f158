"""Reprocessing: stored raw objects read again by changed rules, beside a running ingest, and ended in its middle."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from services.aggregate.audit.verify import verify_dates
from services.aggregate.bucket_reader import Dates
from services.aggregate.consumer import CityStatsConsumer
from services.ingest.parsing.parser import DEFAULT_RULES
from services.ingest.parsing.trips import RULE_VERSION
from shared.domain import keys, objects
from shared.domain.file_rules import BadRecordsMax, FileRules
from shared.domain.ids import CityId, CountrySlug
from shared.domain.topics import Topic
from shared.storage.object_store import AdminObjectStore, StoreUnavailable
from tests.fakes.bucket import ALL, DAY, FakeBucket, trips
from tests.fakes.builders import trip_file
from tests.fakes.faults import Break, Crash, PortCalls, ProcessLife
from tests.fakes.store import BreakableAdminStore
from tripfold.operate.reprocess import Reprocess, Reprocessed, Selection

LATER = RULE_VERSION + 1


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
async def bucket() -> FakeBucket:
    """Two countries of a date, folded by the present rules, whose sums the manifests of 1 and 2 have wrong."""
    bucket = FakeBucket()
    await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3]}))
    for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil")):
        bucket.store_file(city, city + 10, trips(city), country)
    for city in (1, 2):
        manifest = bucket.manifest(city)
        assert manifest is not None
        wrong = msgspec.structs.replace(manifest.contribution, passengers=0)
        bucket.store.write(
            keys.manifest(DAY, manifest.city_id), objects.encode(msgspec.structs.replace(manifest, contribution=wrong))
        )
    await bucket.fold_all()
    return bucket


async def reprocessed(
    bucket: FakeBucket,
    threads: ThreadPoolExecutor,
    selection: Selection | None = None,
    *,
    rules: FileRules = DEFAULT_RULES,
    dry_run: bool = False,
    store: AdminObjectStore | None = None,
) -> list[Reprocessed]:
    job = Reprocess(
        store or bucket.store,
        bucket.publisher,
        clock=bucket.clock,
        rules=rules,
        threads=threads,
        streams=2,
        dry_run=dry_run,
    )
    return [one async for date in job.run(selection or Selection(again=True)) for one in date.reprocessed]


def passengers(bucket: FakeBucket, city: int) -> int:
    manifest = bucket.manifest(city)
    assert manifest is not None
    return manifest.contribution.passengers


async def folded(bucket: FakeBucket, since: int) -> None:
    """Fold what was published since so many records."""
    records = [record for record in bucket.log.appended[since:] if record.topic is Topic.CITY_STATS]
    await CityStatsConsumer(bucket.store, bucket.publisher, cache_bytes=100_000).process(records)


async def test_a_file_with_other_totals_under_new_rules_becomes_a_revision(
    bucket: FakeBucket, threads: ThreadPoolExecutor
) -> None:
    """City-days whose file adds up to something else get a new revision, naming the same file, and are published."""
    since = len(bucket.log.appended)
    told = await reprocessed(bucket, threads)
    assert [(one.city_id, one.revision_before, one.revision_after, one.refused) for one in told] == [
        ("1", 11, told[0].revision_after, None),
        ("2", 12, told[1].revision_after, None),
    ]
    manifest = bucket.manifest(1)
    assert manifest is not None
    assert manifest.revision == told[0].revision_after
    assert manifest.raw_key == manifest.history[0].raw_key
    assert (manifest.contribution.passengers, manifest.history[0].revision) == (10, 11)
    await folded(bucket, since)
    assert (await bucket.summary()).totals.passengers == 30
    assert [date.differences async for date in verify_dates(bucket.store, ALL, deep=True, wait=no_wait)] == [[]]
    assert await reprocessed(bucket, threads) == []


async def no_wait(_look: int) -> None:
    return


async def test_files_of_the_present_rules_are_not_read(bucket: FakeBucket, threads: ThreadPoolExecutor) -> None:
    """Files of the present rule version are not read; each file of an older one becomes a revision, changed or not."""
    assert await reprocessed(bucket, threads, Selection()) == []
    manifest = bucket.manifest(3)
    assert manifest is not None
    older = msgspec.structs.replace(manifest, rule_version=RULE_VERSION - 1)
    bucket.store.write(keys.manifest(DAY, manifest.city_id), objects.encode(older))
    [one] = await reprocessed(bucket, threads, Selection())
    assert (one.city_id, one.before) == ("3", one.after)
    manifest = bucket.manifest(3)
    assert manifest is not None
    assert (manifest.rule_version, manifest.revision) == (RULE_VERSION, one.revision_after)


async def test_files_that_changed_settings_affect_are_reprocessed(
    bucket: FakeBucket, threads: ThreadPoolExecutor
) -> None:
    """Only files that the present settings would read differently are reprocessed."""
    other_date = DAY.replace(day=2)
    bucket.store_file(3, 20, trips(4), "brasil")
    manifest = bucket.manifest(3)
    assert manifest is not None
    body = trip_file(trips(4), other_date)
    bucket.store.write(manifest.raw_key, body)
    stored = msgspec.structs.replace(
        manifest, sha256=hashlib.sha256(body).hexdigest(), size_bytes=len(body), trips_on_other_dates=4
    )
    bucket.store.write(keys.manifest(DAY, manifest.city_id), objects.encode(stored))
    rules = FileRules(bad_records_max=BadRecordsMax.parse("100%"), other_dates_are_bad=True)
    [one] = await reprocessed(bucket, threads, Selection(), rules=rules)
    assert (one.city_id, one.before.trips, one.after and one.after.trips) == ("3", 4, 0)
    assert [one.city_id for one in await reprocessed(bucket, threads, Selection())] == ["3"]


async def test_a_selection_and_a_dry_run_change_nothing_else(bucket: FakeBucket, threads: ThreadPoolExecutor) -> None:
    """A dry run writes nothing; a country, a city or a range restricts what is read."""
    before = {key: stored.body for key, stored in bucket.store.objects.items()}
    told = await reprocessed(bucket, threads, dry_run=True)
    assert [(one.city_id, one.revision_after, one.after and one.after.passengers) for one in told] == [
        ("1", None, 10),
        ("2", None, 20),
    ]
    after = {key: stored.body for key, stored in bucket.store.objects.items() if key != keys.BUCKET_EPOCH}
    assert after == before
    assert await reprocessed(bucket, threads, Selection(again=True, country=CountrySlug("brasil"))) == []
    assert (
        await reprocessed(bucket, threads, Selection(again=True, dates=Dates(None, DAY.replace(day=1, month=4)))) == []
    )
    assert [one.city_id for one in await reprocessed(bucket, threads, Selection(again=True, city_id=CityId("2")))] == [
        "2"
    ]
    assert (passengers(bucket, 1), passengers(bucket, 2)) == (0, 20)


async def test_a_file_that_cannot_be_read_again_stays_as_it_was(
    bucket: FakeBucket, threads: ThreadPoolExecutor
) -> None:
    """A raw object that is lost or changed, and a manifest of later rules, are refused by name; the others go on."""
    for city, change in ((1, "lost"), (2, "other")):
        manifest = bucket.manifest(city)
        assert manifest is not None
        if change == "lost":
            del bucket.store.objects[manifest.raw_key]
        else:
            bucket.store.write(manifest.raw_key, b"[]")
    manifest = bucket.manifest(3)
    assert manifest is not None
    newer = msgspec.structs.replace(manifest, rule_version=LATER)
    bucket.store.write(keys.manifest(DAY, manifest.city_id), objects.encode(newer))
    reasons = [one.refused or "" for one in await reprocessed(bucket, threads)]
    assert ["is lost" in reasons[0], "has changed since it was stored" in reasons[1], "upgrade" in reasons[2]] == [
        True
    ] * 3
    assert (passengers(bucket, 1), passengers(bucket, 2)) == (0, 0)


async def test_a_file_that_is_ingested_meanwhile_wins(bucket: FakeBucket, threads: ThreadPoolExecutor) -> None:
    """If a worker swaps a newer file in while the older one is read again, the newer one stays."""
    stream = bucket.store.stream
    ingested: list[str] = []

    async def stream_second(key: str) -> object:
        if not ingested:
            ingested.append(key)
            bucket.store_file(1, 40, trips(7))
        async for chunk in stream(key):
            yield chunk

    bucket.store.stream = stream_second  # type: ignore[method-assign,assignment]  # the worker comes first, once
    told = await reprocessed(bucket, threads)
    manifest = bucket.manifest(1)
    assert manifest is not None
    assert (manifest.revision, manifest.contribution.trips) == (40, 7)
    assert [(one.city_id, one.after is None) for one in told] == [
        ("1", True),
        ("2", False),
    ]  # published, for nobody had


async def test_an_interrupted_reprocess_is_completed_by_the_next_one(
    bucket: FakeBucket, threads: ThreadPoolExecutor
) -> None:
    """Killed before or after any of its calls and started again, a reprocess ends as if nothing had happened."""
    begin, log = dict(bucket.store.objects), bucket.log.copy()
    port_calls = PortCalls()
    await reprocessed(bucket, threads, store=BreakableAdminStore(bucket.store, ProcessLife("reprocess", port_calls)))
    calls = len(port_calls.made)
    assert calls > 15
    for number in range(calls):
        for broken in (Break.DIE_BEFORE, Break.DIE_AFTER, Break.LOST_ANSWER, Break.REFUSED):
            bucket.store.objects, bucket.log = dict(begin), log.copy()
            bucket.publisher._log = bucket.log
            life = ProcessLife("reprocess", PortCalls({number: broken}))
            with contextlib.suppress(Crash, BaseExceptionGroup, StoreUnavailable):
                await reprocessed(bucket, threads, store=BreakableAdminStore(bucket.store, life))
            await reprocessed(bucket, threads)
            await folded(bucket, 0)
            assert (passengers(bucket, 1), passengers(bucket, 2)) == (10, 20), (number, broken)
            assert (await bucket.summary()).totals.passengers == 30, (number, broken)


async def test_a_manifest_that_was_never_folded_is_published_again(
    bucket: FakeBucket, threads: ThreadPoolExecutor
) -> None:
    """A manifest of the present rules that was never folded is published, unless the run is a dry one."""
    bucket.store_file(4, 14, trips(4), "brasil")
    since = len(bucket.log.appended)
    assert await reprocessed(bucket, threads, Selection(), dry_run=True) == []
    assert len(bucket.log.appended) == since
    [one] = await reprocessed(bucket, threads, Selection())
    assert (one.city_id, one.after) == ("4", None)
    await folded(bucket, since)
    assert (await bucket.summary("brasil")).totals.trips == 7
    assert await reprocessed(bucket, threads, Selection()) == []
