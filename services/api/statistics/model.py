"""The statistics of a country-day, computed from the head of its summary. Pure.

All arithmetic before the last step uses integers: sums are exact, and an average is rounded once, half to even.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec
from msgspec import UNSET, UnsetType

from services.api.http.date_range import DateRange
from services.api.http.unreadable import UnreadableObject
from shared.domain import keys
from shared.domain.contribution import NOTHING, average_delay_s
from shared.domain.objects import Summary, SummaryHead

_BUS_COUNT = "Departures of the day: trips, not vehicles. A bus that drives ten trips counts ten times."


class DayStats(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one country on one date. A day without data has zeros and ``false``.

    The first four fields are always present. The others show the sums and the completeness of the day; only
    `detail=full` and ledgers have them. There, ``version`` 0 marks a day that was never requested.
    """

    bus_count: Annotated[int, msgspec.Meta(ge=0, description=_BUS_COUNT, examples=[1250])]
    passenger_count: Annotated[int, msgspec.Meta(ge=0, description="Passengers of all trips.", examples=[48211])]
    exist_accident: Annotated[bool, msgspec.Meta(description="Whether any trip had an accident.", examples=[True])]
    average_delay_s: Annotated[
        float,
        msgspec.Meta(
            description="Total delay divided by trips, in seconds, rounded half to even to the millisecond; "
            "negative when buses were early on the whole; 0 without trips.",
            examples=[61.304],
        ),
    ]
    country_name: Annotated[
        str | UnsetType,
        msgspec.Meta(description="The country's name, as the upstream writes it.", examples=["Armenia"]),
    ] = UNSET
    accident_count: Annotated[
        int | UnsetType, msgspec.Meta(description="Trips that had an accident.", examples=[3])
    ] = UNSET
    delay_total_ms: Annotated[
        int | UnsetType, msgspec.Meta(description="The sum of all delays, in milliseconds: exact.", examples=[76630000])
    ] = UNSET
    cities_reported: Annotated[
        int | UnsetType, msgspec.Meta(description="Cities of the plan whose file is counted.", examples=[11])
    ] = UNSET
    cities_expected: Annotated[
        int | UnsetType, msgspec.Meta(description="Cities that the date's plan expects.", examples=[12])
    ] = UNSET
    complete: Annotated[
        bool | UnsetType, msgspec.Meta(description="Whether every expected city is counted.", examples=[False])
    ] = UNSET
    version: Annotated[
        int | UnsetType,
        msgspec.Meta(
            description="Increases with every change of the day; 0: the day was never requested, or is unreadable.",
            examples=[1680934212],
        ),
    ] = UNSET
    last_ingested_at: Annotated[
        dt.datetime | UnsetType | None,
        msgspec.Meta(description="When the newest counted file was ingested; null: no file is counted."),
    ] = UNSET
    unreadable: Annotated[
        str | UnsetType | None,
        msgspec.Meta(
            description="Why the stored day cannot be read, and what to do. Ignore its zeros. null: it is readable."
        ),
    ] = UNSET
    cities_suspicious: Annotated[
        int | UnsetType,
        msgspec.Meta(description="Counted cities whose file has an unusual volume; the ledger says why.", examples=[0]),
    ] = UNSET


CountryStats = dict[str, dict[str, DayStats]]


class MonthStats(NamedTuple):
    """The statistics of some days of a month: for each country with a summary, every one of the days.

    ``shown`` are the countries that a response shows because of this month. ``names`` has their latest names.
    """

    days: DateRange
    shown: frozenset[str]
    names: dict[str, str]
    by_country: dict[str, dict[str, DayStats]]


def month_stats(
    heads: Iterable[SummaryHead],
    days: DateRange,
    *,
    detailed: bool,
    unreadable: Iterable[UnreadableObject] = (),
) -> MonthStats:
    """Return the statistics of some days of a month from the heads of its summaries.

    A country with data on any day is shown; other countries are left out. ``detailed`` also shows countries with a
    planned or unreadable day. Otherwise, unreadable days are left out.
    """
    by_country: dict[str, dict[dt.date, SummaryHead]] = {}
    shown: set[str] = set()
    for head in heads:
        by_country.setdefault(head.country, {})[head.date] = head
        if head.has_data or (detailed and head.cities_expected):
            shown.add(head.country)
    damaged: dict[str, dict[dt.date, str]] = {}
    for one in unreadable:
        named = keys.parse_summary(one.key)
        if named is not None:
            damaged.setdefault(named[1], {})[named[0]] = one.reason
    dates = [(date, date.isoformat()) for date in days.dates()]
    names = {country: of_country[max(of_country)].country_name for country, of_country in by_country.items()}
    statistics: dict[str, dict[str, DayStats]] = {}
    for country in by_country.keys() | damaged.keys():
        of_country, reasons = by_country.get(country, {}), damaged.get(country, {})
        if detailed:
            name = names.get(country, country)
            statistics[country] = {
                text: day_detail(of_country.get(date), country_name=name, unreadable=reasons.get(date))
                for date, text in dates
            }
        else:
            statistics[country] = {text: day_stats(of_country.get(date)) for date, text in dates if date not in reasons}
    return MonthStats(days, frozenset(shown | damaged.keys() if detailed else shown), names, statistics)


def days_without_data(days: DateRange, *, detailed: bool, country_name: str) -> dict[str, DayStats]:
    """Return the statistics of days of which a country has no summary."""
    day = day_detail(None, country_name=country_name) if detailed else _NO_DATA
    return {date.isoformat(): day for date in days.dates()}


def day_stats(head: SummaryHead | None) -> DayStats:
    """Return the statistics of a day. ``head`` is None for a day without a summary."""
    if head is None:
        return _NO_DATA
    totals = head.totals
    return DayStats(
        bus_count=totals.trips,
        passenger_count=totals.passengers,
        exist_accident=totals.accidents > 0,
        average_delay_s=average_delay_s(totals),
    )


def day_detail(head: SummaryHead | Summary | None, *, country_name: str, unreadable: str | None = None) -> DayStats:
    """Return the detailed statistics of a day. ``country_name`` is used for a day without a summary."""
    totals = head.totals if head else NOTHING
    return DayStats(
        bus_count=totals.trips,
        passenger_count=totals.passengers,
        exist_accident=totals.accidents > 0,
        average_delay_s=average_delay_s(totals),
        country_name=head.country_name if head else country_name,
        accident_count=totals.accidents,
        delay_total_ms=totals.delay_total_ms,
        cities_reported=head.cities_reported if head else 0,
        cities_expected=head.cities_expected if head else 0,
        cities_suspicious=(head.cities_suspicious or 0) if head else 0,
        complete=head.complete if head else False,
        version=head.version if head else 0,
        last_ingested_at=_in_utc(head.last_ingested_at) if head else None,
        unreadable=unreadable,
    )


def _in_utc(instant: dt.datetime | None) -> dt.datetime | None:
    """Return an instant as a table has it. Equal ETags mean equal bytes, wherever a head was read."""
    return None if instant is None else instant.astimezone(dt.UTC)


_NO_DATA = DayStats(bus_count=0, passenger_count=0, exist_accident=False, average_delay_s=0.0)
