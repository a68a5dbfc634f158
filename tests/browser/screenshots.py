"""Pictures of the page as people may meet it, for eyes: ``python -m tests.browser.screenshots FOLDER``."""

from __future__ import annotations

import datetime as dt
import itertools
import random
import sys
from pathlib import Path

import msgspec
from playwright.sync_api import Browser, expect, sync_playwright

from shared.domain.events import Outcome
from shared.domain.ids import CityId
from shared.domain.objects import Failure, RequestRecord
from tests.browser.conftest import DEADLINE_MS, chromium
from tests.fakes.api import DAY, NOW, World, planned, record_of, report_of, stats, write, write_report
from tests.serving import served

LONG_NAME = "the-united-kingdom-of-great-britain-and-northern-ireland"
NAMES = ("armenia", "cote-d-ivoire", "japan", "peru", "portugal")


def filled(countries: list[str], days: int, *, earlier: int = 0, provisional: int = 0) -> World:
    """Return a bucket with so many countries, and days from DAY, of which the last ones are provisional.

    Japan is very late on the second and third day.
    """
    world = World()
    dice = random.Random(1)
    for place, country in enumerate(countries):
        for number in range(-earlier, days):
            day = DAY + dt.timedelta(days=number)
            if dice.random() < 0.02:
                continue
            trips = dice.randrange(200, 400) * (place % 7 + 1)
            lateness = 4 if country == "japan" and number in {1, 2} else 1
            event = stats(
                country,
                day,
                trips=trips,
                passengers=trips * dice.randrange(20, 40),
                accidents=int(dice.random() < 0.1),
                delay_total_ms=lateness * trips * dice.randrange(60_000, 90_000 + 10_000 * (number % 7)),
            )
            missing = ["8"] if number >= days - provisional else []
            world.fold_in(planned(country, day, city_ids=["7", *missing]), event)
    return world


def requests_of_every_kind(world: World) -> None:
    """Write a request that runs, one that failed in part, one that was cancelled and one that is done."""
    done = {"planned": True, "cities": 3, "countries": 1, "bytes_done": 312_000_000, "trips_done": 1_950_000}
    kinds: list[dict[str, object]] = [
        {"outcomes": {Outcome.STORED: "7"}, "served": "7"},
        {"outcomes": {Outcome.STORED: "1", Outcome.SKIPPED: "6"}, "served": "1", "cancelled_at": NOW},
        {
            "outcomes": {Outcome.STORED: "1", Outcome.FAILED: "6"},
            "served": "1",
            "failures": {
                1: Failure(city_id=CityId("8"), city_name="Port Tina", reason="the upstream answered 404"),
                2: Failure(
                    city_id=CityId("9"),
                    city_name="Lake Stephanie",
                    reason="record 1,204: passengers is -3; expected 0 to 1,000,000",
                    quarantine_key=f"quarantine/date={DAY}/city=9/4f2c1f0f9a6c4c0f8e0f3f8f6f0d2b11.json",
                ),
            },
        },
        {"outcomes": {Outcome.STORED: "1"}, "served": "1"},
    ]
    for place, kind in enumerate(kinds):
        record: RequestRecord = record_of(NOW + dt.timedelta(minutes=place))
        write(world, msgspec.structs.replace(record, date=DAY + dt.timedelta(days=place), **done, **kind))


def take(browser: Browser, folder: Path) -> None:
    """Take every picture."""
    usual = filled(list(NAMES), 31, earlier=56, provisional=2)
    requests_of_every_kind(usual)
    write_report(usual, report_of("9"))
    few = filled(list(NAMES), 365)
    many = filled([f"country-{number}" for number in range(1, 101)], 365)
    long = filled([LONG_NAME, *NAMES], 7)
    compared = "&compare=weekday&map=change&sort=change"
    shots: list[tuple[str, World, str, int, str]] = [
        ("month", usual, view(31, "&compare=previous"), 1180, "light"),
        ("month-dark", usual, view(31), 1180, "dark"),
        ("month-wide-changes", usual, view(31, compared), 1800, "light"),
        ("month-phone", usual, view(31), 390, "light"),
        ("day", usual, view(1), 1180, "light"),
        ("day-phone", usual, view(1, "&compare=weekday"), 390, "dark"),
        ("quarter-of-100", many, view(92, "&measure=accidents&sort=value"), 1180, "dark"),
        ("long-name", long, view(7), 1180, "light"),
        ("long-name-phone", long, view(7), 390, "dark"),
        ("empty", World(), view(7), 1180, "light"),
        ("jobs", usual, f"jobs{view(31)}", 1180, "light"),
        ("completeness", usual, f"completeness{view(31)}", 1180, "light"),
        ("completeness-phone", many, f"completeness{view(31)}", 390, "dark"),
        ("pipeline", usual, "pipeline", 1180, "light"),
    ]
    for world, countries in ((few, 5), (many, 100)):
        for days, width in itertools.product((3, 365), (390, 1180, 1800)):
            shots.append((f"{days}-days-of-{countries}-{width}", world, view(days), width, "light"))
    for name, world, query, width, scheme in shots:
        shoot(browser, folder / f"{name}.png", world, query, width, scheme)
    usual.store.down = True
    shoot(browser, folder / "error.png", usual, view(31), 1180, "light")


def view(days: int, more: str = "") -> str:
    """Return the query of so many days from DAY."""
    return f"?from={DAY}&to={DAY + dt.timedelta(days=days - 1)}{more}"


def shoot(browser: Browser, path: Path, world: World, query: str, width: int, scheme: str) -> None:
    """Take one picture: of the whole page, once everything is there, with the reasons of failures open."""
    context = browser.new_context(
        viewport={"width": width, "height": 1000},
        color_scheme="dark" if scheme == "dark" else "light",
        locale="en-GB",
        timezone_id="UTC",
    )
    context.set_default_timeout(DEADLINE_MS)
    with served(world) as address:
        page = context.new_page()
        page.goto(f"{address}/{query}")
        expect(page.locator("#views [aria-current]")).to_have_count(1, timeout=DEADLINE_MS)
        busy = page.locator("[aria-busy=true]:not([hidden] *), .loading:visible")
        expect(busy).to_have_count(0, timeout=DEADLINE_MS)
        for summary in page.locator(".jobs details:not([hidden]) summary").all():
            summary.click()
        expect(page.locator(".jobs .loading")).to_have_count(0, timeout=DEADLINE_MS)
        page.screenshot(path=path, full_page=True)
        if path.stem == "month":
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=path.with_name("page.png"))  # what the README shows
        context.close()


def main() -> None:
    """Take the pictures into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    executable = chromium()
    if executable is None:
        sys.exit("no Chromium: set TRIPFOLD_TEST_CHROMIUM to one")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        take(browser, folder)
        browser.close()


if __name__ == "__main__":
    main()
