"""Errors of the API and their remedies on the page, in a browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from services.api.auth import digest_of, mint_key
from tests.browser.scenes import RANGE, cell, ended, fill, under_way
from tests.fakes.api import World, write
from tests.serving import served


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
        expect(page.locator(".bars")).to_contain_text("Armenia")
        assert "from=2024-05-01" in page.url
        page.reload()
        expect(page.locator(".bars")).to_contain_text("Armenia")
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
