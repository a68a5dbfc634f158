"""The views of the page and their URLs in a browser."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from services.api.web.page import VIEWS
from tests.browser.scenes import RANGE, cell, fill
from tests.fakes.api import World

# The compressed bytes of the page's files.
TRANSFERRED = """() => Object.fromEntries(
  ["navigation", "resource"].flatMap((kind) => performance.getEntriesByType(kind))
    .filter((entry) => entry.entryType === "navigation" || entry.name.includes("/page/"))
    .map((entry) => [entry.name, entry.encodedBodySize])
)"""


@pytest.mark.parametrize("path", VIEWS)
def test_each_view_has_a_url(page: Page, address: str, path: str) -> None:
    """The URL of a view opens it: its link is the current one, and it names the document. Little is transferred."""
    page.goto(f"{address}{path}")
    current = page.get_by_role("navigation", name="Views").locator("[aria-current=page]")
    expect(current).to_have_attribute("href", re.compile(rf"^{path}(\?|$)"))
    expect(page).to_have_title(re.compile(rf"{current.text_content()} · Tripfold$"))
    expect(page.get_by_role("heading", level=2)).not_to_have_count(0)
    sizes = page.evaluate(TRANSFERRED)
    assert len(sizes) > 5
    assert sum(sizes.values()) < 60_000, sizes


def test_links_and_history_lead_between_views(world: World, page: Page, address: str) -> None:
    """Links and the Back button open views without loading the page again. A view keeps its state."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    expect(page).to_have_title("1 – 2 May 2024 · Statistics · Tripfold")
    page.evaluate("window.isStillThere = true")
    page.get_by_role("link", name="Jobs").click()
    expect(page).to_have_title("Jobs · Tripfold")
    expect(page.locator("#view")).to_be_focused()
    expect(cell(page, "Armenia", 1)).to_be_hidden()
    page.get_by_role("link", name="Statistics").click()
    expect(page).to_have_url(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    page.go_back()
    expect(page).to_have_url(f"{address}/jobs")
    expect(page.get_by_role("heading", name="Process dates")).to_be_visible()
    page.go_back()
    expect(cell(page, "Armenia", 1)).to_be_visible()
    assert page.evaluate("window.isStillThere")
