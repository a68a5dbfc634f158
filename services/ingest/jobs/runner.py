"""Advances the jobs of the bucket in the background of a planner."""

from __future__ import annotations

from services.ingest.jobs.backfills import BackfillAdvancer
from shared.runtime.retry import Retrier


class JobRunner:
    """Looks at all jobs every ``interval_s`` until asked to stop."""

    def __init__(self, backfills: BackfillAdvancer, *, interval_s: float) -> None:
        self._backfills = backfills
        self._interval_s = interval_s

    async def run(self, retrier: Retrier) -> None:
        """Advance all jobs again and again. An outage is retried with backoff, and makes the process not ready."""
        while not retrier.stopping.is_set():
            await retrier.pause(self._interval_s)
            if not retrier.stopping.is_set():
                await retrier.retry_until_available("jobs", self._backfills.once)
