"""Checks the change index in the background: lists one kept month after another, and compares.

A writer may be between its compare-and-swap and its count, or its process may have crashed there; then the next one
counts after Kafka has delivered the batch again. So only a difference that nobody counts for minutes is an error.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable

import structlog

from services.api.statistics.listings import Entry
from services.api.statistics.reader import SummaryReader
from shared.runtime import metrics

INTERVAL_S = 60.0
UNCOUNTED_AFTER_S = 300.0
NAMED_MAX = 10

_log = structlog.get_logger()


class IndexCheck:
    """Checks the kept listings of a reader. No query depends on it: an error is logged, and the next pass goes on."""

    def __init__(self, reader: SummaryReader, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._reader = reader
        self._clock_s = clock_s
        self._last = ""
        self._first_seen_s: dict[str, dict[Entry, float]] = {}

    async def run(self) -> None:
        """Check a month every INTERVAL_S until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                await self.check_next()
            except Exception as error:  # noqa: BLE001  # no error may end the checks
                _log.warning("change_index_not_checked", error=str(error) or type(error).__name__)

    async def check_next(self) -> None:
        """Check the month after the last one, if any is kept. Count what the index missed, and list the month again."""
        listings = self._reader.listings.indexed(await self._reader.pointer())
        months = listings.kept_months() if listings is not None else []
        self._first_seen_s = {month: seen for month, seen in self._first_seen_s.items() if month in months}
        if listings is None or not months:
            return
        month = self._last = months[bisect_right(months, self._last) % len(months)]
        found = await listings.unexplained(month)
        now_s = self._clock_s()
        seen = self._first_seen_s.get(month, {})
        self._first_seen_s[month] = {entry: seen.get(entry, now_s) for entry in found}
        missed = [entry for entry, first_s in self._first_seen_s[month].items() if now_s - first_s >= UNCOUNTED_AFTER_S]
        if missed:
            metrics.uncounted_summaries.inc(len(missed))
            named = [f"{entry.date}/{entry.country}" for entry in sorted(missed)[:NAMED_MAX]]
            _log.error("change_not_counted", month=month, summaries=len(missed), first=named)
            listings.forget(month)
            del self._first_seen_s[month]
