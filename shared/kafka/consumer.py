"""Consuming topics with FastStream, at least once: a batch is committed only after all its effects have happened.

A consumer can handle several batches at once. A slow batch then holds back the commits of its partition, and no other
batch until UNCOMMITTED_MAX records are not committed. After a crash, Kafka redelivers from the slow batch on.

A record of a later schema version blocks its batch, and so the consumer. While it retries the batch, the consumer looks
in the bucket for the marker that ``tripfold skip`` writes. If the marker names that record, the consumer sends it to
the dead letters and handles the rest of the batch.

FastStream's defaults can lose messages: they acknowledge first, start at the latest offset and skip a record whose
headers are not UTF-8. This module replaces them: its parser never fails, its decoder returns raw records, and
only this module commits offsets, after the effects.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage

from shared.domain import events
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic, group_id
from shared.kafka.connection import broker_security
from shared.kafka.lag import Lag, Offsets
from shared.kafka.offset_tracker import OffsetTracker, TrackedRecord
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
UNASSIGNED_CHECKS_MAX = 2
"""A consumer without a partition in this many checks in a row is reported. In one check, its group may rebalance."""
RESTART_DEADLINE_S = 60.0
COMMIT_TIMEOUT_S = 30.0
"""aiokafka repeats a failed commit without end, also after its consumer was stopped."""
UNCOMMITTED_MAX = 1_000
"""The number of records that a consumer takes at most without a commit. A crash redelivers no more than these."""

_log = structlog.get_logger()


class DecodedRecord(msgspec.Struct, frozen=True):
    """A record and its event."""

    record: ConsumedRecord
    event: Event


Process = Callable[[Sequence[ConsumedRecord]], Awaitable[None]]


class Subscriber(Protocol):
    """The part of FastStream's subscriber that a subscription uses.

    ``consumer`` is the aiokafka consumer, or None while the subscriber is stopped.
    """

    consumer: Any

    async def start(self) -> None:
        """Create a consumer and start consuming."""

    async def stop(self) -> None:
        """Stop consuming."""


class Subscription:
    """A subscription that is restarted if it hangs.

    After an outage a consumer can hang: it is connected and has partitions, but it takes no batch, and only a private
    future of aiokafka shows the error. A consumer that has lag and takes no batch for STUCK_AFTER_S is restarted.
    """

    def __init__(self, topic: Topic, subscriber: Subscriber) -> None:
        metrics.dead_letters.labels(topic.value)  # exports 0, so that an alert sees the first one
        self.topic = topic
        self.batches = 0
        self.running: set[asyncio.Task[None]] = set()
        self.tracker = OffsetTracker()
        self._subscriber = subscriber
        self._lag = Lag(topic, self.tracker)

    def start(self, batch: Coroutine[Any, Any, None]) -> None:
        """Start handling a batch."""
        self.batches += 1
        task = asyncio.create_task(batch)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def drain(self) -> None:
        """Wait until all batches have ended, and cancel them after SHUTDOWN_GRACE_S."""
        running = list(self.running)
        if running:
            await asyncio.wait(running, timeout=SHUTDOWN_GRACE_S)
        for batch in running:
            batch.cancel()

    async def watch(self, retrier: Retrier, check_kafka: Callable[[], Awaitable[None]]) -> None:
        """Watch the progress until asked to stop: export the lag, report a consumer that hangs, and restart it.

        ``check_kafka`` raises DependencyUnavailable while Kafka is unavailable. The time of an outage does not count.
        """
        name = self.topic.value
        batches_before, no_progress_since_s = self.batches, retrier.now_s()
        unassigned_checks = 0
        while not retrier.stopping.is_set():
            await retrier.sleep(PROGRESS_INTERVAL_S)
            unassigned_checks = 0 if self._has_partitions() else unassigned_checks + 1
            if unassigned_checks >= UNASSIGNED_CHECKS_MAX:
                retrier.health.failing("partitions", UNASSIGNED.format(topic=name), detail=name)
            else:
                retrier.health.recovered("partitions", detail=name)
            has_read_all = await self._measure()
            if self.running or self.batches != batches_before or has_read_all:
                batches_before, no_progress_since_s = self.batches, retrier.now_s()
                retrier.health.recovered("consumer", detail=name)
                continue
            try:
                await check_kafka()
            except DependencyUnavailable:
                no_progress_since_s = retrier.now_s()
                continue
            if retrier.now_s() - no_progress_since_s >= STUCK_AFTER_S and not retrier.stopping.is_set():
                reason = f"the consumer has lag and has taken no batch for {STUCK_AFTER_S:.0f} s; it is restarted"
                retrier.health.failing("consumer", reason, detail=name)
                _log.error("consumer_restarted", topic=name)
                await self._restart()
                no_progress_since_s = retrier.now_s()

    def _has_partitions(self) -> bool:
        consumer = self._subscriber.consumer
        return consumer is None or bool(consumer.assignment())  # None: it is starting

    async def _measure(self) -> bool:
        """Export the lag. Return whether the consumer has read its partitions to the end; False if it is unknown."""
        offsets = await self._read_offsets()
        self._lag.measure(offsets)
        if offsets is None or any(one.position < one.end for one in offsets.values()):
            return False
        if offsets and not self.running:
            metrics.last_poll.labels(self.topic.value).set_to_current_time()
        return True

    async def _read_offsets(self) -> dict[int, Offsets] | None:
        """Return the offsets of each assigned partition; None while the consumer restarts or Kafka is unavailable."""
        consumer = self._subscriber.consumer
        if consumer is None:
            return None
        try:
            async with asyncio.timeout(PROGRESS_TIMEOUT_S):
                ends = await consumer.end_offsets(consumer.assignment())
                return {one.partition: Offsets(await consumer.position(one), end) for one, end in ends.items()}
        except (KafkaError, OSError, TimeoutError):
            return None

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        """Commit offsets. If that fails, count it: a later commit covers them, or Kafka redelivers the records."""
        if not offsets or self._subscriber.consumer is None:
            return
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._subscriber.consumer.commit(offsets)
        except (KafkaError, TimeoutError) as error:
            metrics.commit_failures.inc()
            _log.warning("commit_failed", topic=self.topic.value, error=repr(error))

    async def _restart(self) -> None:
        try:
            async with asyncio.timeout(RESTART_DEADLINE_S):
                await self._stop()
                await self._subscriber.start()
        except Exception as error:  # noqa: BLE001  # any failed restart is tried again
            _log.warning("consumer_restart_failed", topic=self.topic.value, error=repr(error))

    async def _stop(self) -> None:
        try:
            await self._subscriber.stop()
        except Exception as error:  # noqa: BLE001  # aiokafka raises here the error that ended its fetching
            _log.warning("consumer_failed", topic=self.topic.value, error=repr(error))
            await self._subscriber.stop()


def make_broker(settings: Settings) -> KafkaBroker:
    """Return a FastStream broker that only consumes; KafkaPublisher has its own producer."""
    return KafkaBroker(
        settings.kafka_bootstrap_servers.split(","),
        security=broker_security(settings),
        client_id="tripfold",
        consumer_only=True,  # only 'tripfold topics apply' creates topics
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
    batches_at_once: int = 1,
) -> Subscription:
    """Subscribe ``process`` to a topic: it gets batches of records, and its return commits the batch.

    A failed batch is retried, without the records that ``skip_markers`` sends to the dead letters. ``deadline_s`` is
    the longest duration of one batch; it sets Kafka's ``max.poll.interval.ms``. If ``in_turns``, a batch has records of
    every partition alike. Up to ``batches_at_once`` batches are handled at the same time. Returns the subscription; run
    its ``watch``, and its ``drain`` before the broker stops.
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
    if in_turns:
        take = partial(take_in_turns, records_max=batch_records_max, linger_ms=linger_ms)
        subscriber.get_msg = take  # type: ignore[method-assign]  # FastStream has no setting for it

    subscription = Subscription(topic, subscriber)
    tracker = subscription.tracker

    async def handle(message: KafkaMessage) -> None:
        batch = consumed_records(topic, message.raw_message)
        message.raw_message = ()  # FastStream's message is in a reference cycle, which would keep the records
        metrics.events_consumed.labels(topic.value).inc(len(batch))
        metrics.batch_records.labels(topic.value).observe(len(batch))
        metrics.last_poll.labels(topic.value).set_to_current_time()
        subscription.start(handle_batch(batch, tracker.track(batch)))
        running = subscription.running
        while running and (len(running) >= batches_at_once or len(tracker) >= UNCOMMITTED_MAX):
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def handle_batch(batch: list[ConsumedRecord], tracked: list[TrackedRecord]) -> None:
        began = time.monotonic()
        detail = f"of {topic.value}"
        if batches_at_once > 1:  # each has its own fault
            detail += f" from {batch[0].partition}/{batch[0].offset}"
        try:
            await retrier.retry_until_available(
                "batch", lambda: _process_unmarked(process, batch, skip_markers), detail=detail
            )
        except Stopping:
            return  # without a commit: Kafka redelivers the batch
        name = settings.topic_prefix + topic.value
        done = tracker.mark_done(tracked)
        await subscription.commit({TopicPartition(name, partition): offset for partition, offset in done.items()})
        metrics.batch_seconds.labels(topic.value).observe(time.monotonic() - began)

    subscriber(handle)
    return subscription


async def _process_unmarked(process: Process, batch: list[ConsumedRecord], skip_markers: SkipMarkers | None) -> None:
    """Process a batch without the records that an operator has marked to be skipped."""
    while True:
        try:
            await process(batch)
        except NewerContract as error:
            if skip_markers is None:
                raise
            batch = await skip_markers.take(error, batch)
        else:
            return


async def take_in_turns(
    consumer: AIOKafkaConsumer, *, records_max: int, linger_ms: int
) -> tuple[ConsumerRecord[Any, Any], ...]:
    """Take one record of each partition in turn, until there are enough or none is left.

    aiokafka returns all fetched records of one partition before those of the next one. In that order, the requests of a
    backlog would all end together.
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
    """Decode the events of a batch in order; send poison records to the dead letters.

    Raises NewerContract, with partition and offset, for an event of a later schema version. The service is then not
    ready until it is upgraded or the record is skipped.
    """
    decoded = []
    for record in batch:
        try:
            decoded.append(DecodedRecord(record, events.decode(record.topic, record.value)))
        except NewerContract as error:
            raise error.at(record.partition, record.offset) from error
        except PoisonRecord as error:
            _log.error(
                "poison_record",
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
