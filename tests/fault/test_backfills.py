"""Backfills survive every crash: each date is requested under exactly one id, and no more at once than allowed."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Mapping

import pytest

from shared.domain import keys
from shared.domain.backfills import cancelled, paused, request_id_of, resumed, retried
from shared.domain.ids import RequestId, mint_request_id
from shared.domain.objects import BackfillStatus, DateSelection
from shared.domain.topics import Topic
from shared.storage import active_requests
from shared.storage.backfills import add_open
from tests.fakes.faults import Break, PortCalls
from tests.fault.jobs import STEPS_MAX, UNREADABLE, JobsWorld, broken_anywhere
from tests.fault.scenarios import WHOLE, breaks_of
from tests.fault.world import Job

FIRST, SECOND, THIRD, LAST = (dt.date(2024, 5, day) for day in (1, 2, 3, 4))


@pytest.mark.parametrize(
    "failing", [(), (FIRST, LAST)], ids=["every date completes", "two dates fail, and are retried"]
)
async def test_a_planner_may_break_at_any_call(failing: tuple[dt.date, ...]) -> None:
    """Whichever call breaks between claim, publish and record, each date is requested once, and completes."""
    wrong = [one async for one in broken_anywhere(FIRST, LAST, failing=failing)]
    assert not wrong, "\n".join(wrong[:20])


async def test_two_planners_advance_one_backfill() -> None:
    """Wherever one of two planners pauses, each date is requested once. Their clocks differ by an hour."""
    calm = JobsWorld()
    assert await calm.finish(calm.open_backfill(FIRST, LAST)) == []
    for number in range(len(calm.port_calls.made)):
        world = JobsWorld({number: Break.PAUSE})
        backfill_id = world.open_backfill(FIRST, LAST)
        slow: Job | None = None
        for step in range(STEPS_MAX):
            job = await world.advance_jobs(clock_off_by=dt.timedelta(hours=step % 2))
            slow = slow or (None if job.ended else job)
            if slow is not None and step % 3 == 2:
                await slow.resume()
                slow = None
            world.process()
            world.clock.advance(60)
            if not world.open_backfills and slow is None:
                break
        assert world.wrong_at_end(backfill_id) == [], f"paused before call {number}"


async def ending_world(broken: Mapping[int, Break]) -> tuple[JobsWorld, RequestId]:
    """Return a world whose backfill has one failed date, and whose planner has only to record its end."""
    world = JobsWorld(failing=(FIRST,))
    backfill_id = world.open_backfill(FIRST, FIRST)
    await world.advance_jobs()
    world.process()
    if broken:
        world.port_calls = PortCalls(broken)
    return world, backfill_id


async def test_a_retry_while_a_planner_closes_the_backfill_is_not_lost() -> None:
    """Wherever a planner pauses while it records the end, a retry meanwhile runs to its end."""
    calm, _ = await ending_world({})
    before = len(calm.port_calls.made)
    await calm.advance_jobs()
    for number in range(len(calm.port_calls.made) - before):
        world, backfill_id = await ending_world({number: Break.PAUSE})
        slow = await world.advance_jobs()
        await world.advance_jobs()
        world.change_backfill(backfill_id, retried)
        await slow.resume()
        await world.finish(backfill_id)
        assert world.backfill(backfill_id).status is BackfillStatus.COMPLETED, f"paused before call {number}"


async def test_a_retry_that_pauses_while_a_planner_closes_the_backfill_is_not_lost() -> None:
    """Wherever the API pauses during a retry while a planner closes the backfill, the retry runs to its end."""
    for number in itertools.count():
        world, backfill_id = await ending_world({})
        await world.advance_jobs()
        api = await world.change_backfill_slowly(backfill_id, retried, calls=number)
        paused_there = not api.ended
        for _ in range(3):
            await world.advance_jobs()
        await api.resume()
        await world.finish(backfill_id)
        assert world.backfill(backfill_id).status is BackfillStatus.COMPLETED, f"paused after call {number}"
        if not paused_there:
            return


async def test_a_paused_backfill_requests_nothing_more() -> None:
    """Dates under way end while a backfill is paused; the others are requested when it is resumed."""
    world = JobsWorld()
    backfill_id = world.open_backfill(FIRST, LAST)
    await world.advance_jobs()
    world.change_backfill(backfill_id, paused)
    world.process()
    for _ in range(3):
        await world.advance_jobs()
    assert (world.backfill(backfill_id).completed, set(world.requests_by_date())) == ("3", {FIRST, SECOND})
    world.change_backfill(backfill_id, resumed)
    assert await world.finish(backfill_id) == []
    assert world.wrong_at_end(backfill_id) == []


async def test_cancelling_a_backfill_may_break_at_any_call() -> None:
    """Whichever call breaks, a cancelled backfill cancels its dates under way, and requests no further one."""

    async def cancelled_world(broken: Mapping[int, Break]) -> tuple[JobsWorld, RequestId]:
        world = JobsWorld()
        backfill_id = world.open_backfill(FIRST, LAST)
        await world.advance_jobs()
        world.change_backfill(backfill_id, cancelled)
        world.port_calls = PortCalls(broken)
        for _ in range(5):
            await world.advance_jobs()
        world.process()
        await world.advance_jobs()
        await world.advance_jobs()
        return world, backfill_id

    calm, _ = await cancelled_world({})
    for number, how in breaks_of(list(calm.port_calls.made)):
        world, backfill_id = await cancelled_world({number: how})
        backfill = world.backfill(backfill_id)
        assert (backfill.status, backfill.cancelled, world.open_backfills) == (BackfillStatus.CANCELLED, "3", ()), (
            number,
            how,
        )
        assert set(world.requests_by_date()) == {FIRST, SECOND}


async def test_a_backfill_waits_for_another_request_of_its_date() -> None:
    """A request that waits for the date comes first, is published if its client crashed, and then the backfill's."""
    world = JobsWorld()
    other = RequestId("018f38bf-1d00-7000-8000-000000000001")
    await active_requests.join(world.store, FIRST, other)
    backfill_id = world.open_backfill(FIRST, FIRST)
    await world.advance_jobs()
    assert world.requests_by_date() == {FIRST: {other}}
    await world.advance_jobs()
    assert len(world.log.records(Topic.PROCESS_REQUESTS)) == 1
    assert await active_requests.begin(world.store, FIRST, other, world.clock())
    assert await world.finish(backfill_id) == []
    assert world.backfill(backfill_id).status is BackfillStatus.COMPLETED
    assert world.requests_by_date() == {FIRST: {other, request_id_of(world.backfill(backfill_id), FIRST)}}


@pytest.mark.parametrize(
    ("selection", "requested"),
    [
        (DateSelection.MISSING, {SECOND, THIRD}),
        (DateSelection.FAILED, {SECOND}),
        (DateSelection.STORED, {FIRST, SECOND}),
        (DateSelection.ALL, {FIRST, SECOND, THIRD}),
    ],
)
async def test_only_the_selected_dates_are_requested(selection: DateSelection, requested: set[dt.date]) -> None:
    """The first date is complete, the second lacks a city, and the third was never processed."""
    world = JobsWorld()
    world.write_complete(FIRST)
    world.write_complete(SECOND, lacking=1)
    backfill_id = world.open_backfill(FIRST, THIRD, selection=selection)
    assert await world.finish(backfill_id) == []
    assert set(world.requests_by_date()) == requested


async def test_a_date_with_an_unreadable_record_fails_alone() -> None:
    """A date whose record cannot be read counts as failed, and the others complete."""
    world = JobsWorld()
    backfill_id = world.open_backfill(FIRST, LAST)
    await world.advance_jobs()
    world.process()
    request_id = request_id_of(world.backfill(backfill_id), FIRST)
    world.store.write(keys.request(request_id), UNREADABLE)
    assert await world.finish(backfill_id) == []
    backfill = world.backfill(backfill_id)
    assert (backfill.status, backfill.failed, backfill.completed) == (BackfillStatus.COMPLETED_WITH_FAILURES, "1", "e")


async def test_an_entry_without_a_backfill_is_removed_after_a_day() -> None:
    """A client that crashed before it wrote its backfill leaves an entry, which goes after a day."""
    world = JobsWorld()
    backfill_id = mint_request_id(world.clock())
    await add_open(world.store, backfill_id)
    await world.advance_jobs()
    assert list(world.open_backfills) == [backfill_id]
    world.clock.advance(2 * 86_400)
    await world.advance_jobs()
    assert list(world.open_backfills) == []


async def test_an_unreadable_backfill_stops_no_other() -> None:
    """Planners log a backfill that they cannot read, and advance the others."""
    world = JobsWorld()
    unreadable = world.open_backfill(FIRST, FIRST)
    other = world.open_backfill(SECOND, LAST)
    world.store.write(keys.backfill(unreadable), UNREADABLE)
    assert await world.finish(other) == []
    assert world.open_backfills == (unreadable,)


async def test_services_process_a_backfill() -> None:
    """The real planner, workers and aggregate complete every date of a backfill beside another request."""
    world = JobsWorld()
    WHOLE.write_into(world.upstream, FIRST)
    backfill_id = world.open_backfill(FIRST, SECOND)
    for _ in range(STEPS_MAX):
        await world.advance_jobs()
        await world.run_to_rest()
        if not world.open_backfills:
            break
    assert world.wrong_at_end(backfill_id) == []
