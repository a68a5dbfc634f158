"""aiokafka's own fetcher over a log in memory. It decodes batches of bytes, so it fails as with a broker.

A record with the header BAD_HEADER is written with a name that is not UTF-8, which aiokafka cannot decode.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c

from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord

BAD_HEADER = "this is not UTF-8"
BATCH_OFFSETS = 3
FETCH_BATCHES_MAX = 4

Fetch = Callable[[int, int], bytes]
"""Returns the bytes of the batches of a partition from an offset on, as a broker does."""


def fetched(records: Sequence[ConsumedRecord], offset: int) -> bytes:
    """Return the batches of these records, from the one that has ``offset`` or the next offset."""
    groups = itertools.groupby(records, key=lambda record: record.offset // BATCH_OFFSETS)
    batches = [list(group) for _, group in groups]
    after = [batch for batch in batches if batch[-1].offset >= offset]
    return b"".join(batch_of(batch) for batch in after[:FETCH_BATCHES_MAX])


def batch_of(records: Sequence[ConsumedRecord]) -> bytes:
    """Return records as a batch of bytes."""
    builder = DefaultRecordBatchBuilder(2, 0, 0, -1, -1, -1, 2**30)
    for record in records:
        delta = record.offset - records[0].offset
        builder.append(delta, record.timestamp_ms, record.key, record.value, list(record.headers))
    body = builder.build().replace(BAD_HEADER.encode(), b"\xff" * len(BAD_HEADER))
    struct.pack_into(">q", body, 0, records[0].offset)
    struct.pack_into(">I", body, 17, calc_crc32c(bytes(body[21:])))
    return bytes(body)


def damaged(batches: bytes) -> bytes:
    """Return batches of which the first has a wrong checksum."""
    last = 11 + struct.unpack_from(">i", batches, 8)[0]
    return batches[:last] + bytes([batches[last] ^ 1]) + batches[last + 1 :]


def bad_record(
    topic: Topic, *, offset: int = 1, headers: tuple[tuple[str, bytes], ...] = ((BAD_HEADER, b""),)
) -> ConsumedRecord:
    """Return a record of now, which aiokafka cannot decode, unless it has other headers."""
    now_ms = int(time.time() * 1000)
    return ConsumedRecord(
        topic=topic, partition=0, offset=offset, key=b"k", value=b"{}", headers=headers, timestamp_ms=now_ms
    )


async def produce(servers: str, partition: TopicPartition, records: Sequence[ConsumedRecord]) -> int:
    """Append records to a partition of a broker as one batch, byte for byte. Return the offset of the first."""
    client = AIOKafkaClient(bootstrap_servers=servers)
    try:
        await client.bootstrap()
        leader = (await client.fetch_all_metadata()).leader_for_partition(partition)
        batches = [(partition.topic, [(partition.partition, batch_of(records))])]
        response = await client.send(leader, ProduceRequest(None, -1, 10_000, batches))
    finally:
        await client.close()
    ((_, ((_, error_code, offset, *_),)),) = response.topics
    assert error_code == 0
    return int(offset)


class FetchingConsumer:
    """A consumer whose partitions are assigned by hand. It fetches when it is asked, not before."""

    def __init__(self, topic: str, fetch: Fetch) -> None:
        self.topic = topic
        self._fetch = fetch
        self._subscriptions = SubscriptionState()
        self._subscriptions.subscribe({topic})
        self._records: OrderedDict[TopicPartition, FetchResult] = OrderedDict()
        self._wait_consume_future = None

    def assign(self, positions: dict[int, int]) -> None:
        """Assign partitions, with the offsets to begin at."""
        partitions = {TopicPartition(self.topic, number): at for number, at in positions.items()}
        self._subscriptions.assign_from_subscribed(set(partitions))
        self._records.clear()
        for partition, at in partitions.items():
            self._subscriptions.seek(partition, at)

    def assignment(self) -> set[TopicPartition]:
        """Return the assigned partitions."""
        return set(self._subscriptions.assigned_partitions())

    def pause(self, *partitions: TopicPartition) -> None:
        """Return no records of partitions."""
        for one in partitions:
            self._subscriptions.pause(one)

    def resume(self, *partitions: TopicPartition) -> None:
        """Return records of partitions again."""
        for one in partitions:
            self._subscriptions.resume(one)

    def paused(self) -> set[TopicPartition]:
        """Return the paused partitions."""
        return set(self._subscriptions.paused_partitions())

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Go to an offset of a partition."""
        Fetcher.seek_to(self, partition, offset)

    async def position(self, partition: TopicPartition) -> int:
        """Return the next offset of a partition."""
        return int(self._subscriptions._assigned_state(partition).position)

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]]:
        """Take fetched records, with aiokafka's own code."""
        self.fetch()
        if not self._records and timeout_ms:
            await asyncio.sleep(timeout_ms / 1000)
            self.fetch()
        taken: dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]] = await Fetcher.fetched_records(
            self, partitions, 0, max_records
        )
        return taken

    def fetch(self) -> None:
        """Fetch from each partition of which nothing is fetched, in any order, as aiokafka does."""
        partitions = sorted(self.assignment() - self.paused() - self._records.keys())
        random.shuffle(partitions)
        for one in partitions:
            position = self._subscriptions._assigned_state(one).position
            if data := self._fetch(one.partition, position):
                records = PartitionRecords(one, MemoryRecords(data), [], position, None, None, True, 0)
                assignment = self._subscriptions.subscription.assignment
                self._records[one] = FetchResult(one, assignment=assignment, partition_records=records, backoff=0)

    def _notify(self, _future: object) -> None:
        return
