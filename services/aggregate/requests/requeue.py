"""Requeue of stalled requests: publishes a request again when it has made no progress for long.

The request keeps its id, so a record that the broker lost comes back without help. Metrics show the open requests.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable

import msgspec
import structlog

from shared.domain import keys
from shared.domain.objects import EPOCH, CorruptObject, RequestRecord
from shared.domain.requests import Status, is_stalled, resent_event, status_of
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.runtime.retry import Retrier
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, Versioned

REQUEUE_INTERVAL_S = 60.0
REQUEUE_REQUESTS_MAX = 5_000
"""More than a backfill has dates: its requests, made at once by their ids, hide no earlier one."""
REQUEUE_WAIT_MAX = dt.timedelta(days=1)
"""The longest wait before a stalled request is published once more."""

Clock = Callable[[], dt.datetime]

_log = structlog.get_logger()


class _KnownRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as its record showed it under ``etag``; without a status if the record is unreadable."""

    etag: str
    status: Status | None = None
    requested_at: dt.datetime = EPOCH

    @property
    def open(self) -> bool:
        return self.status is not None and not self.status.ended


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
    ) -> None:
        self._store = store
        self._records = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._after = after
        self._wait_max = max(after, wait_max)
        self._latest: dict[str, _KnownRequest] = {}

    async def run(self, retrier: Retrier) -> None:
        """Requeue stalled requests once a minute until asked to stop."""
        while not retrier.stopping.is_set():
            await retrier.pause(REQUEUE_INTERVAL_S)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("requeue", self.once)

    async def once(self) -> int:
        """Publish every stalled request again, and return their number. Only the latest requests are read."""
        now = self._clock()
        stalled = await self._read_latest(now)
        self._export(now)
        for key, read in stalled:
            await self._resend(key, read, now)
        return len(stalled)

    async def _read_latest(self, now: dt.datetime) -> list[tuple[str, Versioned[RequestRecord]]]:
        """Read the latest records, and return those of stalled requests.

        A record that has not changed is not read again, unless its request may be stalled by now.
        """
        latest: dict[str, _KnownRequest] = {}
        stalled: list[tuple[str, Versioned[RequestRecord]]] = []
        async for listed in self._store.list(keys.REQUESTS):
            if len(latest) == REQUEUE_REQUESTS_MAX:
                break
            known = self._latest.get(listed.key)
            may_be_stalled = now - listed.last_modified >= self._after
            if known is not None and known.etag == listed.etag and not (known.open and may_be_stalled):
                latest[listed.key] = known
                continue
            try:
                read = await self._records.read(RequestRecord, listed.key)
            except CorruptObject as error:
                _log.error("object_unreadable", key=listed.key, error=str(error))
                latest[listed.key] = _KnownRequest(etag=listed.etag)
                continue
            if read is None:
                continue
            record = read.value
            known = latest[listed.key] = _KnownRequest(
                etag=read.etag, status=status_of(record), requested_at=record.requested_at
            )
            if known.open and is_stalled(record, now, after=self._after, wait_max=self._wait_max):
                stalled.append((listed.key, read))
        self._latest = latest
        return stalled

    def _export(self, now: dt.datetime) -> None:
        open_requests = [known for known in self._latest.values() if known.open]
        counts = Counter(known.status for known in open_requests)
        for status in Status:
            if not status.ended:
                metrics.open_requests.labels(status.value).set(counts[status])
        oldest = min((known.requested_at for known in open_requests), default=now)
        metrics.oldest_open_request_age.set((now - oldest).total_seconds())

    async def _resend(self, key: str, read: Versioned[RequestRecord], now: dt.datetime) -> None:
        record = read.value
        await self._publisher.publish([OutgoingEvent(resent_event(record, now), traceparent=record.traceparent)])
        metrics.requeued_requests.inc()
        _log.warning("request_requeued", request_id=record.request_id, date=str(record.date))
        try:
            marked = msgspec.structs.replace(record, resent_at=now)
            await self._records.compare_and_swap(key, marked, over=read)
        except CasConflict:
            pass  # it made progress, or another process requeued it too: twice is harmless
