"""Advances the jobs of the bucket in the background of a planner."""

from __future__ import annotations

from services.ingest.jobs.backfills import BackfillAdvancer
from services.ingest.jobs.schedules import ScheduleRunner
from shared.runtime.retry import Retrier

SCHEDULES_INTERVAL_S = 10.0
"""Listing the schedules costs more than reading the open backfills, and needs less haste."""


class JobRunner:
    """Looks at the backfills every ``interval_s``, and at the schedules no more often than that."""

    def __init__(self, backfills: BackfillAdvancer, schedules: ScheduleRunner, *, interval_s: float) -> None:
        self._backfills = backfills
        self._schedules = schedules
        self._interval_s = interval_s

    async def run(self, retrier: Retrier) -> None:
        """Advance all jobs again and again. An outage is retried with backoff, and makes the process not ready."""
        schedules_at_s = 0.0
        while not retrier.stopping.is_set():
            await retrier.pause(self._interval_s)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("jobs", self._backfills.once)
            if retrier.now_s() - schedules_at_s >= SCHEDULES_INTERVAL_S and not retrier.stopping.is_set():
                schedules_at_s = retrier.now_s()
                await retrier.retry_until_available("jobs", self._schedules.once)
