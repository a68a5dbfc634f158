"""Tests of the comparison of a country-day in two generations."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.aggregate.fold import empty_summary, fold
from services.aggregate.replay.diff import NAMED_MAX, Change, GenerationFigures, change_of
from shared.domain.contribution import total_of
from shared.domain.events import CountryDayPlanned
from shared.domain.ids import CityId
from shared.domain.objects import Summary
from tests.fakes.builders import STATS


def summary_of(revisions: dict[str, int], *, plan_revision: int = 0) -> Summary:
    """Return a summary of cities with revisions, and with a plan of them if it has a revision."""
    cities = [
        msgspec.structs.replace(STATS, city_id=CityId(city), revision=number) for city, number in revisions.items()
    ]
    plan = CountryDayPlanned(
        date=STATS.date,
        country=STATS.country,
        country_name=STATS.country_name,
        plan_revision=plan_revision,
        city_ids=tuple(CityId(city) for city in revisions),
        chunk=0,
        chunks=1,
    )
    return fold(empty_summary(STATS.date, STATS.country), [*cities, *([plan] if plan_revision else [])])


def change(live: Summary | None, built: Summary | None) -> Change:
    """Return the change between two summaries that differ."""
    found = change_of(live, built)
    assert found is not None
    return found


def test_equal_content_is_no_change() -> None:
    """Nothing is told of two equal summaries, nor where neither generation has one."""
    live = summary_of({"1": 5}, plan_revision=3)
    assert change_of(live, summary_of({"1": 5}, plan_revision=3)) is None
    assert change_of(None, None) is None
    assert change_of(None, None, unreadable=True) is None


def test_a_country_day_of_one_generation_has_its_figures() -> None:
    """It is told which generation has it; only what the live one has can go back."""
    one = summary_of({"1": 5, "2": 7}, plan_revision=3)
    figures = GenerationFigures(
        version=15, totals=total_of([STATS.contribution, STATS.contribution]), cities_reported=2, cities_expected=2
    )
    assert change(one, None) == Change(
        date=dt.date(2024, 5, 1),
        country=STATS.country,
        live=figures,
        built=None,
        why=("no manifest or plan has it",),
        goes_back=(
            "plan: revision none after 3",
            "city 1: revision none after 5",
            "city 2: revision none after 7",
        ),
    )
    assert change(None, one) == Change(
        date=dt.date(2024, 5, 1),
        country=STATS.country,
        live=None,
        built=figures,
        why=("the live generation does not have it",),
    )


def test_each_differing_city_is_told_in_order() -> None:
    """A city may be new, gone, newer or older; an older one and an older plan go back."""
    live, built = summary_of({"1": 5, "2": 7, "4": 9}, plan_revision=3), summary_of({"4": 9, "3": 1, "2": 6})
    found = change(live, built)
    assert found.why == (
        "plan: revision 3 → none",
        "city 1: revision 5 → none",
        "city 2: revision 7 → 6",
        "city 3: revision none → 1",
    )
    assert found.goes_back == (
        "plan: revision none after 3",
        "city 1: revision none after 5",
        "city 2: revision 6 after 7",
    )


def test_fields_that_do_not_follow_from_the_ledger_are_named() -> None:
    """With equal ledgers and plans, the fields that differ are the reason."""
    live = summary_of({"1": 5}, plan_revision=3)
    wrong = msgspec.structs.replace(live, cities_reported=9, has_data=False)
    assert change(wrong, live).why == ("equal ledgers, but has_data, cities_reported",)


def test_only_the_first_differences_are_named() -> None:
    """The rest is a number."""
    for count, more in ((NAMED_MAX, ()), (NAMED_MAX + 3, ("and 3 more",))):
        live = summary_of({f"{number:02}": 1 for number in range(count)})
        found = change(live, summary_of({}))
        assert len(found.goes_back) == len(found.why) == NAMED_MAX + len(more)
        assert found.goes_back[NAMED_MAX:] == found.why[NAMED_MAX:] == more
