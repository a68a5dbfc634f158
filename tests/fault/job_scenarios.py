"""An operator's commands, the state of the world in which each begins, and runs that break every call in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

import msgspec

from shared.domain import keys, objects
from shared.domain.contribution import NOTHING
from shared.domain.ids import CityId
from shared.domain.topics import Topic
from shared.kafka.dead_letters import as_dead_letter
from tests.fakes.builders import UpstreamState
from tests.fakes.faults import Break
from tests.fault.checks import (
    comparable_state,
    differences,
    leftovers,
    live_summaries,
    record_of,
    reports,
    summaries,
)
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, FIRST, HOME, MOVED, WHOLE, breaks_of, unlike
from tests.fault.watcher import Watcher
from tests.fault.world import DATE, EXPIRE_AGE, GC_AGE, STALLED_AFTER, Job, World

MANY_CALLS = 200

REFUSED = UpstreamState(cities=HOME, files={1: b"[7]", 2: b"[8]", 3: EVENING})
CORRECTION = UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING})

Prepare = Callable[[World], Awaitable[None]]
Command = Callable[[World], Awaitable[Job]]


class JobScenario(msgspec.Struct, frozen=True, kw_only=True):
    """A command, and the state of the world in which it begins."""

    name: str
    prepare: Prepare
    command: Command
    same_bytes: bool = True


async def at_rest(world: World) -> None:
    """Process a date, move a city and correct its file; all of it is folded."""
    for truth in (FIRST, WHOLE, UpstreamState(cities=MOVED, files=WHOLE.files)):
        world.request(truth)
        await world.run_to_rest()


async def under_way(world: World) -> None:
    """As at rest, but a correction is in the bucket and the topic, and not folded."""
    await at_rest(world)
    world.request(CORRECTION)
    while await world.turn("planner") or await world.turn("worker"):
        pass


async def damaged(world: World) -> None:
    """As at rest, but one live summary is wrong and another is lost."""
    await at_rest(world)
    armenia, brasil = (summary for summary in live_summaries(world))
    wrong = msgspec.structs.replace(armenia, totals=NOTHING)
    world.store.write(keys.summary(1, DATE, armenia.country), objects.encode(wrong))
    await world.store.delete(keys.summary(1, DATE, brasil.country))


async def littered(world: World) -> None:
    """As at rest, with an attempt that no manifest names, an unfinished upload, and a worker still reading."""
    await at_rest(world)
    for city in (1, 3):
        world.store.write(keys.raw(DATE, CityId(str(city)), "lost-race"), b"[]")
        world.store.begin_upload(keys.raw(DATE, CityId(str(city)), "never-ended"))
    world.clock.advance(GC_AGE.total_seconds() + 1)
    world.request(CORRECTION)
    while await world.turn("planner"):
        pass


async def grown_old(world: World) -> None:
    """As at rest, for longer than raw objects are kept, with a correction that is not folded yet."""
    await at_rest(world)
    world.clock.advance(EXPIRE_AGE.total_seconds() + 1)
    world.request(CORRECTION)
    while await world.turn("planner") or await world.turn("worker"):
        pass


async def flipped(world: World) -> None:
    """Make another generation live for a long time, with a correction not folded yet."""
    await at_rest(world)
    await world.rebuild()
    world.clock.advance(GC_AGE.total_seconds())
    world.request(CORRECTION)
    while await world.turn("planner") or await world.turn("worker"):
        pass


async def put_back(world: World) -> None:
    """Restore a backup of the bucket from before a correction that the topics hold."""
    await at_rest(world)
    backup, known = dict(world.store.objects), world.oracle.copy()
    world.request(CORRECTION)
    await world.run_to_rest()
    world.store.objects, world.oracle = backup, known


async def topics_lost(world: World) -> None:
    """As at rest, but Kafka was lost with all its topics."""
    await at_rest(world)
    world.lose_the_log()


async def in_quarantine(world: World) -> None:
    """Quarantine two files that are good by now."""
    request_id = world.request(REFUSED)
    await world.run_to_rest()
    WHOLE.write_into(world.upstream, DATE)
    world.oracle.requested(request_id, WHOLE)


async def tasks_in_dead_letters(world: World) -> None:
    """Send the tasks of a request to the dead letters, as a build does that cannot read them."""
    world.request(WHOLE)
    await world.turn("planner")
    tasks = world.log.records(Topic.CITY_TASKS)
    for task in tasks:
        world.log.append(Topic.DEAD_LETTERS, *as_dead_letter(task, "not an event of city-tasks"))
    world.log.commit("worker", tasks)
    world.dead_letters = len(tasks)
    await world.run_to_rest()


async def tasks_lost(world: World) -> None:
    """Lose the tasks of a request, which is stalled afterwards."""
    world.request(WHOLE)
    await world.turn("planner")
    world.log.commit("worker", world.log.records(Topic.CITY_TASKS))
    await world.run_to_rest()
    world.clock.advance(STALLED_AFTER.total_seconds())


async def rebuild_from_s3(world: World) -> Job:
    """Rebuild from plans and manifests."""
    return await world.rebuild()


async def rebuild_from_kafka(world: World) -> Job:
    """Rebuild from the topic, then from plans and manifests."""
    return await world.rebuild(from_kafka=True)


async def gc(world: World) -> Job:
    """Run gc."""
    return await world.gc()


async def repair(world: World) -> Job:
    """Run repair."""
    return await world.repair()


async def activate(world: World) -> Job:
    """Activate the first generation again."""
    return await world.rebuild(seed=1)


SCENARIOS = [
    JobScenario(name="rebuild from s3, at rest", prepare=at_rest, command=rebuild_from_s3),
    JobScenario(name="rebuild from s3, a correction under way", prepare=under_way, command=rebuild_from_s3),
    JobScenario(name="rebuild from kafka, a correction under way", prepare=under_way, command=rebuild_from_kafka),
    JobScenario(name="rebuild of damaged summaries", prepare=damaged, command=rebuild_from_s3),
    JobScenario(name="repair", prepare=damaged, command=repair),
    JobScenario(name="gc, a correction under way", prepare=littered, command=gc),
    JobScenario(name="expire raw, a correction under way", prepare=grown_old, command=World.expire_raw),
    JobScenario(name="generations activate, a correction under way", prepare=flipped, command=activate),
    JobScenario(name="generations drop, a correction under way", prepare=flipped, command=World.drop_generations),
    # A second attempt finds higher revisions in the topic, and goes above them.
    JobScenario(name="restore and republish", prepare=put_back, command=World.restore, same_bytes=False),
    JobScenario(name="republish", prepare=topics_lost, command=World.republish),
    JobScenario(name="quarantine retry", prepare=in_quarantine, command=World.retry_quarantined),
    JobScenario(name="dead-letters retry", prepare=tasks_in_dead_letters, command=World.retry_dead_letters),
    JobScenario(name="requeue", prepare=tasks_lost, command=World.requeue_once),
]


async def finished(world: World, scenario: JobScenario) -> None:
    """Let services come to rest, and rerun the command until it succeeds, as an operator does."""
    await world.run_to_rest()
    world.port_calls.heal()
    job = await scenario.command(world)
    assert job.ended_well, job.refused
    await world.run_to_rest()


async def broken_anywhere(scenario: JobScenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Break each call of a command in each way, then run it again; name all that is wrong at the end."""
    before = kind()
    await scenario.prepare(before)

    async def struck(broken: Mapping[int, Break]) -> World:
        world = before.continued(broken)
        await scenario.command(world)
        return world

    calm = await struck({})
    made = list(calm.port_calls.made)
    await finished(calm, scenario)
    expected = comparable_state(calm)
    for one in [*differences(calm), *await leftovers(calm)]:
        yield f"without a fault: {one}"
    for number, how in breaks_of(made):
        world = await struck({number: how})
        await finished(world, scenario)
        found = differences(world)
        if scenario.same_bytes:
            found += unlike(comparable_state(world), expected)
        for one in [*found, *await leftovers(world)]:
            yield f"call {number} ({made[number].what}) by {made[number].life}, {how.value}: {one}"


async def paused_anywhere(scenario: JobScenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Pause a command before each of its calls while services process a request; name all that is wrong."""
    before = kind()
    await scenario.prepare(before)
    calm = before.continued()
    await scenario.command(calm)
    for number, port_call in enumerate(list(calm.port_calls.made)):
        world = before.continued({number: Break.PAUSE})
        job = await scenario.command(world)
        world.request(CORRECTION)
        await world.run_to_rest()
        await job.resume()
        await finished(world, scenario)
        for one in [*differences(world), *await leftovers(world)]:
            yield f"paused before call {number} ({port_call.what}): {one}"


async def taken_over_anywhere(kind: type[World] = World) -> AsyncIterator[str]:
    """Pause a rebuild before each of its calls while another one takes over and ends; name all that is wrong."""
    before = kind()
    await under_way(before)
    calm = before.continued()
    await calm.rebuild()
    for number in range(len(calm.port_calls.made)):
        world = before.continued({number: Break.PAUSE})
        zombie = await world.rebuild()
        taking_over = await world.rebuild()
        world.request(WHOLE)
        await world.run_to_rest()
        served, expected = summaries(world), comparable_state(world)
        await zombie.resume()
        wrong = unlike(summaries(world), served)
        await world.run_to_rest()
        wrong += [*unlike(comparable_state(world), expected), *differences(world)]
        if not taking_over.ended_well:
            wrong.append(f"the rebuild that took over was refused: {taking_over.refused}")
        for one in wrong:
            yield f"taken over before call {number}: {one}"


async def rebuilt_beside_services(kind: type[World] = World, *, from_kafka: bool = False) -> AsyncIterator[str]:
    """Rebuild beside running services that correct and move a city after each of its calls; name all that is wrong.

    The services started before the rebuild, so their caches are from before it.
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


async def refused_again_beside_gc(kind: type[World] = World) -> AsyncIterator[str]:
    """Refuse two files again after each call of gc, which has found their reports old; name all that is wrong."""
    for calls in range(MANY_CALLS):
        world = kind()
        await in_quarantine(world)
        world.clock.advance(GC_AGE.total_seconds() + 1)
        job = await world.gc(calls=calls)
        ended = job.ended
        request_id = world.request(REFUSED)
        await world.run_to_rest()
        if not ended:
            await job.resume()
        kept = {one.key for one in reports(world)} & world.store.objects.keys()
        lost = {one.quarantine_key for one in record_of(world, request_id).failures.values()} - kept
        if lost or world.store.lost_reports:
            yield f"refused again after {calls} calls of gc: lost are {lost}, and {world.store.lost_reports}"
        if ended:
            return
    raise AssertionError(f"gc makes more than {MANY_CALLS} calls")


async def cleaned_beside_services(kind: type[World] = World) -> AsyncIterator[str]:
    """Run gc while a worker is paused before each of its calls; name all that is wrong."""
    before = kind()
    await at_rest(before)
    calm = before.continued()
    calm.request(CORRECTION)
    await calm.run_to_rest()
    for number, port_call in enumerate(list(calm.port_calls.made)):
        if not port_call.life.startswith("worker"):
            continue
        world = before.continued({number: Break.PAUSE})
        world.request(CORRECTION)
        while await world.turn("planner") or await world.turn("worker"):
            if world.has_paused_process:
                break
        await world.gc()
        await world.resume_paused()
        await world.run_to_rest()
        for one in differences(world):
            yield f"cleaned up before call {number} ({port_call.what}): {one}"
