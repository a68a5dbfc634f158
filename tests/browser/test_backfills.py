"""The backfills and late dates on the page at ``/`` in a browser."""

from __future__ import annotations

import datetime as dt

import msgspec
from playwright.sync_api import Page, expect

from shared.domain import keys, objects
from shared.domain.backfills import DateEnd, with_end
from shared.domain.objects import Backfill, BackfillStatus, Deadline
from shared.domain.schedules import new_schedule
from tests.fakes.api import DAY, NOW, World

LAST = DAY + dt.timedelta(days=3)


def stored(world: World) -> Backfill:
    """Return the only backfill of the bucket."""
    ((key, body),) = world.store.bodies(keys.BACKFILLS).items()
    return objects.decode(Backfill, body, key)


def test_several_dates_are_a_backfill_that_can_be_cancelled(world: World, page: Page, address: str) -> None:
    """Processing a range shows a row with the progress of its dates; cancelling ends it, and the row goes."""
    page.goto(f"{address}/?from={DAY}&to={LAST}")
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
    page.goto(f"{address}/?from={DAY}&to={LAST}")
    expect(page.locator("#backfills .late")).to_contain_text("1 date of schedule daily is late")
    expect(page.locator("#backfills .late")).to_contain_text(str(DAY))
