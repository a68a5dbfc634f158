"""The laws of the statistics: exact sums, one rounding, every day of a country, ranges, and repaired queries."""

from __future__ import annotations

import datetime as dt
import random
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from urllib.parse import parse_qsl

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from services.api.http.date_range import DateRange
from services.api.middleware.legacy_query import repaired_query
from services.api.statistics import formats
from services.api.statistics.model import CountryStats, month_stats
from shared.domain.contribution import Contribution, average_delay_s, round_half_even, total_of
from shared.domain.ids import CountrySlug
from shared.domain.objects import SummaryHead

# Every decimal of 15 digits survives being a float: averages are exact to the millisecond up to 31,000 years.
delays_ms = st.integers(-(10**15) + 1, 10**15 - 1)
trip_counts = st.integers(1, 10**9)
dates = st.dates(dt.date(2023, 12, 25), dt.date(2024, 3, 5))
countries = st.sampled_from([CountrySlug(slug) for slug in ("armenia", "belgium", "chad")])
contributions = st.builds(
    Contribution,
    trips=st.integers(0, 10**6),
    passengers=st.integers(0, 10**9),
    accidents=st.integers(0, 3),
    delay_total_ms=st.integers(-(10**12), 10**12),
)


@st.composite
def heads(draw: st.DrawFn) -> SummaryHead:
    """Return the head of any country-day, as a fold leaves it: without data, its totals are zero."""
    has_data = draw(st.booleans())
    expected = draw(st.integers(0, 5))
    reported = draw(st.integers(0, expected)) if has_data else 0
    country = draw(countries)
    return SummaryHead(
        date=draw(dates),
        country=country,
        country_name=country.title(),
        version=draw(st.integers(1, 100)),
        totals=total_of([draw(contributions)] if has_data else []),
        has_data=has_data,
        cities_reported=reported,
        cities_expected=expected,
        complete=reported == expected,
        last_ingested_at=None,
        plan_revision=1,
    )


head_lists = st.lists(heads(), unique_by=lambda head: (head.country, head.date))


@st.composite
def ranges(draw: st.DrawFn) -> DateRange:
    """Return any range of at least a day."""
    first, last = sorted((draw(dates), draw(dates)))
    return DateRange(first, last)


def country_stats(drawn: list[SummaryHead], days: DateRange, *, detailed: bool) -> CountryStats:
    """Return the statistics of heads as a client reads them from JSON, made month by month."""
    months = [
        formats.encode_month(
            month_stats([head for head in drawn if head.date in part], part, detailed=detailed),
            formats.JSON,
            detailed=detailed,
        )
        for _, part in days.by_month()
    ]
    parts = formats.encoded_parts(months, formats.JSON, detailed=detailed)
    return msgspec.json.decode(b"".join(parts), type=CountryStats)


@given(st.integers(), st.integers(min_value=1))
def test_averages_round_exactly(numerator: int, denominator: int) -> None:
    """Rounding matches exact fractions: to the nearest, and a tie to the even number."""
    assert round_half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@given(st.integers(-(10**6), 10**6), st.integers(1, 1_000))
def test_ties_round_to_even(half: int, denominator: int) -> None:
    """A tie rounds to the even number, on both sides of zero."""
    assert round_half_even((2 * half + 1) * denominator, 2 * denominator) == (half if half % 2 == 0 else half + 1)


@given(delays_ms, trip_counts)
def test_the_written_average_is_exact(delay_total_ms: int, trips: int) -> None:
    """The number in the response is, digit for digit, the exact average rounded half to even to the millisecond."""
    totals = Contribution(trips=trips, passengers=0, accidents=0, delay_total_ms=delay_total_ms)
    written = Decimal(msgspec.json.encode(average_delay_s(totals)).decode())
    exact_ms = Fraction(delay_total_ms, trips)
    assert written == Decimal(round(exact_ms)).scaleb(-3)
    assert written == written.quantize(Decimal("0.001"), rounding=ROUND_HALF_EVEN)


@given(head_lists, ranges())
def test_a_country_with_data_has_every_day_of_the_range(drawn: list[SummaryHead], days: DateRange) -> None:
    """A country is listed if it has data on any day of the range, with every day of it; all is sorted."""
    inside = [head for head in drawn if head.date in days]
    stats = country_stats(inside, days, detailed=False)
    assert list(stats) == sorted({head.country for head in inside if head.has_data})
    for of_country in stats.values():
        assert list(of_country) == [date.isoformat() for date in days.dates()]


@given(head_lists, ranges())
def test_daily_figures_add_up_to_the_totals(drawn: list[SummaryHead], days: DateRange) -> None:
    """The figures of all days add up to the totals of all heads, and accidents are shown where there are any."""
    inside = [head for head in drawn if head.date in days]
    stats = country_stats(inside, days, detailed=True)
    shown = [day for of_country in stats.values() for day in of_country.values()]
    assert sum(day.bus_count for day in shown) == sum(head.totals.trips for head in inside)
    assert sum(day.passenger_count for day in shown) == sum(head.totals.passengers for head in inside)
    assert all(day.exist_accident == (day.accident_count != 0) for day in shown)


@given(head_lists, ranges(), st.randoms(use_true_random=False))
def test_the_response_does_not_depend_on_the_order_of_heads(
    drawn: list[SummaryHead], days: DateRange, chance: random.Random
) -> None:
    """The response does not depend on the order in which heads were read."""
    inside = [head for head in drawn if head.date in days]
    shuffled = chance.sample(inside, len(inside))
    for detailed in (False, True):
        assert msgspec.json.encode(country_stats(shuffled, days, detailed=detailed)) == msgspec.json.encode(
            country_stats(inside, days, detailed=detailed)
        )


@given(head_lists, ranges())
def test_detail_full_adds_to_the_brief_response(drawn: list[SummaryHead], days: DateRange) -> None:
    """The brief response is the detailed one without details and without countries that are only planned."""
    inside = [head for head in drawn if head.date in days]
    brief = msgspec.to_builtins(country_stats(inside, days, detailed=False))
    full = msgspec.to_builtins(country_stats(inside, days, detailed=True))
    assert brief == {
        country: {
            date: {name: day[name] for name in ("bus_count", "passenger_count", "exist_accident", "average_delay_s")}
            for date, day in of_country.items()
        }
        for country, of_country in full.items()
        if country in {head.country for head in inside if head.has_data}
    }


@given(ranges())
def test_a_range_has_its_days_and_months(days: DateRange) -> None:
    """A range has its days in order, and exactly their months."""
    drawn = list(days.dates())
    assert (drawn[0], drawn[-1], len(drawn)) == (days.first, days.last, days.days)
    months = dict(days.by_month())
    assert days.months() == list(months) == sorted({date.isoformat()[:7] for date in drawn})
    assert [date for part in months.values() for date in part.dates()] == drawn
    assert all(date.isoformat()[:7] == month for month, part in months.items() for date in part.dates())
    assert all(date in days for date in drawn)
    assert days.first - dt.timedelta(days=1) not in days
    assert days.last + dt.timedelta(days=1) not in days


@given(st.binary(max_size=60), st.dates())
def test_a_query_without_an_equals_sign_is_repaired(rest: bytes, last: dt.date) -> None:
    """A query whose ``to`` lacks the equals sign is repaired, and a correct query is unchanged."""
    before = rest.replace(b"&", b"").replace(b"to", b"") + b"&" if rest else b""
    odd = before + f"to{last}".encode()
    whole = before + f"to={last}".encode()
    assert repaired_query(odd) == whole
    assert repaired_query(whole) == whole
    assert ("to", last.isoformat()) in parse_qsl(repaired_query(odd).decode("latin-1"))
