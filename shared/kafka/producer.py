"""Publishing events: a port, and its adapter over Kafka. It returns once all replicas acknowledged every event."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol, Self

import msgspec
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from shared.domain import events
from shared.domain.events import Cause, Event
from shared.domain.topics import LETTER_BYTES_MAX, METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic, partition_of
from shared.kafka.connection import connection
from shared.runtime import metrics
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

BATCH_EVENTS_MAX = 5_000
ERROR_HEADER_LENGTH_MAX = 1_000
CHECK_TIMEOUT_MS = 1_500
BURIED_KEPT_MAX = 20_000
"""So many dead letters a process remembers: more than any batch has."""

ORIGIN_TOPIC_HEADER = "tripfold_origin_topic"
ORIGIN_PARTITION_HEADER = "tripfold_origin_partition"
ORIGIN_OFFSET_HEADER = "tripfold_origin_offset"
ERROR_HEADER = "tripfold_error"
BURIAL_HEADERS = (ORIGIN_TOPIC_HEADER, ORIGIN_PARTITION_HEADER, ORIGIN_OFFSET_HEADER, ERROR_HEADER)
"""What a dead letter has after the headers that it came with, in this order."""

CUT_HEADER = "tripfold_cut_from_bytes"
"""In a letter that holds the beginning of a record alone: how long the record was."""
KEY_KEPT_MAX_BYTES = 32 * 1024


class LogUnavailable(DependencyUnavailable):
    """Kafka did not acknowledge an event. It may have taken it all the same: publishing again is harmless."""


class TopicsMissing(DependencyUnavailable):
    """Topics that the process needs are not on the cluster. ``tripfold topics apply`` makes them."""


class ConsumedRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A record as it came from a topic, nothing decoded. ``timestamp_ms`` is since 1970, 0 if it is not known."""

    topic: Topic
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_ms: int = 0


def as_dead_letter(record: ConsumedRecord, error: str) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]:
    """Return the key, value and headers of a record's dead letter.

    A record can be longer than the topic of dead letters takes, since records are compressed on their way. Then its
    headers are left out and its value is cut, and a header says so: its partition has to go on.
    """
    kept_bytes = sum(len(name.encode()) + len(value) for name, value in record.headers) + len(record.key or b"")
    whole_bytes = kept_bytes + len(record.value or b"")
    if whole_bytes <= RECORD_BYTES_MAX:
        return record.key, record.value, burial_headers(record, error)
    cut = msgspec.structs.replace(record, headers=((CUT_HEADER, str(whole_bytes).encode()),))
    key = record.key and record.key[:KEY_KEPT_MAX_BYTES]
    return key, record.value and record.value[: RECORD_BYTES_MAX - KEY_KEPT_MAX_BYTES], burial_headers(cut, error)


def burial_headers(record: ConsumedRecord, error: str) -> list[tuple[str, bytes]]:
    """Return the headers of a record's dead letter: its own, then where it came from and what is wrong with it."""
    origin = (record.topic.value, str(record.partition), str(record.offset), error[:ERROR_HEADER_LENGTH_MAX])
    return [
        *record.headers,
        *((name, text.encode(errors="backslashreplace")) for name, text in zip(BURIAL_HEADERS, origin, strict=True)),
    ]


class OutgoingEvent(msgspec.Struct, frozen=True):
    """An event to be published, and the task that caused it, if one did. ``topic`` is another than the event's own."""

    event: Event
    cause: Cause | None = None
    topic: Topic | None = None


class Publisher(Protocol):
    """What the services need to publish. Both methods raise LogUnavailable when an acknowledgement is missing."""

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        """Publish events, in order for each key, and wait until all are acknowledged."""

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        """Publish a record that cannot be processed to the dead letters, as it came, with its origin and ``error``."""


class RecordPublisher(Protocol):
    """What an operator's commands need to publish records that are not made here. Raises LogUnavailable."""

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        """Publish a record as it is, and wait until it is acknowledged."""


class KafkaPublisher:
    """A Publisher on Kafka. Use it as an async context manager. ``source`` names the service in event headers."""

    def __init__(self, settings: Settings, *, source: str) -> None:
        self._settings = settings
        self._source = source
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._buried: OrderedDict[tuple[Topic, int, int, bytes], None] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def check(self, topics: Iterable[Topic] = ()) -> None:
        """Raise LogUnavailable if Kafka does not answer now, and TopicsMissing if it lacks one of ``topics``.

        It asks over a connection of its own: a producer that was connected once says nothing of the present. It asks
        for all topics, since a question about one can create it.
        """
        wanted = [self._settings.topic_prefix + topic.value for topic in topics]
        client = AIOKafkaClient(**connection(self._settings), request_timeout_ms=CHECK_TIMEOUT_MS)
        try:
            await client.bootstrap()
            present = (await client.fetch_all_metadata()).topics() if wanted else set()
        except (KafkaError, OSError) as error:
            raise LogUnavailable(f"Kafka at {self._settings.kafka_bootstrap_servers} cannot be reached") from error
        finally:
            await client.close()
        missing = [name for name in wanted if name not in present]
        if missing:
            raise TopicsMissing(f"no topic {', '.join(missing)} on the cluster: run 'tripfold topics apply'")

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        batch: list[tuple[Topic, bytes, bytes, list[tuple[str, bytes]]]] = []
        for item in outgoing:
            headers = events.headers_of(item.event, source=self._source, cause=item.cause)
            batch.append((item.topic or item.event.topic, item.event.key.encode(), events.encode(item.event), headers))
            if len(batch) == BATCH_EVENTS_MAX:
                await self._send(batch)
                batch = []
        await self._send(batch)

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        # A batch that is tried again brings its poison again. The digest tells a record from another at its offset.
        digest = hashlib.sha256(record.value or b"").digest()
        origin = (record.topic, record.partition, record.offset, digest)
        if origin in self._buried:
            return
        await self._send([(Topic.DEAD_LETTERS, *as_dead_letter(record, error))])
        metrics.dead_letters.labels(record.topic.value).inc()
        self._buried[origin] = None
        if len(self._buried) > BURIED_KEPT_MAX:
            self._buried.popitem(last=False)

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await self._send([(topic, key, value, list(headers))])

    async def _send(self, batch: Iterable[tuple[Topic, bytes | None, bytes | None, list[tuple[str, bytes]]]]) -> None:
        producer = await self._started()
        try:
            sent = [
                (topic, await producer.send(self._settings.topic_prefix + topic.value, value, key, headers=headers))
                for topic, key, value, headers in batch
            ]
            await asyncio.gather(*(future for _, future in sent))
        except (KafkaError, OSError) as error:
            raise LogUnavailable(f"Kafka did not acknowledge: {type(error).__name__}: {error}") from error
        for topic, count in Counter(topic for topic, _ in sent).items():
            metrics.events_published.labels(topic.value).inc(count)

    async def _started(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                self._producer = await self._start()
            return self._producer

    async def _start(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **connection(self._settings),
            acks="all",
            enable_idempotence=False,  # every effect is idempotent, and one batch is in flight per partition
            partitioner=partition_of,
            max_request_size=LETTER_BYTES_MAX,
            request_timeout_ms=20_000,
            linger_ms=2,
            metadata_max_age_ms=METADATA_AGE_MAX_MS,
        )
        try:
            await producer.start()
        except (KafkaError, OSError) as error:
            await producer.stop()
            raise LogUnavailable(
                f"Kafka at {self._settings.kafka_bootstrap_servers} cannot be reached: {error}"
            ) from error
        return producer
