"""Exports how complete the latest dates are, twice a minute: their summaries by state, and the newest complete date.

The window ends with the newest planned date that is not in the future. A pass lists its plans and summaries, and reads
only what has changed since the last pass: plans here, summaries through the cache of the reader.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping
from typing import get_args

import structlog

from services.api.http.date_range import DateRange
from services.api.statistics.reader import CONCURRENT_GETS_MAX, Reading, SummaryReader
from shared.domain import keys
from shared.domain.ids import CountrySlug
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.metrics import SummaryState
from shared.storage.object_store import ObjectStore

INTERVAL_S = 30.0

CountryDay = tuple[dt.date, CountrySlug]
Planned = Mapping[dt.date, frozenset[CountrySlug] | None]
"""The countries of each date's plan; None if the plan is unreadable."""

_log = structlog.get_logger()


class Completeness:
    """Measures the last ``days`` dates. Nothing depends on it: an error is logged, and the next pass tries again."""

    def __init__(
        self, store: ObjectStore, reader: SummaryReader, *, days: int, clock: Callable[[], dt.datetime]
    ) -> None:
        self._store = store
        self._reader = reader
        self._days = dt.timedelta(days=days)
        self._clock = clock
        self._list_after = ""
        self._countries: dict[str, frozenset[CountrySlug]] = {}  # of each plan, by its key and ETag

    async def run(self) -> None:
        """Measure every INTERVAL_S until cancelled."""
        while True:
            try:
                await self.measure()
            except Exception as error:  # noqa: BLE001  # no error may end the measurements
                _log.warning("completeness_not_measured", error=str(error) or type(error).__name__)
            await asyncio.sleep(INTERVAL_S)

    async def measure(self) -> None:
        """Measure, and export the result."""
        planned = await self._planned()
        states: dict[CountryDay, SummaryState] = {}
        if planned:
            states = states_of(planned, await self._reader.read(DateRange(min(planned), max(planned))))
        counts = Counter(states.values())
        for state in get_args(SummaryState):
            metrics.recent_summaries.labels(state).set(counts[state])
        newest = newest_complete(planned, states)
        metrics.newest_complete_date.set(dt.datetime.combine(newest, dt.time(), dt.UTC).timestamp() if newest else 0)

    async def _planned(self) -> Planned:
        today = self._clock().date()
        plans: dict[dt.date, str] = {}
        async for listed in self._store.list(keys.PLANS, after=self._list_after):
            date = keys.parse_date(listed.key)
            if date is not None and date <= today:
                plans[date] = f"{listed.key} {listed.etag}"
        before = max(plans, default=today) - self._days
        self._list_after = keys.plan(before) if plans else ""
        window = {date: name for date, name in plans.items() if date > before}
        read = await bounded_map(self._countries_of, list(window.items()), limit=CONCURRENT_GETS_MAX)
        self._countries = {name: known for name, known in zip(window.values(), read, strict=True) if known is not None}
        return dict(zip(window, read, strict=True))

    async def _countries_of(self, plan: tuple[dt.date, str]) -> frozenset[CountrySlug] | None:
        date, name = plan
        known = self._countries.get(name)
        return known if known is not None else await self._reader.planned_countries(date)


def states_of(planned: Planned, reading: Reading) -> dict[CountryDay, SummaryState]:
    """Return the state of each country-day that is planned or has a summary."""
    expected = {(date, country) for date, countries in planned.items() for country in countries or ()}
    states: dict[CountryDay, SummaryState] = dict.fromkeys(expected, "missing")
    for head in reading.heads:
        states[head.date, head.country] = "complete" if head.complete else "incomplete"
    for one in reading.unreadable:
        country_day = keys.parse_summary(one.key)
        if country_day is not None:
            states[country_day] = "unreadable"
    return states


def newest_complete(planned: Planned, states: Mapping[CountryDay, SummaryState]) -> dt.date | None:
    """Return the newest date whose plan is readable and whose country-days are all complete."""
    incomplete = {date for (date, _), state in states.items() if state != "complete"}
    return max((date for date, countries in planned.items() if countries and date not in incomplete), default=None)
