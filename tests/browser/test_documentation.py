"""The pages of the API's documentation in a browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect


def test_the_api_documentation_shows_every_operation(page: Page, address: str) -> None:
    """The documentation shows every operation, with its possible responses, and loads nothing from elsewhere."""
    requested: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/docs")
    operations = page.locator(".opblock")
    expect(operations).to_have_count(32)
    page.locator(".opblock", has_text="Get the statistics of a range").get_by_role("button").first.click()
    expect(page.get_by_text("The statistics. With detail=full").first).to_be_visible()
    assert all(url.startswith((address, "data:", "blob:")) for url in requested)
    assert faults == []


def test_the_event_page_shows_every_event(page: Page, address: str) -> None:
    """The page of the events shows every event, and loads nothing from elsewhere."""
    requested: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{address}/asyncapi")
    shown = page.locator("asyncapi-viewer")
    for text in ("Tripfold events", "send-city-stats", "CityDayRetracted", "highest revision"):
        expect(shown.get_by_text(text).first).to_be_visible()
    assert all(url.startswith((address, "data:", "blob:")) for url in requested)
    assert faults == []
