"""Makes, reads, lists and changes schedules. Planners run them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import msgspec

from services.api.http.deadline import deadline
from services.api.http.errors import Conflict, InvalidParameter, InvalidRequest, NotFound, quoted
from services.api.http.unreadable import UnreadableObject, get_if_readable, report_unreadable
from shared.domain import keys
from shared.domain.objects import BackfillStatus, CorruptObject, Schedule
from shared.domain.requests import NOBODY, Caller, with_action
from shared.domain.schedules import (
    SCHEDULES_MAX,
    InvalidSchedule,
    check_name,
    immediate_run,
    new_schedule,
    next_due,
    parse_time,
    paused,
    replaced,
    resumed,
)
from shared.runtime.concurrency import bounded_map
from shared.storage.backfills import TooManyBackfills
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository
from shared.storage.schedules import claim_run, read_run, start_run

DEADLINE_S = 10.0
LISTING_DEADLINE_S = 30.0
CONCURRENT_GETS_MAX = 16

Change = Literal["pause", "resume"]
CHANGES: Mapping[Change, Callable[[Schedule, dt.datetime], Schedule]] = {"pause": paused, "resume": resumed}


class RunDetail(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A run of a schedule."""

    due: Annotated[dt.datetime, msgspec.Meta(description="The time at which it was due.")]
    first: dt.date
    last: dt.date
    backfill_id: Annotated[str, msgspec.Meta(examples=["018f3d2a-5c00-7aaa-8bbb-0123456789ab"])]
    status: Annotated[
        BackfillStatus | None, msgspec.Meta(description="The status of its backfill; null: it cannot be read.")
    ]


class LateDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date that was not complete by its deadline, and is not yet."""

    date: dt.date
    deadline: dt.datetime


class ScheduleDetail(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule, its next and its last run, and its late dates."""

    name: Annotated[str, msgspec.Meta(examples=["daily"])]
    cron: Annotated[str, msgspec.Meta(examples=["0 6 * * *"])]
    timezone: Annotated[str, msgspec.Meta(examples=["Europe/Prague"])]
    date: Annotated[int, msgspec.Meta(description="The processed date, in days from the day of the run.")]
    recheck: Annotated[int, msgspec.Meta(description="The number of days before it that are checked again.")]
    max_parallel: Annotated[int, msgspec.Meta(ge=1, description="The most dates that are processed at once.")]
    complete_by: Annotated[
        str | None, msgspec.Meta(description="The time of day by which the date is complete.", examples=["09:00"])
    ]
    paused: bool
    created_at: dt.datetime
    updated_at: dt.datetime
    version: Annotated[int, msgspec.Meta(ge=1, description="Increases with every change.", examples=[3])]
    next_run: Annotated[
        dt.datetime | None,
        msgspec.Meta(description="When it is due next; null: it is paused. A time in the past waits for the last run."),
    ]
    last_run: Annotated[RunDetail | None, msgspec.Meta(description="The latest run; null: it has not run yet.")]
    late: Annotated[
        tuple[LateDate, ...],
        msgspec.Meta(description="Dates that were not complete by `complete_by`, and are not yet."),
    ]


class ScheduleList(msgspec.Struct, frozen=True, kw_only=True):
    """All schedules, by name."""

    schedules: tuple[ScheduleDetail, ...]
    unreadable: Annotated[tuple[UnreadableObject, ...], msgspec.Meta(description="Schedules that cannot be read.")]


class WantedSchedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule as a client asks for it."""

    cron: str
    timezone: str
    date: int
    recheck: int
    max_parallel: int
    complete_by: str | None


class Schedules:
    """Reads and changes the schedules of the bucket."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._clock = clock

    async def put(self, name: str, wanted: WantedSchedule, *, by: Caller = NOBODY) -> ScheduleDetail:
        """Make a schedule, or replace the options of one; its runs so far stay.

        Raises InvalidRequest for an option that cannot be used, and Conflict if there are SCHEDULES_MAX others.
        """
        now = self._clock()
        try:
            new = new_schedule(
                name,
                cron=wanted.cron,
                timezone=wanted.timezone,
                date_offset=wanted.date,
                recheck=wanted.recheck,
                max_parallel=wanted.max_parallel,
                complete_by=parse_time(wanted.complete_by) if wanted.complete_by is not None else None,
                now=now,
            )
        except InvalidSchedule as error:
            raise InvalidRequest(InvalidParameter(name=error.field, reason=error.reason)) from error

        async def set_options(stored: Schedule | None) -> Schedule:
            if stored is None:
                await self._require_room()
            after = new if stored is None else replaced(stored, new, now)
            parameters = "&".join(f"{option}={value}" for option, value in msgspec.structs.asdict(wanted).items())
            return with_action(after, by, "set", result="set", at=now, parameters=parameters)

        async with deadline(DEADLINE_S, "Writing the schedule"):
            stored = await self._repository.update(Schedule, keys.schedule(name), set_options, counted_as="schedule")
            assert stored is not None, "a missing one is made"
            return await self._detail_of(stored)

    async def read(self, name: str) -> ScheduleDetail:
        """Return a schedule. Raises NotFound if there is none."""
        async with deadline(DEADLINE_S, "Reading the schedule"):
            return await self._detail_of(await self._stored(name))

    async def all(self) -> ScheduleList:
        """Return all schedules."""

        async def read(key: str) -> ScheduleDetail | UnreadableObject | None:
            schedule = await get_if_readable(self._store, Schedule, key)
            try:
                return await self._detail_of(schedule) if isinstance(schedule, Schedule) else schedule
            except CorruptObject as error:
                return report_unreadable(error)

        async with deadline(LISTING_DEADLINE_S, "Reading the schedules"):
            listed = [one.key async for one in self._store.list(keys.SCHEDULES)]
            found = await bounded_map(read, sorted(listed), limit=CONCURRENT_GETS_MAX)
        return ScheduleList(
            schedules=tuple(one for one in found if isinstance(one, ScheduleDetail)),
            unreadable=tuple(one for one in found if isinstance(one, UnreadableObject)),
        )

    async def change(self, name: str, change: Change, *, by: Caller = NOBODY) -> ScheduleDetail:
        """Pause or resume a schedule. Raises NotFound if there is none."""
        now = self._clock()
        rule = CHANGES[change]

        async def acted(stored: Schedule | None) -> Schedule | None:
            after = rule(stored, now) if stored is not None else None
            if after is None or after is stored:
                return after
            return with_action(after, by, change, result="paused" if after.paused else "active", at=now)

        async with deadline(DEADLINE_S, "Changing the schedule"):
            await self._stored(name)
            stored = await self._repository.update(Schedule, keys.schedule(name), acted, counted_as="schedule")
            if stored is None:
                raise _no_such_schedule(name)
            return await self._detail_of(stored)

    async def run(self, name: str, *, by: Caller = NOBODY) -> ScheduleDetail:
        """Run a schedule now.

        Raises NotFound if there is none, and Conflict if its last run has not ended or too many backfills are open.
        """
        now = self._clock()

        def with_run(schedule: Schedule) -> Schedule:
            assert schedule.run is not None, "it has claimed one"
            return with_action(schedule, by, "run", result=f"backfill {schedule.run.backfill_id}", at=now)

        async with deadline(DEADLINE_S, "Starting the run"):
            before = await self._stored(name)
            claimed = await claim_run(self._store, name, lambda schedule: immediate_run(schedule, now), note=with_run)
            if claimed is None:
                raise _no_such_schedule(name)
            if before.run and claimed.run and claimed.run.backfill_id == before.run.backfill_id:
                raise Conflict(
                    f"the last run of schedule {name} has not ended: it is backfill {before.run.backfill_id}"
                )
            try:
                await start_run(self._store, claimed, now)
            except TooManyBackfills as error:
                raise Conflict(str(error)) from error
            return await self._detail_of(claimed)

    async def delete(self, name: str) -> None:
        """Delete a schedule. Its runs stay. Raises NotFound if there is none."""
        async with deadline(DEADLINE_S, "Deleting the schedule"):
            _require_name(name)
            if await self._store.get(keys.schedule(name), first_bytes=0) is None:
                raise _no_such_schedule(name)
            await self._store.delete(keys.schedule(name))

    async def _stored(self, name: str) -> Schedule:
        _require_name(name)
        stored = await self._repository.get(Schedule, keys.schedule(name))
        if stored is None:
            raise _no_such_schedule(name)
        return stored

    async def _require_room(self) -> None:
        count = 0
        async for _ in self._store.list(keys.SCHEDULES):
            count += 1
        if count >= SCHEDULES_MAX:
            raise Conflict(f"there are {SCHEDULES_MAX} schedules, which is the limit. Delete one first")

    async def _detail_of(self, schedule: Schedule) -> ScheduleDetail:
        backfill = await read_run(self._store, schedule)
        run = schedule.run
        return ScheduleDetail(
            name=schedule.name,
            cron=schedule.cron,
            timezone=schedule.timezone,
            date=schedule.date_offset,
            recheck=schedule.recheck,
            max_parallel=schedule.max_parallel,
            complete_by=None if schedule.complete_by is None else f"{schedule.complete_by:%H:%M}",
            paused=schedule.paused,
            created_at=schedule.created_at,
            updated_at=schedule.updated_at,
            version=schedule.version,
            next_run=None if schedule.paused else next_due(schedule),
            last_run=None
            if run is None
            else RunDetail(
                due=run.due,
                first=run.first,
                last=run.last,
                backfill_id=run.backfill_id,
                status=backfill.status if backfill else None,
            ),
            late=tuple(LateDate(date=one.date, deadline=one.at) for one in schedule.deadlines if one.late),
        )


def _require_name(name: str) -> None:
    """Raise NotFound for a name that no schedule can have."""
    try:
        check_name(name)
    except InvalidSchedule as error:
        raise _no_such_schedule(name) from error


def _no_such_schedule(name: str) -> NotFound:
    return NotFound(f"There is no schedule {quoted(name)}. GET /schedules lists them.")
