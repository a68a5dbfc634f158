"""The contract of the log, for the fake, the embedded broker and a real Apache Kafka.

A test over the fake also holds for a real broker, as far as it depends on this contract. A member of a group takes the
next batch and commits it, or leaves without a commit. Over Kafka, members use the services' own consumer.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from faststream.kafka import KafkaBroker

from services.aggregate.replay.topic_reader import KafkaTopicReader, RawReader, TopicReader
from shared.domain import events
from shared.domain.events import CityDayRetracted, ProcessRequested
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.connection import connection
from shared.kafka.consumer import consume, make_broker
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable, Publisher, RecordPublisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.runtime.health import Health
from shared.runtime.retry import Retrier, Stopping
from shared.runtime.settings import Settings
from tests.fakes.log import MemoryLog, MemoryPublisher, MemoryTopicReader
from tests.fakes.store import MemoryStore
from tests.integration.conftest import KAFKA_VARIABLE
from tests.integration.running import eventually

DATE = dt.date(2024, 5, 1)
BATCH_RECORDS_MAX = 4
COMPACTED = Topic.COUNTRY_DAY_SUMMARIES


class Member(Protocol):
    """The one member of a consumer group."""

    async def take(self) -> Sequence[ConsumedRecord]:
        """Return the next batch, the same until it is committed."""

    async def commit(self) -> None:
        """Commit the batch that was taken; if the group has another member since, nothing happens."""

    async def leave(self) -> None:
        """Leave the group; what was taken and not committed comes again."""


class LogPublisher(Publisher, RecordPublisher, Protocol):
    """Both ways to publish."""


class Rereading(TopicReader, RawReader, Protocol):
    """Both ways to read a topic once more."""


class Log(Protocol):
    """A log under test."""

    @property
    def publisher(self) -> LogPublisher:
        """The publisher of events, and of records as they are."""

    async def join(self, group: str, topic: Topic) -> Member:
        """Become the member of a group; the former member is treated as dead."""

    def replay(self, topic: Topic) -> contextlib.AbstractAsyncContextManager[Rereading]:
        """Read a topic from its beginning."""

    async def compact(self, topic: Topic) -> None:
        """Compact a topic."""


class FakeMember:
    """A member of a group of the fake."""

    def __init__(self, log: MemoryLog, group: str, topic: Topic) -> None:
        self._member = log.join(group, topic)
        self._batch: Sequence[ConsumedRecord] = ()

    async def take(self) -> Sequence[ConsumedRecord]:
        self._batch = await self._member.take(BATCH_RECORDS_MAX)
        return self._batch

    async def commit(self) -> None:
        with contextlib.suppress(KafkaUnavailable):
            await self._member.commit(self._batch)

    async def leave(self) -> None:
        """Nothing is left behind."""


class FakeLog:
    """The fake."""

    def __init__(self) -> None:
        self._log = MemoryLog()
        self.publisher = MemoryPublisher(self._log)

    async def join(self, group: str, topic: Topic) -> Member:
        return FakeMember(self._log, group, topic)

    @contextlib.asynccontextmanager
    async def replay(self, topic: Topic) -> AsyncIterator[Rereading]:
        yield MemoryTopicReader.of(self._log, topic)

    async def compact(self, topic: Topic) -> None:
        self._log.compact(topic)


class KafkaMember:
    """A member that consumes as the services do: its handler waits until the test has decided."""

    def __init__(self, settings: Settings, group: str, topic: Topic) -> None:
        self._retrier = Retrier(health=Health(), wait_max_s=0.05)
        self._taken: asyncio.Queue[Sequence[ConsumedRecord]] = asyncio.Queue()
        self._decided = asyncio.Event()
        self._batch: Sequence[ConsumedRecord] = ()
        self._broker: KafkaBroker = make_broker(settings)
        self._subscription = consume(
            self._broker,
            topic,
            self._process,
            settings=settings,
            retrier=self._retrier,
            group=group,
            batch_records_max=BATCH_RECORDS_MAX,
            linger_ms=20,
            publisher=MemoryPublisher(MemoryLog()),
            store=MemoryStore(utc_now),
        )

    async def start(self) -> None:
        """Join the group."""
        await self._broker.connect()
        await self._subscription.begin()

    async def _process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        self._decided.clear()
        await self._taken.put(batch)
        decided = asyncio.create_task(self._decided.wait())
        stopping = asyncio.create_task(self._retrier.stopping.wait())
        await asyncio.wait([decided, stopping], return_when=asyncio.FIRST_COMPLETED)
        decided.cancel()
        stopping.cancel()
        if not self._decided.is_set():
            raise Stopping
        return ()

    async def take(self) -> Sequence[ConsumedRecord]:
        if not self._batch:
            async with asyncio.timeout(60):
                self._batch = await self._taken.get()
        return self._batch

    async def commit(self) -> None:
        self._decided.set()
        self._batch = ()

    async def leave(self) -> None:
        self._retrier.stopping.set()
        await self._subscription.drain()
        await self._broker.stop()


class KafkaLog:
    """The broker of the settings."""

    def __init__(self, settings: Settings, publisher: KafkaPublisher) -> None:
        self._settings = settings
        self.publisher = publisher
        self.members: list[KafkaMember] = []

    async def join(self, group: str, topic: Topic) -> Member:
        member = KafkaMember(self._settings, group, topic)
        self.members.append(member)
        await member.start()
        return member

    @contextlib.asynccontextmanager
    async def replay(self, topic: Topic) -> AsyncIterator[Rereading]:
        replay = KafkaTopicReader(self._settings, topic)
        try:
            yield replay
        finally:
            await replay.close()

    async def compact(self, topic: Topic) -> None:
        """Let the broker compact soon: it never touches the segment that it writes to."""
        admin = AIOKafkaAdminClient(**connection(self._settings))
        await admin.start()
        try:
            # Altering replaces all settings of a topic, its policy too.
            soon = {
                "cleanup.policy": "compact",
                "segment.ms": "100",
                "min.cleanable.dirty.ratio": "0.001",
                "min.compaction.lag.ms": "0",
            }
            name = self._settings.topic_prefix + topic.value
            await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, configs=soon)])
        finally:
            await admin.close()


@pytest_asyncio.fixture(params=["memory", "broker"])
async def log(request: pytest.FixtureRequest, settings: Settings) -> AsyncIterator[Log]:
    """Open each kind of log, with empty topics."""
    if request.param == "memory":
        yield FakeLog()
        return
    await apply_topics(settings)
    async with KafkaPublisher(settings, source="test") as publisher:
        opened = KafkaLog(settings, publisher)
        try:
            yield opened
        finally:
            for member in opened.members:
                await member.leave()


def retracted(city: int, revision: int, country: str = "peru") -> OutgoingEvent:
    """Make a small event: its key is of the country-day, its revision identifies it."""
    return OutgoingEvent(
        CityDayRetracted(date=DATE, country=CountrySlug(country), city_id=CityId(str(city)), revision=revision)
    )


def requested(day: int) -> OutgoingEvent:
    """Make the request of a date in May."""
    now = utc_now()
    return OutgoingEvent(
        ProcessRequested(request_id=mint_request_id(now), date=DATE.replace(day=day), requested_at=now)
    )


def revisions(batch: Sequence[ConsumedRecord]) -> list[int]:
    """Return the revisions of a batch, in order."""
    found = []
    for record in batch:
        event = events.decode(record.topic, record.value)
        assert isinstance(event, CityDayRetracted)
        found.append(event.revision)
    return found


async def taken(member: Member, count: int) -> list[ConsumedRecord]:
    """Take and commit until so many records have come."""
    found: list[ConsumedRecord] = []
    while len(found) < count:
        found += await member.take()
        await member.commit()
    return found


async def read(log: Log, topic: Topic) -> list[ConsumedRecord]:
    """Read all of a topic."""
    async with log.replay(topic) as replay:
        await replay.take_end()
        return [record async for batch in replay.read() for record in batch]


async def test_records_of_a_country_day_keep_their_order(log: Log) -> None:
    """Records whose keys share their first two parts are of one partition, and come as they were published."""
    await log.publisher.publish(retracted(city, revision) for revision in range(1, 6) for city in (1, 2))
    records = await taken(await log.join("order", Topic.CITY_STATS), 10)
    assert revisions(records) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert len({record.partition for record in records}) == 1
    offsets = [record.offset for record in records]
    assert offsets == sorted(set(offsets))


async def test_keys_are_spread_over_partitions(log: Log) -> None:
    """Many country-days use several partitions, and every record comes once."""
    outgoing = [retracted(1, revision, f"country-{revision}") for revision in range(1, 21)]
    await log.publisher.publish(outgoing)
    records = await taken(await log.join("spread", Topic.CITY_STATS), 20)
    assert sorted(revisions(records)) == list(range(1, 21))
    assert len({record.partition for record in records}) > 1


async def test_a_consumed_record_equals_the_published_one(log: Log) -> None:
    """Keys, values and headers are bytes of any kind, in their order; a key or a value may be none."""
    headers = [("odd", b"\xff\x00"), ("twice", b"1"), ("twice", b"2"), ("empty", b"")]
    for key, value in ((b"2024-05-01/\xff", b"\xff{"), (b"k", None), (None, b"")):
        await log.publisher.publish_record(Topic.DEAD_LETTERS, key=key, value=value, headers=headers)
    records = await read(log, Topic.DEAD_LETTERS)
    assert {(record.key, record.value) for record in records} == {
        (b"2024-05-01/\xff", b"\xff{"),
        (b"k", None),
        (None, b""),
    }
    assert {record.headers for record in records} == {tuple(headers)}
    async with log.replay(Topic.DEAD_LETTERS) as replay:
        await replay.take_end()
        raw = [record async for batch in replay.read_raw() for record in batch]
    expected = [(record.key, record.value, record.partition, record.offset) for record in records]
    assert sorted(raw, key=repr) == sorted(expected, key=repr)


async def test_uncommitted_records_are_delivered_again(log: Log) -> None:
    """A member that leaves without a commit loses nothing; after a commit the next member goes on behind it."""
    await log.publisher.publish(retracted(1, revision) for revision in range(1, BATCH_RECORDS_MAX + 3))
    first = await log.join("again", Topic.CITY_STATS)
    before = await first.take()
    await first.leave()
    second = await log.join("again", Topic.CITY_STATS)
    again = await second.take()
    assert again[0] == before[0]
    await second.commit()
    await second.leave()
    third = await log.join("again", Topic.CITY_STATS)
    rest = await taken(third, BATCH_RECORDS_MAX + 2 - len(again))
    assert revisions([*again, *rest]) == list(range(1, BATCH_RECORDS_MAX + 3))


async def test_each_group_gets_every_record(log: Log) -> None:
    """Each group gets everything, whatever another has committed."""
    await log.publisher.publish([retracted(1, 1)])
    for group in ("one", "two"):
        member = await log.join(group, Topic.CITY_STATS)
        assert revisions(await taken(member, 1)) == [1]
        await member.leave()


async def test_a_new_member_gets_the_uncommitted_batch_of_the_former_one(log: Log) -> None:
    """A new member gets the uncommitted batch of the former one, which does not yet know that it was replaced."""
    await log.publisher.publish([retracted(1, 1)])
    first = await log.join("takeover", Topic.CITY_STATS)
    assert revisions(await first.take()) == [1]
    second = await log.join("takeover", Topic.CITY_STATS)
    assert revisions(await second.take()) == [1]
    await first.commit()
    await first.leave()
    await second.commit()
    await log.publisher.publish([retracted(1, 2)])
    found: list[int] = []
    while 2 not in found:  # whose commit counted differs between brokers, so the first record may come once more
        found += revisions(await taken(second, 1))
    assert set(found) <= {1, 2}


async def test_a_replay_ends_at_the_end_offset_that_was_taken(log: Log) -> None:
    """A replay reads everything before the end that was taken, in the order of each partition, and nothing later."""
    await log.publisher.publish(retracted(1, revision, f"country-{revision % 3}") for revision in range(1, 13))
    async with log.replay(Topic.CITY_STATS) as replay:
        assert await replay.take_end() == 12
        await log.publisher.publish([retracted(1, 99)])
        records = [record async for batch in replay.read() for record in batch]
    assert sorted(revisions(records)) == list(range(1, 13))
    for partition in {record.partition for record in records}:
        offsets = [record.offset for record in records if record.partition == partition]
        assert offsets == sorted(set(offsets))


async def test_an_empty_topic_is_read_at_once(log: Log) -> None:
    """A replay of a topic without records ends without waiting for any."""
    assert await read(log, Topic.CITY_STATS) == []


async def test_publishing_waits_for_every_event(log: Log) -> None:
    """When several tasks have published at once and returned, every event is in the log."""
    await asyncio.gather(*(log.publisher.publish([requested(day)]) for day in range(1, 21)))
    assert len(await read(log, Topic.PROCESS_REQUESTS)) == 20


async def test_compaction_keeps_the_last_of_each_key(log: Log) -> None:
    """Compaction leaves the last record of a key where it stands, and takes others; offsets stay what they were."""
    if isinstance(log, KafkaLog) and KAFKA_VARIABLE not in os.environ:
        pytest.skip(f"the embedded broker is not told when to compact: {KAFKA_VARIABLE} names one that is")
    for revision in range(1, 4):
        for city in (1, 2):
            item = retracted(city, revision)
            headers = events.headers_of(item.event, source="test")
            await log.publisher.publish_record(
                COMPACTED, key=item.event.key.encode(), value=events.encode(item.event), headers=headers
            )
    before = {record.offset: record for record in await read(log, COMPACTED)}
    await log.compact(COMPACTED)

    async def compacted() -> list[ConsumedRecord] | None:
        # The segment being written is never compacted: another record, of a key of its own, ends it.
        await log.publisher.publish_record(COMPACTED, key=b"2024-05-01/peru/end", value=b"{}", headers=())
        kept = [record for record in await read(log, COMPACTED) if record.key != b"2024-05-01/peru/end"]
        return kept if len(kept) < len(before) else None

    kept = await eventually(compacted, "the compaction")
    assert all(before[record.offset].value == record.value for record in kept)
    last = {record.key: record.offset for record in before.values()}
    assert set(last.values()) <= {record.offset for record in kept}
