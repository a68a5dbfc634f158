"""Brings back what the embedded broker lost in an unclean stop.

Killed with SIGKILL, the broker loses records that it acknowledged. The order of effects: all plans, manifests and live
summaries of the bucket are published again, then each unfinished request. A file beside the broker's snapshot says that
both are complete. It is made after a clean stop and deleted before the next start: if it is missing, records may be.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import msgspec

from services.aggregate.bucket_reader import Dates
from services.aggregate.requests.requeue import Requeue
from shared.domain.ids import utc_now
from shared.kafka.producer import KafkaPublisher
from shared.runtime.settings import Settings
from shared.storage.s3 import S3Store
from tripfold.local.supervisor import ChildEvent, EventKind
from tripfold.operate.republish import republish

AT_ONCE = dt.timedelta()


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """What was published again: how many events, of how many dates, and how many unfinished requests."""

    events: int
    dates: int
    requests: int
    unreadable: tuple[str, ...]

    def sentence(self) -> str:
        """Say it in one sentence."""
        failed = f"; not published: {', '.join(self.unreadable)}" if self.unreadable else ""
        return (
            f"the last stop was not clean, so Kafka may have lost records: {self.events:,} events of {self.dates:,} "
            f"dates were published again from the bucket, and {self.requests:,} unfinished requests resumed{failed}"
        )


class BrokerState:
    """Knows whether the embedded broker may lack records: at the start, and after each event of its process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "kafka" / "complete"
        self.incomplete = not self._path.exists()
        self._path.unlink(missing_ok=True)

    def observe(self, event: ChildEvent) -> None:
        """Take note if the broker ended by itself, or was killed because it did not stop in time."""
        if event.name == "broker" and event.kind in {EventKind.ENDED, EventKind.KILLED}:
            self.incomplete = True

    def save(self) -> None:
        """Write down that nothing is missing, if so. Call it after the broker has stopped."""
        if not self.incomplete:
            self._path.touch()


async def recover(settings: Settings) -> Recovered:
    """Publish all of the bucket to the compacted topics again, and every unfinished request to its topic."""
    events = dates = 0
    unreadable: list[str] = []
    async with S3Store(settings) as store, KafkaPublisher(settings, source="recovery") as publisher:
        async for one in republish(store, publisher, Dates()):
            events, dates = events + one.events, dates + 1
            unreadable += one.unreadable
        requests = await Requeue(store, publisher, clock=utc_now, after=AT_ONCE, wait_max=AT_ONCE).once()
    return Recovered(events=events, dates=dates, requests=requests, unreadable=tuple(unreadable))
