"""Accepts, cancels, retries and lists processing requests.

The order of effects when a request is accepted:

1. it joins the waiting request of its date, or becomes the waiting request (compare-and-swap);
2. its idempotency key, if it has one, is claimed;
3. Kafka acknowledges ``ProcessRequested``; this is skipped if the request has a record, which proves that Kafka did;
4. its record is written if there is none; then the client gets the response.

So every request that a client got a response for is processed, and its status can be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import msgspec
import structlog
from msgspec import UNSET

from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, NotFound, StatusNotWritten, quoted
from services.api.http.unreadable import UnreadableObject, get_if_readable
from services.api.requests.idempotency import Claims
from shared.domain import bitmap, keys
from shared.domain.events import Outcome
from shared.domain.ids import RequestId, mint_request_id, parse_request_id
from shared.domain.objects import RequestRecord
from shared.domain.requests import (
    ACTIONS_MAX,
    NOBODY,
    Caller,
    Counts,
    NothingToRetry,
    Status,
    backfill_of,
    cancelled_record,
    counts_of,
    new_record,
    request_event,
    status_of,
    unfinished_of,
    with_action,
)
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.tracing import traceparent
from shared.storage import active_requests
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository, begin_retry

ACKNOWLEDGE_DEADLINE_S = 10.0
RECORD_DEADLINE_S = 10.0
LISTING_DEADLINE_S = 30.0
CONCURRENT_GETS_MAX = 16

_log = structlog.get_logger()


class RequestOverview(msgspec.Struct, frozen=True, kw_only=True):
    """A request and its progress."""

    id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    date: Annotated[dt.date, msgspec.Meta(description="The requested date.")]
    status: Annotated[
        Status, msgspec.Meta(description="The last four are final. Completed: the statistics are served.")
    ]
    requested_at: dt.datetime
    updated_at: Annotated[dt.datetime, msgspec.Meta(description="The time of the latest progress.")]
    version: Annotated[int, msgspec.Meta(ge=1, description="Increases with every change.", examples=[12])]
    countries: Annotated[
        int, msgspec.Meta(ge=0, description="The number of countries in the date's plan.", examples=[3])
    ]
    counts: Annotated[
        Counts,
        msgspec.Meta(
            description="A city is done when it failed, was skipped, or its numbers are served. bytes_total covers "
            "only the files begun so far: the sizes of the others are unknown."
        ),
    ]
    failed_reason: Annotated[
        str | None, msgspec.Meta(description="Why the request as a whole failed; null: it did not fail.")
    ]
    cancelled_at: Annotated[
        dt.datetime | None,
        msgspec.Meta(
            description="When it was cancelled; cities that had not started are skipped. null: it was not cancelled."
        ),
    ]
    backfill_id: Annotated[
        str | None, msgspec.Meta(description="The backfill that made it; null: a client requested the date.")
    ] = None


class CityFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A city that failed, and why."""

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]
    reason: Annotated[str, msgspec.Meta(examples=["the upstream answered 404"])]
    quarantine_key: Annotated[
        str | None,
        msgspec.Meta(
            description="The object of the bucket that holds a refused file; its report has the key beside it.",
            examples=["quarantine/date=2024-05-01/city=7/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json"],
        ),
    ]


class LeftOutCity(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the upstream's list of cities that could not be used, and why."""

    entry: Annotated[str, msgspec.Meta(examples=['{"id": null, "name": "Port Tina", "country": "Armenia"}'])]
    reason: Annotated[str, msgspec.Meta(examples=["its id is None; expected an integer or a non-empty string"])]


class RetriedCityDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A city that a retry fetches again."""

    city_id: Annotated[str, msgspec.Meta(examples=["7"])]
    city_name: Annotated[str, msgspec.Meta(examples=["Port Tina"])]


class RetryDetail(msgspec.Struct, frozen=True, kw_only=True):
    """The latest retry of a request, and its progress."""

    count: Annotated[int, msgspec.Meta(ge=1, description="The number of retries of the request.", examples=[1])]
    retried_at: dt.datetime
    cities_total: Annotated[int, msgspec.Meta(ge=0, description="Cities that are retried.", examples=[9])]
    cities_done: Annotated[
        int, msgspec.Meta(ge=0, description="Retried cities that failed again, were skipped, or are served now.")
    ]
    cities_failed: Annotated[int, msgspec.Meta(ge=0, description="Retried cities that failed again.")]
    cities: Annotated[
        tuple[RetriedCityDetail, ...],
        msgspec.Meta(description="The first 100 cities that had failed; empty if the city list had failed."),
    ]


class RequestDetail(RequestOverview, frozen=True, kw_only=True):
    """A request, its progress, and its failures."""

    retry: Annotated[
        RetryDetail | None, msgspec.Meta(description="The latest retry of its failed cities; null: none.")
    ] = None
    failures: Annotated[
        tuple[CityFailure, ...],
        msgspec.Meta(description="The first 100 cities that failed; counts.cities_failed has the number of all."),
    ]
    bad_cities_count: Annotated[int, msgspec.Meta(ge=0, description="Entries of the city list that were left out.")]
    bad_cities: Annotated[
        tuple[LeftOutCity, ...], msgspec.Meta(description="The first 100 entries that were left out.")
    ]


class RequestList(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, newest first."""

    requests: tuple[RequestOverview, ...]
    unreadable: Annotated[
        tuple[UnreadableObject, ...], msgspec.Meta(description="Records of requests that cannot be read.")
    ]
    next: Annotated[
        str | None,
        msgspec.Meta(
            description="The path of the next page; null: this is the last page.",
            examples=["/process-requests?limit=50&after=018f3d2a-5c00-7aaa-8bbb-0123456789ab"],
        ),
    ]


class Latest(msgspec.Struct, frozen=True, kw_only=True):
    """The latest requests. ``last`` is the id of the last one if more follow."""

    records: list[RequestRecord]
    unreadable: list[UnreadableObject]
    last: RequestId | None


class Requests:
    """Reads and changes the requests of the bucket, and publishes new ones."""

    def __init__(self, store: ObjectStore, publisher: Publisher, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._publisher = publisher
        self._clock = clock
        self._locks: weakref.WeakValueDictionary[dt.date, asyncio.Lock] = weakref.WeakValueDictionary()
        self.claims = Claims(store, clock=clock)

    async def accept(self, date: dt.date, *, idempotency_key: str | None = None, by: Caller = NOBODY) -> RequestRecord:
        """Request the processing of a date; return the request's record.

        If a request of the date already waits, return that one: none of its files is read yet. The same idempotency key
        returns the same request. The record names each client; the idempotency keys of one API key are separate from
        those of others.

        Raises DependencyUnavailable if Kafka does not acknowledge; the request may be processed nevertheless, and a
        retry is safe. Raises StatusNotWritten if Kafka acknowledges and the record cannot be written. Raises
        InvalidRequest for a malformed key, and IdempotencyKeyReused for a key that came with another date.
        """
        async with deadline(RECORD_DEADLINE_S, "Joining the requests of the date"), self._lock(date):
            if idempotency_key is None:
                request_id = await self.join(date)
            else:
                request_id = await self.claims.claim(
                    idempotency_key, f"date={date}", lambda: self.join(date), caller=by.key
                )
            record = await self.find(request_id)
            if record is not None:
                return await self.add_client(record, by, f"date={date}")
        (record,) = await self.start([(request_id, date)], by, f"date={date}")
        return record

    async def join(self, date: dt.date) -> RequestId:
        """Return the id of the waiting request of a date; if there is none, a new one becomes it."""
        return await active_requests.join(self._store, date, mint_request_id(self._clock()))

    def _lock(self, date: dt.date) -> asyncio.Lock:
        # Serializes the clients of this process, so that they do not race for the object of the date on S3.
        return self._locks.setdefault(date, asyncio.Lock())

    async def start(
        self, requested: Sequence[tuple[RequestId, dt.date]], by: Caller, parameters: str
    ) -> list[RequestRecord]:
        """Publish requests under their ids, write the records that are missing, and return the records."""
        now, trace = self._clock(), traceparent()
        records = [
            with_action(
                msgspec.structs.replace(new_record(request_id, date), traceparent=trace),
                by,
                "process",
                result="accepted",
                at=now,
                parameters=parameters,
            )
            for request_id, date in requested
        ]
        if not records:
            return []
        await self._publish([OutgoingEvent(request_event(record)) for record in records])
        for record in records:
            _log.info("request_accepted", request_id=record.request_id, date=str(record.date))
        try:
            async with deadline(RECORD_DEADLINE_S, "Writing the request's status"):
                written = await bounded_map(self._create, records, limit=CONCURRENT_GETS_MAX)
                return [await self.add_client(record, by, parameters) for record in written]
        except DependencyUnavailable as error:
            request_id = records[0].request_id
            raise StatusNotWritten(
                f"request {request_id} was published without its record: {error}", request_id
            ) from error

    async def add_client(self, record: RequestRecord, by: Caller, parameters: str) -> RequestRecord:
        """Add a client to the actions of a request that it joined, once; return the request's record.

        Further clients are only in the access log once the record has ACTIONS_MAX actions.
        """

        def is_known(record: RequestRecord) -> bool:
            if record.background is not UNSET:
                return False
            mine = ("process", by.key, by.client, parameters)
            return len(record.actions) >= ACTIONS_MAX or any(
                mine == (one.action, one.key, one.client, one.parameters) for one in record.actions
            )

        async def joined(stored: RequestRecord | None) -> RequestRecord | None:
            if stored is None or is_known(stored):
                return stored
            result = "joined" if stored.actions else "accepted"  # the progress may have written the record first
            # A client waits for it now, so it is no longer processed in the background.
            foreground = msgspec.structs.replace(stored, background=UNSET)
            return with_action(foreground, by, "process", result=result, at=self._clock(), parameters=parameters)

        if is_known(record):
            return record
        key = keys.request(record.request_id)
        return await self._repository.update(RequestRecord, key, joined, counted_as="request") or record

    async def find(self, request_id: RequestId) -> RequestRecord | None:
        """Return a request's record, or None if there is none."""
        return await self._repository.get(RequestRecord, keys.request(request_id))

    async def read(self, text: str) -> RequestRecord:
        """Return the record of a request by the text of its id. Raises NotFound if there is none."""
        request_id = parse_request_id(text)
        async with deadline(RECORD_DEADLINE_S, "Reading the request's status"):
            record = await self.find(request_id) if request_id else None
        if record is None:
            raise _no_such_request(text)
        return record

    async def cancel(self, text: str, *, by: Caller = NOBODY) -> RequestRecord:
        """Cancel a request, so that the cities that have not started are skipped; return its record.

        The cancellation affects every client that joined the request. A request that is not planned yet is published
        again. The planner then ends it at once, even while another request of its date runs.

        Raises NotFound if there is no such request, and Conflict if it has ended.
        """
        cancelled = await self._cancel(text, by)
        if not cancelled.planned:
            # If Kafka is down, the requeue of stalled requests ends the request later.
            with contextlib.suppress(DependencyUnavailable):
                await self._publish([OutgoingEvent(request_event(cancelled))])
        return cancelled

    async def _cancel(self, text: str, by: Caller) -> RequestRecord:
        request_id = parse_request_id(text)
        if request_id is None:
            raise _no_such_request(text)

        async def cancelled(record: RequestRecord | None) -> RequestRecord:
            if record is None:
                raise _no_such_request(text)
            if status_of(record).ended:
                raise Conflict(f"request {record.request_id} has ended: it is {status_of(record).value}")
            now = self._clock()
            after = cancelled_record(record, now)
            return record if after is record else with_action(after, by, "cancel", result="cancelled", at=now)

        async with deadline(RECORD_DEADLINE_S, "Cancelling the request"):
            stored = await self._repository.update(
                RequestRecord, keys.request(request_id), cancelled, counted_as="request"
            )
        assert stored is not None, "a missing record raises NotFound"
        return stored

    async def retry(self, text: str, *, by: Caller = NOBODY) -> RequestRecord:
        """Retry the failed cities of a request; return its record, in which they are unfinished.

        Raises NotFound if there is no such request. Raises Conflict if it has not ended, or has no failed city. Raises
        DependencyUnavailable if Kafka does not acknowledge; a second call is harmless.
        """
        request_id = parse_request_id(text)
        async with deadline(RECORD_DEADLINE_S, "Recording the retry"):
            try:
                record = await begin_retry(self._store, request_id, self._clock(), by=by) if request_id else None
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
        """Return the latest requests, newest first, at most ``limit``; with ``after``, those made before that one."""
        async with deadline(LISTING_DEADLINE_S, "Reading the latest requests"):
            return await latest_requests(self._store, limit, after=after)

    async def _create(self, record: RequestRecord) -> RequestRecord:
        return await self._repository.create_if_absent(keys.request(record.request_id), record)


async def latest_requests(store: ObjectStore, limit: int, *, after: RequestId | None = None) -> Latest:
    """Return the latest requests, newest first, at most ``limit``; with ``after``, those made before that one."""
    latest: list[str] = []
    async for listed in store.list(keys.REQUESTS, after=keys.request(after) if after else ""):
        latest.append(listed.key)
        if len(latest) > limit:
            break
    read = partial(get_if_readable, store, RequestRecord)
    records = await bounded_map(read, latest[:limit], limit=CONCURRENT_GETS_MAX)
    return Latest(
        records=[record for record in records if isinstance(record, RequestRecord)],
        unreadable=[record for record in records if isinstance(record, UnreadableObject)],
        last=keys.parse_request(latest[limit - 1]) if len(latest) > limit else None,
    )


def _no_such_request(text: str) -> NotFound:
    return NotFound(f"There is no request with the id {quoted(text)}. GET /process-requests lists them.")


def overview_of(record: RequestRecord) -> RequestOverview:
    """Return the fields of a request that a list shows."""
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
        backfill_id=backfill_of(record),
    )


def detail_of(record: RequestRecord) -> RequestDetail:
    """Return all fields of a request that the API shows."""
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
    retried = (1 << record.cities) - 1  # under another plan all cities are retried
    if retry.plan_revision == record.plan_revision:
        retried = bitmap.decode(retry.positions)
    failed = retried & bitmap.decode(record.outcomes.get(Outcome.FAILED, "0"))
    return RetryDetail(
        count=retry.count,
        retried_at=retry.retried_at,
        cities_total=retried.bit_count(),
        cities_done=(retried & ~unfinished_of(record)).bit_count(),
        cities_failed=failed.bit_count(),
        cities=tuple(RetriedCityDetail(city_id=one.city_id, city_name=one.city_name) for one in retry.cities),
    )
