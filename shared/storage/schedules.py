"""Claims and starts the runs of schedules.

The order of effects of a run:

1. the run is claimed: a compare-and-swap writes it into the schedule, with the id of its backfill;
2. its backfill is made, under that id;
3. the schedule notes that it is started.

A crash between them, or a lost response, leaves a claimed run that is not started, which any planner starts under the
same id. So each due time has one backfill, and each of its dates one request.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from shared.domain import keys
from shared.domain.backfills import is_closed, new_backfill
from shared.domain.objects import Backfill, CorruptObject, DateSelection, Schedule, ScheduledRun
from shared.domain.schedules import claimed
from shared.storage.backfills import open_backfill
from shared.storage.object_store import ObjectStore
from shared.storage.repository import Repository


async def claim_run(
    store: ObjectStore,
    name: str,
    choose: Callable[[Schedule], ScheduledRun | None],
    *,
    note: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Schedule | None:
    """Claim the run that ``choose`` returns, if any; return the schedule, or None if there is none.

    Nothing is claimed while the previous run has not ended. ``note`` returns a schedule that claims a run as it is
    stored: with the action of a client.
    """

    async def claim(stored: Schedule | None) -> Schedule | None:
        run = choose(stored) if stored is not None else None
        if stored is None or run is None or await is_run_open(store, stored):
            return stored
        return note(claimed(stored, run))

    return await Repository(store).update(Schedule, keys.schedule(name), claim, counted_as="schedule")


async def is_run_open(store: ObjectStore, schedule: Schedule) -> bool:
    """Return whether the latest run of a schedule has not ended. An unreadable backfill has."""
    if schedule.run is None:
        return False
    if not schedule.run.started:
        return True
    backfill = await read_run(store, schedule)
    return backfill is not None and not is_closed(backfill)


async def read_run(store: ObjectStore, schedule: Schedule) -> Backfill | None:
    """Return the backfill of the latest run of a schedule, or None if there is none, or none that can be read."""
    if schedule.run is None:
        return None
    try:
        return await Repository(store).get(Backfill, keys.backfill(schedule.run.backfill_id))
    except CorruptObject:
        return None


async def start_run(store: ObjectStore, schedule: Schedule, now: dt.datetime) -> None:
    """Start the claimed run of a schedule. Raises TooManyBackfills; it is then started later."""
    run = schedule.run
    if run is None or run.started:
        return
    backfill = new_backfill(
        run.backfill_id,
        run.first,
        run.last,
        now=now,
        selection=DateSelection.ALL,
        newest_first=True,
        max_parallel=schedule.max_parallel,
        schedule=schedule.name,
    )
    await open_backfill(store, backfill)

    async def start(stored: Schedule | None) -> Schedule | None:
        if stored is None or stored.run is None or stored.run.backfill_id != run.backfill_id or stored.run.started:
            return stored
        return msgspec.structs.replace(stored, run=msgspec.structs.replace(stored.run, started=True))

    await Repository(store).update(Schedule, keys.schedule(schedule.name), start, counted_as="schedule")
