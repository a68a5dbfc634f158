"""Rebuild: which generation becomes live, when a flip is refused, and what a crashed rebuild leaves."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
from collections.abc import Sequence

import msgspec
import pytest

from services.aggregate.replay import generations
from services.aggregate.replay.generations import GenerationInUse, GenerationState, NoSuchGeneration, RebuildInProgress
from services.aggregate.replay.rebuild import PENDING_BYTES_MAX, Rebuild, RebuildRefused, Rebuilt
from shared.domain import keys, objects
from shared.domain.contribution import NOTHING
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import ChangeCounters, GenerationPointer, LedgerEntry
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.storage.generation_pointer import (
    GenerationPointerMissing,
    provision_pointer,
    read_current,
    trust_change_counters,
)
from shared.storage.object_store import AdminObjectStore, CasConflict, StoreUnavailable
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.fakes.faults import Break, Crash, PortCalls, ProcessLife
from tests.fakes.log import MemoryLog, MemoryPublisher, MemoryTopicReader
from tests.fakes.store import BreakableAdminStore

NEXT_DAY = DAY + dt.timedelta(days=1)
TOKEN = "token-1"


def unseen(_step: str, _done: int, _total: int, _events: int) -> None:
    return


async def rebuild(
    bucket: FakeBucket,
    *,
    records: Sequence[ConsumedRecord] | None = None,
    seed: int | None = None,
    token: str = TOKEN,
    take_over: bool = False,
    dry_run: bool = False,
    store: AdminObjectStore | None = None,
    pending_bytes_max: int = PENDING_BYTES_MAX,
) -> Rebuilt:
    replay = None if records is None else MemoryTopicReader(lambda: records)
    job = Rebuild(
        store or bucket.store,
        bucket.publisher,
        token=token,
        report=unseen,
        reader=replay,
        seed=seed,
        pending_bytes_max=pending_bytes_max,
    )
    return await job.run(take_over=take_over, dry_run=dry_run)


def bodies(bucket: FakeBucket, generation: int) -> dict[str, bytes]:
    """Return the bytes of a generation's summaries, by the rest of their keys."""
    prefix = keys.summaries_of_generation(generation)
    return {key.removeprefix(prefix): body for key, body in bucket.store.bodies(prefix).items()}


@pytest.fixture
async def bucket() -> FakeBucket:
    """Two dates, folded; on the first, city 1 was corrected and city 2 has moved."""
    bucket = FakeBucket()
    await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3]}), bucket.plan(1, {"chad": [4]}, NEXT_DAY))
    for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil")):
        await bucket.fold(bucket.store_file(city, city + 10, trips(city), country))
    await bucket.fold(bucket.plan(2, {"armenia": [1], "brasil": [2, 3]}))
    await bucket.fold(bucket.store_file(2, 20, trips(2), "brasil"), bucket.store_file(1, 21, trips(6)))
    await bucket.fold(bucket.store_file(4, 14, trips(3), "chad", NEXT_DAY))
    return bucket


async def test_a_rebuild_from_s3_gives_the_same_bytes(bucket: FakeBucket) -> None:
    """A rebuild from plans and manifests gives every summary byte for byte, under a new number."""
    rebuilt = await rebuild(bucket)
    assert (rebuilt.generation, rebuilt.flipped, rebuilt.changes, rebuilt.country_days) == (2, True, [], 3)
    assert bodies(bucket, 2) == bodies(bucket, 1)
    assert await read_current(bucket.store) == GenerationPointer(live=2, highest=2)


@pytest.mark.parametrize("pending_bytes_max", [0, 2_000, PENDING_BYTES_MAX])
@pytest.mark.parametrize("seed", range(10))
async def test_a_rebuild_from_kafka_gives_the_same_bytes_in_any_order(
    bucket: FakeBucket, seed: int, pending_bytes_max: int
) -> None:
    """A topic that is read three times, shuffled and with duplicates, gives the summaries byte for byte."""
    records = bucket.log.records(Topic.CITY_STATS) * 3
    shuffler = random.Random(seed)
    records += shuffler.choices(records, k=10)
    shuffler.shuffle(records)
    for key in [key for key in bucket.store.objects if key.startswith(("plans/", "manifests/"))]:
        del bucket.store.objects[key]  # so only the topic has the events
    rebuilt = await rebuild(bucket, records=records, pending_bytes_max=pending_bytes_max)
    assert (rebuilt.flipped, rebuilt.changes, rebuilt.events) == (True, [], len(records))
    assert bodies(bucket, 2) == bodies(bucket, 1)


@pytest.mark.parametrize(("pending_bytes_max", "writes"), [(PENDING_BYTES_MAX, 1), (0, 4)])
async def test_events_wait_for_others_of_their_country_day(pending_bytes_max: int, writes: int) -> None:
    """A country-day in three batches is written once, unless no record may wait.

    Without waiting each batch is a write. One write conflicts, because the country-day was guessed to be new.
    """
    bucket = FakeBucket()
    records = [
        bucket.record_of(event)
        for city in range(1, 12)
        for event in bucket.store_file(city, 10 + city, trips(city), "armenia")
    ]
    for key in [key for key in bucket.store.objects if key.startswith("manifests/")]:
        del bucket.store.objects[key]  # so they are not folded at the end
    port_calls = PortCalls()
    store = BreakableAdminStore(bucket.store, ProcessLife("rebuild", port_calls))
    await rebuild(bucket, records=records, store=store, pending_bytes_max=pending_bytes_max)
    summary = keys.summary(2, DAY, CountrySlug("armenia"))
    assert sum(made.what == f"swap {summary}" for made in port_calls.made) == writes


async def test_a_rebuild_from_kafka_folds_the_manifests_too(bucket: FakeBucket) -> None:
    """Manifests and plans give the events that the topic has lost; records that cannot be decoded are counted."""
    poison = [bucket.log.append(Topic.CITY_STATS, b"2024-05-01/armenia/1", body) for body in (b"{", b"[")]
    rebuilt = await rebuild(bucket, records=poison)
    assert (rebuilt.flipped, rebuilt.poison_records) == (True, 2)
    assert bodies(bucket, 2) == bodies(bucket, 1)


async def test_a_record_of_a_later_version_refuses_the_flip(bucket: FakeBucket) -> None:
    """A generation that lacks records of a later version is not made live; the error names them and the remedy."""
    before = bodies(bucket, 1)
    newer = bucket.log.append(Topic.CITY_STATS, b"2024-05-01/armenia/1", b'{"type":"forecast","schema_version":2}')
    rebuilt = await rebuild(bucket, records=[newer])
    assert (rebuilt.flipped, rebuilt.newer_records) == (False, 1)
    assert "rebuild --from s3" in (rebuilt.refused or "")
    place = f"city-stats, partition {newer.partition}, offset {newer.offset}"
    assert f"{place}: type 'forecast', schema version 2). Upgrade" in (rebuilt.refused or "")
    assert bodies(bucket, 1) == before


async def test_the_first_records_of_a_later_version_are_named(bucket: FakeBucket) -> None:
    """The error counts all of them, and names as many as a reader can look at."""
    newer = [bucket.log.append(Topic.CITY_STATS, b"k", b'{"type":"forecast","schema_version":2}') for _ in range(7)]
    refused = (await rebuild(bucket, records=newer)).refused or ""
    assert refused.startswith("7 records were left out, because this build does not know their schema version (")
    assert (refused.count("offset"), "; and 2 more). Upgrade" in refused) == (5, True)
    assert f"offset {newer[4].offset}: type 'forecast', schema version 2; and" in refused


def reported(step: str, events_read: int) -> list[tuple[str, int, int, int]]:
    """Return the reports of a step that reads no event of the two dates."""
    return [(step, 1, 2, events_read), (step, 2, 2, events_read)]


async def test_a_rebuild_reports_its_progress(bucket: FakeBucket) -> None:
    """Each step reports how many dates or records are done, of how many, and how many events were read so far."""
    reports: list[tuple[str, int, int, int]] = []

    def report(step: str, done: int, total: int, events: int) -> None:
        reports.append((step, done, total, events))

    await Rebuild(bucket.store, bucket.publisher, token="one", report=report).run()
    assert reports == [
        ("reading plans and manifests", 1, 2, 6),
        ("reading plans and manifests", 2, 2, 8),
        *reported("comparing with the live generation", 8),
        *reported("filling the topics", 8),
    ]
    reports.clear()
    reader = MemoryTopicReader.of(bucket.log, Topic.CITY_STATS)
    count = len(bucket.log.records(Topic.CITY_STATS))
    rebuilt = await Rebuild(
        bucket.store, bucket.publisher, token="two", report=report, reader=reader, seed=1, pending_bytes_max=0
    ).run()
    assert reports == [
        *[("reading the topic", done, count, done) for done in (*range(0, count, 4), count, count)],
        *reported("copying generation 1", count),
        ("reading plans and manifests", 1, 2, count + 6),
        ("reading plans and manifests", 2, 2, count + 8),
        *reported("comparing with the live generation", count + 8),
    ]
    assert (rebuilt.generation, rebuilt.live_before, rebuilt.events, rebuilt.changes_total) == (3, 2, count + 8, 0)


async def test_records_with_wrong_keys_are_folded_by_their_values(bucket: FakeBucket) -> None:
    """Records are grouped by their keys and folded by their values: a wrong or missing key changes nothing."""
    lies = [None, b"", b"/", b"2024-05-01/armenia/1", b"2024-05-01/\xff"]
    records = [
        msgspec.structs.replace(record, key=lies[place % len(lies)])
        for place, record in enumerate(bucket.log.records(Topic.CITY_STATS))
    ]
    for key in [key for key in bucket.store.objects if key.startswith(("plans/", "manifests/"))]:
        del bucket.store.objects[key]  # so only the topic has the events
    rebuilt = await rebuild(bucket, records=records)
    assert (rebuilt.flipped, rebuilt.changes, rebuilt.events) == (True, [], len(records))
    assert bodies(bucket, 2) == bodies(bucket, 1)


async def test_a_wrong_summary_is_reported_and_replaced(bucket: FakeBucket) -> None:
    """A difference to the live generation is reported by country-day, and the flip corrects it."""
    right = bodies(bucket, 1)
    await bucket.damage(totals=NOTHING)
    del bucket.store.objects[await bucket.summary_key("brasil")]
    rebuilt = await rebuild(bucket)
    assert [(change.country, change.goes_back) for change in rebuilt.changes] == [("armenia", ()), ("brasil", ())]
    armenia, brasil = rebuilt.changes
    assert armenia.live is not None
    assert armenia.built is not None
    assert (armenia.live.totals, armenia.built.totals.trips) == (NOTHING, 6)
    assert armenia.why == ("equal ledgers, but totals",)
    assert (brasil.live, brasil.why) == (None, ("the live generation does not have it",))
    assert bodies(bucket, 2) == right


async def test_an_unreadable_summary_is_reported_as_unreadable(bucket: FakeBucket) -> None:
    """An unreadable live summary is reported as unreadable, not as missing."""
    bucket.store.write(await bucket.summary_key(), b"{")
    [change] = (await rebuild(bucket)).changes
    assert (change.live, change.why) == (None, ("the summary of the live generation cannot be read",))


async def test_each_difference_says_why(bucket: FakeBucket) -> None:
    """A changed country-day is reported with the plan and the cities that differ."""
    summary = await bucket.summary()
    other = msgspec.structs.replace(summary.ledger[CityId("1")], city_name="Another")
    await bucket.damage(ledger={CityId("1"): other}, plans=(), plan_revision=0)
    [change] = (await rebuild(bucket)).changes
    assert change.why == (
        "plan: revision none → 2",
        "city 1: other content under revision 21",
        "city 2: revision none → 20",
    )


async def test_a_dry_run_changes_nothing(bucket: FakeBucket) -> None:
    """A dry run reports the changes, and leaves no summary, no live pointer and no event other than before."""
    await bucket.damage(totals=NOTHING)
    before = {key: stored.body for key, stored in bucket.store.objects.items() if key != keys.CURRENT}
    records = len(bucket.log.appended)
    rebuilt = await rebuild(bucket, dry_run=True)
    assert (rebuilt.flipped, len(rebuilt.changes), rebuilt.refused) == (False, 1, None)
    after = {key: stored.body for key, stored in bucket.store.objects.items()}
    assert after.pop(keys.CURRENT) == objects.encode(GenerationPointer(live=1, highest=2))
    assert (after, len(bucket.log.appended)) == (before, records)


async def test_a_flip_that_goes_back_is_refused(bucket: FakeBucket) -> None:
    """If the live generation has a newer revision or plan than the bucket, it stays, and both are reported."""
    summary = await bucket.summary()
    await bucket.damage(ledger={**summary.ledger, CityId("1"): LedgerEntry(revision=99)}, plan_revision=7)
    rebuilt = await rebuild(bucket)
    assert not rebuilt.flipped
    assert rebuilt.changes[0].goes_back == ("plan: revision 2 after 7", "city 1: revision 21 after 99")
    assert "city 1: revision 21 after 99" in (rebuilt.refused or "")
    assert "run 'tripfold repair', then run this again" in (rebuilt.refused or "")
    assert await read_current(bucket.store) == GenerationPointer(live=1, highest=2)
    assert bodies(bucket, 2) == {}


async def test_an_unreadable_manifest_stops_a_rebuild(bucket: FakeBucket) -> None:
    """A manifest that cannot be read is reported, and the live generation stays."""
    bucket.store.write(keys.manifest(DAY, CityId("1")), b"{")
    with pytest.raises(RebuildRefused, match=r"city=1\.json"):
        await rebuild(bucket)
    assert await read_current(bucket.store) == GenerationPointer(live=1, highest=2)


async def test_a_rebuild_from_s3_fills_empty_topics(bucket: FakeBucket) -> None:
    """A rebuild from S3 publishes every current event and every summary, as compaction would have kept them."""
    kept = {record.key: record.value for topic in FILLED for record in bucket.log.records(topic)}
    bucket.log = MemoryLog()
    bucket.publisher = MemoryPublisher(bucket.log)
    await rebuild(bucket)
    assert {record.key: record.value for topic in FILLED for record in bucket.log.records(topic)} == kept


FILLED = (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES)


async def test_a_rebuild_from_kafka_publishes_nothing(bucket: FakeBucket) -> None:
    """A rebuild from the topic adds no record to it."""
    before = len(bucket.log.appended)
    await rebuild(bucket, records=bucket.log.records(Topic.CITY_STATS))
    assert len(bucket.log.appended) == before


async def test_a_second_rebuild_is_refused_until_it_takes_over(bucket: FakeBucket) -> None:
    """While a generation is being built, a second rebuild is refused; with take_over it uses another number."""
    await generations.begin(bucket.store, "token-of-the-dead", take_over=False)
    bucket.clock.advance(90)
    with pytest.raises(RebuildInProgress, match=r"a rebuild into generation 2 began 90 s ago\. .* --abandon'$"):
        await rebuild(bucket)
    assert (await read_current(bucket.store)).token == "token-of-the-dead"
    rebuilt = await rebuild(bucket, take_over=True)
    assert (rebuilt.generation, rebuilt.flipped) == (3, True)


async def test_a_pointer_write_whose_response_was_lost_is_recognised(bucket: FakeBucket) -> None:
    """If the write happened and its response was lost, the retry keeps the number and takes nothing over."""
    compare_and_swap = bucket.store.compare_and_swap
    lost: list[str] = []

    async def lose_the_first_response(key: str, body: bytes, *, etag: str | None) -> str:
        answer = await compare_and_swap(key, body, etag=etag)
        if not lost:
            lost.append(key)
            raise CasConflict(key)
        return answer

    bucket.store.compare_and_swap = lose_the_first_response  # type: ignore[method-assign]  # a client retries by itself
    rebuilt = await rebuild(bucket)
    assert lost == [keys.CURRENT]
    assert (rebuilt.generation, rebuilt.flipped) == (2, True)


async def test_a_rebuild_that_was_taken_over_cannot_flip(bucket: FakeBucket) -> None:
    """A rebuild that was taken over fails at its flip, and changes nothing of the other rebuild."""
    await generations.begin(bucket.store, "zombie", take_over=False)
    await generations.begin(bucket.store, "another", take_over=True)
    for token, number in (("zombie", 2), ("zombie", 3), ("another", 2)):
        with pytest.raises(generations.RebuildTakenOver, match=f"generation {number} .* another rebuild took over"):
            await generations.flip(bucket.store, token, number)
    await generations.abandon(bucket.store, "zombie")
    current = await read_current(bucket.store)
    assert (current.live, current.building, current.token) == (1, 3, "another")
    await generations.flip(bucket.store, "another", 3)
    await generations.flip(bucket.store, "another", 3)  # as after a lost response
    assert await read_current(bucket.store) == GenerationPointer(live=3, highest=3)


async def test_a_failed_rebuild_clears_the_pointer(bucket: FakeBucket) -> None:
    """A rebuild that ends with an error leaves no building generation, so the next one need not take over."""
    bucket.store.write(keys.plan(DAY), b"{")
    with pytest.raises(RebuildRefused):
        await rebuild(bucket)
    bucket.plan(2, {"armenia": [1], "brasil": [2, 3]})
    assert (await rebuild(bucket, token="token-2")).generation == 3


async def test_after_a_crash_at_any_call_the_next_rebuild_succeeds(bucket: FakeBucket) -> None:
    """A rebuild that crashes before or after any call leaves the live generation unchanged.

    The next rebuild takes over and ends as if there had been no crash.
    """
    right = bodies(bucket, 1)
    begin = dict(bucket.store.objects)
    port_calls = PortCalls()
    await rebuild(bucket, store=BreakableAdminStore(bucket.store, ProcessLife("rebuild", port_calls)))
    calls = len(port_calls.made)
    assert calls > 30
    for number in range(calls):
        for broken in (Break.DIE_BEFORE, Break.DIE_AFTER, Break.LOST_ANSWER, Break.REFUSED):
            bucket.store.objects = dict(begin)
            life = ProcessLife("rebuild", PortCalls({number: broken}))
            with contextlib.suppress(Crash, BaseExceptionGroup, StoreUnavailable):
                await rebuild(bucket, store=BreakableAdminStore(bucket.store, life))
            current = await read_current(bucket.store)
            assert bodies(bucket, current.live) == right, (number, broken)
            await bucket.fold(bucket.store_file(1, 50, trips(9)))
            corrected = bodies(bucket, current.live)
            assert corrected != right
            rebuilt = await rebuild(bucket, token="token-2", take_over=True)
            assert rebuilt.generation == current.highest + 1
            assert bodies(bucket, rebuilt.generation) == corrected


async def test_activate_starts_from_an_old_generation(bucket: FakeBucket) -> None:
    """Activating a generation builds a new one from its summaries and all later events."""
    await rebuild(bucket)
    await bucket.fold(bucket.store_file(1, 40, trips(9)))
    await bucket.damage(totals=NOTHING)
    rebuilt = await rebuild(bucket, seed=1, token="token-2")
    assert (rebuilt.generation, rebuilt.flipped) == (3, True)
    assert (await bucket.summary()).totals.trips == 9
    with pytest.raises(NoSuchGeneration, match="generation 7"):
        await rebuild(bucket, seed=7)


async def test_a_lost_pointer_stops_readers_and_writers(bucket: FakeBucket) -> None:
    """Without state/current.json, generation 1 is not taken for the live one if another generation exists."""
    await rebuild(bucket)
    del bucket.store.objects[keys.CURRENT]
    await provision_pointer(bucket.store)
    with pytest.raises(GenerationPointerMissing, match=r"state/current\.json is missing.*Restore"):
        await read_current(bucket.store)
    with pytest.raises(GenerationPointerMissing):
        await rebuild(bucket, token="token-2")
    assert keys.CURRENT not in bucket.store.objects


async def test_the_pointer_of_a_new_bucket_is_written_once() -> None:
    """A new bucket gets a pointer; a bucket with summaries or a pointer stays as it is."""
    empty = FakeBucket()
    del empty.store.objects[keys.CURRENT]
    await provision_pointer(empty.store)
    pointer = await read_current(empty.store)
    assert pointer == GenerationPointer(changes_counted_since=pointer.changes_counted_since)
    assert isinstance(pointer.changes_counted_since, dt.datetime)
    empty.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=3, highest=3)))
    await provision_pointer(empty.store)
    assert (await read_current(empty.store)).live == 3


async def test_generations_are_listed_and_dropped(bucket: FakeBucket) -> None:
    """An old generation can be dropped after the grace period; the live and the building one cannot."""
    await rebuild(bucket)
    listed = await generations.list_generations(bucket.store)
    size_bytes = sum(map(len, bodies(bucket, 1).values()))
    assert [(one.number, one.state, one.summaries, one.size_bytes) for one in listed] == [
        (1, GenerationState.OLD, 3, size_bytes),
        (2, GenerationState.LIVE, 3, size_bytes),
    ]
    grace = dt.timedelta(minutes=15)
    with pytest.raises(GenerationInUse, match="is live"):
        await generations.drop(bucket.store, 2, grace=grace)
    begun = await generations.begin(bucket.store, "token-2", take_over=False)
    bucket.clock.advance(901)
    with pytest.raises(GenerationInUse, match="is building"):
        await generations.drop(bucket.store, begun.highest, grace=grace)
    await generations.abandon(bucket.store, "token-2")
    bucket.clock.advance(60)
    with pytest.raises(GenerationInUse, match="changed 60 s ago"):
        await generations.drop(bucket.store, 1, grace=grace)
    bucket.clock.advance(900)
    assert await generations.drop(bucket.store, 1, grace=grace) == 3
    for gone in (1, 9):
        with pytest.raises(NoSuchGeneration, match=f"generation {gone}"):
            await generations.drop(bucket.store, gone, grace=grace)
    assert [one.number for one in await generations.list_generations(bucket.store)] == [2]
    assert msgspec.structs.asdict(await read_current(bucket.store))["live"] == 2


async def test_any_number_of_summaries_is_deleted() -> None:
    """They are deleted in batches. Those of another generation stay."""
    bucket = FakeBucket()
    dates = [DAY + dt.timedelta(days=days) for days in range(2_001)]
    for generation in (1, 11):
        for date in dates:
            bucket.store.write(keys.summary(generation, date, CountrySlug("armenia")), b"{}")
    assert await generations.delete_summaries(bucket.store, 1) == len(dates)
    assert (len(bodies(bucket, 1)), len(bodies(bucket, 11))) == (0, len(dates))
    assert await generations.delete_summaries(bucket.store, 1) == 0


async def test_a_rebuild_keeps_the_trust_in_the_change_counters_and_counts_its_months(bucket: FakeBucket) -> None:
    """Beginning, flipping and abandoning keep the switch of the change index; a live generation is counted."""
    since = dt.datetime(2024, 5, 3, tzinfo=dt.UTC)
    await trust_change_counters(bucket.store, lambda: since)
    await trust_change_counters(bucket.store)
    await rebuild(bucket)
    ((key, body),) = bucket.store.bodies(keys.changes_of_generation(2)).items()
    assert objects.decode(ChangeCounters, body, key).months["2024-05"] > 0
    await generations.begin(bucket.store, "token-2", take_over=False)
    await generations.abandon(bucket.store, "token-2")
    assert await read_current(bucket.store) == GenerationPointer(live=2, highest=3, changes_counted_since=since)
