"""Requeue of stalled requests: which requests are published again, and how often."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterable

import msgspec
import pytest
import structlog

from services.aggregate.requests.requeue import REQUEUE_WAIT_MAX, Requeue
from shared.domain import events, keys, objects
from shared.domain.events import ProcessRequested
from shared.domain.ids import RequestId, mint_request_id
from shared.domain.objects import RequestRecord
from shared.domain.requests import new_record
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import OutgoingEvent
from shared.storage.object_store import ObjectInfo, StoredObject
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore

AFTER = dt.timedelta(minutes=15)
LISTED_MAX = 10
DATE = dt.date(2024, 5, 1)


class ObservedStore(MemoryStore):
    """A store that records which objects are read, and counts those that are listed."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.reads: list[str] = []
        self.listed = 0

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self.reads.append(key)
        return await super().get(key, first_bytes=first_bytes)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        async for listed in super().list(prefix, after=after):
            self.listed += 1
            yield listed


class RequeueWorld:
    """A bucket with requests, and a requeue whose publishing can be refused."""

    def __init__(self) -> None:
        self.clock = Clock(dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC))
        self.store = ObservedStore(self.clock)
        self.log = MemoryLog()
        self.publisher = RefusingPublisher(self.log)
        self.requeue = Requeue(self.store, self.publisher, clock=self.clock, after=AFTER, listed_max=LISTED_MAX)

    def request(self, *, ended: bool = False, planned: bool = False) -> RequestId:
        """Write the record of a request that is made now."""
        record = new_record(mint_request_id(self.clock()), DATE)
        record = msgspec.structs.replace(record, planned=ended or planned, cities=int(planned))
        self.store.write(keys.request(record.request_id), objects.encode(record))
        return record.request_id

    def end(self, request_id: RequestId) -> None:
        """End a request: its plan has no cities."""
        key = keys.request(request_id)
        record = objects.decode(RequestRecord, self.store.objects[key].body, key)
        self.store.write(key, objects.encode(msgspec.structs.replace(record, planned=True)))

    def sent(self) -> list[str]:
        """Return the ids of the requests in their topic, in order."""
        decoded = [events.decode(record.topic, record.value) for record in self.log.records(Topic.PROCESS_REQUESTS)]
        return [event.request_id for event in decoded if isinstance(event, ProcessRequested)]


class RefusingPublisher(MemoryPublisher):
    """A publisher that refuses events while ``refusing`` is set."""

    refusing = False

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        if self.refusing:
            raise KafkaUnavailable("Kafka is away")
        await super().publish(outgoing)


def requeued() -> float:
    """Return how many requests were requeued."""
    return value("tripfold_requeued_requests_total")


async def test_only_stalled_requests_are_requeued() -> None:
    """A stalled request is requeued, counted and logged; one with progress, or that has ended, is not."""
    world = RequeueWorld()
    before = requeued()
    stuck = world.request()
    world.request(ended=True)
    world.clock.advance(AFTER.total_seconds())
    world.request()  # the latest are listed first
    with structlog.testing.capture_logs() as logged:
        assert await world.requeue.once() == 1
    assert world.sent() == [stuck]
    assert requeued() == before + 1
    assert [(line["event"], line["request_id"], line["date"]) for line in logged] == [
        ("request_requeued", stuck, "2024-05-01")
    ]


async def test_each_wait_is_twice_as_long_up_to_a_day() -> None:
    """A requeued request waits as long again as it has made no progress, and at most a day."""
    world = RequeueWorld()
    stuck = world.request()
    sent_at = []
    for quarter in range(1, 4 * 24 * 30):
        world.clock.advance(AFTER.total_seconds())
        if await world.requeue.once():
            sent_at.append(quarter)
    assert sent_at[:7] == [1, 2, 4, 8, 16, 32, 64]
    a_day = REQUEUE_WAIT_MAX // AFTER
    assert sent_at[7:] == list(range(128, 4 * 24 * 30, a_day))
    assert world.sent() == [stuck] * len(sent_at)


async def test_progress_resets_the_wait() -> None:
    """A requeued request that makes progress and stalls again is due as soon as a new one."""
    world = RequeueWorld()
    stuck = world.request()
    world.clock.advance(30 * REQUEUE_WAIT_MAX.total_seconds())
    assert await world.requeue.once() == 1
    key = keys.request(stuck)
    record = objects.decode(RequestRecord, world.store.objects[key].body, key)
    moved = msgspec.structs.replace(record, updated_at=world.clock(), version=record.version + 1)
    world.store.write(key, objects.encode(moved))
    world.clock.advance(AFTER.total_seconds() - 1)
    assert await world.requeue.once() == 0
    world.clock.advance(1)
    assert await world.requeue.once() == 1


async def test_an_ended_record_is_read_once() -> None:
    """The record of an ended request is read once; after a retry it is read again."""
    world = RequeueWorld()
    ended = world.request(ended=True)
    world.clock.advance(AFTER.total_seconds())
    await world.requeue.once()
    await world.requeue.once()
    assert world.store.reads == [keys.request(ended)]
    key = keys.request(ended)
    record = objects.decode(RequestRecord, world.store.objects[key].body, key)
    world.store.write(key, objects.encode(msgspec.structs.replace(record, planned=False)))
    world.clock.advance(AFTER.total_seconds())
    assert await world.requeue.once() == 1
    assert world.sent() == [ended]


async def test_any_number_of_later_records_hides_no_open_request() -> None:
    """An old open request is requeued and counted, whatever was requested since; once it ends, it counts no longer."""
    world = RequeueWorld()
    hidden = world.request()
    for _ in range(5 * LISTED_MAX):
        world.clock.advance(1)
        world.request(ended=True)
    for _ in range(3):
        world.clock.advance(AFTER.total_seconds())
        await world.requeue.once()
    assert world.sent() == [hidden, hidden]
    assert exported()["accepted"] == 1
    world.end(hidden)
    await world.requeue.once()
    assert exported()["accepted"] == 0


async def test_an_old_request_is_found_when_it_opens_late() -> None:
    """A request of a backfill has the age of the backfill: its record may appear behind any number of others."""
    world = RequeueWorld()
    late = world.request()
    record = world.store.objects.pop(keys.request(late)).body
    for _ in range(3 * LISTED_MAX):
        world.clock.advance(60)
        world.request(ended=True)
    await world.requeue.once()
    world.store.write(keys.request(late), record)
    world.clock.advance(AFTER.total_seconds())
    assert [await world.requeue.once() for _ in range(4)] == [0, 0, 0, 1]
    assert world.sent() == [late]


async def test_a_long_history_costs_two_pages_a_look() -> None:
    """Looks list two pages on average, and read each of a thousand ended requests once."""
    world = RequeueWorld()
    for _ in range(100 * LISTED_MAX):
        world.clock.advance(60)
        world.request(ended=True)
    await world.requeue.once()
    world.store.listed = 0
    looks = 10 * 101
    for _ in range(looks):
        world.clock.advance(60)
        await world.requeue.once()
    assert world.store.listed / looks < 2 * LISTED_MAX + 1
    assert len(world.store.reads) < 101 * LISTED_MAX


async def test_a_refused_publish_is_repeated_by_the_next_requeue() -> None:
    """A request counts as requeued only after Kafka acknowledges the event."""
    world = RequeueWorld()
    stuck = world.request()
    world.clock.advance(AFTER.total_seconds())
    world.publisher.refusing = True
    with pytest.raises(KafkaUnavailable):
        await world.requeue.once()
    world.publisher.refusing = False
    assert await world.requeue.once() == 1
    assert world.sent() == [stuck]


async def test_open_requests_are_exported_by_status() -> None:
    """The metrics show how many requests are open, and the age of the oldest; an ended one no longer counts."""
    world = RequeueWorld()
    oldest = world.request()
    world.clock.advance(60)
    world.request(ended=True)
    world.request(planned=True)
    world.clock.advance(30)
    await world.requeue.once()
    assert exported() == {"accepted": 1, "planned": 1, "running": 0, "oldest": 90}
    world.end(oldest)
    await world.requeue.once()
    assert exported() == {"accepted": 0, "planned": 1, "running": 0, "oldest": 30}


def exported() -> dict[str, float]:
    """Return the open requests as the metrics show them."""
    counts = {status: value("tripfold_open_requests", status=status) for status in ("accepted", "planned", "running")}
    return counts | {"oldest": value("tripfold_oldest_open_request_age_seconds")}


async def test_an_unreadable_record_holds_back_no_other() -> None:
    """A stalled request is requeued beside an unreadable record, which is logged once."""
    world = RequeueWorld()
    stuck = world.request()
    damaged = keys.request(world.request())
    world.store.write(damaged, b"{")
    world.clock.advance(AFTER.total_seconds())
    with structlog.testing.capture_logs() as logged:
        assert await world.requeue.once() == 1
        await world.requeue.once()
    assert world.sent() == [stuck]
    assert [line["key"] for line in logged if line["event"] == "object_unreadable"] == [damaged]
