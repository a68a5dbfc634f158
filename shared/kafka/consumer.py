"""Consuming topics with FastStream, at least once: a batch is committed only after all its effects have happened.

A record of a later schema version blocks its consumer. While the batch is tried again, the consumer looks in the bucket
for the marker that ``tripfold skip`` writes. If it names that record, the record goes to the dead letters, and the rest
of the batch is handled without it.

FastStream's defaults would lose messages in several ways (acknowledge first, start at the latest offset, skip a
record whose headers are not UTF-8). Everything that matters is therefore written out here, once: a parser that never
fails, a decoder that hands on raw records, and a handler that ends only by a commit or with the process.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.errors import KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from shared.domain import events
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic, group_id
from shared.kafka.connection import broker_security
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.kafka.skip_markers import SkipMarkers
from shared.runtime import metrics
from shared.runtime.retry import DependencyUnavailable, Retrier, Stopping
from shared.runtime.settings import Settings

SHUTDOWN_GRACE_S = 8.0
POLL_INTERVAL_SLACK_S = 120.0
PROGRESS_INTERVAL_S = 10.0
PROGRESS_TIMEOUT_S = 8.0
STUCK_AFTER_S = 60.0
UNASSIGNED = (
    "this process has no partition of {topic}: the topic is missing, the group is rebalancing, or other processes have "
    "all partitions; run no more processes than the topic has partitions"
)
UNASSIGNED_LOOKS_MAX = 2
"""A consumer that has no partition at so many looks in a row is at fault; at one, its group may be rebalancing."""
RESTART_DEADLINE_S = 60.0

_log = structlog.get_logger()


class DecodedRecord(msgspec.Struct, frozen=True):
    """A record and the event it holds."""

    record: ConsumedRecord
    event: Event


Process = Callable[[Sequence[ConsumedRecord]], Awaitable[None]]


class Subscriber(Protocol):
    """What a subscription needs of FastStream's subscriber. ``consumer`` is aiokafka's, or None while it is stopped."""

    consumer: Any

    async def start(self) -> None:
        """Make a consumer, and begin to consume."""

    async def stop(self) -> None:
        """Stop consuming."""


class Subscription:
    """One subscription, and whether it makes progress.

    After an outage a consumer can stand still for good with nothing to show it but a private future: it is connected,
    it has its partitions, and it takes nothing. So what counts is progress: records that wait, and none that is taken.
    """

    def __init__(self, topic: Topic, subscriber: Subscriber) -> None:
        self.topic = topic
        self.handling = False
        self.batches = 0
        self._subscriber = subscriber

    async def watch(self, retrier: Retrier, check_kafka: Callable[[], Awaitable[None]]) -> None:
        """Look after the progress until asked to stop; show a consumer that stands still, and start it again.

        ``check_kafka`` raises a DependencyUnavailable while Kafka is away: that is no fault of the consumer's.
        """
        name = self.topic.value
        batches_before, stands_since_s = self.batches, retrier.now_s()
        unassigned_looks = 0
        while not retrier.stopping.is_set():
            await retrier.sleep(PROGRESS_INTERVAL_S)
            unassigned_looks = 0 if self._has_partitions() else unassigned_looks + 1
            if unassigned_looks >= UNASSIGNED_LOOKS_MAX:
                retrier.health.failing("partitions", UNASSIGNED.format(topic=name), detail=name)
            else:
                retrier.health.recovered("partitions", detail=name)
            if self.handling or self.batches != batches_before or await self._at_the_end():
                batches_before, stands_since_s = self.batches, retrier.now_s()
                retrier.health.recovered("consumer", detail=name)
                continue
            try:
                await check_kafka()
            except DependencyUnavailable:
                stands_since_s = retrier.now_s()
                continue
            if retrier.now_s() - stands_since_s >= STUCK_AFTER_S and not retrier.stopping.is_set():
                reason = f"records wait, and none was taken for {STUCK_AFTER_S:.0f} s"
                retrier.health.failing("consumer", reason, detail=name)
                _log.error("consumer stands still, it is started again", topic=name)
                await self._restart()
                stands_since_s = retrier.now_s()

    def _has_partitions(self) -> bool:
        consumer = self._subscriber.consumer
        return consumer is None or bool(consumer.assignment())  # what is None is being started

    async def _at_the_end(self) -> bool:
        """Say whether no record waits in the partitions that the consumer has; one that cannot say has not ended."""
        consumer = self._subscriber.consumer
        if consumer is None:
            return False
        try:
            async with asyncio.timeout(PROGRESS_TIMEOUT_S):
                partitions = list(consumer.assignment())
                ends = await consumer.end_offsets(partitions) if partitions else {}
                waiting = [end for one, end in ends.items() if await consumer.position(one) < end]
        except (KafkaError, OSError, TimeoutError):
            return False
        if partitions and not waiting:
            metrics.last_poll.labels(self.topic.value).set_to_current_time()
        return not waiting

    async def _restart(self) -> None:
        try:
            async with asyncio.timeout(RESTART_DEADLINE_S):
                await self._stop()
                await self._subscriber.start()
        except Exception as error:  # noqa: BLE001  # whatever it is: it is tried again
            _log.warning("consumer could not be started again", topic=self.topic.value, error=repr(error))

    async def _stop(self) -> None:
        try:
            await self._subscriber.stop()
        except Exception as error:  # noqa: BLE001  # aiokafka keeps what ended its fetching for who stops it
            _log.warning("what the consumer stood still for", topic=self.topic.value, error=repr(error))
            await self._subscriber.stop()


def make_broker(settings: Settings) -> KafkaBroker:
    """Return a FastStream broker for consuming; publishing has a producer of its own."""
    return KafkaBroker(
        settings.kafka_bootstrap_servers.split(","),
        security=broker_security(settings),
        client_id="tripfold",
        consumer_only=True,  # topics are provisioned by a command; services never create one by accident
        allow_auto_create_topics=False,
        apply_types=False,
        graceful_timeout=SHUTDOWN_GRACE_S,
        metadata_max_age_ms=METADATA_AGE_MAX_MS,
        logger=None,
    )


def consume(
    broker: KafkaBroker,
    topic: Topic,
    process: Process,
    *,
    settings: Settings,
    retrier: Retrier,
    group: str,
    batch_records_max: int,
    linger_ms: int,
    deadline_s: float = 180.0,
    skip_markers: SkipMarkers | None = None,
    in_turns: bool = False,
) -> Subscription:
    """Subscribe ``process`` to a topic: it gets batches of records, and a batch is committed when it returns.

    ``process`` is called again with the same batch until it ends without a fault; only what ``skips`` takes is left
    out. ``deadline_s`` is the longest that
    it takes without one: how long Kafka is told to expect no poll. With ``in_turns`` a batch has records of every
    partition alike. Returns what has to be watched for progress.
    """
    poll_interval_ms = int((deadline_s + POLL_INTERVAL_SLACK_S) * 1000)
    instance = f"{settings.kafka_group_instance_id}-{topic.value}" if settings.kafka_group_instance_id else None
    subscriber = broker.subscriber(
        settings.topic_prefix + topic.value,
        group_id=group_id(settings.topic_prefix, group),
        group_instance_id=instance,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.MANUAL,
        batch=True,
        max_records=batch_records_max,
        batch_timeout_ms=linger_ms,
        session_timeout_ms=int(settings.kafka_session_timeout_s * 1000),
        heartbeat_interval_ms=int(settings.kafka_session_timeout_s * 1000 / 10),
        max_poll_interval_ms=poll_interval_ms,
        rebalance_timeout_ms=poll_interval_ms,
        max_partition_fetch_bytes=RECORD_BYTES_MAX,
        no_reply=True,
        parser=_parse,
        decoder=_keep,
    )
    if in_turns:  # FastStream has no setting for it
        subscriber.get_msg = partial(take_in_turns, records_max=batch_records_max, linger_ms=linger_ms)  # type: ignore[method-assign]

    subscription = Subscription(topic, subscriber)

    async def handle(message: KafkaMessage) -> None:
        subscription.batches += 1
        subscription.handling = True
        try:
            await handle_batch(message)
        finally:
            subscription.handling = False

    async def handle_batch(message: KafkaMessage) -> None:
        began = time.monotonic()
        batch = consumed_records(topic, message.raw_message)
        metrics.events_consumed.labels(topic.value).inc(len(batch))
        metrics.last_poll.labels(topic.value).set_to_current_time()
        remaining = batch

        async def attempt() -> None:
            nonlocal remaining
            while True:
                try:
                    await process(remaining)
                except NewerContract as error:
                    if skip_markers is None:
                        raise
                    remaining = await skip_markers.take(error, remaining)
                else:
                    return

        try:
            await retrier.retry_until_available("batch", attempt, detail=f"of {topic.value}")
        except Stopping:
            return  # without a commit: another process, or the next start, takes the batch again
        await _commit(message, topic)
        metrics.batch_seconds.labels(topic.value).observe(time.monotonic() - began)

    subscriber(handle)
    return subscription


async def _commit(message: KafkaMessage, topic: Topic) -> None:
    try:
        await message.ack()
    except KafkaError as error:
        metrics.commit_failures.inc()
        _log.warning("commit failed, the batch will come again", topic=topic.value, error=str(error))


async def take_in_turns(
    consumer: AIOKafkaConsumer, *, records_max: int, linger_ms: int
) -> tuple[ConsumerRecord[Any, Any], ...]:
    """Take one record of each partition in turn, until there are enough or none is left.

    aiokafka hands out all records that it has fetched of one partition before those of the next one. With that, the
    requests of a backlog would all end together.
    """
    taken: list[ConsumerRecord[Any, Any]] = []
    partitions = list(consumer.assignment())
    random.shuffle(partitions)
    try:
        while len(taken) < records_max:
            before = len(taken)
            for partition in partitions:
                if len(taken) < records_max:
                    taken += chain(*(await consumer.getmany(partition, timeout_ms=0, max_records=1)).values())
            if len(taken) == before:
                if taken:
                    break
                taken += chain(*(await consumer.getmany(timeout_ms=linger_ms, max_records=1)).values())
                if not taken:
                    break
    except KafkaError:
        if not taken:
            raise  # a record that is taken must be handled, because the next commit covers it
    return tuple(taken)


async def decode_batch(batch: Sequence[ConsumedRecord], publisher: Publisher) -> list[DecodedRecord]:
    """Decode the events of a batch in order; bury what is poison.

    Raises NewerContract, with the place of the record, for an event of a later schema version: the service stops being
    ready, and waits until it is upgraded or the record is skipped.
    """
    decoded = []
    for record in batch:
        try:
            decoded.append(DecodedRecord(record, events.decode(record.topic, record.value)))
        except NewerContract as error:
            raise error.at(record.partition, record.offset) from error
        except PoisonRecord as error:
            _log.error(
                "poison record",
                topic=record.topic.value,
                partition=record.partition,
                offset=record.offset,
                error=str(error),
            )
            await publisher.send_to_dead_letters(record, str(error))
    return decoded


async def _parse(
    records: tuple[ConsumerRecord[Any, Any], ...], original: Callable[[Any], Awaitable[KafkaMessage]]
) -> KafkaMessage:
    # FastStream's parser decodes headers as UTF-8 and skips a batch in which one is not UTF-8, so it gets no headers.
    # It needs only the first and last record of a batch, to name the batch.
    message = await original(tuple(replace(record, headers=()) for record in (records[0], records[-1])))
    message.raw_message = records
    return message


async def _keep(message: KafkaMessage) -> KafkaMessage:
    return message
