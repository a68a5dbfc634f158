"""Reads a topic from its beginning to its end at one moment: a port, and its adapter for Kafka."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from shared.domain.topics import Topic, group_id
from shared.kafka.admin import admin_client
from shared.kafka.connection import connection
from shared.kafka.group_offsets import committed_offsets
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import Poll
from shared.kafka.producer import KafkaPublisher
from shared.kafka.raw_batches import Undecodable, read_batch
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

BATCH_RECORDS_MAX = 2_000
FETCH_BYTES_MAX = 128 * 1024
"""The bytes of one fetch, which are in memory for each partition. A larger record is fetched alone."""
POLL_MS = 500
FETCH_WAIT_MS = 50
"""The longest wait of a fetch at the end of the topic. A request for offsets is answered only after that fetch."""
SILENCE_MAX_S = 60.0
UNDECODABLE_KEPT_MAX = 1_000

RawRecord = tuple[bytes | None, bytes | None, int, int]
"""The key, value, partition and offset of a record."""


class TopicUnreadable(DependencyUnavailable):
    """The topic cannot be read to its end at the moment."""


class _BoundedReader(Protocol):
    """A reader that stops at an end which was taken before."""

    async def take_end(self) -> int:
        """Record the present end of the topic, and return the number of unread offsets before it."""


class TopicReader(_BoundedReader, Protocol):
    """Reads the records of a topic."""

    def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        """Read all unread records before the taken end, in batches."""


class RawReader(_BoundedReader, Protocol):
    """Reads the raw records of a topic. This takes a fraction of the time of ConsumedRecords, which have headers."""

    def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        """Read all unread records before the taken end, in batches."""


class RewindableReader(TopicReader, Protocol):
    """A TopicReader that can start again from the beginning."""

    async def rewind(self) -> None:
        """Go back to the beginning of the topic."""


class KafkaTopicReader:
    """A TopicReader and a RawReader for Kafka. Its consumer is in no group and commits nothing.

    ``last_records_max``: start this many records before the end of each partition. ``after_commits_of``: start at the
    committed offsets of this consumer group. ``records_max``: read at most so many offsets of each partition.

    A record that the Kafka client cannot decode is returned with the parts that can be read. ``undecodable`` has it, by
    its partition and offset.
    """

    def __init__(
        self,
        settings: Settings,
        topic: Topic,
        *,
        last_records_max: int | None = None,
        after_commits_of: str | None = None,
        records_max: int | None = None,
    ) -> None:
        self._settings = settings
        self._topic = topic
        self._last_records_max = last_records_max
        self._after_commits_of = after_commits_of
        self._records_max = records_max
        self._name = settings.topic_prefix + topic.value
        self._consumer = AIOKafkaConsumer(
            self._name,
            **connection(settings),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=FETCH_BYTES_MAX,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            request_timeout_ms=20_000,
        )
        self.undecodable: dict[tuple[int, int], Undecodable] = {}
        self._passed_over: list[ConsumerRecord[bytes, bytes]] = []
        self._poll = Poll(
            topic,
            OffsetTracker(topic),
            read_batch=partial(read_batch, settings),
            pass_over=self._pass_over,
            report=self._report,
            now_s=time.monotonic,
            wait_max_s=0.0,
        )
        self._ends: dict[TopicPartition, int] = {}
        self._started = False

    async def take_end(self) -> int:
        try:
            begins = await self._positions()
            ends = await self._consumer.end_offsets(begins)
            if self._last_records_max is not None:
                begins = {one: max(begin, ends[one] - self._last_records_max) for one, begin in begins.items()}
            if self._after_commits_of is not None:
                begins = await self._committed(begins, ends)
            if self._records_max is not None:
                ends = {one: min(end, begins[one] + self._records_max) for one, end in ends.items()}
            if self._last_records_max is not None or self._after_commits_of is not None:
                self._seek(begins)
        except (KafkaError, OSError) as error:
            raise TopicUnreadable(f"topic {self._name} cannot be read: {type(error).__name__}: {error}") from error
        self._ends = {partition: end for partition, end in ends.items() if end > begins[partition]}
        return sum(end - begins[partition] for partition, end in ends.items())

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        async with contextlib.aclosing(self._read()) as batches:
            async for polled in batches:
                yield consumed_records(self._topic, polled)

    async def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        async with contextlib.aclosing(self._read()) as batches:
            async for polled in batches:
                yield [(record.key, record.value, record.partition, record.offset) for record in polled]

    async def _read(self) -> AsyncGenerator[list[ConsumerRecord[bytes, bytes]]]:
        last_batch_at_s = time.monotonic()
        while self._ends:
            try:
                polled = await self._poll.take(self._consumer, records_max=BATCH_RECORDS_MAX, wait_ms=POLL_MS)
                for partition in list(self._ends):
                    # The position counts, not the last record: compaction may have removed the records before the end.
                    if await self._consumer.position(partition) >= self._ends[partition]:
                        del self._ends[partition]
            except (KafkaError, OSError) as error:
                raise TopicUnreadable(f"reading topic {self._name} failed: {type(error).__name__}: {error}") from error
            polled, self._passed_over = [*self._passed_over, *polled], []
            if polled:
                last_batch_at_s = time.monotonic()
                yield polled
            elif time.monotonic() - last_batch_at_s > SILENCE_MAX_S:
                raise TopicUnreadable(f"topic {self._name} returned no record for {SILENCE_MAX_S:.0f} s before its end")

    async def rewind(self) -> None:
        self._ends = {}
        self._seek(await self._consumer.beginning_offsets(self._consumer.assignment()))

    def _seek(self, begins: dict[TopicPartition, int]) -> None:
        for partition, begin in begins.items():
            self._consumer.seek(partition, begin)
        self._poll.forget()

    async def _pass_over(self, bad: Undecodable) -> bool:
        self._passed_over.append(bad.record)
        if len(self.undecodable) < UNDECODABLE_KEPT_MAX:
            self.undecodable[bad.record.partition, bad.record.offset] = bad
        return True

    def _report(self, partition: int, reason: str | None) -> None:
        if reason is not None:
            raise TopicUnreadable(f"partition {partition} of topic {self._name}: {reason}")

    async def _positions(self) -> dict[TopicPartition, int]:
        """Return the position in each partition; at first the beginning."""
        if not self._started:
            # Check first: otherwise the consumer could create the topic by accident.
            await KafkaPublisher(self._settings, source="replay").check([self._topic])
            await self._consumer.start()
            self._started = True
            begins: dict[TopicPartition, int] = await self._consumer.beginning_offsets(self._consumer.assignment())
            return begins
        return {partition: await self._consumer.position(partition) for partition in self._consumer.assignment()}

    async def _committed(
        self, begins: dict[TopicPartition, int], ends: dict[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Return the committed offset of each partition, or its beginning without a valid commit."""
        assert self._after_commits_of is not None
        group = group_id(self._settings.topic_prefix, self._after_commits_of)
        async with admin_client(self._settings) as client:
            committed = await committed_offsets(client, group, list(begins))
        return {
            one: committed[one] if one in committed and begin <= committed[one] <= ends[one] else begin
            for one, begin in begins.items()
        }

    async def close(self) -> None:
        """Close the consumer. Safe to call at any time."""
        await self._consumer.stop()
