"""Requests of one date: one runs, one waits, and none is lost or blocked by another."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest

from shared.domain import keys, objects
from shared.domain.events import BACKGROUND, IngestCity
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import Status, status_of
from shared.domain.topics import Topic
from shared.storage.active_requests import STALLED_AFTER
from tests.fakes.builders import UpstreamState
from tests.fakes.log import PARTITIONS
from tests.fault.checks import decoded, differences, record_of, requests
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, HOME, WHOLE, failed_world
from tests.fault.world import DATE, ROLES, World


def write(world: World, record: RequestRecord) -> None:
    """Put the record of a request into the bucket."""
    world.store.write(keys.request(record.request_id), objects.encode(record))


async def two_requests() -> tuple[World, RequestId, RequestId]:
    """Begin a request, let its planner read the city list, and request again."""
    world = World()
    running = world.request(WHOLE)
    await world.turn("planner")
    return world, running, world.request(WHOLE)


async def test_many_requests_cost_two_rounds() -> None:
    """Twenty clients that request while a request runs share one more, whose files are read after they asked."""
    world, running, waiting = await two_requests()
    corrected = UpstreamState(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING})
    assert {world.request(corrected) for _ in range(19)} == {waiting}
    await world.run_to_rest()
    assert len(tasks(world)) == 2 * len(HOME)
    assert differences(world) == []
    assert {record.request_id for record in requests(world)} == {running, waiting}


async def test_a_request_waits_until_the_one_before_has_ended() -> None:
    """The planner reads no city list for a waiting request, however often it is published."""
    world, _, waiting = await two_requests()
    await world.turn("planner")
    await world.requeue()
    await world.turn("planner")
    assert {task.request_id for task in tasks(world)}.isdisjoint({waiting})
    await world.run_to_rest()
    assert status_of(record_of(world, waiting)) is Status.COMPLETED


async def test_a_backfill_blocks_no_client() -> None:
    """A client's request completes while a worker has taken no task of the backfill that runs on its date."""
    world = World()
    running = world.request(WHOLE, background=BACKGROUND)
    await world.turn("planner")
    of_client = world.request(WHOLE)
    foreground = [role for role in ROLES if role != "background"]
    while any([await world.turn(role) for role in foreground]):
        pass
    assert status_of(record_of(world, of_client)) is Status.COMPLETED
    assert status_of(record_of(world, running)) is Status.PLANNED
    await world.run_to_rest()
    assert status_of(record_of(world, running)) is Status.COMPLETED
    assert differences(world) == []


@pytest.mark.parametrize("lost", [True, False], ids=["its record is lost", "it is stalled"])
async def test_a_stalled_request_blocks_no_other(lost: bool) -> None:
    """A waiting request begins once the running one has no record, or has made no progress for long."""
    world, running, waiting = await two_requests()
    world.log.commit("worker", world.log.records(Topic.CITY_TASKS))
    await world.run_to_rest()
    if lost:
        del world.store.objects[keys.request(running)]
    else:
        world.clock.advance(STALLED_AFTER.total_seconds())
    waiting_record = record_of(world, waiting)
    write(world, msgspec.structs.replace(waiting_record, updated_at=world.clock() - dt.timedelta(days=1)))
    await world.requeue()
    await world.turn("planner")
    await world.turn("planner")
    await world.run_to_rest()
    assert status_of(record_of(world, waiting)) is Status.COMPLETED


async def test_a_cancelled_request_does_not_wait_for_its_turn() -> None:
    """A waiting request that is cancelled ends while the other one runs, and a later one takes its place."""
    world, _, waiting = await two_requests()
    write(world, msgspec.structs.replace(record_of(world, waiting), cancelled_at=world.clock()))
    await world.turn("planner")
    await world.turn("progress")
    assert status_of(record_of(world, waiting)) is Status.CANCELLED
    assert world.request(WHOLE) != waiting
    await world.run_to_rest()
    assert [status_of(record) for record in requests(world)].count(Status.COMPLETED) == 2


async def test_a_retry_blocks_the_next_request_until_it_ends() -> None:
    """A request that is retried runs again: the next of its date waits, and is processed once the retry has ended."""
    world, request_id = await failed_world()
    world.retry(request_id, WHOLE)
    waiting = world.request(WHOLE)
    await world.turn("planner")
    await world.turn("planner")
    assert {task.request_id for task in tasks(world)} == {request_id}
    await world.run_to_rest()
    assert status_of(record_of(world, waiting)) is Status.COMPLETED
    assert differences(world) == []


async def test_an_earlier_failure_does_not_end_a_retry() -> None:
    """While a retry runs, the failure that caused it may be delivered again: the request goes on."""
    world, request_id = await failed_world()
    world.retry(request_id, WHOLE)
    for partition in range(PARTITIONS):
        world.log.rewind("progress", Topic.REQUEST_PROGRESS, partition, 100)
    while await world.turn("progress"):
        pass
    assert status_of(record_of(world, request_id)) is Status.RUNNING
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED


async def test_a_stalled_retry_is_requeued_for_the_same_cities() -> None:
    """A retry whose tasks were lost is published again for its cities only, and ends."""
    world, request_id = await failed_world()
    world.retry(request_id, WHOLE)
    await world.turn("planner")
    world.log.commit("worker", world.log.records(Topic.CITY_TASKS))
    await world.requeue()
    await world.run_to_rest()
    assert [task.city_id for task in tasks(world) if task.retried_at is not None] == ["3", "3"]
    assert status_of(record_of(world, request_id)) is Status.COMPLETED


def tasks(world: World) -> list[IngestCity]:
    """Return every task that was published."""
    return [event for event in decoded(world, Topic.CITY_TASKS) if isinstance(event, IngestCity) and event.date == DATE]
