"""Ranges of dates: validation, and their days and months. Pure."""

from __future__ import annotations

import calendar
import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from typing import NewType

import msgspec

from services.api.http.errors import InvalidParameter, InvalidRequest
from shared.domain import keys

DaysMax = NewType("DaysMax", int)
"""The maximum number of days in a range: litestar injects it by this type."""


class DateRange(msgspec.Struct, frozen=True):
    """The days from ``first`` to ``last``, both included; ``first`` is not after ``last``."""

    first: dt.date
    last: dt.date

    def __contains__(self, date: dt.date) -> bool:
        return self.first <= date <= self.last

    @property
    def days(self) -> int:
        """The number of days, at least one."""
        return (self.last - self.first).days + 1

    def dates(self) -> Iterator[dt.date]:
        """Yield the days in order."""
        return (self.first + dt.timedelta(days=index) for index in range(self.days))

    def months(self) -> list[str]:
        """Return the months of the days in order, as ``YYYY-MM``."""
        return [month for month, _ in self.by_month()]

    def by_month(self) -> Iterator[tuple[str, DateRange]]:
        """Yield the months of the days in order, as ``YYYY-MM``, each with its days of the range."""
        first = self.first
        while first <= self.last:
            last_of_month = first.replace(day=calendar.monthrange(first.year, first.month)[1])
            last = min(self.last, last_of_month)
            yield keys.month_of(first), DateRange(first, last)
            if last == dt.date.max:
                return
            first = last + dt.timedelta(days=1)


DATE_FIRST = dt.date(2000, 1, 1)
DAYS_AHEAD_MAX = 366


class ProcessableDates(msgspec.Struct, frozen=True):
    """The dates that may be processed: from ``first`` to ``days_ahead_max`` days after today (UTC)."""

    clock: Callable[[], dt.datetime]
    first: dt.date = DATE_FIRST
    days_ahead_max: int = DAYS_AHEAD_MAX

    @property
    def last(self) -> dt.date:
        """The last date that may be processed today."""
        return self.clock().date() + dt.timedelta(days=self.days_ahead_max)

    def check(self, requested: Mapping[str, dt.date]) -> None:
        """Raise InvalidRequest if a date is out of range. ``requested`` has the dates by parameter."""
        last = self.last
        out_of_range = [
            InvalidParameter(
                name=name,
                reason=f"{date} is not between {self.first} and {last}. Use a date in this range",
            )
            for name, date in requested.items()
            if not self.first <= date <= last
        ]
        if out_of_range:
            raise InvalidRequest(*out_of_range)


def date_range(first: dt.date, last: dt.date, *, days_max: int) -> DateRange:
    """Return the range from ``first`` to ``last``.

    Raises InvalidRequest if it ends before it begins, or has more than ``days_max`` days.
    """
    if first > last:
        raise InvalidRequest(InvalidParameter(name="from", reason=f"{first} is after to={last}: swap the two"))
    days = DateRange(first, last)
    if days.days > days_max:
        latest = first + dt.timedelta(days=days_max - 1)
        raise InvalidRequest(
            InvalidParameter(
                name="to",
                reason=f"from {first} to {last} are {days.days} days, and one request may have at most {days_max}. "
                f"Use to={latest}, and request the rest separately",
            )
        )
    return days
