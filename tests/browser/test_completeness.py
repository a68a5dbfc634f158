"""The view of completeness at ``/completeness`` in a browser."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec
from playwright.sync_api import Locator, Page, expect

from shared.domain import keys, objects
from shared.domain.events import Outcome, ProcessRequested
from shared.domain.ids import CityId
from shared.domain.objects import Backfill, DateSelection, Failure, RequestRecord
from shared.domain.topics import Topic
from shared.kafka.group_offsets import GroupOffsets
from tests.fakes.api import DAY, World, planned, stats, write_latest, write_plan

LAST = DAY + dt.timedelta(days=3)
RANGE = f"/completeness?from={DAY}&to={LAST}"


def filled(world: World) -> RequestRecord:
    """Fill four days: complete, with a failed and a refused city, and two that nobody requested. Return the request."""
    write_plan(world, DAY, armenia=["1", "2"], brazil=["7"])
    world.fold_in(planned("armenia", city_ids=["1", "2"]), stats("armenia", city_id="1"), stats("armenia", city_id="2"))
    world.fold_in(planned("brazil", city_ids=["7"]), stats("brazil"))
    second = DAY + dt.timedelta(days=1)
    write_plan(world, second, armenia=["1", "2"], brazil=["7"])
    world.fold_in(planned("armenia", second, city_ids=["1", "2"]), stats("armenia", second, city_id="1"))
    return write_latest(
        world,
        second,
        cities=3,
        countries=2,
        outcomes={Outcome.STORED: "1", Outcome.FAILED: "6"},
        served="1",
        failures={
            1: Failure(city_id=CityId("2"), city_name="City 2", reason="the upstream answered 404"),
            2: Failure(city_id=CityId("7"), city_name="City 7", reason="no JSON", quarantine_key="quarantine/a.json"),
        },
    )


def cell(page: Page, name: str, day: int) -> Locator:
    """Return a cell of the map; days count from 1."""
    return page.locator(".completeness tbody tr", has_text=name).locator("td").nth(day - 1)


def walk(page: Page, *pressed: str) -> None:
    """Focus the first cell of the map, and press keys."""
    cell(page, "All", 1).focus()
    for key in pressed:
        page.keyboard.press(key)


def test_each_state_looks_and_sounds_different(world: World, page: Page, address: str) -> None:
    """Each country-day has its state as a colour, a letter and a sentence; what changes elsewhere appears."""
    filled(world)
    page.goto(f"{address}{RANGE}")
    expect(cell(page, "Armenia", 2)).to_have_class("s-failed")
    for name in ("All", "Brazil"):
        read = page.locator(".completeness tbody tr", has_text=name).locator("td .unseen")
        expect(read).to_have_text(["complete", "refused", "not requested", "not requested"])
    expect(page.get_by_role("list", name="Country-days by state")).to_contain_text("2 complete")
    expect(page.locator("#completeness")).to_contain_text("The newest file was ingested 1 Jun 2024, 12:30.")
    expect(page).to_have_title("1 – 4 May 2024 · Completeness · Tripfold")
    walk(page, "ArrowDown", "ArrowRight")
    expect(cell(page, "Armenia", 2)).to_have_attribute(
        "aria-label", "Armenia, 2024-05-02: failed, 1 of 2 cities. 1 city failed. City 2: the upstream answered 404"
    )
    backgrounds = page.evaluate(
        "[...document.querySelectorAll('.completeness td')].map((td) => getComputedStyle(td).background)"
    )
    assert len(set(backgrounds)) >= 4
    second = DAY + dt.timedelta(days=1)
    world.fold_in(planned("brazil", second, city_ids=["7"]), stats("brazil", second))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(cell(page, "Brazil", 2)).to_have_class("s-complete")


def test_a_cell_explains_its_day_and_retries_its_request(world: World, page: Page, address: str) -> None:
    """Enter opens the reason, the missing cities and what a retry requests; only the button requests it."""
    failed = filled(world)
    page.goto(f"{address}{RANGE}")
    expect(cell(page, "All", 1)).to_be_visible()
    walk(page, "ArrowDown", "ArrowDown", "ArrowRight", "Enter")
    dialog = page.get_by_role("dialog", name="Brazil, 2 May 2024")
    expect(dialog).to_contain_text("refused 1 file was refused. City 7: no JSON. 0 of 1 city counted.")
    expect(dialog.get_by_role("row", name="City 7")).to_contain_text("refused: no JSON")
    expect(dialog.get_by_role("row", name="City 7")).to_contain_text("not known yet")
    expect(dialog).to_contain_text("Fetches the failed cities of 2 May 2024 again, in all countries.")
    before = len(world.published(Topic.PROCESS_REQUESTS))
    dialog.get_by_role("button", name="Retry 1 request").click()
    expect(dialog).to_contain_text("Requested.")
    *_, retried = (event for event in world.published(Topic.PROCESS_REQUESTS) if isinstance(event, ProcessRequested))
    assert len(world.published(Topic.PROCESS_REQUESTS)) == before + 1
    assert (retried.request_id, retried.retry is not None) == (failed.request_id, True)
    expect(cell(page, "Brazil", 2)).to_have_class("s-running")
    page.keyboard.press("Escape")
    expect(cell(page, "Brazil", 2)).to_be_focused()


def test_requests_are_retried_one_after_another(world: World, page: Page, address: str) -> None:
    """A failure ends the retries of a range; the button then goes on with the request that failed."""
    failed = {1: Failure(city_id=CityId("7"), city_name="City 7", reason="the upstream answered 404")}
    ids = []
    for number in range(3):
        date = DAY + dt.timedelta(days=number)
        write_plan(world, date, brazil=["7"])
        world.fold_in(planned("brazil", date, city_ids=["7"]))
        record = write_latest(world, date, cities=1, countries=1, outcomes={Outcome.FAILED: "1"}, failures=failed)
        ids.append(record.request_id)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.route(f"**/process-requests/{ids[1]}/retry", lambda route: route.abort())
    page.goto(f"{address}{RANGE}")
    walk(page, "ArrowDown", "Shift+ArrowRight", "Shift+ArrowRight", "Enter")
    dialog = page.get_by_role("dialog", name="Brazil, 1 – 3 May 2024")
    dialog.get_by_role("button", name="Retry 3 requests").click()
    expect(dialog.get_by_role("alert")).to_contain_text("The service cannot be reached")
    page.unroute_all()
    dialog.get_by_role("button", name="Retry 3 requests").click()
    expect(dialog).to_contain_text("Requested.")
    retried = [ids[0], ids[1], ids[1], ids[2]]
    assert sent == [f"{address}/process-requests/{request_id}/retry" for request_id in retried]


def test_a_range_is_chosen_by_keyboard_or_dragging_and_processed(world: World, page: Page, address: str) -> None:
    """Shift with arrow keys, or dragging, chooses days; the dialog says which dates it requests."""
    filled(world)
    page.goto(f"{address}{RANGE}")
    walk(page, "ArrowDown", "ArrowRight", "ArrowRight", "Shift+ArrowRight")
    expect(cell(page, "Armenia", 3)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Armenia, 3 – 4 May 2024")
    expect(dialog).to_contain_text("Requests 3 – 4 May 2024, for all countries.")
    page.keyboard.press("Escape")
    expect(cell(page, "Armenia", 4)).to_be_focused()
    start, end = cell(page, "Armenia", 1).bounding_box(), cell(page, "Brazil", 4).bounding_box()
    assert start
    assert end
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=5)
    page.mouse.up()
    dialog = page.get_by_role("dialog", name="Armenia to Brazil, 1 – 4 May 2024")
    expect(dialog.get_by_role("button", name="Retry 1 request")).to_be_visible()
    dialog.get_by_role("button", name="Process 2 dates").click()
    expect(dialog).to_contain_text("Requested.")
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    backfill = objects.decode(Backfill, body, key)
    assert (backfill.first, backfill.last) == (DAY + dt.timedelta(days=2), LAST)
    assert backfill.selection is DateSelection.MISSING
    expect(cell(page, "Armenia", 4)).to_have_class("s-running")


def test_a_first_visit_shows_the_requested_dates(world: World, page: Page, address: str) -> None:
    """Without a range in the URL, the view shows the dates that were requested last."""
    record = filled(world)
    later = msgspec.structs.replace(record, date=LAST)
    world.store.write(keys.request(record.request_id), objects.encode(later))
    page.goto(f"{address}/completeness")
    expect(page.locator("#completeness-range [name=to]")).to_have_value(str(LAST))


def test_unreadable_requests_are_an_error(world: World, page: Page, address: str) -> None:
    """If the requested dates cannot be read, the view says so and chooses no range; another try shows them."""
    filled(world)
    page.route(
        "**/process-requests?*", lambda route: route.fulfill(status=500, json={"title": "Broken", "detail": "x"})
    )
    page.goto(f"{address}/completeness")
    alert = page.locator("#completeness").get_by_role("alert")
    expect(alert).to_contain_text("Broken")
    expect(page).to_have_url(f"{address}/completeness")
    page.unroute_all()
    alert.get_by_role("button", name="Try again").click()
    expect(cell(page, "Armenia", 1)).to_be_visible()
    expect(alert).to_have_count(0)


def test_the_views_are_accessible_in_both_themes_and_on_a_phone(
    world: World, page: Page, address: str, violations: Callable[[Page], list[str]]
) -> None:
    """No rule of axe is broken, nothing sticks out, and targets have 24 px, in both themes, on a screen and a phone."""
    filled(world)
    world.offsets = [GroupOffsets(topic=Topic.CITY_STATS, lag=3, committed=1, members=0)]
    for path, ready in ((RANGE, ".completeness td"), ("/jobs", ".jobs > li"), ("/pipeline", ".stages td")):
        page.goto(f"{address}{path}")
        expect(page.locator(ready).first).to_be_visible()
        for scheme, width in (("light", 1180), ("dark", 360)):
            page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
            page.set_viewport_size({"width": width, "height": 800})
            page.evaluate(TWO_FRAMES)  # a box learns its new size in the next frame, and can be focused then
            assert violations(page) == []
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(SMALL_TARGETS) == []


TWO_FRAMES = "() => new Promise((seen) => requestAnimationFrame(() => requestAnimationFrame(seen)))"
# The controls that are smaller than 24 px either way.
SMALL_TARGETS = """() => [...document.querySelectorAll("button, input, select, summary, nav a, .completeness td")]
  .filter((one) => one.checkVisibility() && one.closest("tr")?.ariaHidden !== "true")
  .filter((one) => Math.min(one.getBoundingClientRect().width, one.getBoundingClientRect().height) < 24)
  .map((one) => one.outerHTML)"""
