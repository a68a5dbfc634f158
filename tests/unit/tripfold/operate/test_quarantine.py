"""Quarantine for operators: filtered by date, country and city, and retried in the latest request."""

from __future__ import annotations

import datetime as dt

import pytest

from shared.domain import events
from shared.domain.events import ProcessRequested
from shared.domain.topics import Topic
from tests.fakes.builders import UpstreamState
from tests.fakes.log import MemoryPublisher
from tests.fault.scenarios import CORRECTED, EVENING, HOME, MOVED
from tests.fault.world import DATE, World
from tripfold.operate.quarantine import NothingQuarantined, QuarantineFilter, read_city_day, read_reports, retry_reports

BAD = UpstreamState(cities=HOME, files={1: b"[7]", 2: b"[8]", 3: EVENING})


async def refused_world() -> World:
    """Run a request of which two files, both of Armenia, are refused."""
    world = World()
    world.request(BAD)
    await world.run_to_rest()
    return world


def last_requested(world: World) -> ProcessRequested:
    """Return the latest request."""
    event = events.decode(Topic.PROCESS_REQUESTS, world.log.records(Topic.PROCESS_REQUESTS)[-1].value)
    assert isinstance(event, ProcessRequested)
    return event


@pytest.mark.parametrize(
    ("chosen", "cities"),
    [
        (QuarantineFilter(), ["1", "2"]),
        (QuarantineFilter(first=DATE, last=DATE), ["1", "2"]),
        (QuarantineFilter(first=DATE + dt.timedelta(days=1)), []),
        (QuarantineFilter(last=DATE - dt.timedelta(days=1)), []),
        (QuarantineFilter(country="armenia"), ["1", "2"]),
        (QuarantineFilter(country="brasil"), []),
        (QuarantineFilter(first=DATE, city_id="2"), ["2"]),
    ],
)
async def test_reports_are_chosen_by_date_country_and_city(chosen: QuarantineFilter, cities: list[str]) -> None:
    """Only the selected reports are read, by date and city."""
    world = await refused_world()
    assert [report.city_id for report in await read_reports(world.store, chosen)] == cities


async def test_the_latest_report_of_a_city_day_comes_first() -> None:
    """The later of two files of a city-day is shown first; the error names a city-day without one."""
    world = await refused_world()
    world.clock.advance(60)
    world.request(UpstreamState(cities=HOME, files={1: b"[77]", 2: b"[8]", 3: EVENING}))
    await world.run_to_rest()
    first, second = await read_city_day(world.store, DATE, "1")
    assert (first.size_bytes, second.size_bytes) == (4, 3)
    with pytest.raises(NothingQuarantined, match="city '3' on 2024-05-01"):
        await read_city_day(world.store, DATE, "3")


async def test_only_the_selected_city_is_retried() -> None:
    """A retry of one file names its city only, in the latest request that asked for it."""
    world = await refused_world()
    later = world.request(BAD)
    await world.run_to_rest()
    reports = await read_reports(world.store, QuarantineFilter(city_id="2"))
    retried = await retry_reports(world.store, MemoryPublisher(world.log), reports, clock=world.clock)
    assert [report.city_id for report in retried.asked] == ["2"]
    requested = last_requested(world)
    assert requested.request_id == later
    assert requested.retry is not None
    assert requested.retry.positions == "2"
    world.upstream.downloads.clear()
    world.upstream.files["2"] = b"[]"
    await world.run_to_rest()
    assert world.upstream.downloads == ["2"]


async def test_a_city_that_no_longer_fails_is_not_retried() -> None:
    """A file whose city has not failed in its last request is settled, and nothing is published for it."""
    world = await refused_world()
    request_id = last_requested(world).request_id
    world.retry(request_id, UpstreamState(cities=HOME, files={1: CORRECTED, 2: b"[8]", 3: EVENING}))
    await world.run_to_rest()
    retried = await retry_reports(
        world.store,
        MemoryPublisher(world.log),
        await read_reports(world.store, QuarantineFilter(city_id="1")),
        clock=world.clock,
    )
    assert ([report.city_id for report in retried.settled], retried.requests) == (["1"], ())


async def test_under_a_newer_plan_all_failed_cities_are_retried() -> None:
    """Where the date's plan has moved on, a position means another city: the request's failed ones are all named."""
    world = await refused_world()
    first = last_requested(world).request_id
    world.request(UpstreamState(cities=MOVED, files={1: CORRECTED, 2: CORRECTED, 3: EVENING}))
    await world.run_to_rest()
    reports = await read_reports(world.store, QuarantineFilter(city_id="2"))
    retried = await retry_reports(world.store, MemoryPublisher(world.log), reports, clock=world.clock)
    # City 2 alone is where city 1 was, and would be asked for in its place.
    assert [(one.request_id, one.retry and one.retry.positions) for one in retried.requests] == [(first, "3")]
    await world.run_to_rest()
    assert world.unexpected == []


async def test_all_refused_cities_of_a_request_are_retried_together() -> None:
    """A retry of several files of one request names every city once."""
    world = await refused_world()
    retried = await retry_reports(
        world.store, MemoryPublisher(world.log), await read_reports(world.store, QuarantineFilter()), clock=world.clock
    )
    assert [report.city_id for report in retried.asked] == ["1", "2"]
    assert [one.retry and one.retry.positions for one in retried.requests] == ["3"]
