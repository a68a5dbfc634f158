"""The process of one isolated task: ``services.ingest.worker.isolation`` starts it and writes the task to its input."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from services.ingest.app import make_city_day_ingest, make_upstream
from services.ingest.worker.city_day import CityDayIngest
from services.ingest.worker.isolation import IsolatedTask
from shared.domain.events import IngestCity
from shared.kafka.failed_keys import harms_one_key
from shared.runtime.logging import configure_logging
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings, load_settings
from shared.service import ServiceContext


def main() -> None:
    """Run the task that the parent writes."""
    settings = load_settings()
    configure_logging(settings)
    isolated = msgspec.json.decode(sys.stdin.buffer.readline(), type=IsolatedTask)
    asyncio.run(run(settings, isolated))


async def run(settings: Settings, isolated: IsolatedTask) -> None:
    """Run a task until it has ended. Raises the error of a task that would fail in the same way again."""
    asyncio.get_running_loop().add_reader(sys.stdin, lambda: os._exit(1))  # the parent has ended
    context = ServiceContext(settings, source="ingest")
    upstream, retry_policy = make_upstream(context)
    async with context.store, context.publisher, upstream:
        await context.retrier.retry_until_available("s3", context.check_bucket)
        ingest = make_city_day_ingest(context, upstream, retry_policy, crashes=isolated.crashes)
        os.write(sys.stdout.fileno(), b"begun\n")
        await run_through_outages(ingest, isolated.task, context.retrier)


async def run_through_outages(ingest: CityDayIngest, task: IngestCity, retrier: Retrier) -> None:
    """Run a task again after each outage. Raises the error of a task that would fail in the same way again."""

    async def run_once() -> Exception | None:
        try:
            await ingest.run(task)
        except Exception as error:
            if harms_one_key(error):
                return error
            raise
        return None

    fault = await retrier.retry_until_available("batch", run_once)
    if fault is not None:
        raise fault


if __name__ == "__main__":
    main()
