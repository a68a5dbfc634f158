"""Kafka in memory: a log with consumer groups and a publisher, and the same ports with calls that can break."""

from __future__ import annotations

import asyncio
import bisect
import functools
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from typing import Self

from services.aggregate.replay.topic_reader import RawRecord
from shared.domain import events
from shared.domain.topics import Topic, partition_of
from shared.kafka.dead_letters import as_dead_letter
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent, headers_of
from shared.runtime import tracing
from tests.fakes.faults import ProcessLife, do_nothing

PARTITIONS = 3


class MemoryLog:
    """Topics of `PARTITIONS` partitions each, and the committed offsets of consumer groups.

    The log acknowledges and then loses the records whose number is in ``losing``.
    """

    def __init__(self, losing: Collection[int] = ()) -> None:
        self.appended: list[ConsumedRecord] = []
        self._losing = frozenset(losing)
        self._records: dict[tuple[Topic, int], list[ConsumedRecord]] = {}
        self._ends: dict[tuple[Topic, int], int] = {}
        self._committed: dict[tuple[str, Topic, int], int] = {}
        self._members: dict[str, MemoryMember] = {}

    def copy(self, losing: Collection[int] = ()) -> MemoryLog:
        """Return a separate log with the same records and offsets, and no members."""
        copied = MemoryLog(losing)
        copied._records = {place: list(records) for place, records in self._records.items()}
        copied._ends = dict(self._ends)
        copied._committed = dict(self._committed)
        return copied

    def append(
        self,
        topic: Topic,
        key: bytes | None,
        value: bytes | None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> ConsumedRecord:
        """Append a record to the partition of its key and return it."""
        partition = partition_of(key, range(PARTITIONS), range(PARTITIONS))
        place = (topic, partition)
        offset = self._ends.get(place, 0)
        record = ConsumedRecord(
            topic=topic, partition=partition, offset=offset, key=key, value=value, headers=tuple(headers)
        )
        self._ends[place] = offset + 1
        if len(self.appended) not in self._losing:
            self._records.setdefault(place, []).append(record)
        self.appended.append(record)
        return record

    def join(self, group: str, topic: Topic) -> MemoryMember:
        """Become the one member of a group; the previous member can no longer take or commit."""
        return MemoryMember(self, group, topic)

    def take(
        self, group: str, topic: Topic, records_max: int, *, partitions: Sequence[int] = range(PARTITIONS)
    ) -> list[ConsumedRecord]:
        """Return the records after the committed offsets, in the order of ``partitions``."""
        taken: list[ConsumedRecord] = []
        for partition in partitions:
            begin = self._committed.get((group, topic, partition), 0)
            taken += self._since(topic, partition, begin)[: records_max - len(taken)]
        return taken

    def commit(self, group: str, batch: Iterable[ConsumedRecord]) -> None:
        """Commit a batch for a group."""
        for record in batch:
            place = (group, record.topic, record.partition)
            self._committed[place] = max(self._committed.get(place, 0), record.offset + 1)

    def rewind(self, group: str, topic: Topic, partition: int, records: int) -> None:
        """Move the committed offset of a group back by some records, so they are delivered again."""
        place = (group, topic, partition)
        self._committed[place] = max(0, self._committed.get(place, 0) - records)

    def compact(self, topic: Topic) -> None:
        """Keep only the last record of each key, at its offset."""
        for partition in range(PARTITIONS):
            records = self._records.get((topic, partition), [])
            last = {record.key: record.offset for record in records}
            self._records[topic, partition] = [record for record in records if last[record.key] == record.offset]

    def ends(self, topic: Topic) -> dict[int, int]:
        """Return the offset after the last record of each partition."""
        return {partition: self._ends.get((topic, partition), 0) for partition in range(PARTITIONS)}

    def records(self, topic: Topic) -> list[ConsumedRecord]:
        """Return all records of a topic, partition by partition."""
        return [record for partition in range(PARTITIONS) for record in self._since(topic, partition, 0)]

    def _since(self, topic: Topic, partition: int, offset: int) -> list[ConsumedRecord]:
        records = self._records.get((topic, partition), [])
        return records[bisect.bisect_left(records, offset, key=lambda record: record.offset) :]


class MemoryMember:
    """The one member of a consumer group, until the next one joins."""

    def __init__(self, log: MemoryLog, group: str, topic: Topic) -> None:
        self._log = log
        self._group = group
        self._topic = topic
        self.rejoin()

    def rejoin(self) -> None:
        """Become the group's member again."""
        self._log._members[self._group] = self

    async def take(self, records_max: int, *, partitions: Sequence[int] = range(PARTITIONS)) -> list[ConsumedRecord]:
        """Return the records after the committed offsets."""
        await asyncio.sleep(0)
        return self._log.take(self._group, self._topic, records_max, partitions=partitions)

    async def commit(self, batch: Sequence[ConsumedRecord]) -> None:
        """Commit a batch. Raises KafkaUnavailable if the group has another member since."""
        await asyncio.sleep(0)
        if self._log._members.get(self._group) is not self:
            raise KafkaUnavailable("the group has gone on without this member")
        self._log.commit(self._group, batch)


class MemoryTopicReader:
    """A RewindableReader and a RawReader over the result of ``records``, in small batches."""

    def __init__(self, records: Callable[[], Sequence[ConsumedRecord]], *, batch_records_max: int = 4) -> None:
        self._records = records
        self._batch_records_max = batch_records_max
        self._read: set[tuple[int, int]] = set()
        self._due: set[tuple[int, int]] = set()

    @classmethod
    def of(cls, log: MemoryLog, topic: Topic, *, batch_records_max: int = 4) -> Self:
        """Return the reader of a topic."""
        return cls(lambda: log.records(topic), batch_records_max=batch_records_max)

    async def take_end(self) -> int:
        await asyncio.sleep(0)
        self._due = {(record.partition, record.offset) for record in self._records()} - self._read
        return len(self._taken())

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        records = self._taken()
        for begin in range(0, len(records), self._batch_records_max):
            await asyncio.sleep(0)
            yield records[begin : begin + self._batch_records_max]
        self._read |= self._due
        self._due = set()

    async def rewind(self) -> None:
        await asyncio.sleep(0)
        self._due |= self._read
        self._read = set()

    async def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        async for batch in self.read():
            yield [(record.key, record.value, record.partition, record.offset) for record in batch]

    def _taken(self) -> list[ConsumedRecord]:
        return [record for record in self._records() if (record.partition, record.offset) in self._due]


class BrokenContract(BaseException):  # no retry may catch it
    """A published event cannot be decoded, or decodes to another event."""


class MemoryPublisher:
    """A Publisher into a `MemoryLog`. It decodes every event that it publishes, as a consumer would."""

    def __init__(self, log: MemoryLog, *, source: str = "test") -> None:
        self._log = log
        self._source = source

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        for item in list(outgoing):
            await asyncio.sleep(0)
            value = events.encode(item.event)
            try:
                read_back = events.decode(item.topic or item.event.topic, value)
            except (events.PoisonRecord, events.NewerContract) as error:
                raise BrokenContract(f"{item.event} was published, but {error}") from error
            if read_back != item.event:
                raise BrokenContract(f"{item.event} was published, but {read_back} is read")
            headers = headers_of(item, source=self._source, traceparent=tracing.traceparent())
            self._log.append(item.topic or item.event.topic, item.event.key.encode(), value, headers)

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        await asyncio.sleep(0)
        self._log.append(Topic.DEAD_LETTERS, *as_dead_letter(record, error))

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await asyncio.sleep(0)
        self._log.append(topic, key, value, list(headers))


class _EventRefused(KafkaUnavailable):
    pass


class BreakablePublisher:
    """A Publisher whose every event is a call of a `ProcessLife`, so a batch can break in the middle.

    After a lost response the later events are not published. A refused event is the only one missing.
    """

    def __init__(self, publisher: Publisher, life: ProcessLife) -> None:
        self._publisher = publisher
        self._life = life

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        refused: _EventRefused | None = None
        for item in list(outgoing):
            try:
                await self._life.make_call(
                    f"publish {type(item.event).__name__} {item.event.key}",
                    functools.partial(self._publisher.publish, [item]),
                    KafkaUnavailable,
                    effect=True,
                    refusal=_EventRefused,
                )
            except _EventRefused as error:
                refused = error
        if refused is not None:
            raise refused

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        await self._life.make_call(
            "dead letter",
            lambda: self._publisher.send_to_dead_letters(record, error),
            KafkaUnavailable,
            effect=True,
        )


class BreakableRecordPublisher(BreakablePublisher):
    """A Publisher and RecordPublisher whose every record is a call of a `ProcessLife`."""

    def __init__(self, publisher: MemoryPublisher, life: ProcessLife) -> None:
        super().__init__(publisher, life)
        self._records = publisher
        self._operator = life

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await self._operator.make_call(
            f"publish a record to {topic.value}",
            lambda: self._records.publish_record(topic, key=key, value=value, headers=headers),
            KafkaUnavailable,
            effect=True,
        )


class BreakableTopicReader:
    """A RewindableReader and a RawReader whose calls are those of a `ProcessLife`."""

    def __init__(self, replay: MemoryTopicReader, life: ProcessLife) -> None:
        self._replay = replay
        self._life = life

    async def take_end(self) -> int:
        return await self._life.make_call("take the end", self._replay.take_end, KafkaUnavailable, effect=False)

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        async for batch in self._replay.read():
            await self._life.make_call("read the topic", do_nothing, KafkaUnavailable, effect=False)
            yield batch

    async def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        async for batch in self._replay.read_raw():
            await self._life.make_call("read the topic", do_nothing, KafkaUnavailable, effect=False)
            yield batch

    async def rewind(self) -> None:
        await self._life.make_call("rewind", self._replay.rewind, KafkaUnavailable, effect=False)
