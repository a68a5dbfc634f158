"""Requeue of stalled requests: publishes a request again when it has made no progress for long.

The request keeps its id, so a record that the broker lost comes back without help. Metrics show the open requests.

A request of any age can be open: a backfill requests dates for days under ids of its begin, and a retry opens an old
request again. Each look lists the latest records, and reads those that have changed and those of open requests. A look
at all records finds the others. It reads the records that have changed since the one before, because all others have
ended. The more records there are, the rarer it is: looks list two pages of S3 each on average.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import structlog

from shared.domain import keys
from shared.domain.objects import EPOCH, CorruptObject, RequestRecord
from shared.domain.requests import Status, is_stalled, resent_event, status_of
from shared.kafka.failed_keys import for_each
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import Retrier
from shared.storage.object_store import CasConflict, ObjectInfo, ObjectStore
from shared.storage.repository import Repository, Versioned

REQUEUE_INTERVAL_S = 60.0
LISTED_MAX = 1_000
"""How many of the latest records each look lists: a page of S3. Each page of records puts off the next look at all."""
WRITTEN_WITHIN = dt.timedelta(minutes=15)
"""How long after its last modification a record appears in a listing, at most."""
CONCURRENT_READS_MAX = 16
REQUEUE_WAIT_MAX = dt.timedelta(days=1)
"""The longest wait before a stalled request is published once more."""

Clock = Callable[[], dt.datetime]

_log = structlog.get_logger()


class _KnownRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its record showed it under ``etag``; without a status if the record is unreadable."""

    listed: ObjectInfo
    etag: str
    status: Status | None = None
    requested_at: dt.datetime = EPOCH

    @property
    def open(self) -> bool:
        return self.status is not None and not self.status.ended

    def ended_before(self, at: dt.datetime) -> bool:
        return self.status is not None and self.status.ended and self.listed.last_modified < at


class Requeue:
    """Publishes stalled requests again.

    The first time is ``after`` their last progress. Each further wait is twice as long, and at most ``wait_max``. No
    request is given up.
    """

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        *,
        clock: Clock,
        after: dt.timedelta,
        wait_max: dt.timedelta = REQUEUE_WAIT_MAX,
        listed_max: int = LISTED_MAX,
    ) -> None:
        self._store = store
        self._records = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._after = after
        self._wait_max = max(after, wait_max)
        self._listed_max = listed_max
        self._known: dict[str, _KnownRequest] = {}
        self._unknown_ended_before = EPOCH
        self._looks_at_latest_left = 0

    async def run(self, retrier: Retrier) -> None:
        """Requeue stalled requests once a minute until asked to stop."""
        while not retrier.stopping.is_set():
            await retrier.pause(REQUEUE_INTERVAL_S)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("requeue", self.once)

    async def once(self) -> int:
        """Publish every stalled request again, and return their number."""
        now = self._clock()
        stalled = await self._look(now)
        self._export(now)
        await for_each(lambda read: self._resend(read, now), stalled)
        return len(stalled)

    async def _look(self, now: dt.datetime) -> list[Versioned[RequestRecord]]:
        """Read the records that may have changed, and return those of stalled requests."""
        all_records = not self._looks_at_latest_left
        open_elsewhere = {key: known.listed for key, known in self._known.items() if known.open}
        stalled: list[Versioned[RequestRecord]] = []
        unread: list[ObjectInfo] = []
        count, latest, ended_before = 0, EPOCH, self._unknown_ended_before
        async for listed in self._store.list(keys.REQUESTS):
            if count == self._listed_max and not all_records:
                break
            count += 1
            if count <= self._listed_max:
                latest = max(latest, listed.last_modified)
                # A write during this look has a later time than what the look found first.
                ended_before = latest - WRITTEN_WITHIN if all_records else ended_before
            open_elsewhere.pop(listed.key, None)
            if self._may_have_changed(listed, now):
                unread.append(listed)
            if len(unread) == CONCURRENT_READS_MAX:
                stalled += await self._read(unread, now, ended_before)
                unread = []
        stalled += await self._read([*unread, *open_elsewhere.values()], now, ended_before)
        self._unknown_ended_before = ended_before
        self._looks_at_latest_left = count // self._listed_max if all_records else self._looks_at_latest_left - 1
        self._known = {key: known for key, known in self._known.items() if not known.ended_before(ended_before)}
        return stalled

    def _may_have_changed(self, listed: ObjectInfo, now: dt.datetime) -> bool:
        """Return whether a record may have changed since it was read, or its request may be stalled by now."""
        known = self._known.get(listed.key)
        if known is None:
            return listed.last_modified >= self._unknown_ended_before
        return known.etag != listed.etag or (known.open and now - listed.last_modified >= self._after)

    async def _read(
        self, unread: Sequence[ObjectInfo], now: dt.datetime, ended_before: dt.datetime
    ) -> list[Versioned[RequestRecord]]:
        """Read records, and return those of stalled requests. Forget those that ended before a time."""
        read_all = await bounded_map(self._read_one, unread, limit=CONCURRENT_READS_MAX)
        stalled = []
        for listed, read in zip(unread, read_all, strict=True):
            self._known.pop(listed.key, None)
            if isinstance(read, CorruptObject):
                self._known[listed.key] = _KnownRequest(listed=listed, etag=listed.etag)
            elif read is not None:
                record = read.value
                known = _KnownRequest(
                    listed=listed, etag=read.etag, status=status_of(record), requested_at=record.requested_at
                )
                if not known.ended_before(ended_before):
                    self._known[listed.key] = known
                if known.open and is_stalled(record, now, after=self._after, wait_max=self._wait_max):
                    stalled.append(read)
        return stalled

    async def _read_one(self, listed: ObjectInfo) -> Versioned[RequestRecord] | CorruptObject | None:
        try:
            return await self._records.read(RequestRecord, listed.key)
        except CorruptObject as error:
            _log.error("object_unreadable", key=listed.key, error=str(error))
            return error

    def _export(self, now: dt.datetime) -> None:
        open_requests = [known for known in self._known.values() if known.open]
        counts = Counter(known.status for known in open_requests)
        for status in Status:
            if not status.ended:
                metrics.open_requests.labels(status.value).set(counts[status])
        oldest = min((known.requested_at for known in open_requests), default=now)
        metrics.oldest_open_request_age.set((now - oldest).total_seconds())

    async def _resend(self, read: Versioned[RequestRecord], now: dt.datetime) -> None:
        record = read.value
        await self._publisher.publish([OutgoingEvent(resent_event(record, now), traceparent=record.traceparent)])
        metrics.requeued_requests.inc()
        _log.warning("request_requeued", request_id=record.request_id, date=str(record.date))
        try:
            marked = msgspec.structs.replace(record, resent_at=now)
            await self._records.compare_and_swap(keys.request(record.request_id), marked, over=read)
        except CasConflict:
            pass  # it made progress, or another process requeued it too: twice is harmless
