"""The API key of the page, in a browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from services.api.auth import digest_of, mint_key
from tests.browser.scenes import RANGE, cell, ended, fill, under_way
from tests.fakes.api import DAY, World, write
from tests.serving import served


def test_a_key_is_asked_for_shown_switched_and_forgotten(world: World, page: Page) -> None:
    """The page asks for a key, shows its name and scopes, and changes it at any time. No URL has a key."""
    fill(world)
    write(world, ended(under_way()))
    reader, processor = mint_key(), mint_key()
    keys = f"viewer:read:{digest_of(reader)},editor:read+process:{digest_of(processor)}:2027-01-31"
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with served(world, api_access="keys", api_keys=keys) as address:
        page.goto(f"{address}/{RANGE}")
        alert = page.locator("#results").get_by_role("alert")
        expect(alert).to_contain_text("An API key is needed")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(alert).to_contain_text("This API key is unknown")
        page.get_by_label("API key").fill(reader)
        page.get_by_role("button", name="Use this key").click()
        expect(cell(page, "Armenia", 1)).to_be_visible()
        control = page.get_by_role("button", name="Key: viewer (read)")
        expect(control).to_be_visible()
        page.goto(f"{address}/jobs?from={DAY}&to={DAY}")
        page.locator("#ask").get_by_role("button", name="Process").click()
        refused = page.locator("#asked").get_by_role("alert")
        expect(refused).to_contain_text('Key "viewer" can only read. Use a key with the "process" scope.')
        refused.get_by_role("button", name="Use another key").click()
        dialog = page.get_by_role("dialog", name="API key")
        expect(dialog).to_contain_text("Key viewer may read.")
        dialog.get_by_label("API key").fill(processor)
        dialog.get_by_role("button", name="Use this key").click()
        control = page.get_by_role("button", name="Key: editor (read, process)")
        control.click()
        expect(dialog).to_contain_text("Key editor may read and process dates. It expires on 2027-01-31.")
        dialog.get_by_role("button", name="Forget the key").click()
        expect(page.locator("#latest")).to_contain_text("An API key is needed")
        page.goto("about:blank")
    assert [url for url in asked if reader in url or processor in url] == []


def test_an_open_api_has_no_key(world: World, page: Page, address: str) -> None:
    """Where no key is needed, the page has no control for one."""
    fill(world)
    page.goto(f"{address}/{RANGE}")
    expect(cell(page, "Armenia", 1)).to_be_visible()
    expect(page.locator("#key")).to_be_hidden()
