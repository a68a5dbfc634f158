"""The worker's tasks: different city-days at the same time, one city-day in order. A stop waits for no file."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import cast

import pytest

from services.ingest.worker.city_day import CityDayIngest
from services.ingest.worker.worker import Worker
from shared.domain import events
from shared.domain.events import IngestCity
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.runtime.health import Health
from shared.runtime.retry import Retrier, Stopping
from shared.storage.object_store import StoreUnavailable
from tests.fakes.handling import handle_all
from tests.fakes.log import MemoryLog, MemoryPublisher

FIRST = dt.date(2024, 5, 1)
SECOND = dt.date(2024, 5, 2)


class SlowIngest:
    """Ingests city-days that last until ``end`` is set, and lists those in progress and those done."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.running: list[tuple[dt.date, str]] = []
        self.done: list[tuple[dt.date, str]] = []

    async def run(self, task: IngestCity) -> None:
        """Ingest one city-day, as CityDayIngest does."""
        city_day = (task.date, str(task.city_id))
        self.running.append(city_day)
        await self.end.wait()
        self.running.remove(city_day)
        self.done.append(city_day)

    async def end_attempt(self, task: IngestCity) -> None:
        """Remove no note: it wrote none."""


def task_of(date: dt.date, city: str, *, offset: int = 0) -> ConsumedRecord:
    """Return the record of a task."""
    task = IngestCity(
        request_id=mint_request_id(utc_now()),
        date=date,
        city_id=CityId(city),
        upstream_id=city,
        city_name=f"City {city}",
        country=CountrySlug("peru"),
        country_name="Peru",
        plan_revision=1,
        position=offset,
    )
    return ConsumedRecord(topic=Topic.CITY_TASKS, partition=0, offset=offset, key=None, value=events.encode(task))


def worker_over(ingest: SlowIngest, retrier: Retrier | None = None) -> Worker:
    """Wire a worker to the ingest."""
    return Worker(
        cast(CityDayIngest, ingest),
        MemoryPublisher(MemoryLog(), source="test"),
        retrier=retrier or Retrier(health=Health(), wait_max_s=1),
    )


async def test_different_city_days_run_at_the_same_time() -> None:
    """Two cities of a date, and one city of two dates, are in progress together."""
    ingest = SlowIngest()
    worker = worker_over(ingest)
    city_days = [(FIRST, "0"), (FIRST, "1"), (SECOND, "0")]
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for date, city in city_days:
            tasks.create_task(handle_all(worker.process, [task_of(date, city)]))
        while len(ingest.running) < len(city_days):  # noqa: ASYNC110  # the test waits for this state
            await asyncio.sleep(0)
        ingest.end.set()
    assert sorted(ingest.done) == sorted(city_days)


async def test_tasks_of_one_city_day_run_one_after_the_other() -> None:
    """A second task of a city-day starts when the first has ended, so that it downloads nothing twice."""
    ingest = SlowIngest()
    worker = worker_over(ingest)
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for offset in range(2):
            tasks.create_task(handle_all(worker.process, [task_of(FIRST, "0", offset=offset)]))
        tasks.create_task(handle_all(worker.process, [task_of(FIRST, "1")]))
        while (FIRST, "1") not in ingest.running:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        assert ingest.running.count((FIRST, "0")) == 1
        ingest.end.set()
    assert ingest.done.count((FIRST, "0")) == 2


async def test_a_bug_that_one_city_day_triggers_is_raised_for_it_alone() -> None:
    """The worker does not try it again by itself, so that its city-day can be set aside. An outage is raised."""

    class FailingIngest(SlowIngest):
        async def run(self, task: IngestCity) -> None:
            if str(task.city_id) == "0":
                raise TypeError("no")
            if str(task.city_id) == "1":
                raise StoreUnavailable("away")
            self.done.append((task.date, str(task.city_id)))

    ingest = FailingIngest()
    results = await worker_over(ingest).process([task_of(FIRST, "0"), task_of(FIRST, "2", offset=1)])
    assert [(one.key, repr(one.error)) for one in results] == [
        (f"{FIRST}/0", "TypeError('no')"),
        (f"{FIRST}/2", "None"),
    ]
    with pytest.raises(StoreUnavailable):
        await worker_over(ingest).process([task_of(FIRST, "1")])


async def test_a_stopping_worker_does_not_wait_for_downloads() -> None:
    """However long a file would still take, its task is given back at once, uncommitted."""
    ingest = SlowIngest()
    retrier = Retrier(health=Health(), wait_max_s=1)
    processing = asyncio.create_task(handle_all(worker_over(ingest, retrier).process, [task_of(FIRST, "0")]))
    async with asyncio.timeout(10):
        while not ingest.running:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        retrier.stopping.set()
        with pytest.raises(Stopping):
            await processing
    assert ingest.done == []
