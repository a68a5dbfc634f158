"""Computes the expected summaries from the requests and the upstream, with its own arithmetic."""

from __future__ import annotations

import msgspec

from shared.domain.ids import RequestId
from tests.fakes.builders import City, Trip, UpstreamState


class ExpectedDay(msgspec.Struct, frozen=True, kw_only=True):
    """The expected figures of a country-day's summary."""

    trips: int = 0
    passengers: int = 0
    accidents: int = 0
    delay_total_ms: int = 0
    has_data: bool = False
    cities_reported: int = 0
    cities_expected: int = 0
    complete: bool = False


class Oracle:
    """Computes the summaries of one date and the end of its requests, for a world at rest."""

    def __init__(self) -> None:
        self.statuses: dict[RequestId, str] = {}
        self._cities: tuple[City, ...] | None = None
        self._placed: dict[int, tuple[str, tuple[Trip, ...]]] = {}
        self._countries: set[str] = set()

    def copy(self) -> Oracle:
        """Return an oracle of its own that knows the same."""
        copied = Oracle()
        copied.statuses = dict(self.statuses)
        copied._cities = self._cities
        copied._placed = dict(self._placed)
        copied._countries = set(self._countries)
        return copied

    def requested(self, request_id: RequestId, truth: UpstreamState) -> None:
        """Record a request that is served while the upstream has this state."""
        if truth.cities is None:
            self.statuses[request_id] = "failed"
            return
        self._cities = truth.cities
        failed = False
        for city in truth.cities:
            self._countries.add(city.country.lower())
            file = truth.files.get(city.id)
            if isinstance(file, tuple):
                self._placed[city.id] = (city.country.lower(), file)
            else:
                failed = True
        self.statuses[request_id] = "completed with failures" if failed else "completed"

    def days(self) -> dict[str, ExpectedDay]:
        """Return the expected summary of each country, by slug."""
        return {country: self._day(country) for country in sorted(self._countries)}

    def _day(self, country: str) -> ExpectedDay:
        here = {city_id: trips for city_id, (where, trips) in self._placed.items() if where == country}
        trips = [trip for file in here.values() for trip in file]
        expected = {city.id for city in self._cities or () if city.country.lower() == country}
        return ExpectedDay(
            trips=len(trips),
            passengers=sum(trip.passengers for trip in trips),
            accidents=sum(trip.accident for trip in trips),
            delay_total_ms=sum(trip.delay_ms for trip in trips),
            has_data=bool(here),
            cities_reported=len(expected & set(here)),
            cities_expected=len(expected),
            complete=expected <= set(here),
        )
