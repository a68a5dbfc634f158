"""The sweep: which requests are sent on their way again, and how often."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import msgspec
import pytest

from services.aggregate.requests.requeue import REQUEUE_WAIT_MAX, Requeue
from shared.domain import events, keys, objects
from shared.domain.events import ProcessRequested
from shared.domain.ids import RequestId, mint_request_id
from shared.domain.objects import RequestRecord
from shared.domain.requests import new_record
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import OutgoingEvent
from shared.storage.object_store import StoredObject
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore

AFTER = dt.timedelta(minutes=15)
DATE = dt.date(2024, 5, 1)


class ObservedStore(MemoryStore):
    """A store that notes which objects are read."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.reads: list[str] = []

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self.reads.append(key)
        return await super().get(key, first_bytes=first_bytes)


class Swept:
    """A bucket with requests in it, and a sweep whose publishing can be refused."""

    def __init__(self) -> None:
        self.clock = Clock(dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC))
        self.store = ObservedStore(self.clock)
        self.log = MemoryLog()
        self.publisher = RefusingPublisher(self.log)
        self.sweep = Requeue(self.store, self.publisher, clock=self.clock, after=AFTER)

    def request(self, *, ended: bool = False) -> RequestId:
        """Write the record of a request that is made now."""
        record = new_record(mint_request_id(self.clock()), DATE)
        if ended:
            record = msgspec.structs.replace(record, planned=True)  # of no cities
        self.store.write(keys.request(record.request_id), objects.encode(record))
        return record.request_id

    def sent(self) -> list[str]:
        """Return the ids of the requests in their topic, in order."""
        decoded = [events.decode(record.topic, record.value) for record in self.log.records(Topic.PROCESS_REQUESTS)]
        return [event.request_id for event in decoded if isinstance(event, ProcessRequested)]


class RefusingPublisher(MemoryPublisher):
    """Publishes unless it is told to refuse."""

    refusing = False

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        if self.refusing:
            raise KafkaUnavailable("Kafka is away")
        await super().publish(outgoing)


async def test_only_what_has_stood_still_for_long_is_sent_again() -> None:
    """A request that makes progress, or has ended, is left alone, and hides no older one that stands still."""
    swept = Swept()
    stuck = swept.request()
    swept.request(ended=True)
    swept.clock.advance(AFTER.total_seconds())
    swept.request()  # the latest are listed first
    assert await swept.sweep.once() == 1
    assert swept.sent() == [stuck]


async def test_each_time_it_waits_twice_as_long() -> None:
    """What was sent again is given as long again to make progress as it has made none, and a day at most."""
    swept = Swept()
    stuck = swept.request()
    sent_at = []
    for quarter in range(1, 4 * 24 * 30):
        swept.clock.advance(AFTER.total_seconds())
        if await swept.sweep.once():
            sent_at.append(quarter)
    assert sent_at[:7] == [1, 2, 4, 8, 16, 32, 64]
    a_day = REQUEUE_WAIT_MAX // AFTER
    assert sent_at[7:] == list(range(128, 4 * 24 * 30, a_day))
    assert swept.sent() == [stuck] * len(sent_at)


async def test_progress_begins_it_anew() -> None:
    """A request that moves after it was sent again, and then stands still, is due as soon as a new one."""
    swept = Swept()
    stuck = swept.request()
    swept.clock.advance(30 * REQUEUE_WAIT_MAX.total_seconds())
    assert await swept.sweep.once() == 1
    key = keys.request(stuck)
    record = objects.decode(RequestRecord, swept.store.objects[key].body, key)
    moved = msgspec.structs.replace(record, updated_at=swept.clock(), version=record.version + 1)
    swept.store.write(key, objects.encode(moved))
    swept.clock.advance(AFTER.total_seconds() - 1)
    assert await swept.sweep.once() == 0
    swept.clock.advance(1)
    assert await swept.sweep.once() == 1


async def test_what_has_ended_is_read_once() -> None:
    """A record that has ended is read by one sweep; one that is taken up again, by the next, too."""
    swept = Swept()
    ended = swept.request(ended=True)
    swept.clock.advance(AFTER.total_seconds())
    await swept.sweep.once()
    await swept.sweep.once()
    assert swept.store.reads == [keys.request(ended)]
    key = keys.request(ended)
    record = objects.decode(RequestRecord, swept.store.objects[key].body, key)
    swept.store.write(key, objects.encode(msgspec.structs.replace(record, planned=False)))
    swept.clock.advance(AFTER.total_seconds())
    assert await swept.sweep.once() == 1
    assert swept.sent() == [ended]


async def test_what_kafka_did_not_take_is_sent_by_the_next_sweep() -> None:
    """A request counts as sent when it is acknowledged, and not before."""
    swept = Swept()
    stuck = swept.request()
    swept.clock.advance(AFTER.total_seconds())
    swept.publisher.refusing = True
    with pytest.raises(KafkaUnavailable):
        await swept.sweep.once()
    swept.publisher.refusing = False
    assert await swept.sweep.once() == 1
    assert swept.sent() == [stuck]
