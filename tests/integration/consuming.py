"""A consumer whose handler collects its records."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from shared.domain.ids import utc_now
from shared.domain.topics import Topic
from shared.kafka.consumer import consume, make_broker
from shared.kafka.failed_keys import KeyResult
from shared.kafka.records import ConsumedRecord
from shared.kafka.skip_markers import SkipMarkers
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore


class Collector:
    """A handler's effects: every record that it was given, after the faults that it was told to have."""

    def __init__(self, *faults: Exception) -> None:
        self.faults = list(faults)
        self.seen: list[ConsumedRecord] = []

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Fail as told, then keep the batch."""
        if self.faults:
            raise self.faults.pop(0)
        self.seen += batch
        return ()

    async def has(self, count: int) -> bool | None:
        """Say True once ``count`` records have been seen."""
        return len(self.seen) >= count or None


@contextlib.asynccontextmanager
async def consuming(
    settings: Settings,
    topic: Topic,
    collector: Collector,
    *,
    group: str = "test",
    health: Health | None = None,
    skip_markers: SkipMarkers | None = None,
    in_turns: bool = False,
    batch_records_max: int = 10,
    batches_at_once: int = 1,
) -> AsyncIterator[Retrier]:
    """Consume a topic with a collector for as long as the context is open."""
    retrier = Retrier(health=health or Health(), wait_max_s=0.05)
    broker = make_broker(settings)
    subscription = consume(
        broker,
        topic,
        collector.process,
        settings=settings,
        retrier=retrier,
        group=group,
        batch_records_max=batch_records_max,
        batches_at_once=batches_at_once,
        linger_ms=20,
        publisher=MemoryPublisher(MemoryLog()),
        store=MemoryStore(utc_now),
        skip_markers=skip_markers,
        in_turns=in_turns,
    )
    await broker.connect()
    await subscription.begin()
    try:
        yield retrier
    finally:
        retrier.stopping.set()
        await subscription.drain()
        await broker.stop()
