"""Builds the content of the bucket for the tests of the page, and finds it on the page."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Mapping

import msgspec
from playwright.sync_api import Locator, Page

from shared.domain.events import Outcome
from shared.domain.ids import CityId
from shared.domain.objects import CityUnderWay, Failure, RequestRecord
from tests.fakes.api import DAY, NOW, World, manifest_of, planned, record_of, stats

NEXT_DAY = DAY + dt.timedelta(days=1)
RANGE = "?from=2024-05-01&to=2024-05-02"


def fill(world: World) -> None:
    """Put two countries into the bucket: Armenia is complete on the first day alone, Brazil has one day."""
    first, second = stats("armenia", city_id="1"), stats("armenia", city_id="2", accidents=1)
    world.fold_in(planned("armenia", city_ids=["1", "2"]), first, second)
    world.fold_in(planned("armenia", NEXT_DAY, city_ids=["1", "2"]), stats("armenia", NEXT_DAY, city_id="1"))
    world.fold_in(planned("brazil", city_ids=["7"]), stats("brazil", trips=4, delay_total_ms=8_000))
    for event in (first, second):
        world.write_manifest(manifest_of(event))


def under_way(date: dt.date = DAY) -> RequestRecord:
    """Return a request that has stored one of two cities."""
    return msgspec.structs.replace(
        record_of(NOW),
        date=date,
        version=5,
        planned=True,
        plan_revision=3,
        cities=2,
        countries=1,
        outcomes={Outcome.STORED: "1"},
        served="1",
        under_way={1: CityUnderWay(bytes_done=30_000_000, bytes_total=60_000_000, trips_done=6)},
        bytes_done=10_000_000,
    )


def ended(record: RequestRecord) -> RequestRecord:
    """Return the request with its second city failed."""
    return msgspec.structs.replace(
        record,
        version=record.version + 1,
        outcomes={Outcome.STORED: "1", Outcome.FAILED: "2"},
        under_way={},
        failures={1: Failure(city_id=CityId("9"), city_name="Port Tina", reason="the upstream answered 404")},
    )


def cell(page: Page, country: str, day: int) -> Locator:
    """Return a cell of the heat map; days count from 1."""
    return page.locator(".heatmap tbody tr", has_text=country).locator("td").nth(day - 1)


def ordinary_days(
    world: World,
    country: str,
    days: range,
    *,
    delays_s: Mapping[int, int] | None = None,
    trips: Mapping[int, int] | None = None,
) -> None:
    """Put complete days into the bucket: 400 trips, a minute late, but for the days from DAY that are named."""
    for number in days:
        date = DAY + dt.timedelta(days=number)
        count = (trips or {}).get(number, 400)
        delay_ms = 1_000 * (delays_s or {}).get(number, 60)
        event = stats(country, date, trips=count, passengers=30 * count, delay_total_ms=count * delay_ms)
        world.fold_in(planned(country, date, city_ids=["7"]), event)


DEADLINE_S = 30.0
SHORT_WAITS = "const wait = setTimeout; window.setTimeout = (call, ms, ...rest) => wait(call, ms / 10, ...rest)"


def shorten_waits(page: Page) -> None:
    """Let the page wait a tenth of its time before it polls or retries. Playwright's clock would change other pages."""
    page.add_init_script(SHORT_WAITS)


def wait_until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for a condition that no locator of Playwright can express."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the page did not get there in time"
        page.wait_for_timeout(20)
