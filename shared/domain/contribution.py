"""The contribution of one city-day to its country-day: integers only, so sums are exact in any order."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import msgspec


class Contribution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The four sums of one file or of several files.

    ``delay_total_ms`` is in whole milliseconds. It is negative if departures were early overall.
    """

    trips: int
    passengers: int
    accidents: int
    delay_total_ms: int

    def __add__(self, other: Contribution) -> Contribution:
        return Contribution(
            trips=self.trips + other.trips,
            passengers=self.passengers + other.passengers,
            accidents=self.accidents + other.accidents,
            delay_total_ms=self.delay_total_ms + other.delay_total_ms,
        )


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


NOTHING = Contribution(trips=0, passengers=0, accidents=0, delay_total_ms=0)
_figures = tuple((name, attrgetter(name)) for name in Contribution.__struct_fields__)


def total_of(contributions: Sequence[Contribution]) -> Contribution:
    """Return the sum of contributions, without intermediate objects: a country may have 10,000 cities."""
    return Contribution(**{name: sum(map(figure, contributions)) for name, figure in _figures})
