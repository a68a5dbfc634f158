"""The contribution of one city-day to its country-day: integers only, so sums are exact in any order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Annotated

import msgspec

COUNTRY_CITIES_MAX = 2**16
"""A plan has no more cities of one country, so that totals fit into 64 bits."""
TOTAL_MAX = 2**63 - 1
FIGURE_MAX = TOTAL_MAX // COUNTRY_CITIES_MAX
"""The greatest figure of a city-day. As a delay it is 4,459 years: that of 40 million trips, each an hour late."""


class Contribution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The four sums of one file or of several files.

    ``delay_total_ms`` is in whole milliseconds. It is negative if departures were early overall.
    """

    trips: Annotated[int, msgspec.Meta(ge=0, le=FIGURE_MAX)]
    passengers: Annotated[int, msgspec.Meta(ge=0, le=FIGURE_MAX)]
    accidents: Annotated[int, msgspec.Meta(ge=0, le=FIGURE_MAX)]
    delay_total_ms: Annotated[int, msgspec.Meta(ge=-FIGURE_MAX, le=FIGURE_MAX)]


class Totals(Contribution, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The sums of all contributions to a country-day."""

    trips: Annotated[int, msgspec.Meta(ge=0, le=TOTAL_MAX)]
    passengers: Annotated[int, msgspec.Meta(ge=0, le=TOTAL_MAX)]
    accidents: Annotated[int, msgspec.Meta(ge=0, le=TOTAL_MAX)]
    delay_total_ms: Annotated[int, msgspec.Meta(ge=-TOTAL_MAX, le=TOTAL_MAX)]


def figure_beyond(figures: Contribution, limit: int) -> str | None:
    """Return the name of a figure that is beyond ``limit``, or None."""
    found = (name for name, value in msgspec.structs.asdict(figures).items() if abs(value) > limit)
    return next(found, None)


def round_half_even(numerator: int, denominator: int) -> int:
    """Divide two integers and round to the nearest one, ties to even. ``denominator`` is positive.

    ``round(Fraction(...))`` gives the same in five times the time; a file can have millions of distinct delays.
    """
    quotient, remainder = divmod(numerator, denominator)
    above_half = 2 * remainder > denominator
    tie = 2 * remainder == denominator
    return quotient + 1 if above_half or (tie and quotient % 2) else quotient


def average_delay_s(totals: Contribution) -> float:
    """Return the average delay in seconds, exact to the millisecond; 0 without trips."""
    return round_half_even(totals.delay_total_ms, totals.trips) / 1000 if totals.trips else 0.0


NOTHING = Totals(trips=0, passengers=0, accidents=0, delay_total_ms=0)
_figures = tuple((name, attrgetter(name)) for name in Contribution.__struct_fields__)


def total_of(contributions: Sequence[Contribution]) -> Totals:
    """Return the sum of contributions, without intermediate objects: a country may have 10,000 cities."""
    return Totals(**{name: sum(map(figure, contributions)) for name, figure in _figures})
