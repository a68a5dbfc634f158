"""The rules of a trip: what a delay is worth, which date a departure is on, and which records are no trips."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest

from services.ingest.parsing.totals import TripTotals
from services.ingest.parsing.trips import DatedTrip, InvalidTrip, Trip, delay_ms, departure_date, parse_trip

RECORD: dict[str, Any] = {
    "departure-time": "2024-05-01T01:23:00",
    "bus-type": "BUS-105",
    "passengers": 45,
    "delay": "PT4080S",
    "accident": False,
}
DAY_MS = 86_400_000


@pytest.mark.parametrize(
    ("written", "expected_ms"),
    [
        ("PT4080S", 4_080_000),
        ("PT0S", 0),
        ("-PT0S", 0),
        ("PT1H8M", 4_080_000),
        ("P1D", DAY_MS),
        ("P1W", 7 * DAY_MS),
        ("P1W2DT3H4M5S", 9 * DAY_MS + 11_045_000),
        ("PT0001S", 1_000),
        ("P1.5D", 36 * 3_600_000),
        ("PT1.5M", 90_000),
        ("PT1M30,25S", 90_250),
        ("P366D", 366 * DAY_MS),
        ("-P366D", -366 * DAY_MS),
    ],
)
def test_a_duration_is_converted_to_milliseconds(written: str, expected_ms: int) -> None:
    """Weeks, days, hours, minutes and seconds add up, the last with a fraction after a point or a comma."""
    assert delay_ms(written) == expected_ms


@pytest.mark.parametrize(
    ("written", "expected_ms"),
    [
        ("-PT5M", -300_000),
        ("+PT5M", 300_000),
        ("PT-4080S", -4_080_000),
        ("PT-1H-8M", -4_080_000),
        ("PT-6H+3M", -21_420_000),
        ("-PT-6H+3M", 21_420_000),
        ("PT1M-0.5S", 59_500),
        ("PT-0.5S", -500),
    ],
)
def test_the_signs_of_a_duration_multiply(written: str, expected_ms: int) -> None:
    """A sign before the whole and a sign before a number both count, so an early departure is negative."""
    assert delay_ms(written) == expected_ms


@pytest.mark.parametrize(
    ("written", "expected_ms"),
    [
        ("PT0.0004S", 0),
        ("PT0.0005S", 0),
        ("PT0.0005000000000000001S", 1),
        ("PT0.0015S", 2),
        ("PT0.0025S", 2),
        ("-PT0.0015S", -2),
        ("-PT0.0025S", -2),
        ("PT1M0.0025S", 60_002),
        ("PT0.00000001H", 0),
    ],
)
def test_a_delay_is_rounded_once_half_to_even(written: str, expected_ms: int) -> None:
    """A fraction of a millisecond is rounded from all its digits, and an exact half to even."""
    assert delay_ms(written) == expected_ms


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("", "expected a duration"),
        ("P", "names no time"),
        ("PT", "nothing follows the T"),
        ("P1DT", "nothing follows the T"),
        ("-", "expected a duration"),
        ("P1Y", "expected a duration"),
        ("P1M", "expected a duration"),
        ("P1", "expected a duration"),
        ("1H", "expected a duration"),
        ("PT1S1H", "expected a duration"),
        ("P1H", "expected a duration"),
        ("PT1D", "expected a duration"),
        ("PT.5S", "expected a duration"),
        ("PT1.S", "expected a duration"),
        ("PT1e3S", "expected a duration"),
        ("PT--1S", "expected a duration"),
        ("pt1s", "expected a duration"),
        ("PT1s", "expected a duration"),
        (" PT1S", "expected a duration"),
        ("PT1S\n", "expected a duration"),
        ("PT1S\0", "expected a duration"),
        ("PT٣S", "expected a duration"),
        ("PT1ſ", "expected a duration"),
        ("PT1.5H3M", "only the last number"),
        ("P367D", "at most 366 days"),
        ("-P366DT0.001S", "at most 366 days"),
        ("P366DT0.0000001S", "at most 366 days"),
        ("PT" + "9" * 62 + "S", "at most 64 characters"),
    ],
)
def test_an_invalid_duration_is_refused(written: str, reason: str) -> None:
    """Years, months, lower case, misplaced fractions, absurd lengths and the empty duration are no delays."""
    with pytest.raises(InvalidTrip, match=reason) as refused:
        delay_ms(written)
    assert refused.value.field == "delay"
    assert refused.value.value == written


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("2024-05-01T01:23:00", "2024-05-01"),
        ("2024-05-01T01:23", "2024-05-01"),
        ("2024-05-01 01:23:00", "2024-05-01"),
        ("2024-05-01t01:23:00z", "2024-05-01"),
        ("2024-05-01T23:59:59.9999999", "2024-05-01"),
        ("2024-05-01T23:30:00-05:00", "2024-05-01"),
        ("2024-05-01T00:30:00+0530", "2024-05-01"),
        ("2024-02-29T00:00:00", "2024-02-29"),
    ],
)
def test_the_date_of_a_departure_is_the_date_written(written: str, expected: str) -> None:
    """Neither an offset nor the rounding of a fraction moves a departure to another date."""
    assert departure_date(written) == expected


@pytest.mark.parametrize(
    "written",
    [
        "",
        "2024-05-01",
        "20240501T012300",
        "2024-05-01T01",
        "2024-05-01T1:23:00",
        "2024-05-01T24:00:00",
        "2024-05-01T23:60:00",
        "2024-05-01T23:59:60",
        "2024-02-30T00:00:00",
        "2023-02-29T00:00:00",
        "0000-01-01T00:00:00",
        "2024-05-01T01:23:00.",
        "2024-05-01T01:23.5",
        "2024-05-01T01:23:00+24:00",
        "2024-05-01T01:23:00+5",
        "2024-05-01T01:23:00\n",
        "2024-05-01T01:23:00\0more",
        "2024-W18-3T01:23:00",
        "٢٠٢٤-05-01T01:23:00",
    ],
)
def test_an_invalid_departure_time_is_refused(written: str) -> None:
    """A departure time has a date that exists and a time of that day."""
    with pytest.raises(InvalidTrip) as refused:
        departure_date(written)
    assert refused.value.field == "departure-time"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("passengers", True, "Expected `int`, got `bool`"),
        ("passengers", "45", "Expected `int`, got `str`"),
        ("passengers", Decimal("45.0"), "Expected `int`, got `float`"),
        ("passengers", None, "Expected `int`, got `null`"),
        ("passengers", -1, "Expected `int` >= 0"),
        ("passengers", 1_000_001, "Expected `int` <= 1000000"),
        ("passengers", 10**600, "Expected `int` <= 1000000|out of range"),
        ("bus-type", 105, "Expected `str`, got `int`"),
        ("delay", {}, "Expected `str`, got `object`"),
        ("departure-time", [], "Expected `str`, got `array`"),
        ("accident", 0, "Expected `bool`, got `int`"),
        ("accident", "false", "Expected `bool`, got `str`"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(field: str, value: object, reason: str) -> None:
    """Nothing is converted: the error names the field, its value and the type that was expected."""
    with pytest.raises(InvalidTrip, match=reason) as refused:
        parse_trip(RECORD | {field: value})
    assert (refused.value.field, refused.value.value) == (field, value)


@pytest.mark.parametrize("field", list(RECORD))
def test_every_field_is_required(field: str) -> None:
    """A record that lacks one of the five fields is no trip."""
    with pytest.raises(InvalidTrip, match="missing") as refused:
        parse_trip({name: value for name, value in RECORD.items() if name != field})
    assert refused.value.field == field


@pytest.mark.parametrize("passengers", [0, 1_000_000])
def test_passengers_may_be_0_to_a_million(passengers: int) -> None:
    """Both bounds of the number of passengers are allowed."""
    assert parse_trip(RECORD | {"passengers": passengers}).passengers == passengers


def test_totals_refuse_an_invalid_date() -> None:
    """The date of a file is written as YYYY-MM-DD, or the file cannot be folded."""
    for date in ("2024-5-1", "20240501", "2024-02-30", ""):
        with pytest.raises(ValueError, match=r"date|isoformat|day"):
            TripTotals(date)


def test_a_trip_that_breaks_a_rule_changes_no_sum() -> None:
    """A window with one bad delay adds nothing, whichever way it is added."""
    good = msgspec.convert(RECORD, Trip)
    bad = msgspec.structs.replace(good, delay="P1Y")
    dated = [msgspec.convert(RECORD, DatedTrip), msgspec.convert(RECORD | {"delay": "P1Y"}, DatedTrip)]
    totals = TripTotals("2024-05-01")
    totals.add(good)
    before = (totals.contribution, totals.trips_on_other_dates)
    with pytest.raises(InvalidTrip):
        totals.add(bad)
    with pytest.raises(InvalidTrip):
        totals.add_all([good, bad], on_other_dates=0)
    with pytest.raises(InvalidTrip):
        totals.add_all(dated, on_other_dates=0)
    assert (totals.contribution, totals.trips_on_other_dates) == before


def test_caches_of_totals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of nothing but different delays and departures adds up, and its dictionaries stay within their bounds."""
    monkeypatch.setattr("services.ingest.parsing.totals.DELAYS_MAX", 50)
    monkeypatch.setattr("services.ingest.parsing.totals.DEPARTURES_MAX", 60)
    totals = TripTotals("2024-05-01")
    trips = [
        msgspec.convert(
            RECORD | {"delay": f"PT0H{number}S", "departure-time": f"2024-05-0{number % 2 + 1}T01:00:00.{number}"}, Trip
        )
        for number in range(1000)
    ]
    totals.add_all(trips, on_other_dates=totals.count_on_other_dates(trips))
    assert totals.contribution.delay_total_ms == 1000 * 999 * 1000 // 2
    assert totals.trips_on_other_dates == 500
    assert len(totals._delays) <= 50
    assert len(totals._on_another_date) <= 60
