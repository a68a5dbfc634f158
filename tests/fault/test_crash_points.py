"""No event is lost or counted twice, whatever call across a port breaks.

The fault model: four processes (planner, worker, aggregate, progress) call the bucket, the log and the upstream. A
scenario runs once without breaks, and its calls are counted. Then it runs again for each call and for each way to break
it:

- The process crashes before the call, or after the call and before it knows the result. A new process starts from the
  bucket and the log, which delivers uncommitted records again.
- The call happens and its response is lost, or the call does not happen. The process sees an error.
- The response is lost and the client repeats the call itself, so a compare-and-swap conflicts with itself.
- The process pauses before the call. Others do its work and that of a later request. Then it resumes with its old
  state.

At rest, the totals and completeness of every country-day match plain arithmetic over the upstream's trips. Every
request has ended correctly, and ledgers, manifests, raw objects and topics agree. After crashes alone, the summaries
are equal byte for byte, and manifests and compacted topics are equal but for the names of attempts. After gc no object
is left that no manifest names.

One more fault is that the log loses an acknowledged record. A bucket that loses objects is not modelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain import keys, outbox
from shared.domain.events import CityFinished
from shared.domain.ids import CityId
from shared.domain.topics import Topic
from tests.fakes.builders import UpstreamState
from tests.fakes.faults import Break
from tests.fakes.log import PARTITIONS
from tests.fault.checks import decoded, differences, manifests
from tests.fault.scenarios import (
    ALL_IN_ARMENIA,
    CORRECTED,
    EMPTY,
    EVENING,
    HOME,
    MOVED,
    SCENARIOS,
    WHOLE,
    Scenario,
    broken_anywhere,
    losing_anything,
    paused_anywhere,
    request_all,
    run_with_faults,
    taken_back_anywhere,
    world_before,
)
from tests.fault.world import EXPIRE_AGE, ROLES, Process, World

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


@each_scenario
async def test_any_call_may_break(scenario: Scenario) -> None:
    """Whichever call breaks in whichever way, the end is the same as without a break."""
    wrong = [one async for one in broken_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


async def test_publishing_a_plan_in_chunks_may_break_at_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A country whose plan takes several events comes to the same end, whichever of them breaks."""
    monkeypatch.setattr(outbox, "PLAN_CHUNK_CITIES_MAX", 1)
    wrong = [one async for one in broken_anywhere(Scenario(name="a plan in chunks", state=WHOLE))]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_any_process_may_pause_and_resume(scenario: Scenario) -> None:
    """A process that pauses at any call, and resumes after the others have gone on, does no harm."""
    wrong = [one async for one in paused_anywhere(scenario)]
    assert not wrong, "\n".join(wrong[:20])


async def test_a_change_that_the_upstream_takes_back_is_not_served() -> None:
    """A process that is paused at any call during a change, and resumes after its reversal, does not bring it back."""
    changed = UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING})
    wrong = [
        f"{what}: {one}"
        async for what, world in taken_back_anywhere(changed)
        for one in differences(world, one_fault=True)
    ]
    assert not wrong, "\n".join(wrong[:20])


@each_scenario
async def test_any_lost_record_is_recovered(scenario: Scenario) -> None:
    """Whichever record the log loses, a requeue ends every request, and a further request corrects everything."""
    wrong = [one async for one in losing_anything(scenario)]
    assert not wrong, "\n".join(wrong[:20])


@settings(max_examples=100, deadline=None)
@given(
    scenario=st.sampled_from(SCENARIOS),
    broken=st.dictionaries(st.integers(0, 150), st.sampled_from(Break), min_size=1, max_size=5),
    resume_after_rounds=st.integers(0, 12),
)
def test_several_calls_may_break(scenario: Scenario, broken: dict[int, Break], resume_after_rounds: int) -> None:
    """After several breaks in one run, pauses among them, a requeue and a further request correct everything.

    One break needs neither. A resumed process that crashes over its lost batch can leave half of its work: a request
    without an end, or a revision that is not in the topic.
    """

    async def run() -> list[str]:
        world = await run_with_faults(
            scenario, await world_before(scenario), broken, resume_after_rounds=resume_after_rounds
        )
        world.request(scenario.afterwards)
        await world.run_to_rest(resume_after_rounds=resume_after_rounds)
        world.port_calls.heal()
        await world.resume_paused()
        await world.run_to_rest()
        await world.requeue()
        await world.run_to_rest()
        world.request(scenario.afterwards)
        await world.run_to_rest()
        return differences(world)

    assert asyncio.run(run()) == []


class SideBySide(World):
    """Gives each batch to two processes at once, as a rebalance in the middle of it does; one of them may commit."""

    async def turn(self, role: str, *, partitions: Sequence[int] = range(PARTITIONS)) -> bool:
        batch = self.log.take(role, ROLES[role].topic, ROLES[role].batch_records_max, partitions=partitions)
        twins = [Process(self, role, number) for number in range(2)]
        self._living[role] = twins[0]
        self.resumed += 1
        await asyncio.gather(*(self._handle(process, batch) for process in twins if batch))
        return bool(batch)


@each_scenario
async def test_two_processes_may_handle_one_batch(scenario: Scenario) -> None:
    """If every batch is handled twice at the same time, the end is the same as if it were once."""
    before = await world_before(scenario, SideBySide)
    for truth in (scenario.state, scenario.afterwards):
        world = before.continued()
        await request_all(msgspec.structs.replace(scenario, state=truth), world)
        await world.run_to_rest()
        assert differences(world) == []
        before = world


async def test_an_aggregate_that_gets_a_partition_back_detects_its_stale_cache() -> None:
    """After others folded, an aggregate's old cache does not leave a stale record as the last one in the topic."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    stale = [record for record in world.log.records(Topic.CITY_STATS) if record.key == b"2024-05-01/armenia/1"]
    first = world.living("aggregate")
    world.replace("aggregate")
    world.request(UpstreamState(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING}))
    await world.run_to_rest()
    world.replace("aggregate", first)
    world.log.append(Topic.CITY_STATS, stale[0].key, stale[0].value, stale[0].headers)
    await world.run_to_rest()
    assert differences(world) == []


async def test_a_known_file_leaves_nothing_in_the_bucket() -> None:
    """Known bytes without validators make no object and no upload, whether the city stays or moves."""
    world = World(etags=False, chunk_bytes=64)
    for truth in (WHOLE, WHOLE, UpstreamState(cities=MOVED, files=WHOLE.files)):
        world.request(truth)
        await world.run_to_rest()
    assert set(world.store.bodies(keys.RAW)) == {manifest.raw_key for manifest in manifests(world)}
    assert world.store.unfinished == []


@pytest.mark.parametrize("etags", [True, False])
async def test_a_lost_raw_object_is_downloaded_again(etags: bool) -> None:
    """If a raw object is missing, the date's next request stores the same bytes as a new revision."""
    world = World(etags=etags)
    world.request(WHOLE)
    await world.run_to_rest()
    before = {manifest.city_id: manifest for manifest in manifests(world)}
    del world.store.objects[before[CityId("1")].raw_key]
    world.request(WHOLE)
    await world.run_to_rest()
    after = {manifest.city_id: manifest for manifest in manifests(world)}
    assert after[CityId("1")].revision == before[CityId("1")].revision + 1
    assert after[CityId("1")].raw_key in world.store.objects
    assert after[CityId("2")] == before[CityId("2")]
    assert not [one for one in differences(world) if "history" not in one]


async def test_an_expired_raw_object_is_not_downloaded_again() -> None:
    """A raw object that has expired is no reason to download an unchanged file. A changed file is stored again."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    world.clock.advance(EXPIRE_AGE.total_seconds() + 1)
    await world.expire_raw()
    assert world.store.bodies("raw/") == {}
    world.upstream.downloads.clear()
    world.request(WHOLE)
    await world.run_to_rest()
    assert (world.upstream.downloads, differences(world)) == ([], [])
    world.request(UpstreamState(cities=HOME, files={**WHOLE.files, 1: CORRECTED}))
    await world.run_to_rest()
    assert differences(world) == []
    assert world.store.bodies("raw/").keys() == {one.raw_key for one in manifests(world) if one.city_id == "1"}


async def test_a_moved_city_is_served_once_both_countries_are_folded() -> None:
    """A move is served once it is folded both in the new country and in the old one."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    request_id = world.request(UpstreamState(cities=MOVED, files=WHOLE.files))
    await world.run_to_rest()
    ended = [one for one in decoded(world, Topic.REQUEST_PROGRESS) if isinstance(one, CityFinished)]
    mine = [one for one in ended if (one.city_id, one.request_id) == ("1", request_id)]
    (moved,) = [{pair.country for pair in one.published} for one in mine]
    assert moved == {"armenia", "brasil"}


async def test_a_late_task_does_not_undo_a_move_of_a_city_that_has_left_since() -> None:
    """A city that the newest plan does not name stays where the previous plan moved it, whatever arrives late."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    late = [record for record in world.log.records(Topic.CITY_TASKS) if b'"city_id":"1"' in (record.value or b"")]
    for truth in (UpstreamState(cities=MOVED, files=WHOLE.files), UpstreamState(cities=MOVED[1:], files=WHOLE.files)):
        world.request(truth)
        await world.run_to_rest()
    world.log.append(Topic.CITY_TASKS, late[0].key, late[0].value, late[0].headers)
    await world.run_to_rest()
    assert [manifest.country for manifest in manifests(world) if manifest.city_id == "1"] == ["brasil"]


async def test_a_stale_plan_of_a_removed_country_is_not_the_last_in_its_topic() -> None:
    """A country without cities has a plan too: a late older one is followed by the present one."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    stale = [record for record in world.log.records(Topic.CITY_STATS) if record.key == b"2024-05-01/brasil"]
    world.request(UpstreamState(cities=ALL_IN_ARMENIA, files=WHOLE.files))
    await world.run_to_rest()
    world.log.append(Topic.CITY_STATS, stale[0].key, stale[0].value, stale[0].headers)
    await world.run_to_rest()
    assert differences(world) == []


async def test_a_redelivered_task_does_not_hide_a_corrected_file_from_a_later_request() -> None:
    """A task that is redelivered before that of a later request does not speak for the later one."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    for partition in range(PARTITIONS):
        world.log.rewind("worker", Topic.CITY_TASKS, partition, len(HOME))
    world.replace("worker")
    world.request(UpstreamState(cities=HOME, files={**WHOLE.files, 2: CORRECTED}))
    await world.run_to_rest()
    assert differences(world) == []
