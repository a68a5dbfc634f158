"""Progress: when a hanging consumer is reported and restarted, and what a stop waits for.

The consumer is a fake that hangs as aiokafka's does; the test moves the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from shared.domain.topics import Topic
from shared.kafka import subscription as subscription_module
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import Suspect
from shared.kafka.subscription import PROGRESS_INTERVAL_S, STUCK_AFTER_S, Subscription
from shared.runtime import metrics
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier
from tests.fakes.metrics import REGISTRY, value

PARTITION = TopicPartition("city-stats", 0)


class Consumer:
    """A consumer with records before it, or none."""

    def __init__(self, *, position: int, end: int) -> None:
        self.where = position
        self.end = end
        self.partitions = {PARTITION}

    def assignment(self) -> set[TopicPartition]:
        return self.partitions

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, self.end)

    async def position(self, _: TopicPartition) -> int:
        return self.where

    async def commit(self, _: dict[TopicPartition, int]) -> None:
        await asyncio.Event().wait()


class Subscriber:
    """Makes a consumer that has read everything when it is started again; ``starts_failing`` times it cannot.

    Its stopping fails ``stops_failing`` times, and leaves the consumer where it is, as FastStream's does.
    """

    def __init__(self, consumer: Consumer, *, starts_failing: int = 0, stops_failing: int = 0) -> None:
        self.consumer: Consumer | None = consumer
        self.starts = 0
        self.starts_failing = starts_failing
        self.stops_failing = stops_failing

    async def start(self) -> None:
        self.starts += 1
        if self.starts <= self.starts_failing:
            raise OSError("not now")
        self.consumer = Consumer(position=9, end=9)

    async def stop(self) -> None:
        if self.stops_failing:
            self.stops_failing -= 1
            raise KafkaError("Unexpected error during data retrieval")
        self.consumer = None


async def take_nothing(_consumer: object) -> None:
    """Take no record."""
    await asyncio.Event().wait()


def subscription_of(subscriber: Subscriber, *blocked: TopicPartition) -> Subscription:
    """Make a subscription of which only the watching is tested."""
    tracker = OffsetTracker(Topic.CITY_STATS)
    return Subscription(
        Topic.CITY_STATS,
        "city-stats",
        subscriber,
        tracker,
        take_nothing,
        suspects=dict.fromkeys(blocked, Suspect(0.0, tries=1)),
    )


class Clock(Retrier):
    """Retrier whose sleeps take no time, and that is asked to stop after ``lasts_s``."""

    def __init__(self, *, lasts_s: float) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self._now_s = 0.0
        self._lasts_s = lasts_s
        self.seen: list[dict[str, str]] = []

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        self._now_s += seconds
        self.seen.append(self.health.faults)
        if self._now_s >= self._lasts_s:
            self.stopping.set()


async def answers() -> None:
    """Answer as Kafka does."""


async def test_a_consumer_that_hangs_is_reported_and_restarted() -> None:
    """A consumer that has lag and takes no batch is reported until it is restarted."""
    subscriber = Subscriber(Consumer(position=3, end=9))
    clock = Clock(lasts_s=STUCK_AFTER_S * 3)
    await subscription_of(subscriber).watch(clock, answers)
    assert subscriber.starts == 1
    assert any("has taken no batch" in reason for faults in clock.seen for reason in faults.values())
    assert clock.health.faults == {}


async def test_a_consumer_whose_taking_fails_is_restarted() -> None:
    """Records that were taken may not have been handled. So it takes no more, and begins at the committed offsets."""
    taken: list[object] = []

    async def failing(consumer: object) -> None:
        taken.append(consumer)
        if len(taken) == 1:
            raise TypeError("a bug")
        await take_nothing(consumer)

    subscriber = Subscriber(Consumer(position=9, end=9))
    tracker = OffsetTracker(Topic.CITY_STATS)
    subscription = Subscription(Topic.CITY_STATS, "city-stats", subscriber, tracker, failing)
    await subscription.begin()
    await asyncio.sleep(0)
    await subscription.watch(Clock(lasts_s=STUCK_AFTER_S * 3), answers)
    await asyncio.sleep(0)
    assert (subscriber.starts, len(taken)) == (2, 2)
    await subscription.drain()


async def test_a_failed_restart_is_retried() -> None:
    """A consumer that cannot be started is started again later."""
    subscriber = Subscriber(Consumer(position=3, end=9), starts_failing=1)
    clock = Clock(lasts_s=STUCK_AFTER_S * 4)
    await subscription_of(subscriber).watch(clock, answers)
    assert subscriber.starts == 2
    assert clock.health.faults == {}


async def test_a_consumer_whose_stop_raises_is_restarted_at_once() -> None:
    """The stop raises the error that ended the fetching; the restart continues."""
    subscriber = Subscriber(Consumer(position=3, end=9), stops_failing=1)
    clock = Clock(lasts_s=STUCK_AFTER_S * 1.5)
    await subscription_of(subscriber).watch(clock, answers)
    assert subscriber.starts == 1
    assert clock.health.faults == {}


async def test_a_partition_that_waits_for_an_operator_is_no_hanging_consumer() -> None:
    """The consumer of a blocked partition has lag and takes no batch, and a restart would not help it."""
    subscriber = Subscriber(Consumer(position=3, end=9))
    await subscription_of(subscriber, PARTITION).watch(Clock(lasts_s=STUCK_AFTER_S * 3), answers)
    assert subscriber.starts == 0


async def test_a_consumer_without_lag_is_not_restarted() -> None:
    """A consumer without lag may idle for any time."""
    subscriber = Subscriber(Consumer(position=9, end=9))
    metrics.last_poll.labels("city-stats").set(0)
    await subscription_of(subscriber).watch(Clock(lasts_s=STUCK_AFTER_S * 5), answers)
    assert subscriber.starts == 0
    assert time.time() - value("tripfold_last_poll_timestamp_seconds", topic="city-stats") < 60


async def test_a_consumer_that_handles_a_batch_is_not_restarted() -> None:
    """A long batch is progress."""
    subscriber = Subscriber(Consumer(position=3, end=9))
    subscription = subscription_of(subscriber)
    subscription.start(asyncio.sleep(3_600))
    await subscription.watch(Clock(lasts_s=STUCK_AFTER_S * 5), answers)
    (batch,) = subscription.running
    batch.cancel()
    assert subscriber.starts == 0


@pytest.mark.parametrize("batch_s", [0, 3_600])
async def test_the_lag_is_exported(batch_s: int) -> None:
    """The consumer exports its lag while it hangs and during a long batch."""
    metrics.consumer_lag.clear()
    subscription = subscription_of(Subscriber(Consumer(position=3, end=9)))
    subscription.start(asyncio.sleep(batch_s))
    await subscription.watch(Clock(lasts_s=PROGRESS_INTERVAL_S), answers)
    for batch in subscription.running:
        batch.cancel()
    labels = {"topic": "city-stats", "partition": "0"}
    assert REGISTRY.get_sample_value("tripfold_consumer_lag", labels) == 6


async def test_a_consumer_is_not_restarted_during_an_outage_of_kafka() -> None:
    """While Kafka is away no consumer is restarted; the time counts from its return."""
    subscriber = Subscriber(Consumer(position=3, end=9))
    clock = Clock(lasts_s=STUCK_AFTER_S * 3)

    async def away_for_long() -> None:
        if clock.now_s() < STUCK_AFTER_S * 2.5:
            raise DependencyUnavailable("away")

    await subscription_of(subscriber).watch(clock, away_for_long)
    assert subscriber.starts == 0


async def test_a_consumer_without_partitions_is_reported() -> None:
    """An empty assignment is reported within 30 s, though not at the first check, until a partition is assigned."""
    consumer = Consumer(position=9, end=9)
    clock = Clock(lasts_s=100)
    showed_at_s: list[float] = []

    class Looking(Clock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            consumer.partitions = set() if 10 <= self.now_s() <= 60 else {PARTITION}
            if any("no partition of city-stats" in reason for reason in self.health.faults.values()):
                showed_at_s.append(self.now_s())

    clock = Looking(lasts_s=100)
    await subscription_of(Subscriber(consumer)).watch(clock, answers)
    assert (min(showed_at_s), max(showed_at_s)) == (30, 70)  # 20 s after it began, until the look after its end
    assert clock.health.faults == {}


async def test_a_slow_consumer_is_not_restarted() -> None:
    """A consumer that takes a batch now and then is not restarted, whatever its lag."""
    subscriber = Subscriber(Consumer(position=3, end=9_000))
    subscription = subscription_of(subscriber)

    class Working(Clock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            if self.now_s() % (PROGRESS_INTERVAL_S * 3) == 0:
                subscription.batches += 1

    await subscription.watch(Working(lasts_s=STUCK_AFTER_S * 5), answers)
    assert subscriber.starts == 0


async def test_a_commit_that_never_ends_holds_up_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up and counted, so that the consumer goes on or is seen to hang."""
    monkeypatch.setattr(subscription_module, "COMMIT_TIMEOUT_S", 0.01)
    failures = metrics.commit_failures._value.get()
    subscription = subscription_of(Subscriber(Consumer(position=3, end=9)))
    async with asyncio.timeout(10):
        await subscription.commit({PARTITION: 3})
    assert metrics.commit_failures._value.get() == failures + 1


async def test_batches_that_do_not_end_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits for the batches that run, and then cancels those that are left. Without any, it does not wait."""
    monkeypatch.setattr(subscription_module, "SHUTDOWN_GRACE_S", 0.02)
    subscription = subscription_of(Subscriber(Consumer(position=9, end=9)))
    await subscription.drain()
    for seconds in (0, 3_600):
        subscription.start(asyncio.sleep(seconds))
    short, long = sorted(subscription.running, key=lambda task: str(task.get_coro()))
    await subscription.drain()
    await asyncio.wait([short, long])
    assert sorted([short.cancelled(), long.cancelled()]) == [False, True]
