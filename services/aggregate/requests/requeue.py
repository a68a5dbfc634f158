"""Requeue of stalled requests: publishes a request again when it has made no progress for long.

The request keeps its id, so a record that the broker lost comes back without help.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable

import msgspec
import structlog

from shared.domain import keys
from shared.domain.objects import RequestRecord
from shared.domain.requests import is_stalled, resent_event, status_of
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics
from shared.runtime.retry import Retrier
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, Versioned

REQUEUE_INTERVAL_S = 60.0
REQUEUE_REQUESTS_MAX = 1_000
REQUEUE_WAIT_MAX = dt.timedelta(days=1)
"""The longest wait before a stalled request is published once more."""

Clock = Callable[[], dt.datetime]

_log = structlog.get_logger()


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
        self._ended: dict[str, str] = {}  # the ETags of ended records, by key: these are not read again

    async def run(self, retrier: Retrier) -> None:
        """Requeue stalled requests once a minute until asked to stop."""
        while not retrier.stopping.is_set():
            await retrier.pause(REQUEUE_INTERVAL_S)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("requeue", self.once)

    async def once(self) -> int:
        """Publish every stalled request again, and return their number. Only the latest requests are read."""
        now = self._clock()
        resent = 0
        async for key, read in self._unended(now):
            record = read.value
            if not is_stalled(record, now, after=self._after, wait_max=self._wait_max):
                continue
            await self._publisher.publish([OutgoingEvent(resent_event(record, now))])
            metrics.requeued_requests.inc()
            _log.warning("request_requeued", request_id=record.request_id, date=str(record.date))
            try:
                marked = msgspec.structs.replace(record, resent_at=now)
                await self._records.compare_and_swap(key, marked, over=read)
            except CasConflict:
                pass  # it made progress, or another process requeued it too: twice is harmless
            resent += 1
        return resent

    async def _unended(self, now: dt.datetime) -> AsyncIterator[tuple[str, Versioned[RequestRecord]]]:
        seen = 0
        ended: dict[str, str] = {}
        async for listed in self._store.list(keys.REQUESTS):
            seen += 1
            if seen > REQUEUE_REQUESTS_MAX:
                break
            if now - listed.last_modified < self._after:
                continue
            if self._ended.get(listed.key) == listed.etag:
                ended[listed.key] = listed.etag
                continue
            read = await self._records.read(RequestRecord, listed.key)
            if read is None:
                continue
            if status_of(read.value).ended:
                ended[listed.key] = read.etag
                continue
            yield listed.key, read
        self._ended = ended
