"""Kafka in virtual time: brokers with latency and outages, and consumer groups with sessions and rebalances.

The services run their own consumer code over it (`shared.kafka.consumer`). Replaced are the clients: FastStream's
subscriber with the aiokafka consumer below it, and the aiokafka producer.

The rules of a group:
- All members give up their partitions when one joins or leaves. They have new ones after at most a heartbeat interval,
  and read on from the committed offsets. A handler in progress goes on.
- A member that is dead, paused or cut off for longer than its session loses its partitions.
- So does a member that takes no records for longer than its poll interval. It joins again when it next takes records.
- Only an owner of a partition can commit its offset.
- Each record that is committed was given to a handler before, or is among the dead letters.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError, KafkaTimeoutError

from shared.domain.topics import Topic
from shared.kafka.dead_letters import ORIGIN_OFFSET_HEADER, ORIGIN_PARTITION_HEADER, ORIGIN_TOPIC_HEADER
from shared.kafka.raw_batches import RawBatch, first_batch
from shared.kafka.records import ConsumedRecord
from tests.fakes.fetching import BATCH_OFFSETS, FetchingConsumer, damaged, fetched
from tests.fakes.log import PARTITIONS, MemoryLog

if TYPE_CHECKING:
    from tests.simulation.processes import Process
    from tests.simulation.simulation import Simulation

REQUEST_TIMEOUT_S = 20.0
LONG_BATCH_S = 170.0
"""A batch that takes so long may lose its consumer its partitions: it exceeds the shortest deadline of a batch."""


class Kafka:
    """The brokers."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.log = MemoryLog()
        self.down_until_s = 0.0
        self.groups: dict[tuple[str, Topic], Group] = {}
        self.handled: set[tuple[Topic, int, int]] = set()

    async def reach(self, process: Process, *, within_s: float) -> bool:
        """Wait until the brokers can be reached from a process, and return whether that was in time."""
        until_s = max(self.down_until_s, process.cut_off_until_s)
        wait_s = until_s - self.simulation.loop.now_s
        await asyncio.sleep(min(max(0.0, wait_s), within_s) + self.simulation.latency_s(0.002, 0.02))
        return wait_s <= within_s

    def is_cut_off(self, process: Process) -> bool:
        """Tell whether a process cannot reach the brokers now."""
        return self.simulation.loop.now_s < max(self.down_until_s, process.cut_off_until_s)

    def append(
        self, topic: Topic, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> ConsumedRecord:
        """Append a record, and wake the consumers."""
        record = self.log.append(topic, key, value, list(headers))
        self.simulation.changed_at_s = self.simulation.loop.now_s
        for group in self.groups.values():
            if group.topic is topic:
                for member in group.members:
                    member.woken.set()
        return record

    def fetch(self, process: Process, topic: Topic, partition: int, offset: int) -> bytes:
        """Return batches of a partition, as a response that may be damaged."""
        if self.is_cut_off(process):
            return b""
        batches = fetched(self.log._since(topic, partition, offset - BATCH_OFFSETS), offset)
        return damaged(batches) if batches and self.simulation.is_unlucky("damaged response") else batches

    async def read_batch(self, process: Process, partition: TopicPartition, offset: int) -> RawBatch | None:
        """Read a batch as `shared.kafka.raw_batches.read_batch` does."""
        await process.go_on()
        if not await self.reach(process, within_s=REQUEST_TIMEOUT_S):
            raise KafkaTimeoutError
        return first_batch(self.fetch(process, Topic(partition.topic), partition.partition, offset), partition, offset)

    def note_handled(self, batch: Sequence[ConsumedRecord]) -> None:
        """Note that a handler was given records."""
        self.handled.update((record.topic, record.partition, record.offset) for record in batch)

    def check_committed(self, group: Group, partition: int, offset: int) -> None:
        """Complain about records that are committed, and that no handler was given."""
        begin = group.committed[partition]
        records = self.log._since(group.topic, partition, begin)
        places = {(record.topic, record.partition, record.offset) for record in records if record.offset < offset}
        lost = places - self.handled
        if lost and (lost := lost - self._dead_letters()):
            self.simulation.complain(
                f"{group.name} committed {offset}, and no handler was given {sorted(lost, key=str)}"
            )

    def _dead_letters(self) -> set[tuple[Topic, int, int]]:
        headers = [dict(letter.headers) for letter in self.log.records(Topic.DEAD_LETTERS)]
        return {
            (
                Topic(one[ORIGIN_TOPIC_HEADER].decode()),
                int(one[ORIGIN_PARTITION_HEADER]),
                int(one[ORIGIN_OFFSET_HEADER]),
            )
            for one in headers
        }

    def group(self, name: str, topic: Topic) -> Group:
        """Return a consumer group."""
        return self.groups.setdefault((name, topic), Group(self, name, topic))

    @property
    def unread(self) -> dict[str, int]:
        """The number of records that the members of each group have not taken."""
        found = {f"{group.name} of {group.topic.value}": group.unread for group in self.groups.values()}
        return {name: records for name, records in found.items() if records}


class Group:
    """A consumer group of one topic, and its committed offsets."""

    def __init__(self, kafka: Kafka, name: str, topic: Topic) -> None:
        self.kafka = kafka
        self.name = name
        self.topic = topic
        self.committed = dict.fromkeys(range(PARTITIONS), 0)
        self.members: list[Consumer] = []
        self._rebalancing: asyncio.TimerHandle | None = None

    @property
    def unread(self) -> int:
        """The number of records that no member has taken. A record whose commit failed counts no more."""
        positions = dict(self.committed)
        for member in self.members:
            positions |= member.positions()
        return sum(max(0, end - positions[one]) for one, end in self.kafka.log.ends(self.topic).items())

    def join(self, consumer: Consumer) -> None:
        """Add a member."""
        if consumer not in self.members:
            self.members.append(consumer)
            self._rebalance(consumer)

    def leave(self, consumer: Consumer) -> None:
        """Remove a member."""
        if consumer in self.members:
            self.members.remove(consumer)
            consumer.reassign({})
            self._rebalance(consumer)

    def _rebalance(self, cause: Consumer) -> None:
        if self._rebalancing is not None:
            self._rebalancing.cancel()
        simulation = self.kafka.simulation
        delay_s = simulation.random.uniform(0.05, cause.heartbeat_s)
        self._rebalancing = simulation.loop.call_later(delay_s, self._assign)

    def _assign(self) -> None:
        self._rebalancing = None
        for number, member in enumerate(self.members):
            partitions = range(number, PARTITIONS, len(self.members))
            member.reassign({partition: self.committed[partition] for partition in partitions})


class Consumer(FetchingConsumer):
    """A consumer with the methods of aiokafka's that the services use."""

    def __init__(
        self,
        process: Process,
        group: Group,
        name: str,
        *,
        listener: Any,
        session_s: float,
        heartbeat_s: float,
        poll_interval_s: float,
    ) -> None:
        super().__init__(name, lambda partition, at: group.kafka.fetch(process, group.topic, partition, at))
        self._listener = listener
        self._process = process
        self._group = group
        self._kafka = group.kafka
        self._name = name
        self._session_s = session_s
        self.heartbeat_s = heartbeat_s
        self._poll_interval_s = poll_interval_s
        self.woken = asyncio.Event()
        self._polled_s = self._heard_s = self._kafka.simulation.loop.now_s
        self._waiting = False
        self._heartbeat = self._kafka.simulation.loop.call_later(heartbeat_s, self._beat)
        group.join(self)

    def close(self) -> None:
        """Leave the group."""
        self._heartbeat.cancel()
        self._group.leave(self)

    def _beat(self) -> None:
        """Do what the client and the brokers do once in a heartbeat interval."""
        simulation, process = self._kafka.simulation, self._process
        now_s = simulation.loop.now_s
        if now_s < self._kafka.down_until_s:
            self._heard_s = now_s  # brokers that start again give each member a new session
        silent = process.dead or now_s < process.paused_until_s or self._kafka.is_cut_off(process)
        if self in self._group.members:
            silence_ended_s = max(process.paused_until_s, process.cut_off_until_s, self._kafka.down_until_s)
            busy_s = 0.0 if self._waiting or silent else now_s - self._polled_s
            if now_s - self._heard_s > self._session_s:
                self._lose(explained=silent or silence_ended_s > self._heard_s)
            elif busy_s > self._poll_interval_s:
                self._lose(explained=busy_s > LONG_BATCH_S or silence_ended_s > self._polled_s)
        if not silent:
            self._heard_s = now_s
        if not process.dead or self in self._group.members:
            self._heartbeat = simulation.loop.call_later(self.heartbeat_s, self._beat)

    def _lose(self, *, explained: bool) -> None:
        if not explained:
            self._kafka.simulation.complain(f"{self._process.name} lost its partitions of {self._name} while it worked")
        self._group.leave(self)
        self.woken.set()

    def positions(self) -> dict[int, int]:
        """Return the next offset of each assigned partition."""
        return {one.partition: self._subscriptions._assigned_state(one).position for one in self.assignment()}

    def reassign(self, positions: dict[int, int]) -> None:
        """Have other partitions from now on."""
        self.assign(positions)
        self._listener.on_partitions_assigned(self.assignment())
        self.woken.set()

    def _poll(self) -> None:
        self._polled_s = self._kafka.simulation.loop.now_s
        if not self._process.dead and not self._kafka.is_cut_off(self._process):
            if self not in self._group.members:
                self._heard_s = self._polled_s
            self._group.join(self)

    def _ready(self) -> bool:
        self.fetch()
        return bool(self._records)

    async def getmany(
        self, *partitions: TopicPartition, timeout_ms: int = 0, max_records: int | None = None
    ) -> dict[TopicPartition, list[ConsumerRecord[bytes, bytes]]]:
        """Take records. With a timeout, wait until there may be some: aiokafka would be asked again and again."""
        await self._process.go_on()
        self._poll()
        while timeout_ms and not self._ready():
            absent = self not in self._group.members or self._kafka.is_cut_off(self._process)
            self._waiting = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.heartbeat_s if absent or self.paused() else None):
                    await self.woken.wait()
            self._waiting = False
            self.woken.clear()
            await self._process.go_on()
            self._poll()
            if self.paused():
                break
        return await super().getmany(*partitions, max_records=max_records)

    async def position(self, partition: TopicPartition) -> int:
        """Return the next offset to read."""
        if partition not in self.assignment():
            raise IllegalStateError(f"{partition} is not assigned")
        return await super().position(partition)

    async def end_offsets(self, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
        """Return the ends of partitions."""
        await self._process.go_on()
        if not await self._kafka.reach(self._process, within_s=REQUEST_TIMEOUT_S):
            raise KafkaTimeoutError
        ends = self._kafka.log.ends(self._group.topic)
        return {one: ends[one.partition] for one in partitions}

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        """Commit offsets."""
        await self._process.go_on()
        simulation = self._kafka.simulation
        if not await self._kafka.reach(self._process, within_s=REQUEST_TIMEOUT_S):
            raise KafkaTimeoutError
        await self._process.go_on()
        if not offsets.keys() <= self.assignment():
            raise CommitFailedError
        if simulation.is_unlucky("commit refused"):
            raise KafkaConnectionError
        for partition, offset in offsets.items():
            self._kafka.check_committed(self._group, partition.partition, offset)
            self._group.committed[partition.partition] = offset
        if simulation.is_unlucky("commit response lost"):
            raise KafkaTimeoutError


class Subscriber:
    """A subscriber of FastStream without a handler: it starts and stops a consumer."""

    def __init__(self, process: Process, topic: str, options: dict[str, Any]) -> None:
        self._process = process
        self._topic = topic
        self._options = options
        self.consumer: Consumer | None = None

    async def start(self) -> None:
        """Create a consumer."""
        await self._process.go_on()
        kafka = self._process.simulation.kafka
        if not await kafka.reach(self._process, within_s=REQUEST_TIMEOUT_S):
            raise KafkaConnectionError
        self.consumer = Consumer(
            self._process,
            kafka.group(self._options["group_id"], Topic(self._topic)),
            self._topic,
            listener=self._options["listener"],
            session_s=self._options["session_timeout_ms"] / 1000,
            heartbeat_s=self._options["heartbeat_interval_ms"] / 1000,
            poll_interval_s=self._options["max_poll_interval_ms"] / 1000,
        )

    async def stop(self) -> None:
        """Leave the group."""
        if self.consumer is not None:
            await self._process.go_on()
            self.consumer.close()
        self.consumer = None


class SimulatedBroker:
    """FastStream's broker of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.subscribers: list[Subscriber] = []

    def subscriber(self, topic: str, **options: Any) -> Subscriber:
        """Add a subscriber."""
        subscriber = Subscriber(self._process, topic, options)
        self.subscribers.append(subscriber)
        return subscriber

    async def connect(self) -> None:
        """Do nothing: each subscriber has a connection of its own."""

    async def stop(self) -> None:
        """Stop all subscribers."""
        for subscriber in self.subscribers:
            await subscriber.stop()


class SimulatedProducer:
    """A producer with the methods of aiokafka's that the services use. It keeps the order of its records."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._kafka = process.simulation.kafka
        self._due_s = 0.0

    async def send(
        self, topic: str, value: bytes | None, key: bytes | None, *, headers: list[tuple[str, bytes]]
    ) -> asyncio.Future[None]:
        """Send a record. The future ends with its acknowledgement."""
        await self._process.go_on()
        simulation, loop = self._kafka.simulation, self._kafka.simulation.loop
        acknowledged: asyncio.Future[None] = loop.create_future()
        refused = simulation.is_unlucky("record refused")
        reachable_s = max(self._kafka.down_until_s, self._process.cut_off_until_s, loop.now_s)
        timely = reachable_s - loop.now_s <= REQUEST_TIMEOUT_S and not refused
        if timely:
            self._due_s = max(self._due_s, reachable_s + simulation.latency_s(0.001, 0.01))
            loop.call_at(self._due_s, self._kafka.append, Topic(topic), key, value, headers)
        if timely and not simulation.is_unlucky("acknowledgement lost"):
            loop.call_at(self._due_s + simulation.latency_s(0.001, 0.01), _resolve, acknowledged, None)
        else:
            loop.call_at(loop.now_s + REQUEST_TIMEOUT_S, _resolve, acknowledged, KafkaTimeoutError())
        return acknowledged

    async def stop(self) -> None:
        """Stop the producer."""


def _resolve(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
