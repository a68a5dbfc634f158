"""Publishing events: the port and its Kafka adapter. A publish returns once all replicas have acknowledged it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from shared.domain import events
from shared.domain.topics import DEAD_LETTER_BYTES_MAX, METADATA_AGE_MAX_MS, Topic, partition_of
from shared.kafka.connection import connection
from shared.kafka.dead_letters import as_dead_letter
from shared.kafka.records import ConsumedRecord, OutgoingEvent, headers_of
from shared.runtime import metrics, tracing
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

BATCH_EVENTS_MAX = 5_000
CHECK_TIMEOUT_MS = 20_000
PROBE_TIMEOUT_MS = 1_500
"""A service that is asked whether it is ready must know soon."""
CLOSE_TIMEOUT_S = 2.0
DEAD_LETTERS_REMEMBERED_MAX = 20_000
"""How many dead letters a process remembers: more than any batch has."""


class KafkaUnavailable(DependencyUnavailable):
    """Kafka did not acknowledge an event. It may be stored nevertheless; publishing it again is harmless."""


class TopicsMissing(DependencyUnavailable):
    """The cluster lacks topics that the process needs. ``tripfold topics apply`` creates them."""


class Publisher(Protocol):
    """Publishes events and dead letters. Raises KafkaUnavailable when an acknowledgement is missing."""

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        """Publish events, in order for each key; return when all are acknowledged."""

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        """Publish an unprocessable record unchanged to the dead letters, with its origin and ``error``."""


class RecordPublisher(Protocol):
    """Publishes raw records for operator commands. Raises KafkaUnavailable."""

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        """Publish a record unchanged; return when it is acknowledged."""


class KafkaPublisher:
    """A Publisher on Kafka. Use it as an async context manager. ``source`` names the service in event headers."""

    def __init__(self, settings: Settings, *, source: str) -> None:
        self._settings = settings
        self._source = source
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._dead_letters: OrderedDict[tuple[Topic, int, int, bytes], None] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer is not None:
            # Without Kafka, this would wait for pending records.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._producer.stop()

    async def check(self, topics: Iterable[Topic] = (), *, timeout_ms: int = CHECK_TIMEOUT_MS) -> None:
        """Raise KafkaUnavailable if Kafka does not respond in time, and TopicsMissing if it lacks one of ``topics``.

        The check opens a new connection, because an idle producer does not notice an outage. It lists all topics,
        because a request for one topic can create it.
        """
        wanted = [self._settings.topic_prefix + topic.value for topic in topics]
        client = AIOKafkaClient(**connection(self._settings), request_timeout_ms=timeout_ms)
        try:
            await client.bootstrap()
            present = (await client.fetch_all_metadata()).topics() if wanted else set()
        except (KafkaError, OSError) as error:
            raise KafkaUnavailable(f"Kafka at {self._settings.kafka_bootstrap_servers} cannot be reached") from error
        finally:
            await client.close()
        missing = [name for name in wanted if name not in present]
        if missing:
            raise TopicsMissing(f"the cluster has no topic {', '.join(missing)}: run 'tripfold topics apply'")

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        batch: list[tuple[Topic, bytes, bytes, list[tuple[str, bytes]]]] = []
        traceparent = tracing.traceparent()
        for item in outgoing:
            headers = headers_of(item, source=self._source, traceparent=traceparent)
            batch.append((item.topic or item.event.topic, item.event.key.encode(), events.encode(item.event), headers))
            if len(batch) == BATCH_EVENTS_MAX:
                await self._send(batch)
                batch = []
        if batch:
            await self._send(batch)

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        # A retried batch contains its poison records again. The digest distinguishes a record of a recreated topic at
        # the same offset.
        digest = hashlib.sha256(record.value or b"").digest()
        origin = (record.topic, record.partition, record.offset, digest)
        if origin in self._dead_letters:
            return
        await self._send([(Topic.DEAD_LETTERS, *as_dead_letter(record, error))])
        metrics.dead_letters.labels(record.topic.value).inc()
        self._dead_letters[origin] = None
        if len(self._dead_letters) > DEAD_LETTERS_REMEMBERED_MAX:
            self._dead_letters.popitem(last=False)

    async def publish_record(
        self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> None:
        await self._send([(topic, key, value, list(headers))])

    async def _send(self, batch: Sequence[tuple[Topic, bytes | None, bytes | None, list[tuple[str, bytes]]]]) -> None:
        destination = batch[0][0].value
        attributes: tracing.Attributes = {
            "messaging.system": "kafka",
            "messaging.operation.type": "send",
            "messaging.destination.name": destination,
            "messaging.batch.message_count": len(batch),
        }
        with tracing.inner_span(f"send {destination}", "producer", attributes):
            producer = await self._started()
            try:
                sent = [
                    (topic, await producer.send(self._settings.topic_prefix + topic.value, value, key, headers=headers))
                    for topic, key, value, headers in batch
                ]
                await asyncio.gather(*(future for _, future in sent))
            except (KafkaError, OSError) as error:
                raise KafkaUnavailable(
                    f"Kafka did not acknowledge an event: {type(error).__name__}: {error}"
                ) from error
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
            max_request_size=DEAD_LETTER_BYTES_MAX,
            request_timeout_ms=20_000,
            linger_ms=2,
            metadata_max_age_ms=METADATA_AGE_MAX_MS,
        )
        try:
            await producer.start()
        except (KafkaError, OSError) as error:
            await producer.stop()
            raise KafkaUnavailable(
                f"Kafka at {self._settings.kafka_bootstrap_servers} cannot be reached: {error}"
            ) from error
        return producer
