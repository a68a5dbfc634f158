"""An operator's commands and the API's calls may break anywhere and be run again.

The fault model is that of test_crash_points. A command crashes or sees a fault at one of its calls. The services go on
with the work that was in progress, and the operator runs the command again without a break. Or the command pauses
before a call until the services have come to rest, and then resumes.

At the end everything matches the oracle, byte for byte as if nothing had broken, and nothing is left over.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import pytest

from services.api.backfills.service import Backfills, Wanted
from services.api.http.errors import Conflict, StatusNotWritten
from services.api.requests.service import Requests
from shared.domain import keys
from shared.domain.errors import OperatorError
from shared.domain.requests import Status, status_of
from tests.fakes.faults import Break, PortCalls, ProcessLife
from tests.fakes.log import BreakablePublisher, MemoryPublisher
from tests.fakes.store import BreakableStore
from tests.fault.checks import differences, inconsistencies, live_summaries, requests
from tests.fault.job_scenarios import (
    SCENARIOS,
    JobScenario,
    broken_anywhere,
    cleaned_beside_services,
    paused_anywhere,
    rebuilt_beside_services,
    taken_over_anywhere,
    under_way,
)
from tests.fault.scenarios import FIRST, WHOLE, breaks_of
from tests.fault.world import DATE, World, is_crash

FIRST_REQUEST = World().request(WHOLE)
"""The id that each world gives to its first request."""

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@each_scenario
async def test_a_command_may_break_at_any_call(scenario: JobScenario) -> None:
    """Whichever call of a command breaks in whichever way, the next run ends as if none had."""
    wrong = [one async for one in broken_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_a_command_may_pause_at_any_call(scenario: JobScenario) -> None:
    """Wherever a command pauses while a city is corrected and moves, nothing is lost and nothing goes back."""
    wrong = [one async for one in paused_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


async def test_served_numbers_never_go_back_while_a_rebuild_breaks() -> None:
    """Whichever call of a rebuild breaks, the live numbers afterwards are complete and no older than before."""
    before = World()
    await under_way(before)
    calm = before.continued()
    await calm.rebuild()
    versions = {summary.country: summary.version for summary in live_summaries(before)}
    for number, how in breaks_of(list(calm.port_calls.made)):
        world = before.continued({number: how})
        await world.rebuild()
        served = {summary.country: summary.version for summary in live_summaries(world)}
        assert all(served.get(country, 0) >= version for country, version in versions.items()), (number, how)


@pytest.mark.parametrize("happening", [taken_over_anywhere, rebuilt_beside_services, cleaned_beside_services])
async def test_concurrent_work_beside_a_command_does_no_harm(happening: Callable[[], AsyncIterator[str]]) -> None:
    """Whichever process works during a rebuild or gc, at whichever of its calls, nothing is lost."""
    wrong = [one async for one in happening()]
    assert not wrong, "\n".join(wrong[:20])


Ask = Callable[[Backfills, Requests], Awaitable[object]]


async def call_until_response(world: World, ask: Ask, broken: Mapping[int, Break]) -> int:
    """Call the API again until it responds; return how many calls it made."""
    port_calls = PortCalls(broken)
    for life in range(10):
        process = ProcessLife(f"api-{life}", port_calls)
        store = BreakableStore(world.store, process)
        publisher = BreakablePublisher(MemoryPublisher(world.log, source="api"), process)
        api = Requests(store, publisher, clock=world.clock)
        try:
            await ask(Backfills(store, api.claims, clock=world.clock), api)
        except Conflict:
            return len(port_calls.made)  # an earlier try has done it
        except (OperatorError, StatusNotWritten):
            continue  # the client sees the error and tries again
        except BaseException as error:
            if not is_crash(error):
                raise
        else:
            return len(port_calls.made)
    raise AssertionError("the request was never answered")


async def call_with_each_break(prepare: Callable[[], Awaitable[World]], ask: Ask) -> AsyncIterator[tuple[str, World]]:
    """Call the API with each of its calls broken in each way; yield each world at rest, and what broke in it."""
    calls = await call_until_response(await prepare(), ask, {})
    for number in range(calls):
        for how in Break:
            if how is Break.PAUSE:
                continue
            world = await prepare()
            await call_until_response(world, ask, {number: how})
            await world.run_to_rest()
            yield f"call {number}: {how.value}", world


async def holding_files() -> World:
    """Return a world without any request."""
    world = World()
    WHOLE.write_into(world.upstream, DATE)
    return world


async def test_accepting_a_request_may_break_at_any_call() -> None:
    """Whichever call breaks while the API accepts a request, its client ends with one request, which completes."""

    async def ask(_backfills: Backfills, api: Requests) -> None:
        record = await api.accept(DATE, idempotency_key="of-the-client")
        await api.read(record.request_id)  # an answered request can be looked at, from the first moment on

    async for what, world in call_with_each_break(holding_files, ask):
        assert [status_of(record) for record in requests(world)] == [Status.COMPLETED], what
        assert sum(summary.totals.trips for summary in live_summaries(world)) == 3, what


async def test_accepting_a_backfill_may_break_at_any_call() -> None:
    """Whichever call breaks while the API accepts a backfill, its client ends with one, which is open."""

    async def ask(backfills: Backfills, _api: Requests) -> None:
        wanted = Wanted(first=DATE, last=DATE + dt.timedelta(days=1))
        backfill = await backfills.accept(wanted, idempotency_key="of-the-client")
        await backfills.read(backfill.backfill_id)

    async for what, world in call_with_each_break(holding_files, ask):
        (key,) = world.store.bodies(keys.BACKFILLS)
        assert list(world.open_backfills) == [keys.parse_backfill(key)], what


async def test_cancelling_a_request_may_break_at_any_call() -> None:
    """Whichever call breaks while a request is cancelled, it ends cancelled, and its unstarted cities are skipped."""

    async def planned() -> World:
        world = World()
        world.request(WHOLE)
        await world.turn("planner")
        await world.turn("progress")
        return world

    async def ask(_backfills: Backfills, api: Requests) -> None:
        await api.cancel(FIRST_REQUEST)

    async for what, world in call_with_each_break(planned, ask):
        assert [status_of(record) for record in requests(world)] == [Status.CANCELLED], what
        assert (world.store.bodies(keys.RAW), inconsistencies(world)) == ({}, []), what


async def test_retrying_a_request_may_break_at_any_call() -> None:
    """Whichever call breaks while failed cities are retried, all are retried in the end, and the request completes."""

    async def failed() -> World:
        world = World()
        request_id = world.request(FIRST)
        await world.run_to_rest()
        WHOLE.write_into(world.upstream, DATE)
        world.oracle.requested(request_id, WHOLE)
        return world

    async def ask(_backfills: Backfills, api: Requests) -> None:
        await api.retry(FIRST_REQUEST)

    async for what, world in call_with_each_break(failed, ask):
        assert differences(world) == [], what
