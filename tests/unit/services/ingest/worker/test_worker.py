"""The worker's batches: several cities side by side, up to a setting, and none waits for a slow one beside it."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from typing import cast

import msgspec
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
from tests.fakes.log import MemoryLog, MemoryPublisher

STREAMS = 3


class SlowIngest:
    """Ingests each city at once, but for the slow ones, which last until they are let go."""

    def __init__(self, *, slow: Sequence[str]) -> None:
        self.slow = slow
        self.let_go = asyncio.Event()
        self.running = 0
        self.running_max = 0
        self.done: list[str] = []
        self.to_be_alone: Sequence[str] = ()

    async def run(self, tasks: Sequence[IngestCity], *, alone: bool) -> bool:
        """Take one city, as CityDayIngest does."""
        if alone:
            assert self.running == 0, "nothing runs beside a city that has to be alone"
        elif tasks[0].city_id in self.to_be_alone:
            return False
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        city = tasks[0].city_id
        if city in self.slow:
            await self.let_go.wait()
        await asyncio.sleep(0)
        self.running -= 1
        self.done.append(city)
        return True


def batch_of(cities: int) -> list[ConsumedRecord]:
    """Make a batch of tasks, one for each city."""
    request_id = mint_request_id(utc_now())
    tasks = [
        IngestCity(
            request_id=request_id,
            date=dt.date(2024, 5, 1),
            city_id=CityId(str(number)),
            upstream_id=str(number),
            city_name=f"City {number}",
            country=CountrySlug("peru"),
            country_name="Peru",
            plan_revision=1,
            position=number,
        )
        for number in range(cities)
    ]
    return [
        ConsumedRecord(
            topic=Topic.CITY_TASKS, partition=0, offset=number, key=None, value=events.encode(task), headers=()
        )
        for number, task in enumerate(tasks)
    ]


def worker_over(ingest: SlowIngest) -> Worker:
    """Wire a worker that streams up to STREAMS cities at once."""
    retrier = Retrier(health=Health(), wait_max_s=1)
    return Worker(
        cast(CityDayIngest, ingest), MemoryPublisher(MemoryLog(), source="test"), retrier=retrier, streams=STREAMS
    )


async def test_a_slow_city_holds_up_no_city_of_its_batch() -> None:
    """While a city is slow, all others of the batch are ingested; the batch ends when the slow one does."""
    ingest = SlowIngest(slow=["0"])
    processing = asyncio.create_task(worker_over(ingest).process(batch_of(10)))
    async with asyncio.timeout(10):
        while len(ingest.done) < 9:  # noqa: ASYNC110  # what is asserted is that it comes to this
            await asyncio.sleep(0)
        assert "0" not in ingest.done
        assert not processing.done(), "a batch is committed only when all of it is done"
        ingest.let_go.set()
        await processing
    assert sorted(ingest.done, key=int) == [str(number) for number in range(10)]


async def test_a_deadly_file_is_parsed_after_the_others_and_alone() -> None:
    """A city that has to be alone waits for all others of its batch, and none runs beside it."""
    ingest = SlowIngest(slow=[])
    ingest.to_be_alone = ("0", "4")
    await worker_over(ingest).process(batch_of(6))
    assert ingest.done[-2:] == ["0", "4"]
    assert len(ingest.done) == 6


async def test_a_task_that_comes_twice_is_one() -> None:
    """Copies of one task in a batch are run, and published again, as one."""
    ingest = SlowIngest(slow=[])
    ran: list[int] = []
    run = ingest.run

    async def counted(tasks: Sequence[IngestCity], *, alone: bool) -> bool:
        ran.append(len(tasks))
        return await run(tasks, alone=alone)

    ingest.run = counted  # type: ignore[method-assign]  # counts what it is given
    await worker_over(ingest).process(batch_of(1) * 2)
    assert ran == [1]


async def test_no_more_cities_than_the_setting_stream_at_once() -> None:
    """However large the batch, the number of cities in progress and the memory are bounded."""
    ingest = SlowIngest(slow=[str(number) for number in range(10)])
    processing = asyncio.create_task(worker_over(ingest).process(batch_of(10)))
    async with asyncio.timeout(10):
        while ingest.running < STREAMS:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        ingest.let_go.set()
        await processing
    assert ingest.running_max == STREAMS


async def test_a_city_of_two_dates_is_two_city_days() -> None:
    """Tasks of one city are one only if they are of one date too."""
    ingest = SlowIngest(slow=[])
    (task,) = batch_of(1)
    other = msgspec.structs.replace(task, offset=1, value=(task.value or b"").replace(b"2024-05-01", b"2024-05-02"))
    await worker_over(ingest).process([task, other])
    assert ingest.done == ["0", "0"]


async def test_a_worker_that_is_asked_to_stop_waits_for_no_file() -> None:
    """However long a file would still take, the batch is given back at once, uncommitted."""
    ingest = SlowIngest(slow=["0"])
    retrier = Retrier(health=Health(), wait_max_s=1)
    publisher = MemoryPublisher(MemoryLog(), source="test")
    worker = Worker(cast(CityDayIngest, ingest), publisher, retrier=retrier, streams=STREAMS)
    processing = asyncio.create_task(worker.process(batch_of(1)))
    async with asyncio.timeout(10):
        while not ingest.running:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        retrier.stopping.set()
        with pytest.raises(Stopping):
            await processing
    assert ingest.done == []
