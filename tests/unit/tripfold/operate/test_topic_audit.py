"""Compares the compacted topics with the bucket, republishes the bucket, and restores the order of revisions."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec
import pytest

from services.aggregate.bucket_reader import Dates
from services.aggregate.replay.topic_reader import RewindableReader
from shared.domain import events, keys, objects
from shared.domain.ids import CityId
from shared.domain.objects import BucketEpoch
from shared.domain.topics import COMPACTED, Topic
from shared.kafka.records import ConsumedRecord
from tests.fakes.bucket import ALL, DAY, NOON, FakeBucket, trips
from tests.fakes.log import MemoryLog, MemoryPublisher
from tripfold.operate.republish import RepublishedDate, republish
from tripfold.operate.restore import CannotRestore, Reissued, highest_revision, raise_floor, reissue
from tripfold.operate.topic_audit import TopicAudit
from tripfold.operate.topic_records import RecordDifference

NEXT_DAY = DAY + dt.timedelta(days=1)


class LogReplay:
    """A topic of a `MemoryLog`, read in batches of two."""

    def __init__(self, bucket: FakeBucket, topic: Topic) -> None:
        self._bucket = bucket
        self._topic = topic
        self._read = 0
        self._end = 0
        self.rewound = 0

    def _records(self) -> list[ConsumedRecord]:
        return [record for record in self._bucket.log.appended if record.topic is self._topic]

    async def take_end(self) -> int:
        self._end = len(self._records())
        return self._end - self._read

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        records = self._records()
        while self._read < self._end:
            begin, self._read = self._read, min(self._read + 2, self._end)
            yield records[begin : self._read]

    async def rewind(self) -> None:
        self._read = 0
        self.rewound += 1


async def no_wait(_look: int) -> None:
    return


def audit_of(
    bucket: FakeBucket,
    *,
    wait: Callable[[int], Awaitable[None]] = no_wait,
    keys_at_once_max: int = 1_000,
    opened: list[LogReplay] | None = None,
) -> TopicAudit:
    @contextlib.asynccontextmanager
    async def open_topic(topic: Topic) -> AsyncIterator[RewindableReader]:
        replay = LogReplay(bucket, topic)
        if opened is not None:
            opened.append(replay)
        yield replay

    return TopicAudit(bucket.store, open_topic, wait=wait, report=lambda *_: None, keys_at_once_max=keys_at_once_max)


async def told(audit: TopicAudit, dates: Dates = ALL) -> list[RecordDifference]:
    return [
        difference
        for topic in COMPACTED
        async for audited in audit.run(topic, dates)
        for difference in audited.differences
    ]


async def republished(bucket: FakeBucket, dates: Dates = ALL) -> list[RepublishedDate]:
    return [one async for one in republish(bucket.store, bucket.publisher, dates)]


async def reissued(bucket: FakeBucket) -> list[Reissued]:
    return [one async for one in reissue(bucket.store, bucket.publisher, audit_of(bucket))]


def named(differences: Sequence[RecordDifference]) -> list[tuple[str, str, str, str]]:
    return [(one.key, one.what, one.found, one.expected) for one in differences]


@pytest.fixture
async def bucket() -> FakeBucket:
    """Two dates, folded; on the first, city 2 has moved from Armenia to Brasil."""
    bucket = FakeBucket()
    await bucket.fold(bucket.plan(1, {"armenia": [1, 2], "brasil": [3]}), bucket.plan(1, {"chad": [4]}, NEXT_DAY))
    for city, country in ((1, "armenia"), (2, "armenia"), (3, "brasil")):
        await bucket.fold(bucket.store_file(city, city + 10, trips(city), country))
    await bucket.fold(bucket.plan(2, {"armenia": [1], "brasil": [2, 3]}))
    await bucket.fold(bucket.store_file(2, 20, trips(2), "brasil"))
    await bucket.fold(bucket.store_file(4, 14, trips(3), "chad", NEXT_DAY))
    return bucket


@pytest.mark.parametrize("keys_at_once_max", [1, 5, 1_000])
async def test_correct_topics_have_no_difference(bucket: FakeBucket, keys_at_once_max: int) -> None:
    """The events of the services match the bucket, in however many passes they are compared."""
    opened: list[LogReplay] = []
    assert await told(audit_of(bucket, keys_at_once_max=keys_at_once_max, opened=opened)) == []
    assert [replay.rewound for replay in opened] == ([1, 1] if keys_at_once_max == 1_000 else [2, 2])


async def test_republish_fills_an_empty_kafka(bucket: FakeBucket) -> None:
    """After a loss of Kafka every key is missing; republishing fills both topics with what they held."""
    kept = [{record.key: record.value for record in bucket.log.records(topic)} for topic in COMPACTED]
    bucket.log = MemoryLog()
    bucket.publisher = MemoryPublisher(bucket.log)
    differences = await told(audit_of(bucket))
    assert {one.found for one in differences} == {"nothing"}
    assert {one.key for one in differences} == {(key or b"").decode() for of_topic in kept for key in of_topic}
    assert not any(one.unreadable for one in await republished(bucket))
    assert [{record.key: record.value for record in bucket.log.records(topic)} for topic in COMPACTED] == kept
    assert await told(audit_of(bucket)) == []


async def test_a_topic_that_ends_in_a_stale_record_is_named(bucket: FakeBucket) -> None:
    """If an older record comes after the newest, compaction would keep it: it is named, and the newest published."""
    for topic, key, found, expected in (
        (Topic.CITY_STATS, b"2024-05-01/armenia/2", "revision 12", "revision 20"),
        (Topic.COUNTRY_DAY_SUMMARIES, b"2024-05-01/brasil", "revision 1", "revision 35"),
    ):
        stale = next(record for record in bucket.log.records(topic) if record.key == key)
        bucket.log.append(topic, stale.key, stale.value)
        assert named(await told(audit_of(bucket))) == [(key.decode(), "last record", found, expected)]
        await republished(bucket)
        assert await told(audit_of(bucket)) == []


async def test_a_record_that_cannot_be_read_is_replaced(bucket: FakeBucket) -> None:
    """A key whose last record is no event, or says something else under the same revision, is named and mended."""
    key = "2024-05-01/brasil/3"
    bucket.log.append(Topic.CITY_STATS, key.encode(), b"{")
    assert named(await told(audit_of(bucket))) == [(key, "last record", "cannot be decoded", "revision 13")]
    await republished(bucket)
    assert await told(audit_of(bucket)) == []
    [stats] = [event for event in events_of(bucket, key) if event.revision == 13][:1]
    other = msgspec.structs.replace(stats, contribution=msgspec.structs.replace(stats.contribution, trips=999))
    bucket.log.append(Topic.CITY_STATS, key.encode(), events.encode(other))
    assert named(await told(audit_of(bucket))) == [
        (key, "highest record", "revision 13 of other content", "revision 13")
    ]
    await republished(bucket)
    assert await told(audit_of(bucket)) == []


def events_of(bucket: FakeBucket, key: str) -> list[events.CityDayStats]:
    decoded = []
    for record in bucket.log.records(Topic.CITY_STATS):
        if record.key == key.encode() and record.value != b"{":
            event = events.decode(record.topic, record.value)
            assert isinstance(event, events.CityDayStats)
            decoded.append(event)
    return decoded


async def test_events_in_flight_are_checked_again(bucket: FakeBucket) -> None:
    """A revision that is published while the audit waits is no difference; one that never is, is one."""
    published = bucket.store_file(1, 30, trips(4))

    async def fold_at_second_look(look: int) -> None:
        if look == 2:
            await bucket.fold(published)

    assert await told(audit_of(bucket, wait=fold_at_second_look)) == []
    bucket.store_file(1, 31, trips(5))
    assert named(await told(audit_of(bucket))) == [
        ("2024-05-01/armenia/1", "highest record", "revision 30", "revision 31")
    ]


async def test_only_the_dates_of_a_range_are_compared(bucket: FakeBucket) -> None:
    """Only the keys of the range's dates are compared."""
    bucket.log = MemoryLog()
    differences = await told(audit_of(bucket), Dates(NEXT_DAY, NEXT_DAY))
    assert {one.date for one in differences} == {NEXT_DAY}


async def test_republishing_a_range_names_unreadable_objects_and_skips_other_dates(bucket: FakeBucket) -> None:
    """An unreadable object in the range is named and the rest is published; other dates get nothing."""
    bucket.log = MemoryLog()
    bucket.publisher = MemoryPublisher(bucket.log)
    unreadable = keys.manifest(DAY, CityId("3"))
    bucket.store.write(unreadable, b"{")
    [one] = await republished(bucket, Dates(DAY, DAY))
    assert list(one.unreadable) == [unreadable]
    assert one.events == len(bucket.log.appended) > 0
    assert {(record.key or b"")[:10] for record in bucket.log.appended} == {str(DAY).encode()}


async def test_a_key_without_an_object_is_named_and_kept(bucket: FakeBucket) -> None:
    """A city-day that only the topic knows cannot be taken back: it is named with what to do."""
    del bucket.store.objects[keys.manifest(DAY, CityId("3"))]
    assert named(await told(audit_of(bucket))) == [("2024-05-01/brasil/3", "record", "revision 13", "nothing")]
    [one] = await reissued(bucket)
    assert "request 2024-05-01 again" in (one.refused or "")


async def test_an_unreadable_manifest_is_named_instead_of_its_key(bucket: FakeBucket) -> None:
    """An unreadable manifest is the difference that is named, not the key that it may stand for."""
    bucket.store.write(keys.manifest(DAY, CityId("3")), b"{")
    assert [(one.key, one.what) for one in await told(audit_of(bucket))] == [
        ("manifests/date=2024-05-01/city=3.json", "object")
    ]


async def test_chunks_of_an_older_plan_are_no_difference(bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with fewer chunks leaves the last ones of the plan before it in the topic: they are superseded."""
    monkeypatch.setattr("shared.domain.outbox.PLAN_CHUNK_CITIES_MAX", 1)
    await bucket.fold(bucket.plan(3, {"armenia": [1], "brasil": [2, 3]}))
    monkeypatch.undo()
    await bucket.fold(bucket.plan(4, {"armenia": [1], "brasil": [2, 3]}))
    assert any(record.key == b"2024-05-01/brasil/+1" for record in bucket.log.records(Topic.CITY_STATS))
    assert await told(audit_of(bucket)) == []


@pytest.mark.parametrize("key", [b"2024-05-01/armenia/99", b"odd", None])
@pytest.mark.parametrize("keys_at_once_max", [1, 1_000])
async def test_records_that_cannot_be_read_are_skipped_and_named(
    bucket: FakeBucket, key: bytes | None, keys_at_once_max: int
) -> None:
    """An audit goes on past a record of a later version and one of an unknown type, and names each once."""
    newer = bucket.log.append(Topic.CITY_STATS, key, b'{"type":"city-day-stats","schema_version":9}')
    unknown = bucket.log.append(Topic.CITY_STATS, key, b'{"type":"unknown-thing","schema_version":1}')
    audit = audit_of(bucket, keys_at_once_max=keys_at_once_max)
    assert await told(audit) == []
    assert [(one.partition, one.offset, one.newer) for one in audit.unread.named] == [
        (newer.partition, newer.offset, True),
        (unknown.partition, unknown.offset, False),
    ]
    at_newer, at_unknown = (str(one) for one in audit.unread.named)
    assert at_newer.startswith(f"partition {newer.partition}, offset {newer.offset} of city-stats has type")
    assert "schema version 9" in at_newer
    assert at_unknown.startswith(f"city-stats, partition {unknown.partition}, offset {unknown.offset}: ")


async def test_unreadable_records_are_named_in_an_otherwise_empty_topic() -> None:
    """Records that cannot be read are named although neither topic nor bucket has a date."""
    bucket = FakeBucket()
    bucket.log.append(Topic.CITY_STATS, None, b"{")
    audit = audit_of(bucket)
    assert await told(audit) == []
    assert audit.unread.total == 1


async def test_the_revision_floor_is_above_records_of_a_later_version(bucket: FakeBucket) -> None:
    """Restoring skips and names what it cannot read, and still goes above the revision of a later version."""
    bucket.log.append(Topic.CITY_STATS, b"k", b'{"type":"x","schema_version":2,"revision":9000}')
    bucket.log.append(Topic.CITY_STATS, b"k", b'{"type":"x","schema_version":1,"revision":9999}')
    topic = await highest_revision(LogReplay(bucket, Topic.CITY_STATS), lambda *_: None)
    assert (topic.revision, topic.unread_total, [one.newer for one in topic.unread]) == (9000, 2, [True, False])


async def test_restore_publishes_the_restored_bucket_under_higher_revisions(bucket: FakeBucket) -> None:
    """Where the topic knows more than a restored bucket, restore gives revisions above what the topic knows."""
    bucket.store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=5, born_at=NOON)))
    backup = dict(bucket.store.objects)
    await bucket.fold(bucket.store_file(1, 11 + 30, trips(9)), bucket.plan(7, {"armenia": [1], "brasil": [2]}))
    await bucket.fold(bucket.store_file(2, 50, trips(9), "armenia"))
    bucket.store.objects = backup
    ahead = {one.key: one.ahead for one in await told(audit_of(bucket)) if one.topic is Topic.CITY_STATS}
    assert ahead == {
        "2024-05-01/armenia": 7,
        "2024-05-01/armenia/1": 41,
        "2024-05-01/armenia/2": 50,
        "2024-05-01/brasil": 7,
        "2024-05-01/brasil/2": 50,
    }
    topic = await highest_revision(LogReplay(bucket, Topic.CITY_STATS), lambda *_: None)
    assert (topic.revision, topic.key.startswith("2024-05-01/")) == (50, True)
    restored = await raise_floor(bucket.store, topic=topic, wanted=None, clock=bucket.clock, dry_run=False)
    assert restored.floor == 51
    done = await reissued(bucket)
    assert [(one.key, one.known, one.refused) for one in done] == [(key, known, None) for key, known in ahead.items()]
    assert done[1].revision == 51
    manifest = bucket.manifest(2)
    assert manifest is not None
    assert (manifest.revision, manifest.retracted) == (51, {"armenia": 51})
    await bucket.fold_all()
    assert (await bucket.summary()).totals.trips == 1
    await republished(bucket)
    assert await told(audit_of(bucket)) == []


async def put_back(bucket: FakeBucket, base: int) -> None:
    """Let the topic know a revision 50 of city 1 and a plan 50, of Armenia alone, and the bucket neither."""
    backup = dict(bucket.store.objects)
    (planned,) = (event for event in bucket.plan(50, {"armenia": [1]}) if event.key.endswith("/armenia"))
    await bucket.fold(bucket.store_file(1, 50, trips(9)), [planned])
    bucket.store.objects = backup
    bucket.store.write(keys.BUCKET_EPOCH, objects.encode(BucketEpoch(revision_floor=base, born_at=NOON)))


async def test_a_floor_that_would_reuse_a_known_revision_is_refused(bucket: FakeBucket) -> None:
    """A base that is what the topic knows would give its very revision to other content: that is refused."""
    await put_back(bucket, 50)
    with pytest.raises(CannotRestore, match="Stop all services"):
        await reissued(bucket)


async def test_a_reissued_plan_is_published_for_all_its_countries(bucket: FakeBucket) -> None:
    """Though the topic is ahead in one country alone, a plan under a new revision is news for the others too."""
    await put_back(bucket, 51)
    await reissued(bucket)
    differences = await told(audit_of(bucket))
    assert [one for one in differences if one.topic is Topic.CITY_STATS] == []


@pytest.mark.parametrize("revision", [50, 51])
async def test_a_revision_written_during_a_restore_ends_above_the_topic(bucket: FakeBucket, revision: int) -> None:
    """If a worker swaps its own revision in first, that one is published if it is above, and else one above it."""
    await put_back(bucket, 51)
    compare_and_swap = bucket.store.compare_and_swap

    async def overtaken(key: str, body: bytes, *, etag: str | None) -> str:
        if key == keys.manifest(DAY, CityId("1")):
            bucket.store.compare_and_swap = compare_and_swap  # type: ignore[method-assign]  # once
            bucket.store_file(1, revision, trips(5))
        return await compare_and_swap(key, body, etag=etag)

    bucket.store.compare_and_swap = overtaken  # type: ignore[method-assign]  # a worker comes first
    await reissued(bucket)
    manifest = bucket.manifest(1)
    assert manifest is not None
    assert (manifest.revision, manifest.contribution.trips) == (51, 5)
    assert [one for one in await told(audit_of(bucket)) if one.topic is Topic.CITY_STATS] == []


async def test_an_unknown_chunk_of_a_current_plan_is_named(bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further chunk of the plan in force, or of a higher one, is not left over from an older plan."""
    monkeypatch.setattr("shared.domain.outbox.PLAN_CHUNK_CITIES_MAX", 1)
    backup = dict(bucket.store.objects)
    chunks = bucket.plan(2, {"armenia": [1], "brasil": [2, 3]})
    bucket.store.objects = backup
    monkeypatch.undo()
    [chunk] = [event for event in chunks if event.key.endswith("/+1")]
    bucket.record_of(chunk)
    assert named(await told(audit_of(bucket))) == [("2024-05-01/brasil/+1", "record", "revision 2", "nothing")]
