"""Runs the tasks of a batch in parallel, tasks of the same city-day as one, with one commit for the batch.

A file whose parsing crashed workers is parsed alone, after the other files of its batch. If the worker then crashes
again, that file is the cause.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from typing import Any

from services.ingest.worker.city_day import CityDayIngest
from shared.domain.events import IngestCity
from shared.domain.ids import CityId
from shared.kafka.consumer import decode_batch
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord
from shared.runtime.retry import Retrier


class Worker:
    """Runs the tasks of ``city-tasks``."""

    def __init__(self, ingest: CityDayIngest, publisher: Publisher, *, retrier: Retrier, streams: int) -> None:
        self._ingest = ingest
        self._publisher = publisher
        self._retrier = retrier
        self._room = asyncio.Semaphore(streams)

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        """Ingest all city-days of a batch. Afterwards the batch can be committed.

        Raises Stopping at shutdown: city-days in progress are aborted, and Kafka redelivers their tasks.
        """
        groups: dict[tuple[dt.date, CityId], dict[str, IngestCity]] = {}
        for item in await decode_batch(batch, self._publisher):
            assert isinstance(item.event, IngestCity)
            groups.setdefault((item.event.date, item.event.city_id), {})[item.event.identity] = item.event
        working = asyncio.create_task(self._run_all([list(tasks.values()) for tasks in groups.values()]))
        stopping = asyncio.create_task(self._retrier.stopping.wait())
        futures: list[asyncio.Future[Any]] = [working, stopping]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            self._retrier.raise_if_stopping()
            await working
        finally:
            stopping.cancel()
            working.cancel()
            await asyncio.gather(working, stopping, return_exceptions=True)

    async def _run_all(self, groups: Sequence[Sequence[IngestCity]]) -> None:
        running = [asyncio.create_task(self._run(tasks)) for tasks in groups]
        try:
            done = await asyncio.gather(*running)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        for tasks, is_done in zip(groups, done, strict=True):
            if not is_done:
                await self._run(tasks, alone=True)

    async def _run(self, tasks: Sequence[IngestCity], *, alone: bool = False) -> bool:
        async with self._room:
            return await self._retrier.retry_until_available(
                "city_day",
                lambda: self._ingest.run(tasks, alone=alone),
                detail=f"{tasks[0].date}/{tasks[0].city_id}",
            )
