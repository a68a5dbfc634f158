"""A browser, and a page of it on the API over a bucket in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.fakes.api import World
from tests.serving import served

DEADLINE_MS = 30_000


def chromium() -> str | None:
    """Return where Chromium is: as TRIPFOLD_TEST_CHROMIUM says, on the path, or where Playwright installs it."""
    named = os.environ.get("TRIPFOLD_TEST_CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return found
    with sync_playwright() as playwright:
        installed = playwright.chromium.executable_path
    return installed if Path(installed).exists() else None


@pytest.fixture(name="browser", scope="package")  # beside it, no test with an event loop of its own can run
def _browser() -> Iterator[Browser]:
    executable = chromium()
    if executable is None:
        # A run that decides about a change leaves nothing out.
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up("no Chromium: run `python -m tests.browser.install`, or set TRIPFOLD_TEST_CHROMIUM to one")
    expect.set_options(timeout=DEADLINE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser
        browser.close()


@pytest.fixture(name="serving", scope="package")
def _serving() -> Iterator[tuple[World, str]]:
    """Serve one world to all tests of the page: a server for each would take as long as the tests."""
    world = World()
    with served(world) as address:
        yield world, address


@pytest.fixture(name="world")
def _world(serving: tuple[World, str]) -> World:
    """Return the served world, emptied."""
    world, _ = serving
    world.empty()
    return world


@pytest.fixture(name="address")
def _address(serving: tuple[World, str]) -> str:
    return serving[1]


@pytest.fixture(name="page")
def _page(browser: Browser, address: str) -> Iterator[Page]:
    """Yield a page that fails its test if it asked another host for anything, or met an error nobody caught."""
    del address  # asked for so that the API outlives the page
    context = browser.new_context(viewport={"width": 1180, "height": 900}, locale="en-GB", timezone_id="UTC")
    context.set_default_timeout(DEADLINE_MS)
    page = context.new_page()
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:", "about:"))] == []
    assert faults == []


@pytest.fixture(name="violations")
def _violations() -> Callable[[Page], list[str]]:
    """Return a function that checks a page with axe-core, and returns what breaks a rule of accessibility."""

    def check(page: Page) -> list[str]:
        found = Axe().run(page).response["violations"]
        return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found for node in one["nodes"]]

    return check
