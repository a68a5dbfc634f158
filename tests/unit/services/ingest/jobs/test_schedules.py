"""A planner's look at the schedules: the deadlines of dates."""

from __future__ import annotations

import datetime as dt

import pytest
import structlog

from services.ingest.jobs.schedules import ScheduleRunner
from shared.domain import keys, objects
from shared.domain.objects import Deadline, Schedule
from shared.storage import backfills
from tests.fakes.builders import Clock, daily_schedule
from tests.fakes.store import MemoryStore

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


async def test_a_late_date_is_marked_while_no_run_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open backfills delay a run that is due, and hide no date that is late already."""
    monkeypatch.setattr(backfills, "OPEN_MAX", 0)
    yesterday = Deadline(date=dt.date(2024, 4, 30), at=NOW - DAY)
    made = daily_schedule(NOW - DAY, complete_by=dt.time(9), deadlines=(yesterday,))
    store = MemoryStore(lambda: NOW)
    key = keys.schedule("daily")
    store.write(key, objects.encode(made))
    with structlog.testing.capture_logs() as logged:
        await ScheduleRunner(store, clock=Clock(NOW)).once()
    assert "schedule_waits" in [line["event"] for line in logged]
    stored = objects.decode(Schedule, store.objects[key].body, key)
    assert yesterday.date in {one.date for one in stored.deadlines if one.late}
    assert stored.run is not None
    assert not stored.run.started


async def test_a_schedule_that_cannot_be_used_does_not_stop_the_others() -> None:
    """A schedule of a time zone that no longer exists is logged by its key, and the next one runs."""
    store = MemoryStore(lambda: NOW)
    for made in (daily_schedule(NOW - DAY, name="a", timezone="Mars/Base"), daily_schedule(NOW - DAY)):
        store.write(keys.schedule(made.name), objects.encode(made))
    with structlog.testing.capture_logs() as logged:
        await ScheduleRunner(store, clock=Clock(NOW)).once()
    assert [line["event"] for line in logged] == ["schedule_unreadable", "schedule_run"]
    assert keys.schedule("a") in logged[0]["error"]
