"""Folding progress events into the records of their requests, and sending stuck requests on their way again.

A record is written at most once in ``interval_s``: what came since is one batch. The order of effects: the record; if
its request has ended, ``ProcessRequested`` of the request of the date that waits for it; the commit. A crash between
them repeats both.

A request that has made no progress for long is published again, with the same id, so whatever the broker lost comes
back by itself.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec

from services.aggregate.requests.fold import ProgressEvent, fold_progress, is_progress_event
from shared.domain import keys
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import new_record, request_event, status_of
from shared.kafka.consumer import decode_batch
from shared.kafka.producer import ConsumedRecord, OutgoingEvent, Publisher
from shared.runtime.retry import Retrier, run_all
from shared.storage import active_requests
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, Versioned

SWEEP_INTERVAL_S = 60.0
SWEEP_REQUESTS_MAX = 1_000
SWEEP_WAIT_MAX = dt.timedelta(days=1)
"""The longest wait before a request that makes no progress is sent once more."""

Clock = Callable[[], dt.datetime]


class ProgressFolder:
    """Folds batches of ``request-progress``. Any number can run side by side: the swap of each record decides."""

    def __init__(
        self, store: ObjectStore, publisher: Publisher, *, clock: Clock, retrier: Retrier, interval_s: float
    ) -> None:
        self._store = store
        self._records = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._patience = retrier
        self._interval_s = interval_s
        self._written_at_s = 0.0

    async def process(self, batch: Sequence[ConsumedRecord]) -> None:
        """Fold a batch. When it returns, all its effects have happened and it can be committed."""
        groups: dict[RequestId, list[ProgressEvent]] = {}
        for item in await decode_batch(batch, self._publisher):
            event = is_progress_event(item.event)
            groups.setdefault(event.request_id, []).append(event)
        await run_all(self._fold_group(request_id, events) for request_id, events in groups.items())
        now_s = time.monotonic()
        # What comes meanwhile waits in Kafka, and is the next batch.
        await self._patience.pause(max(0.0, self._written_at_s + self._interval_s - now_s))
        self._written_at_s = time.monotonic()

    async def _fold_group(self, request_id: RequestId, events: Sequence[ProgressEvent]) -> None:
        key = keys.request(request_id)

        async def fold(before: RequestRecord | None) -> RequestRecord:
            now = self._clock()
            return fold_progress(before or new_record(request_id, events[0].date, now), events, now)

        after = await self._records.update(RequestRecord, key, fold, counted_as="request")
        if after is not None and status_of(after).ended:
            await self._publish_waiting(after)

    async def _publish_waiting(self, ended: RequestRecord) -> None:
        waiting = await active_requests.waiting_for(self._store, ended.date, ended.request_id)
        if waiting is not None:
            await self._publisher.publish([OutgoingEvent(request_event(new_record(waiting, ended.date)))])


class Sweep:
    """Publishes requests again that have stopped making progress.

    First ``after`` so long, then each time after twice as long, but at least every ``wait_max``: none is given up.
    """

    def __init__(
        self,
        store: ObjectStore,
        publisher: Publisher,
        *,
        clock: Clock,
        after: dt.timedelta,
        wait_max: dt.timedelta = SWEEP_WAIT_MAX,
    ) -> None:
        self._store = store
        self._records = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._after = after
        self._wait_max = max(after, wait_max)
        self._ended: dict[str, str] = {}  # the ETags of records that need not be read again, by key

    async def run(self, retrier: Retrier) -> None:
        """Sweep once a minute until asked to stop."""
        while not retrier.stopping.is_set():
            await retrier.pause(SWEEP_INTERVAL_S)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("sweep", self.once)

    async def once(self) -> int:
        """Publish every stuck request again; return how many there were. Looks at the latest requests alone."""
        now = self._clock()
        resent = 0
        async for key, read in self._under_way(now):
            record = read.value
            if not self._is_due(record, now):
                continue
            await self._publisher.publish([OutgoingEvent(request_event(record, resent_at=self._moment(now, record)))])
            try:
                marked = msgspec.structs.replace(record, resent_at=now)
                await self._records.compare_and_swap(key, marked, over=read)
            except CasConflict:
                pass  # it made progress, or another sweep sent it too: twice is harmless
            resent += 1
        return resent

    @staticmethod
    def _moment(now: dt.datetime, record: RequestRecord) -> dt.datetime:
        """Return the time of sending again. The planner drops what is not later than what it has dispatched."""
        if record.dispatched_at is None:
            return now
        return max(now, record.dispatched_at + dt.timedelta(microseconds=1))

    def _is_due(self, record: RequestRecord, now: dt.datetime) -> bool:
        last = max(record.updated_at, record.resent_at or record.updated_at)
        still = last - record.updated_at
        return now - last >= min(max(self._after, still), self._wait_max)

    async def _under_way(self, now: dt.datetime) -> AsyncIterator[tuple[str, Versioned[RequestRecord]]]:
        seen = 0
        ended: dict[str, str] = {}
        async for listed in self._store.list(keys.REQUESTS):
            seen += 1
            if seen > SWEEP_REQUESTS_MAX:
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
