"""Faults by concern, health endpoints and the lag of the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
import structlog
from prometheus_client import Counter

from shared.runtime import health, metrics
from shared.runtime.health import Health, measure_loop_lag
from shared.service import health_app


def lag_s() -> float:
    """Return the sum of all lag that was measured so far."""
    (metric,) = metrics.event_loop_lag.collect()
    return sum(sample.value for sample in metric.samples if sample.name.endswith("_sum"))


def test_counters_of_errors_start_at_zero_and_have_a_fixed_set_of_labels() -> None:
    """The first fault can raise an alert, and the detail of a fault adds no time series."""
    metrics.registry_of("worker")
    before = labels_of(metrics.faults)
    assert {"what": "batch"} in before
    state = Health()
    state.failing("batch", "away", detail="2024-05-07/0")
    assert state.faults == {"batch 2024-05-07/0": "away"}
    assert labels_of(metrics.faults) == before
    state.recovered("batch", detail="2024-05-07/0")
    assert state.faults == {}


def test_a_fault_is_logged_when_it_begins_and_when_it_ends() -> None:
    """A fault leaves two lines however often it is reported, and the second has its duration. Each detail counts."""
    now_s = 10.0
    state = Health(clock_s=lambda: now_s)
    with structlog.testing.capture_logs() as logged:
        state.recovered("s3")
        state.failing("s3", "away")
        state.failing("s3", "still away")
        state.failing("batch", "away", detail="of city-stats")
        now_s += 90
        state.recovered("s3")
        state.recovered("s3")
    assert [(line["event"], line["what"], line["detail"], line["error"]) for line in logged] == [
        ("fault_began", "s3", "", "away"),
        ("fault_began", "batch", "of city-stats", "away"),
        ("fault_ended", "s3", "", "still away"),
    ]
    assert logged[-1]["duration_s"] == 90.0


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        (asyncio.Event().wait, "no response within 0.01 s"),
        (AsyncMock(side_effect=OSError("away")), "away"),
        (AsyncMock(side_effect=OSError), "OSError"),
    ],
)
async def test_a_dependency_that_fails_or_hangs_is_a_fault_until_a_check_succeeds(check: Any, fault: str) -> None:
    """A check that gets no response in time fails like one that gets an error."""
    state = Health()
    await state.probe("s3", check, timeout_s=0.01)
    assert state.faults == {"s3": fault}
    await state.probe("s3", AsyncMock(), timeout_s=5)
    assert state.faults == {}


def labels_of(counter: Counter) -> list[dict[str, str]]:
    (metric,) = counter.collect()
    return [sample.labels for sample in metric.samples if sample.name.endswith("_total")]


async def test_health_endpoints_report_liveness_readiness_and_metrics() -> None:
    """Liveness never depends on faults. Readiness is 503 with its faults, and unknown paths are 404."""
    state = Health()
    state.started = True
    transport = httpx.ASGITransport(health_app(state, contextlib.nullcontext, metrics.registry_of("aggregate")))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        assert (await client.get("/health/live")).json() == {"live": True}
        assert (await client.get("/health/ready")).status_code == 200
        state.failing("s3", "away")
        assert (await client.get("/health/live")).status_code == 200
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["faults"]) == (503, {"s3": "away"})
        assert "tripfold_event_loop_lag_seconds" in (await client.get("/metrics")).text
        assert (await client.get("/")).status_code == 404


async def test_a_blocked_event_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lag metric grows by at least the time for which a call blocks the loop."""
    monkeypatch.setattr(health, "LAG_INTERVAL_S", 0.01)
    before_s = lag_s()
    measuring = asyncio.create_task(measure_loop_lag())
    await asyncio.sleep(0.001)
    time.sleep(0.2)  # noqa: ASYNC251  # the fault under test
    async with asyncio.timeout(10):
        while lag_s() - before_s < 0.15:  # noqa: ASYNC110  # a metric has no event
            await asyncio.sleep(0.001)
    measuring.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await measuring
