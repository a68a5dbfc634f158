"""Retries of a request: only its failed cities, under the request's own id, whichever call breaks meanwhile."""

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


async def test_a_retry_fetches_only_the_failed_cities() -> None:
    """Once its file is there, the failed city is fetched, no other is requested, and the request is completed."""
    world, request_id = await failed_world()
    world.upstream.downloads.clear()
    world.retry(request_id, WHOLE)
    await world.run_to_rest()
    assert world.upstream.downloads == ["3"]
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert differences(world) == []


async def test_a_failed_retry_reports_the_later_reason() -> None:
    """A city that fails differently than before reports the last reason; the request stays as it ended."""
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
    """Whichever call breaks in whichever way, the retry ends as if none had."""
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


async def test_a_retry_after_a_changed_plan_requests_all_cities() -> None:
    """If a later request changed the plan, positions mean other cities, so all cities are requested."""
    world, request_id = await failed_world()
    world.request(UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY}))
    await world.run_to_rest()
    world.retry(request_id, UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}))
    await world.run_to_rest()
    record = record_of(world, request_id)
    assert (status_of(record), counts_of(record).cities_total) == (Status.COMPLETED, 3)
    assert [one for one in differences(world) if "expected 'completed with failures'" not in one] == []


async def test_a_request_whose_city_list_failed_is_retried_as_a_whole() -> None:
    """A request that failed as a whole is planned by its retry and completed."""
    world = World()
    request_id = world.request(UpstreamState(cities=None, files={}))
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.FAILED
    world.retry(request_id, WHOLE)
    await world.run_to_rest()
    assert status_of(record_of(world, request_id)) is Status.COMPLETED
    assert differences(world) == []


async def test_only_failures_are_retried() -> None:
    """A running request, a completed request and a city that has not failed are refused."""
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
async def test_a_retry_publishes_again_events_that_a_request_still_waits_for(cancelled: bool) -> None:
    """A request whose events were compacted away is served in the end, although its city could not be fetched again."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    request_id = world.request(WHOLE)
    for role in ("planner", "worker", "progress"):
        while await world.turn(role):
            pass
    await world.rebuild(from_kafka=False)  # publishes the same events again, for no request
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
