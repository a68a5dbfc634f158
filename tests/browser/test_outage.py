"""Outages as the page shows them, in a browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.scenes import RANGE, cell, ended, fill, shorten_waits, under_way
from tests.fakes.api import World, write


def test_an_outage_is_shown_once_and_ends_by_itself(world: World, page: Page, address: str) -> None:
    """While the service is away, one message says so for all parts; when it is back, they go on by themselves."""
    fill(world)
    write(world, ended(under_way()))
    shorten_waits(page)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    for path in ("country-stats", "process-requests", "backfills", "quarantine", "schedules"):
        page.route(f"**/{path}?*", lambda route: route.abort())
        page.route(f"**/{path}", lambda route: route.abort())
    page.get_by_role("link", name="Jobs").click()
    expect(page.get_by_text("Waiting for the service…").first).to_be_visible()
    alert = page.get_by_role("alert")
    expect(alert).to_have_count(1)
    expect(alert).to_contain_text("The service cannot be reached")
    expect(alert).to_contain_text("The page tries again by itself.")
    page.unroute_all()
    expect(page.locator(".jobs > li")).to_have_count(1)
    expect(alert).to_have_count(0)


def test_an_outage_of_s3_is_shown_in_plain_words(world: World, page: Page, address: str) -> None:
    """While S3 is down the page says so, in the words of the API, and goes on when it is back."""
    fill(world)
    world.store.down = True
    shorten_waits(page)
    page.goto(f"{address}/{RANGE}")
    alert = page.get_by_role("alert")
    expect(alert).to_have_count(1)
    expect(alert).to_contain_text("S3 cannot be reached.")
    world.store.down = False
    expect(cell(page, "Armenia", 1)).to_be_visible()
    expect(alert).to_have_count(0)
