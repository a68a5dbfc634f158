"""How complete the latest dates are, as the metrics show it."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import get_args

import pytest
import structlog

from services.api.statistics import completeness
from services.api.statistics.completeness import Completeness
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Plan, PlannedCity, PlannedCountry
from shared.runtime import metrics
from shared.runtime.metrics import SummaryState
from tests.fakes.api import DAY, NOW, REQUEST, World, metric, planned, stats
from tests.fakes.metrics import value

DAYS = 3
TODAY = NOW.date()


def measuring(world: World) -> Completeness:
    """Return what measures the last DAYS dates of the world's bucket."""
    return Completeness(world.store, SummaryReader(world.store, cache_bytes=1 << 20), days=DAYS, clock=world.clock)


def plan(world: World, date: dt.date, *countries: str) -> None:
    """Write a plan in which each country has the city 7."""
    city = PlannedCity(city_id=CityId("7"), upstream_id="7", name="City 7")
    written = Plan(
        date=date,
        revision=3,
        request_id=REQUEST,
        planned_at=NOW,
        countries={CountrySlug(name): PlannedCountry(name=name, cities=(city,)) for name in countries},
    )
    world.store.write(keys.plan(date), objects.encode(written))


def complete(world: World, date: dt.date, country: str) -> None:
    """Write the summary of a country-day whose planned city is counted."""
    world.fold_in(planned(country, date, city_ids=["7"]), stats(country, date))


def states() -> dict[str, int]:
    """Return how many country-days the metric shows in each state, without those of none."""
    counts = {state: int(value("tripfold_recent_summaries", state=state)) for state in get_args(SummaryState)}
    return {state: count for state, count in counts.items() if count}


def newest() -> dt.date | None:
    """Return the newest complete date that the metric shows."""
    timestamp = value("tripfold_newest_complete_date_timestamp_seconds")
    return dt.datetime.fromtimestamp(timestamp, dt.UTC).date() if timestamp else None


async def test_each_country_day_has_a_state() -> None:
    """A country-day is complete, incomplete, missing or unreadable; a date is complete if all of its days are."""
    world = World()
    earlier = DAY - dt.timedelta(days=1)
    plan(world, earlier, "armenia", "belgium")
    complete(world, earlier, "armenia")
    complete(world, earlier, "belgium")
    plan(world, DAY, "armenia", "belgium", "chad", "denmark")
    complete(world, DAY, "armenia")
    world.fold_in(planned("belgium", city_ids=["7"]))
    world.store.write(keys.summary(1, DAY, CountrySlug("chad")), b"{")
    await measuring(world).measure()
    assert states() == {"complete": 3, "incomplete": 1, "unreadable": 1, "missing": 1}
    assert newest() == earlier


async def test_a_bucket_without_plans_has_no_complete_date() -> None:
    """Before the first request, all counts are 0."""
    await measuring(World()).measure()
    assert (states(), newest()) == ({}, None)


@pytest.mark.parametrize(("days_ago", "counted"), [(0, True), (DAYS - 1, True), (DAYS, False)])
async def test_the_window_ends_with_the_newest_planned_date(days_ago: int, counted: bool) -> None:
    """The window holds the last dates up to the newest planned one that is not in the future."""
    world = World()
    plan(world, TODAY + dt.timedelta(days=1), "armenia")
    plan(world, DAY, "armenia")
    complete(world, DAY, "armenia")
    plan(world, DAY - dt.timedelta(days=days_ago), "armenia")
    complete(world, DAY - dt.timedelta(days=days_ago), "armenia")
    await measuring(world).measure()
    assert states() == {"complete": 1 + (counted and days_ago > 0)}


async def test_a_date_whose_plan_is_unreadable_is_not_complete() -> None:
    """An unreadable plan does not say what it expects."""
    world = World()
    plan(world, DAY, "armenia")
    complete(world, DAY, "armenia")
    world.store.write(keys.plan(DAY), b"{")
    await measuring(world).measure()
    assert (states(), newest()) == ({"complete": 1}, None)


async def test_only_changed_objects_are_read_again() -> None:
    """A pass over an unchanged bucket reads no plan and no summary; a changed one counts in the next pass."""
    world = World()
    plan(world, DAY, "armenia", "belgium")
    complete(world, DAY, "armenia")
    measured = measuring(world)
    await measured.measure()
    world.store.reads.clear()
    await measured.measure()
    assert set(world.store.reads) == {keys.CURRENT}
    complete(world, DAY, "belgium")
    await measured.measure()
    assert (states(), newest()) == ({"complete": 2}, DAY)


async def test_an_outage_ends_no_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails is logged, and a later one exports the result."""
    monkeypatch.setattr(completeness, "INTERVAL_S", 0)
    world = World()
    plan(world, DAY, "armenia")
    complete(world, DAY, "armenia")
    world.store.down = True
    metrics.newest_complete_date.set(0)
    with structlog.testing.capture_logs() as logged:
        running = asyncio.create_task(measuring(world).run())
        async with asyncio.timeout(10):
            while not logged:  # noqa: ASYNC110  # a log has no event
                await asyncio.sleep(0)
            world.store.down = False
            while newest() != DAY:  # noqa: ASYNC110  # a metric has no event
                await asyncio.sleep(0)
        running.cancel()
    assert logged[0]["event"] == "completeness_not_measured"


def test_the_api_measures_while_it_runs() -> None:
    """The API exports how complete its dates are."""
    world = World()
    plan(world, DAY, "armenia")
    complete(world, DAY, "armenia")
    metrics.newest_complete_date.set(0)
    with world.client(api_completeness_days=DAYS) as client:
        while not metric(client, "tripfold_newest_complete_date_timestamp_seconds"):
            pass
        assert newest() == DAY
