"""An operator's commands, and taking a request in, may break at any call and be run again.

The fault model is that of test_crash_points. A command dies or sees a fault at one of its calls; services go on, with
what was under way when it began; then the operator runs it again, unbroken. Or it stands still before a call until the
services have come to rest, and goes on then. In the end all is as the oracle says, byte for byte as if nothing had
broken, and nothing is left over.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec
import pytest

from services.api.errors import StatusNotWritten
from services.api.idempotency import Claims
from services.api.requests import Requests
from shared import keys, objects
from shared.contribution import NOTHING
from shared.errors import OperatorError
from shared.identity import CityId
from shared.requests import Status, status_of
from tests.fakes import Break, BreakablePublisher, BreakableStore, Crossings, Life, MemoryPublisher, Truth
from tests.fault.checks import differences, essence, leftovers, live_summaries, requests
from tests.fault.test_crash_points import CORRECTED, EMPTY, EVENING, FIRST, MOVED, WHOLE, breaks_of, unlike
from tests.fault.world import DATE, GC_AGE, Job, World, is_death

CORRECTION = Truth(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING})

Prepare = Callable[[World], Awaitable[None]]
Command = Callable[[World], Awaitable[Job]]


class JobScenario(msgspec.Struct, frozen=True, kw_only=True):
    """A command, and the state of the world in which it begins."""

    name: str
    prepare: Prepare
    command: Command


async def at_rest(world: World) -> None:
    """Serve a date, move a city, correct its file: all of it folded."""
    for truth in (FIRST, WHOLE, Truth(cities=MOVED, files=WHOLE.files)):
        world.request(truth)
        await world.run_to_rest()


async def under_way(world: World) -> None:
    """As before, and a correction is in the bucket and in the topic, but not folded."""
    await at_rest(world)
    world.request(CORRECTION)
    while await world.turn("planner") or await world.turn("worker"):
        pass


async def damaged(world: World) -> None:
    """As at rest, but one live summary says something wrong and another is lost."""
    await at_rest(world)
    armenia, brasil = (summary for summary in live_summaries(world))
    wrong = msgspec.structs.replace(armenia, totals=NOTHING)
    world.store.write(keys.summary(1, DATE, armenia.country), objects.encode(wrong))
    await world.store.delete(keys.summary(1, DATE, brasil.country))


async def littered(world: World) -> None:
    """As at rest, with an attempt that nobody names, an upload without an end, and a worker still at its file."""
    await at_rest(world)
    for city in (1, 3):
        world.store.write(keys.raw(DATE, CityId(str(city)), "lost-race"), b"[]")
        world.store.begin_upload(keys.raw(DATE, CityId(str(city)), "never-ended"))
    world.clock.advance(GC_AGE.total_seconds() + 1)
    world.request(CORRECTION)
    while await world.turn("planner"):
        pass


async def rebuild_from_s3(world: World) -> Job:
    """Rebuild from plans and manifests."""
    return await world.rebuild()


async def rebuild_from_kafka(world: World) -> Job:
    """Rebuild from the topic, then plans and manifests."""
    return await world.rebuild(from_kafka=True)


async def gc(world: World) -> Job:
    """Clean up."""
    return await world.gc()


async def repair(world: World) -> Job:
    """Repair."""
    return await world.repair()


SCENARIOS = [
    JobScenario(name="rebuild from s3, at rest", prepare=at_rest, command=rebuild_from_s3),
    JobScenario(name="rebuild from s3, a correction under way", prepare=under_way, command=rebuild_from_s3),
    JobScenario(name="rebuild from kafka, a correction under way", prepare=under_way, command=rebuild_from_kafka),
    JobScenario(name="rebuild of damaged summaries", prepare=damaged, command=rebuild_from_s3),
    JobScenario(name="repair", prepare=damaged, command=repair),
    JobScenario(name="gc, a correction under way", prepare=littered, command=gc),
]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


async def finished(world: World, scenario: JobScenario) -> None:
    """Let services come to rest, and run the command until it ends well, as an operator does who sees it fail."""
    await world.run_to_rest()
    world.crossings.heal()
    job = await scenario.command(world)
    assert job.ended_well, job.refused
    await world.run_to_rest()


async def broken_anywhere(scenario: JobScenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a command with each of its calls broken in each way, then again; name all that is wrong in the end."""
    before = kind()
    await scenario.prepare(before)

    async def struck(broken: Mapping[int, Break]) -> World:
        world = before.continued(broken)
        await scenario.command(world)
        return world

    calm = await struck({})
    made = list(calm.crossings.made)
    await finished(calm, scenario)
    expected = essence(calm)
    for one in [*differences(calm), *await leftovers(calm)]:
        yield f"without a fault: {one}"
    for number, how in breaks_of(made):
        world = await struck({number: how})
        await finished(world, scenario)
        for one in [*differences(world), *unlike(essence(world), expected), *await leftovers(world)]:
            yield f"call {number} ({made[number].what}) by {made[number].life}, {how.value}: {one}"


async def paused_anywhere(scenario: JobScenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Let a command stand still before each of its calls while services serve a request; name all that is wrong."""
    before = kind()
    await scenario.prepare(before)
    calm = before.continued()
    await scenario.command(calm)
    for number, crossing in enumerate(list(calm.crossings.made)):
        world = before.continued({number: Break.PAUSE})
        job = await scenario.command(world)
        world.request(CORRECTION)
        await world.run_to_rest()
        await job.resume()
        await finished(world, scenario)
        for one in [*differences(world), *await leftovers(world)]:
            yield f"standing still before call {number} ({crossing.what}): {one}"


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


async def test_a_rebuild_that_was_taken_over_does_no_harm() -> None:
    """Wherever a rebuild stands still while another one takes over and ends, its going on changes nothing."""
    before = World()
    await under_way(before)
    calm = before.continued()
    await calm.rebuild()
    for number in range(len(calm.crossings.made)):
        world = before.continued({number: Break.PAUSE})
        zombie = await world.rebuild()
        taking_over = await world.rebuild()
        assert taking_over.ended_well, taking_over.refused
        await world.run_to_rest()
        served = essence(world)
        await zombie.resume()
        await world.run_to_rest()
        assert unlike(essence(world), served) == [], number
        assert differences(world) == [], number


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
