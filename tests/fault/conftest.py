"""Fixtures of all fault tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from services.ingest.worker import city_day


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Silence the logs of the services."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish no progress: each second of real time would add a call, and break another call than the one meant."""
    monkeypatch.setattr(city_day, "PROGRESS_INTERVAL_S", 3_600.0)
