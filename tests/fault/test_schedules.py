"""Schedules survive every crash: each due time has one run, and each of its dates one request."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import pytest

from services.ingest.jobs.schedules import ScheduleRunner
from shared.domain import keys, objects
from shared.domain.backfills import paused as paused_backfill
from shared.domain.objects import Backfill
from shared.domain.schedules import immediate_run, paused, resumed
from shared.runtime.metrics import PLANNER
from shared.storage.schedules import claim_run, start_run
from tests.fakes.builders import UpstreamState
from tests.fakes.faults import Break
from tests.fault.checks import live_summaries
from tests.fault.jobs import JobsWorld
from tests.fault.scenarios import CORRECTED, EVENING, MORNING, WHOLE, breaks_of
from tests.fault.world import DATE, Job

DAY = dt.timedelta(days=1)
HOUR = dt.timedelta(hours=1)
YESTERDAY = dt.date(2024, 5, 2)


async def let_pass(
    world: JobsWorld, days: int, *, steps_a_day: int = 4, off_by: dt.timedelta = dt.timedelta(0)
) -> None:
    """Let days pass, with planners that look at schedules and backfills, and services that process requests."""
    for step in range(days * steps_a_day):
        world.clock.advance(DAY.total_seconds() / steps_a_day)
        await world.run_schedules(clock_off_by=off_by if step % 2 else -off_by)
        for _ in range(4):
            await world.advance_jobs()
            world.process()


def runs_of(world: JobsWorld) -> list[Backfill]:
    """Return the backfills of the world, oldest range first."""
    found = [objects.decode(Backfill, body, key) for key, body in world.store.bodies(keys.BACKFILLS).items()]
    return sorted(found, key=lambda backfill: (backfill.last, backfill.created_at))


@pytest.mark.parametrize("off_by", [dt.timedelta(0), HOUR], ids=["equal clocks", "clocks that differ"])
async def test_each_day_is_requested_once(off_by: dt.timedelta) -> None:
    """Without anyone asking, each day is requested the next morning under exactly one id."""
    world = JobsWorld()
    world.set_schedule("daily")
    await let_pass(world, 5, off_by=off_by)
    dates = {YESTERDAY + day * DAY for day in range(5)}
    requested = world.requests_by_date()
    assert set(requested) == dates
    assert all(len(ids) == 1 for ids in requested.values())


async def test_the_last_days_are_checked_again() -> None:
    """Each run of a schedule with a recheck of two days also processes the two days before its date."""
    world = JobsWorld()
    world.set_schedule("daily", recheck=2)
    await let_pass(world, 2)
    assert [(run.first, run.last) for run in runs_of(world)] == [
        (YESTERDAY - 2 * DAY, YESTERDAY),
        (YESTERDAY - DAY, YESTERDAY + DAY),
    ]
    assert all(run.schedule == "daily" and run.newest_first for run in runs_of(world))


async def test_a_run_may_break_at_any_call() -> None:
    """Whichever call breaks between claim, start and record, the day is requested under one id."""

    async def run(broken: Mapping[int, Break]) -> JobsWorld:
        world = JobsWorld(broken)
        world.set_schedule("daily")
        await let_pass(world, 1, steps_a_day=6)
        return world

    for number, how in breaks_of(list((await run({})).port_calls.made)):
        world = await run({number: how})
        requested = world.requests_by_date()
        assert (set(requested), len(requested[YESTERDAY])) == ({YESTERDAY}, 1), (number, how)
        assert (len(runs_of(world)), list(world.open_backfills)) == (1, []), (number, how)


async def test_two_planners_start_one_run() -> None:
    """Wherever one planner pauses while another one starts the run and ends it, there is one run."""

    async def due_world(broken: Mapping[int, Break]) -> tuple[JobsWorld, Job]:
        world = JobsWorld(broken)
        world.set_schedule("daily")
        world.clock.advance(DAY.total_seconds())
        return world, await world.run_schedules()

    calm, _ = await due_world({})
    for number in range(len(calm.port_calls.made)):
        world, slow = await due_world({number: Break.PAUSE})
        await let_pass(world, 1, off_by=HOUR)
        await slow.resume()
        await let_pass(world, 1)
        assert all(len(ids) == 1 for ids in world.requests_by_date().values()), number
        assert list(world.open_backfills) == [], number


async def test_missed_runs_are_caught_up_once() -> None:
    """After three days without planners, one run processes the three missed days; after 60, the last 31."""
    world = JobsWorld()
    world.set_schedule("daily", recheck=1)
    world.clock.advance(3 * DAY.total_seconds())
    await let_pass(world, 1)
    first, second = runs_of(world)
    assert (first.first, first.last) == (YESTERDAY - DAY, YESTERDAY + 2 * DAY)
    assert (second.first, second.last) == (YESTERDAY + 2 * DAY, YESTERDAY + 3 * DAY)
    world.clock.advance(60 * DAY.total_seconds())
    await let_pass(world, 1)
    caught_up = runs_of(world)[2]
    assert (caught_up.last - caught_up.first).days + 1 == 31 + 1


async def test_a_run_waits_until_the_one_before_has_ended() -> None:
    """While a run is paused, no further run begins; afterwards one run catches up."""
    world = JobsWorld()
    world.set_schedule("daily")
    world.clock.advance(DAY.total_seconds())
    await world.run_schedules()
    (run,) = runs_of(world)
    world.change_backfill(run.backfill_id, paused_backfill)
    await let_pass(world, 3)
    assert len(runs_of(world)) == 1


async def test_a_paused_schedule_does_not_run() -> None:
    """Nothing is due during a pause, and nothing of it is caught up afterwards."""
    world = JobsWorld()
    world.store.write(keys.schedule("daily"), objects.encode(paused(world.set_schedule("daily"), world.clock())))
    await let_pass(world, 3)
    world.store.write(keys.schedule("daily"), objects.encode(resumed(world.schedule("daily"), world.clock())))
    await let_pass(world, 1)
    assert set(world.requests_by_date()) == {YESTERDAY + 3 * DAY}


async def test_an_immediate_run_processes_the_day_before_now() -> None:
    """A run at once has the date of now; the next one is due at its usual time."""
    world = JobsWorld()
    world.set_schedule("daily")
    claimed = await claim_run(world.store, "daily", lambda schedule: immediate_run(schedule, world.clock()))
    assert claimed is not None
    await start_run(world.store, claimed, world.clock())
    await let_pass(world, 1)
    assert [run.last for run in runs_of(world)] == [YESTERDAY - DAY, YESTERDAY]


async def test_a_date_that_is_incomplete_by_its_deadline_is_late() -> None:
    """A date is late from its deadline on, in the schedule and the metric, until its data are complete."""
    world = JobsWorld()
    world.set_schedule("daily", complete_by=dt.time(9))
    runner = ScheduleRunner(world.store, clock=world.clock)

    async def late_at(hour: int) -> tuple[list[dt.date], float | None]:
        world.clock.now = dt.datetime(2024, 5, 3, hour, 30, tzinfo=dt.UTC)  # 7:00 UTC is 9:00 in Prague
        await runner.once()
        late = [deadline.date for deadline in world.schedule("daily").deadlines if deadline.late]
        return late, PLANNER.get_sample_value("tripfold_late_dates", {"schedule": "daily"})

    assert await late_at(5) == ([], 0)
    assert await late_at(7) == ([YESTERDAY], 1)
    world.write_complete(YESTERDAY)
    assert await late_at(8) == ([], 0)
    assert world.schedule("daily").deadlines == ()
    await world.store.delete(keys.schedule("daily"))
    await runner.once()
    assert PLANNER.get_sample_value("tripfold_late_dates", {"schedule": "daily"}) is None


async def test_a_date_that_is_complete_in_time_is_never_late() -> None:
    """A date whose data are complete before the deadline loses its deadline without being late."""
    world = JobsWorld()
    world.set_schedule("daily", complete_by=dt.time(9))
    world.write_complete(YESTERDAY)
    await let_pass(world, 1)
    assert world.schedule("daily").deadlines == ()


async def test_an_unreadable_schedule_stops_no_other() -> None:
    """Planners log a schedule that they cannot read, and run the others."""
    world = JobsWorld()
    world.set_schedule("daily")
    world.store.write(keys.schedule("bad"), b"{")
    await let_pass(world, 1)
    assert set(world.requests_by_date()) == {YESTERDAY}


async def test_a_correction_of_a_day_ago_is_served_without_anyone_asking() -> None:
    """The first run serves the day; its file is corrected a day later, and the next run serves the correction."""
    world = JobsWorld()
    world.set_schedule("daily", recheck=2)
    served = []
    for truth in (WHOLE, UpstreamState(cities=WHOLE.cities, files={**WHOLE.files, 1: CORRECTED})):
        truth.write_into(world.upstream, DATE)
        for _ in range(4):
            world.clock.advance(6 * HOUR.total_seconds())
            await world.run_schedules()
            for _ in range(6):
                await world.advance_jobs()
                await world.run_to_rest()
        served.append(sum(summary.totals.passengers for summary in live_summaries(world) if summary.date == DATE))
    passengers = {file: sum(trip.passengers for trip in file) for file in (MORNING, CORRECTED, EVENING)}
    assert served == [passengers[MORNING] + passengers[EVENING], passengers[CORRECTED] + passengers[EVENING]]
