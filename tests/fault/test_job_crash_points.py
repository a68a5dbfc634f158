"""An operator's commands, and taking a request in, may break at any call and be run again.

The fault model is that of test_crash_points. A command dies or sees a fault at one of its calls; services go on, with
what was under way when it began; then the operator runs it again, unbroken. Or it stands still before a call until the
services have come to rest, and goes on then. In the end all is as the oracle says, byte for byte as if nothing had
broken, and nothing is left over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from services.api.errors import StatusNotWritten
from services.api.idempotency import Claims
from services.api.requests import Requests
from shared.errors import OperatorError
from shared.requests import Status, status_of
from tests.fakes import Break, BreakablePublisher, BreakableStore, Crossings, Life, MemoryPublisher
from tests.fault.checks import live_summaries, requests
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
from tests.fault.scenarios import WHOLE, breaks_of
from tests.fault.world import DATE, World, is_death

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@each_scenario
async def test_a_command_may_break_anywhere(scenario: JobScenario) -> None:
    """Whichever call of a command breaks, in whichever way, running it again ends as if none had."""
    wrong = [one async for one in broken_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_a_command_may_stand_still_anywhere(scenario: JobScenario) -> None:
    """Wherever a command stands still while a city is corrected and moves, nothing is lost and nothing goes back."""
    wrong = [one async for one in paused_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


async def test_what_is_served_never_goes_back_while_a_rebuild_breaks() -> None:
    """Whichever call of a rebuild breaks, what is live afterwards is no older than before, with nothing missing."""
    before = World()
    await under_way(before)
    calm = before.continued()
    await calm.rebuild()
    versions = {summary.country: summary.version for summary in live_summaries(before)}
    for number, how in breaks_of(list(calm.crossings.made)):
        world = before.continued({number: how})
        await world.rebuild()
        served = {summary.country: summary.version for summary in live_summaries(world)}
        assert all(served.get(country, 0) >= version for country, version in versions.items()), (number, how)


@pytest.mark.parametrize("happening", [taken_over_anywhere, rebuilt_beside_services, cleaned_beside_services])
async def test_what_goes_on_beside_a_command_does_no_harm(happening: Callable[[], AsyncIterator[str]]) -> None:
    """Whoever works while a rebuild or a clean-up does, at whichever of its calls, nothing is lost."""
    wrong = [one async for one in happening()]
    assert not wrong, "\n".join(wrong[:20])


async def accept(world: World, broken: Mapping[int, Break]) -> list[str]:
    """Ask for a date with one idempotency key, again and again until it is answered; return the calls made."""
    crossings = Crossings(broken)
    for life in range(10):
        process = Life(f"api-{life}", crossings)
        store = BreakableStore(world.store, process)
        publisher = BreakablePublisher(MemoryPublisher(world.log, source="api"), process)
        api = Requests(store, publisher, clock=world.clock)
        api.claims = Claims(store, clock=world.clock)
        try:
            await api.accept(DATE, idempotency_key="of-the-client")
        except (OperatorError, StatusNotWritten):
            continue  # the client is told, and asks again
        except BaseException as error:
            if not is_death(error):
                raise
        else:
            return [crossing.what for crossing in crossings.made]
    raise AssertionError("the request was never answered")


async def test_taking_a_request_in_may_break_anywhere() -> None:
    """Whichever call breaks while a request is taken in, its client gets one request in the end, which completes."""
    calls = len(await accept(World(), {}))
    for number in range(calls):
        for how in Break:
            if how is Break.PAUSE:
                continue
            world = World()
            WHOLE.write_into(world.upstream, DATE)
            await accept(world, {number: how})
            await world.run_to_rest()
            assert [status_of(record) for record in requests(world)] == [Status.COMPLETED], (number, how)
            assert sum(summary.totals.trips for summary in live_summaries(world)) == 3, (number, how)
