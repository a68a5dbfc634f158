"""Adds up the trips of one city-day: exact integers, and each written delay and departure read once.

A file repeats its delays and departures thousands of times, so what each means is looked up in a dictionary
that the rules fill as new ones come. The dictionaries are emptied when full: a file of nothing but different
delays is slower, never larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from services.ingest.trips import Trip, delay_ms, departure_date
from shared.contribution import Contribution

DELAYS_MAX: Final = 65_536
DEPARTURES_MAX: Final = 100_000
"""More than a day has seconds, so a file of whole seconds never empties the dictionary."""


class Tally:
    """What the trips seen so far add up to. A trip that breaks a rule raises `InvalidTrip` and changes nothing."""

    def __init__(self, date: str) -> None:
        self.trips = 0
        self.trips_on_other_dates = 0
        self._passengers = 0
        self._accidents = 0
        self._delay_total_ms = 0
        self._delays = _Delays()
        self._elsewhen = _Elsewhen(date)
        self._first_moment = datetime.fromisoformat(f"{date}T00:00:00")
        self._last_moment = self._first_moment + (timedelta(days=1) - timedelta(microseconds=1))

    @property
    def contribution(self) -> Contribution:
        """The sums as what the city-day adds to its country-day."""
        return Contribution(
            trips=self.trips,
            passengers=self._passengers,
            accidents=self._accidents,
            delay_total_ms=self._delay_total_ms,
        )

    def add(self, trip: Trip) -> None:
        """Add one trip."""
        delay = self._delays[trip.delay]
        on_another_date = self._elsewhen[trip.departure_time]
        self.trips += 1
        self.trips_on_other_dates += on_another_date
        self._passengers += trip.passengers
        self._accidents += trip.accident
        self._delay_total_ms += delay

    def add_all(self, trips: Sequence[Trip]) -> None:
        """Add all of these trips, or none if one breaks a rule."""
        on_other_dates = sum(map(self._elsewhen.__getitem__, [trip.departure_time for trip in trips]))
        self._add_sums(trips, on_other_dates)

    def add_dated(self, trips: Sequence[DatedTrip], *, fractions: bool) -> bool:
        """Add all of these trips, or none; return whether their dates could be told.

        `fractions` says that some departure may have been written with a fraction of a second. Rounded to
        the microsecond it can have become midnight of the day after, and the date that was written is lost.
        """
        departures = [trip.departure_time for trip in trips]
        first, last = self._first_moment, self._last_moment
        if fractions and any(departure.time() == _MIDNIGHT for departure in departures):
            return False
        on_this_date = sum([first <= departure <= last for departure in departures])
        self._add_sums(trips, len(trips) - on_this_date)
        return True

    def _add_sums(self, trips: Sequence[Trip | DatedTrip], on_other_dates: int) -> None:
        delay_total_ms = sum(map(self._delays.__getitem__, [trip.delay for trip in trips]))
        self.trips += len(trips)
        self.trips_on_other_dates += on_other_dates
        self._passengers += sum([trip.passengers for trip in trips])
        self._accidents += sum([trip.accident for trip in trips])
        self._delay_total_ms += delay_total_ms
