"""Recomputes country statistics from the upstream's files, with the standard library only.

It is slow and simple, and shares no code with the services. It reads files of the reference upstream: an array of flat
records.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

WINDOW_BYTES = 1 << 20

_DURATION = re.compile(
    r"(?P<sign>-)?P(?:(?P<days>[\d.]+)D)?(?:T(?:(?P<hours>[\d.]+)H)?(?:(?P<minutes>[\d.]+)M)?(?:(?P<seconds>[\d.]+)S)?)?"
)
_UNIT_MS = {"days": 86_400_000, "hours": 3_600_000, "minutes": 60_000, "seconds": 1000}


@dataclass(frozen=True)
class CountryDay:
    """The numbers of one country on one date."""

    buses: int
    passengers: int
    accidents: int
    delay_total_ms: int
    average_delay_ms: int
    exist_accident: bool


def recompute(upstream_url: str, dates: Sequence[dt.date]) -> dict[tuple[str, str], CountryDay]:
    """Return the numbers by country name and date, from the files of an upstream."""
    with urllib.request.urlopen(f"{upstream_url}/cities") as response:  # noqa: S310  # an http URL of ours
        cities = json.load(response)
    days: dict[tuple[str, str], CountryDay] = {}
    for date in dates:
        sums: dict[str, list[int]] = {}
        for city in cities:
            total = sums.setdefault(city["country"], [0, 0, 0, 0])
            for trips in _windows(f"{upstream_url}/cities/{city['id']}/stats?date={date}"):
                total[0] += len(trips)
                total[1] += sum(trip["passengers"] for trip in trips)
                total[2] += sum(trip["accident"] is True for trip in trips)
                total[3] += sum(_milliseconds(trip["delay"]) for trip in trips)
        for country, (buses, passengers, accidents, delay_ms) in sums.items():
            days[country, str(date)] = CountryDay(
                buses=buses,
                passengers=passengers,
                accidents=accidents,
                delay_total_ms=delay_ms,
                average_delay_ms=round(Fraction(delay_ms, buses)) if buses else 0,
                exist_accident=accidents > 0,
            )
    return days


def _windows(url: str) -> Iterator[list[dict[str, Any]]]:
    with urllib.request.urlopen(url) as response:  # noqa: S310  # an http URL of ours
        rest = response.read(WINDOW_BYTES).removeprefix(b"[")
        while chunk := response.read(WINDOW_BYTES):
            end = rest.rindex(b"}") + 1
            yield json.loads(b"[" + rest[:end].lstrip(b",") + b"]")
            rest = rest[end:] + chunk
    yield json.loads(b"[" + rest.lstrip(b","))


def _milliseconds(duration: str, _known: dict[str, int] = {}) -> int:  # noqa: B006  # a cache
    if duration not in _known:
        match = _DURATION.fullmatch(duration)
        if match is None:
            raise ValueError(f"{duration!r} is not a duration")
        sign = -1 if match["sign"] else 1
        _known[duration] = sign * round(
            sum(Fraction(match[unit] or 0) * milliseconds for unit, milliseconds in _UNIT_MS.items())
        )
    return _known[duration]
