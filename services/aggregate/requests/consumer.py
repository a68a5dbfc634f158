"""Consumes ``request-progress``: folds progress events into the records of their requests.

A record is written at most once in ``interval_s``: the events since the last write are one batch.

The order of effects:

1. Write the record.
2. If the request has ended, publish ``ProcessRequested`` of the request of the same date that waits for it.
3. Commit.

After a crash between them, all steps happen again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog
from structlog.contextvars import bound_contextvars

from services.aggregate.requests.fold import ProgressEvent, as_progress_event, fold_progress
from services.aggregate.requests.requeue import Clock
from shared.domain import keys
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import Status, counts_of, new_record, request_event, status_of
from shared.domain.topics import Topic
from shared.kafka.consumer import DecodedRecord, decode_by_key, handle_keys
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent, process_span, traceparent_of
from shared.runtime.retry import Retrier
from shared.storage import active_requests
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository

_log = structlog.get_logger()


class RequestProgressConsumer:
    """Folds batches of ``request-progress``. Any number can run side by side: records change by compare-and-swap."""

    def __init__(
        self, store: ObjectStore, publisher: Publisher, *, clock: Clock, retrier: Retrier, interval_s: float
    ) -> None:
        self._store = store
        self._records = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._retrier = retrier
        self._interval_s = interval_s
        self._written_at_s = 0.0

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Fold a batch. When this returns, all effects have happened and the batch can be committed."""
        groups = await decode_by_key(batch, self._publisher, lambda event: event.key)
        results = await handle_keys(groups, self._fold_events, at_once_max=len(groups))
        now_s = self._retrier.now_s()
        # Events that arrive during the pause stay in Kafka and become the next batch.
        await self._retrier.pause(max(0.0, self._written_at_s + self._interval_s - now_s))
        self._written_at_s = self._retrier.now_s()
        return results

    async def _fold_events(self, group: Sequence[DecodedRecord]) -> None:
        events = [as_progress_event(item.event) for item in group]
        traceparents = [traceparent_of(dict(item.record.headers)) for item in group]
        about = {"request_id": events[0].request_id, "date": str(events[0].date)}
        span = process_span(Topic.REQUEST_PROGRESS, traceparents, **about, events=len(events))
        with bound_contextvars(**about), span:
            await self._fold_group(events[0].request_id, events)

    async def _fold_group(self, request_id: RequestId, events: Sequence[ProgressEvent]) -> None:
        key = keys.request(request_id)
        status_before: Status | None = None

        async def fold(before: RequestRecord | None) -> RequestRecord:
            nonlocal status_before
            now = self._clock()
            before = before or new_record(request_id, events[0].date, now)
            status_before = status_of(before)
            return fold_progress(before, events, now)

        after = await self._records.update(RequestRecord, key, fold, counted_as="request")
        if after is None:
            return
        status = status_of(after)
        if status is not status_before:
            _log.info("request_status_changed", status=status.value, **msgspec.structs.asdict(counts_of(after)))
        if status.ended:
            await self._publish_waiting(after)

    async def _publish_waiting(self, ended: RequestRecord) -> None:
        waiting = await active_requests.waiting_for(self._store, ended.date, ended.request_id)
        if waiting is not None:
            await self._publisher.publish([OutgoingEvent(request_event(waiting))])
