"""Advances backfills: requests their dates a few at a time, and records how each one ends.

Every planner does this for every open backfill, and compare-and-swap decides. The order of effects of one step:

1. read the backfill and the records of its dates under way. Dates whose request has ended are counted, and further
   dates take their place;
2. write the backfill (compare-and-swap): this claims the new dates. After a conflict another planner has advanced it;
3. publish the request of each date under way that has no record yet, and write its record. Publish a stalled one again;
4. if nothing is left, remove the backfill from the open ones.

A crash after any step, or a lost response, leads to the same publish again. The claim names the dates, and the id of a
request follows from the backfill and its date. A request without a record counts as not published. So the writer of a
claim need not know whether it won.

A request of a backfill waits like any other while the date is processed. If another request of the date waits too, that
one comes first.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Mapping
from functools import partial

import msgspec
import structlog

from shared.domain import bitmap, keys
from shared.domain.backfills import (
    DateEnd,
    concluded,
    date_at,
    dates_total,
    free_slots,
    is_closed,
    positions_to_retry,
    request_id_of,
    touched,
    with_end,
    with_request,
)
from shared.domain.events import ProcessRequested, Source
from shared.domain.ids import RequestId, request_time_ms
from shared.domain.objects import Backfill, BackfillStatus, CorruptObject, NewerObject, RequestRecord
from shared.domain.requests import (
    NothingToRetry,
    Status,
    caller_of_backfill,
    cancelled_record,
    is_stalled,
    new_record,
    request_event,
    resent_event,
    retried_record,
    status_of,
    with_action,
)
from shared.kafka.failed_keys import for_each
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime import metrics, tracing
from shared.runtime.concurrency import bounded_map
from shared.storage import active_requests
from shared.storage.backfills import is_selected, read_open, remove_closed
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, begin_retry, read_request_record

CONCURRENT_READS_MAX = 16
DATES_CHECKED_MAX = 160
"""The most dates whose data one step looks for."""

ABANDONED_AFTER = dt.timedelta(days=1)
RESEND_WAIT_MAX = dt.timedelta(days=1)

_log = structlog.get_logger()


_END_OF = {Status.COMPLETED: DateEnd.COMPLETED, Status.CANCELLED: DateEnd.CANCELLED}
_Found = RequestRecord | CorruptObject | None


class BackfillAdvancer:
    """Advances the open backfills of the bucket. ``stalled_after`` is the time after which a request is sent again."""

    def __init__(
        self, store: ObjectStore, publisher: Publisher, *, clock: Callable[[], dt.datetime], stalled_after: dt.timedelta
    ) -> None:
        self._store = store
        self._repository = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._stalled_after = stalled_after

    async def once(self) -> None:
        """Advance every open backfill by one step. One that cannot be advanced does not stop the others."""
        backfill_ids = await read_open(self._store)
        metrics.open_backfills.set(len(backfill_ids))

        async def advance(backfill_id: RequestId) -> None:
            try:
                await self.advance(backfill_id)
            except CorruptObject as error:
                _log.error("backfill_unreadable", backfill_id=backfill_id, error=str(error))

        await for_each(advance, backfill_ids)

    async def advance(self, backfill_id: RequestId) -> None:
        """Advance one backfill by one step."""
        key = keys.backfill(backfill_id)
        read = await self._repository.read(Backfill, key)
        now = self._clock()
        if read is None:
            if now.timestamp() * 1000 - request_time_ms(backfill_id) > ABANDONED_AFTER.total_seconds() * 1000:
                await remove_closed(self._store, backfill_id)
            return
        before = read.value
        positions = list(before.under_way)
        found = await bounded_map(partial(self._record_of, before), positions, limit=CONCURRENT_READS_MAX)
        records = dict(zip(positions, found, strict=True))
        after = touched(before, concluded(await self._fill(_settled(before, records, now))), now)
        if after is not before:
            try:
                await self._repository.compare_and_swap(key, after, over=read)
            except CasConflict:
                metrics.cas_conflicts.labels("backfill").inc()
                return
            _count(before, after)
        for position in after.under_way:
            try:
                await self._carry_on(after, position, records.get(position), now)
            except CorruptObject as error:
                _log.error("backfill_date_blocked", backfill_id=backfill_id, error=str(error))
        if is_closed(after):
            await remove_closed(self._store, backfill_id)
            _log.info("backfill_ended", backfill_id=backfill_id, status=after.status.value)

    async def _record_of(self, backfill: Backfill, position: int) -> _Found:
        try:
            return await read_request_record(self._store, request_id_of(backfill, date_at(backfill, position)))
        except NewerObject:
            raise  # this build is too old to know how the date has ended
        except CorruptObject as error:
            _log.error("object_unreadable", key=error.key, error=str(error))
            return error

    async def _fill(self, backfill: Backfill) -> Backfill:
        """Return the backfill with further dates under way. Retries come first."""
        for position in positions_to_retry(backfill)[: free_slots(backfill)]:
            record = await self._record_of(backfill, position)
            if isinstance(record, CorruptObject):
                backfill = with_end(backfill, position, DateEnd.FAILED)
                continue
            retry = 0 if record is None else _retries_of(record) + 1
            backfill = with_request(backfill, position, retry=retry)
        checked = 0
        while free_slots(backfill) and checked < DATES_CHECKED_MAX and backfill.cursor < dates_total(backfill):
            ahead = range(backfill.cursor, min(backfill.cursor + CONCURRENT_READS_MAX, dates_total(backfill)))
            checked += len(ahead)
            selected = await bounded_map(partial(self._is_selected, backfill), ahead, limit=CONCURRENT_READS_MAX)
            for position, is_one in zip(ahead, selected, strict=True):
                if not free_slots(backfill):
                    break
                backfill = with_request(backfill, position) if is_one else with_end(backfill, position, DateEnd.SKIPPED)
        return backfill

    async def _is_selected(self, backfill: Backfill, position: int) -> bool:
        return await is_selected(self._store, backfill.selection, date_at(backfill, position), backfill.background)

    async def _carry_on(self, backfill: Backfill, position: int, record: _Found, now: dt.datetime) -> None:
        """Publish what the request of a date under way needs: itself, a retry, its cancellation, or itself again."""
        date = date_at(backfill, position)
        request_id = request_id_of(backfill, date)
        if isinstance(record, CorruptObject):
            return
        if backfill.status is BackfillStatus.CANCELLED and (record is None or record.cancelled_at is None):
            await self._cancel(request_id, date, now)
        elif record is None:
            await self._request(backfill, date, now)
        elif backfill.under_way[position] > _retries_of(record):
            await self._retry(request_id, now)
        elif is_stalled(record, now, after=self._stalled_after, wait_max=RESEND_WAIT_MAX):
            await self._publish(resent_event(record, now))
            await self._mark_resent(record, now)

    async def _request(self, backfill: Backfill, date: dt.date, now: dt.datetime) -> None:
        """Publish the request of a date. If another one waits there, publish that one if it has no record yet."""
        waiting = request_id = request_id_of(backfill, date)
        if backfill.source is Source.UPSTREAM:  # stored files are read at once: nothing can be read in common
            waiting = await active_requests.join(self._store, date, request_id, backfill.background)
        if waiting != request_id and await read_request_record(self._store, waiting) is not None:
            return
        by = caller_of_backfill(backfill.backfill_id)
        new = msgspec.structs.replace(new_record(waiting, date, now), requested_at=now)
        if waiting == request_id:
            new = msgspec.structs.replace(new, background=backfill.background)
        record = with_action(new, by, "process", result="accepted", at=now)
        about = {"request_id": waiting, "date": str(date), "backfill_id": backfill.backfill_id}
        # A trace for each date: that of a whole backfill would have far too many spans.
        with tracing.root_span("request date", {f"tripfold.{name}": value for name, value in about.items()}):
            await self._publish(request_event(record))
            record = msgspec.structs.replace(record, traceparent=tracing.traceparent())
            await self._repository.create_if_absent(keys.request(waiting), record)
            _log.info("request_accepted", **about)

    async def _retry(self, request_id: RequestId, now: dt.datetime) -> None:
        with contextlib.suppress(NothingToRetry):  # it ended in the meantime, which the next step finds
            record = await begin_retry(self._store, request_id, now)
            if record is not None:
                await self._publish(request_event(record))

    async def _cancel(self, request_id: RequestId, date: dt.date, now: dt.datetime) -> None:
        async def cancel(stored: RequestRecord | None) -> RequestRecord:
            record = stored or new_record(request_id, date, now)
            return record if status_of(record).ended else cancelled_record(record, now)

        record = await self._repository.update(RequestRecord, keys.request(request_id), cancel, counted_as="request")
        assert record is not None, "a missing one is made"
        if not record.planned:
            await self._publish(request_event(record))

    async def _mark_resent(self, record: RequestRecord, now: dt.datetime) -> None:
        async def mark(stored: RequestRecord | None) -> RequestRecord | None:
            return stored and msgspec.structs.replace(stored, resent_at=now)

        metrics.requeued_requests.inc()
        _log.warning("request_requeued", request_id=record.request_id, date=str(record.date))
        await self._repository.update(RequestRecord, keys.request(record.request_id), mark, counted_as="request")

    async def _publish(self, event: ProcessRequested) -> None:
        await self._publisher.publish([OutgoingEvent(event)])


def _settled(backfill: Backfill, found: Mapping[int, _Found], now: dt.datetime) -> Backfill:
    """Return the backfill without the dates whose requests have ended."""
    for position, record in found.items():
        if isinstance(record, CorruptObject):
            backfill = with_end(backfill, position, DateEnd.FAILED)
        elif record is not None and status_of(record).ended and not _needs_retry(backfill, position, record, now):
            backfill = with_end(backfill, position, _END_OF.get(status_of(record), DateEnd.FAILED))
    return backfill


def _needs_retry(backfill: Backfill, position: int, record: RequestRecord, now: dt.datetime) -> bool:
    if backfill.status is BackfillStatus.CANCELLED or backfill.under_way[position] <= _retries_of(record):
        return False
    try:
        retried_record(record, now)
    except NothingToRetry:
        return False
    return True


def _retries_of(record: RequestRecord | None) -> int:
    return record.retry.count if record is not None and record.retry is not None else 0


def _count(before: Backfill, after: Backfill) -> None:
    for end in DateEnd:
        ended = bitmap.size(getattr(after, end.value)) - bitmap.size(getattr(before, end.value))
        metrics.backfill_dates.labels(end.value).inc(max(0, ended))
