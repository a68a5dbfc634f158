"""The view of the statistics at ``/`` in a browser."""

from __future__ import annotations

import datetime as dt
import itertools

import msgspec
import pytest
from playwright.sync_api import Page, expect

from services.api.auth import digest_of, mint_key
from tests.browser.scenes import NEXT_DAY, RANGE, cell, ended, fill, under_way
from tests.fakes.api import DAY, World, planned, stats, write
from tests.serving import served


def test_complete_provisional_and_missing_days_look_different(world: World, page: Page, address: str) -> None:
    """A complete day, a provisional one and one without data look different, and say so to a screen reader."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_have_class("complete c0")
    expect(cell(page, "Armenia", 2)).to_have_class("provisional c0")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1 provisional")
    expect(cell(page, "Brazil", 2)).to_have_class("none")
    expect(cell(page, "Brazil", 2)).to_have_text("no data")
    expect(page.locator("#results")).to_contain_text("3 country-days with data: 1 provisional")


def test_choosing_a_measure_changes_charts_and_address(world: World, page: Page, address: str) -> None:
    """Choosing another measure changes the heat map, the lines and the address."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Brazil", 1)).to_have_text("2.0")
    page.get_by_label("Accidents", exact=True).check(force=True)
    expect(cell(page, "Armenia", 1)).to_have_text("1")
    expect(page.locator(".chart svg")).to_have_attribute(
        "aria-label",
        "Accidents from 2024-05-01 to 2024-05-02: a line for each of Armenia, Brazil. Left and right read the days.",
    )
    assert "measure=accidents" in page.url


def test_the_heat_map_can_be_used_with_the_keyboard(world: World, page: Page, address: str) -> None:
    """The arrow keys walk through the heat map, Enter shows the cities, Escape leads back to the cell."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    first = cell(page, "Armenia", 1)
    first.focus()
    page.keyboard.press("ArrowRight")
    expect(cell(page, "Armenia", 2)).to_be_focused()
    expect(cell(page, "Armenia", 2)).to_have_attribute(
        "aria-label",
        "Armenia, 2024-05-02: average delay 1.1 s, 40 passengers, 8 buses, 0 accidents; provisional: 1 of 2 cities",
    )
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Armenia, 2024-05-01")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(first).to_be_focused()


def test_clicking_a_country_day_lists_its_cities(world: World, page: Page, address: str) -> None:
    """A click on a country-day lists its cities, each with where its numbers come from."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    cell(page, "Armenia", 1).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("tbody tr")).to_have_count(2)
    expect(dialog).to_contain_text("This day is complete: 2 cities.")
    dialog.locator("summary").first.click()
    expect(dialog.get_by_text("http://upstream.test/cities/1/stats?date=2024-05-01")).to_be_visible()
    expect(dialog.get_by_text("ab" * 32).first).to_be_visible()


def test_a_suspicious_file_is_named_beside_its_city(world: World, page: Page, address: str) -> None:
    """The text of the day counts the suspicious files, and the row of the city has the reason."""
    fill(world)
    reason = "8 trips; usual on a Wednesday are 2,000"
    world.fold_in(msgspec.structs.replace(stats("armenia"), suspicious=reason), planned("armenia", city_ids=["7"]))
    page.goto(f"{address}/{RANGE}")
    cell(page, "Armenia", 1).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("This day is complete: 1 city, 1 with a suspicious volume.")
    expect(dialog.locator("tbody tr")).to_contain_text(f"counted suspicious: {reason}")


def test_a_country_name_leads_to_its_days(world: World, page: Page, address: str) -> None:
    """A country's name leads to its days; Back leads to all countries again."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    page.get_by_role("button", name="Armenia").click()
    expect(page.get_by_role("table", name="Days of Armenia").locator("tbody tr")).to_have_count(2)
    assert "country=armenia" in page.url
    page.go_back()
    expect(page.get_by_role("table", name="Totals by country").locator("tbody tr")).to_have_count(2)


def test_clicking_a_column_heading_sorts_the_table(world: World, page: Page, address: str) -> None:
    """A click on the head of a column sorts by it, the largest first."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    table = page.get_by_role("table", name="Totals by country")
    table.get_by_role("button", name="Average delay").click()
    expect(table.locator("tbody th").first).to_have_text("Brazil")
    expect(table.locator("th", has_text="Average delay")).to_have_attribute("aria-sort", "descending")


def test_statistics_follow_changes_made_elsewhere(world: World, page: Page, address: str) -> None:
    """The numbers follow what another client changed; unchanged ones are not sent again.

    The focus and the order of the table stay. A failure to read them again says so above the numbers.
    """
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1 provisional")
    look_again = "dispatchEvent(new Event('focus'))"
    totals = page.get_by_role("table", name="Totals by country")
    totals.get_by_role("button", name="Buses").click()
    cell(page, "Armenia", 1).focus()
    page.keyboard.press("ArrowRight")
    with page.expect_response("**/country-stats?*") as unchanged:
        page.evaluate(look_again)
    assert unchanged.value.status == 304
    world.fold_in(planned("armenia", NEXT_DAY, city_ids=["1"]), stats("armenia", NEXT_DAY, delay_total_ms=16_000))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(cell(page, "Armenia", 2)).to_have_text("2.0 provisional")
    world.fold_in(planned("armenia", NEXT_DAY, city_ids=["1"]), stats("armenia", NEXT_DAY, city_id="1"))
    page.evaluate(look_again)
    expect(cell(page, "Armenia", 2)).to_have_text("1.1")
    expect(cell(page, "Armenia", 2)).to_be_focused()
    expect(totals.locator("th", has_text="Buses")).to_have_attribute("aria-sort", "descending")
    page.route("**/country-stats?*", lambda route: route.abort())
    page.evaluate(look_again)
    alert = page.locator("#results").get_by_role("alert")
    expect(alert).to_contain_text("The service cannot be reached")
    expect(cell(page, "Armenia", 2)).to_have_text("1.1")
    page.unroute("**/country-stats?*")
    page.evaluate(look_again)
    expect(alert).to_have_count(0)


def test_days_with_accidents_stand_out(world: World, page: Page, address: str) -> None:
    """Where most days have no accident, those that have some stand out, by their number."""
    for number in range(20):
        accidents = {7: 1, 13: 500}.get(number, 0)
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=number), trips=500, accidents=accidents))
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-20&measure=accidents")
    for day, colour in ((1, "c0"), (8, "c3"), (14, "c6")):
        expect(cell(page, "Armenia", day)).to_have_class(f"provisional {colour}")
    expect(page.locator(".legend.colours")).to_contain_text("under 1")
    expect(page.locator(".legend.colours")).to_contain_text("500 and more")


def test_an_outage_of_s3_is_shown_and_can_be_retried(world: World, page: Page, address: str) -> None:
    """While S3 is down the page says so and lets one try again; then it shows the numbers."""
    fill(world)
    world.store.down = True
    page.goto(f"{address}/{RANGE}")
    alert = page.locator("#results").get_by_role("alert")
    expect(alert).to_contain_text("S3 cannot be reached. Try again in a few seconds.")
    world.store.down = False
    alert.get_by_role("button", name="Try again").click()
    expect(cell(page, "Armenia", 1)).to_be_visible()


def test_the_page_asks_for_a_key_and_keeps_it(world: World, page: Page) -> None:
    """Where a key is needed the page asks for one, says when it is wrong, and keeps it while the window is open.

    A first visit shows the days that were requested last, as it does without keys.
    """
    fill(world)
    write(world, ended(under_way()))
    key = mint_key()
    with served(world, api_access="keys", api_keys=f"page:read:{digest_of(key)}") as address:
        page.goto(address)
        alert = page.locator("#results").get_by_role("alert")
        expect(alert).to_contain_text("An API key is needed")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(alert).to_contain_text("This API key is unknown")
        assert page.url == f"{address}/"
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(cell(page, "Armenia", 1)).to_be_visible()
        assert "from=2024-05-01" in page.url
        page.reload()
        expect(cell(page, "Armenia", 1)).to_be_visible()
        page.goto("about:blank")


def test_an_invalid_range_shows_the_reason_of_the_api(world: World, page: Page, address: str) -> None:
    """The page shows the API's reason for refusing a range."""
    fill(world)
    page.goto(f"{address}/?from=2024-05-02&to=2024-05-01")
    expect(page.locator("#results").get_by_role("alert")).to_contain_text("swap the two")


def test_incomplete_statistics_are_an_error(world: World, page: Page, address: str) -> None:
    """Statistics that arrive incompletely are shown as an error."""
    fill(world)
    broken = '{"country":"armenia","date":"2024-05-01","bus_count":1'
    page.route("**/country-stats?*", lambda route: route.fulfill(body=broken, content_type="application/x-ndjson"))
    page.goto(f"{address}/{RANGE}")
    expect(page.locator("#results").get_by_role("alert")).to_contain_text("The connection ended early. Try again.")


def test_an_outage_of_the_api_is_shown_until_it_is_back(world: World, page: Page, address: str) -> None:
    """When the service goes away in mid-use the page says so; once it is back, so is the map."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    page.route("**/country-stats?*", lambda route: route.abort())
    page.get_by_role("button", name="Later").click()
    alert = page.locator("#results").get_by_role("alert")
    expect(alert).to_contain_text("The service cannot be reached")
    page.unroute("**/country-stats?*")
    page.get_by_role("button", name="Earlier").click()
    expect(cell(page, "Armenia", 1)).to_be_visible()


def test_axes_have_round_ticks_and_equal_distances(world: World, page: Page, address: str) -> None:
    """The axes are marked at round values, in one unit, and at days with equal distances."""
    for number in range(31):
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=number), delay_total_ms=(number - 3) * 80_000))
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-31")
    ticks = page.locator(".chart .tick")
    expect(ticks.first).to_be_visible()
    marks = ticks.all_text_contents()
    assert marks[:6] == ["−1 min", "0 s", "1 min", "2 min", "3 min", "4 min"]
    days = [int(text.removesuffix(" May")) for text in marks if text.endswith(" May")]
    assert len(days) > 5
    assert len({later - earlier for earlier, later in itertools.pairwise(days)}) == 1
    page.get_by_label("Accidents", exact=True).check(force=True)
    assert ticks.all_text_contents()[:2] == ["0", "1"]


def test_a_year_fits_on_a_screen_and_scrolls_on_a_phone(world: World, page: Page, address: str) -> None:
    """A year is seen whole on a screen, and can be moved about on a phone."""
    for number in range(365):
        world.fold_in(stats("armenia", DAY + dt.timedelta(days=number)))
    page.goto(f"{address}/?from=2024-05-01&to=2025-04-30")
    expect(page.locator(".heatmap tbody td")).to_have_count(365)
    overflow = "element => element.scrollWidth - element.clientWidth"
    map_ = page.locator(".scroll:has(.heatmap)")
    page.set_viewport_size({"width": 1440, "height": 900})
    assert map_.evaluate(overflow) == 0
    page.set_viewport_size({"width": 390, "height": 800})
    assert map_.evaluate(overflow) > 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_first_visit_shows_the_requested_dates(world: World, page: Page, address: str) -> None:
    """Without a range in the address, the page shows the dates that were requested."""
    fill(world)
    write(world, ended(under_way()))
    page.goto(address)
    expect(page.locator("#range [name=from]")).to_have_value("2024-05-01")
    expect(cell(page, "Armenia", 1)).to_be_visible()


def test_names_are_shown_as_text_not_markup(world: World, page: Page, address: str) -> None:
    """A name that looks like markup is shown as it is written."""
    name = "<img src=x onerror=alert(1)>"
    world.fold_in(msgspec.structs.replace(stats("odd"), country_name=name))
    page.goto(f"{address}/?from=2024-05-01&to=2024-05-01")
    expect(page.locator(".heatmap tbody th")).to_have_text(name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1180])
def test_nothing_overflows_and_text_has_contrast_at_any_width(
    world: World, page: Page, address: str, width: int, scheme: str
) -> None:
    """Nothing sticks out of the page, on a phone or a screen, whatever the names; text stands out in both schemes."""
    fill(world)
    write(world, ended(under_way()))
    world.fold_in(msgspec.structs.replace(stats("long"), country_name="Llanfairpwllgwyngyllgogerychwyrndrobwll" * 3))
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(CONTRASTS_MIN) >= 4.5


def test_a_year_of_many_countries_shows_the_first_ones(world: World, page: Page, address: str) -> None:
    """A year is shown with the first countries; the others come when they are asked for."""
    for number in range(60):
        country = f"country-{number}"
        world.fold_in(stats(country), planned(country, city_ids=["7"]))
    page.goto(f"{address}/?from=2024-05-01&to=2025-04-30")
    rows = page.locator(".heatmap tbody tr")
    expect(rows).to_have_count(32)
    page.get_by_role("button", name="Show all 60 countries").click()
    expect(rows).to_have_count(60)
    expect(rows.nth(32).locator("td").first).to_be_focused()


# The least contrast of a cell's or a notice's text with what it stands on, as WCAG computes it.
CONTRASTS_MIN = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => {
    const [red, green, blue] = channels(colour).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const backOf = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const back = getComputedStyle(one).backgroundColor;
      if (channels(back)[3] !== 0) return back;
    }
  };
  const texts = document.querySelectorAll(".heatmap td.c0, p, dt, dd, a, button:not(:disabled), .status, .legend li");
  const probe = document.createElement("td");
  document.querySelector(".heatmap tbody tr").append(probe);
  const shown = [...texts].filter((text) => text.checkVisibility());
  const ratio = (one, other) => (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  const found = shown.map((text) => ratio(luminance(getComputedStyle(text).color), luminance(backOf(text))));
  for (let step = 0; step < 7; step += 1) {
    probe.className = `complete c${step}`;
    const style = getComputedStyle(probe);
    found.push(ratio(luminance(style.color), luminance(style.backgroundColor)));
  }
  probe.remove();
  return Math.min(...found);
}"""
