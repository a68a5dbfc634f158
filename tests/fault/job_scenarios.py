"""An operator's commands, the state of the world in which each begins, and the running of it with every call broken."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from shared import keys, objects
from shared.contribution import NOTHING
from shared.identity import CityId
from tests.fakes import Break, Truth
from tests.fault.checks import differences, essence, leftovers, live_summaries, summaries
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, FIRST, MOVED, WHOLE, breaks_of, unlike
from tests.fault.watcher import Watcher
from tests.fault.world import DATE, GC_AGE, Job, World

MANY_CALLS = 200

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


async def taken_over_anywhere(kind: type[World] = World) -> AsyncIterator[str]:
    """Let a rebuild stand still before each of its calls while another one takes over and ends; name what is wrong."""
    before = kind()
    await under_way(before)
    calm = before.continued()
    await calm.rebuild()
    for number in range(len(calm.crossings.made)):
        world = before.continued({number: Break.PAUSE})
        zombie = await world.rebuild()
        taking_over = await world.rebuild()
        world.request(WHOLE)
        await world.run_to_rest()
        served, expected = summaries(world), essence(world)
        await zombie.resume()
        wrong = unlike(summaries(world), served)
        await world.run_to_rest()
        wrong += [*unlike(essence(world), expected), *differences(world)]
        if not taking_over.ended_well:
            wrong.append(f"the rebuild that took over was refused: {taking_over.refused}")
        for one in wrong:
            yield f"taken over before call {number}: {one}"


async def rebuilt_beside_services(kind: type[World] = World, *, from_kafka: bool = False) -> AsyncIterator[str]:
    """Rebuild beside services that have lived for long, and that correct and move a city after each of its calls.

    What they remember of the time before the rebuild is what this is about; name all that is wrong.
    """
    for calls in range(MANY_CALLS):
        world = kind()
        watcher = Watcher(world)
        await at_rest(world)
        job = await world.rebuild(from_kafka=from_kafka, calls=calls)
        ended = job.ended
        world.request(CORRECTION)
        await world.run_to_rest()
        await watcher.look()
        if not ended:
            await job.resume()
        wrong = await watcher.complaints()
        if not job.ended_well:
            wrong.append(f"the rebuild was refused: {job.refused}")
        await world.run_to_rest()
        for one in [*wrong, *differences(world)]:
            yield f"a city is corrected after {calls} calls of a rebuild: {one}"
        if ended:
            return
    raise AssertionError(f"a rebuild makes more than {MANY_CALLS} calls")


async def cleaned_beside_services(kind: type[World] = World) -> AsyncIterator[str]:
    """Clean up while a worker stands still before each of its calls; name all that is wrong."""
    before = kind()
    await at_rest(before)
    calm = before.continued()
    calm.request(CORRECTION)
    await calm.run_to_rest()
    for number, crossing in enumerate(list(calm.crossings.made)):
        if not crossing.life.startswith("worker"):
            continue
        world = before.continued({number: Break.PAUSE})
        world.request(CORRECTION)
        while await world.turn("planner") or await world.turn("worker"):
            if world.standing_still:
                break
        await world.gc()
        await world.resume_paused()
        await world.run_to_rest()
        for one in differences(world):
            yield f"cleaned up before call {number} ({crossing.what}): {one}"
