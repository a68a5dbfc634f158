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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.abc import ConsumerRebalanceListener
from faststream import AckPolicy
from faststream.kafka import KafkaBroker

from shared.domain import events
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic, group_id
from shared.kafka.connection import broker_security
from shared.kafka.failed_keys import FailedKeys, KeyResult, Process, harms_one_key
from shared.kafka.offset_tracker import OffsetTracker, TrackedRecord
from shared.kafka.poll import Poll
from shared.kafka.producer import Publisher
from shared.kafka.raw_batches import read_batch
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.kafka.skip_markers import SkipMarkers
from shared.kafka.subscription import SHUTDOWN_GRACE_S, Subscription
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import Retrier, Stopping
from shared.runtime.settings import Settings
from shared.storage.object_store import ObjectStore

POLL_INTERVAL_SLACK_S = 120.0
UNCOMMITTED_MAX = 1_000
"""A consumer with so many records that are not committed takes no further batch. The last batch may exceed it."""

_log = structlog.get_logger()


class DecodedRecord(msgspec.Struct, frozen=True):
    """A record and its event."""

    record: ConsumedRecord
    event: Event


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
    store: ObjectStore,
    deadline_s: float = 180.0,
    skip_markers: SkipMarkers | None = None,
    in_turns: bool = False,
    batches_at_once: int = 1,
) -> Subscription:
    """Subscribe ``process`` to a topic: it gets batches of records, and its return commits the batch.

    A failed batch is retried, without the records that ``skip_markers`` or `FailedKeys` send to the dead letters by
    ``publisher``. ``deadline_s`` is the longest duration of one batch; it sets Kafka's
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
        left = list(batch)
        work = partial(failed_keys.handle, partial(_process_unmarked, process, skip_markers), left)
        try:
            await retrier.retry_until_available("batch", work, detail=detail)
        except Stopping:
            return  # without a commit: Kafka redelivers the batch
        await subscription.commit(tracker.mark_done(tracked))
        metrics.batch_seconds.labels(topic.value).observe(time.monotonic() - began)

    failed_keys = FailedKeys(topic, publisher, retrier.health, store)
    subscription = Subscription(
        topic, name, subscriber, tracker, take_turn, suspects=poll.suspects, look_again=failed_keys.look_again
    )
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
) -> Sequence[KeyResult]:
    """Process a batch without the records that an operator has marked to be skipped."""
    while True:
        try:
            return await process(batch)
        except NewerContract as error:
            if skip_markers is None:
                raise
            batch = await skip_markers.take(error, batch)


async def handle_keys(
    groups: Mapping[str, Sequence[DecodedRecord]],
    handle: Callable[[Sequence[DecodedRecord]], Awaitable[None]],
    *,
    at_once_max: int = 1,
) -> list[KeyResult]:
    """Handle the records of each key, at most ``at_once_max`` keys at the same time, and return a result for each.

    Raises the first error that concerns more than one key, when the keys under way have ended. No other is begun.
    """
    outages: list[Exception] = []

    async def run(key: str) -> KeyResult:
        error: Exception | None = None
        if not outages:
            try:
                await handle(groups[key])
            except Exception as raised:  # noqa: BLE001  # what happens then is decided elsewhere
                error = raised
                if not harms_one_key(raised):
                    outages.append(raised)
        return KeyResult(key, [item.record for item in groups[key]], error)

    results = await bounded_map(run, list(groups), limit=at_once_max)
    if outages:
        raise outages[0]
    return results


async def decode_by_key(
    batch: Sequence[ConsumedRecord], publisher: Publisher, key_of: Callable[[Event], str]
) -> dict[str, list[DecodedRecord]]:
    """Decode the events of a batch as `decode_batch` does, and group them by ``key_of`` in order."""
    groups: dict[str, list[DecodedRecord]] = {}
    for item in await decode_batch(batch, publisher):
        groups.setdefault(key_of(item.event), []).append(item)
    return groups


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
