"""Judges whether the volume of a city-day is suspicious: far from what the city usually has on this weekday. Pure."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from statistics import median

import msgspec

WEEKS_COMPARED = 8
DAYS_NEEDED = 3
"""With fewer earlier days there is no judgement."""

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Volume(msgspec.Struct, frozen=True):
    """The trips and the bytes of a city-day."""

    trips: int
    size_bytes: int


class VolumeRules(msgspec.Struct, frozen=True, kw_only=True):
    """The volumes that are not suspicious: from ``ratio_min`` to ``ratio_max`` times the usual one.

    A city-day is exempt if both it and the usual one have fewer trips than ``trips_min``. Refuse a suspicious file if
    ``quarantined``. Otherwise count it with a mark.
    """

    ratio_min: float = 0.65
    ratio_max: float = 3.0
    trips_min: int = 1_000
    quarantined: bool = False


def dates_compared(date: dt.date) -> list[dt.date]:
    """Return the last eight dates of the same weekday, the latest first."""
    return [date - dt.timedelta(weeks=weeks) for weeks in range(1, WEEKS_COMPARED + 1)]


def suspicion_of(date: dt.date, file: Volume, earlier: Sequence[Volume], rules: VolumeRules) -> str | None:
    """Return why the volume of a file is suspicious, or None. ``earlier`` has the known volumes of `dates_compared`.

    The usual volume is their median, so that up to three days of an outage or a feast do not change it much.
    """
    if len(earlier) < DAYS_NEEDED:
        return None
    usual_trips = median(one.trips for one in earlier)
    if max(file.trips, usual_trips) < rules.trips_min:
        return None
    usual_bytes = median(one.size_bytes for one in earlier)
    for what, found, usual in (("trips", file.trips, usual_trips), ("bytes", file.size_bytes, usual_bytes)):
        if not rules.ratio_min * usual <= found <= rules.ratio_max * usual:
            return f"{found:,} {what}; usual on a {_WEEKDAYS[date.weekday()]} are {usual:,.0f}"
    return None
