"""What a service says of itself: how late its event loop is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

import pytest
import structlog
from aiokafka.protocol.admin import SaslAuthenticateRequest_v0
from litestar import Litestar
from litestar.testing import TestClient
from prometheus_client import Counter

from shared.domain.topics import Topic
from shared.runtime import health
from shared.runtime.health import REPEATED_AFTER_S, Health, NowAndThen, configure_logging, measure_loop_lag
from shared.runtime.settings import Settings
from shared.service import health_routes


def lag_s() -> float:
    """Return the sum of all lag that was measured so far."""
    (metric,) = health.event_loop_lag.collect()
    return sum(sample.value for sample in metric.samples if sample.name.endswith("_sum"))


def test_counters_of_errors_begin_at_zero_with_bounded_labels() -> None:
    """The first dead letter can alert, and what a fault is about in detail makes no further time series."""
    before = labels_of(health.faults)
    assert {topic.value for topic in Topic} <= {labels["topic"] for labels in labels_of(health.dead_letters)}
    state = Health()
    state.failing("city-day", "away", detail="2024-05-07/0")
    assert state.faults == {"city-day 2024-05-07/0": "away"}
    assert labels_of(health.faults) == before
    state.recovered("city-day", detail="2024-05-07/0")
    assert state.faults == {}


def labels_of(counter: Counter) -> list[dict[str, str]]:
    (metric,) = counter.collect()
    return [sample.labels for sample in metric.samples if sample.name.endswith("_total")]


def test_services_say_that_they_live() -> None:
    """Liveness has a body on every service."""
    with TestClient(Litestar(health_routes(Health()))) as client:
        assert client.get("/health/live").json() == {"live": True}


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


def test_a_library_that_repeats_itself_is_heard_now_and_then() -> None:
    """Of one message of the library, whatever its arguments, one in a while passes; other messages and loggers do."""
    now_s = 100.0
    seldom = NowAndThen("aiokafka", clock=lambda: now_s)

    def passes(name: str, message: str, *arguments: object) -> bool:
        return seldom.filter(logging.LogRecord(name, logging.ERROR, "", 0, message, arguments, None))

    assert passes("aiokafka.conn", "no connection to %s", 1)
    assert not passes("aiokafka.conn", "no connection to %s", 2)
    assert passes("aiokafka.conn", "something else")
    assert all(passes("shared.runtime.retry", "waiting") for _ in range(3))
    now_s += REPEATED_AFTER_S
    assert passes("aiokafka.conn", "no connection to %s", 1)


@pytest.fixture
def _logging_put_back() -> Iterator[None]:
    """Leave logging as it was before a test that configures it."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**configured)


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
@pytest.mark.usefixtures("_logging_put_back")
def test_a_password_for_kafka_is_in_no_log(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The client library writes its requests out at debug level; that of a login holds the password as it is."""
    configure_logging(Settings(log_level=level))  # type: ignore[arg-type]  # validated
    login = SaslAuthenticateRequest_v0(b"\0tripfold\0open sesame")
    logging.getLogger("aiokafka.conn").debug("Request to %s:%d %d: %s", "127.0.0.1", 9092, 3, login)
    logging.getLogger("aiokafka.conn").error("no connection to %s:%d", "127.0.0.1", 9092)
    written = capsys.readouterr().err
    assert "no connection to 127.0.0.1:9092" in written
    assert "sesame" not in written
