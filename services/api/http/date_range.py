"""Ranges of dates: which there can be, their days and their months. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping

import msgspec

from services.api.http.errors import InvalidParameter, InvalidRequest
from shared.runtime.settings import PREFIX


class DateRange(msgspec.Struct, frozen=True):
    """The days from ``first`` to ``last``, both included; ``first`` is not after ``last``."""

    first: dt.date
    last: dt.date

    def __contains__(self, date: dt.date) -> bool:
        return self.first <= date <= self.last

    @property
    def days(self) -> int:
        """How many days the range has: at least one."""
        return (self.last - self.first).days + 1

    def dates(self) -> Iterator[dt.date]:
        """Yield the days in order."""
        return (self.first + dt.timedelta(days=place) for place in range(self.days))

    def months(self) -> Iterator[str]:
        """Yield the months that the range touches, in order, as ``YYYY-MM``."""
        months = range(self.first.year * 12 + self.first.month - 1, self.last.year * 12 + self.last.month)
        return (f"{month // 12:04d}-{month % 12 + 1:02d}" for month in months)


class ProcessableDates(msgspec.Struct, frozen=True):
    """The dates that may be processed: from ``first`` to so many days after today (UTC)."""

    first: dt.date
    days_ahead_max: int
    clock: Callable[[], dt.datetime]

    def check(self, asked: Mapping[str, dt.date]) -> None:
        """Raise InvalidRequest that names each date of ``asked``, by parameter, outside of the range."""
        last = self.clock().date() + dt.timedelta(days=self.days_ahead_max)
        refused = [
            InvalidParameter(
                name=name,
                reason=f"{date} is not between {self.first} and {last}: ask for a date in between, or have "
                f"{PREFIX}API_DATE_FIRST or {PREFIX}API_DAYS_AHEAD_MAX changed",
            )
            for name, date in asked.items()
            if not self.first <= date <= last
        ]
        if refused:
            raise InvalidRequest(*refused)


def date_range(first: dt.date, last: dt.date, *, days_max: int) -> DateRange:
    """Return the range that a query asks for.

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
                reason=f"from {first} to {last} are {days.days} days, and one query takes at most {days_max}: "
                f"ask for to={latest} and for the rest in another query",
            )
        )
    return days


def asked_range(date: dt.date | None, first: dt.date | None, last: dt.date | None, *, days_max: int) -> DateRange:
    """Return the range that is asked for by ``from`` and ``to`` instead of ``date``.

    Raises InvalidRequest unless it is exactly these two, in order, and at most ``days_max`` days.
    """
    if date is not None:
        raise InvalidRequest(InvalidParameter(name="date", reason="it is given beside from or to: leave it out"))
    if first is None and last is None:
        reason = "it is required, and is missing; for example: date=2024-05-01, or from=2024-05-01&to=2024-05-07"
        raise InvalidRequest(InvalidParameter(name="date", reason=reason))
    if first is None or last is None:
        missing = "from" if first is None else "to"
        raise InvalidRequest(InvalidParameter(name=missing, reason="it is missing: from and to come together"))
    return date_range(first, last, days_max=days_max)
