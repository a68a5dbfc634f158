"""A running subscription: its consumer takes records, is watched while it does, and commits what was handled."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import msgspec
import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from shared.domain.topics import Topic
from shared.kafka.lag import Lag, Offsets
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import Suspect
from shared.kafka.raw_batches import Undecodable
from shared.kafka.records import consumed_records
from shared.kafka.skip_markers import SkipMarkers
from shared.runtime import metrics
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier

SHUTDOWN_GRACE_S = 8.0
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

_log = structlog.get_logger()

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
        look_again: Callable[[], Awaitable[None]] | None = None,
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
        self._look_again = look_again
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
            except (KafkaError, OSError) as error:
                _log.error("poll_failed", topic=self.topic.value, error=repr(error))
                await asyncio.sleep(POLL_RETRY_S)
            except Exception:  # noqa: BLE001  # whatever it was, records may be taken that no handler gets
                _log.exception("poll_ended", topic=self.topic.value)
                return  # none after them may be committed

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
            if self._look_again is not None:
                with contextlib.suppress(DependencyUnavailable):
                    await self._look_again()
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
        if self._taking is not None and self._taking.done():
            return False  # it is restarted, and begins at the committed offsets
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
