"""Batches and progress: which batches run at once, what is committed, and when a hanging consumer is restarted.

The consumer is a fake that hangs as aiokafka's does; the test moves the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from faststream import AckPolicy

from shared.domain import events
from shared.domain.events import NewerContract
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic
from shared.kafka import consumer as consumer_module
from shared.kafka.consumer import (
    PROGRESS_INTERVAL_S,
    SHUTDOWN_GRACE_S,
    STUCK_AFTER_S,
    UNCOMMITTED_MAX,
    Subscription,
    consume,
    decode_batch,
    make_broker,
)
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import Suspect
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.kafka.skip_markers import SkipMarkers, mark
from shared.runtime import metrics
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier, Stopping
from shared.runtime.settings import Settings, load_settings
from tests.fakes.bucket import NOON
from tests.fakes.builders import STATS
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import REGISTRY, value
from tests.fakes.store import MemoryStore

PARTITION = TopicPartition("city-stats", 0)
NEWER = b'{"type":"forecast","schema_version":2}'


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
    monkeypatch.setattr(consumer_module, "COMMIT_TIMEOUT_S", 0.01)
    failures = metrics.commit_failures._value.get()
    subscription = subscription_of(Subscriber(Consumer(position=3, end=9)))
    async with asyncio.timeout(10):
        await subscription.commit({PARTITION: 3})
    assert metrics.commit_failures._value.get() == failures + 1


def record(offset: int, *, partition: int = 0, body: bytes = b"{}") -> ConsumerRecord[bytes, bytes]:
    """Return a record as aiokafka does. Its header is not UTF-8."""
    headers = (("odd", b"\xff"),)
    return ConsumerRecord("city-stats", partition, offset, 0, 0, b"k", body, None, 1, len(body), headers)


class Broker:
    """FastStream's broker, its subscriber and the consumer: the part that `consume` uses. It keeps the commits."""

    subscription: Subscription

    def __init__(self) -> None:
        self.topic = ""
        self.options: dict[str, Any] = {}
        self.commits: list[dict[TopicPartition, int]] = []
        self.consumer = self
        self._records: list[ConsumerRecord[bytes, bytes]] = []
        self._delivered, self._asked = asyncio.Event(), asyncio.Event()

    def subscriber(self, topic: str, **options: object) -> Broker:
        self.topic, self.options = topic, options
        return self

    async def start(self) -> None:
        pass

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        self.commits.append(offsets)

    def assignment(self) -> set[TopicPartition]:
        return {TopicPartition(self.topic, partition) for partition in range(4)}

    async def getmany(self, *partitions: TopicPartition, timeout_ms: int, max_records: int) -> dict[Any, Any]:
        if timeout_ms and not self._records:
            assert timeout_ms == 9
            self._asked.set()
            self._delivered.clear()
            await self._delivered.wait()
        for one in partitions or sorted(self.assignment()):
            records = [record for record in self._records if record.partition == one.partition][:max_records]
            if records:
                self._records = [record for record in self._records if record not in records]
                return {one: records}
        return {}

    async def deliver(self, *records: ConsumerRecord[bytes, bytes]) -> None:
        """Let the consumer take records; return when it asks for more."""
        if not self.subscription.consuming:
            await self.subscription.begin()
        self._records += records
        self._asked.clear()
        self._delivered.set()
        await self._asked.wait()


class Handler:
    """Keeps the offsets of each batch; a batch waits for its event in ``held``, if there is one."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.held: dict[int, asyncio.Event] = {}
        self.faults: list[Exception] = []

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        self.begun.append([one.offset for one in batch])
        if batch[0].offset in self.held:
            await self.held[batch[0].offset].wait()
        if self.faults:
            raise self.faults.pop(0)


def consuming(broker: Broker, handler: Handler, health: Health | None = None, **options: Any) -> Subscription:
    """Subscribe a handler to ``city-stats``."""
    broker.subscription = consume(
        broker,  # type: ignore[arg-type]  # the part of it that is used
        Topic.CITY_STATS,
        handler.process,
        **{
            "settings": named_settings(),
            "retrier": Retrier(health=health or Health(), wait_max_s=0),
            "group": "aggregate",
            "batch_records_max": 7,
            "linger_ms": 9,
            "publisher": MemoryPublisher(MemoryLog()),
            **options,
        },
    )
    return broker.subscription


def named_settings() -> Settings:
    """Return settings with a prefix and a name for the group's member."""
    return load_settings(
        {
            "TRIPFOLD_TOPIC_PREFIX": "test-",
            "TRIPFOLD_KAFKA_GROUP_INSTANCE_ID": "one",
            "TRIPFOLD_KAFKA_SESSION_TIMEOUT_S": "30",
            "TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2",
        }
    )


def test_a_subscriber_commits_nothing_by_itself_and_begins_at_the_earliest_record() -> None:
    """The settings that lose no message, and the intervals that follow from the deadline and the session timeout."""
    broker, handler = Broker(), Handler()
    consuming(broker, handler)
    assert broker.options.pop("listener")
    assert (broker.topic, broker.options) == (
        "test-city-stats",
        {
            "group_id": "test-tripfold-aggregate",
            "group_instance_id": "one-city-stats",
            "auto_offset_reset": "earliest",
            "ack_policy": AckPolicy.MANUAL,
            "session_timeout_ms": 30_000,
            "heartbeat_interval_ms": 3_000,
            "max_poll_interval_ms": 300_000,
            "rebalance_timeout_ms": 300_000,
            "max_partition_fetch_bytes": RECORD_BYTES_MAX,
            "no_reply": True,
        },
    )
    unnamed = named_settings().model_copy(update={"kafka_group_instance_id": ""})
    consuming(broker, handler, settings=unnamed, deadline_s=60.0)
    assert (broker.options["group_instance_id"], broker.options["max_poll_interval_ms"]) == (None, 180_000)


def test_a_broker_only_consumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It creates no topic and no producer, and learns of new partitions as soon as the producers do."""
    made: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(consumer_module, "KafkaBroker", lambda servers, **options: made.append((servers, options)))
    secured = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_username": "me"}
    make_broker(named_settings().model_copy(update=secured))
    ((servers, options),) = made
    assert (servers, options.pop("security").username) == (["a:1", "b:2"], "me")
    assert options == {
        "client_id": "tripfold",
        "consumer_only": True,
        "allow_auto_create_topics": False,
        "apply_types": False,
        "graceful_timeout": SHUTDOWN_GRACE_S,
        "metadata_max_age_ms": METADATA_AGE_MAX_MS,
        "logger": None,
    }


async def test_a_batch_is_committed_after_its_effects() -> None:
    """The offset after the last record of each partition is committed once the batch is done, and metrics count it."""
    broker, handler = Broker(), Handler()
    handler.held[4] = asyncio.Event()
    subscription = consuming(broker, handler, batches_at_once=2)
    samples = {
        name: value(f"tripfold_{name}", topic="city-stats")
        for name in ("events_consumed_total", "batch_records_sum", "batch_records_count", "batch_seconds_count")
    }
    spent_s = value("tripfold_batch_seconds_sum", topic="city-stats")
    await broker.deliver(record(4), record(5), record(9, partition=2))
    assert (broker.commits, len(subscription.tracker)) == ([], 3)
    assert time.time() - value("tripfold_last_poll_timestamp_seconds", topic="city-stats") < 60
    handler.held[4].set()
    await asyncio.gather(*subscription.running)
    assert broker.commits == [{TopicPartition("test-city-stats", 0): 6, TopicPartition("test-city-stats", 2): 10}]
    grown = [value(f"tripfold_{name}", topic="city-stats") - before for name, before in samples.items()]
    assert grown == [3, 3, 1, 1]
    assert 0 < value("tripfold_batch_seconds_sum", topic="city-stats") - spent_s < 60


@pytest.mark.parametrize(("batches_at_once", "begun"), [(1, [[0]]), (2, [[0], [1]])])
async def test_no_more_batches_run_at_once_than_asked(batches_at_once: int, begun: list[list[int]]) -> None:
    """The next batch is taken once one has ended; a stop commits nothing of the batch that it ends."""
    broker, handler = Broker(), Handler()
    handler.held = {offset: asyncio.Event() for offset in range(3)}
    subscription = consuming(broker, handler, batches_at_once=batches_at_once)

    async def deliver() -> None:
        for offset in range(3):
            await broker.deliver(record(offset))

    delivering = asyncio.create_task(deliver())
    for _ in range(20):
        await asyncio.sleep(0)
    assert handler.begun == begun
    handler.faults.append(Stopping())
    for held in handler.held.values():
        held.set()
    await delivering
    await asyncio.gather(*subscription.running)
    assert handler.begun == [[0], [1], [2]]
    assert broker.commits == []  # the first batch was stopped, and holds back the others


async def test_a_slow_batch_holds_back_no_more_records_than_the_limit() -> None:
    """Many batches may run at once, but no more records are taken than a crash may deliver again."""
    broker, handler = Broker(), Handler()
    handler.held[0] = asyncio.Event()
    consuming(broker, handler, batches_at_once=5, batch_records_max=UNCOMMITTED_MAX)
    await broker.deliver(*[record(offset) for offset in range(UNCOMMITTED_MAX - 1)])
    delivering = asyncio.create_task(broker.deliver(record(UNCOMMITTED_MAX - 1)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (delivering.done(), len(handler.begun)) == (False, 2)
    handler.held[0].set()
    await delivering
    assert broker.commits == [{TopicPartition("test-city-stats", 0): UNCOMMITTED_MAX}]


@pytest.mark.parametrize(("batches_at_once", "name"), [(1, "batch of city-stats"), (2, "batch of city-stats from 3/8")])
async def test_a_failed_batch_is_tried_again_and_named(batches_at_once: int, name: str) -> None:
    """Health names the topic, and where several batches can fail at once, also the batch's first record."""
    broker, handler, health = Broker(), Handler(), Health()
    seen: list[list[str]] = []
    fault = Fault(lambda: seen.append(list(health.faults)))
    options = {"batches_at_once": batches_at_once} if batches_at_once > 1 else {}  # by default one at a time
    subscription = consuming(broker, fault, health, **options)
    await broker.deliver(record(8, partition=3), record(9, partition=3))
    await asyncio.gather(*subscription.running)
    assert (fault.begun, seen, health.faults) == ([[8, 9], [8, 9]], [[], [name]], {})
    assert broker.commits == [{TopicPartition("test-city-stats", 3): 10}]
    assert handler.begun == []


async def test_batches_that_do_not_end_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop waits for the batches that run, and then cancels those that are left. Without any, it does not wait."""
    monkeypatch.setattr(consumer_module, "SHUTDOWN_GRACE_S", 0.02)
    subscription = subscription_of(Subscriber(Consumer(position=9, end=9)))
    await subscription.drain()
    for seconds in (0, 3_600):
        subscription.start(asyncio.sleep(seconds))
    short, long = sorted(subscription.running, key=lambda task: str(task.get_coro()))
    await subscription.drain()
    await asyncio.wait([short, long])
    assert sorted([short.cancelled(), long.cancelled()]) == [False, True]


class Fault(Handler):
    """Fails once, and calls ``look`` at each try."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.faults = [DependencyUnavailable("away")]
        self._look = look

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        self._look()
        await super().process(batch)


@pytest.mark.parametrize("marked", [True, False])
async def test_a_batch_goes_on_without_a_record_that_an_operator_skips(marked: bool) -> None:
    """A record of a later version blocks its batch, unless a marker sends it to the dead letters."""
    broker, log, store, health = Broker(), MemoryLog(), MemoryStore(lambda: NOON), Health()
    publisher = MemoryPublisher(log)
    retrier = Retrier(health=health, wait_max_s=0)
    batch = [record(3, body=events.encode(STATS)), record(4, body=NEWER), record(5, body=events.encode(STATS))]
    decoded: list[int] = []

    class Decoding(Handler):
        async def process(self, batch: Sequence[ConsumedRecord]) -> None:
            if self.begun:
                retrier.stopping.set()  # a second batch is not a second try
            await super().process(batch)
            decoded.extend(one.record.offset for one in await decode_batch(batch, publisher))

    if marked:
        await mark(store, consumed_records(Topic.CITY_STATS, batch)[1], NOON)
    handler, skip_markers = Decoding(), SkipMarkers(store, publisher) if marked else None
    subscription = consuming(broker, handler, health, retrier=retrier, skip_markers=skip_markers)
    await broker.deliver(*batch)
    await asyncio.gather(*subscription.running)
    assert decoded == ([3, 5] if marked else [])
    assert [one.value for one in log.records(Topic.DEAD_LETTERS)] == ([NEWER] if marked else [])
    assert broker.commits == ([{TopicPartition("test-city-stats", 0): 6}] if marked else [])
    assert all("partition 0, offset 4 of city-stats" in reason for reason in health.faults.values())
    assert bool(health.faults) != marked


async def test_poison_is_a_dead_letter_with_its_error() -> None:
    """A record that is no event is published with its reason, and the rest is decoded in order."""
    log = MemoryLog()
    batch = consumed_records(Topic.CITY_STATS, [record(1, body=b"{"), record(2, body=events.encode(STATS))])
    assert [(one.record, one.event) for one in await decode_batch(batch, MemoryPublisher(log))] == [(batch[1], STATS)]
    (letter,) = log.records(Topic.DEAD_LETTERS)
    with pytest.raises(events.PoisonRecord) as poison:
        events.decode(Topic.CITY_STATS, b"{")
    assert dict(letter.headers)["tripfold_error"].decode() == str(poison.value)
    with pytest.raises(NewerContract, match="partition 0, offset 3 of"):
        await decode_batch(consumed_records(Topic.CITY_STATS, [record(3, body=NEWER)]), MemoryPublisher(log))
