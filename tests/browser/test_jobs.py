"""The view of the jobs at ``/jobs`` in a browser."""

from __future__ import annotations

import datetime as dt

import msgspec
from playwright.sync_api import Page, expect

from shared.domain import keys, objects
from shared.domain.backfills import DateEnd, new_backfill, request_id_of, with_end
from shared.domain.events import ProcessRequested
from shared.domain.ids import CityId, mint_request_id
from shared.domain.objects import Backfill, BackfillStatus, Deadline, Failure, RequestRecord
from shared.domain.requests import caller_of_backfill, with_action
from shared.domain.topics import Topic
from tests.browser.scenes import NEXT_DAY, RANGE, cell, ended, fill, shorten_waits, under_way
from tests.fakes.api import DAY, NOW, World, record_of, report_of, write, write_report
from tests.fakes.builders import daily_schedule

LAST = DAY + dt.timedelta(days=3)


def stored(world: World) -> Backfill:
    """Return the only backfill of the bucket."""
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    return objects.decode(Backfill, body, key)


def keep(world: World, backfill: Backfill) -> None:
    """Write a backfill, as a later version."""
    later = msgspec.structs.replace(backfill, version=backfill.version + 1)
    world.store.write(keys.backfill(backfill.backfill_id), objects.encode(later))


def look_again(page: Page) -> None:
    """Let the page look for changes, as when its window becomes visible."""
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_several_dates_are_one_job(world: World, page: Page, address: str) -> None:
    """A range is one row with the progress of its dates; it can be paused, cancelled, and its failed dates retried."""
    page.goto(f"{address}/jobs?from={DAY}&to={LAST}")
    page.locator("#ask").get_by_role("button", name="Process").click()
    expect(page.get_by_text("Requested 4 dates.")).to_be_visible()
    row = page.locator(".jobs > li")
    expect(row).to_contain_text("0 of 4 dates")
    first = with_end(stored(world), 0, DateEnd.FAILED)
    keep(world, msgspec.structs.replace(first, updated_at=first.created_at + dt.timedelta(minutes=2)))
    request_id = request_id_of(first, DAY)
    child = with_action(
        msgspec.structs.replace(ended(under_way()), request_id=request_id),
        caller_of_backfill(first.backfill_id),
        "process",
        result="accepted",
        at=NOW,
    )
    write(world, child)
    look_again(page)
    expect(row).to_contain_text("1 of 4 dates · 1 failed · about 6 min left")
    expect(row.get_by_role("progressbar", name="Dates done of 1 – 4 May 2024")).to_have_attribute("value", "1")
    row.get_by_text("Which 1 date failed").click()
    row.get_by_text("1 May 2024", exact=True).last.click()
    expect(row).to_contain_text("Port Tina (9): the upstream answered 404")
    row.get_by_role("button", name="Pause").click()
    expect(row.locator(".status")).to_have_text("paused")
    row.get_by_role("button", name="Cancel: 1 – 4 May 2024").click()
    expect(row.locator(".status")).to_have_text("cancelled")
    assert stored(world).status is BackfillStatus.CANCELLED
    again = with_end(new_backfill(mint_request_id(NOW), DAY, DAY, now=NOW), 0, DateEnd.FAILED)
    keep(world, msgspec.structs.replace(again, status=BackfillStatus.COMPLETED_WITH_FAILURES))
    look_again(page)
    page.get_by_role("button", name="Retry the failed cities: 1 May 2024").click()
    expect(page.get_by_text("Retrying.")).to_be_visible()


def test_late_dates_are_named(world: World, page: Page, address: str) -> None:
    """A date of a schedule that is late is named with its schedule. Unreadable schedules are an error, not none."""
    late = daily_schedule(NOW, complete_by=dt.time(9), deadlines=(Deadline(date=DAY, at=NOW, late=True),))
    world.store.write(keys.schedule("daily"), objects.encode(late))
    page.route("**/schedules", lambda route: route.fulfill(status=500, json={"title": "Broken", "detail": "x"}))
    page.goto(f"{address}/jobs?from={DAY}&to={LAST}")
    expect(page.locator("#late")).to_contain_text("Broken")
    page.unroute_all()
    page.locator("#late").get_by_role("button", name="Try again").click()
    expect(page.locator("#late")).to_contain_text("1 date of schedule daily is late")
    expect(page.locator("#late")).to_contain_text(str(DAY))


def test_requested_date_shows_progress_then_statistics(world: World, page: Page, address: str) -> None:
    """A requested date shows its progress, its failures with reasons, and then its statistics."""
    shorten_waits(page)
    page.goto(f"{address}/{RANGE}")
    expect(page.get_by_text("No data in this range")).to_be_visible()
    page.get_by_role("link", name="Process these days").click()
    expect(page.get_by_text("No date has been requested yet")).to_be_visible()
    running = under_way()
    write(world, running)
    look_again(page)
    row = page.locator(".jobs > li", has_text="running")
    expect(row).to_contain_text("1 of 2 cities · 40.0 MB of 70.0 MB begun · 6 trips")
    expect(row.get_by_role("progressbar")).to_have_attribute("value", "1")
    fill(world)
    write(world, ended(running))
    row = page.locator(".jobs > li", has_text="completed with failures")
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
    row = page.locator(".jobs > li", has_text="2 May 2024")
    row.locator("summary").click()
    expect(row).to_contain_text("Port Tina (9): no JSON")
    expect(row).to_contain_text("The file is kept at quarantine/a.json")
    row.get_by_role("button", name="Retry the failed cities").click()
    expect(row).to_contain_text("Retrying.")
    asked = [event for event in world.published(Topic.PROCESS_REQUESTS) if isinstance(event, ProcessRequested)]
    assert asked[-1].request_id == failed.request_id
    record = objects.decode(RequestRecord, world.store.objects[keys.request(failed.request_id)].body, "")
    write(world, ended(msgspec.structs.replace(record, version=record.version + 1)))
    look_again(page)
    expect(row.locator(".status")).to_have_text("completed with failures")
    expect(row.get_by_text("Retrying.")).to_be_hidden()
    row = page.locator(".jobs > li", has_text="1 May 2024")
    row.get_by_role("button", name="Cancel: 1 May 2024").click()
    expect(row).to_contain_text("running, being cancelled")
    cancelled = world.store.objects[keys.request(running.request_id)].body
    assert objects.decode(RequestRecord, cancelled, "").cancelled_at is not None


def test_jobs_are_ordered_counted_and_filtered(world: World, page: Page, address: str) -> None:
    """Jobs are listed newest first with totals; a button shows older ones, and a filter is kept in the URL."""
    for number in range(60):
        at = NOW - dt.timedelta(minutes=number)
        record = msgspec.structs.replace(record_of(at), date=DAY + dt.timedelta(days=number), cancelled_at=None)
        failed = msgspec.structs.replace(record, failed_reason="the city list is empty" if number % 10 == 3 else None)
        write(world, failed)
    backfill = new_backfill(mint_request_id(NOW - dt.timedelta(seconds=90)), DAY, LAST, now=NOW)
    old = msgspec.structs.replace(backfill, created_at=NOW - dt.timedelta(seconds=90))
    world.store.write(keys.backfill(old.backfill_id), objects.encode(old))
    page.goto(f"{address}/jobs")
    rows = page.locator(".jobs > li")
    expect(rows).to_have_count(51)
    for place, title in enumerate(("1 May 2024", "2 May 2024", "1 – 4 May 2024", "3 May 2024")):
        expect(rows.nth(place).locator("strong")).to_have_text(title)
    shown = "51 jobs · 45 accepted · 1 running · 5 failed · older ones are not shown"
    expect(page.locator(".totals")).to_have_text(shown)
    page.get_by_role("button", name="Show older jobs").click()
    expect(rows).to_have_count(61)
    expect(page.get_by_role("button", name="Show older jobs")).to_be_hidden()
    page.get_by_label("Status").select_option("failed")
    expect(rows).to_have_count(6)
    page.get_by_label("With the date").fill("2024-05-04")
    expect(rows).to_have_count(1)
    page.reload()
    expect(rows).to_have_count(1)
    expect(page.locator(".totals")).to_contain_text("1 job · 1 failed")
    page.get_by_label("Status").select_option("")
    expect(rows).to_have_count(2)


def test_refused_files_of_the_range_are_listed(world: World, page: Page, address: str) -> None:
    """Files of the range that were refused are shown with why, their bad records and where they lie; of no other days.

    Without any, nothing is said of them.
    """
    with page.expect_response("**/quarantine?*"):
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
