"""Requests: taking one in, and showing how far it has come.

The order of effects of taking one in:

1. it joins the request of the date that waits, or becomes the one (compare-and-swap);
2. its idempotency key, if it has one, is claimed;
3. Kafka acknowledges ``ProcessRequested``, unless the request has a record, which shows that Kafka has done so;
4. its record is put if there is none; then the client is answered.

So an answered request is carried out, and its status can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import weakref
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import msgspec

from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, NotFound, StatusNotWritten, shown
from services.api.requests.idempotency import Claims
from services.api.unreadable import UnreadableObject, read_if_readable
from shared.domain import bitmap, keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import RequestId, mint_request_id, parse_request_id
from shared.domain.objects import BucketObject, RequestRecord
from shared.domain.requests import (
    Counts,
    NothingToRetry,
    Status,
    counts_of,
    new_record,
    request_event,
    status_of,
    unfinished_of,
)
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import DependencyUnavailable
from shared.storage import active_requests
from shared.storage.object_store import CasConflict, ObjectStore, StoredObject
from shared.storage.repository import Repository, begin_retry

ACKNOWLEDGE_DEADLINE_S = 10.0
RECORD_DEADLINE_S = 10.0
LISTING_DEADLINE_S = 30.0
GETS_AT_ONCE_MAX = 16

_Record = TypeVar("_Record", bound=BucketObject)


class RequestOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A request, and how far it has come."""

    id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    date: Annotated[dt.date, msgspec.Meta(description="The date that was asked for.")]
    status: Annotated[
        Status, msgspec.Meta(description="The last four are ends. Completed means that the numbers are served.")
    ]
    requested_at: dt.datetime
    updated_at: Annotated[dt.datetime, msgspec.Meta(description="When the request last made progress.")]
    version: Annotated[int, msgspec.Meta(ge=1, description="Grows with every change.", examples=[12])]
    countries: Annotated[int, msgspec.Meta(ge=0, description="Countries of the date's plan.", examples=[3])]
    counts: Annotated[
        Counts,
        msgspec.Meta(
            description="A city is done when it failed, was skipped, or its numbers are served. bytes_total is of "
            "the files begun so far: nobody knows the sizes of the others."
        ),
    ]
    failed_reason: Annotated[
        str | None, msgspec.Meta(description="Why the request as a whole failed; null: it did not.")
    ]
    cancelled_at: Annotated[
        dt.datetime | None,
        msgspec.Meta(
            description="When it was cancelled: cities that were not started by then are skipped; null: it was not."
        ),
    ]


class CityFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A city that failed, and why."""

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    reason: Annotated[str, msgspec.Meta(examples=["the upstream answered 404"])]
    quarantine_key: Annotated[
        str | None,
        msgspec.Meta(
            description="The object of the bucket that holds the file, if it was refused; its report lies beside it.",
            examples=["quarantine/date=2024-05-01/city=7/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json"],
        ),
    ]


class LeftOutCity(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the upstream's list of cities that could not be used, and why."""

    entry: Annotated[str, msgspec.Meta(examples=['{"id": null, "name": "Port Tina", "country": "Armenia"}'])]
    reason: Annotated[str, msgspec.Meta(examples=["its id is None; expected an integer or a non-empty string"])]


class RetriedCityDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A city that a retry takes up again."""

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]


class RetryDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The latest retry of a request: what it takes up again, and what came of it."""

    count: Annotated[int, msgspec.Meta(ge=1, description="How often the request was retried.", examples=[1])]
    retried_at: dt.datetime
    cities_total: Annotated[int, msgspec.Meta(ge=0, description="Cities that are taken up again.", examples=[9])]
    cities_done: Annotated[
        int, msgspec.Meta(ge=0, description="Those that have failed again, were skipped, or are served now.")
    ]
    cities_failed: Annotated[int, msgspec.Meta(ge=0, description="Those that have failed again.")]
    cities: Annotated[
        tuple[RetriedCityDetail, ...],
        msgspec.Meta(description="The cities that had failed: the first hundred. None if the city list had failed."),
    ]


class RequestDetail(RequestOverview, frozen=True, kw_only=True):
    """A request, how far it has come, and what went wrong on the way."""

    retry: Annotated[
        RetryDetail | None, msgspec.Meta(description="The latest retry of its failed cities; null: there was none.")
    ] = None
    failures: Annotated[
        tuple[CityFailure, ...],
        msgspec.Meta(description="The cities that failed: the first hundred; counts.cities_failed has their number."),
    ]
    bad_cities_count: Annotated[int, msgspec.Meta(ge=0, description="Entries of the list of cities left out.")]
    bad_cities: Annotated[
        tuple[LeftOutCity, ...], msgspec.Meta(description="The entries that were left out: the first hundred.")
    ]


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the latest first."""

    requests: tuple[RequestOverview, ...]
    unreadable: Annotated[
        tuple[UnreadableObject, ...], msgspec.Meta(description="Records among these requests that cannot be read.")
    ]
    next: Annotated[
        str | None,
        msgspec.Meta(
            description="Where those before them are; null: there are none.",
            examples=["/process-requests?limit=50&after=018f3d2a-5c00-7aaa-8bbb-0123456789ab"],
        ),
    ]


class Latest(msgspec.Struct, frozen=True, kw_only=True):
    """The latest requests. ``last`` is the id of the last one if there are more after it."""

    records: list[RequestRecord]
    unreadable: list[UnreadableObject]
    last: RequestId | None


class Requests:
    """The requests of the bucket, and the way to make one."""

    def __init__(self, store: ObjectStore, publisher: Publisher, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._locks: weakref.WeakValueDictionary[dt.date, asyncio.Lock] = weakref.WeakValueDictionary()
        self.claims = Claims(store, clock=clock)

    async def accept(self, date: dt.date, *, idempotency_key: str | None = None, caller: str = "") -> RequestRecord:
        """Ask for a date to be processed; return the request's record. The same key again gives the same request.

        It is the request of the date that waits already, if there is one: its files are not read yet.

        ``caller`` is who asks: each has idempotency keys of their own.

        Raises DependencyUnavailable if Kafka does not acknowledge: the request may be processed all the same, and it is
        safe to ask again. Raises StatusNotWritten if Kafka does, but the record cannot be written. Raises
        InvalidRequest for a key that cannot be one, and IdempotencyKeyReused for one that came with another date.
        """
        async with deadline(RECORD_DEADLINE_S, "Joining the requests of the date"), self._lock(date):
            if idempotency_key is None:
                request_id = await self.join(date)
            else:
                request_id = await self.claims.claim(
                    idempotency_key, f"date={date}", lambda: self.join(date), caller=caller
                )
            record = await self.find(request_id)
        if record is not None:
            return record
        (record,) = await self.start([(request_id, date)])
        return record

    async def join(self, date: dt.date) -> RequestId:
        """Return the id of the request of a date that waits; it is a new one if none does."""
        return await active_requests.join(self._store, date, mint_request_id(self._clock()))

    def _lock(self, date: dt.date) -> asyncio.Lock:
        # Many clients of one process ask one after the other: so they do not race each other for the object on S3.
        return self._locks.setdefault(date, asyncio.Lock())

    async def start(self, asked: Sequence[tuple[RequestId, dt.date]]) -> list[RequestRecord]:
        """Publish requests under their ids, put the records that are not there, and return them."""
        records = [new_record(request_id, date) for request_id, date in asked]
        if not records:
            return []
        requested = [OutgoingEvent(request_event(record)) for record in records]
        await self._publish(requested)
        try:
            async with deadline(RECORD_DEADLINE_S, "Writing the request's status"):
                return await bounded_map(self._put_if_absent, records, limit=GETS_AT_ONCE_MAX)
        except DependencyUnavailable as error:
            request_id = records[0].request_id
            raise StatusNotWritten(
                f"request {request_id} was published without its record: {error}", request_id
            ) from error

    async def find(self, request_id: RequestId) -> RequestRecord | None:
        """Return a request's record, or None if there is none."""
        return await self._read(keys.request(request_id))

    async def read(self, text: str) -> RequestRecord:
        """Return the record of the request whose id ``text`` spells. Raises NotFound if there is none."""
        async with deadline(RECORD_DEADLINE_S, "Reading the request's status"):
            key, found = await self._found(text)
        return objects.decode(RequestRecord, found.body, key)

    async def cancel(self, text: str) -> RequestRecord:
        """Ask for the cities of a request to be skipped that are not started yet; return its record.

        Every client that joined the request shares its end. If it was not planned, it is published again for the
        planner to end it at once, also while another one of its date runs.

        Raises NotFound if there is no such request, and Conflict if nothing is left to cancel.
        """
        cancelled = await self._cancel(text)
        if not cancelled.planned:
            # It is cancelled without Kafka too: the requeue of stalled requests ends it then.
            with contextlib.suppress(DependencyUnavailable):
                await self._publish([OutgoingEvent(request_event(cancelled))])
        return cancelled

    async def _cancel(self, text: str) -> RequestRecord:
        async with deadline(RECORD_DEADLINE_S, "Cancelling the request"):
            while True:
                key, found = await self._found(text)
                record = objects.decode(RequestRecord, found.body, key)
                if status_of(record).ended:
                    raise Conflict(f"request {record.request_id} has ended: it is {status_of(record).value}")
                if record.cancelled_at is not None:
                    return record
                now = self._clock()
                cancelled = msgspec.structs.replace(
                    record, cancelled_at=now, updated_at=now, version=record.version + 1
                )
                with contextlib.suppress(CasConflict):  # it made progress meanwhile
                    await self._store.compare_and_swap(key, objects.encode(cancelled), etag=found.etag)
                    return cancelled

    async def retry(self, text: str) -> RequestRecord:
        """Take up the failed cities of a request again; return its record, in which they are unfinished.

        Raises NotFound if there is no such request, Conflict if it has not ended or no city of it has failed, and a
        DependencyUnavailable if Kafka does not acknowledge: asking again is harmless.
        """
        request_id = parse_request_id(text)
        async with deadline(RECORD_DEADLINE_S, "Recording the retry"):
            try:
                record = await begin_retry(self._store, request_id, self._clock()) if request_id else None
            except NothingToRetry as error:
                raise Conflict(str(error)) from error
        if record is None:
            raise _no_such_request(text)
        await self._publish([OutgoingEvent(request_event(record))])
        return record

    async def _publish(self, outgoing: Sequence[OutgoingEvent]) -> None:
        async with deadline(ACKNOWLEDGE_DEADLINE_S, "Waiting for Kafka to acknowledge", KafkaUnavailable):
            await self._publisher.publish(outgoing)

    async def latest(self, limit: int, *, after: RequestId | None = None) -> Latest:
        """Return the latest requests, at most ``limit``, the latest first; with ``after``, those made before."""
        async with deadline(LISTING_DEADLINE_S, "Reading the latest requests"):
            latest: list[str] = []
            async for listed in self._store.list(keys.REQUESTS, after=keys.request(after) if after else ""):
                latest.append(listed.key)
                if len(latest) > limit:
                    break
            records = await bounded_map(self._read_if_readable, latest[:limit], limit=GETS_AT_ONCE_MAX)
        return Latest(
            records=[record for record in records if isinstance(record, RequestRecord)],
            unreadable=[record for record in records if isinstance(record, UnreadableObject)],
            last=keys.parse_request(latest[limit - 1]) if len(latest) > limit else None,
        )

    async def _read_if_readable(self, key: str) -> RequestRecord | UnreadableObject | None:
        found = await self._store.get(key)
        return read_if_readable(lambda: objects.decode(RequestRecord, found.body, key)) if found else None

    async def _found(self, text: str) -> tuple[str, StoredObject]:
        request_id = parse_request_id(text)
        key = keys.request(request_id) if request_id else ""
        found = await self._store.get(key) if key else None
        if found is None:
            raise _no_such_request(text)
        return key, found

    async def _put_if_absent(self, record: RequestRecord) -> RequestRecord:
        return await put_if_absent(self._store, keys.request(record.request_id), record)

    async def _read(self, key: str) -> RequestRecord | None:
        return await Repository(self._store).get(RequestRecord, key)


async def put_if_absent(store: ObjectStore, key: str, record: _Record) -> _Record:
    """Write a record if there is none; return the one that is there then.

    A race can be lost to nobody: to a conflict that the store did not decide in time. Then it is run again.
    """
    while True:
        try:
            await store.compare_and_swap(key, objects.encode(record), etag=None)
        except CasConflict:
            stored = await Repository(store).get(type(record), key)
            if stored is None:
                continue
            return stored
        return record


def _no_such_request(text: str) -> NotFound:
    return NotFound(f"There is no request with the id {shown(text)}. GET /process-requests lists them.")


def overview_of(record: RequestRecord) -> RequestOverview:
    """Return what a list shows of a request."""
    return RequestOverview(
        id=record.request_id,
        date=record.date,
        status=status_of(record),
        requested_at=record.requested_at,
        updated_at=record.updated_at,
        version=record.version,
        countries=record.countries,
        counts=counts_of(record),
        failed_reason=record.failed_reason,
        cancelled_at=record.cancelled_at,
    )


def detail_of(record: RequestRecord) -> RequestDetail:
    """Return all that is shown of a request."""
    return RequestDetail(
        **msgspec.structs.asdict(overview_of(record)),
        failures=tuple(
            CityFailure(
                city_id=failure.city_id,
                city_name=failure.city_name,
                reason=failure.reason,
                quarantine_key=failure.quarantine_key,
            )
            for failure in record.failures.values()
        ),
        bad_cities_count=record.bad_cities_count,
        bad_cities=tuple(LeftOutCity(entry=bad.entry, reason=bad.reason) for bad in record.bad_cities),
        retry=_retry_of(record),
    )


def _retry_of(record: RequestRecord) -> RetryDetail | None:
    retry = record.retry
    if retry is None:
        return None
    chosen = (1 << record.cities) - 1  # under another plan all cities are taken up
    if retry.plan_revision == record.plan_revision:
        chosen = bitmap.decode(retry.positions)
    failed = chosen & bitmap.decode(record.outcomes.get(Outcome.FAILED, "0"))
    return RetryDetail(
        count=retry.count,
        retried_at=retry.retried_at,
        cities_total=chosen.bit_count(),
        cities_done=(chosen & ~unfinished_of(record)).bit_count(),
        cities_failed=failed.bit_count(),
        cities=tuple(RetriedCityDetail(city_id=one.city_id, city_name=one.city_name) for one in retry.cities),
    )
