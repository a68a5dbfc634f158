"""What one city-day adds to its country-day: integers only, so sums are exact in any order."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Contribution(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The four sums of one file, or of several files added together.

    ``delay_total_ms`` is in whole milliseconds and negative when departures were early on the whole.
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


NOTHING = Contribution(trips=0, passengers=0, accidents=0, delay_total_ms=0)


def total_of(contributions: Iterable[Contribution]) -> Contribution:
    """Add contributions up: a country may have 10,000, and none is made on the way."""
    trips = passengers = accidents = delay_total_ms = 0
    for one in contributions:
        trips += one.trips
        passengers += one.passengers
        accidents += one.accidents
        delay_total_ms += one.delay_total_ms
    return Contribution(trips=trips, passengers=passengers, accidents=accidents, delay_total_ms=delay_total_ms)
