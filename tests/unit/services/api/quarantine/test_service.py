"""Files in quarantine: filtered by date, country and city, and retried in the latest request."""

from __future__ import annotations

import datetime as dt

import pytest

from services.api.http.date_range import DateRange
from services.api.http.errors import InvalidRequest, NotFound
from services.api.quarantine.service import Quarantine, QuarantineFilter, QuarantineRetry
from shared.domain import events
from shared.domain.events import ProcessRequested
from shared.domain.ids import CityId, CountrySlug
from shared.domain.topics import Topic
from tests.fakes.builders import UpstreamState
from tests.fakes.log import MemoryPublisher
from tests.fault.scenarios import CORRECTED, EVENING, HOME, MOVED
from tests.fault.world import DATE, World

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


def quarantine_of(world: World) -> Quarantine:
    """Return the quarantine of a world."""
    return Quarantine(world.store, MemoryPublisher(world.log), clock=world.clock)


async def retry(world: World, city_id: str | None = None) -> QuarantineRetry:
    """Retry all files, or those of a city."""
    return await quarantine_of(world).retry(QuarantineFilter(city_id=CityId(city_id) if city_id else None))


CITY = CityId("1")
DAY_AFTER = DATE + dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("chosen", "cities"),
    [
        (QuarantineFilter(), ["1", "2"]),
        (QuarantineFilter(days=DateRange(DATE, DATE)), ["1", "2"]),
        (QuarantineFilter(days=DateRange(DATE, DAY_AFTER)), ["1", "2"]),
        (QuarantineFilter(days=DateRange(DAY_AFTER, DAY_AFTER)), []),
        (QuarantineFilter(country=CountrySlug("armenia")), ["1", "2"]),
        (QuarantineFilter(country=CountrySlug("brasil")), []),
        (QuarantineFilter(days=DateRange(DATE, DATE), city_id=CityId("2")), ["2"]),
    ],
)
async def test_files_are_selected_by_date_country_and_city(chosen: QuarantineFilter, cities: list[str]) -> None:
    """Only the selected files are listed, by date and city, and counted beyond the limit too."""
    world = await refused_world()
    listed = await quarantine_of(world).find(chosen, limit=100)
    assert ([one.city_id for one in listed.files], listed.total) == (cities, len(cities))
    first = await quarantine_of(world).find(chosen, limit=1)
    assert ([one.city_id for one in first.files], first.total) == (cities[:1], len(cities))


async def test_a_country_of_too_many_reports_is_refused_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report must be read to know its country. So a call names fewer dates instead of reading all that exist."""
    world = await refused_world()
    monkeypatch.setattr("services.api.quarantine.service.READ_MAX", 1)
    everywhere = QuarantineFilter(country=CountrySlug("armenia"))
    for call in (quarantine_of(world).find(everywhere, limit=1), quarantine_of(world).retry(everywhere)):
        with pytest.raises(InvalidRequest, match=r"2 reports match; one call reads at most 1\."):
            await call
    found = await quarantine_of(world).find(QuarantineFilter(country=CountrySlug("armenia"), city_id=CITY), limit=1)
    assert found.total == 1


async def test_no_or_too_many_files_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry without a file is not found; one of too many is refused before any is retried."""
    world = await refused_world()
    before = last_requested(world)
    with pytest.raises(NotFound, match="no such file in quarantine"):
        await retry(world, "3")
    monkeypatch.setattr("services.api.quarantine.service.RETRIED_FILES_MAX", 1)
    with pytest.raises(InvalidRequest, match=r"2 files match; one call retries at most 1\."):
        await retry(world)
    assert last_requested(world) == before


async def test_only_the_selected_city_is_retried() -> None:
    """A retry of one file names its city only, in the latest request that asked for it."""
    world = await refused_world()
    later = world.request(BAD)
    await world.run_to_rest()
    retried = await retry(world, "2")
    assert [(one.city_id, one.request_id) for one in retried.retried] == [("2", later)]
    requested = last_requested(world)
    assert requested.request_id == later
    assert requested.retry is not None
    assert requested.retry.positions == "2"
    world.upstream.downloads.clear()
    world.upstream.files["2"] = b"[]"
    await world.run_to_rest()
    assert world.upstream.downloads == ["2"]


async def test_a_city_that_no_longer_fails_is_not_retried() -> None:
    """A file whose city has not failed in its last request is skipped, and nothing is published for it."""
    world = await refused_world()
    request_id = last_requested(world).request_id
    world.retry(request_id, UpstreamState(cities=HOME, files={1: CORRECTED, 2: b"[8]", 3: EVENING}))
    await world.run_to_rest()
    before = last_requested(world)
    retried = await retry(world, "1")
    assert ([one.city_id for one in retried.skipped], retried.retried) == (["1"], ())
    assert last_requested(world) == before


async def test_under_a_newer_plan_all_failed_cities_are_retried() -> None:
    """Where the date's plan has moved on, a position means another city: the request's failed ones are all named."""
    world = await refused_world()
    first = last_requested(world).request_id
    world.request(UpstreamState(cities=MOVED, files={1: CORRECTED, 2: CORRECTED, 3: EVENING}))
    await world.run_to_rest()
    await retry(world, "2")
    requested = last_requested(world)
    # City 2 alone is where city 1 was, and would be asked for in its place.
    assert (requested.request_id, requested.retry and requested.retry.positions) == (first, "3")
    await world.run_to_rest()
    assert world.unexpected == []


async def test_all_refused_cities_of_a_request_are_retried_together() -> None:
    """A retry of several files of one request names every city once."""
    world = await refused_world()
    retried = await retry(world)
    assert [one.city_id for one in retried.retried] == ["1", "2"]
    requested = last_requested(world)
    assert requested.retry is not None
    assert requested.retry.positions == "3"
