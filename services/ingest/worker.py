"""Taking tasks: a bounded batch of city-days side by side, tasks of the same city-day as one, one commit for all."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from typing import Any

from services.ingest.city_day import CityDayIngest
from shared.consuming import decode_batch
from shared.events import IngestCity
from shared.identity import CityId
from shared.patience import Patience
from shared.publishing import Publisher, Received


class Worker:
    """Carries out the tasks of ``city-tasks``."""

    def __init__(self, ingest: CityDayIngest, publisher: Publisher, *, patience: Patience, streams: int) -> None:
        self._ingest = ingest
        self._publisher = publisher
        self._patience = patience
        self._room = asyncio.Semaphore(streams)

    async def process(self, batch: Sequence[Received]) -> None:
        """Ingest the city-days of a batch. When it returns, all are done and it can be committed.

        Raises Stopping when asked to stop: what is under way is aborted, and comes again.
        """
        groups: dict[tuple[dt.date, CityId], list[IngestCity]] = {}
        for item in await decode_batch(batch, self._publisher):
            assert isinstance(item.event, IngestCity)
            groups.setdefault((item.event.date, item.event.city_id), []).append(item.event)
        running = [asyncio.create_task(self._run(tasks)) for tasks in groups.values()]
        stopping = asyncio.create_task(self._patience.stopping.wait())
        everything = asyncio.gather(*running)
        waited_for: list[asyncio.Future[Any]] = [everything, stopping]
        try:
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            self._patience.raise_if_stopping()
            await everything
        finally:
            stopping.cancel()
            everything.cancel()
            await asyncio.gather(everything, stopping, *running, return_exceptions=True)

    async def _run(self, tasks: Sequence[IngestCity]) -> None:
        async with self._room:
            await self._patience.wait_out(
                "city-day", lambda: self._ingest.run(tasks), detail=f"{tasks[0].date}/{tasks[0].city_id}"
            )
