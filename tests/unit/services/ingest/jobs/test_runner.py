"""How often a planner looks at backfills and schedules, and that it goes on after an outage."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

import pytest
import structlog

from services.ingest.jobs.backfills import BackfillAdvancer
from services.ingest.jobs.runner import SCHEDULES_INTERVAL_S, JobRunner
from services.ingest.jobs.schedules import ScheduleRunner
from shared.domain import keys
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.storage.object_store import ObjectInfo, StoredObject, StoreUnavailable
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore

NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)


class SimulatedRetrier(Retrier):
    """Sleeps in simulated time, and is asked to stop after ``until_s``."""

    def __init__(self, until_s: float) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self._now_s = 1_000.0
        self._until_s = self._now_s + until_s

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        self._now_s += seconds
        if self._now_s > self._until_s:
            self.stopping.set()


class ObservedStore(MemoryStore):
    """Counts the looks at the open backfills and at the schedules, and is down at the first ones."""

    def __init__(self, *, down_for: int = 0) -> None:
        super().__init__(lambda: NOW)
        self.looks = 0
        self.listings = 0
        self._down_for = down_for

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self.looks += key == keys.OPEN_BACKFILLS
        if self.looks <= self._down_for:
            raise StoreUnavailable("S3 is down")
        return await super().get(key, first_bytes=first_bytes)

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        self.listings += prefix == keys.SCHEDULES
        return super().list(prefix, after=after)


async def run_for(seconds: float, store: ObservedStore, *, interval_s: float) -> None:
    """Run the jobs of a planner for a simulated time."""
    backfills = BackfillAdvancer(
        store, MemoryPublisher(MemoryLog(), source="planner"), clock=Clock(NOW), stalled_after=dt.timedelta(minutes=10)
    )
    runner = JobRunner(backfills, ScheduleRunner(store, clock=Clock(NOW)), interval_s=interval_s)
    await runner.run(SimulatedRetrier(seconds))


async def test_schedules_are_looked_at_less_often_than_backfills() -> None:
    """In two minutes at two seconds, backfills are looked at 60 to 120 times, and schedules every ten seconds."""
    store = ObservedStore()
    await run_for(120, store, interval_s=2)
    assert 60 <= store.looks <= 120
    assert 120 / (SCHEDULES_INTERVAL_S + 2) <= store.listings <= 120 / SCHEDULES_INTERVAL_S + 1


@pytest.mark.filterwarnings("error")
async def test_an_outage_is_retried() -> None:
    """After an outage of S3 the planner goes on."""
    with structlog.testing.capture_logs():
        store = ObservedStore(down_for=3)
        await run_for(60, store, interval_s=2)
    assert store.looks > 10
