"""The sweep: which requests are sent on their way again, and how often."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

import msgspec
import pytest

from services.aggregate.progress_folding import SWEEP_AGE_MAX, Sweep
from services.api.requests import new_record
from shared import events, keys, objects
from shared.events import ProcessRequested
from shared.identity import RequestId, mint_request_id
from shared.objects import RequestRecord
from shared.publishing import LogUnavailable, Outgoing
from shared.topics import Topic
from tests.fakes import Clock, MemoryLog, MemoryPublisher, MemoryStore

AFTER = dt.timedelta(minutes=15)
DATE = dt.date(2024, 5, 1)


class Swept:
    """A bucket with requests in it, and a sweep whose publishing can be refused."""

    def __init__(self) -> None:
        self.clock = Clock(dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC))
        self.store = MemoryStore(self.clock)
        self.log = MemoryLog()
        self.publisher = RefusingPublisher(self.log)
        self.sweep = Sweep(self.store, self.publisher, clock=self.clock, after=AFTER)

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

    async def publish(self, outgoing: Iterable[Outgoing]) -> None:
        if self.refusing:
            raise LogUnavailable("Kafka is away")
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


async def test_it_is_sent_once_in_a_while() -> None:
    """What was sent again is given the same time again to make progress."""
    swept = Swept()
    stuck = swept.request()
    swept.clock.advance(AFTER.total_seconds())
    await swept.sweep.once()
    swept.clock.advance(AFTER.total_seconds() - 1)
    assert await swept.sweep.once() == 0
    swept.clock.advance(1)
    assert await swept.sweep.once() == 1
    assert swept.sent() == [stuck, stuck]


async def test_what_kafka_did_not_take_is_sent_by_the_next_sweep() -> None:
    """A request counts as sent when it is acknowledged, and not before."""
    swept = Swept()
    stuck = swept.request()
    swept.clock.advance(AFTER.total_seconds())
    swept.publisher.refusing = True
    with pytest.raises(LogUnavailable):
        await swept.sweep.once()
    swept.publisher.refusing = False
    assert await swept.sweep.once() == 1
    assert swept.sent() == [stuck]


async def test_what_made_no_progress_for_a_week_is_let_be() -> None:
    """A request that nothing has moved for a week is not sent for ever, however often it was sent till then."""
    swept = Swept()
    stuck = swept.request()
    for _ in range(int(SWEEP_AGE_MAX / AFTER)):
        swept.clock.advance(AFTER.total_seconds())
        assert await swept.sweep.once() == 1
    assert set(swept.sent()) == {stuck}
    swept.clock.advance(AFTER.total_seconds())
    assert await swept.sweep.once() == 0
    swept.clock.advance(SWEEP_AGE_MAX.total_seconds())
    assert await swept.sweep.once() == 0


async def test_a_week_is_counted_from_the_last_progress() -> None:
    """A request that waited for long until it was taken up, and then stands still, is sent on its way again."""
    swept = Swept()
    late = swept.request()
    key = keys.request(late)
    swept.clock.advance(2 * SWEEP_AGE_MAX.total_seconds())
    record = objects.decode(RequestRecord, swept.store.objects[key].body, key)
    moved = msgspec.structs.replace(record, updated_at=swept.clock(), version=record.version + 1)
    swept.store.write(key, objects.encode(moved))
    swept.clock.advance(AFTER.total_seconds())
    assert await swept.sweep.once() == 1
    assert swept.sent() == [late]
