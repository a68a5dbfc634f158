"""Examples for the documentation of the API."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.api.statistics.model import CountryStats, DayStats

_DAY = DayStats(bus_count=1250, passenger_count=48211, exist_accident=True, average_delay_s=61.304)
_IN_FULL = msgspec.structs.replace(
    _DAY,
    country_name="Armenia",
    accident_count=3,
    delay_total_ms=76630000,
    cities_reported=11,
    cities_expected=12,
    complete=False,
    version=1680934212,
    last_ingested_at=dt.datetime(2024, 5, 2, 1, 12, 9, tzinfo=dt.UTC),
)


def _example(day: DayStats) -> object:
    stats: CountryStats = {"armenia": {"2024-05-01": day}}
    return msgspec.to_builtins(stats)


COUNTRY_STATS = _example(_DAY)
COUNTRY_STATS_IN_FULL = _example(_IN_FULL)
