"""Backfills as ranges of dates, in the form of the deprecated operations under ``/process-ranges``."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Annotated

import msgspec

from services.api.http.deadline import deadline
from services.api.http.unreadable import UnreadableObject, report_unreadable
from services.api.requests.service import (
    CONCURRENT_GETS_MAX,
    RECORD_DEADLINE_S,
    RequestOverview,
    Requests,
    overview_of,
)
from shared.domain.backfills import date_at, dates_total, request_id_of
from shared.domain.ids import RequestId
from shared.domain.objects import Backfill, BackfillStatus, CorruptObject, RequestRecord
from shared.domain.requests import Counts, Status, new_record
from shared.runtime.concurrency import bounded_map


class RangeDetail(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A requested range, and the progress of its requests."""

    id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    first: dt.date
    last: dt.date
    status: Annotated[
        Status,
        msgspec.Meta(
            description="Failed: every date failed. Completed: every date is completed, and its statistics are served. "
            "Cancelled: a date was cancelled. A request that cannot be read counts as failed."
        ),
    ]
    counts: Annotated[Counts, msgspec.Meta(description="The sums over the dates.")]
    requests: Annotated[tuple[RequestOverview, ...], msgspec.Meta(description="The request of each date, in order.")]
    unreadable: Annotated[
        tuple[UnreadableObject, ...],
        msgspec.Meta(description="Records of its requests that cannot be read; `requests` lacks them."),
    ] = ()


_Child = RequestRecord | UnreadableObject


async def read_range(requests: Requests, backfill: Backfill) -> RangeDetail:
    """Return a backfill as a range. A date whose request was not published yet is shown as accepted."""

    async def child(position: int) -> _Child:
        date = date_at(backfill, position)
        request_id = request_id_of(backfill, date)
        try:
            found = await requests.find(request_id)
        except CorruptObject as error:
            return report_unreadable(error)
        return found or _missing(backfill, request_id, date)

    async with deadline(RECORD_DEADLINE_S, "Reading the range's status"):
        return detail_of(backfill, await bounded_map(child, range(dates_total(backfill)), limit=CONCURRENT_GETS_MAX))


def _missing(backfill: Backfill, request_id: RequestId, date: dt.date) -> RequestRecord:
    record = new_record(request_id, date)
    if backfill.status is not BackfillStatus.CANCELLED:
        return record
    return msgspec.structs.replace(record, cancelled_at=backfill.updated_at, failed_reason="the range was cancelled")


def detail_of(backfill: Backfill, children: Sequence[_Child]) -> RangeDetail:
    """Return the fields of a range that the API shows."""
    unreadable = tuple(child for child in children if isinstance(child, UnreadableObject))
    overviews = tuple(overview_of(child) for child in children if not isinstance(child, UnreadableObject))
    sums = {field: sum(getattr(overview.counts, field) for overview in overviews) for field in Counts.__struct_fields__}
    return RangeDetail(
        id=backfill.backfill_id,
        first=backfill.first,
        last=backfill.last,
        # An unreadable request counts as failed: the range can end, and never claims to be completed.
        status=status_of_all([overview.status for overview in overviews] + [Status.FAILED] * len(unreadable)),
        counts=Counts(**sums),
        requests=overviews,
        unreadable=unreadable,
    )


def status_of_all(statuses: Sequence[Status]) -> Status:
    """Return the combined status of several requests.

    It is their common status. Otherwise, if all have ended, it is cancelled if one was cancelled, and completed with
    failures if not. While some have not ended, it is planned or running.
    """
    if len(set(statuses)) == 1:
        return statuses[0]
    if all(status.ended for status in statuses):
        if Status.CANCELLED in statuses:
            return Status.CANCELLED
        return Status.COMPLETED_WITH_FAILURES
    return Status.PLANNED if set(statuses) <= {Status.ACCEPTED, Status.PLANNED} else Status.RUNNING
