"""Statistics of a range of dates, as objects and as a pandas table."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import msgspec

from tripfold_client.errors import MissingDependency

if TYPE_CHECKING:
    import pandas as pd

FIGURES = {
    "bus_count": "Int64",
    "passenger_count": "Int64",
    "accident_count": "Int64",
    "exist_accident": "boolean",
    "average_delay_s": "Float64",
    "delay_total_ms": "Int64",
}
"""The figures of a country-day, with their types in a table. A day without data has no figures."""
COMPLETENESS = ("cities_reported", "cities_expected", "cities_suspicious", "complete", "version", "last_ingested_at")


class CountryDay(msgspec.Struct, frozen=True, kw_only=True):
    """The statistics of one country on one date.

    ``known`` says whether it has data: without data the figures are zero and mean nothing. ``complete`` says whether
    every city that the date's plan expects is counted. ``version`` grows with each change of the day.
    """

    country: str
    country_name: str
    date: dt.date
    bus_count: int
    passenger_count: int
    accident_count: int
    exist_accident: bool
    average_delay_s: float
    delay_total_ms: int
    cities_reported: int
    cities_expected: int
    cities_suspicious: int = 0
    complete: bool
    version: int
    last_ingested_at: dt.datetime | None = None
    unreadable: str | None = None

    @property
    def known(self) -> bool:
        """Whether the day has data."""
        return self.cities_reported > 0 or self.bus_count > 0


class Statistics(Sequence[CountryDay]):
    """The country-days of a range, by country and date. A country with any data has every day of the range."""

    def __init__(self, days: Sequence[CountryDay]) -> None:
        self._days = tuple(days)

    @overload
    def __getitem__(self, index: int) -> CountryDay: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CountryDay]: ...
    def __getitem__(self, index: int | slice) -> CountryDay | Sequence[CountryDay]:
        return self._days[index]

    def __len__(self) -> int:
        return len(self._days)

    def __repr__(self) -> str:
        return f"<Statistics of {len(self):,} country-days, {sum(not day.complete for day in self):,} incomplete>"

    def by_country(self) -> dict[str, list[CountryDay]]:
        """Return the days of each country, by its slug."""
        countries: dict[str, list[CountryDay]] = {}
        for day in self:
            countries.setdefault(day.country, []).append(day)
        return countries

    def df(self) -> pd.DataFrame:
        """Return a pandas table with a row for each country-day. A day without data has no figures (``<NA>``).

        Raises MissingDependency if pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415  # it is optional, and takes long to import
        except ImportError as error:
            raise MissingDependency(
                "pandas is not installed. Install it: pip install 'tripfold-client[pandas]', or pip install pandas"
            ) from error
        figures = {
            name: pd.array([getattr(day, name) if day.known else None for day in self], dtype=kind)
            for name, kind in FIGURES.items()
        }
        return pd.DataFrame(
            {
                "country": [day.country for day in self],
                "country_name": [day.country_name for day in self],
                "date": pd.to_datetime([day.date for day in self]),
                **figures,
                **{name: [getattr(day, name) for day in self] for name in COMPLETENESS},
                "unreadable": [day.unreadable for day in self],
            }
        )
