"""Requests for a range of dates: one request for each date, and what holds them together.

The order of effects: the idempotency key, if there is one, is claimed; each date joins the request of that date that
waits, or gets one that does; the range is written, with the ids of its requests; those without a record are taken in
like any other. Asking again with the key goes on where the first one stopped, under the same ids.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec

from services.api.http.date_range import DateRange
from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, NotFound, shown
from services.api.requests.service import (
    GETS_AT_ONCE_MAX,
    RECORD_DEADLINE_S,
    RequestOverview,
    Requests,
    overview_of,
    put_if_absent,
)
from shared.domain import keys
from shared.domain.ids import RequestId, mint_request_id, parse_request_id
from shared.domain.objects import BucketObject, RequestRecord
from shared.domain.requests import Counts, Status, new_record
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


class RangeRecord(BucketObject, frozen=True, kw_only=True):
    """A range that was asked for, and its requests in the order of the dates."""

    range_id: RequestId
    first: dt.date
    last: dt.date
    requests: tuple[RequestId, ...]


class RangeDetail(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A range that was asked for, and how far its requests have come."""

    id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    first: dt.date
    last: dt.date
    status: Annotated[
        Status,
        msgspec.Meta(
            description="Failed: every date failed. Completed: every date is, and its numbers are served. Cancelled: a "
            "date was, before it ended."
        ),
    ]
    counts: Annotated[Counts, msgspec.Meta(description="The sums over the dates.")]
    requests: Annotated[tuple[RequestOverview, ...], msgspec.Meta(description="One request a date, in their order.")]


class RangeRequests:
    """The ranges of the bucket, and the way to ask for one."""

    def __init__(self, store: ObjectStore, requests: Requests, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._requests = requests
        self._clock = clock

    async def accept(self, days: DateRange, *, idempotency_key: str | None = None, caller: str = "") -> RangeDetail:
        """Ask for every date of a range; errors are those of asking for one."""

        async def mint() -> RequestId:
            return mint_request_id(self._clock())

        async with deadline(RECORD_DEADLINE_S, "Writing the range"):
            range_id = await mint()
            record = None
            if idempotency_key is not None:
                range_id = await self._requests.claims.claim(
                    idempotency_key, f"from={days.first}&to={days.last}", mint, caller=caller
                )
                record = await self._read(keys.range_request(range_id))
            if record is None:
                joined = await bounded_map(self._requests.join, list(days.dates()), limit=GETS_AT_ONCE_MAX)
                wanted = RangeRecord(range_id=range_id, first=days.first, last=days.last, requests=tuple(joined))
                record = await put_if_absent(self._store, keys.range_request(range_id), wanted)
            children = await self._children(record)
        await self._requests.start([(child.request_id, child.date) for child, there in children if not there])
        return await self.read(range_id)

    async def read(self, text: str) -> RangeDetail:
        """Return the range whose id ``text`` spells, as it is. Raises NotFound if there is none."""
        range_id = parse_request_id(text)
        if range_id is not None:
            async with deadline(RECORD_DEADLINE_S, "Reading the range's status"):
                record = await self._read(keys.range_request(range_id))
                children = await self._children(record) if record else []
            if record is not None:
                return detail_of(record, [child for child, _ in children])
        raise NotFound(f"There is no range with the id {shown(text)}.")

    async def cancel(self, text: str) -> RangeDetail:
        """Cancel every request of a range that has not ended; return the range.

        Raises NotFound if there is no such range, and Conflict if all its requests have ended.
        """
        detail = await self.read(text)
        if detail.status.ended:
            raise Conflict(f"every request of range {detail.id} has ended: it is {detail.status.value}")
        # Another one may end meanwhile.
        await bounded_map(self._cancel, [child.id for child in detail.requests], limit=GETS_AT_ONCE_MAX)
        return await self.read(text)

    async def _cancel(self, request_id: str) -> None:
        with contextlib.suppress(Conflict):
            await self._requests.cancel(request_id)

    async def _children(self, record: RangeRecord) -> list[tuple[RequestRecord, bool]]:
        """Return the record of each request, and whether it is there or has yet to be."""

        async def child(place: int) -> tuple[RequestRecord, bool]:
            request_id = record.requests[place]
            found = await self._requests.find(request_id)
            return found or new_record(request_id, record.first + dt.timedelta(days=place)), found is not None

        return await bounded_map(child, range(len(record.requests)), limit=GETS_AT_ONCE_MAX)

    async def _read(self, key: str) -> RangeRecord | None:
        return await Repository(self._store).get(RangeRecord, key)


def detail_of(record: RangeRecord, children: Sequence[RequestRecord]) -> RangeDetail:
    """Return what is shown of a range."""
    overviews = tuple(overview_of(child) for child in children)
    sums = {field: sum(getattr(overview.counts, field) for overview in overviews) for field in Counts.__struct_fields__}
    return RangeDetail(
        id=record.range_id,
        first=record.first,
        last=record.last,
        status=status_of_all([overview.status for overview in overviews]),
        counts=Counts(**sums),
        requests=overviews,
    )


def status_of_all(statuses: Sequence[Status]) -> Status:
    """Return the status of requests taken together: their common one, or else where they are on the way.

    If all have ended, and not in the same way, it is cancelled if one of them was.
    """
    if len(set(statuses)) == 1:
        return statuses[0]
    if all(status.ended for status in statuses):
        if Status.CANCELLED in statuses:
            return Status.CANCELLED
        return Status.COMPLETED_WITH_FAILURES
    return Status.PLANNED if set(statuses) <= {Status.ACCEPTED, Status.PLANNED} else Status.RUNNING
