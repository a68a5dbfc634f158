"""Restores the records that the embedded broker lost in an unclean stop.

Killed with SIGKILL, the broker loses records that it acknowledged. The recovery publishes all plans, manifests and live
summaries of the bucket again, then each unfinished request.

A file beside the broker's snapshot states that no record is missing. A clean stop creates it; a start deletes it.
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
from tripfold.local.supervisor import ChildEvent, EventKind
from tripfold.operate.command_line import open_bucket
from tripfold.operate.republish import republish

AT_ONCE = dt.timedelta()


class Recovered(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a recovery: counts of published events, and the keys of unreadable objects."""

    events: int
    dates: int
    requests: int
    unreadable: tuple[str, ...]

    def sentence(self) -> str:
        """Return a sentence for users."""
        failed = f" These objects could not be read: {', '.join(self.unreadable)}." if self.unreadable else ""
        return (
            "The last stop was not clean, so Kafka may have lost records. Published again from the bucket: "
            f"{self.events:,} events of {self.dates:,} dates, and {self.requests:,} unfinished requests.{failed}"
        )


class BrokerState:
    """Tracks whether the embedded broker may have lost records."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "kafka" / "complete"
        self.incomplete = not self._path.exists()
        self._path.unlink(missing_ok=True)

    def observe(self, event: ChildEvent) -> None:
        """Note an event: a broker that ended by itself or was killed may have lost records."""
        if event.name == "broker" and event.kind in {EventKind.ENDED, EventKind.KILLED}:
            self.incomplete = True

    def save(self) -> None:
        """Create the file if no record is missing. Call it after the broker has stopped."""
        if not self.incomplete:
            self._path.touch()


async def recover(settings: Settings) -> Recovered:
    """Publish the bucket to the compacted topics again, and every unfinished request to its topic."""
    events = dates = 0
    unreadable: list[str] = []
    async with open_bucket(settings) as store, KafkaPublisher(settings, source="recovery") as publisher:
        async for one in republish(store, publisher, Dates()):
            events, dates = events + one.events, dates + 1
            unreadable += one.unreadable
        requests = await Requeue(store, publisher, clock=utc_now, after=AT_ONCE, wait_max=AT_ONCE).once()
    return Recovered(events=events, dates=dates, requests=requests, unreadable=tuple(unreadable))
