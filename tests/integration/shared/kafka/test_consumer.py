"""Topics on a real broker: what is published comes out once its effects have happened, and nothing is skipped."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gc
from collections.abc import AsyncIterator, Sequence
from functools import partial

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.structs import ConsumerRecord

from services.aggregate.replay.topic_reader import KafkaTopicReader
from shared.domain import events
from shared.domain.contribution import Contribution
from shared.domain.events import CityDayStats, IngestCity, ProcessRequested
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.topics import TOPICS, Topic
from shared.kafka.admin import admin_client, apply_topics, check_topics
from shared.kafka.consumer import decode_batch
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import KafkaPublisher, KafkaUnavailable, TopicsMissing
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.kafka.skip_markers import SkipMarkers
from shared.runtime.health import Health
from shared.runtime.retry import Stopping
from shared.runtime.settings import Settings
from tests.fakes.fetching import bad_record, produce
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore
from tests.integration.consuming import Collector, consuming
from tests.integration.running import eventually
from tripfold.operate.doctor import undecodable_records
from tripfold.operate.skip import CannotSkip, mark_blocking

DATE = dt.date(2024, 5, 1)


def requested(day: int) -> ProcessRequested:
    """Make the request of a date in May."""
    now = utc_now()
    return ProcessRequested(request_id=mint_request_id(now), date=DATE.replace(day=day), requested_at=now)


def stats(country: str, city: str, revision: int) -> CityDayStats:
    """Make a city-day's statistics."""
    return CityDayStats(
        date=DATE,
        country=CountrySlug(country),
        country_name=country,
        city_id=CityId(city),
        city_name=city,
        revision=revision,
        contribution=Contribution(trips=1, passengers=1, accidents=0, delay_total_ms=0),
        trips_on_other_dates=0,
        raw_key="raw",
        sha256="",
        size_bytes=1,
        rule_version=1,
        ingested_at=utc_now(),
    )


@contextlib.asynccontextmanager
async def publisher_of(settings: Settings) -> AsyncIterator[KafkaPublisher]:
    """Provision the topics and open a publisher."""
    await apply_topics(settings)
    async with KafkaPublisher(settings, source="test") as publisher:
        yield publisher


async def records_of(settings: Settings, topic: Topic) -> list[ConsumerRecord[bytes, bytes]]:
    """Read a topic from its beginning to its end."""
    name = settings.topic_prefix + topic.value
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers, auto_offset_reset="earliest", fetch_max_wait_ms=50
    )
    await consumer.start()
    try:
        partitions = [TopicPartition(name, number) for number in range(settings.kafka_partitions)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        found: list[ConsumerRecord[bytes, bytes]] = []

        async def read() -> bool | None:
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                found.extend(batch)
            return len(found) >= sum(ends.values()) or None

        await eventually(read, f"{name} to be read")
        return found
    finally:
        await consumer.stop()


async def test_published_events_are_consumed(settings: Settings) -> None:
    """Events come out as they went in, with CloudEvents headers and the task that caused them."""
    event = stats("peru", "7", 3)
    cause = events.Cause(request_id=mint_request_id(utc_now()), plan_revision=2, position=1)
    collector = Collector()
    batched = value("tripfold_batch_records_sum", topic="city-stats")
    async with publisher_of(settings) as publisher, consuming(settings, Topic.CITY_STATS, collector):
        await publisher.publish([OutgoingEvent(event, cause)])
        await eventually(partial(collector.has, 1), "the event")
    assert value("tripfold_batch_records_sum", topic="city-stats") == batched + 1
    headers = dict(collector.seen[0].headers)
    assert events.decode(Topic.CITY_STATS, collector.seen[0].value) == event
    assert events.cause_of(headers) == cause
    assert headers["ce_type"] == b"tripfold.city-day-stats.v1"
    assert collector.seen[0].key == b"2024-05-01/peru/7"


async def test_handled_records_are_freed_without_the_garbage_collector(settings: Settings) -> None:
    """At most the last batch is in memory. Otherwise the collector would visit all records of the batches before it."""
    collector = Collector()
    name = settings.topic_prefix + Topic.CITY_STATS.value
    gc.disable()
    try:
        async with publisher_of(settings) as publisher, consuming(settings, Topic.CITY_STATS, collector):
            await publisher.publish(OutgoingEvent(stats("peru", str(city), 1)) for city in range(50))
            await eventually(partial(collector.has, 50), "the events")
            kept = [one for one in gc.get_objects() if isinstance(one, ConsumerRecord) and one.topic == name]
            assert len(kept) <= 10
    finally:
        gc.enable()


async def test_a_country_day_is_in_one_partition(settings: Settings) -> None:
    """All cities of a country-day, and its plan, share a partition; many country-days use several."""
    countries = [f"country-{number}" for number in range(12)]
    outgoing = [OutgoingEvent(stats(country, str(city), 1)) for country in countries for city in range(4)]
    async with publisher_of(settings) as publisher:
        await publisher.publish(outgoing)
    partitions: dict[bytes, set[int]] = {}
    for record in await records_of(settings, Topic.CITY_STATS):
        assert record.key is not None
        partitions.setdefault(record.key.rpartition(b"/")[0], set()).add(record.partition)
    assert {len(found) for found in partitions.values()} == {1}
    assert len(set.union(*partitions.values())) > 1


async def test_a_slow_batch_delays_no_other_and_is_not_committed(settings: Settings) -> None:
    """A consumer of several batches handles the records after a slow one; a stop makes Kafka deliver that one again."""
    settings = settings.model_copy(update={"kafka_partitions": 1})
    slow = asyncio.Event()
    handled: list[int] = []

    async def process(batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        for record in batch:
            if record.offset == 1 and not slow.is_set():
                await slow.wait()
                raise Stopping
            handled.append(record.offset)
        return ()

    async def has(*offsets: int) -> bool | None:
        return set(offsets) <= set(handled) or None

    collector = Collector()
    collector.process = process  # type: ignore[method-assign]  # the test's own handler
    async with publisher_of(settings) as publisher:
        await publisher.publish([OutgoingEvent(stats("peru", str(city), 1)) for city in range(6)])
        async with consuming(settings, Topic.CITY_STATS, collector, batch_records_max=1, batches_at_once=3):
            await eventually(partial(has, 0, 2, 3, 4, 5), "the records around the slow one")
            slow.set()
        handled.clear()
        async with consuming(settings, Topic.CITY_STATS, collector, batch_records_max=1, batches_at_once=3):
            await eventually(partial(has, 1, 2, 3, 4, 5), "the slow record and those after it")
    assert 0 not in handled


async def test_failed_batch_is_retried(settings: Settings) -> None:
    """A failed batch is retried, and health shows the fault; then the batch is handled, and nothing is skipped."""
    health = Health()
    collector = Collector(KafkaUnavailable("away"), RuntimeError("a fault of our own"))
    async with publisher_of(settings) as publisher, consuming(settings, Topic.CITY_STATS, collector, health=health):
        await publisher.publish([OutgoingEvent(stats("peru", "7", 3))])
        await eventually(partial(collector.has, 1), "the event")
    assert len(collector.seen) == 1
    assert health.faults == {}


async def test_the_batch_of_a_stopped_service_is_redelivered(settings: Settings) -> None:
    """A service that is stopped while it waits commits nothing; the next one gets the batch."""
    stuck = Collector(*(KafkaUnavailable("away") for _ in range(10_000)))
    health = Health()
    async with publisher_of(settings) as publisher:
        async with consuming(settings, Topic.PROCESS_REQUESTS, stuck, health=health):
            await publisher.publish([OutgoingEvent(requested(1))])

            async def waiting() -> bool | None:
                return bool(health.faults) or None

            await eventually(waiting, "the fault")
        collector = Collector()
        async with consuming(settings, Topic.PROCESS_REQUESTS, collector):
            await eventually(partial(collector.has, 1), "the batch that was given back")
    assert stuck.seen == []


async def test_a_committed_batch_is_not_redelivered(settings: Settings) -> None:
    """A batch that was handled before a restart is not handled after it."""
    async with publisher_of(settings) as publisher:
        for day in (1, 2):
            collector = Collector()
            async with consuming(settings, Topic.PROCESS_REQUESTS, collector):
                await publisher.publish([OutgoingEvent(requested(day))])
                await eventually(partial(collector.has, 1), f"request {day}")
            decoded = [events.decode(Topic.PROCESS_REQUESTS, record.value) for record in collector.seen]
            assert [event.key for event in decoded] == [f"2024-05-{day:02}"]


async def test_poison_goes_to_dead_letters_unchanged(settings: Settings) -> None:
    """A record that is no event goes to the dead letters with its origin and headers; the rest of the batch counts."""
    values = (b"", b"{", b"\xff\xfe", b'{"type":"process-requested"}', b"[" * 100_000, None)
    name = settings.topic_prefix + Topic.PROCESS_REQUESTS.value
    good = requested(2)
    seen: list[ProcessRequested] = []
    async with publisher_of(settings) as publisher:
        producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)
        await producer.start()
        for value in values:
            headers = [("odd", b"\xff"), ("reply_to", name.encode())]
            await producer.send_and_wait(name, value, key=b"k", headers=headers)
        await producer.stop()
        await publisher.publish([OutgoingEvent(good)])

        class Decoding(Collector):
            async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
                for item in await decode_batch(batch, publisher):
                    assert isinstance(item.event, ProcessRequested)
                    seen.append(item.event)
                return await super().process(batch)

        collector = Decoding()
        async with consuming(settings, Topic.PROCESS_REQUESTS, collector):
            await eventually(partial(collector.has, len(values) + 1), "all records")
        dead_letters = await records_of(settings, Topic.DEAD_LETTERS)
    assert seen == [good]
    assert sorted([(one.key, one.value) for one in dead_letters], key=repr) == sorted(
        [(b"k", value) for value in values], key=repr
    )
    for dead_letter in dead_letters:
        found = dict(dead_letter.headers)
        assert (found["odd"], found["tripfold_origin_topic"]) == (b"\xff", b"process-requests")
        assert found["tripfold_error"]


async def test_poison_of_a_retried_batch_becomes_one_dead_letter(settings: Settings) -> None:
    """However often a batch is tried, each of its poison records becomes one dead letter."""
    name = settings.topic_prefix + Topic.PROCESS_REQUESTS.value
    collector = Collector(*(KafkaUnavailable("away") for _ in range(5)))
    async with publisher_of(settings) as publisher:
        producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)
        await producer.start()
        for _ in range(3):
            await producer.send_and_wait(name, b"{", key=b"k")
        await producer.stop()

        class Decoding(Collector):
            async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
                await decode_batch(batch, publisher)
                return await collector.process(batch)

        async with consuming(settings, Topic.PROCESS_REQUESTS, Decoding()):
            await eventually(partial(collector.has, 3), "the batch")
        assert len(await records_of(settings, Topic.DEAD_LETTERS)) == 3


async def test_a_newer_contract_stops_the_service_and_loses_nothing(settings: Settings) -> None:
    """An event of a later version stops its service until an operator skips it; the service is not ready."""
    store = MemoryStore(utc_now)
    name = settings.topic_prefix + Topic.PROCESS_REQUESTS.value
    health = Health()
    async with publisher_of(settings) as publisher:
        producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_bootstrap_servers)
        await producer.start()
        await producer.send_and_wait(name, b'{"type":"process-cancelled","schema_version":2}', key=b"2024-05-01")
        await producer.stop()

        class Decoding(Collector):
            async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
                await decode_batch(batch, publisher)
                return await super().process(batch)

        collector = Decoding()
        async with consuming(
            settings, Topic.PROCESS_REQUESTS, collector, health=health, skip_markers=SkipMarkers(store, publisher)
        ):

            async def refused() -> bool | None:
                return any("this build knows version" in reason for reason in health.faults.values()) or None

            await eventually(refused, "the newer contract to show")
            assert await records_of(settings, Topic.DEAD_LETTERS) == []
            assert collector.seen == []
            (newer,) = await records_of(settings, Topic.PROCESS_REQUESTS)
            await publisher.publish([OutgoingEvent(requested(2))])
            await mark_blocking(settings, store, Topic.PROCESS_REQUESTS, newer.partition, newer.offset)
            await eventually(partial(collector.has, 1), "the record after the one that was skipped")
            assert health.faults == {}
        assert [one.value for one in await records_of(settings, Topic.DEAD_LETTERS)] == [newer.value]
    assert [record.value for record in collector.seen] != [newer.value]


async def test_a_record_that_cannot_be_decoded_blocks_its_partition_alone(settings: Settings) -> None:
    """Health and the doctor name it, and commands read past it. A skip moves it to the dead letters, and all go on."""
    topic, store, health, collector = Topic.CITY_TASKS, MemoryStore(utc_now), Health(), Collector()
    place, name = (0, 1), settings.topic_prefix + Topic.CITY_TASKS.value
    good = [bad_record(topic, headers=(), offset=offset) for offset in range(3)]
    async with publisher_of(settings) as publisher:
        markers = SkipMarkers(store, publisher)
        await produce(settings.kafka_bootstrap_servers, TopicPartition(name, 1), good)
        await produce(settings.kafka_bootstrap_servers, TopicPartition(name, 0), [good[0], bad_record(topic), good[2]])
        async with consuming(settings, topic, collector, health=health, skip_markers=markers, in_turns=True):
            await eventually(partial(collector.has, 4), "the records around the bad one")

            async def named() -> str | None:
                return health.faults.get("record of city-tasks/0")

            reason = await eventually(named, "health to name it")
            assert "partition 0, offset 1 of city-tasks cannot be decoded" in reason
            assert value("tripfold_blocked_partitions", topic=topic.value) == 1
            assert await records_of(settings, Topic.DEAD_LETTERS) == []

            reader = KafkaTopicReader(settings, topic, after_commits_of="test")
            try:
                await reader.take_end()
                read = {(one.partition, one.offset) async for batch in reader.read() for one in batch}
            finally:
                await reader.close()
            assert {place, (0, 2)} <= read
            assert await undecodable_records(store, topic, reader.undecodable.values()) == [reason]

            with pytest.raises(CannotSkip, match="blocks no consumer"):
                await mark_blocking(settings, store, topic, 1, 0)
            for nowhere in ((0, 7), (9, 0)):
                with pytest.raises(CannotSkip, match="has no"):
                    await mark_blocking(settings, store, topic, *nowhere)
            await mark_blocking(settings, store, topic, *place)
            assert await undecodable_records(store, topic, reader.undecodable.values()) == []
            await eventually(partial(collector.has, 5), "the record after the bad one")
            assert (health.faults, value("tripfold_blocked_partitions", topic=topic.value)) == ({}, 0)
        (letter,) = await records_of(settings, Topic.DEAD_LETTERS)
    assert (letter.key, letter.value) == (good[0].key, good[0].value)
    assert b"not UTF-8" in dict(letter.headers)["tripfold_error"]
    assert sorted([(one.partition, one.offset) for one in collector.seen]) == [(0, 0), (0, 2), (1, 0), (1, 1), (1, 2)]


async def test_an_unreachable_kafka_is_a_dependency_outage(settings: Settings) -> None:
    """Publishing to a broker that nobody listens for raises KafkaUnavailable."""
    away = settings.model_copy(update={"kafka_bootstrap_servers": "127.0.0.1:1"})
    async with KafkaPublisher(away, source="test") as publisher:
        with pytest.raises(KafkaUnavailable):
            await publisher.publish([OutgoingEvent(requested(1))])


async def test_topics_are_provisioned_from_the_table(settings: Settings) -> None:
    """Topics that are missing are named, made once, and then as the table has them."""
    publisher = KafkaPublisher(settings, source="test")
    with pytest.raises(TopicsMissing, match="tripfold topics apply"):
        await publisher.check([Topic.CITY_STATS])
    assert {one.found for one in await check_topics(settings)} == {"missing"}
    made = await apply_topics(settings)
    assert list(made) == [spec.name(settings.topic_prefix) for spec in TOPICS]
    assert not await apply_topics(settings)
    await publisher.check([spec.topic for spec in TOPICS])
    assert await check_topics(settings) == []
    async with admin_client(settings) as client:
        found = await client.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in made])
    values = [(entry[0], entry[1]) for response in found for one in response.resources for entry in one[4]]
    assert values.count(("min.insync.replicas", "1")) == len(made)
    too_few = await check_topics(settings.model_copy(update={"kafka_replication_factor": 3}))
    assert {(one.what, one.found, one.expected) for one in too_few} == {("replication factor", "1", "3")}


async def test_publishing_waits_for_every_acknowledgement(settings: Settings) -> None:
    """Many events published side by side by several tasks all arrive."""
    async with publisher_of(settings) as publisher:
        await asyncio.gather(
            *(
                publisher.publish(OutgoingEvent(stats(f"c{number}", str(city), 1)) for city in range(50))
                for number in range(8)
            )
        )
    assert len(await records_of(settings, Topic.CITY_STATS)) == 400


async def test_tasks_of_a_backlog_come_in_the_order_of_their_requests(settings: Settings) -> None:
    """The tasks of a date come from every partition before those of dates long after it."""
    days, cities = 20, 60
    collector = Collector()
    async with publisher_of(settings) as publisher:
        for day in range(1, days + 1):
            await publisher.publish([OutgoingEvent(task(day, city)) for city in range(cities)])
    async with consuming(settings, Topic.CITY_TASKS, collector, in_turns=True):
        await eventually(partial(collector.has, days * cities), "all tasks")
    dates = [event.date.day for event in map(decoded_task, collector.seen)]
    assert len(dates) == days * cities
    assert all(dates[: cities * days // 2].count(day) == cities for day in range(1, days // 4))
    assert not {days - 1, days} & set(dates[: cities * days // 4])


def task(day: int, city: int) -> IngestCity:
    """Make the task of a city on a date in May."""
    return IngestCity(
        request_id=mint_request_id(utc_now()),
        date=DATE.replace(day=day),
        city_id=CityId(str(city)),
        upstream_id=str(city),
        city_name=f"City {city}",
        country=CountrySlug("peru"),
        country_name="Peru",
        plan_revision=1,
        position=city,
    )


def decoded_task(record: ConsumedRecord) -> IngestCity:
    """Return the task of a record."""
    event = events.decode(record.topic, record.value)
    assert isinstance(event, IngestCity)
    return event
