"""Takes records from a consumer so that an error in one partition loses no record of another one.

A case: aiokafka has fetched records of partitions 0 and 1, and a header's name in partition 1 is not UTF-8. ``getmany``
collects the records of partition 0, moves its position, and then raises at partition 1. The collected records are gone.
The next commit of partition 0 covers them, although no handler has seen them. So `Poll` asks one partition at a time.

What happens when the client raises at a partition, or leaves out offsets of a topic without compaction:
1. The partition is paused. The other partitions go on.
2. The batch of the next record is read again, as bytes (`shared.kafka.raw_batches`). If only the response was damaged,
   its records are now taken. Otherwise the records before the bad one are taken.
3. The bad record blocks its partition until an operator passes over it, or until a later try can decode it.
4. After the last record of the batch, the client goes on with the partition.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias, TypeGuard

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    OffsetOutOfRangeError,
    RecordTooLargeError,
    UnsupportedCodecError,
)

from shared.domain.errors import OperatorError
from shared.domain.topics import Topic
from shared.kafka.offset_tracker import OffsetGap, OffsetTracker
from shared.kafka.raw_batches import RawBatch, Undecodable

WAIT_FIRST_S = 0.2
READ_AGAIN_TIMEOUT_S = 10.0
"""The other partitions wait while one is read again."""

ReadBatch = Callable[[TopicPartition, int], Awaitable[RawBatch | None]]
PassOver = Callable[[Undecodable], Awaitable[bool]]
"""Returns whether to pass over a record. If so, its effects, such as a dead letter, have happened."""

Record: TypeAlias = ConsumerRecord[Any, Any]

_log = structlog.get_logger()


class UndecodableRecord(OperatorError):
    """A record that the Kafka client cannot decode blocks its partition."""

    def __init__(self, topic: Topic, bad: Undecodable) -> None:
        super().__init__(
            f"{bad.place} of {topic.value} cannot be decoded, so this partition waits: {bad.why}. To go on, and get "
            f"a dead letter: tripfold skip {topic.value} {bad.record.partition} {bad.record.offset}"
        )


class Suspect(msgspec.Struct):
    """A partition at which the client raised.

    It is read again at ``due_s`` on the poll's clock, from ``begin`` on. ``left`` are records that can be taken. The
    partition is blocked if a try to read it again has failed.
    """

    due_s: float
    begin: int | None = None
    left: list[Record] = []
    tries: int = 0


class Poll:
    """Takes the records of one consumer.

    ``report`` is told each time that a partition cannot go on, and why; None when it goes on, or is lost.
    """

    def __init__(
        self,
        topic: Topic,
        tracker: OffsetTracker,
        *,
        read_batch: ReadBatch,
        pass_over: PassOver,
        report: Callable[[int, str | None], None],
        now_s: Callable[[], float],
        wait_max_s: float,
    ) -> None:
        self.suspects: dict[TopicPartition, Suspect] = {}
        self._topic = topic
        self._tracker = tracker
        self._read_batch = read_batch
        self._pass_over = pass_over
        self._report = report
        self._now_s = now_s
        self._wait_max_s = wait_max_s
        self._idle = False
        self._last: TopicPartition | None = None
        self._last_has_more = False

    async def take(
        self, consumer: AIOKafkaConsumer, *, records_max: int, wait_ms: int, in_turns: bool = False
    ) -> list[Record]:
        """Take up to ``records_max`` records; wait for the first one. Return an empty list if none came in time.

        If ``in_turns``, take one record of each partition in turn. Otherwise take what was fetched of one partition
        before the next. Raises the KafkaErrors that concern the whole consumer.
        """
        taken: list[Record] = []
        try:
            await self._read_suspects_again(consumer)
            if self.suspects or not self._idle:
                await self._sweep(consumer, taken, records_max, in_turns)
            if not taken:
                taken += await self._wait(consumer, wait_ms)
                if taken:
                    await self._sweep(consumer, taken, records_max, in_turns)
        except Exception:
            if not taken:
                raise
            # These records must be handled: the next commit covers them. The error comes again.
        self._idle = not taken
        return taken

    async def _sweep(self, consumer: AIOKafkaConsumer, taken: list[Record], records_max: int, in_turns: bool) -> None:
        """Ask one partition after the other for records, from the one after the last that gave one.

        Without turns, a partition comes first until it has given all that was fetched. Its records belong together.
        """
        partitions = sorted(consumer.assignment())
        before = sum(one < self._last for one in partitions) if self._last else 0
        begin = before if self._last_has_more else before + (self._last in partitions)
        again = True
        while again:
            again = False
            for partition in itertools.chain(partitions[begin:], partitions[:begin]):
                if len(taken) == records_max:
                    return
                left = 1 if in_turns else records_max - len(taken)
                found = await self._ask(consumer, partition, left)
                if found:
                    taken += found
                    self._last, again = partition, in_turns
                    self._last_has_more = not in_turns and len(found) == left

    async def _ask(self, consumer: AIOKafkaConsumer, partition: TopicPartition, records_max: int) -> list[Record]:
        """Take fetched records of a partition. If the client cannot return them, the partition becomes a suspect."""
        if suspect := self.suspects.get(partition):
            taken, suspect.left = suspect.left[:records_max], suspect.left[records_max:]
            if taken:
                self._tracker.move_to(partition.partition, taken[-1].offset + 1)
            return taken
        try:
            polled = await consumer.getmany(partition, timeout_ms=0, max_records=records_max)
        except Exception as error:
            if not _concerns_records(error):
                raise
            self._suspect(consumer, partition, error)
            return []
        return self._note(consumer, polled)

    async def _wait(self, consumer: AIOKafkaConsumer, wait_ms: int) -> list[Record]:
        """Wait for a record of any partition. ``getmany`` loses nothing if it takes no more than one."""
        try:
            return self._note(consumer, await consumer.getmany(timeout_ms=wait_ms, max_records=1))
        except Exception as error:
            if not _concerns_records(error):
                raise
            for partition in consumer.assignment() - self.suspects.keys():  # the error does not say which one it is
                self._suspect(consumer, partition, error)
            return []

    def _note(self, consumer: AIOKafkaConsumer, polled: Mapping[TopicPartition, list[Record]]) -> list[Record]:
        """Return the records of a poll, without those that are behind a gap."""
        taken: list[Record] = []
        for partition, records in polled.items():
            try:
                self._tracker.take(partition.partition, [record.offset for record in records])
            except OffsetGap as error:
                self._suspect(consumer, partition, error)
            else:
                taken += records
        return taken

    def _suspect(self, consumer: AIOKafkaConsumer, partition: TopicPartition, error: Exception) -> None:
        _log.warning(
            "partition_read_again", topic=self._topic.value, partition=partition.partition, error=_reason(error)
        )
        with contextlib.suppress(IllegalStateError):  # it was lost meanwhile
            consumer.pause(partition)
            self.suspects[partition] = Suspect(self._now_s())

    def forget(self) -> None:
        """Begin anew: the partitions were assigned anew, or the consumer was sent to other offsets."""
        for partition in list(self.suspects):
            del self.suspects[partition]
            self._report(partition.partition, None)
        self._tracker.forget_next_offset()

    async def _read_suspects_again(self, consumer: AIOKafkaConsumer) -> None:
        for partition, suspect in list(self.suspects.items()):
            if suspect.left or suspect.due_s > self._now_s() or self._is_lost(partition, suspect):
                continue
            try:
                async with asyncio.timeout(READ_AGAIN_TIMEOUT_S):
                    goes_on = await self._read_again(consumer, partition, suspect)
            except Exception as error:  # noqa: BLE001  # it is tried again, and health has it
                if self._is_lost(partition, suspect):
                    continue
                suspect.tries += 1
                suspect.due_s = self._now_s() + min(self._wait_max_s, WAIT_FIRST_S * 2 ** min(suspect.tries, 20))
                self._report(partition.partition, _reason(error))
                continue
            if self._is_lost(partition, suspect):
                continue
            if suspect.tries:
                suspect.tries = 0
                self._report(partition.partition, None)
            if goes_on:
                del self.suspects[partition]
                consumer.resume(partition)

    def _is_lost(self, partition: TopicPartition, suspect: Suspect) -> bool:
        """Return whether the partitions were assigned anew since."""
        return self.suspects.get(partition) is not suspect

    async def _read_again(self, consumer: AIOKafkaConsumer, partition: TopicPartition, suspect: Suspect) -> bool:
        """Read what can be taken of the batch, or pass over a bad record. Return whether the client can go on.

        Raises UndecodableRecord.
        """
        number = partition.partition
        offset = self._tracker.next_offset(number)
        if offset is None:
            offset = await consumer.position(partition)
            self._tracker.move_to(number, offset)
        if suspect.begin is None:
            suspect.begin = offset
        try:
            batch = await self._read_batch(partition, suspect.begin)
        except OffsetOutOfRangeError:  # the client begins again at the first record that Kafka still has
            if self._is_lost(partition, suspect):
                return False
            _log.warning("records_deleted_by_kafka", topic=self._topic.value, partition=number, offset=offset)
            self._tracker.forget_next_offset(number)
            consumer.seek(partition, offset)
            return True
        if self._is_lost(partition, suspect):
            return False
        left = [one for one in batch.records if _next_offset(one) > offset] if batch else []
        if left and isinstance(left[0], Undecodable):
            if not await self._pass_over(left[0]):
                raise UndecodableRecord(self._topic, left[0])
            self._tracker.move_to(number, left[0].next_offset)
            return False
        suspect.left = list(itertools.takewhile(_is_decoded, left))
        if left:
            return False
        offset = max(offset, batch.next_offset) if batch else offset
        self._tracker.move_to(number, offset)
        consumer.seek(partition, offset)
        return True


def _concerns_records(error: Exception) -> bool:
    """Return whether an error of the client concerns fetched records, not the connection or the group."""
    if isinstance(error, CorruptRecordException | RecordTooLargeError | UnsupportedCodecError):
        return True
    return not isinstance(error, KafkaError | ConsumerStoppedError | OSError)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"its records could not be read again within {READ_AGAIN_TIMEOUT_S:.0f} s"
    return str(error) if isinstance(error, OperatorError) else f"{type(error).__name__}: {error}"


def _next_offset(one: Record | Undecodable) -> int:
    return one.next_offset if isinstance(one, Undecodable) else one.offset + 1


def _is_decoded(one: Record | Undecodable) -> TypeGuard[Record]:
    return not isinstance(one, Undecodable)
