"""The view of the jobs at ``/jobs`` in a browser."""

from __future__ import annotations

import datetime as dt

import msgspec
from playwright.sync_api import Page, expect

from services.api.auth import digest_of, mint_key
from shared.domain import keys, objects
from shared.domain.backfills import DateEnd, with_end
from shared.domain.events import ProcessRequested
from shared.domain.ids import CityId
from shared.domain.objects import Backfill, BackfillStatus, Deadline, Failure, RequestRecord
from shared.domain.schedules import new_schedule
from shared.domain.topics import Topic
from tests.browser.scenes import NEXT_DAY, RANGE, cell, ended, fill, under_way
from tests.fakes.api import DAY, NOW, World, record_of, report_of, write, write_report
from tests.serving import served

LAST = DAY + dt.timedelta(days=3)


def stored(world: World) -> Backfill:
    """Return the only backfill of the bucket."""
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    return objects.decode(Backfill, body, key)


def test_several_dates_are_a_backfill_that_can_be_cancelled(world: World, page: Page, address: str) -> None:
    """Processing a range shows a row with the progress of its dates; cancelling ends it, and the row goes."""
    page.goto(f"{address}/jobs?from={DAY}&to={LAST}")
    form = page.locator("#ask")
    form.get_by_label("From").fill(str(DAY))
    form.get_by_label("To").fill(str(LAST))
    form.get_by_role("button", name="Process").click()
    row = page.locator("#backfills li")
    expect(row).to_contain_text("0 of 4 dates")
    backfill = with_end(stored(world), 0, DateEnd.COMPLETED)
    world.store.write(keys.backfill(backfill.backfill_id), objects.encode(backfill))
    expect(row).to_contain_text("1 of 4 dates")
    row.get_by_role("button", name=f"Cancel the backfill of {DAY} to {LAST}").click()
    expect(row).to_have_count(0)
    assert stored(world).status is BackfillStatus.CANCELLED


def test_late_dates_are_named(world: World, page: Page, address: str) -> None:
    """A date of a schedule that is late is named with its schedule."""
    schedule = new_schedule(
        "daily",
        cron="0 6 * * *",
        timezone="UTC",
        date_offset=-1,
        recheck=0,
        max_parallel=2,
        complete_by=dt.time(9),
        now=NOW,
    )
    late = msgspec.structs.replace(schedule, deadlines=(Deadline(date=DAY, at=NOW, late=True),))
    world.store.write(keys.schedule("daily"), objects.encode(late))
    page.goto(f"{address}/jobs?from={DAY}&to={LAST}")
    expect(page.locator("#backfills .late")).to_contain_text("1 date of schedule daily is late")
    expect(page.locator("#backfills .late")).to_contain_text(str(DAY))


def test_requested_date_shows_progress_then_statistics(world: World, page: Page, address: str) -> None:
    """A requested date shows its progress, its failures with reasons, and then its statistics."""
    page.goto(f"{address}/{RANGE}")
    expect(page.get_by_text("No data in this range")).to_be_visible()
    page.get_by_role("link", name="Process these days").click()
    expect(page.get_by_text("No date has been requested yet")).to_be_visible()
    page.locator("#ask").get_by_role("button", name="Process").click()
    expect(page.get_by_text("Requested 2 dates.")).to_be_visible()
    expect(page.locator("#backfills li")).to_have_count(1)
    running = under_way()
    write(world, running)
    row = page.locator("#latest li", has_text="running")
    expect(row).to_contain_text("1 of 2 cities · 40.0 MB of 70.0 MB begun · 6 trips")
    expect(row.get_by_role("progressbar")).to_have_attribute("value", "1")
    fill(world)
    write(world, ended(running))
    row = page.locator(".requests > li", has_text="completed with failures")
    row.locator("summary").click()
    expect(row).to_contain_text("Port Tina (9): the upstream answered 404")
    page.get_by_role("link", name="Statistics").click()
    expect(cell(page, "Armenia", 1)).to_have_text("1.1")


def test_a_request_can_be_cancelled_and_retried(world: World, page: Page, address: str) -> None:
    """A request that runs can be cancelled, and the failed cities of one that has ended be tried again."""
    running = under_way()
    write(world, running)
    failed = ended(msgspec.structs.replace(under_way(NEXT_DAY), request_id=record_of(NOW).request_id))
    kept = Failure(city_id=CityId("9"), city_name="Port Tina", reason="no JSON", quarantine_key="quarantine/a.json")
    write(world, msgspec.structs.replace(failed, failures={1: kept}))
    page.goto(f"{address}/jobs{RANGE}")
    row = page.locator(".requests > li", has_text="2024-05-02")
    row.locator("summary").click()
    expect(row).to_contain_text("Port Tina (9): no JSON")
    expect(row).to_contain_text("The file is kept at quarantine/a.json")
    row.get_by_role("button", name="Retry the failed cities").click()
    expect(row).to_contain_text("Retrying 1 city.")
    asked = [event for event in world.published(Topic.PROCESS_REQUESTS) if isinstance(event, ProcessRequested)]
    assert asked[-1].request_id == failed.request_id
    record = objects.decode(RequestRecord, world.store.objects[keys.request(failed.request_id)].body, "")
    write(world, ended(msgspec.structs.replace(record, version=record.version + 1)))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(row.locator(".status")).to_have_text("completed with failures")
    expect(row.get_by_text("Retrying 1 city.")).to_be_hidden()
    row = page.locator(".requests > li", has_text="2024-05-01")
    row.get_by_role("button", name="Cancel the request for 2024-05-01").click()
    expect(row).to_contain_text("running, being cancelled")
    cancelled = world.store.objects[keys.request(running.request_id)].body
    assert objects.decode(RequestRecord, cancelled, "").cancelled_at is not None


def test_progress_is_streamed(world: World, page: Page, address: str) -> None:
    """Progress comes by itself, without the list being asked for again."""
    running = under_way()
    write(world, running)
    page.goto(f"{address}/jobs?from=2024-05-01&to=2024-05-01")
    row = page.locator(".requests > li")
    expect(row).to_contain_text("running")
    page.route("**/process-requests?limit=*", lambda route: route.abort())
    running = msgspec.structs.replace(running, version=6, trips_done=500)
    write(world, running)
    expect(row).to_contain_text("506 trips")
    write(world, ended(running))
    expect(row).to_contain_text("completed with failures")


def test_progress_is_streamed_with_a_key_that_is_in_no_url(world: World, page: Page) -> None:
    """Where a key is needed progress is streamed all the same, and the key stands in no address."""
    running = under_way()
    write(world, running)
    key = mint_key()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with served(world, api_access="keys", api_keys=f"page:read:{digest_of(key)}") as address:
        page.goto(f"{address}/jobs{RANGE}")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        row = page.locator(".requests > li")
        expect(row).to_contain_text("running")
        page.route("**/process-requests?limit=*", lambda route: route.abort())
        write(world, msgspec.structs.replace(running, version=6, trips_done=500))
        expect(row).to_contain_text("506 trips")
        page.goto("about:blank")
    assert [url for url in asked if key in url] == []


def test_refused_files_of_the_range_are_listed(world: World, page: Page, address: str) -> None:
    """Files of the range that were refused are shown with why, their bad records and where they lie; of no other days.

    Without any, nothing is said of them.
    """
    page.goto(f"{address}/jobs{RANGE}")
    expect(page.locator("#latest")).to_have_attribute("aria-busy", "false")
    refused = page.get_by_role("region", name="Refused files")
    expect(refused).to_be_hidden()
    report = report_of("7")
    write_report(world, report)
    write_report(world, report_of("8", dt.date(2024, 6, 1)))
    page.reload()
    expect(refused.locator(".refused > li")).to_have_count(1)
    expect(refused).to_contain_text(report.reason)
    refused.locator("summary").click()
    expect(refused).to_contain_text(report.key)
    expect(refused).to_contain_text(report.reported[0].reason)
