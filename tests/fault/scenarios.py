"""Scenarios of the upstream's state before, during and after breaks, and runs that break every call in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from services.aggregate.bucket_reader import read_events
from services.ingest.parsing.trips import RULE_VERSION
from shared.domain import keys, objects
from shared.domain.events import BACKGROUND, Background, Source
from shared.domain.ids import RequestId
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from tests.fakes.builders import City, Trip, UpstreamState
from tests.fakes.faults import Break, PortCall
from tests.fault.checks import comparable_state, differences, leftovers, manifests, record_of, unfinished
from tests.fault.world import DATE, ROUNDS_MAX, World

ARMENIA, BRASIL = "Armenia", "Brasil"

MORNING = (Trip(passengers=30, delay_ms=61_500), Trip(passengers=0, delay_ms=0, accident=True))
CORRECTED = (Trip(passengers=31, delay_ms=60_000),)
EVENING = (Trip(passengers=7, delay_ms=1),)
EMPTY: tuple[Trip, ...] = ()

HOME = (City(1, ARMENIA), City(2, ARMENIA), City(3, BRASIL))
MOVED = (City(1, BRASIL), City(2, ARMENIA), City(3, BRASIL))
ALL_IN_ARMENIA = (City(1, ARMENIA), City(2, ARMENIA), City(3, ARMENIA))

FIRST = UpstreamState(cities=HOME, files={1: MORNING, 2: EMPTY})
WHOLE = UpstreamState(cities=HOME, files={1: MORNING, 2: EMPTY, 3: EVENING})
ONE = UpstreamState(cities=HOME[:1], files={1: MORNING})
TWO = UpstreamState(cities=(HOME[0], HOME[2]), files={1: MORNING, 3: EVENING})
"""Fewer cities for long scenarios, whose runs grow with the square of their calls."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """The upstream's states around one request: ``before`` without breaks, then ``state`` with them.

    ``requests_at_once`` are independent requests. ``requests_while_running`` come after the first one began, and join a
    waiting one. If ``older_rules`` is set, the stored numbers follow other parsing rules. ``afterwards`` is the state
    at a last request, during which a paused process sleeps.
    """

    name: str
    before: tuple[UpstreamState, ...] = ()
    state: UpstreamState
    requests_at_once: int = 1
    requests_while_running: int = 0
    background: Background | UnsetType = UNSET
    older_rules: bool = False
    cuts: tuple[int, ...] = ()
    etags: bool = True
    same_bytes: bool = True
    afterwards: UpstreamState = WHOLE


SCENARIOS = [
    Scenario(name="a first request: one city good, one empty, one missing", state=FIRST),
    Scenario(
        name="a corrected file",
        before=(FIRST,),
        state=UpstreamState(cities=HOME, files={1: CORRECTED, 2: EMPTY}),
    ),
    Scenario(
        name="a city moves",
        before=(WHOLE,),
        state=UpstreamState(cities=MOVED, files=WHOLE.files),
        afterwards=UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
    ),
    Scenario(
        name="a city moves, and its upstream knows no validators",
        before=(WHOLE,),
        state=UpstreamState(cities=MOVED, files=WHOLE.files),
        etags=False,
    ),
    Scenario(
        name="a city moves with a corrected file",
        before=(WHOLE,),
        state=UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
    ),
    Scenario(
        name="a city moves back",
        before=(WHOLE, UpstreamState(cities=MOVED, files=WHOLE.files)),
        state=WHOLE,
        afterwards=UpstreamState(cities=MOVED, files=WHOLE.files),
    ),
    Scenario(
        name="the only city of a country moves away",
        before=(WHOLE,),
        state=UpstreamState(cities=ALL_IN_ARMENIA, files=WHOLE.files),
    ),
    Scenario(name="a request repeated, nothing changed", before=(WHOLE,), state=WHOLE),
    Scenario(name="a request repeated, and no validators", before=(WHOLE,), state=WHOLE, etags=False),
    Scenario(name="one date requested twice at once", state=TWO, requests_at_once=2, same_bytes=False),
    Scenario(
        name="a move requested twice at once",
        before=(WHOLE,),
        state=UpstreamState(cities=MOVED, files=WHOLE.files),
        requests_at_once=2,
        same_bytes=False,
    ),
    Scenario(name="a date requested again while it is processed", state=TWO, requests_while_running=2),
    Scenario(
        name="a move requested again while it is processed",
        before=(WHOLE,),
        state=UpstreamState(cities=MOVED, files=WHOLE.files),
        requests_while_running=1,
    ),
    Scenario(
        name="a file disappears after it was stored, another is broken",
        before=(WHOLE,),
        state=UpstreamState(cities=HOME, files={2: b'[{"passengers":1}]', 3: EVENING}),
    ),
    Scenario(
        name="a bad file is asked for again",
        before=(UpstreamState(cities=HOME, files={1: MORNING, 2: b'[{"passengers":1}]', 3: EVENING}),),
        state=UpstreamState(cities=HOME, files={1: MORNING, 2: b'[{"passengers":1}]', 3: EVENING}),
    ),
    Scenario(
        name="a date of a backfill, requested by a client meanwhile",
        state=TWO,
        background=BACKGROUND,
        requests_while_running=1,
        same_bytes=False,
    ),
    Scenario(
        name="stored files are read again",
        before=(WHOLE,),
        state=WHOLE,
        background=Background(source=Source.BUCKET),
        older_rules=True,
    ),
    Scenario(name="files break off twice before they come", state=ONE, cuts=(0, 150)),
    Scenario(name="the list of cities cannot be had", before=(FIRST,), state=UpstreamState(cities=None, files={})),
    Scenario(name="no cities at all", before=(FIRST,), state=UpstreamState(cities=(), files={})),
]


async def world_before(scenario: Scenario, kind: type[World] = World) -> World:
    """Run the requests before the breaks."""
    world = kind(etags=scenario.etags)
    for truth in scenario.before:
        world.request(truth)
        await world.run_to_rest()
    if scenario.older_rules:
        await read_by_older_rules(world)
    return world


async def read_by_older_rules(world: World) -> None:
    """Change manifests and summaries as if older rules had counted no passengers."""
    for manifest in manifests(world):
        older = msgspec.structs.replace(
            manifest,
            rule_version=RULE_VERSION - 1,
            contribution=msgspec.structs.replace(manifest.contribution, passengers=0),
        )
        world.store.write(keys.manifest(DATE, manifest.city_id), objects.encode(older))
    of_bucket = await read_events(world.store, DATE)
    for country in of_bucket.by_country:
        remade = of_bucket.summary(country)
        assert remade is not None
        world.store.write(keys.summary(1, DATE, country), objects.encode(remade))


async def run_with_faults(
    scenario: Scenario, before: World, broken: Mapping[int, Break], *, resume_after_rounds: int = ROUNDS_MAX
) -> World:
    """Run the step with breaks from the state of ``before``, to rest."""
    world = before.continued(broken)
    world.upstream.cuts = _cuts(scenario)
    await request_all(scenario, world)
    await world.run_to_rest(resume_after_rounds=resume_after_rounds)
    return world


async def request_all(scenario: Scenario, world: World) -> None:
    """Make all requests of the scenario."""
    for _ in range(scenario.requests_at_once):
        world.request(scenario.state, joining=scenario.requests_at_once == 1, background=scenario.background)
    if scenario.requests_while_running:
        await world.turn("planner")
    for _ in range(scenario.requests_while_running):
        world.request(scenario.state)


def _cuts(scenario: Scenario) -> dict[str, list[int]]:
    return {str(city.id): list(scenario.cuts) for city in scenario.state.cities or ()}


def breaks_of(made: Sequence[PortCall]) -> Iterator[tuple[int, Break]]:
    """Return every way in which every call can break, without duplicates.

    A crash before a call equals a crash after the previous call of the same process. A call without an effect that
    loses its response equals a call that did not happen.
    """
    for number, port_call in enumerate(made):
        yield number, Break.LOST_ANSWER
        if number == 0 or made[number - 1].life != port_call.life:
            yield number, Break.DIE_BEFORE
        if port_call.effect:
            yield number, Break.DIE_AFTER
            yield number, Break.REFUSED
            yield number, Break.SENT_TWICE
        if port_call.what.startswith("swap "):
            yield number, Break.UNDECIDED


async def broken_anywhere(scenario: Scenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a scenario with each call broken in each way; name all differences."""
    before = await world_before(scenario, kind)
    calm = await run_with_faults(scenario, before, {})
    expected = comparable_state(calm)
    made = list(calm.port_calls.made)
    for one in [*differences(calm), *await leftovers(calm)]:
        yield f"without a fault: {one}"
    for number, how in breaks_of(made):
        world = await run_with_faults(scenario, before, {number: how})
        found = differences(world)
        if scenario.same_bytes:
            found += unlike(comparable_state(world), expected)
        for one in [*found, *await leftovers(world)]:
            yield f"call {number} ({made[number].what}) by {made[number].life}, {how.value}: {one}"


def unlike(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Name the differences from a run without a fault."""
    return [
        f"{name}: without a fault {expected.get(name)!r}, found {found.get(name)!r}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]


async def paused_anywhere(scenario: Scenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a scenario and a later request with a pause before each call in turn; name all differences."""
    before = await world_before(scenario, kind)
    made = list((await run_with_faults(scenario, before, {})).port_calls.made)
    for number, port_call in enumerate(made):
        world = await run_with_faults(scenario, before, {number: Break.PAUSE})
        world.request(scenario.afterwards)
        await world.run_to_rest()
        await world.resume_paused()
        await world.run_to_rest()
        for one in differences(world, one_fault=True):
            yield f"paused at call {number} ({port_call.what}) by {port_call.life}: {one}"


async def taken_back_anywhere(struck_by: UpstreamState, kind: type[World] = World) -> AsyncIterator[tuple[str, World]]:
    """Pause before each call during a change that the upstream then reverts; yield each world at rest.

    No other process does the work of the paused process before the change is reverted.
    """
    before = kind()
    before.request(WHOLE)
    await before.run_to_rest()

    async def taken_in(broken: Mapping[int, Break]) -> World:
        world = before.continued(broken)
        world.request(struck_by)
        while not world.has_paused_process and await world.run_turns(1):
            pass
        return world

    for number, port_call in enumerate(list((await taken_in({})).port_calls.made)):
        world = await taken_in({number: Break.PAUSE})
        assert world.has_paused_process, f"call {number} was not made again"
        world.request(WHOLE)
        await world.run_to_rest()
        await world.resume_paused()
        await world.run_to_rest()
        yield f"paused at call {number} ({port_call.what}) by {port_call.life}", world


async def losing_anything(scenario: Scenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a scenario with each record lost in turn, then requeue and request again; name all differences.

    Summaries for downstream consumers are left out, since a rebuild publishes those again.
    """
    before = await world_before(scenario, kind)
    appended = list((await run_with_faults(scenario, before, {})).log.appended)
    for number, record in enumerate(appended):
        if record.topic is Topic.COUNTRY_DAY_SUMMARIES:
            continue
        world = before.continued(losing=[number])
        world.upstream.cuts = _cuts(scenario)
        await request_all(scenario, world)
        await world.run_to_rest()
        await world.requeue()
        await world.run_to_rest()
        found = unfinished(world)
        world.request(scenario.state)
        await world.run_to_rest()
        for one in found + differences(world):
            yield f"record {number} of {record.topic.value} lost: {one}"


async def failed_world() -> tuple[World, RequestId]:
    """Run a request in which one city fails."""
    world = World()
    request_id = world.request(FIRST)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED_WITH_FAILURES
    return world, request_id
