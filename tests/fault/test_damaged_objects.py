"""A damaged plan or manifest makes its own date or city fail, with the key in the reason; it stops nothing else."""

from __future__ import annotations

from shared.domain import keys
from shared.domain.ids import CityId
from shared.domain.requests import Status, status_of
from tests.fakes.store import MemoryStore
from tests.fault import checks
from tests.fault.scenarios import WHOLE
from tests.fault.world import DATE, World

DAMAGED = b'{"schema_version":1'


async def test_a_damaged_plan_fails_the_requests_of_its_date() -> None:
    """The request fails and names the plan. After the plan is restored, the next request completes."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    plan = world.store.objects[keys.plan(DATE)].body
    MemoryStore.write(world.store, keys.plan(DATE), DAMAGED)
    failed = world.request(WHOLE)
    await world.run_to_rest()
    record = checks.record_of(world, failed)
    assert (status_of(record), keys.plan(DATE) in (record.failed_reason or "")) == (Status.FAILED, True)
    MemoryStore.write(world.store, keys.plan(DATE), plan)
    again = world.request(WHOLE)
    await world.run_to_rest()
    assert status_of(checks.record_of(world, again)) is Status.COMPLETED


async def test_a_damaged_manifest_fails_its_city() -> None:
    """The city fails and names the manifest; the other cities of the date are processed."""
    world = World()
    world.request(WHOLE)
    await world.run_to_rest()
    key = keys.manifest(DATE, CityId("1"))
    MemoryStore.write(world.store, key, DAMAGED)
    request = world.request(WHOLE)
    await world.run_to_rest()
    record = checks.record_of(world, request)
    assert status_of(record) is Status.COMPLETED_WITH_FAILURES
    (failure,) = record.failures.values()
    assert (failure.city_id, key in failure.reason) == ("1", True)
