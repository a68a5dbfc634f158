"""The view of the statistics at ``/`` in a browser."""

from __future__ import annotations

import csv
import datetime as dt
import io
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser.scenes import NEXT_DAY, RANGE, cell, ended, fill, ordinary_days, under_way, wait_until
from tests.fakes.api import DAY, World, planned, stats, write

COUNTRIES = 60


def many(world: World) -> None:
    """Put many countries into the bucket, with one day each; the last one has the greatest delay."""
    for number in range(1, COUNTRIES + 1):
        country = f"country-{number}"
        world.fold_in(planned(country, city_ids=["7"]), stats(country, delay_total_ms=1_000 * number))


def test_complete_provisional_and_missing_days_look_different(world: World, page: Page, address: str) -> None:
    """A complete day, a provisional one and one without data look different, and say so to a screen reader."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_have_class("complete c0")
    expect(cell(page, "Armenia", 2)).to_have_class("provisional c0")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1 provisional")
    expect(cell(page, "Brazil", 1)).to_have_class("complete c6")
    expect(cell(page, "Brazil", 2)).to_have_class("s-not-requested")
    expect(cell(page, "Brazil", 2)).to_have_text("not requested")
    expect(page.get_by_role("list", name="Legend")).to_contain_text("not requested")
    cell(page, "Brazil", 2).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This day is not requested (Nobody has requested this date).")
    dialog.get_by_role("link", name="Process this date").click()
    expect(page).to_have_url(f"{address}/completeness?from={NEXT_DAY}&to={NEXT_DAY}")
    expect(page.locator("#results")).to_contain_text("3 country-days with data: 1 provisional")
    expect(page.locator(".legend-title")).to_have_text("Average delay, in s")


def test_options_change_charts_and_address(world: World, page: Page, address: str) -> None:
    """A measure, a rate, colours and a search change what is shown, and the address, which brings them back."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Brazil", 1)).to_have_text("2.0")
    rate = page.get_by_label("per 1,000 departures")
    expect(rate).to_be_disabled()
    page.locator(".measures").get_by_text("Accidents").click()
    expect(cell(page, "Armenia", 1)).to_have_text("1")
    expect(cell(page, "Armenia", 2)).to_have_class("provisional zero")
    expect(page.locator(".chart svg")).to_have_attribute(
        "aria-label",
        "Accidents from 2024-05-01 to 2024-05-02: a line for each of Armenia, Brazil. Left and right read the days.",
    )
    rate.check()
    expect(cell(page, "Armenia", 1)).to_have_text("63")
    expect(page.locator(".tiles")).to_contain_text("Accidents per 1,000 departures")
    page.get_by_label("Colours").select_option("Within each country")
    expect(page.locator(".legend-title")).to_contain_text("coloured within each country")
    page.get_by_label("Find a country").fill("ARMÉ")
    expect(cell(page, "Brazil", 1)).to_have_count(0)
    expect(page.get_by_role("table", name="Totals by country").locator("tbody tr")).to_have_count(1)
    for part in ("measure=accidents", "rate=1000", "colours=within", "find=ARM"):
        expect(page).to_have_url(re.compile(f"[?&]{part}"))
    page.reload()
    expect(cell(page, "Armenia", 1)).to_have_text("63")
    expect(cell(page, "Brazil", 1)).to_have_count(0)
    page.get_by_label("Find a country").fill("atlantis")
    expect(page.get_by_text("No country is called “atlantis”")).to_be_visible()


def test_the_heat_map_can_be_used_with_the_keyboard(world: World, page: Page, address: str) -> None:
    """The arrow keys walk through the heat map, Enter shows the cities, Escape leads back to the cell.

    Meanwhile the map is drawn again, with what the pipeline knows of its days.
    """
    fill(world)
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/country-completeness*", hold)
    page.goto(f"{address}/{RANGE}")
    first = cell(page, "Armenia", 1)
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(cell(page, "Armenia", 2)).to_be_focused()
    expect(cell(page, "Armenia", 2)).to_have_attribute(
        "aria-label",
        "Armenia, 2024-05-02: average delay 1.1 s, 40 passengers, 8 departures, 0 accidents; "
        "provisional: 1 of 2 cities",
    )
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Armenia, 2024-05-01")).to_be_visible()
    wait_until(page, lambda: bool(held))
    held[0].continue_()
    expect(cell(page, "Brazil", 2)).to_have_class("s-not-requested")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(first).to_be_focused()


def test_clicking_a_country_day_lists_its_cities(world: World, page: Page, address: str) -> None:
    """A click on a country-day lists its cities as people sort them, each with its source, and what is suspicious."""
    fill(world)
    reason = "8 trips; usual on a Wednesday are 2,000"
    cities = [stats("armenia", city_id=city_id) for city_id in ("1", "2", "11")]
    cities[2] = msgspec.structs.replace(cities[2], suspicious=reason)
    world.fold_in(planned("armenia", city_ids=["1", "2", "11"]), *cities)
    page.goto(f"{address}/{RANGE}")
    cell(page, "Armenia", 1).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This day is complete: 3 cities, 1 with a suspicious volume.")
    expect(dialog.locator("tbody th")).to_have_text(["City 1 id 1", "City 2 id 2", "City 11 id 11"])
    expect(dialog.locator("tbody tr").last).to_contain_text(f"counted suspicious: {reason}")
    dialog.locator("summary").first.click()
    expect(dialog.get_by_text("http://upstream.test/cities/1/stats?date=2024-05-01")).to_be_visible()
    expect(dialog.get_by_text("ab" * 32).first).to_be_visible()


def test_a_country_name_leads_to_its_days(world: World, page: Page, address: str) -> None:
    """A country's name leads to its days and into the title; Back leads to all countries again."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    page.get_by_role("button", name="Armenia").click()
    expect(page.get_by_role("table", name="Days of Armenia").locator("tbody tr")).to_have_count(2)
    expect(page).to_have_title("Armenia, 1 – 2 May 2024 · Statistics · Tripfold")
    expect(page.get_by_label("Find a country")).to_have_count(0)
    expect(page).to_have_url(re.compile("[?&]country=armenia"))
    page.go_back()
    expect(page.get_by_role("table", name="Totals by country").locator("tbody tr")).to_have_count(2)


def test_statistics_follow_changes_made_elsewhere(world: World, page: Page, address: str) -> None:
    """The numbers follow what another client changed; unchanged ones are not sent again.

    The focus and the order of the table stay. A failure to read them again says so above the numbers.
    """
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1 provisional")
    look_again = "dispatchEvent(new Event('focus'))"
    totals = page.get_by_role("table", name="Totals by country")
    totals.get_by_role("button", name="Average delay").click()
    expect(totals.locator("tbody th").first).to_have_text("Brazil")
    cell(page, "Armenia", 1).focus()
    page.keyboard.press("ArrowRight")
    with page.expect_response(f"**/country-stats{RANGE}*") as unchanged:
        page.evaluate(look_again)
    assert unchanged.value.status == 304
    world.fold_in(planned("armenia", NEXT_DAY, city_ids=["1"]), stats("armenia", NEXT_DAY, city_id="1"))
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    page.evaluate(look_again)
    expect(cell(page, "Armenia", 2)).to_have_text("1.1")
    expect(cell(page, "Armenia", 2)).to_be_focused()
    expect(totals.locator("th", has_text="Average delay")).to_have_attribute("aria-sort", "descending")
    page.route("**/country-stats?*", lambda route: route.abort())
    page.evaluate(look_again)
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("The service cannot be reached")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1")
    page.unroute("**/country-stats?*")
    page.evaluate(look_again)
    expect(alert).to_have_count(0)


def test_outliers_and_zero_have_their_own_colours(world: World, page: Page, address: str) -> None:
    """A value far from the others does not take the colours of the usual ones, and no accidents look like none."""
    for number in range(20):
        accidents, delay_ms = {7: (1, 360_000), 13: (500, 1_080_000)}.get(number, (0, 60_000 + 1_000 * number))
        date = DAY + dt.timedelta(days=number)
        world.fold_in(stats("armenia", date, trips=500, accidents=accidents, delay_total_ms=500 * delay_ms))
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-20")
    for day, colour in ((1, "c0"), (20, "c6"), (8, "high"), (14, "high")):
        expect(cell(page, "Armenia", day)).to_have_class(f"provisional {colour}")
    expect(page.locator(".legend.colours")).to_contain_text("far above 79")
    page.locator(".measures").get_by_text("Accidents").click()
    for day, colour in ((1, "zero"), (8, "c0"), (14, "c6")):
        expect(cell(page, "Armenia", day)).to_have_class(f"provisional {colour}")


def test_a_comparison_shows_what_changed(world: World, page: Page, address: str) -> None:
    """A comparison adds changes to the tiles, the table, the order, the map and what a cell says."""
    for country, delay_ms in (("armenia", 30_000), ("brazil", 9_000)):
        for days, milliseconds in ((0, delay_ms), (1, delay_ms), (-2, 20_000), (-1, 20_000)):
            date = DAY + dt.timedelta(days=days)
            world.fold_in(planned(country, date, city_ids=["7"]), stats(country, date, delay_total_ms=milliseconds))
    page.goto(f"{address}/{RANGE}")
    page.get_by_label("Compare with").select_option("the period before")
    expect(page.locator(".tiles div").first).to_contain_text("−2.5 % from 2.5 s")
    expect(page.locator(".compared")).to_have_text("Compared with the period before, 29 – 30 April 2024.")
    page.get_by_label("Sort by").select_option("Change")
    expect(page.get_by_role("table", name="Totals by country").locator("tbody tr").first).to_contain_text("+50 %")
    page.get_by_label("Map").select_option("Change in %")
    expect(cell(page, "Armenia", 1)).to_have_text("+50")
    expect(cell(page, "Armenia", 1)).to_have_class("complete d5")
    expect(cell(page, "Brazil", 2)).to_have_class("complete d0")
    cell(page, "Brazil", 2).hover()
    expect(page.locator("#hint")).to_contain_text(f"; average delay −55 % against {DAY - dt.timedelta(days=1)}")
    page.get_by_label("Compare with").select_option("the same weekdays before")
    expect(page.locator(".compared")).to_contain_text("24 – 25 April 2024. Changes count the 0 of 4 country-days")
    expect(cell(page, "Armenia", 1)).to_have_class("complete unknown")


def test_another_range_cancels_the_reading_of_earlier_days(world: World, page: Page, address: str) -> None:
    """The earlier days of a range that the reader has left are not read to the end, so they replace nothing."""
    fill(world)
    page.route("**/country-stats?from=2024-03-06*", lambda _route: None)  # never answered
    page.goto(f"{address}/{RANGE}")
    expect(page.get_by_text("Looking for unusual days…")).to_be_visible()
    with page.expect_event("requestfailed", lambda request: "from=2024-03-06" in request.url):
        page.get_by_role("button", name="Later").click()
    expect(page.get_by_text("No data in this range")).to_be_visible()


def test_unusual_days_are_ranked(world: World, page: Page, address: str) -> None:
    """Days far from their weekday's usual value are listed, runs in one line, with a link to their country."""
    ordinary_days(world, "japan", range(-56, 5), delays_s={2: 210, 3: 210}, trips={0: 120})
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-05")
    unusual = page.locator(".unusual li")
    expect(unusual).to_have_count(2)
    expect(unusual.first).to_contain_text(
        "Japan, 3 – 4 May 2024: 3.5 times its usual delay 3 min 30 s instead of 60.0 s"
    )
    expect(unusual.last).to_contain_text("Japan, 1 May 2024: 70 % fewer departures than usual 120 instead of 400")
    unusual.last.get_by_role("link").click()
    expect(page.get_by_role("table", name="Days of Japan")).to_be_visible()
    expect(page).to_have_url(re.compile("[?&]measure=departures"))


def test_a_single_day_is_ranked_as_bars(world: World, page: Page, address: str) -> None:
    """A single day is a list of bars, the longest first, that lead to the cities."""
    fill(world)
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-01")
    rows = page.locator(".bars tbody tr")
    expect(rows.locator("th")).to_have_text(["Brazil", "Armenia"])
    widths = rows.locator("i").evaluate_all("bars => bars.map((bar) => bar.getBoundingClientRect().width)")
    assert widths[1] == pytest.approx(widths[0] * 1.125 / 2, abs=2)
    expect(page.locator(".chart")).to_have_count(0)
    rows.first.get_by_role("button").click()
    expect(page.get_by_role("dialog", name="Brazil, 2024-05-01")).to_be_visible()


def test_presets_end_on_the_latest_requested_day(world: World, page: Page, address: str) -> None:
    """Without a range in the address, the page shows the dates that were requested. A preset ends on the latest one."""
    fill(world)
    write(world, ended(under_way()))
    page.goto(address)
    expect(page.locator("#range [name=from]")).to_have_value("2024-05-01")
    expect(page.locator(".bars tbody tr")).to_have_count(2)
    page.get_by_role("button", name="7 days").click()
    expect(cell(page, "Armenia", 7)).to_be_visible()
    expect(page.get_by_role("button", name="7 days")).to_have_attribute("aria-pressed", "true")
    expect(page).to_have_url(f"{address}/?from=2024-04-25&to=2024-05-01")


def test_a_view_can_be_taken_elsewhere(world: World, page: Page, address: str) -> None:
    """The CSV has the countries of the view with names that no spreadsheet runs; the copied call reads the range."""
    fill(world)
    world.fold_in(msgspec.structs.replace(stats("odd"), country_name="=1+1"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page.goto(f"{address}/{RANGE}&sort=value&compare=previous")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == "countries_2024-05-01_2024-05-02_view.csv"
    lines = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert [line["country"] for line in lines] == ["Brazil", "Brazil", "'=1+1", "'=1+1", "Armenia", "Armenia"]
    assert (lines[1]["state"], lines[1]["departures"], lines[4]["departures"]) == ("none", "", "16")
    with page.expect_download() as download:
        page.get_by_role("button", name="Parquet").click()
    assert Path(download.value.path()).read_bytes().startswith(b"PAR1")
    page.get_by_role("button", name="Copy API call").click()
    expect(page.get_by_text("Copied:")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"curl '{address}/country-stats{RANGE}&detail=full'"


def test_axes_have_round_ticks_and_equal_distances(world: World, page: Page, address: str) -> None:
    """The axes are marked at round values, in one unit, and at days with equal distances."""
    for number in range(31):
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=number), delay_total_ms=(number - 3) * 80_000))
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-31")
    days = [f"{day} May" for day in range(1, 32, 3)]
    ticks = page.locator(".chart .tick")
    expect(ticks).to_have_text(["−1 min", "0 min", "1 min", "2 min", "3 min", "4 min", "5 min", *days])
    page.locator(".measures").get_by_text("Accidents").click()
    expect(ticks).to_have_text(["0", "1", *days])


def test_many_countries_are_rows_in_sight(world: World, page: Page, address: str) -> None:
    """The map has only the rows in sight, under headings that stay. The keyboard reaches every country."""
    many(world)
    page.set_viewport_size({"width": 1180, "height": 500})
    page.goto(f"{address}/?from=2024-05-01&to=2024-07-31")
    map_ = page.get_by_role("grid")
    expect(map_).to_have_attribute("aria-rowcount", str(COUNTRIES + 2))
    rows = page.locator(".heatmap tbody tr:not([aria-hidden]) th")
    weeks = page.locator(".heatmap thead tr").last.locator("th")
    for place in (1, 2, 3):
        expect(rows.nth(place - 1)).to_have_text(f"Country-{place}")
        expect(weeks.nth(place)).to_have_text(f"Mon {7 * place - 1}")
    assert rows.count() < COUNTRIES / 2
    cell(page, "Country-1", 1).first.focus()
    page.keyboard.press("Control+End")
    expect(page.locator(":focus")).to_have_attribute(
        "aria-label", f"Country-{COUNTRIES}, 2024-07-31: not requested (Nobody has requested this date)"
    )
    expect(page.locator(":focus").locator("..")).to_have_attribute("aria-rowindex", str(COUNTRIES + 2))
    box = page.locator(".map .scroll")
    top = "box => box.querySelector('thead').getBoundingClientRect().top - box.getBoundingClientRect().top"
    assert box.evaluate(top) == 0
    box.evaluate("box => box.scrollTo(0, 0)")
    expect(page.locator(".heatmap tbody th").first).to_have_text("Country-1")
    expect(map_).to_be_focused()
    page.keyboard.press("Home")
    expect(page.locator(":focus")).to_have_attribute("aria-label", re.compile(f"^Country-{COUNTRIES}, 2024-05-01: "))
    page.get_by_label("Sort by").select_option("Value")
    expect(page.locator(".heatmap tbody th").first).to_have_text(f"Country-{COUNTRIES}")


def test_a_year_fits_on_a_screen_and_scrolls_on_a_phone(world: World, page: Page, address: str) -> None:
    """A year is seen whole on a screen. On a phone it scrolls, shows that it is cut, and a tap enlarges a month."""
    for number in range(365):
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=number)))
    page.goto(f"{address}/?from=2024-05-01&to=2025-04-30")
    expect(page.locator(".heatmap tbody td.provisional")).to_have_count(365)
    overflow = "element => element.scrollWidth - element.clientWidth"
    map_ = page.locator(".map .scroll")
    assert map_.evaluate(overflow) == 0
    expect(page.locator(".map .more-right")).to_have_count(0)
    page.set_viewport_size({"width": 390, "height": 800})
    wait_until(page, lambda: map_.evaluate(overflow) > 0)  # the map is drawn again for the new width
    expect(page.locator(".map .more-right")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    tap = "cell => cell.dispatchEvent(new PointerEvent('click', {bubbles: true, pointerType: 'touch'}))"
    cell(page, "Armenia", 40).evaluate(tap)
    expect(page.locator(".heatmap tbody td.provisional")).to_have_count(30)
    expect(page).to_have_url(f"{address}/?from=2024-06-01&to=2024-06-30")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1180), ("dark", 320)])
def test_everybody_can_use_the_view(
    world: World, page: Page, address: str, violations: Callable[[Page], list[str]], scheme: str, width: int
) -> None:
    """The view is accessible in both schemes, on a screen and a phone: nothing sticks out, and fingers hit all."""
    ordinary_days(world, "japan", range(-56, 2), delays_s={1: 210})
    fill(world)
    world.fold_in(msgspec.structs.replace(stats("long"), country_name="<img src=x>" + "Llanfairpwllgwyngyll" * 5))
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(f"{address}/{RANGE}&compare=weekday")
    expect(page.locator(".unusual li")).to_have_count(1)
    expect(page.locator(".heatmap tbody th", has_text="<img src=x>Llan")).to_be_visible()
    page.get_by_role("link", name="Statistics").hover()
    assert violations(page) == []
    assert page.evaluate(CONTRAST_MIN) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(SMALL_TARGETS) == []


# The least contrast of a cell's text with its colour, as WCAG computes it.
CONTRAST_MIN = """() => {
  const luminance = (colour) => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const row = document.querySelector(".heatmap tbody tr:not([aria-hidden])");
  const probe = row.appendChild(document.createElement("td"));
  const steps = [0, 1, 2, 3, 4, 5, 6].flatMap((step) => [`c${step}`, `d${step}`]);
  const colours = [...steps, "zero", "low", "high", "unknown"];
  const ratios = colours.map((colour) => {
    probe.className = `complete ${colour}`;
    const { color, backgroundColor } = getComputedStyle(probe);
    const [one, other] = [luminance(color), luminance(backgroundColor)];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  });
  probe.remove();
  return Math.min(...ratios);
}"""

# Controls that are smaller than WCAG's target size of 24 pixels.
SMALL_TARGETS = """() => [...document.querySelectorAll("a, button, input, select, summary, td[tabindex]")]
  .filter((target) => target.checkVisibility() && !target.matches(".skip, .measures input"))
  .filter((target) => Math.min(target.offsetWidth, target.offsetHeight) < 24)
  .map((target) => target.outerHTML)"""
