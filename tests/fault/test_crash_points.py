"""Nothing is lost and nothing is counted twice, whatever call across a port breaks.

The fault model. Four processes (planner, worker, aggregate, progress) make calls: to the bucket, to the log (each
event and each commit), to the upstream (each list, each file, each chunk). A scenario is run once without a fault,
and its calls are counted. Then it is run again for each call and for each way in which that call can break:

- the process dies before the call happens, or after it happened and before it knows. Another one begins with nothing
  but the bucket and the log, where the records that were not committed come again;
- the call happens and its answer is lost, or it does not happen at all: the process lives and sees a fault;
- the process stands still before the call until everybody takes it for dead, others do its work and that of a later
  request, and then it goes on: with all that it knew, as nobody can prevent.

In the end, at rest, the totals and the completeness of every country-day must be what plain arithmetic over the
upstream's trips says, every request must have ended as it should, and ledgers, manifests, raw objects and topics must
agree. Where nothing but crashes happened, the summaries must even be the same bytes.

One fault more is the log's own: it loses one record that it acknowledged. What is not modelled is a bucket that does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence

import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from services.aggregate.fold import StatEvent
from services.aggregate.folding import Folder
from shared import events, outbox
from shared.events import Event
from shared.objects import Summary
from shared.publishing import Outgoing, Publisher, Received
from shared.topics import Topic
from tests.fakes import Break, City, Crossing, MemoryStore, Trip, Truth
from tests.fault.world import ROLES, ROUNDS_MAX, Handler, Process, World, differences, summaries, unfinished

ARMENIA, BRASIL = "Armenia", "Brasil"

MORNING = (Trip(passengers=30, delay_ms=61_500), Trip(passengers=0, delay_ms=0, accident=True))
CORRECTED = (Trip(passengers=31, delay_ms=60_000),)
EVENING = (Trip(passengers=7, delay_ms=1),)
EMPTY: tuple[Trip, ...] = ()

HOME = (City(1, ARMENIA), City(2, ARMENIA), City(3, BRASIL))
MOVED = (City(1, BRASIL), City(2, ARMENIA), City(3, BRASIL))
LEFT_ALONE = (City(1, ARMENIA), City(2, ARMENIA), City(3, ARMENIA))

FIRST = Truth(cities=HOME, files={1: MORNING, 2: EMPTY})
WHOLE = Truth(cities=HOME, files={1: MORNING, 2: EMPTY, 3: EVENING})


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What the upstream holds when the date is requested: ``before``, unbroken, and then ``struck``, with the faults.

    ``afterwards`` is what it holds at a last request, which a process that stood still sleeps through.
    """

    name: str
    before: tuple[Truth, ...] = ()
    struck: Truth
    requests_at_once: int = 1
    cuts: tuple[int, ...] = ()
    etags: bool = True
    same_bytes: bool = True
    afterwards: Truth = WHOLE


SCENARIOS = [
    Scenario(name="a first request: one city good, one empty, one missing", struck=FIRST),
    Scenario(
        name="a corrected file",
        before=(FIRST,),
        struck=Truth(cities=HOME, files={1: CORRECTED, 2: EMPTY}),
    ),
    Scenario(
        name="a city moves",
        before=(WHOLE,),
        struck=Truth(cities=MOVED, files=WHOLE.files),
        afterwards=Truth(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
    ),
    Scenario(
        name="a city moves, and its upstream knows no validators",
        before=(WHOLE,),
        struck=Truth(cities=MOVED, files=WHOLE.files),
        etags=False,
    ),
    Scenario(
        name="a city moves with a corrected file",
        before=(WHOLE,),
        struck=Truth(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
    ),
    Scenario(
        name="a city moves back",
        before=(WHOLE, Truth(cities=MOVED, files=WHOLE.files)),
        struck=WHOLE,
        afterwards=Truth(cities=MOVED, files=WHOLE.files),
    ),
    Scenario(
        name="the only city of a country moves away",
        before=(WHOLE,),
        struck=Truth(cities=LEFT_ALONE, files=WHOLE.files),
    ),
    Scenario(name="a request repeated, nothing changed", before=(WHOLE,), struck=WHOLE),
    Scenario(name="a request repeated, and no validators", before=(WHOLE,), struck=WHOLE, etags=False),
    Scenario(name="one date requested twice at once", struck=WHOLE, requests_at_once=2, same_bytes=False),
    Scenario(
        name="a move requested twice at once",
        before=(WHOLE,),
        struck=Truth(cities=MOVED, files=WHOLE.files),
        requests_at_once=2,
        same_bytes=False,
    ),
    Scenario(
        name="a file disappears after it was stored, another is broken",
        before=(WHOLE,),
        struck=Truth(cities=HOME, files={2: b'[{"passengers":1}]', 3: EVENING}),
    ),
    Scenario(
        name="a bad file is asked for again",
        before=(Truth(cities=HOME, files={1: MORNING, 2: b'[{"passengers":1}]', 3: EVENING}),),
        struck=Truth(cities=HOME, files={1: MORNING, 2: b'[{"passengers":1}]', 3: EVENING}),
    ),
    Scenario(name="files break off twice before they come", struck=WHOLE, cuts=(0, 150)),
    Scenario(name="the list of cities cannot be had", before=(FIRST,), struck=Truth(cities=None, files={})),
    Scenario(name="no cities at all", before=(FIRST,), struck=Truth(cities=(), files={})),
]
each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep the services' logs out of thousands of runs."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


async def world_before(scenario: Scenario, kind: type[World] = World) -> World:
    """Run what comes before the faults."""
    world = kind(etags=scenario.etags)
    for truth in scenario.before:
        world.request(truth)
        await world.run_to_rest()
    return world


async def struck(
    scenario: Scenario, before: World, broken: Mapping[int, Break], *, resume_after_rounds: int = ROUNDS_MAX
) -> World:
    """Run the step with the faults, from where ``before`` rests, and come to rest."""
    world = before.continued(broken)
    world.upstream.cuts = {str(city.id): list(scenario.cuts) for city in scenario.struck.cities or ()}
    for _ in range(scenario.requests_at_once):
        world.request(scenario.struck)
    await world.run_to_rest(resume_after_rounds=resume_after_rounds)
    return world


def breaks_of(made: Sequence[Crossing]) -> Iterator[tuple[int, Break]]:
    """Name every way in which every call can break, but for those that come to the same.

    Dying before a call is dying after the one before it, if that was the same process's; a call without an effect is
    as good as none when its answer is lost.
    """
    for number, crossing in enumerate(made):
        yield number, Break.LOST_ANSWER
        if number == 0 or made[number - 1].life != crossing.life:
            yield number, Break.DIE_BEFORE
        if crossing.effect:
            yield number, Break.DIE_AFTER
            yield number, Break.REFUSED


async def broken_anywhere(scenario: Scenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a scenario with each of its calls broken in each way; name all that is wrong in the end."""
    before = await world_before(scenario, kind)
    calm = await struck(scenario, before, {})
    for one in differences(calm):
        yield f"without a fault: {one}"
    made = list(calm.crossings.made)
    for number, how in breaks_of(made):
        world = await struck(scenario, before, {number: how})
        found = differences(world)
        if scenario.same_bytes and summaries(world) != summaries(calm):
            found.append("the summaries are other bytes")
        for one in found:
            yield f"call {number} ({made[number].what}) by {made[number].life}, {how.value}: {one}"


async def paused_anywhere(scenario: Scenario, kind: type[World] = World) -> AsyncIterator[str]:
    """Run a scenario, and a request after it, with a pause before each call in turn; name all that is wrong."""
    before = await world_before(scenario, kind)
    made = list((await struck(scenario, before, {})).crossings.made)
    for number, crossing in enumerate(made):
        world = await struck(scenario, before, {number: Break.PAUSE})
        world.request(scenario.afterwards)
        await world.run_to_rest()
        await world.resume_paused()
        await world.run_to_rest()
        for one in differences(world):
            yield f"paused at call {number} ({crossing.what}) by {crossing.life}: {one}"


@each_scenario
async def test_any_call_may_break(scenario: Scenario) -> None:
    """Whichever call breaks, in whichever way, all ends as if none had."""
    wrong = [one async for one in broken_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


async def test_any_call_may_break_a_plan_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A country whose plan takes several events comes to the same end, whichever of them breaks."""
    monkeypatch.setattr(outbox, "PLAN_CHUNK_CITIES_MAX", 1)
    wrong = [one async for one in broken_anywhere(Scenario(name="a plan in chunks", struck=WHOLE))]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_any_process_may_come_back(scenario: Scenario) -> None:
    """Wherever a process stands still until others have moved on, its going on does no harm."""
    wrong = [one async for one in paused_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_what_the_log_loses_comes_back(scenario: Scenario) -> None:
    """Whichever record the log loses, a sweep ends every request, and a further request sets all right.

    Summaries for downstream consumers are left out: a rebuild publishes those again.
    """
    before = await world_before(scenario)
    appended = list((await struck(scenario, before, {})).log.appended)
    wrong = []
    for number, record in enumerate(appended):
        if record.topic is Topic.COUNTRY_DAY_SUMMARIES:
            continue
        world = before.continued(losing=[number])
        for _ in range(scenario.requests_at_once):
            world.request(scenario.struck)
        await world.run_to_rest()
        await world.sweep()
        await world.run_to_rest()
        found = unfinished(world)
        world.request(scenario.struck)
        await world.run_to_rest()
        wrong += [f"record {number} of {record.topic.value} lost: {one}" for one in found + differences(world)]
    assert not wrong, "\n".join(wrong[:20])


@settings(max_examples=150, deadline=None)
@given(
    scenario=st.sampled_from(SCENARIOS),
    broken=st.dictionaries(st.integers(0, 150), st.sampled_from(Break), min_size=1, max_size=5),
    resume_after_rounds=st.integers(0, 12),
)
def test_several_calls_may_break(scenario: Scenario, broken: dict[int, Break], resume_after_rounds: int) -> None:
    """Whichever calls break in one run, pauses of any length among them, a sweep and a further request set it right.

    One fault needs neither. But a process that comes back, finds its batch taken over, and dies over it a second time
    leaves half of its work to nobody: a request without an end, or a revision that the topic does not know yet.
    """

    async def run() -> list[str]:
        world = await struck(scenario, await world_before(scenario), broken, resume_after_rounds=resume_after_rounds)
        world.request(scenario.afterwards)
        await world.run_to_rest(resume_after_rounds=resume_after_rounds)
        world.crossings.heal()
        await world.resume_paused()
        await world.run_to_rest()
        await world.sweep()
        await world.run_to_rest()
        world.request(scenario.afterwards)
        await world.run_to_rest()
        return differences(world)

    assert asyncio.run(run()) == []


class SideBySide(World):
    """Gives each batch to two processes at once, as a rebalance in the middle of it does; one of them may commit."""

    async def take_turn(self, role: str) -> bool:
        batch = self.log.take(role, ROLES[role].topic, ROLES[role].batch_records_max)
        twins = [Process(self, role, number) for number in range(2)]
        self._living[role] = twins[0]
        self.resumed += 1
        await asyncio.gather(*(self._handle(process, batch) for process in twins if batch))
        return bool(batch)


@each_scenario
async def test_two_processes_may_have_one_batch(scenario: Scenario) -> None:
    """Where every batch is handled twice, at the same time, the end is the same as if it were once."""
    before = await world_before(scenario, SideBySide)
    for truth in (scenario.struck, scenario.afterwards):
        world = before.continued()
        for _ in range(scenario.requests_at_once):
            world.request(truth)
        await world.run_to_rest()
        assert differences(world) == []
        before = world


class CommitFirst(World):
    """Commits a batch before its effects happen."""

    commit_first = True


class BlindStore(MemoryStore):
    """A store whose swap does not look at the ETag."""

    async def swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        del etag
        await asyncio.sleep(0)
        return self.write(key, body)


class BlindSwap(World):
    """Has a store that does not compare when it swaps."""

    def make_store(self) -> MemoryStore:
        return BlindStore(self.clock)


class OncePublisher:
    """Publishes each event to a topic at most once: what was tried before is taken for published."""

    def __init__(self, publisher: Publisher, tried: set[bytes]) -> None:
        self._publisher = publisher
        self._tried = tried

    async def publish(self, outgoing: Iterable[Outgoing]) -> None:
        for item in outgoing:
            value = events.encode(item.event) + repr(item.cause).encode()
            if value not in self._tried:
                self._tried.add(value)
                await self._publisher.publish([item])

    async def bury(self, record: Received, error: str) -> None:
        await self._publisher.bury(record, error)


class AtMostOnce(World):
    """Has processes that do not publish again what they may have published."""

    def __init__(self, broken: Mapping[int, Break] | None = None, *, etags: bool = True) -> None:
        super().__init__(broken, etags=etags)
        self._tried: set[bytes] = set()

    def make_publisher(self, process: Process) -> Publisher:
        return OncePublisher(super().make_publisher(process), self._tried)


class DeafFolder(Folder):
    """Does not answer a superseded record with what the bucket holds."""

    async def _current_of_superseded(self, events: Sequence[StatEvent], summary: Summary) -> list[Event]:
        del events, summary
        return []


class StaleTopic(World):
    """Has an aggregate that lets its topic end in a stale record."""

    def make_handler(self, process: Process) -> Handler:
        if process.role == "aggregate":
            return DeafFolder(process.store, process.publisher, cache_bytes=100_000).process
        return super().make_handler(process)


@pytest.mark.parametrize(
    ("kind", "breaking", "sign"),
    [
        (CommitFirst, broken_anywhere, "expected 'completed', found"),
        (AtMostOnce, broken_anywhere, "expected 'completed', found"),
        (BlindSwap, paused_anywhere, "armenia: expected"),
        (StaleTopic, paused_anywhere, "the last record of"),
    ],
)
async def test_a_broken_promise_is_noticed(
    kind: type[World], breaking: Callable[[Scenario, type[World]], AsyncIterator[str]], sign: str
) -> None:
    """Where a process or the bucket breaks one promise of the design, at least one of the runs ends wrong."""
    scenario = Scenario(
        name="a corrected file",
        before=(WHOLE,),
        struck=Truth(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
    )
    seen = []
    async for one in breaking(scenario, kind):
        seen.append(one)
        if sign in one:
            return
    pytest.fail(f"nothing was noticed but {seen[:20]}")


async def test_an_aggregate_that_gets_a_partition_back_knows_what_is_stale() -> None:
    """Where others folded meanwhile, an aggregate's old cache does not let the topic end in a stale record."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    stale = [record for record in world.log.records(Topic.CITY_STATS) if record.key == b"2024-05-01/armenia/1"]
    first = world.living("aggregate")
    world.replace("aggregate")
    world.request(Truth(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING}))
    await world.run_to_rest()
    world.replace("aggregate", first)
    world.log.append(Topic.CITY_STATS, stale[0].key, stale[0].value, stale[0].headers)
    await world.run_to_rest()
    assert differences(world) == []
