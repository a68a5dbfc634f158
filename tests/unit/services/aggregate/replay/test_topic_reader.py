"""Where a reader of a topic begins and ends, and how it fails.

The consumer is a fake; `tests/integration` reads from a broker.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from services.aggregate.replay import topic_reader
from services.aggregate.replay.topic_reader import (
    BATCH_RECORDS_MAX,
    FETCH_BYTES_MAX,
    POLL_MS,
    SILENCE_MAX_S,
    KafkaTopicReader,
    TopicUnreadable,
)
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import Settings, load_settings

SETTINGS = load_settings({"TRIPFOLD_TOPIC_PREFIX": "test-"})
NAME = "test-city-stats"


class Consumer:
    """A consumer of partitions whose records have these offsets. ``ends`` are the offsets after the last records."""

    def __init__(self, offsets: dict[int, Sequence[int]], ends: dict[int, int]) -> None:
        self.offsets = offsets
        self.ends = ends
        self.positions = dict.fromkeys(offsets, 0)
        self.committed: dict[TopicPartition, SimpleNamespace] = {}
        self.calls: list[str] = []
        self.fault: Exception | None = None
        self.topic = ""
        self.options: dict[str, object] = {}

    def assignment(self) -> set[TopicPartition]:
        return {TopicPartition(NAME, partition) for partition in self.offsets}

    async def start(self) -> None:
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    async def beginning_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return {one: min(self.offsets[one.partition], default=self.ends[one.partition]) for one in partitions}

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        if self.fault is not None:
            raise self.fault
        return {one: self.ends[one.partition] for one in partitions}

    async def position(self, partition: TopicPartition) -> int:
        return self.positions[partition.partition]

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self.calls.append(f"seek {partition.partition} {offset}")
        self.positions[partition.partition] = offset

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]]:
        """Return one record of a partition. The position moves to the end with the last one, over compacted ones."""
        assert timeout_ms in {0, POLL_MS}
        assert max_records <= BATCH_RECORDS_MAX
        if self.fault is not None:
            raise self.fault
        for one in partitions or sorted(self.assignment()):
            left = [offset for offset in self.offsets[one.partition] if offset >= self.positions[one.partition]]
            self.positions[one.partition] = left[1] if len(left) > 1 else self.ends[one.partition]
            if left:
                return {one: [ConsumerRecord(NAME, one.partition, left[0], 0, 0, b"k", b"v", None, 1, 1, ())]}
        return {}


@pytest.fixture
def consumer(monkeypatch: pytest.MonkeyPatch) -> Consumer:
    """Replace Kafka by a consumer of two partitions; compaction has removed records of the first."""
    made = Consumer({0: [2, 3, 5], 1: [0, 1]}, {0: 8, 1: 2})

    def make(topic: str, **options: object) -> Consumer:
        made.topic, made.options = topic, options
        return made

    async def check(self: KafkaPublisher, topics: Iterable[Topic] = ()) -> None:
        assert self._settings is SETTINGS
        made.calls.append(f"check {[topic.value for topic in topics]}")

    @contextlib.asynccontextmanager
    async def admin_client(settings: Settings) -> AsyncIterator[SimpleNamespace]:
        assert settings is SETTINGS

        async def list_offsets(group: str, *, partitions: Iterable[TopicPartition]) -> object:
            assert (group, set(partitions)) == ("test-tripfold-one", made.assignment())
            return made.committed

        yield SimpleNamespace(list_consumer_group_offsets=list_offsets)

    monkeypatch.setattr(topic_reader, "AIOKafkaConsumer", make)
    monkeypatch.setattr(topic_reader, "admin_client", admin_client)
    monkeypatch.setattr(KafkaPublisher, "check", check)
    return made


async def read_all(reader: KafkaTopicReader) -> list[tuple[int, int]]:
    """Return partition and offset of each record."""
    return sorted([(partition, offset) async for batch in reader.read_raw() for _, _, partition, offset in batch])


async def test_a_reader_reads_up_to_the_end_that_it_took(consumer: Consumer) -> None:
    """Records that come later wait for the next end, from where the reader is. Compacted records are not awaited."""
    reader = KafkaTopicReader(SETTINGS, Topic.CITY_STATS)
    assert await read_all(reader) == []
    assert await reader.take_end() == 8
    assert await read_all(reader) == [(0, 2), (0, 3), (0, 5), (1, 0), (1, 1)]
    assert await reader.take_end() == 0
    consumer.offsets[1], consumer.ends[1] = [0, 1, 2], 3
    assert await reader.take_end() == 1
    assert [record.offset async for batch in reader.read() for record in batch] == [2]
    assert consumer.calls == ["check ['city-stats']", "start"]
    await reader.rewind()
    assert sorted(consumer.calls[2:]) == ["seek 0 2", "seek 1 0"]
    assert await read_all(reader) == []
    assert await reader.take_end() == 9
    await reader.close()
    assert consumer.calls[-1] == "stop"


async def test_a_record_has_its_key_value_and_topic(consumer: Consumer) -> None:
    """A raw record has the key and the value; a consumed one also names its topic."""
    reader = KafkaTopicReader(SETTINGS, Topic.CITY_STATS, last_records_max=1)
    consumer.offsets, consumer.ends = {0: [7]}, {0: 8}
    consumer.positions = {0: 0}
    await reader.take_end()
    assert [record async for batch in reader.read_raw() for record in batch] == [(b"k", b"v", 0, 7)]
    consumer.positions = {0: 7}
    await reader.take_end()
    (record,) = [record async for batch in reader.read() for record in batch]
    assert (record.topic, record.key, record.value, record.offset) == (Topic.CITY_STATS, b"k", b"v", 7)


async def test_the_consumer_is_in_no_group_and_commits_nothing(consumer: Consumer) -> None:
    """Reading a topic leaves no trace in Kafka, and begins at the earliest record."""
    KafkaTopicReader(SETTINGS, Topic.CITY_STATS)
    assert consumer.topic == NAME
    assert consumer.options.pop("bootstrap_servers") == "127.0.0.1:9092"
    ours = {
        "group_id": None,
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "max_partition_fetch_bytes": FETCH_BYTES_MAX,
        "request_timeout_ms": 20_000,
    }
    assert consumer.options.items() >= ours.items()


@pytest.mark.parametrize(
    ("options", "unread", "found"),
    [
        ({"last_records_max": 1}, 2, [(1, 1)]),
        ({"last_records_max": 3}, 5, [(0, 5), (1, 0), (1, 1)]),
        ({"last_records_max": 99}, 8, [(0, 2), (0, 3), (0, 5), (1, 0), (1, 1)]),
        ({"after_commits_of": "one"}, 5, [(0, 5), (1, 0), (1, 1)]),
        ({"after_commits_of": "one", "records_max": 1}, 2, [(0, 5), (1, 0)]),
        ({"records_max": 2}, 4, [(0, 2), (0, 3), (1, 0), (1, 1)]),
    ],
)
async def test_a_reader_begins_and_ends_where_it_is_told(
    consumer: Consumer, options: dict[str, Any], unread: int, found: list[tuple[int, int]]
) -> None:
    """So many records before the end, or after the commits of a group, and at most so many offsets of a partition."""
    consumer.committed = {TopicPartition(NAME, 0): SimpleNamespace(offset=5)}
    reader = KafkaTopicReader(SETTINGS, Topic.CITY_STATS, **options)
    assert await reader.take_end() == unread
    assert await read_all(reader) == found


@pytest.mark.parametrize(("committed", "begin"), [(1, 2), (2, 2), (8, 8), (9, 2)])
async def test_a_commit_outside_the_topic_does_not_count(consumer: Consumer, committed: int, begin: int) -> None:
    """A commit before the beginning or after the end, as of a recreated topic, counts as none."""
    consumer.committed = {TopicPartition(NAME, 0): SimpleNamespace(offset=committed)}
    await KafkaTopicReader(SETTINGS, Topic.CITY_STATS, after_commits_of="one").take_end()
    assert consumer.positions == {0: begin, 1: 0}


@pytest.mark.parametrize("fault", [KafkaError("away"), OSError("away")])
async def test_a_topic_that_cannot_be_read_is_a_dependency_outage(consumer: Consumer, fault: Exception) -> None:
    """The error names the topic and the cause, before the read and during it."""
    reader = KafkaTopicReader(SETTINGS, Topic.CITY_STATS)
    await reader.take_end()
    consumer.fault = fault
    told = f"{type(fault).__name__}: .*away"
    with pytest.raises(TopicUnreadable, match=f"^topic {NAME} cannot be read: {told}"):
        await reader.take_end()
    with pytest.raises(TopicUnreadable, match=f"^reading topic {NAME} failed: {told}"):
        await read_all(reader)


async def test_a_silent_topic_is_given_up(consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A topic that returns nothing before its end is an outage after a minute without a record, not before."""
    now_s, polls = [100.0], [0]
    monkeypatch.setattr(topic_reader, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    reader = KafkaTopicReader(SETTINGS, Topic.CITY_STATS)
    await reader.take_end()
    getmany = consumer.getmany

    async def silent(
        *partitions: TopicPartition, timeout_ms: int, max_records: int
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]]:
        if timeout_ms:
            polls[0] += 1
            now_s[0] += SILENCE_MAX_S / 2
            if polls[0] == 2:
                return await getmany(*partitions, timeout_ms=timeout_ms, max_records=max_records)
        return {}

    monkeypatch.setattr(consumer, "getmany", silent)
    with pytest.raises(TopicUnreadable, match=f"topic {NAME} returned no record for 60 s before its end"):
        await read_all(reader)
    assert polls == [5]
