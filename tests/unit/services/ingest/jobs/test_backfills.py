"""A planner's step of a backfill over damaged records."""

from __future__ import annotations

import datetime as dt

import pytest
import structlog

from services.ingest.jobs.backfills import BackfillAdvancer
from shared.domain import keys, objects, schema
from shared.domain.backfills import date_at, new_backfill, request_id_of
from shared.domain.ids import mint_request_id
from shared.domain.objects import Backfill, BackfillStatus
from shared.storage.backfills import open_backfill
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
FIRST = dt.date(2024, 5, 1)
NEWER = b'{"schema_version":%d,"later":1}' % (schema.SCHEMA_VERSION + 1)


@pytest.mark.parametrize(
    ("body", "status", "event"),
    [
        (b"{", BackfillStatus.COMPLETED_WITH_FAILURES, "object_unreadable"),
        (NEWER, BackfillStatus.RUNNING, "backfill_unreadable"),
    ],
)
async def test_a_damaged_record_fails_its_date_and_a_newer_one_waits(
    body: bytes, status: BackfillStatus, event: str
) -> None:
    """The log names the record. A record of a later build is no failure: a planner of that build can read it."""
    store = MemoryStore(lambda: NOW)
    backfill = await open_backfill(store, new_backfill(mint_request_id(NOW), FIRST, FIRST, now=NOW))
    publisher = MemoryPublisher(MemoryLog(), source="planner")
    advancer = BackfillAdvancer(store, publisher, clock=Clock(NOW), stalled_after=dt.timedelta(minutes=10))
    await advancer.once()
    record = keys.request(request_id_of(backfill, date_at(backfill, 0)))
    assert record in store.objects
    store.write(record, body)
    with structlog.testing.capture_logs() as logged:
        await advancer.once()
    key = keys.backfill(backfill.backfill_id)
    assert objects.decode(Backfill, store.objects[key].body, key).status is status
    assert [line["event"] for line in logged if record in str(line)] == [event]
