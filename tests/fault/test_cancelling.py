"""A request may be cancelled at any moment: unstarted cities are skipped, and started ones finish normally.

Each test runs the processes for some turns, cancels as the API does, and runs them to rest.
"""

from __future__ import annotations

import pytest

from services.api.http.errors import Conflict
from services.api.requests.service import Requests
from shared.domain import keys, objects
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import Counts, Status, counts_of, status_of
from shared.domain.topics import Topic
from tests.fakes.builders import City, Trip, UpstreamState
from tests.fakes.faults import Break
from tests.fakes.log import MemoryPublisher
from tests.fault.checks import inconsistencies, manifests, unfinished
from tests.fault.world import World

TURNS_MAX = 100
CITIES = 6
WANTED = UpstreamState(
    cities=tuple(City(number, "Armenia" if number % 2 else "Brasil") for number in range(CITIES)),
    files={number: (Trip(passengers=number, delay_ms=1_000),) for number in range(CITIES)},
)

ONE = UpstreamState(cities=WANTED.cities and WANTED.cities[:1], files={0: (Trip(passengers=4, delay_ms=1_000),)})


def read(world: World, request_id: RequestId) -> RequestRecord:
    """Return a request as the bucket has it."""
    key = keys.request(request_id)
    return objects.decode(RequestRecord, world.store.objects[key].body, key)


async def cancel(world: World, request_id: RequestId) -> None:
    """Cancel a request, as the API does."""
    await Requests(world.store, MemoryPublisher(world.log, source="api"), clock=world.clock).cancel(request_id)


async def cancelled_after(turns: int) -> tuple[World, RequestId, Counts]:
    """Return a world at rest whose only request was cancelled after some turns, and its counts at that time."""
    world = World()
    request_id = world.request(WANTED)
    await world.run_turns(turns)
    before = counts_of(read(world, request_id))
    await cancel(world, request_id)
    await world.run_to_rest()
    return world, request_id, before


async def test_a_request_may_be_cancelled_at_any_call() -> None:
    """The request ends, and every city is served or skipped: the later it is cancelled, the fewer are skipped."""
    skipped = []
    for turns in range(TURNS_MAX):
        try:
            world, request_id, before = await cancelled_after(turns)
        except Conflict:
            break
        assert unfinished(world) == []
        assert inconsistencies(world) == []
        record = read(world, request_id)
        counts = counts_of(record)
        assert record.planned == (turns > 0)
        if record.planned:
            assert counts.cities_stored + counts.cities_skipped == CITIES
            assert status_of(record) is (Status.CANCELLED if counts.cities_skipped else Status.COMPLETED)
            assert len(world.store.bodies("raw/")) == counts.cities_stored >= before.cities_stored
            skipped.append(counts.cities_skipped)
        else:
            assert (status_of(record), world.store.bodies("raw/")) == (Status.CANCELLED, {})
    else:
        pytest.fail("the request never ended")
    assert skipped == sorted(skipped, reverse=True)
    assert skipped[0] == CITIES
    assert skipped[-1] == 0


async def test_a_city_of_a_cancelled_request_is_fetched_for_another_request() -> None:
    """A city that another request waits for too is fetched, and both requests record it."""
    world = World()
    first, second = world.request(WANTED), world.request(WANTED, joining=False)
    await cancel(world, first)
    await world.run_to_rest()
    assert status_of(read(world, first)) is Status.CANCELLED
    assert status_of(read(world, second)) is Status.COMPLETED
    assert inconsistencies(world) == []


async def test_a_manifest_written_before_a_crash_is_published_although_all_requests_were_cancelled() -> None:
    """A worker crashes between its manifest and its events; another request joins, and both are cancelled."""
    world = World()
    first = world.request(ONE)
    await world.turn("planner")
    made = world.continued()
    await made.turn("worker")
    (compare_and_swap,) = (at for at, one in enumerate(made.port_calls.made) if one.what.startswith("swap manifests/"))
    world.port_calls.break_after(compare_and_swap, Break.DIE_AFTER)
    await world.turn("worker")
    assert len(manifests(world)) == 1
    assert world.log.records(Topic.CITY_STATS) != []
    second = world.request(ONE)
    while await world.turn("planner") or await world.turn("progress"):
        pass
    for one in (first, second):
        await cancel(world, one)
    await world.run_to_rest()
    assert inconsistencies(world) == []
    assert unfinished(world) == []


async def test_a_cancelled_request_whose_tasks_were_lost_ends_when_requeued() -> None:
    """A cancelled request whose tasks the broker lost ends when it is requeued."""
    world = World()
    request_id = world.request(WANTED)
    await world.run_turns(1)
    await cancel(world, request_id)
    world.log.commit("worker", world.log.records(Topic.CITY_TASKS))  # as if they had never come
    await world.run_to_rest()
    assert status_of(read(world, request_id)) is Status.PLANNED
    await world.requeue()
    await world.run_to_rest()
    assert status_of(read(world, request_id)) is Status.CANCELLED
    assert world.store.bodies("raw/") == {}
