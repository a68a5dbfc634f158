"""What aiokafka does at records that it cannot decode, and what a poll then takes: the fake and the brokers alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import CorruptRecordException, OffsetOutOfRangeError

from shared.domain.topics import Topic
from shared.kafka.admin import apply_topics
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import Poll
from shared.kafka.raw_batches import RawBatch, Undecodable, first_batch, read_batch
from shared.kafka.records import ConsumedRecord
from shared.runtime.settings import Settings
from tests.fakes.fetching import BAD_HEADER, FetchingConsumer, batch_of, damaged, produce
from tests.integration.damaging_relay import DAMAGED, DamagingRelay

TOPIC = Topic.CITY_TASKS
PARTITIONS = 3
DEADLINE_S = 60.0
WAIT_MS = 200

Place = tuple[int, int]


class Log(Protocol):
    """A topic, and consumers that have all its partitions."""

    def partition(self, number: int) -> TopicPartition:
        """Return a partition of the topic."""

    async def read_batch(self, partition: TopicPartition, offset: int) -> RawBatch | None:
        """Read a batch as bytes."""

    async def append(self, partition: int, *values: bytes, bad: int | None = None) -> None:
        """Append a batch. The header of the record number ``bad`` is not UTF-8."""

    def damage(self, responses: int) -> None:
        """Let so many responses with the value DAMAGED have a wrong checksum."""

    def consumer(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Return a consumer that begins at the first records."""


class FakeLog:
    """The fake."""

    def __init__(self) -> None:
        self._batches: list[list[tuple[int, bytes]]] = [[] for _ in range(PARTITIONS)]
        self._ends = [0] * PARTITIONS
        self._damaged = 0

    async def append(self, partition: int, *values: bytes, bad: int | None = None) -> None:
        batch = batch_of(records(partition, values, bad, first=self._ends[partition]))
        self._ends[partition] += len(values)
        self._batches[partition].append((self._ends[partition], batch))

    def damage(self, responses: int) -> None:
        self._damaged = responses

    def _fetch(self, partition: int, offset: int) -> bytes:
        found = b"".join(batch for end, batch in self._batches[partition] if end > offset)
        if DAMAGED in found and self._damaged:
            self._damaged -= 1
            return damaged(found)
        return found

    def partition(self, number: int) -> TopicPartition:
        return TopicPartition("t", number)

    async def read_batch(self, partition: TopicPartition, offset: int) -> RawBatch | None:
        if offset > self._ends[partition.partition]:
            raise OffsetOutOfRangeError
        return first_batch(self._fetch(partition.partition, offset), partition, offset)

    @contextlib.asynccontextmanager
    async def consumer(self) -> AsyncIterator[FetchingConsumer]:
        made = FetchingConsumer("t", self._fetch)
        made.assign(dict.fromkeys(range(PARTITIONS), 0))
        yield made


class BrokerLog:
    """The broker of the settings, through a relay that damages responses."""

    def __init__(self, settings: Settings, relay: DamagingRelay) -> None:
        self._settings = settings
        self._relay = relay
        self._name = settings.topic_prefix + TOPIC.value

    def partition(self, number: int) -> TopicPartition:
        return TopicPartition(self._name, number)

    async def read_batch(self, partition: TopicPartition, offset: int) -> RawBatch | None:
        return await read_batch(self._settings, partition, offset)

    async def append(self, partition: int, *values: bytes, bad: int | None = None) -> None:
        servers = self._settings.kafka_bootstrap_servers
        await produce(servers, self.partition(partition), records(partition, values, bad))

    def damage(self, responses: int) -> None:
        self._relay.responses = responses

    @contextlib.asynccontextmanager
    async def consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        made = AIOKafkaConsumer(
            bootstrap_servers=self._settings.kafka_bootstrap_servers, auto_offset_reset="earliest", fetch_max_wait_ms=50
        )
        await made.start()
        try:
            made.assign([self.partition(number) for number in range(PARTITIONS)])
            yield made
        finally:
            await made.stop()


def records(partition: int, values: Sequence[bytes], bad: int | None, *, first: int = 0) -> list[ConsumedRecord]:
    """Make the records of a batch."""
    return [
        ConsumedRecord(
            topic=TOPIC,
            partition=partition,
            offset=first + number,
            key=b"k",
            value=value,
            headers=((BAD_HEADER if number == bad else "good", b"x"),),
            timestamp_ms=int(time.time() * 1000),
        )
        for number, value in enumerate(values)
    ]


@pytest.fixture(params=["fake", "broker"])
async def log(request: pytest.FixtureRequest) -> AsyncIterator[Log]:
    """Return an empty topic: in memory, and on the embedded broker or Apache Kafka."""
    if request.param == "fake":
        yield FakeLog()
        return
    settings: Settings = request.getfixturevalue("settings")
    await apply_topics(settings)
    relay = DamagingRelay(settings.kafka_bootstrap_servers)
    async with relay.serve() as address:
        yield BrokerLog(settings.model_copy(update={"kafka_bootstrap_servers": address}), relay)


async def ask(consumer: Any, partition: TopicPartition) -> list[int]:
    """Return the offsets that the client returns of a partition, which has some."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = await consumer.getmany(partition, timeout_ms=WAIT_MS)
            if found:
                return [record.offset for record in found[partition]]


async def test_a_bad_header_hides_its_batch_from_the_client(log: Log) -> None:
    """The client returns the records before it one by one, and none after it, wherever the consumer seeks to."""
    await log.append(0, b"0", b"1", b"2", bad=1)
    await log.append(0, b"3")
    async with log.consumer() as consumer:
        partition = log.partition(0)
        with pytest.raises(UnicodeDecodeError):
            await ask(consumer, partition)
        async with asyncio.timeout(DEADLINE_S):
            while not (found := await consumer.getmany(partition, timeout_ms=WAIT_MS, max_records=1)):
                pass
        assert [record.offset for record in found[partition]] == [0]
        for offset in (1, 2):
            consumer.seek(partition, offset)
            with pytest.raises(UnicodeDecodeError):
                await ask(consumer, partition)
        assert await consumer.position(partition) == 2
        consumer.seek(partition, 3)
        assert await ask(consumer, partition) == [3]


async def test_a_damaged_response_is_fetched_again(log: Log) -> None:
    """The client raises once, and then returns the records of the next response."""
    await log.append(0, b"0", DAMAGED)
    async with log.consumer() as consumer:
        log.damage(1)
        with pytest.raises(CorruptRecordException):
            await ask(consumer, log.partition(0))
        assert await ask(consumer, log.partition(0)) == [0, 1]


async def test_getmany_over_all_partitions_loses_what_it_drained(log: Log) -> None:
    """This is why a poll asks one partition at a time: when one raises, the positions of others have moved."""
    for partition in range(PARTITIONS):
        await log.append(partition, b"0", b"1", b"2", bad=0 if partition == 1 else None)
    lost: list[int] = []
    async with log.consumer() as consumer, asyncio.timeout(DEADLINE_S):
        while not lost:  # the order in which partitions are fetched is random
            taken: set[TopicPartition] = set()
            for partition in range(PARTITIONS):
                consumer.seek(log.partition(partition), 0)
            for _ in range(5):
                await asyncio.sleep(0.1)  # all partitions are fetched
                with contextlib.suppress(UnicodeDecodeError):
                    taken |= (await consumer.getmany()).keys()
            others = {log.partition(0), log.partition(2)} - taken
            lost = [one.partition for one in others if await consumer.position(one) == 3]


async def test_a_paused_partition_returns_nothing_that_it_has_fetched(log: Log) -> None:
    """After it is resumed, it continues where it was."""
    for partition in range(PARTITIONS):
        await log.append(partition, b"0", b"1")
    async with log.consumer() as consumer:
        assert await ask(consumer, log.partition(1)) == [0, 1]
        consumer.pause(log.partition(0))
        for _ in range(3):
            assert log.partition(0) not in await consumer.getmany(timeout_ms=WAIT_MS)
        consumer.resume(log.partition(0))
        assert await ask(consumer, log.partition(0)) == [0, 1]


async def test_a_batch_is_read_as_bytes(log: Log) -> None:
    """The bad record has its key and value; what is not there yet is nothing, and an offset beyond it is an error."""
    await log.append(0, b"0", b"1", b"2", bad=1)
    partition = log.partition(0)
    batch = await log.read_batch(partition, 1)
    assert batch is not None
    bad, after = batch.records
    assert isinstance(bad, Undecodable)
    assert (bad.place, bad.record.key, bad.record.value) == ("partition 0, offset 1", b"k", b"1")
    assert not isinstance(after, Undecodable)
    assert (after.offset, after.value, batch.next_offset) == (2, b"2", 3)
    assert await log.read_batch(partition, 3) is None
    with pytest.raises(OffsetOutOfRangeError):
        await log.read_batch(partition, 99)


async def test_a_poll_takes_all_but_the_bad_records(log: Log) -> None:
    """Bad headers block their partition until they are passed over; a damaged response loses nothing."""
    await log.append(0, *[b"0"] * 4)
    await log.append(1, b"0", b"1", b"2", bad=1)
    await log.append(1, b"3", b"4", bad=0)
    await log.append(2, b"0", DAMAGED)
    passed: list[Place] = []
    blocked: dict[int, str | None] = {}
    may_pass = False

    async def pass_over(bad: Undecodable) -> bool:
        if may_pass:
            passed.append((bad.record.partition, bad.record.offset))
        return may_pass

    poll = Poll(
        TOPIC,
        OffsetTracker(TOPIC),
        read_batch=log.read_batch,
        pass_over=pass_over,
        report=blocked.__setitem__,
        now_s=time.monotonic,
        wait_max_s=0.1,
    )
    log.damage(1)
    taken: list[Place] = []

    async def take(*wanted: Place) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while set(wanted) - set(taken):
                found = await poll.take(consumer, records_max=10, wait_ms=WAIT_MS)
                taken.extend((record.partition, record.offset) for record in found)

    async with log.consumer() as consumer:
        others = [*((0, offset) for offset in range(4)), (1, 0), (2, 0), (2, 1)]
        await take(*others)
        async with asyncio.timeout(DEADLINE_S):
            while not blocked.get(1):
                await take()
                await poll.take(consumer, records_max=10, wait_ms=WAIT_MS)
        assert "partition 1, offset 1 of city-tasks cannot be decoded" in str(blocked[1])
        may_pass = True
        await take((1, 2), (1, 4))
    assert sorted(taken) == sorted([*others, (1, 2), (1, 4)])
    assert (passed, blocked) == ([(1, 1), (1, 3)], {1: None} | dict.fromkeys(blocked.keys() - {1}))
