"""Verify and repair: which differences they report, which summaries they write, and how events in flight count."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import AsyncIterator

import msgspec
import pytest

from services.aggregate.audit.compare import Difference
from services.aggregate.audit.repair import Repaired, repair_dates
from services.aggregate.audit.verify import read_snapshot, verify_dates
from services.aggregate.bucket_reader import Dates, read_events
from services.aggregate.replay.rebuild import Rebuild, RebuildRefused
from shared.domain import keys, objects, schema
from shared.domain.contribution import NOTHING, Contribution
from shared.domain.ids import CityId
from shared.domain.objects import GenerationPointer, LedgerEntry, RequestRecord
from shared.storage.object_store import ObjectInfo, StoredObject
from tests.fakes.bucket import ALL, DAY, NOON, REQUEST, FakeBucket, trips
from tests.fakes.builders import trip_record


async def no_wait(_read: int) -> None:
    return


async def verified(bucket: FakeBucket, *, deep: bool = False) -> list[Difference]:
    return [
        difference
        async for date in verify_dates(bucket.store, ALL, deep=deep, wait=no_wait)
        for difference in date.differences
    ]


async def repaired(bucket: FakeBucket, *, drop_lost: bool = False) -> list[Repaired]:
    return [
        one
        async for date in repair_dates(
            bucket.store, bucket.publisher, ALL, wait=no_wait, clock=bucket.clock, drop_lost=drop_lost
        )
        for one in date.country_days
    ]


@pytest.fixture
async def bucket() -> FakeBucket:
    """Two countries of a date, folded; city 2 has moved from Armenia to Brasil."""
    bucket = FakeBucket()
    await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3]}))
    for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil")):
        await bucket.fold(bucket.store_file(city, city + 10, trips(city), country))
    await bucket.fold(bucket.plan(2, {"armenia": [1], "brasil": [2, 3]}))
    await bucket.fold(bucket.store_file(2, 20, trips(2), "brasil"))
    return bucket


async def test_a_bucket_at_rest_has_no_difference(bucket: FakeBucket) -> None:
    """Summaries, manifests and raw objects agree after the services have finished."""
    assert await verified(bucket, deep=True) == []


async def test_verify_reads_only_the_dates_of_its_range(bucket: FakeBucket) -> None:
    """Verify reads every date of a range, and no other date."""
    await bucket.damage(totals=NOTHING)
    before, after = DAY - dt.timedelta(days=1), DAY + dt.timedelta(days=1)
    for first, last, count in ((before, after, 3), (after, None, 0), (None, DAY, 1), (after, after, 1)):
        dates = [date async for date in verify_dates(bucket.store, Dates(first, last), deep=False, wait=no_wait)]
        assert len(dates) == count
        told = [difference.country for date in dates for difference in date.differences]
        assert told == ["armenia"] * (first != after)


async def test_a_wrong_contribution_is_reported_with_its_city(bucket: FakeBucket) -> None:
    """A ledger entry that differs from its manifest is reported with country-day, city and both values."""
    summary = await bucket.summary()
    entry = msgspec.structs.replace(summary.ledger[CityId("1")], contribution=NOTHING)
    await bucket.damage(ledger={**summary.ledger, CityId("1"): entry})
    [one] = await verified(bucket)
    assert (one.date, one.country, one.city_id, one.what) == (DAY, "armenia", "1", "ledger entry")
    assert '"passengers":0' in one.found
    assert '"passengers":10' in one.expected


async def test_wrong_totals_are_reported_with_their_field(bucket: FakeBucket) -> None:
    """Totals that differ from the ledger are a difference of the country-day."""
    await bucket.damage(totals=NOTHING)
    assert [(one.country, one.what) for one in await verified(bucket)] == [("armenia", "totals")]


async def test_a_missing_summary_and_a_stray_one_are_reported(bucket: FakeBucket) -> None:
    """A country-day without a summary is a difference, and so is a summary without a manifest or plan."""
    body = bucket.store.objects.pop(await bucket.summary_key("armenia")).body
    stray = body.replace(b'"country":"armenia"', b'"country":"chad"')
    bucket.store.write(await bucket.summary_key("chad"), stray)
    assert [(one.country, one.what, one.found) for one in await verified(bucket)] == [
        ("armenia", "summary", "nothing"),
        ("chad", "summary", "version 33"),
    ]


@pytest.mark.parametrize(("running", "in_flight"), [(True, True), (False, False)])
async def test_a_missing_summary_is_in_flight_only_while_its_request_runs(
    bucket: FakeBucket, *, running: bool, in_flight: bool
) -> None:
    """A missing summary is in flight only while the request that planned its date runs."""
    del bucket.store.objects[await bucket.summary_key("armenia")]
    record = RequestRecord(request_id=REQUEST, date=DAY, requested_at=NOON, updated_at=NOON, planned=not running)
    bucket.store.write(keys.request(REQUEST), objects.encode(record))
    (difference,) = await verified(bucket)
    assert difference.in_flight is in_flight


async def test_an_unreadable_object_is_a_difference(bucket: FakeBucket) -> None:
    """A summary or manifest that cannot be decoded is reported, and verify goes on."""
    bucket.store.write(await bucket.summary_key("brasil"), b"{")
    bucket.store.write(keys.manifest(DAY, CityId("1")), b"{")
    told = await verified(bucket)
    assert [one.what for one in told if not one.country] == ["manifests/date=2024-05-01/city=1.json"]
    assert ("brasil", "summary") in [(one.country, one.what) for one in told]


async def test_a_manifest_ahead_is_read_again(bucket: FakeBucket) -> None:
    """A revision that is folded while verify waits is no difference; one that is never folded is one."""
    published = bucket.store_file(1, 30, trips(4))
    reads = []

    async def fold_at_second_read(snapshot: int) -> None:
        reads.append(snapshot)
        if snapshot == 2:
            await bucket.fold(published)

    dates = [date async for date in verify_dates(bucket.store, ALL, deep=False, wait=fold_at_second_read)]
    assert (dates[0].differences, reads) == ([], [1, 2])
    bucket.store_file(1, 31, trips(5))
    [one] = await verified(bucket)
    assert (one.city_id, one.found, one.expected, one.in_flight) == ("1", "30", "31", True)


async def test_a_plan_ahead_is_read_again(bucket: FakeBucket) -> None:
    """A plan that is folded while verify waits is no difference; a plan older than the summary's counts at once."""
    published = bucket.plan(3, {"armenia": [1], "brasil": [2, 3, 4]})

    async def fold_at_once(_read: int) -> None:
        await bucket.fold(published)

    dates = [date async for date in verify_dates(bucket.store, ALL, deep=False, wait=fold_at_once)]
    assert dates[0].differences == []
    bucket.plan(2, {"armenia": [1], "brasil": [2, 3]})
    assert {(one.country, one.what, one.in_flight) for one in await verified(bucket)} == {
        ("armenia", "plan", False),
        ("brasil", "plan", False),
    }


async def test_a_ledger_ahead_of_its_manifest_counts_at_once(bucket: FakeBucket) -> None:
    """A manifest that went back, as after the restore of a backup, is not in flight."""
    manifest = bucket.manifest(1)
    assert manifest is not None
    older = msgspec.structs.replace(manifest, revision=5)
    bucket.store.write(keys.manifest(DAY, CityId("1")), objects.encode(older))
    [one] = await verified(bucket)
    assert (one.found, one.expected, one.in_flight) == ("11", "5", False)


async def test_deep_reads_the_raw_bytes(bucket: FakeBucket) -> None:
    """Verify names a raw object that is lost; --deep also one that is wrong or no trip file."""
    for city, body in ((1, b"[]"), (2, None), (3, b"[{}]")):
        manifest = bucket.manifest(city)
        assert manifest is not None
        if body is None:
            del bucket.store.objects[manifest.raw_key]
        else:
            bucket.store.write(manifest.raw_key, body)
    assert [(one.city_id, one.what, one.found) for one in await verified(bucket)] == [("2", "raw object", "nothing")]
    told = [(one.city_id, one.what, one.found) for one in await verified(bucket, deep=True)]
    assert ("1", "raw object: trips", "0") in told
    assert ("2", "raw object", "nothing") in told
    assert ("3", "raw object", "record 1: departure-time is missing") in told


@pytest.mark.parametrize("deep", [False, True])
async def test_expired_raw_objects_are_counted(bucket: FakeBucket, *, deep: bool) -> None:
    """A missing raw object is counted as expired if its manifest says so, and is a difference otherwise."""
    lost = bucket.manifest(1)
    assert lost is not None
    del bucket.store.objects[lost.raw_key]
    for before, differences, expired in ((lost.ingested_at, 1, 0), (lost.ingested_at + dt.timedelta(seconds=1), 0, 1)):
        marked = msgspec.structs.replace(lost, raw_expired_before=before)
        bucket.store.write(keys.manifest(DAY, lost.city_id), objects.encode(marked))
        dates = verify_dates(bucket.store, ALL, deep=deep, wait=no_wait)
        told = [(len(date.differences), date.raw_expired) async for date in dates if date.date == DAY]
        assert told == [(differences, expired)]


async def test_deep_reads_a_file_by_the_rules_of_its_manifest(bucket: FakeBucket) -> None:
    """The manifest holds the form of the records, the number left out, and whether other dates were bad."""
    for form, body in (
        ("lines", b"%b\n%b\n%b\n"),
        ("/data/trips", b'{"x": [{}], "data": {"y": "[", "trips": [%b, %b, %b], "z": 1}}'),
    ):
        records = [trip_record(), trip_record(departure="2024-05-02T00:00"), trip_record(passengers=-1)]
        file = body % tuple(json.dumps(one).encode() for one in records)
        before = bucket.manifest(1)
        assert before is not None
        bucket.store.write(before.raw_key, file)
        manifest = msgspec.structs.replace(
            before,
            records_form=form,
            other_dates_are_bad=True,
            bad_records=2,
            contribution=Contribution(trips=1, passengers=3, accidents=1, delay_total_ms=1_000),
            sha256=hashlib.sha256(file).hexdigest(),
            size_bytes=len(file),
        )
        for stored, differs in (
            (manifest, set()),
            (msgspec.structs.replace(manifest, bad_records=1), {"raw object: bad_records"}),
            (msgspec.structs.replace(manifest, records_form="array"), {"raw object"}),
        ):
            bucket.store.write(keys.manifest(DAY, CityId("1")), objects.encode(stored))
            told = {one.what for one in await verified(bucket, deep=True) if one.what.startswith("raw object")}
            assert told == differs


async def test_repair_writes_only_wrong_summaries(bucket: FakeBucket) -> None:
    """A repaired summary has the bytes from before the damage and is published; the others are not written."""
    right = {key: bucket.store.objects[key].body for key in bucket.store.objects}
    untouched = bucket.store.objects[await bucket.summary_key("brasil")]
    summary = await bucket.summary()
    ledger = {
        **summary.ledger,
        CityId("1"): LedgerEntry(revision=99),
    }  # higher, so events published again could not repair it
    await bucket.damage(ledger=ledger, version=500)
    told = bucket.published_versions()
    [one] = await repaired(bucket)
    assert (one.country, one.version_before, one.version_after) == ("armenia", 500, summary.version)
    after = {key: stored.body for key, stored in bucket.store.objects.items()}
    assert {key: after[key] for key in right} == right
    assert all(key.startswith(keys.CHANGES) for key in after.keys() - right.keys())
    assert bucket.published_versions() == [*told, summary.version]
    assert bucket.store.objects[await bucket.summary_key("brasil")] is untouched
    assert await repaired(bucket) == []


async def test_repair_drops_a_city_without_manifest_only_with_drop_lost(bucket: FakeBucket) -> None:
    """A city that only the ledger has is named and kept; with drop_lost the new summary leaves it out."""
    del bucket.store.objects[keys.manifest(DAY, CityId("3"))]
    before = await bucket.summary("brasil")
    [one] = await repaired(bucket)
    assert (one.country, one.version_after) == ("brasil", None)
    assert "city 3 has no manifest" in (one.refused or "")
    assert await bucket.summary("brasil") == before
    [one] = await repaired(bucket, drop_lost=True)
    assert (one.refused, list((await bucket.summary("brasil")).ledger)) == (None, ["2"])
    assert await verified(bucket) == []


async def test_repair_drops_a_lost_plan_only_with_drop_lost(bucket: FakeBucket) -> None:
    """A date whose plan is lost keeps its summaries; with drop_lost the new summaries leave the plan out."""
    del bucket.store.objects[keys.plan(DAY)]
    before = await bucket.summary()
    assert ["the plan of the date is lost" in (one.refused or "") for one in await repaired(bucket)] == [True, True]
    assert await bucket.summary() == before
    assert [one.refused for one in await repaired(bucket, drop_lost=True)] == [None, None]
    assert not (await bucket.summary()).complete


async def test_a_stray_summary_is_emptied_only_with_drop_lost(bucket: FakeBucket) -> None:
    """A summary without a manifest or plan stays; with drop_lost it is emptied, and verify finds no difference."""
    body = bucket.store.objects[await bucket.summary_key("armenia")].body
    bucket.store.write(await bucket.summary_key("chad"), body.replace(b'"country":"armenia"', b'"country":"chad"'))
    del bucket.store.objects[keys.manifest(DAY, CityId("1"))]
    del bucket.store.objects[await bucket.summary_key("armenia")]
    assert [one.country for one in await repaired(bucket) if one.refused] == ["chad"]
    assert (await bucket.summary("chad")).has_data
    assert [one.country for one in await repaired(bucket, drop_lost=True)] == ["chad"]
    assert not (await bucket.summary("chad")).has_data
    assert await verified(bucket) == []


async def test_repair_drops_a_city_that_only_the_ledger_has(bucket: FakeBucket) -> None:
    """A city without manifest, plan and raw object, or whose manifest is in another country, is dropped."""
    right = await bucket.summary()
    for city in ("999", "3"):
        await bucket.damage(ledger={**right.ledger, CityId(city): right.ledger[CityId("1")]})
        [one] = await verified(bucket)
        assert (one.country, one.city_id, one.what, one.expected) == ("armenia", city, "revision", "nothing")
        [mended] = await repaired(bucket)
        assert (mended.refused, await bucket.summary()) == (None, right)


@pytest.mark.parametrize("known", ["raw object", "plan"])
async def test_repair_keeps_a_city_that_has_a_raw_object_or_a_plan(bucket: FakeBucket, known: str) -> None:
    """A city with a raw object or in the plan of the date counts as one whose manifest is lost."""
    right = await bucket.summary()
    await bucket.damage(ledger={**right.ledger, CityId("9"): right.ledger[CityId("1")]})
    if known == "plan":
        await bucket.fold(bucket.plan(3, {"armenia": [1, 9], "brasil": [2, 3]}))
    else:
        bucket.store.write(keys.raw(DAY, CityId("9"), "attempt"), b"[]")
    [one] = await repaired(bucket)
    assert "city 9 has no manifest" in (one.refused or "")
    assert CityId("9") in (await bucket.summary()).ledger


async def test_a_summary_under_the_key_of_another_is_repaired(bucket: FakeBucket) -> None:
    """A readable summary under the key of another country or date is replaced."""
    right = bucket.store.objects[await bucket.summary_key()].body
    other_date = right.replace(b'"date":"2024-05-01"', b'"date":"2024-05-02"')
    for strayed in (bucket.store.objects[await bucket.summary_key("brasil")].body, other_date):
        bucket.store.write(await bucket.summary_key(), strayed)
        [one] = await verified(bucket)
        assert (one.country, one.what) == ("armenia", "summary")
        assert "holds the content of" in one.found
        assert [one.refused for one in await repaired(bucket)] == [None]
        assert bucket.store.objects[await bucket.summary_key()].body == right


@pytest.mark.parametrize("how", [b"%b\n", b" %b"])
async def test_a_summary_in_other_bytes_is_repaired(bucket: FakeBucket, how: bytes) -> None:
    """A summary with the right content in other bytes is a difference, since readers rely on its first bytes."""
    key = await bucket.summary_key()
    right = bucket.store.objects[key].body
    written = json.dumps(json.loads(right), indent=1).encode()
    for body in (how % right, written):
        bucket.store.write(key, body)
        assert [(one.country, one.what) for one in await verified(bucket)] == [("armenia", "bytes")]
        assert [one.refused for one in await repaired(bucket)] == [None]
        assert bucket.store.objects[key].body == right


async def test_a_summary_of_an_earlier_build_is_right_in_its_own_bytes(
    bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A summary of an earlier build is no difference, although this build would encode it differently."""
    monkeypatch.setattr(schema, "_written", schema.SCHEMA_VERSION + 1)
    assert await verified(bucket) == []


async def test_a_manifest_under_a_wrong_key_is_a_difference(bucket: FakeBucket) -> None:
    """A manifest under the key of another city-day, or a plan under another date, is reported and builds nothing."""
    city = keys.manifest(DAY, CityId("1"))
    other = keys.manifest(DAY, CityId("3"))
    plan = keys.plan(DAY)
    stored = dict(bucket.store.objects)
    for key, body in (
        (city, stored[other].body),
        (city, stored[city].body.replace(b'"date":"2024-05-01"', b'"date":"2024-05-02"')),
        (plan, stored[plan].body.replace(b'"date":"2024-05-01"', b'"date":"2024-05-02"')),
    ):
        bucket.store.objects = dict(stored)
        bucket.store.write(key, body)
        assert key in [one.what for one in await verified(bucket)]
        with pytest.raises(RebuildRefused, match="holds the content of"):
            await Rebuild(bucket.store, bucket.publisher, token="token", report=lambda *_: None).run()


async def test_repair_ignores_a_damaged_manifest(bucket: FakeBucket) -> None:
    """If the raw object contradicts the manifest, or has expired, the summary stays as it is."""
    manifest = bucket.manifest(1)
    assert manifest is not None
    damaged = msgspec.structs.replace(manifest, contribution=NOTHING)
    bucket.store.write(keys.manifest(DAY, CityId("1")), objects.encode(damaged))
    right = await bucket.summary()
    [one] = await repaired(bucket)
    assert "'tripfold backfill 2024-05-01 --source bucket --city 1 --again'" in (one.refused or "")
    assert await bucket.summary() == right
    expired = msgspec.structs.replace(damaged, raw_expired_before=bucket.clock() + dt.timedelta(days=1))
    bucket.store.write(keys.manifest(DAY, CityId("1")), objects.encode(expired))
    del bucket.store.objects[manifest.raw_key]
    [one] = await repaired(bucket)
    assert "the raw object that decides between them has expired" in (one.refused or "")
    assert await bucket.summary() == right


async def test_repair_does_not_drop_a_city_whose_manifest_is_unreadable(bucket: FakeBucket) -> None:
    """The manifest is removed and its bytes are kept. The summary stays as it is until the date is requested again."""
    key = keys.manifest(DAY, CityId("1"))
    bucket.store.write(key, b"{")
    before = await bucket.summary()
    [date] = [one async for one in repair_dates(bucket.store, bucket.publisher, ALL, wait=no_wait, clock=bucket.clock)]
    [mended], [refused] = date.mended, date.country_days
    assert (mended.key, f"removed: request {DAY} again" in mended.done) == (key, True)
    assert (key in bucket.store.objects, bucket.store.objects[keys.damaged(key)].body) == (False, b"{")
    assert "city 1 has no manifest" in (refused.refused or "")
    assert await bucket.summary() == before


async def test_repair_replaces_no_summary_of_a_later_build(bucket: FakeBucket) -> None:
    """A summary of a later build is reported; neither repair nor a rebuild of this build replaces it."""
    key = await bucket.summary_key()
    later = bucket.store.objects[key].body.replace(b'"schema_version":1', b'"schema_version":9')
    later = later.replace(b'"totals":{', b'"totals":{"trips_by_hour":"of another type",')
    later = later.replace(b'"has_data":true', b'"has_data":"re-typed"')
    bucket.store.write(key, later)
    [one] = await verified(bucket)
    assert "has schema version 9; this build knows 1: upgrade it" in one.found
    [refused] = await repaired(bucket, drop_lost=True)
    assert refused.refused == one.found
    job = Rebuild(bucket.store, bucket.publisher, token="token", report=lambda *_: None)
    with pytest.raises(RebuildRefused, match="upgrade it"):
        await job.run()
    assert bucket.store.objects[key].body == later


async def test_repair_keeps_a_summary_that_an_aggregate_wrote_meanwhile(bucket: FakeBucket) -> None:
    """A wrong summary that an aggregate writes meanwhile is read again, and no folded event is lost."""
    await bucket.damage(totals=NOTHING)
    published = bucket.store_file(1, 30, trips(4))
    compare_and_swap = bucket.store.compare_and_swap
    raced: list[str] = []

    async def swap_second(key: str, body: bytes, *, etag: str | None) -> str:
        if not raced:
            raced.append(key)
            await bucket.fold(published)
        return await compare_and_swap(key, body, etag=etag)

    bucket.store.compare_and_swap = swap_second  # type: ignore[method-assign]  # the aggregate comes first, once
    await repaired(bucket)
    assert raced, "the summary was written otherwise than by comparison"
    assert (await bucket.summary()).ledger[CityId("1")].revision == 30
    assert await verified(bucket) == []


async def test_repair_reads_a_summary_again_after_a_conflict(bucket: FakeBucket) -> None:
    """After a conflict repair does not take the other writer's summary for a right one."""
    await bucket.damage(cities_reported=99)
    compare_and_swap = bucket.store.compare_and_swap

    async def damaged_again(key: str, body: bytes, *, etag: str | None) -> str:
        bucket.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
        await bucket.damage(cities_reported=98)
        return await compare_and_swap(key, body, etag=etag)

    bucket.store.compare_and_swap = damaged_again  # type: ignore[method-assign]  # the damage happens first
    await repaired(bucket)
    assert await verified(bucket) == []


async def test_an_event_folded_while_manifests_are_read_is_no_difference(bucket: FakeBucket) -> None:
    """Summaries are read first, so none can be ahead of a manifest that was read before."""
    get = bucket.store.get

    async def replaced_after(key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        found = await get(key, first_bytes=first_bytes)
        if key == keys.manifest(DAY, CityId("1")):
            bucket.store.get = get  # type: ignore[method-assign]  # once
            await bucket.fold(bucket.store_file(1, 30, trips(4)))
        return found

    bucket.store.get = replaced_after  # type: ignore[method-assign]  # a worker and an aggregate come next
    assert await verified(bucket) == []


async def test_a_snapshot_is_of_the_generation_that_is_live_after_it(bucket: FakeBucket) -> None:
    """If the pointer moves while summaries are read, the summaries of the new live generation are read."""
    listing = bucket.store.list

    async def flipped_before(prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        bucket.store.list = listing  # type: ignore[method-assign]  # once
        for key, stored in list(bucket.store.objects.items()):
            if key.startswith(keys.summaries_of_generation(1)):
                bucket.store.write(key.replace("generation=1", "generation=2"), stored.body)
                del bucket.store.objects[key]
        bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=2, highest=2)))
        async for one in listing(prefix, after=after):
            yield one

    bucket.store.list = flipped_before  # type: ignore[method-assign]  # a rebuild and a drop come first
    snapshot = await read_snapshot(bucket.store, DAY)
    assert (snapshot.generation, snapshot.differences()) == (2, [])


async def test_repair_keeps_a_tombstone_without_manifest(bucket: FakeBucket) -> None:
    """A tombstone keeps older records of a city out, so the summary stays and the reason is reported."""
    right = await bucket.summary("brasil")
    await bucket.damage("brasil", ledger={**right.ledger, CityId("1"): LedgerEntry(revision=15)})
    [one] = await repaired(bucket)
    assert "city 1 has no manifest" in (one.refused or "")
    assert (await bucket.summary("brasil")).ledger[CityId("1")] == LedgerEntry(revision=15)


async def test_repair_continues_in_a_generation_that_became_live_meanwhile(bucket: FakeBucket) -> None:
    """If the pointer moves during a repair, the summary of the new live generation is repaired, too."""
    await bucket.damage(cities_reported=99)
    for key, stored in list(bucket.store.objects.items()):
        if key.startswith(keys.summaries_of_generation(1)):
            bucket.store.write(key.replace("generation=1", "generation=2"), stored.body)
    compare_and_swap = bucket.store.compare_and_swap

    async def flipped(key: str, body: bytes, *, etag: str | None) -> str:
        bucket.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
        bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=2, highest=2)))
        return await compare_and_swap(key, body, etag=etag)

    bucket.store.compare_and_swap = flipped  # type: ignore[method-assign]  # a rebuild comes first
    await repaired(bucket)
    assert await verified(bucket) == []


async def test_a_date_with_more_objects_than_a_batch_is_read_completely(
    bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All objects of a date are read, whatever the size of a batch."""
    for at_once in range(1, 5):
        monkeypatch.setattr("services.aggregate.bucket_reader.KEYS_AT_ONCE_MAX", at_once)
        assert len((await read_events(bucket.store, DAY)).statistics()) == 3
