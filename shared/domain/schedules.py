"""Rules of schedules: when a run is due, which dates it processes, and by when a date has to be complete. Pure.

This module alone uses the cron library. Due times follow cron: a time that a change of the clocks skips is due right
after it, and one that comes twice is due once.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import re
import zoneinfo
from collections.abc import Iterator

import msgspec
from cronsim import CronSim, CronSimError

from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.ids import derive_request_id
from shared.domain.objects import CorruptObject, Deadline, Schedule, ScheduledRun

SCHEDULES_MAX = 100
NAME_PATTERN = "^[a-z0-9][a-z0-9-]{0,62}$"
RECHECK_MAX = 31
CATCH_UP_DATES_MAX = 31
"""The most missed dates that one run processes, those that it checks again not included."""

DEADLINES_MAX = 31
_DAY = dt.timedelta(days=1)


class InvalidSchedule(OperatorError):
    """A schedule cannot be used. ``field`` names the parameter, and the message says why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def check_name(name: str) -> None:
    """Raise InvalidSchedule if a name cannot be used."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidSchedule(
            "name", f"{name[:100]!r} must be 1 to 63 lower-case letters, digits and dashes, such as daily"
        )


def check_timing(cron: str, timezone: str) -> None:
    """Raise InvalidSchedule if a cron line or a time zone cannot be used."""
    zone = _zone(timezone)
    if len(cron.split()) != 5:
        raise InvalidSchedule(
            "cron", f"{cron[:100]!r} must have five fields: minute, hour, day, month, weekday. For example: 0 6 * * *"
        )
    try:
        next(_due_after(cron, zone, dt.datetime(2024, 1, 1, tzinfo=dt.UTC)))
    except (CronSimError, ValueError) as error:
        fault = str(error).removeprefix("Bad ")
        raise InvalidSchedule("cron", f"{cron[:100]!r} has an invalid {fault}. For example: 0 6 * * *") from None
    except StopIteration:
        raise InvalidSchedule("cron", f"{cron[:100]!r} is never due. For example: 0 6 * * *") from None


def parse_time(text: str) -> dt.time:
    """Read a time of day such as ``09:00``. Raises InvalidSchedule."""
    try:
        return dt.datetime.strptime(text, "%H:%M").time()  # noqa: DTZ007  # a time of day has no zone
    except ValueError:
        raise InvalidSchedule("complete_by", f"{text[:20]!r} must be a time of day, such as 09:00") from None


def next_due(schedule: Schedule) -> dt.datetime:
    """Return when the next run is due, in UTC; a missed one is in the past. Raises CorruptObject."""
    with _usable(schedule):
        return next(_due_after(schedule.cron, _zone(schedule.timezone), _last_due(schedule)))


def due_run(schedule: Schedule, now: dt.datetime) -> ScheduledRun | None:
    """Return the run that is due, or None if none is. Missed runs are caught up by the latest of them.

    Raises CorruptObject for a schedule that cannot be used, such as one of a time zone that no longer exists.
    """
    first = next_due(schedule)
    if first > now or schedule.paused:
        return None
    with _usable(schedule):
        zone = _zone(schedule.timezone)
        # Backwards the library errs by up to one due time around a change of the clocks: it only says where to begin.
        begin = next(CronSim(schedule.cron, now.astimezone(zone), reverse=True)).astimezone(dt.UTC) - _DAY
        later = itertools.takewhile(lambda due: due <= now, _due_after(schedule.cron, zone, max(first, begin)))
        return _run(schedule, first, max(later, default=first), now)


@contextlib.contextmanager
def _usable(schedule: Schedule) -> Iterator[None]:
    """Raise CorruptObject if the options of a stored schedule cannot be used: they were checked by another build."""
    try:
        yield
    except StopIteration as error:
        raise CorruptObject(keys.schedule(schedule.name), "cannot be used: its cron line is never due") from error
    except (InvalidSchedule, CronSimError, ValueError, OverflowError) as error:
        raise CorruptObject(keys.schedule(schedule.name), f"cannot be used: {error}") from error


def immediate_run(schedule: Schedule, now: dt.datetime) -> ScheduledRun:
    """Return a run at the present time: the one that is due, or an additional one."""
    return due_run(schedule, now) or _run(schedule, now, now, now)


def claimed(schedule: Schedule, run: ScheduledRun) -> Schedule:
    """Return the schedule with a run that is claimed, and the deadlines of its dates."""
    deadlines = {deadline.date: deadline for deadline in schedule.deadlines}
    if schedule.complete_by is not None:
        count = (run.last - run.first).days + 1 - schedule.recheck
        for date in (run.last - dt.timedelta(days=back) for back in range(count)):
            deadlines.setdefault(date, Deadline(date=date, at=_deadline(schedule, run, date)))
    kept = sorted(deadlines.values(), key=lambda deadline: deadline.date)[-DEADLINES_MAX:]
    return changed(schedule, run.claimed_at, run=run, deadlines=tuple(kept))


def _run(schedule: Schedule, first: dt.datetime, due: dt.datetime, now: dt.datetime) -> ScheduledRun:
    """Return the run for the due times from ``first`` to ``due``."""
    zone = _zone(schedule.timezone)
    offset = dt.timedelta(days=schedule.date_offset)
    last = due.astimezone(zone).date() + offset
    earliest = max(first.astimezone(zone).date() + offset, last - dt.timedelta(days=CATCH_UP_DATES_MAX - 1))
    return ScheduledRun(
        due=due,
        backfill_id=derive_request_id(now, f"schedule {schedule.name} {due.isoformat()}"),
        first=earliest - dt.timedelta(days=schedule.recheck),
        last=last,
        claimed_at=now,
    )


def _deadline(schedule: Schedule, run: ScheduledRun, date: dt.date) -> dt.datetime:
    """Return the first time of day ``complete_by`` after the run of a date is due."""
    assert schedule.complete_by is not None, "the caller has checked it"
    zone = _zone(schedule.timezone)
    day = date - dt.timedelta(days=schedule.date_offset)
    if schedule.complete_by <= run.due.astimezone(zone).time():
        day += dt.timedelta(days=1)
    return dt.datetime.combine(day, schedule.complete_by, zone).astimezone(dt.UTC)


def _last_due(schedule: Schedule) -> dt.datetime:
    return schedule.since if schedule.run is None else max(schedule.since, schedule.run.due)


def _due_after(cron: str, zone: zoneinfo.ZoneInfo, after: dt.datetime) -> Iterator[dt.datetime]:
    """Yield the times after ``after`` at which a cron line is due, in UTC."""
    return (due.astimezone(dt.UTC) for due in CronSim(cron, after.astimezone(zone)) if due.astimezone(dt.UTC) > after)


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise InvalidSchedule(
            "timezone", f"{name[:100]!r} is not a time zone of the IANA database, such as Europe/Prague or UTC"
        ) from None


def new_schedule(
    name: str,
    *,
    cron: str,
    timezone: str,
    date_offset: int,
    recheck: int,
    max_parallel: int,
    complete_by: dt.time | None,
    now: dt.datetime,
) -> Schedule:
    """Return a schedule whose first run is due after ``now``. Raises InvalidSchedule."""
    check_name(name)
    check_timing(cron, timezone)
    return Schedule(
        name=name,
        cron=" ".join(cron.split()),
        timezone=timezone,
        date_offset=date_offset,
        recheck=recheck,
        max_parallel=max_parallel,
        complete_by=complete_by,
        created_at=now,
        updated_at=now,
        since=now,
    )


def replaced(before: Schedule, wanted: Schedule, now: dt.datetime) -> Schedule:
    """Return a schedule with the options of another one. If its times change, it begins anew with those after now."""
    same_times = (before.cron, before.timezone) == (wanted.cron, wanted.timezone)
    return changed(
        before,
        now,
        cron=wanted.cron,
        timezone=wanted.timezone,
        date_offset=wanted.date_offset,
        recheck=wanted.recheck,
        max_parallel=wanted.max_parallel,
        complete_by=wanted.complete_by,
        since=before.since if same_times else now,
        deadlines=before.deadlines if wanted.complete_by is not None else (),
    )


def paused(schedule: Schedule, now: dt.datetime) -> Schedule:
    """Return the schedule paused: no run is due any more."""
    return schedule if schedule.paused else changed(schedule, now, paused=True)


def resumed(schedule: Schedule, now: dt.datetime) -> Schedule:
    """Return the schedule resumed. Runs that were due during the pause are not caught up."""
    return changed(schedule, now, paused=False, since=now) if schedule.paused else schedule


def changed(schedule: Schedule, now: dt.datetime, **fields: object) -> Schedule:
    """Return the next version of a schedule, with other fields."""
    return msgspec.structs.replace(
        schedule, **fields, version=schedule.version + 1, updated_at=max(now, schedule.updated_at)
    )
