"""Errors of the API and their remedies on the page, in a browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.scenes import RANGE, fill
from tests.fakes.api import World


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
