"""Totals the trips of one city-day in exact integers, and parses each distinct delay and departure once.

A file repeats its delays and departures thousands of times. Two dictionaries keep the parsed value of each text. A
full dictionary is emptied, so a file of distinct delays takes more time but no more memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import date as calendar_date
from datetime import datetime, time
from typing import Annotated, Final

import msgspec

from services.ingest.parsing.trips import (
    DELAY_MAX_MS,
    DatedTrip,
    InvalidTrip,
    Trip,
    delay_ms,
    departure_date,
    rule_version,
)
from shared.domain.contribution import Contribution

DELAYS_MAX: Final = 65_536
DEPARTURES_MAX: Final = 100_000
"""More than the seconds of a day, so a file of whole seconds never empties the dictionary."""
DEPARTURE_KEPT_MAX_CHARACTERS: Final = 64
OTHER_DATE: Final = "the trip departs on another date than the file's"


class TripTotals:
    """The totals of the trips so far, for a file of one date (``YYYY-MM-DD``).

    A trip that breaks a rule raises `InvalidTrip` and does not change the totals.
    """

    def __init__(self, date: str, *, other_dates_are_bad: bool = False) -> None:
        day = calendar_date.fromisoformat(date)
        if day.isoformat() != date:
            raise ValueError(f"expected a date such as 2024-05-01, got {date!r}")
        self.date = date
        self.rule_version = rule_version()
        self._day = day
        self._day_begins = datetime.combine(day, time.min)
        self._day_ends = datetime.combine(day, time.max)
        self._other_dates_are_bad = other_dates_are_bad
        self.trips = 0
        self.trips_on_other_dates = 0
        self._passengers = 0
        self._accidents = 0
        self._delay_total_ms = 0
        self._delays = _Delays()
        self._on_another_date = _OnAnotherDate(date)

    @property
    def contribution(self) -> Contribution:
        """The totals as the city-day's contribution to its country-day."""
        return Contribution(
            trips=self.trips,
            passengers=self._passengers,
            accidents=self._accidents,
            delay_total_ms=self._delay_total_ms,
        )

    def add(self, trip: Trip) -> None:
        """Add one trip."""
        delay = self._delays[trip.delay]
        on_another_date = self._on_another_date[trip.departure_time]
        if on_another_date and self._other_dates_are_bad:
            raise InvalidTrip(OTHER_DATE, field="departure-time", value=trip.departure_time)
        self.trips += 1
        self.trips_on_other_dates += on_another_date
        self._passengers += trip.passengers
        self._accidents += trip.accident
        self._delay_total_ms += delay

    def add_all(self, trips: Sequence[Trip] | Sequence[DatedTrip], *, on_other_dates: int) -> None:
        """Add all of these trips, or none if one breaks a rule; so many of them depart on another date."""
        if on_other_dates and self._other_dates_are_bad:
            raise InvalidTrip(OTHER_DATE, field="departure-time")
        delay_total_ms = self._sum_delays_ms([trip.delay for trip in trips])
        self.trips += len(trips)
        self.trips_on_other_dates += on_other_dates
        self._passengers += sum([trip.passengers for trip in trips])
        self._accidents += len([trip for trip in trips if trip.accident])
        self._delay_total_ms += delay_total_ms

    def count_on_other_dates(self, trips: Sequence[Trip]) -> int:
        """Return how many depart on another date than the file's. Raises `InvalidTrip`."""
        return sum(map(self._on_another_date.__getitem__, [trip.departure_time for trip in trips]))

    def count_dated_on_other_dates(self, trips: Sequence[DatedTrip]) -> int:
        """Return how many depart on another date than the file's, as their decoder read them."""
        departures = [trip.departure_time for trip in trips]
        # In most files the first and the last departure are on the date. Checking these two takes half the time.
        with suppress(TypeError):  # a departure that is written with an offset has no place beside midnight here
            if self._day_begins <= min(departures) and max(departures) <= self._day_ends:
                return 0
        return len(departures) - [departure.date() for departure in departures].count(self._day)

    def _sum_delays_ms(self, delays: list[str]) -> int:
        """Return the sum, at once if all delays are whole seconds and nothing else, such as ``PT4080S``."""
        written = ",".join(delays).encode()
        if (
            written.translate(None, b"0123456789") == b"PTS," * (len(delays) - 1) + b"PTS"
            # Then every digit is between a T and an S.
            and written.count(b"S,PT") == len(delays) - 1
            and written.startswith(b"PT")
            and written.endswith(b"S")
        ):
            with suppress(msgspec.MsgspecError):
                return 1000 * sum(_whole_seconds.decode(b"[%b]" % written.translate(None, b"PTS")))
        return sum(map(self._delays.__getitem__, delays))


_whole_seconds: Final = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, le=DELAY_MAX_MS // 1000)]])


class _Delays(dict[str, int]):
    """Milliseconds by the text of a delay, computed on first use."""

    def __missing__(self, written: str) -> int:
        if len(self) >= DELAYS_MAX:
            self.clear()
        self[written] = delay = delay_ms(written)
        return delay


class _OnAnotherDate(dict[str, bool]):
    """Whether a departure time is on another date than the file's, by its text, computed on first use."""

    def __init__(self, date: str) -> None:
        super().__init__()
        self._date = date

    def __missing__(self, written: str) -> bool:
        on_another_date = departure_date(written) != self._date
        if len(self) >= DEPARTURES_MAX:
            self.clear()
        # A departure with many fractional digits is valid but rare, and would take much memory.
        if len(written) <= DEPARTURE_KEPT_MAX_CHARACTERS:
            self[written] = on_another_date
        return on_another_date
