"""Runs tasks of clients and of backfills: those of different city-days at the same time, those of one in order."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from structlog.contextvars import bound_contextvars

from services.ingest.worker.city_day import CityDayIngest
from shared.domain.events import IngestCity
from shared.domain.ids import CityId
from shared.kafka.consumer import DecodedRecord, decode_by_key, handle_keys
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, process_span, traceparent_of
from shared.runtime.retry import Retrier, Stopping
from shared.storage.object_store import StoreUnavailable

STOP_GRACE_S = 5.0
"""How long a worker that stops tries to remove the note of an attempt. A note that stays costs an isolated process."""


class Worker:
    """Runs tasks. Its ``process`` can run several times at once."""

    def __init__(self, ingest: CityDayIngest, publisher: Publisher, *, retrier: Retrier) -> None:
        self._ingest = ingest
        self._publisher = publisher
        self._retrier = retrier
        self._locks: WeakValueDictionary[tuple[dt.date, CityId], asyncio.Lock] = WeakValueDictionary()

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Ingest the city-days of a batch, one after the other. Afterwards the batch can be committed.

        Raises Stopping at shutdown: the city-day in progress is aborted, and Kafka redelivers its task.
        """
        groups = await decode_by_key(batch, self._publisher, lambda task: task.key)
        return await handle_keys(groups, self._ingest_city_day)

    async def _ingest_city_day(self, tasks: Sequence[DecodedRecord]) -> None:
        for item in tasks:
            task = item.event
            assert isinstance(task, IngestCity)
            traceparent = traceparent_of(dict(item.record.headers))
            about = {"request_id": task.request_id, "date": str(task.date), "city_id": task.city_id}
            with (
                bound_contextvars(**about),
                process_span(item.record.topic, [traceparent], **about, failed_attempts=task.failed_attempts),
            ):
                await self._run_until_stopping(task)

    async def _run_until_stopping(self, task: IngestCity) -> None:
        running = asyncio.create_task(self._run(task))
        stopping = asyncio.create_task(self._retrier.stopping.wait())
        futures: list[asyncio.Future[Any]] = [running, stopping]
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            self._retrier.raise_if_stopping()
            await running
        finally:
            stopping.cancel()
            running.cancel()
            await asyncio.gather(running, stopping, return_exceptions=True)

    async def _run(self, task: IngestCity) -> None:
        async with self._locks.setdefault((task.date, task.city_id), asyncio.Lock()):
            try:
                await self._ingest.run(task)
                await self._ingest.end_attempt(task)
            except (asyncio.CancelledError, Stopping):
                with contextlib.suppress(StoreUnavailable, TimeoutError):
                    async with asyncio.timeout(STOP_GRACE_S):
                        await self._ingest.end_attempt(task)
                raise
