"""Taking up a request's failed cities again: those alone, under the request's own id, whatever breaks meanwhile."""

from __future__ import annotations

import msgspec
import pytest

from shared.domain import keys, objects
from shared.domain.requests import NothingToRetry, Status, counts_of, retried_record, status_of
from shared.domain.topics import Topic
from tests.fakes.builders import UpstreamState
from tests.fault.checks import differences, record_of
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, HOME, MORNING, MOVED, WHOLE, breaks_of, failed_world
from tests.fault.world import DATE, World

LATE = UpstreamState(cities=HOME, files={1: MORNING, 2: EMPTY, 3: b"[7]"})


async def test_a_retry_takes_up_the_failed_cities_alone() -> None:
    """Once its file is there, the failed city is fetched, no other is asked for, and the request is completed."""
    world, request_id = await failed_world()
    world.upstream.downloads.clear()
    world.retry(request_id, WHOLE)
    await world.run_to_rest()
    assert world.upstream.downloads == ["3"]
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert differences(world) == []


async def test_a_retry_that_fails_tells_the_later_reason() -> None:
    """A city that fails otherwise than before is told with what was found last; the request stays as it ended."""
    world, request_id = await failed_world()
    assert "404" in record_of(world, request_id).failures[2].reason
    world.retry(request_id, LATE)
    await world.run_to_rest()
    record = record_of(world, request_id)
    assert status_of(record) is Status.COMPLETED_WITH_FAILURES
    assert "404" not in record.failures[2].reason
    assert differences(world) == []


@pytest.mark.parametrize("retried", [WHOLE, LATE], ids=["the file came", "the file is bad"])
async def test_any_call_of_a_retry_may_break(retried: UpstreamState) -> None:
    """Whichever call breaks, in whichever way, the retry ends as if none had."""
    before, request_id = await failed_world()
    calm = before.continued()
    calm.retry(request_id, retried)
    await calm.run_to_rest()
    wrong = []
    for number, how in breaks_of(list(calm.port_calls.made)):
        world = before.continued({number: how})
        world.retry(request_id, retried)
        await world.run_to_rest()
        wrong += [f"call {number} {how.value}: {one}" for one in differences(world)]
    assert not wrong, "\n".join(wrong[:20])


async def test_a_retry_under_a_plan_that_has_moved_on_takes_up_all_cities() -> None:
    """Where a later request changed the plan, positions mean other cities: all of them are asked for."""
    world, request_id = await failed_world()
    world.request(UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY}))
    await world.run_to_rest()
    world.retry(request_id, UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}))
    await world.run_to_rest()
    record = record_of(world, request_id)
    assert (status_of(record), counts_of(record).cities_total) == (Status.COMPLETED, 3)
    assert [one for one in differences(world) if "expected 'completed with failures'" not in one] == []


async def test_a_request_whose_list_failed_is_asked_for_as_a_whole() -> None:
    """A request that failed as a whole is planned by its retry, and completed."""
    world = World()
    request_id = world.request(UpstreamState(cities=None, files={}))
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.FAILED
    world.retry(request_id, WHOLE)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert differences(world) == []


async def test_what_has_not_failed_is_not_retried() -> None:
    """A request that is under way, one that is completed, and a city that has not failed are refused."""
    world, request_id = await failed_world()
    failed = record_of(world, request_id)
    with pytest.raises(NothingToRetry, match="no failed city to retry"):
        retried_record(failed, world.clock(), positions=0b011)
    assert retried_record(failed, world.clock(), positions=0b111) == retried_record(failed, world.clock())
    with pytest.raises(NothingToRetry, match="was cancelled"):
        retried_record(msgspec.structs.replace(failed, cancelled_at=world.clock()), world.clock())
    under_way = world.request(WHOLE)
    with pytest.raises(NothingToRetry, match="retry it when it has ended"):
        retried_record(record_of(world, under_way), world.clock())
    await world.run_to_rest()
    with pytest.raises(NothingToRetry, match="completed"):
        retried_record(record_of(world, under_way), world.clock())


@pytest.mark.parametrize("cancelled", [False, True], ids=["its file went bad", "it was cancelled"])
async def test_what_an_earlier_end_waits_for_is_published_again(cancelled: bool) -> None:
    """A request whose events were compacted away is served in the end, though its city could not be had once more."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    request_id = world.request(WHOLE)
    for role in ("planner", "worker", "progress"):
        while await world.turn(role):
            pass
    await world.rebuild(from_kafka=False)  # publishes the same events once more, for nobody's request
    world.log.compact(Topic.CITY_STATS)
    LATE.write_into(world.upstream, DATE)
    await world.run_to_rest()
    record = record_of(world, request_id)
    assert status_of(record) is Status.RUNNING
    if cancelled:
        record = msgspec.structs.replace(record, cancelled_at=world.clock(), version=record.version + 1)
        world.store.write(keys.request(request_id), objects.encode(record))
    await world.requeue()
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
