"""A browser, and a page of it on the API over a bucket in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from litestar import Litestar
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.fakes.api import World
from tests.serving import listening

DEADLINE_MS = 30_000
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--process-per-site",
]


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
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(name="context", scope="package")
def _context(browser: Browser) -> Iterator[BrowserContext]:
    """Yield a context for the pages of all tests: with its caches and its process, a page opens in half the time.

    Pages share nothing else, because Tripfold stores only in the session of a page.
    """
    context = browser.new_context(viewport={"width": 1180, "height": 900}, locale="en-GB", timezone_id="UTC")
    context.set_default_timeout(DEADLINE_MS)
    yield context
    context.close()


@pytest.fixture(name="api", scope="package")
def _api(context: BrowserContext) -> Iterator[tuple[Litestar, str]]:
    """Serve the API for all tests of the page, and yield it with its address. Each test has a world of its own."""
    with World().shared_app() as app, listening(app) as address:
        kept = context.new_page()  # the process of a site ends with its last page
        kept.goto(f"{address}/page/icon.svg")
        yield app, address


@pytest.fixture(name="world")
def _world(api: tuple[Litestar, str]) -> World:
    world = World()
    world.take_over(api[0])
    return world


@pytest.fixture(name="address")
def _address(api: tuple[Litestar, str]) -> str:
    return api[1]


@pytest.fixture(name="page")
def _page(context: BrowserContext, world: World) -> Iterator[Page]:
    """Yield a page that fails its test if it asked another host for anything, or met an error nobody caught."""
    del world  # asked for so that the API has it before the page loads
    page = context.new_page()
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    page.close()
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:", "about:"))] == []
    assert faults == []


@pytest.fixture(name="violations")
def _violations() -> Callable[[Page], list[str]]:
    """Return a function that checks a page with axe-core, and returns what breaks a rule of accessibility."""

    def check(page: Page) -> list[str]:
        found = Axe().run(page).response["violations"]
        return [f"{one['id']}: {node['target']} {node['failureSummary']}" for one in found for node in one["nodes"]]

    return check
