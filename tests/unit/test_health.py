"""What a service says of itself: how late its event loop is."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from shared import health
from shared.health import measure_loop_lag


def lag_s() -> float:
    """Return the sum of all lag that was measured so far."""
    (metric,) = health.event_loop_lag.collect()
    return sum(sample.value for sample in metric.samples if sample.name.endswith("_sum"))


async def test_what_holds_the_event_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that blocks the loop shows in the metric with at least the time that it held it."""
    monkeypatch.setattr(health, "LAG_INTERVAL_S", 0.01)
    before_s = lag_s()
    measuring = asyncio.create_task(measure_loop_lag())
    await asyncio.sleep(0.001)
    time.sleep(0.2)  # noqa: ASYNC251  # the fault that is to be measured
    async with asyncio.timeout(10):
        while lag_s() - before_s < 0.15:  # noqa: ASYNC110  # a metric has no event
            await asyncio.sleep(0.001)
    measuring.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await measuring
