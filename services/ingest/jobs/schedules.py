"""Runs schedules, and marks the dates that are not complete by their deadline.

Every planner does this for every schedule; `shared.storage.schedules` says why a run is started once.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable
from functools import partial

import msgspec
import structlog

from shared.domain import keys
from shared.domain.objects import CorruptObject, DateSelection, Deadline, Schedule
from shared.domain.schedules import due_run
from shared.kafka.failed_keys import for_each
from shared.runtime import metrics
from shared.storage.backfills import TooManyBackfills, is_selected
from shared.storage.object_store import ObjectInfo, ObjectStore
from shared.storage.repository import Repository, Versioned
from shared.storage.schedules import claim_run, start_run

DEADLINES_CHECKED_EVERY = dt.timedelta(minutes=1)

_log = structlog.get_logger()


class ScheduleRunner:
    """Runs the schedules of the bucket. It reads a schedule again only after a change."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._repository = Repository(store)
        self._clock = clock
        self._known: dict[str, Versioned[Schedule]] = {}
        self._checked_at: dict[str, dt.datetime] = {}

    async def once(self) -> None:
        """Start the runs that are due, and check the deadlines. One that cannot be run does not stop the others."""
        known: dict[str, Versioned[Schedule]] = {}

        async def run(listed: ObjectInfo) -> None:
            read = self._known.get(listed.key)
            try:
                if read is None or read.etag != listed.etag:
                    read = await self._repository.read(Schedule, listed.key)
                if read is not None:
                    known[listed.key] = read
                    await self._advance(read.value)
            except CorruptObject as error:
                _log.error("schedule_unreadable", error=str(error))
            except TooManyBackfills as error:
                _log.error("schedule_waits", error=str(error))

        await for_each(run, [listed async for listed in self._store.list(keys.SCHEDULES)])
        for key in self._known.keys() - known.keys():
            self._forget(self._known[key].value.name)
        self._known = known

    async def _advance(self, schedule: Schedule) -> None:
        now = self._clock()
        if due_run(schedule, now) is not None:
            claimed = await claim_run(self._store, schedule.name, partial(due_run, now=now))
            if claimed is None:
                return
            if claimed.run != schedule.run and claimed.run is not None:
                _log.info("schedule_run", schedule=schedule.name, backfill_id=claimed.run.backfill_id)
            schedule = claimed
        await self._check_deadlines(schedule, now)  # also while too many backfills are open to start a run
        await start_run(self._store, schedule, now)

    async def _check_deadlines(self, schedule: Schedule, now: dt.datetime) -> None:
        """Mark the dates that are not complete after their deadline, and remove those that are."""
        metrics.late_dates.labels(schedule.name).set(sum(deadline.late for deadline in schedule.deadlines))
        checked_at = self._checked_at.get(schedule.name)
        passed = {deadline.date for deadline in schedule.deadlines if deadline.at <= now}
        if not passed or (checked_at is not None and now - checked_at < DEADLINES_CHECKED_EVERY):
            return
        self._checked_at[schedule.name] = now
        late = {date for date in passed if await is_selected(self._store, DateSelection.MISSING, date)}

        def after_check(deadline: Deadline) -> Deadline | None:
            if deadline.date not in passed:
                return deadline
            return msgspec.structs.replace(deadline, late=True) if deadline.date in late else None

        async def mark(stored: Schedule | None) -> Schedule | None:
            if stored is None:
                return None
            kept = tuple(filter(None, map(after_check, stored.deadlines)))
            return stored if kept == stored.deadlines else msgspec.structs.replace(stored, deadlines=kept)

        marked = await self._repository.update(Schedule, keys.schedule(schedule.name), mark, counted_as="schedule")
        if marked is not None:
            metrics.late_dates.labels(schedule.name).set(sum(deadline.late for deadline in marked.deadlines))

    def _forget(self, name: str) -> None:
        self._checked_at.pop(name, None)
        with contextlib.suppress(KeyError):  # it was never exported
            metrics.late_dates.remove(name)
