"""Consuming topics with FastStream, at least once: a batch is committed only after all its effects have happened.

A consumer can handle several batches at once. A slow batch then holds back the commits of its partition, and no other
batch until UNCOMMITTED_MAX records are not committed. After a crash, Kafka redelivers from the slow batch on.

A record of a later schema version blocks its batch, and so the consumer. A record that the Kafka client cannot decode
blocks its partition (`shared.kafka.poll`). While a record blocks it, the consumer looks in the bucket for the marker
that ``tripfold skip`` writes. If the marker names that record, the consumer sends it to the dead letters and goes on.

FastStream's own loop can lose messages: it asks all partitions at once, acknowledges first, and skips a record whose
headers are not UTF-8. So FastStream has no handler here. It makes, starts and stops the consumer. `Poll` takes the
records, and only this module commits offsets, after the effects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import ConsumerStoppedError, KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker

from shared.domain import events
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic, group_id
from shared.kafka.connection import broker_security
from shared.kafka.isolation import IsolatingBatch, Process
from shared.kafka.lag import Lag, Offsets
from shared.kafka.offset_tracker import OffsetTracker, TrackedRecord
from shared.kafka.poll import Poll, Suspect
from shared.kafka.producer import Publisher
from shared.kafka.raw_batches import Undecodable, read_batch
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.kafka.skip_markers import SkipMarkers
from shared.runtime import metrics
from shared.runtime.health import Health
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
POLL_RETRY_S = 5.0
UNCOMMITTED_MAX = 1_000
"""A consumer with so many records that are not committed takes no further batch. The last batch may exceed it."""

_log = structlog.get_logger()


class DecodedRecord(msgspec.Struct, frozen=True):
    """A record and its event."""

    record: ConsumedRecord
    event: Event


TakeTurn = Callable[[AIOKafkaConsumer], Awaitable[None]]
"""Takes records from a consumer, and starts to handle them; returns when it may take more."""


class Subscriber(Protocol):
    """The part of FastStream's subscriber that a subscription uses.

    ``consumer`` is the aiokafka consumer, or None while the subscriber is stopped.
    """

    consumer: Any

    async def start(self) -> None:
        """Create and start a consumer."""

    async def stop(self) -> None:
        """Stop the consumer."""


class Subscription:
    """A subscription that is restarted if it hangs.

    After an outage a consumer can hang: it is connected and has partitions, but it takes no batch, and only a private
    future of aiokafka shows the error. A consumer that has lag and takes no batch for STUCK_AFTER_S is restarted.
    The lag of ``suspects``, the partitions that cannot go on, does not count.
    """

    def __init__(
        self,
        topic: Topic,
        name: str,
        subscriber: Subscriber,
        tracker: OffsetTracker,
        take_turn: TakeTurn,
        *,
        suspects: Mapping[TopicPartition, Suspect] = MappingProxyType({}),
    ) -> None:
        metrics.dead_letters.labels(topic.value)  # exports 0, so that an alert sees the first one
        metrics.blocked_partitions.labels(topic.value)
        self.topic = topic
        self.batches = 0
        self.running: set[asyncio.Task[None]] = set()
        self.tracker = tracker
        self._subscriber = subscriber
        self._name = name
        self._take_turn = take_turn
        self._suspects = suspects
        self._taking: asyncio.Task[None] | None = None
        self._lag = Lag(topic, tracker)

    @property
    def consuming(self) -> bool:
        """Whether the consumer was started."""
        return self._taking is not None

    async def begin(self) -> None:
        """Start the consumer, and take its records from now on."""
        await self._subscriber.start()
        self._taking = asyncio.create_task(self._take_turns(self._subscriber.consumer))

    async def _take_turns(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            try:
                await self._take_turn(consumer)
            except ConsumerStoppedError:
                return
            except Exception as error:  # noqa: BLE001  # whatever it is, the next turn may succeed
                bug = not isinstance(error, KafkaError | OSError)
                _log.error("poll_failed", topic=self.topic.value, error=repr(error), exc_info=bug)
                await asyncio.sleep(POLL_RETRY_S)

    def start(self, batch: Coroutine[Any, Any, None]) -> None:
        """Start handling a batch."""
        self.batches += 1
        task = asyncio.create_task(batch)
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def drain(self) -> None:
        """Take no more records. Wait until all batches have ended, and cancel them after SHUTDOWN_GRACE_S."""
        self._take_no_more()
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
        blocked = {one.partition for one in self._suspects}
        if offsets is None or any(one.position < one.end for number, one in offsets.items() if number not in blocked):
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

    async def pass_over(self, bad: Undecodable, skip_markers: SkipMarkers | None) -> bool:
        """Send a record that the client cannot decode to the dead letters, if an operator has marked it. Commit it."""
        (record,) = consumed_records(self.topic, [bad.record])
        if skip_markers is None or not await skip_markers.pass_over(record, bad.why):
            return False
        last = msgspec.structs.replace(record, offset=bad.next_offset - 1)
        await self.commit(self.tracker.mark_done(self.tracker.track([last])))
        return True

    def report(self, health: Health, partition: int, reason: str | None) -> None:
        """Report why a partition cannot go on; None: it goes on."""
        detail = f"of {self.topic.value}/{partition}"
        if reason is None:
            health.recovered("record", detail=detail)
        else:
            health.failing("record", reason, detail=detail)
        metrics.blocked_partitions.labels(self.topic.value).set(sum(one.tries > 0 for one in self._suspects.values()))

    async def commit(self, done: Mapping[int, int]) -> None:
        """Commit offsets. If that fails, count it: a later commit covers them, or Kafka redelivers the records."""
        offsets = {TopicPartition(self._name, partition): offset for partition, offset in done.items()}
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
                await self.begin()
        except Exception as error:  # noqa: BLE001  # any failed restart is tried again
            _log.warning("consumer_restart_failed", topic=self.topic.value, error=repr(error))

    def _take_no_more(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    async def _stop(self) -> None:
        self._take_no_more()
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
    publisher: Publisher,
    deadline_s: float = 180.0,
    skip_markers: SkipMarkers | None = None,
    in_turns: bool = False,
    batches_at_once: int = 1,
) -> Subscription:
    """Subscribe ``process`` to a topic: it gets batches of records, and its return commits the batch.

    A failed batch is retried, without the records that ``skip_markers`` sends to the dead letters, and those that
    `IsolatingBatch` sends there by ``publisher``. ``deadline_s`` is the longest duration of one batch; it sets Kafka's
    ``max.poll.interval.ms``. If ``in_turns``, a batch has records of every partition alike. Up to ``batches_at_once``
    batches are handled at the same time. Returns the subscription: ``begin`` it, run its ``watch``, and ``drain`` it
    before the broker stops.
    """
    poll_interval_ms = int((deadline_s + POLL_INTERVAL_SLACK_S) * 1000)
    instance = f"{settings.kafka_group_instance_id}-{topic.value}" if settings.kafka_group_instance_id else None
    name, tracker = settings.topic_prefix + topic.value, OffsetTracker(topic)
    poll = Poll(
        topic,
        tracker,
        read_batch=partial(read_batch, settings),
        pass_over=lambda bad: subscription.pass_over(bad, skip_markers),
        report=lambda partition, reason: subscription.report(retrier.health, partition, reason),
        now_s=retrier.now_s,
        wait_max_s=settings.retry_wait_max_s,
    )
    subscriber = broker.subscriber(
        name,
        group_id=group_id(settings.topic_prefix, group),
        group_instance_id=instance,
        auto_offset_reset="earliest",
        ack_policy=AckPolicy.MANUAL,
        session_timeout_ms=int(settings.kafka_session_timeout_s * 1000),
        heartbeat_interval_ms=int(settings.kafka_session_timeout_s * 1000 / 10),
        max_poll_interval_ms=poll_interval_ms,
        rebalance_timeout_ms=poll_interval_ms,
        max_partition_fetch_bytes=RECORD_BYTES_MAX,
        listener=_Assignments(poll.forget),
        no_reply=True,
    )

    async def take_turn(consumer: AIOKafkaConsumer) -> None:
        records_max = batch_records_max
        batch = consumed_records(
            topic, await poll.take(consumer, records_max=records_max, wait_ms=linger_ms, in_turns=in_turns)
        )
        if not batch:
            return
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
        isolating = IsolatingBatch(batch, partial(_process_unmarked, process, skip_markers), publisher)
        try:
            await retrier.retry_until_available("batch", isolating.handle, detail=detail)
        except Stopping:
            return  # without a commit: Kafka redelivers the batch
        await subscription.commit(tracker.mark_done(tracked))
        metrics.batch_seconds.labels(topic.value).observe(time.monotonic() - began)

    subscription = Subscription(topic, name, subscriber, tracker, take_turn, suspects=poll.suspects)
    return subscription


class _Assignments(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Calls ``assigned`` after each rebalance."""

    def __init__(self, assigned: Callable[[], None]) -> None:
        self._assigned = assigned

    def on_partitions_revoked(self, revoked: object) -> None:
        pass

    def on_partitions_assigned(self, assigned: object) -> None:  # noqa: ARG002  # aiokafka's signature
        self._assigned()


async def _process_unmarked(
    process: Process, skip_markers: SkipMarkers | None, batch: Sequence[ConsumedRecord]
) -> None:
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
