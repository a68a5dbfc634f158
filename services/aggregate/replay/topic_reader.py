"""Reading a topic from its beginning to where it ended at one moment: a port, and its adapter over Kafka."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from shared.domain.topics import Topic, group_id
from shared.kafka.admin import admin_client
from shared.kafka.connection import connection
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

BATCH_RECORDS_MAX = 2_000
FETCH_BYTES_MAX = 128 * 1024
"""How much is fetched of a partition at once, and lies in memory, for each of them. A larger record comes alone."""
POLL_MS = 500
SILENCE_MAX_S = 60.0

Pair = tuple[bytes | None, bytes | None]
"""The key and the value of a record."""


class TopicUnreadable(DependencyUnavailable):
    """The topic cannot be read to its end now."""


class _Ended(Protocol):
    """What is read up to an end that was taken before."""

    async def take_end(self) -> int:
        """Note where the topic ends now; return how many offsets lie between what was read and that."""


class TopicReader(_Ended, Protocol):
    """A topic to be read once more."""

    def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        """Read all records before the end that was taken, in batches, from where the reading before ended."""


class PairReader(_Ended, Protocol):
    """A topic to be read once more, of each record the key and the value alone: that takes much less time."""

    def read_pairs(self) -> AsyncIterator[Sequence[Pair]]:
        """Read all pairs before the end that was taken, in batches, from where the reading before ended."""


class RewindableReader(TopicReader, Protocol):
    """A TopicReader that can begin again."""

    async def rewind(self) -> None:
        """Go back to the beginning of the topic."""


class KafkaTopicReader:
    """A TopicReader and a PairReader over Kafka: a consumer in no group, which commits nothing and disturbs no service.

    With ``last_records_max`` it begins so many records before the end of each partition. With ``after_commits_of`` it
    begins where that consumer group has committed, and reads ``records_max`` offsets of each partition at most.
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
            request_timeout_ms=20_000,
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
                for partition, begin in begins.items():
                    self._consumer.seek(partition, begin)
        except (KafkaError, OSError) as error:
            raise TopicUnreadable(f"topic {self._name} cannot be read: {type(error).__name__}: {error}") from error
        self._ends = {partition: end for partition, end in ends.items() if end > begins[partition]}
        return sum(end - begins[partition] for partition, end in ends.items())

    async def read(self) -> AsyncIterator[Sequence[ConsumedRecord]]:
        async with contextlib.aclosing(self._read()) as batches:
            async for polled in batches:
                yield consumed_records(self._topic, [record for records in polled for record in records])

    async def read_pairs(self) -> AsyncIterator[Sequence[Pair]]:
        async with contextlib.aclosing(self._read()) as batches:
            async for polled in batches:
                yield [(record.key, record.value) for records in polled for record in records]

    async def _read(self) -> AsyncGenerator[list[list[ConsumerRecord[bytes, bytes]]]]:
        heard_s = time.monotonic()
        while self._ends:
            try:
                polled = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=BATCH_RECORDS_MAX)
                for partition in list(self._ends):
                    # The position, not the last record: compaction may have taken the records before the end.
                    if await self._consumer.position(partition) >= self._ends[partition]:
                        del self._ends[partition]
            except (KafkaError, OSError) as error:
                raise TopicUnreadable(f"topic {self._name} broke off: {type(error).__name__}: {error}") from error
            if polled:
                heard_s = time.monotonic()
                yield list(polled.values())
            elif time.monotonic() - heard_s > SILENCE_MAX_S:
                raise TopicUnreadable(f"topic {self._name} gave nothing for {SILENCE_MAX_S:.0f} s before its end")

    async def rewind(self) -> None:
        self._ends = {}
        for partition, begin in (await self._consumer.beginning_offsets(self._consumer.assignment())).items():
            self._consumer.seek(partition, begin)

    async def _positions(self) -> dict[TopicPartition, int]:
        """Return where the reading of each partition is: at its beginning, at first."""
        if not self._started:
            # Checked first, or the consumer might create the topic by accident.
            await KafkaPublisher(self._settings, source="replay").check([self._topic])
            await self._consumer.start()
            self._started = True
            begins: dict[TopicPartition, int] = await self._consumer.beginning_offsets(self._consumer.assignment())
            return begins
        return {partition: await self._consumer.position(partition) for partition in self._consumer.assignment()}

    async def _committed(
        self, begins: dict[TopicPartition, int], ends: dict[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Return what the group has committed of each partition; the beginning if nothing, or nothing valid."""
        assert self._after_commits_of is not None
        group = group_id(self._settings.topic_prefix, self._after_commits_of)
        async with admin_client(self._settings) as client:
            committed = await client.list_consumer_group_offsets(group, partitions=list(begins))
        return {
            one: committed[one].offset if one in committed and begin <= committed[one].offset <= ends[one] else begin
            for one, begin in begins.items()
        }

    async def close(self) -> None:
        """Leave the cluster. Safe to call at any time."""
        await self._consumer.stop()
