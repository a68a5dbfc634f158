"""The rows of a summary, and the tag of a set of summaries."""

from __future__ import annotations

import datetime as dt

import pytest

from shared.domain import keys
from shared.domain.contribution import Contribution, Totals
from shared.domain.ids import EXACT_MAX, CityId, CountrySlug
from shared.domain.objects import CorruptObject, LedgerEntry, Summary
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Table, city_rows, country_row, tag_of

DAY = dt.date(2024, 5, 1)
NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)
CHAD = CountrySlug("chad")
SUMMARY = Summary(
    date=DAY,
    country=CHAD,
    country_name="Chad",
    version=7,
    totals=Totals(trips=2, passengers=90, accidents=1, delay_total_ms=3_001),
    has_data=True,
    cities_reported=1,
    cities_expected=2,
    last_ingested_at=NOON,
    plan_revision=3,
    ledger={
        CityId("2"): LedgerEntry(revision=5),
        CityId("10"): LedgerEntry(
            revision=4,
            city_name="Mao",
            contribution=Contribution(trips=2, passengers=90, accidents=1, delay_total_ms=3_001),
            sha256="ab",
            ingested_at=NOON,
        ),
    },
)


def test_a_country_day_has_the_figures_and_the_origin_of_its_summary() -> None:
    """Each column has the value of the summary, its generation or its ETag."""
    row = dict(zip(COUNTRY_DAYS.names, country_row(SUMMARY, (1, '"e"'), "key"), strict=True))
    assert row == {
        "date": DAY,
        "country": "chad",
        "country_name": "Chad",
        "trips": 2,
        "passengers": 90,
        "accidents": 1,
        "delay_total_ms": 3_001,
        "average_delay_s": 1.5,  # 1,500.5 ms, rounded half to even
        "has_data": True,
        "complete": False,
        "cities_reported": 1,
        "cities_expected": 2,
        "cities_suspicious": None,
        "last_ingested_at": NOON,
        "version": 7,
        "plan_revision": 3,
        "schema_version": 1,
        "generation": 1,
        "summary_etag": '"e"',
    }


def test_a_city_day_has_its_figures_and_its_source() -> None:
    """A city that has left the country has no row."""
    [row] = city_rows(SUMMARY, (1, '"e"'))
    assert dict(zip(CITY_DAYS.names, row, strict=True)) == {
        "date": DAY,
        "country": "chad",
        "city_id": "10",
        "country_name": "Chad",
        "city_name": "Mao",
        "trips": 2,
        "passengers": 90,
        "accidents": 1,
        "delay_total_ms": 3_001,
        "average_delay_s": 1.5,
        "trips_on_other_dates": 0,
        "suspicious": None,
        "revision": 4,
        "sha256": "ab",
        "ingested_at": NOON,
        "manifest_key": keys.manifest(DAY, CityId("10")),
        "generation": 1,
    }


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_each_figure_of_a_contribution_has_a_column(table: Table) -> None:
    """A new figure needs a column, or every month that has a table would show 0 for it."""
    figures = Contribution.__struct_fields__
    assert figures == Totals.__struct_fields__
    assert set(figures) <= set(table.names)


def test_totals_that_cannot_be_served_are_corrupt() -> None:
    """One wrong summary is named, and does not stop the table of its month."""
    totals = Totals(trips=1, passengers=0, accidents=0, delay_total_ms=-EXACT_MAX - 1)
    wrong = Summary(date=DAY, country=CHAD, version=1, totals=totals)
    with pytest.raises(
        CorruptObject, match="the-key has -9007199254740992 as delay_total_ms; at most 9007199254740991"
    ):
        country_row(wrong, (1, '"e"'), "the-key")


def test_a_tag_names_generation_and_etag_of_every_summary() -> None:
    """The order of the summaries does not matter; anything else does."""
    versions = {(DAY, CHAD): (1, "a"), (DAY, CountrySlug("peru")): (1, "b")}
    others = [
        {(DAY, CHAD): (1, "a")},
        {**versions, (DAY, CHAD): (1, "b")},
        {**versions, (DAY, CHAD): (2, "a")},
        {(DAY, CHAD): (1, "a"), (DAY, CountrySlug("togo")): (1, "b")},
    ]
    assert tag_of(dict(reversed(versions.items()))) == tag_of(versions)
    assert tag_of(versions) not in map(tag_of, others)
