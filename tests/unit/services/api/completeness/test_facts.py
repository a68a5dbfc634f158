"""The cities that a request lacks, by country; the dates of open backfills; missed deadlines."""

from __future__ import annotations

import datetime as dt

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from services.api.completeness.facts import (
    Lacking,
    MissedDeadline,
    awaited_dates,
    lacking_of,
    layout_of,
    missed_deadlines,
)
from services.api.http.date_range import DateRange
from shared.domain import bitmap
from shared.domain.backfills import date_at, new_backfill
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import BackfillStatus, Deadline, Failure, Plan, PlannedCity, PlannedCountry, Schedule
from tests.fakes.api import DAY, NOW, REQUEST, record_of
from tests.fakes.builders import daily_schedule

ARMENIA, BRAZIL = CountrySlug("armenia"), CountrySlug("brazil")
RANGE = DateRange(DAY, DAY + dt.timedelta(days=9))


def plan(*counts: int) -> Plan:
    """Return a plan whose countries have so many cities."""
    cities = [
        tuple(PlannedCity(city_id=CityId(f"{place}-{city}"), upstream_id="", name="") for city in range(count))
        for place, count in enumerate(counts)
    ]
    return Plan(
        date=DAY,
        revision=3,
        request_id=REQUEST,
        planned_at=NOW,
        countries={CountrySlug(f"c{place}"): PlannedCountry(name="", cities=of) for place, of in enumerate(cities)},
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_position_belongs_to_the_country_that_the_plan_says(counts: list[int]) -> None:
    """The country of each position is that of the city at this place of the plan."""
    layout = layout_of(plan(*counts))
    expected = [f"c{place}" for place, count in enumerate(counts) for _ in range(count)]
    assert [layout.country_at(position) for position in range(sum(counts))] == expected
    ranges = [layout.positions_of(CountrySlug(f"c{place}")) for place in range(len(counts))]
    assert [position for positions in ranges for position in positions] == list(range(sum(counts)))
    assert list(layout.positions_of(CountrySlug("elsewhere"))) == []


def test_failures_are_counted_for_their_country() -> None:
    """Failed, refused and skipped cities count for their country; a refused file is the example."""
    failed = Failure(city_id=CityId("1"), city_name="A", reason="404")
    refused = Failure(city_id=CityId("2"), city_name="B", reason="torn", quarantine_key="quarantine/b.json")
    record = msgspec.structs.replace(
        record_of(NOW),
        plan_revision=3,
        cities=4,
        outcomes={Outcome.FAILED: bitmap.encode(0b0011), Outcome.SKIPPED: bitmap.encode(0b1000)},
        failures={0: failed, 1: refused},
    )
    layout = layout_of(plan(2, 2))
    assert lacking_of(record, layout) == {
        "c0": Lacking(failed=1, refused=1, example=refused),
        "c1": Lacking(skipped=1),
    }
    assert lacking_of(msgspec.structs.replace(record, plan_revision=4), layout) == {}
    assert lacking_of(record, None) == {}


@given(st.integers(0, 10), st.booleans(), st.integers(0, 9), st.integers(0, 9))
def test_a_backfill_awaits_the_dates_that_it_has_not_reached(
    cursor: int, newest_first: bool, under_way: int, to_retry: int
) -> None:
    """An open backfill awaits dates that it has not reached, processes or retries; an ended one awaits none."""
    backfill = msgspec.structs.replace(
        new_backfill(REQUEST, RANGE.first, RANGE.last, now=NOW, newest_first=newest_first),
        cursor=cursor,
        under_way={under_way: 0},
        to_retry=bitmap.encode(bitmap.member(to_retry)),
    )
    expected = {date_at(backfill, position) for position in {*range(cursor, 10), under_way, to_retry}}
    assert awaited_dates([backfill], RANGE).keys() == expected
    assert awaited_dates([msgspec.structs.replace(backfill, status=BackfillStatus.CANCELLED)], RANGE) == {}
    later = DateRange(RANGE.last, RANGE.last + dt.timedelta(days=9))
    assert awaited_dates([backfill], later).keys() == expected & {RANGE.last}


def test_the_earliest_missed_deadline_of_a_date_counts() -> None:
    """The earliest of several deadlines that have passed counts; one in the future does not."""
    hour = dt.timedelta(hours=1)

    def due(name: str, *ats: dt.datetime) -> Schedule:
        deadlines = tuple(Deadline(date=DAY + dt.timedelta(days=place), at=at) for place, at in enumerate(ats))
        return daily_schedule(NOW, name=name, deadlines=deadlines)

    missed = missed_deadlines([due("a", NOW, NOW + hour), due("b", NOW - hour)], NOW)
    assert missed == {DAY: MissedDeadline(at=NOW - hour, schedule="b")}
