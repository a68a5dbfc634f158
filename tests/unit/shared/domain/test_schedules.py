"""The rules of schedules: due times across changes of the clocks, the dates of a run, and deadlines."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.domain.objects import CorruptObject, Schedule, encode
from shared.domain.schedules import (
    CATCH_UP_DATES_MAX,
    DEADLINES_MAX,
    RECHECK_MAX,
    InvalidSchedule,
    check_name,
    check_timing,
    claimed,
    due_run,
    immediate_run,
    new_schedule,
    next_due,
    parse_time,
    replaced,
)

UTC = dt.UTC
PRAGUE = zoneinfo.ZoneInfo("Europe/Prague")
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=UTC)
DAY = dt.timedelta(days=1)


def schedule_of(
    cron: str = "0 6 * * *",
    *,
    timezone: str = "Europe/Prague",
    now: dt.datetime = NOW,
    recheck: int = 0,
    date_offset: int = -1,
    complete_by: dt.time | None = None,
) -> Schedule:
    """Return a schedule that was made at ``now``."""
    return new_schedule(
        "daily",
        cron=cron,
        timezone=timezone,
        date_offset=date_offset,
        recheck=recheck,
        max_parallel=2,
        complete_by=complete_by,
        now=now,
    )


@pytest.mark.parametrize(
    "options",
    [{"cron": "6"}, {"cron": "0 6 30 2 *"}, {"timezone": "Mars/Base"}, {"since": dt.datetime.max.replace(tzinfo=UTC)}],
)
def test_a_stored_schedule_that_cannot_be_used_is_unreadable(options: dict[str, Any]) -> None:
    """Options that this build cannot use make the object unreadable, as damaged bytes do."""
    unusable = msgspec.structs.replace(schedule_of(), **options)
    for rule in (next_due, lambda schedule: due_run(schedule, NOW)):
        with pytest.raises(CorruptObject, match=r"schedules/daily\.json cannot be used"):
            rule(unusable)


def due_times(schedule: Schedule, until: dt.datetime) -> list[dt.datetime]:
    """Return the due times up to a time, each found by the run before."""
    found = []
    while (due := next_due(schedule)) <= until:
        found.append(due)
        run = due_run(schedule, due)
        assert run is not None
        schedule = claimed(schedule, run)
    return found


@pytest.mark.parametrize(
    ("cron", "year", "local"),
    [
        ("30 2 * * *", (2024, 3, 30), ["30T02:30", "31T03:00", "01T02:30"]),  # 2:30 does not exist on the 31st
        ("30 2 * * *", (2024, 10, 26), ["26T02:30", "27T02:30", "28T02:30"]),  # 2:30 comes twice on the 27th
        ("0 6 * * *", (2024, 3, 30), ["30T06:00", "31T06:00", "01T06:00"]),
    ],
)
def test_a_daily_run_is_due_once_on_each_day(cron: str, year: tuple[int, int, int], local: list[str]) -> None:
    """A skipped time is due right after it, and a time that comes twice is due once."""
    begin = dt.datetime(*year, tzinfo=PRAGUE)
    found = due_times(schedule_of(cron, now=begin.astimezone(UTC)), begin.astimezone(UTC) + 3 * DAY)
    assert [f"{due.astimezone(PRAGUE):%dT%H:%M}" for due in found] == local


@given(
    zone=st.sampled_from(["Europe/Prague", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]),
    cron=st.sampled_from(["0 6 * * *", "30 2 * * *", "15 1 * * 0", "0 0 1 * *", "0 12 29 2 *"]),
    start=st.datetimes(dt.datetime(2023, 1, 1), dt.datetime(2025, 1, 1)),  # noqa: DTZ001  # drawn times are naive
    days=st.integers(1, 40),
)
@example(zone="UTC", cron="0 0 1 * *", start=dt.datetime(2024, 1, 31), days=40)  # noqa: DTZ001  # as the drawn times
def test_the_latest_due_time_does_not_depend_on_when_planners_look(
    zone: str, cron: str, start: dt.datetime, days: int
) -> None:
    """One look after many days finds the same latest due time as a look at each, and the dates of all of them."""
    schedule = schedule_of(cron, timezone=zone, now=start.replace(tzinfo=UTC))
    now = start.replace(tzinfo=UTC) + days * DAY
    times = due_times(schedule, now)
    run = due_run(schedule, now)
    assert (run is None) == (not times)
    if run is None:
        return
    assert run.due == times[-1]
    days_due = [due.astimezone(zoneinfo.ZoneInfo(zone)).date() for due in times]
    assert run.last == days_due[-1] - DAY
    assert run.first == max(days_due[0] - DAY, run.last - (CATCH_UP_DATES_MAX - 1) * DAY)


def test_frequent_runs_are_caught_up_by_the_latest() -> None:
    """After a year without planners, a schedule of each minute has one run, of the last dates."""
    run = due_run(schedule_of("* * * * *", recheck=2), NOW + 366 * DAY)
    assert run is not None
    assert run.due == NOW + 366 * DAY
    assert (run.last - run.first).days + 1 == CATCH_UP_DATES_MAX + 2


def test_the_id_of_a_run_is_that_of_its_claim() -> None:
    """Two runs never share the id of a backfill."""
    schedule = schedule_of()
    ids = {immediate_run(schedule, NOW + second * dt.timedelta(seconds=1)).backfill_id for second in range(10)}
    assert len(ids) == 10


@pytest.mark.parametrize(
    ("cron", "complete_by", "deadline"),
    [
        ("0 6 * * *", "09:00", dt.datetime(2024, 5, 3, 7, tzinfo=UTC)),
        ("0 22 * * *", "06:00", dt.datetime(2024, 5, 3, 4, tzinfo=UTC)),
    ],
)
def test_a_deadline_is_the_first_such_time_after_the_run(cron: str, complete_by: str, deadline: dt.datetime) -> None:
    """A run in the evening with a deadline in the morning has until the next day."""
    schedule = schedule_of(cron, complete_by=parse_time(complete_by))
    due = next_due(schedule)
    run = due_run(schedule, due)
    assert run is not None
    ((only),) = claimed(schedule, run).deadlines
    assert (only.date, only.at, only.late) == (run.last, deadline, False)


def test_each_missed_date_gets_its_deadline_but_not_those_that_are_checked_again() -> None:
    """Three missed days have three deadlines, each at its own day."""
    schedule = schedule_of(recheck=3, complete_by=dt.time(9))
    run = due_run(schedule, NOW + 3 * DAY)
    assert run is not None
    deadlines = claimed(schedule, run).deadlines
    assert [one.date for one in deadlines] == [run.last - 2 * DAY, run.last - DAY, run.last]
    assert [one.at.day for one in deadlines] == [3, 4, 5]


@pytest.mark.parametrize(
    ("cron", "reason"),
    [
        ("0 6 * *", "must have five fields"),
        ("0 0 6 * * *", "must have five fields"),
        ("61 6 * * *", "has an invalid minute"),
        ("0 25 * * *", "has an invalid hour"),
        ("0 6 31 2 *", "has an invalid day-of-month"),
        ("0 6 * * mon-xyz", "has an invalid day-of-week"),
        ("0/x 6 * * *", "has an invalid minute"),
        ("0 6 L-3 * *", "has an invalid day-of-month"),
    ],
)
def test_an_invalid_cron_line_is_refused_in_one_sentence(cron: str, reason: str) -> None:
    """The error has the line, what is wrong, and an example or the form."""
    with pytest.raises(InvalidSchedule, match=reason) as caught:
        check_timing(cron, "UTC")
    assert (caught.value.field, repr(cron) in str(caught.value)) == ("cron", True)


@given(st.text(max_size=30))
def test_any_text_is_a_valid_cron_line_or_refused(text: str) -> None:
    """No text raises another error."""
    try:
        check_timing(text, "UTC")
    except InvalidSchedule as error:
        assert error.field == "cron"  # noqa: PT017  # a text may also be valid


@pytest.mark.parametrize("timezone", ["", "Mars/Olympus", "../etc/passwd", "/etc/localtime", "Europe", "a\0b"])
def test_an_unknown_time_zone_is_refused(timezone: str) -> None:
    """The error names the zone and shows valid ones."""
    with pytest.raises(InvalidSchedule, match="is not a time zone of the IANA database, such as Europe/Prague"):
        check_timing("0 6 * * *", timezone)


@pytest.mark.parametrize("name", ["", "Daily", "-a", "a/b", "a.json", "a" * 64, "ä", "a\n"])
def test_an_invalid_name_is_refused(name: str) -> None:
    """A name is a part of a key and of a URL."""
    with pytest.raises(InvalidSchedule, match="lower-case letters, digits and dashes"):
        check_name(name)


@pytest.mark.parametrize("text", ["", "9", "24:00", "09:60", "nine"])
def test_an_invalid_time_of_day_is_refused(text: str) -> None:
    """The error shows the form."""
    with pytest.raises(InvalidSchedule, match="must be a time of day, such as 09:00"):
        parse_time(text)


def test_other_times_begin_anew_and_other_options_do_not() -> None:
    """A changed cron line or zone is due after the change; a changed recheck keeps what is due."""
    schedule = schedule_of()
    later = NOW + 5 * DAY
    assert replaced(schedule, schedule_of(recheck=4), later).since == NOW
    assert replaced(schedule, schedule_of("0 7 * * *"), later).since == later
    assert replaced(schedule, schedule_of(timezone="UTC"), later).since == later


def test_a_schedule_stays_small() -> None:
    """With every deadline open, a schedule takes less than 4 KiB."""
    schedule = schedule_of(recheck=RECHECK_MAX, complete_by=dt.time(9))
    run = due_run(schedule, NOW + 60 * DAY)
    assert run is not None
    full = claimed(schedule, run)
    assert len(full.deadlines) == DEADLINES_MAX
    assert len(encode(msgspec.structs.replace(full, name="a" * 63))) < 4 * 1024
