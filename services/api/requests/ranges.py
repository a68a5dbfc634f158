"""Processing requests for a range of dates: one request for each date, and a record that lists them.

The order of effects when a range is accepted:

1. its idempotency key, if it has one, is claimed;
2. each date joins the waiting request of that date, or gets a new waiting request;
3. the record of the range is written, with the ids of its requests;
4. the requests without a record are published and recorded, like any other request.

A second call with the key continues where the first one stopped, under the same ids.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import msgspec

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, NotFound, quoted
from services.api.http.unreadable import UnreadableObject, report_unreadable
from services.api.requests.service import (
    CONCURRENT_GETS_MAX,
    RECORD_DEADLINE_S,
    RequestOverview,
    Requests,
    overview_of,
)
from shared.domain import keys
from shared.domain.ids import RequestId, mint_request_id, parse_request_id
from shared.domain.objects import BucketObject, CorruptObject, RequestRecord
from shared.domain.requests import NOBODY, Caller, Counts, Status, new_record
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


class RangeRecord(BucketObject, frozen=True, kw_only=True):
    """A requested range, and its requests in the order of the dates."""

    range_id: RequestId
    first: dt.date
    last: dt.date
    requests: tuple[RequestId, ...]


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


class _Missing(NamedTuple):
    """A request of a range that has no record yet."""

    request_id: RequestId
    date: dt.date


_Child = RequestRecord | UnreadableObject | _Missing


class RangeRequests:
    """Reads and cancels the ranges of the bucket, and accepts new ones."""

    def __init__(self, store: ObjectStore, requests: Requests, *, clock: Callable[[], dt.datetime]) -> None:
        self._repository = Repository(store)
        self._requests = requests
        self._clock = clock

    async def accept(self, days: DateRange, *, idempotency_key: str | None = None, by: Caller = NOBODY) -> RangeDetail:
        """Request the processing of every date of a range. Raises the errors of `Requests.accept`."""

        async def mint() -> RequestId:
            return mint_request_id(self._clock())

        async with deadline(RECORD_DEADLINE_S, "Writing the range"):
            range_id = await mint()
            record = None
            parameters = f"from={days.first}&to={days.last}"
            if idempotency_key is not None:
                range_id = await self._requests.claims.claim(idempotency_key, parameters, mint, caller=by.key)
                record = await self._read(keys.range_request(range_id))
            if record is None:
                ids = await bounded_map(self._requests.join, list(days.dates()), limit=CONCURRENT_GETS_MAX)
                wanted = RangeRecord(range_id=range_id, first=days.first, last=days.last, requests=tuple(ids))
                record = await self._repository.create_if_absent(keys.range_request(range_id), wanted)
            children = await self._children(record)
            joined = [child for child in children if isinstance(child, RequestRecord)]
            await bounded_map(
                lambda child: self._requests.add_client(child, by, parameters), joined, limit=CONCURRENT_GETS_MAX
            )
        await self._requests.start(
            [(child.request_id, child.date) for child in children if isinstance(child, _Missing)], by, parameters
        )
        return await self.read(range_id)

    async def read(self, text: str) -> RangeDetail:
        """Return a range by the text of its id. Raises NotFound if there is none."""
        range_id = parse_request_id(text)
        if range_id is not None:
            async with deadline(RECORD_DEADLINE_S, "Reading the range's status"):
                record = await self._read(keys.range_request(range_id))
                children = await self._children(record) if record else []
            if record is not None:
                return detail_of(record, children)
        raise NotFound(f"There is no range with the id {quoted(text)}. `Location` named it when it was accepted.")

    async def cancel(self, text: str, *, by: Caller = NOBODY) -> RangeDetail:
        """Cancel every request of a range that has not ended; return the range.

        Raises NotFound if there is no such range, and Conflict if all its requests have ended.
        """
        detail = await self.read(text)
        if detail.status.ended:
            raise Conflict(f"every request of range {detail.id} has ended: it is {detail.status.value}")
        # A request may end in the meantime, which _cancel ignores.
        open_ids = [child.id for child in detail.requests]
        await bounded_map(lambda request_id: self._cancel(request_id, by), open_ids, limit=CONCURRENT_GETS_MAX)
        return await self.read(text)

    async def _cancel(self, request_id: str, by: Caller) -> None:
        with contextlib.suppress(Conflict):
            await self._requests.cancel(request_id, by=by)

    async def _children(self, record: RangeRecord) -> list[_Child]:

        async def child(index: int) -> _Child:
            request_id = record.requests[index]
            try:
                found = await self._requests.find(request_id)
            except CorruptObject as error:
                return report_unreadable(error)
            return found or _Missing(request_id, record.first + dt.timedelta(days=index))

        return await bounded_map(child, range(len(record.requests)), limit=CONCURRENT_GETS_MAX)

    async def _read(self, key: str) -> RangeRecord | None:
        return await self._repository.get(RangeRecord, key)


def detail_of(record: RangeRecord, children: Sequence[_Child]) -> RangeDetail:
    """Return the fields of a range that the API shows. A request without a record is shown as accepted."""
    unreadable = tuple(child for child in children if isinstance(child, UnreadableObject))
    overviews = tuple(
        overview_of(new_record(child.request_id, child.date) if isinstance(child, _Missing) else child)
        for child in children
        if not isinstance(child, UnreadableObject)
    )
    sums = {field: sum(getattr(overview.counts, field) for overview in overviews) for field in Counts.__struct_fields__}
    return RangeDetail(
        id=record.range_id,
        first=record.first,
        last=record.last,
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
