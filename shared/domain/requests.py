"""The status of a request, from the record of its progress, and the start of a retry of its failed cities.

Order of effects of a retry: a compare-and-swap changes the record, so that the request is running again; then
``ProcessRequested`` is published. If that event is lost, the requeue of stalled requests publishes it again.
"""

from __future__ import annotations

import datetime as dt
import enum
from typing import TypeVar

import msgspec

from shared.domain import bitmap
from shared.domain.errors import OperatorError
from shared.domain.events import Outcome, ProcessRequested, Retry
from shared.domain.ids import RequestId, parse_request_id, request_time_ms
from shared.domain.objects import Backfill, RequestAction, RequestRecord, RetriedCity, RetryRecord, Schedule

ACTIONS_MAX = 50
PARAMETERS_LENGTH_MAX = 200


class Status(enum.Enum):
    """The status of a request. The last four are final; a retry makes a request with failures run again."""

    ACCEPTED = "accepted"
    PLANNED = "planned"
    RUNNING = "running"
    COMPLETED = "completed"
    COMPLETED_WITH_FAILURES = "completed with failures"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the status is final unless the request is retried."""
        return self in {Status.COMPLETED, Status.COMPLETED_WITH_FAILURES, Status.FAILED, Status.CANCELLED}


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The client that acts on a request: the name of its API key, or empty, and its address."""

    key: str = ""
    client: str = ""


NOBODY = Caller()
_BACKFILL = "backfill "


def caller_of_backfill(backfill_id: RequestId) -> Caller:
    """Return a backfill as the one that acts on a request."""
    return Caller(client=f"{_BACKFILL}{backfill_id}")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a request. A city is done when it has failed, was skipped or is served."""

    cities_total: int
    cities_done: int
    cities_failed: int
    cities_skipped: int
    cities_unchanged: int
    cities_stored: int
    bytes_done: int
    bytes_total: int
    trips_done: int


def counts_of(record: RequestRecord) -> Counts:
    """Return the progress of a request. ``bytes_total`` covers started files only: other sizes are unknown."""
    failed = bitmap.size(record.outcomes.get(Outcome.FAILED, "0"))
    skipped = bitmap.size(record.outcomes.get(Outcome.SKIPPED, "0"))
    under_way = record.under_way.values()
    return Counts(
        cities_total=record.cities,
        cities_done=failed + skipped + bitmap.size(record.served),
        cities_failed=failed,
        cities_skipped=skipped,
        cities_unchanged=bitmap.size(record.outcomes.get(Outcome.UNCHANGED, "0")),
        cities_stored=bitmap.size(record.outcomes.get(Outcome.STORED, "0")),
        bytes_done=record.bytes_done + sum(city.bytes_done for city in under_way),
        bytes_total=record.bytes_done + sum(city.bytes_total or city.bytes_done for city in under_way),
        trips_done=record.trips_done + sum(city.trips_done for city in under_way),
    )


def status_of(record: RequestRecord) -> Status:
    """Return the status of a request. Completed means that every city has failed or is in the live generation.

    A cancelled request runs until its started cities have ended. If no city was left to skip, it ends like any other.
    """
    if not record.planned:
        if record.failed_reason is None:
            return Status.RUNNING if record.retry else Status.ACCEPTED
        return Status.FAILED if record.cancelled_at is None else Status.CANCELLED
    counts = counts_of(record)
    if counts.cities_done == counts.cities_total:
        if counts.cities_skipped and record.cancelled_at is not None:
            return Status.CANCELLED
        return Status.COMPLETED_WITH_FAILURES if counts.cities_failed else Status.COMPLETED
    return Status.RUNNING if record.outcomes or record.under_way or record.retry else Status.PLANNED


def unfinished_of(record: RequestRecord) -> int:
    """Return the bitmap of the cities that are not yet failed, skipped or served."""
    finished = bitmap.decode(record.served)
    for outcome in (Outcome.FAILED, Outcome.SKIPPED):
        finished |= bitmap.decode(record.outcomes.get(outcome, "0"))
    return ((1 << record.cities) - 1) & ~finished


def new_record(request_id: RequestId, date: dt.date, now: dt.datetime | None = None) -> RequestRecord:
    """Return the first record of a request. Its id contains the time at which it was requested."""
    requested_at = dt.datetime.fromtimestamp(request_time_ms(request_id) / 1000, dt.UTC)
    return RequestRecord(request_id=request_id, date=date, requested_at=requested_at, updated_at=now or requested_at)


def backfill_of(record: RequestRecord) -> RequestId | None:
    """Return the id of the backfill that made a request, or None if a client requested it, or joined it."""
    clients = [action.client for action in record.actions if action.action == "process"]
    if not clients or not all(client.startswith(_BACKFILL) for client in clients):
        return None
    return parse_request_id(clients[0].removeprefix(_BACKFILL))


_Acted = TypeVar("_Acted", RequestRecord, Backfill, Schedule)


def with_action(
    record: _Acted, by: Caller, action: str, *, result: str, at: dt.datetime, parameters: str = ""
) -> _Acted:
    """Return a request, backfill or schedule with an action of a client.

    If there are ACTIONS_MAX, the second one is removed.
    """
    done = RequestAction(
        at=at, action=action, key=by.key, client=by.client, parameters=parameters[:PARAMETERS_LENGTH_MAX], result=result
    )
    earlier: tuple[RequestAction, ...] = record.actions
    if len(earlier) == ACTIONS_MAX:
        earlier = earlier[:1] + earlier[2:]
    return msgspec.structs.replace(record, actions=(*earlier, done))


def request_event(record: RequestRecord, *, resent_at: dt.datetime | None = None) -> ProcessRequested:
    """Return the event that starts the processing of a request, or of its latest retry."""
    retry = None
    if record.retry is not None and not record.retry.plan_revision:
        resent_at = resent_at or record.retry.retried_at
    elif record.retry is not None:
        retry = Retry(
            plan_revision=record.retry.plan_revision,
            positions=record.retry.positions,
            retried_at=record.retry.retried_at,
        )
    return ProcessRequested(
        request_id=record.request_id,
        date=record.date,
        requested_at=record.requested_at,
        retry=retry,
        resent_at=resent_at,
        background=record.background,
    )


def is_awaited(record: RequestRecord, position: int) -> bool:
    """Return whether a city has ended with statistics that are not served yet."""
    ended = (record.outcomes.get(outcome, "0") for outcome in (Outcome.UNCHANGED, Outcome.STORED))
    has_numbers = any(bitmap.contains(bitmap.decode(digits), position) for digits in ended)
    return has_numbers and not bitmap.contains(bitmap.decode(record.served), position)


def is_stalled(record: RequestRecord, now: dt.datetime, *, after: dt.timedelta, wait_max: dt.timedelta) -> bool:
    """Return whether an unended request is due to be published again: ``after`` its last progress, then ever rarer."""
    last = max(record.updated_at, record.resent_at or record.updated_at)
    stalled_for = last - record.updated_at
    return now - last >= min(max(after, stalled_for), wait_max)


def resent_event(record: RequestRecord, now: dt.datetime) -> ProcessRequested:
    """Return the event of a stalled request. The planner drops one that is not later than its last dispatch."""
    return request_event(record, resent_at=_after_earlier_events(record, now))


def _after_earlier_events(record: RequestRecord, now: dt.datetime) -> dt.datetime:
    """Return a time after that of each earlier event: the planner tells events by their times, and clocks differ."""
    earlier = [record.dispatched_at, record.retry.retried_at if record.retry else None]
    return max([now, *(at + dt.timedelta(microseconds=1) for at in earlier if at is not None)])


def cancelled_record(record: RequestRecord, now: dt.datetime) -> RequestRecord:
    """Return the record of a request that is cancelled. Returns ``record`` itself if it was already cancelled."""
    if record.cancelled_at is not None:
        return record
    return msgspec.structs.replace(record, cancelled_at=now, updated_at=now, version=record.version + 1)


class NothingToRetry(OperatorError):
    """The request has no failed cities to retry, or has not ended yet."""


def retried_record(record: RequestRecord, now: dt.datetime, *, positions: int | None = None) -> RequestRecord:
    """Return the record of a request with a new retry of its failed cities.

    If its city list could not be read, the whole request is retried. ``positions`` is a bitmap that limits the retry to
    these cities. Returns ``record`` itself if such a retry already runs. Raises NothingToRetry if none of the cities
    has failed, or if the request has not ended.
    """
    status = status_of(record)
    if not status.ended:
        if record.retry is not None and not (positions or 0) & ~bitmap.decode(record.retry.positions):
            return record
        raise NothingToRetry(f"request {record.request_id} is {status.value}; retry it when it has ended")
    if record.cancelled_at is not None:
        raise NothingToRetry(f"request {record.request_id} was cancelled; request {record.date} again")
    failed = bitmap.decode(record.outcomes.get(Outcome.FAILED, "0"))
    chosen = failed if positions is None else failed & positions
    if not chosen and status is not Status.FAILED:
        raise NothingToRetry(f"request {record.request_id} is {status.value}; it has no failed city to retry")
    retried = {at: failure for at, failure in record.failures.items() if bitmap.contains(chosen, at)}
    return msgspec.structs.replace(
        record,
        outcomes=record.outcomes | {Outcome.FAILED: bitmap.encode(failed & ~chosen)},
        failures={at: failure for at, failure in record.failures.items() if at not in retried},
        failed_reason=None,
        retry=RetryRecord(
            count=record.retry.count + 1 if record.retry else 1,
            retried_at=_after_earlier_events(record, now),
            plan_revision=record.plan_revision,
            positions=bitmap.encode(chosen),
            cities=tuple(RetriedCity(city_id=one.city_id, city_name=one.city_name) for one in retried.values()),
        ),
        version=record.version + 1,
        updated_at=now,
    )
