"""Shortens every wait for the upstream."""

from __future__ import annotations

import pytest

from services.ingest.upstream import circuit_breaker, retry


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAIT_FIRST_S", 0.01)
    monkeypatch.setattr(retry, "WAIT_MAX_S", 0.05)
    monkeypatch.setattr(circuit_breaker, "PROBE_POLL_S", 0.01)
