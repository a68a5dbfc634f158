"""What the record of a request's progress means: its status, and how far it has come. Pure."""

from __future__ import annotations

import datetime as dt
import enum

import msgspec

from shared import bitmap
from shared.errors import OperatorError
from shared.events import Outcome, ProcessRequested, Retry
from shared.objects import RequestRecord


class Status(enum.Enum):
    """Where a request is. The last four are ends; only a retry of failed cities can move *with failures* on."""

    ACCEPTED = "accepted"
    PLANNED = "planned"
    RUNNING = "running"
    COMPLETED = "completed"
    COMPLETED_WITH_FAILURES = "completed with failures"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in {Status.COMPLETED, Status.COMPLETED_WITH_FAILURES, Status.FAILED, Status.CANCELLED}


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How far a request has come. A city is done when it failed or its numbers are served."""

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
    """Count what is done. ``bytes_total`` is of the files begun so far: nobody knows the others' sizes."""
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
    """Say where a request is. Completed means served: every city has failed or is folded in the live generation.

    A request that was cancelled goes on until the cities that were started have ended. If none was left to skip, it
    ends like any other.
    """
    if not record.planned:
        if record.failed_reason is None:
            return Status.ACCEPTED
        return Status.FAILED if record.cancelled_at is None else Status.CANCELLED
    counts = counts_of(record)
    if counts.cities_done == counts.cities_total:
        if counts.cities_skipped and record.cancelled_at is not None:
            return Status.CANCELLED
        return Status.COMPLETED_WITH_FAILURES if counts.cities_failed else Status.COMPLETED
    return Status.RUNNING if record.outcomes or record.under_way else Status.PLANNED


def is_awaited(record: RequestRecord, position: int) -> bool:
    """Tell whether a city has ended with numbers that are not served yet."""
    ended = (record.outcomes.get(outcome, "0") for outcome in (Outcome.UNCHANGED, Outcome.STORED))
    has_numbers = any(bitmap.contains(bitmap.decode(digits), position) for digits in ended)
    return has_numbers and not bitmap.contains(bitmap.decode(record.served), position)


class NothingToRetry(OperatorError):
    """The request has no failed cities that could be taken up again, or has not ended yet."""


def retry_of(record: RequestRecord, now: dt.datetime, *, positions: int | None = None) -> ProcessRequested:
    """Return what takes up the failed cities of a request again, under its own id.

    If its list of cities could not be had, all of it is taken up. ``positions`` is a bitmap of the cities to which the
    retry is limited. Raises NothingToRetry if none of them has failed, or if the request has not ended.
    """
    status = status_of(record)
    if status is Status.FAILED:
        return ProcessRequested(request_id=record.request_id, date=record.date, requested_at=record.requested_at)
    failed = bitmap.decode(record.outcomes.get(Outcome.FAILED, "0"))
    chosen = failed if positions is None else failed & positions
    if not status.ended:
        raise NothingToRetry(f"request {record.request_id} is {status.value}: it can be retried once it has ended")
    if record.cancelled_at is not None:
        raise NothingToRetry(f"request {record.request_id} was cancelled: ask for {record.date} again")
    if not chosen:
        raise NothingToRetry(f"request {record.request_id} is {status.value}: no such city of it has failed")
    return ProcessRequested(
        request_id=record.request_id,
        date=record.date,
        requested_at=record.requested_at,
        retry=Retry(plan_revision=record.plan_revision, positions=bitmap.encode(chosen), retried_at=now),
    )
