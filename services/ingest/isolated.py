"""The process of one isolated task: ``services.ingest.worker.isolation`` starts it and writes the task to its input."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from services.ingest.app import make_city_day_ingest, make_upstream
from services.ingest.worker.isolation import IsolatedTask
from shared.runtime.logging import configure_logging
from shared.runtime.settings import Settings, load_settings
from shared.service import ServiceContext


def main() -> None:
    """Run the task that the parent writes."""
    settings = load_settings()
    configure_logging(settings)
    isolated = msgspec.json.decode(sys.stdin.buffer.readline(), type=IsolatedTask)
    asyncio.run(run(settings, isolated))


async def run(settings: Settings, isolated: IsolatedTask) -> None:
    """Run a task until it has ended."""
    asyncio.get_running_loop().add_reader(sys.stdin, lambda: os._exit(1))  # the parent has ended
    context = ServiceContext(settings, source="ingest")
    upstream, retry_policy = make_upstream(context)
    async with context.store, context.publisher, upstream:
        await context.retrier.retry_until_available("s3", context.check_bucket)
        ingest = make_city_day_ingest(context, upstream, retry_policy, crashes=isolated.crashes)
        os.write(sys.stdout.fileno(), b"begun\n")
        await context.retrier.retry_until_available("city_day", lambda: ingest.run(isolated.task))


if __name__ == "__main__":
    main()
