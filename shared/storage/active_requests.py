"""Coalesces the requests of a date: one runs, one waits, and later ones join the waiting one.

The state is a small object for each date, changed by compare-and-swap:

1. The API writes a request into ``waiting``, or joins the one that waits there and has not begun.
2. The planner moves it from ``waiting`` to ``running`` before it reads the city list, once the previous request has
   ended. The client of a joined request therefore gets files that are read after the join.
3. The aggregate publishes the waiting request when the running one has ended.

No request is lost. The planner drops the event of a waiting request only while another request runs, and the end of
that request publishes the waiting one again. If that event is lost, the requeue of stalled requests publishes it. A
running request that is stalled, or whose record is missing, blocks no other. One of a backfill blocks only those of
backfills. A request that is not named here is processed at once.
"""

from __future__ import annotations

import datetime as dt

import msgspec
from msgspec import UNSET, UnsetType

from shared.domain import keys, objects
from shared.domain.events import Background
from shared.domain.ids import RequestId
from shared.domain.objects import ActiveRequests, CorruptObject, RequestRecord
from shared.domain.requests import new_record, status_of
from shared.runtime import metrics
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository, read_request_record

STALLED_AFTER = dt.timedelta(hours=1)
"""A running request without progress for this long no longer blocks the next one."""


async def join(
    store: ObjectStore, date: dt.date, request_id: RequestId, background: Background | UnsetType = UNSET
) -> RequestId:
    """Make a request wait; return its id, or the id of the request of the date that already waits.

    Does nothing if the request already runs.
    """
    while True:
        active, etag = await _read(store, date)
        if active.running == request_id:
            return request_id
        if active.waiting is not None and _is_joinable(await _record(store, active.waiting)):
            return active.waiting
        joined = msgspec.structs.replace(active, waiting=request_id, background=background)
        if await _compare_and_swap(store, joined, etag):
            return request_id


async def begin(
    store: ObjectStore, date: dt.date, request_id: RequestId, now: dt.datetime, *, background: bool = False
) -> bool:
    """Move a request from waiting to running; return False if another request still runs.

    A request in the background blocks only others in the background.
    """
    while True:
        active, etag = await _read(store, date)
        if active.waiting != request_id:
            return True
        running = await _record(store, active.running) if active.running else None
        blocks = background or (running is not None and running.background is UNSET)
        if blocks and running is not None and _is_running(running, now):
            return False
        begun = msgspec.structs.replace(active, running=request_id, waiting=None, background=UNSET)
        if await _compare_and_swap(store, begun, etag):
            return True


async def waiting_for(store: ObjectStore, date: dt.date, request_id: RequestId) -> RequestRecord | None:
    """Return the first record of the request that waits for this one to end, if any."""
    active, _ = await _read(store, date)
    if active.waiting is None or active.running != request_id:
        return None
    return msgspec.structs.replace(new_record(active.waiting, date), background=active.background)


def _is_joinable(record: RequestRecord | None) -> bool:
    """Return whether a waiting request will still be processed. One without a record is not published yet."""
    return record is None or not (record.planned or record.cancelled_at is not None or status_of(record).ended)


def _is_running(record: RequestRecord, now: dt.datetime) -> bool:
    return not status_of(record).ended and now - record.updated_at < STALLED_AFTER


async def _read(store: ObjectStore, date: dt.date) -> tuple[ActiveRequests, str | None]:
    stored = await Repository(store).read(ActiveRequests, keys.active_requests(date))
    return (stored.value, stored.etag) if stored else (ActiveRequests(date=date), None)


async def _compare_and_swap(store: ObjectStore, active: ActiveRequests, etag: str | None) -> bool:
    try:
        await store.compare_and_swap(keys.active_requests(active.date), objects.encode(active), etag=etag)
    except CasConflict:  # perhaps with an own write whose response was lost
        metrics.cas_conflicts.labels("active_requests").inc()
        return False
    return True


async def _record(store: ObjectStore, request_id: RequestId) -> RequestRecord | None:
    """Read the record of another request. An unreadable one must not block this one."""
    try:
        return await read_request_record(store, request_id)
    except CorruptObject:
        return None
