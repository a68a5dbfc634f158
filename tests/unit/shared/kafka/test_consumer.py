"""Batches: which run at once, how failed ones are tried again, and what is committed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from faststream import AckPolicy

from shared.domain import events
from shared.domain.events import NewerContract
from shared.domain.topics import METADATA_AGE_MAX_MS, RECORD_BYTES_MAX, Topic
from shared.kafka import consumer as consumer_module
from shared.kafka.consumer import (
    UNCOMMITTED_MAX,
    consume,
    decode_batch,
    make_broker,
)
from shared.kafka.failed_keys import KeyResult
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.kafka.skip_markers import SkipMarkers, mark
from shared.kafka.subscription import SHUTDOWN_GRACE_S, Subscription
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier, Stopping
from shared.runtime.settings import Settings, load_settings
from tests.fakes.bucket import NOON
from tests.fakes.builders import STATS
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore

NEWER = b'{"type":"forecast","schema_version":2}'


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

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        self.begun.append([one.offset for one in batch])
        if batch[0].offset in self.held:
            await self.held[batch[0].offset].wait()
        if self.faults:
            raise self.faults.pop(0)
        return ()


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
            "store": MemoryStore(lambda: NOON),
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


class Fault(Handler):
    """Fails once, and calls ``look`` at each try."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__()
        self.faults = [DependencyUnavailable("away")]
        self._look = look

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        self._look()
        return await super().process(batch)


@pytest.mark.parametrize("marked", [True, False])
async def test_a_batch_goes_on_without_a_record_that_an_operator_skips(marked: bool) -> None:
    """A record of a later version blocks its batch, unless a marker sends it to the dead letters."""
    broker, log, store, health = Broker(), MemoryLog(), MemoryStore(lambda: NOON), Health()
    publisher = MemoryPublisher(log)
    retrier = Retrier(health=health, wait_max_s=0)
    batch = [record(3, body=events.encode(STATS)), record(4, body=NEWER), record(5, body=events.encode(STATS))]
    decoded: list[int] = []

    class Decoding(Handler):
        async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
            if self.begun:
                retrier.stopping.set()  # a second batch is not a second try
            await super().process(batch)
            decoded.extend(one.record.offset for one in await decode_batch(batch, publisher))
            return ()

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
