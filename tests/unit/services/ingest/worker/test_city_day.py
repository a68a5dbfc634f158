"""The ingest of city-days beside each other: how they share the stream slots of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.port import Download, Validators
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker import city_day
from services.ingest.worker.city_day import CityDayIngest
from shared.domain import keys
from shared.domain.events import IngestCity
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from tests.fakes.builders import Trip, trip_file
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore
from tests.fakes.upstream import MemoryUpstream

DAY = dt.date(2024, 5, 1)
STAGES = {"request": 3, "wait": 3, "stream": 2, "complete_upload": 2, "write_manifest": 2, "publish": 2}
"""How often each stage is timed when the first of two files waits for the slot, and the second is requested twice."""


class PacedUpstream(MemoryUpstream):
    """An upstream whose files arrive when ``flowing`` is set. It lists the cities whose response is open."""

    def __init__(self) -> None:
        super().__init__()
        self.flowing = asyncio.Event()
        self.open: list[str] = []

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        async with super().download(upstream_id, date, known) as download:
            assert download.chunks is not None
            download.chunks = self._paced(download.chunks)
            self.open.append(upstream_id)
            try:
                yield download
            finally:
                self.open.remove(upstream_id)

    async def _paced(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        await self.flowing.wait()
        async for chunk in chunks:
            yield chunk


def task_of(city: str) -> IngestCity:
    """Return the task of a city."""
    return IngestCity(
        request_id=mint_request_id(utc_now()),
        date=DAY,
        city_id=CityId(city),
        upstream_id=city,
        city_name=f"City {city}",
        country=CountrySlug("armenia"),
        country_name="Armenia",
        plan_revision=1,
        position=0,
    )


async def test_a_response_that_waits_long_for_a_slot_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one file takes the only slot for long, the other's connection is closed and costs it no attempt."""
    monkeypatch.setattr(city_day, "SLOT_WAIT_MAX_S", 0)
    upstream, store, log = PacedUpstream(), MemoryStore(utc_now), MemoryLog()
    file = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    upstream.files = dict.fromkeys(("0", "1"), file)
    timed = {stage: value("tripfold_ingest_stage_seconds_count", stage=stage) for stage in STAGES}
    stored_bytes, stored_trips = value("tripfold_stored_bytes_total"), value("tripfold_stored_trips_total")
    circuit = CircuitBreaker(Retrier(health=Health(), wait_max_s=1))
    with ThreadPoolExecutor(1) as threads:
        ingest = CityDayIngest(
            store,
            MemoryPublisher(log),
            upstream,
            clock=utc_now,
            retry_policy=UpstreamRetryPolicy(circuit, attempts_max=1, outage_limit_s=60),
            threads=threads,
            streams=1,
            deadline_s=60,
        )
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            tasks.create_task(ingest.run(task_of("0")))
            tasks.create_task(ingest.run(task_of("1")))
            # The second response is open, and is then closed.
            while upstream.downloads != ["0", "1"] or upstream.open != ["0"]:  # noqa: ASYNC110  # waits for this state
                await asyncio.sleep(0)
            upstream.flowing.set()
    assert upstream.downloads == ["0", "1", "1"]
    assert all(keys.manifest(DAY, CityId(city)) in store.objects for city in ("0", "1"))
    for stage, times in STAGES.items():
        assert value("tripfold_ingest_stage_seconds_count", stage=stage) == timed[stage] + times, stage
    assert value("tripfold_stored_bytes_total") == stored_bytes + 2 * len(file)
    assert value("tripfold_stored_trips_total") == stored_trips + 2
