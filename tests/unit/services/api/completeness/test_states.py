"""The state of a country-day, the reason and the action, from the facts of its date."""

from __future__ import annotations

import datetime as dt

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.api.completeness.facts import DateFacts, Lacking, MissedDeadline
from services.api.completeness.model import Action, DayState
from services.api.completeness.states import URGENCY, country_day, grid_of
from services.api.http.unreadable import UnreadableObject
from shared.domain.backfills import new_backfill
from shared.domain.contribution import NOTHING
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import BackfillStatus, Failure, RequestRecord, SummaryHead
from tests.fakes.api import DAY, NOW, REQUEST, record_of

ARMENIA = CountrySlug("armenia")
FAILURE = Failure(city_id=CityId("9"), city_name="Port Tina", reason="the upstream answered 404")
NOBODY = DateFacts(date=DAY)
PLANNED = DateFacts(date=DAY, planned=True)


def head(reported: int, expected: int, country: CountrySlug = ARMENIA) -> SummaryHead:
    """Return the head of a summary with so many cities."""
    return SummaryHead(
        date=DAY,
        country=country,
        country_name=country.title(),
        version=1,
        totals=NOTHING,
        has_data=reported > 0,
        cities_reported=reported,
        cities_expected=expected,
        complete=reported == expected > 0,
        last_ingested_at=NOW if reported else None,
        plan_revision=3,
    )


def record(**changes: object) -> RequestRecord:
    """Return a planned request of three cities."""
    return msgspec.structs.replace(record_of(NOW), planned=True, plan_revision=3, cities=3, **changes)


def ended(outcome: Outcome, **changes: object) -> RequestRecord:
    """Return a request that served two cities; the third has another outcome."""
    return record(outcomes={Outcome.STORED: "3", outcome: "4"}, served="3", **changes)


RUNNING = record(outcomes={Outcome.STORED: "1"}, served="1")
FAILED = ended(Outcome.FAILED)
CANCELLED = ended(Outcome.SKIPPED, cancelled_at=NOW)
WAITING = new_backfill(REQUEST, DAY, DAY, now=NOW)
LATE = MissedDeadline(at=NOW, schedule="daily")
SOON = "A request is about to begin"
LATE_TEXT = "Schedule daily wanted it by 2024-06-01 12:30 UTC"


@pytest.mark.parametrize(
    ("facts", "summary", "state", "reason", "action"),
    [
        (PLANNED, head(2, 2), "complete", None, None),
        (PLANNED, head(1, 2), "provisional", "1 city missing", Action.PROCESS),
        (PLANNED, head(1, 0), "provisional", "The number of its cities is not known yet", Action.PROCESS),
        (PLANNED, None, "not expected", None, None),
        (PLANNED, head(0, 0), "not expected", None, None),
        (
            DateFacts(date=DAY, planned=True, countries=(ARMENIA,)),
            None,
            "provisional",
            "Its cities are planned, and none is counted yet",
            Action.PROCESS,
        ),
        (
            DateFacts(date=DAY, planned=True, countries=(ARMENIA,), record=CANCELLED),
            None,
            "cancelled",
            "The request was cancelled",
            Action.PROCESS,
        ),
        (NOBODY, None, "not requested", "Nobody has requested this date", Action.PROCESS),
        (DateFacts(date=DAY, processable=False), None, "not requested", "Nobody has requested this date", None),
        (DateFacts(date=DAY, requested=True), None, "running", SOON, Action.WAIT),
        (DateFacts(date=DAY, record=record_of(NOW)), None, "running", SOON, Action.WAIT),
        (
            DateFacts(date=DAY, planned=True, record=RUNNING),
            head(1, 2),
            "running",
            "A request is running: 1 of 3 cities of the date are done",
            Action.WAIT,
        ),
        (
            DateFacts(date=DAY, backfill=WAITING),
            None,
            "running",
            "A backfill is going to process it",
            Action.WAIT,
        ),
        (
            DateFacts(date=DAY, backfill=msgspec.structs.replace(WAITING, status=BackfillStatus.PAUSED)),
            None,
            "running",
            "The backfill that is to process it is paused",
            Action.WAIT,
        ),
        (
            DateFacts(date=DAY, planned=True, record=FAILED, lacking={ARMENIA: Lacking(failed=1, example=FAILURE)}),
            head(1, 2),
            "failed",
            "1 city failed. Port Tina: the upstream answered 404",
            Action.RETRY,
        ),
        (
            DateFacts(
                date=DAY,
                planned=True,
                record=FAILED,
                lacking={ARMENIA: Lacking(failed=2, refused=1, example=FAILURE)},
                deadline=LATE,
            ),
            head(0, 3),
            "refused",
            "1 file was refused, and 2 cities failed. Port Tina: the upstream answered 404",
            Action.RETRY,
        ),
        (
            DateFacts(date=DAY, record=msgspec.structs.replace(record_of(NOW), failed_reason="no city list")),
            None,
            "failed",
            "The request failed: no city list",
            Action.RETRY,
        ),
        (
            DateFacts(date=DAY, planned=True, record=CANCELLED, lacking={ARMENIA: Lacking(skipped=1)}),
            head(1, 2),
            "cancelled",
            "The request was cancelled before it fetched 1 city",
            Action.PROCESS,
        ),
        (
            DateFacts(date=DAY, deadline=LATE),
            None,
            "late",
            f"{LATE_TEXT}. Nobody has requested this date",
            Action.PROCESS,
        ),
        (
            DateFacts(date=DAY, deadline=LATE, requested=True),
            head(1, 2),
            "late",
            f"{LATE_TEXT}. {SOON}",
            Action.WAIT,
        ),
        (DateFacts(date=DAY, planned=True, deadline=LATE), head(2, 2), "complete", None, None),
    ],
)
def test_each_state_has_its_reason_and_action(
    facts: DateFacts, summary: SummaryHead | None, state: str, reason: str | None, action: Action | None
) -> None:
    """A country-day says why it is incomplete, and what completes it."""
    day = country_day(facts, ARMENIA, summary)
    assert (day.state.value, day.reason, day.action) == (state, reason, action)


def test_a_request_that_failed_elsewhere_leaves_a_complete_country_complete() -> None:
    """A date shows the most urgent state of its countries, and the sum of their cities."""
    facts = DateFacts(date=DAY, planned=True, record=FAILED, lacking={ARMENIA: Lacking(failed=1, example=FAILURE)})
    grid = grid_of([facts], [head(1, 2), head(1, 1, CountrySlug("brazil"))], [], {})
    assert [country.days[0].state for country in grid.countries] == [DayState.FAILED, DayState.COMPLETE]
    (date,) = grid.dates
    assert (date.state, date.cities_reported, date.cities_expected) == (DayState.FAILED, 2, 3)
    assert (date.request_id, date.reason) == (FAILED.request_id, grid.countries[0].days[0].reason)


def test_a_range_without_plans_shows_every_known_country() -> None:
    """Days that nobody requested are shown for all countries that were ever planned."""
    grid = grid_of([NOBODY], [], [], {ARMENIA: "Armenia"})
    (country,) = grid.countries
    assert (country.name, country.days[0].state, grid.dates[0].state) == ("Armenia", *[DayState.NOT_REQUESTED] * 2)
    assert grid_of([NOBODY], [], [], {}).dates[0].state is DayState.NOT_REQUESTED


def test_an_unreadable_summary_is_named() -> None:
    """A day whose summary cannot be read says why, and needs an operator."""
    key = f"summaries/generation=1/date={DAY}/country=armenia.json"
    grid = grid_of([PLANNED], [], [UnreadableObject(key=key, reason="it is torn")], {})
    day = grid.countries[0].days[0]
    assert (day.state, day.reason, day.action) == (DayState.UNREADABLE, "it is torn", Action.REPAIR)


@given(
    reported=st.integers(0, 3),
    missing=st.integers(0, 3),
    facts=st.builds(
        DateFacts,
        date=st.just(DAY),
        planned=st.booleans(),
        requested=st.booleans(),
        record=st.sampled_from([None, RUNNING, FAILED, CANCELLED]),
        lacking=st.sampled_from([{}, {ARMENIA: Lacking(failed=1)}, {ARMENIA: Lacking(skipped=2)}]),
        backfill=st.sampled_from([None, WAITING]),
        deadline=st.sampled_from([None, LATE]),
        processable=st.booleans(),
    ),
)
def test_a_day_is_complete_exactly_if_every_city_is_counted(reported: int, missing: int, facts: DateFacts) -> None:
    """Complete means complete under all facts of the date, and any other expected day has a reason."""
    day = country_day(facts, ARMENIA, head(reported, reported + missing))
    assert (day.state is DayState.COMPLETE) == (reported > 0 and not missing)
    assert (day.reason is None) == (day.state in {DayState.COMPLETE, DayState.NOT_EXPECTED})
    assert day.state in URGENCY


def test_every_state_has_an_urgency() -> None:
    """The order of urgency has every state once."""
    assert sorted(URGENCY, key=str) == sorted(DayState, key=str)


def test_the_newest_file_of_the_range_is_named() -> None:
    """The grid has the time of its newest file."""
    later = msgspec.structs.replace(head(1, 1, CountrySlug("brazil")), last_ingested_at=NOW + dt.timedelta(hours=1))
    assert grid_of([PLANNED], [head(1, 1), later], [], {}).last_ingested_at == NOW + dt.timedelta(hours=1)
