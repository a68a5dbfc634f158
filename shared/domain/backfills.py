"""Rules of backfills: their dates, the ids of their requests, and what each step makes of their state. Pure.

A backfill is one object. Its dates are named by their position in the order of processing, so that bitmaps describe
thousands of dates in few bytes.
"""

from __future__ import annotations

import datetime as dt
import enum

import msgspec

from shared.domain import bitmap
from shared.domain.errors import OperatorError
from shared.domain.events import BACKGROUND, Background
from shared.domain.ids import RequestId, derive_request_id
from shared.domain.objects import Backfill, BackfillStatus, DateSelection

DATES_MAX = 4_000
MAX_PARALLEL_MAX = 16
MAX_PARALLEL_DEFAULT = 2


class DateEnd(enum.Enum):
    """How a date of a backfill has ended. A date with a failed city has failed."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


class NotPossible(OperatorError):
    """The state of the backfill does not allow the operation. The message states it."""


class BackfillCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The dates of a backfill by their state."""

    dates_total: int
    dates_completed: int
    dates_failed: int
    dates_skipped: int
    dates_cancelled: int
    dates_under_way: int

    @property
    def left(self) -> int:
        """The dates that have not ended."""
        ended = self.dates_completed + self.dates_failed + self.dates_skipped + self.dates_cancelled
        return self.dates_total - ended


def new_backfill(
    backfill_id: RequestId,
    first: dt.date,
    last: dt.date,
    *,
    now: dt.datetime,
    selection: DateSelection = DateSelection.ALL,
    newest_first: bool = False,
    max_parallel: int = MAX_PARALLEL_DEFAULT,
    schedule: str | None = None,
    background: Background = BACKGROUND,
) -> Backfill:
    """Return a backfill of which no date is requested yet."""
    return Backfill(
        backfill_id=backfill_id,
        first=first,
        last=last,
        selection=selection,
        newest_first=newest_first,
        max_parallel=max_parallel,
        schedule=schedule,
        background=background,
        created_at=now,
        updated_at=now,
        counted_from=now,
    )


def dates_total(backfill: Backfill) -> int:
    """Return the number of dates of a backfill."""
    return (backfill.last - backfill.first).days + 1


def date_at(backfill: Backfill, position: int) -> dt.date:
    """Return the date at a position of the order of processing."""
    if backfill.newest_first:
        return backfill.last - dt.timedelta(days=position)
    return backfill.first + dt.timedelta(days=position)


def request_id_of(backfill: Backfill, date: dt.date) -> RequestId:
    """Return the id of the request of a date. It follows from the backfill, so publishing it twice is one request."""
    return derive_request_id(backfill.created_at, f"{backfill.backfill_id}/{date}")


def counts_of(backfill: Backfill) -> BackfillCounts:
    """Return how many dates are in which state."""
    return BackfillCounts(
        dates_total=dates_total(backfill),
        dates_completed=bitmap.size(backfill.completed),
        dates_failed=bitmap.size(backfill.failed),
        dates_skipped=bitmap.size(backfill.skipped),
        dates_cancelled=bitmap.size(backfill.cancelled),
        dates_under_way=len(backfill.under_way),
    )


def dates_per_hour(backfill: Backfill) -> float | None:
    """Return the throughput since the backfill was started or resumed, or None before its first date has ended."""
    seconds = (backfill.updated_at - backfill.counted_from).total_seconds()
    return backfill.counted / seconds * 3600 if backfill.counted and seconds > 0 else None


def estimated_end(backfill: Backfill) -> dt.datetime | None:
    """Return when a running backfill ends at its present throughput, or None if that is unknown."""
    rate = dates_per_hour(backfill)
    if rate is None or backfill.status is not BackfillStatus.RUNNING:
        return None
    try:
        return backfill.updated_at + dt.timedelta(hours=counts_of(backfill).left / rate)
    except OverflowError:  # at this rate it does not end before the year 10,000
        return None


def free_slots(backfill: Backfill) -> int:
    """Return how many further dates may be requested now."""
    running = backfill.status is BackfillStatus.RUNNING
    return max(0, backfill.max_parallel - len(backfill.under_way)) if running else 0


def positions_to_retry(backfill: Backfill) -> list[int]:
    """Return the positions that wait for a retry, in order."""
    return bitmap.members(backfill.to_retry)


def with_request(backfill: Backfill, position: int, *, retry: int = 0) -> Backfill:
    """Return the backfill with a date under way, which awaits the retry number ``retry`` of its request."""
    return msgspec.structs.replace(
        backfill,
        cursor=max(backfill.cursor, position + 1),
        under_way=dict(sorted((backfill.under_way | {position: retry}).items())),
        to_retry=_without(backfill.to_retry, position),
    )


def with_end(backfill: Backfill, position: int, end: DateEnd) -> Backfill:
    """Return the backfill with a date that has ended."""
    ended = msgspec.structs.replace(
        backfill,
        cursor=max(backfill.cursor, position + 1),
        under_way={other: retry for other, retry in backfill.under_way.items() if other != position},
        to_retry=_without(backfill.to_retry, position),
        counted=backfill.counted + (end is not DateEnd.SKIPPED),
    )
    member = bitmap.member(position)
    return msgspec.structs.replace(
        ended, **{end.value: bitmap.encode(bitmap.decode(getattr(ended, end.value)) | member)}
    )


def concluded(backfill: Backfill) -> Backfill:
    """Return the backfill with its final status, if no date is left to request and none is under way."""
    left = backfill.cursor < dates_total(backfill) or bitmap.decode(backfill.to_retry)
    if backfill.status.ended or backfill.under_way or left:
        return backfill
    lacking = bitmap.decode(backfill.failed) | bitmap.decode(backfill.cancelled)
    status = BackfillStatus.COMPLETED_WITH_FAILURES if lacking else BackfillStatus.COMPLETED
    return msgspec.structs.replace(backfill, status=status)


def is_closed(backfill: Backfill) -> bool:
    """Return whether a planner has nothing left to do for the backfill."""
    return backfill.status.ended and not backfill.under_way


def touched(before: Backfill, after: Backfill, now: dt.datetime) -> Backfill:
    """Return ``after`` as the next version of ``before``, or ``before`` itself if they are equal."""
    if before == after:
        return before
    return msgspec.structs.replace(after, version=before.version + 1, updated_at=max(now, before.updated_at))


def paused(backfill: Backfill, now: dt.datetime) -> Backfill:
    """Return the backfill paused: requested dates end, and no further ones are requested. Raises NotPossible."""
    _refuse_ended(backfill, "only a running one can be paused")
    return touched(backfill, msgspec.structs.replace(backfill, status=BackfillStatus.PAUSED), now)


def resumed(backfill: Backfill, now: dt.datetime) -> Backfill:
    """Return a paused backfill running again. Raises NotPossible if it has ended."""
    _refuse_ended(backfill, "only a paused one can be resumed")
    return _started(backfill, backfill, now)


def cancelled(backfill: Backfill, now: dt.datetime) -> Backfill:
    """Return the backfill cancelled: requested dates are cancelled, and no further ones requested.

    Raises NotPossible if it has ended; a cancelled one is returned unchanged.
    """
    if backfill.status is BackfillStatus.CANCELLED:
        return backfill
    _refuse_ended(backfill, "nothing is left to cancel")
    to_retry = bitmap.decode(backfill.to_retry)
    return touched(
        backfill,
        msgspec.structs.replace(
            backfill,
            status=BackfillStatus.CANCELLED,
            failed=bitmap.encode(bitmap.decode(backfill.failed) | to_retry),
            to_retry="0",
        ),
        now,
    )


def retried(backfill: Backfill, now: dt.datetime) -> Backfill:
    """Return the backfill with all failed dates to be retried.

    A backfill whose retry waits is returned unchanged. Raises NotPossible if no date has failed, or if it was
    cancelled.
    """
    if backfill.status is BackfillStatus.CANCELLED:
        raise NotPossible(f"backfill {backfill.backfill_id} was cancelled; make a new one for its dates")
    failed = bitmap.decode(backfill.failed)
    waiting = bitmap.decode(backfill.to_retry)
    if not failed and waiting:
        return backfill
    if not failed:
        raise NotPossible(f"backfill {backfill.backfill_id} is {backfill.status.value}; none of its dates has failed")
    chosen = msgspec.structs.replace(backfill, failed="0", to_retry=bitmap.encode(waiting | failed))
    return _started(backfill, chosen, now)


def _started(before: Backfill, after: Backfill, now: dt.datetime) -> Backfill:
    if before == after and before.status is BackfillStatus.RUNNING:
        return before
    return touched(
        before,
        msgspec.structs.replace(
            after, status=BackfillStatus.RUNNING, counted_from=max(now, before.updated_at), counted=0
        ),
        now,
    )


def _refuse_ended(backfill: Backfill, consequence: str) -> None:
    if backfill.status.ended:
        raise NotPossible(f"backfill {backfill.backfill_id} is {backfill.status.value}; {consequence}")


def _without(digits: str, position: int) -> str:
    return bitmap.encode(bitmap.decode(digits) & ~bitmap.member(position))
