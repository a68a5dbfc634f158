"""Makes all waiting for the upstream short."""

from __future__ import annotations

import pytest

from services.ingest.upstream import retry


@pytest.fixture(autouse=True)
def _hardly_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAIT_FIRST_S", 0.01)
    monkeypatch.setattr(retry, "WAIT_MAX_S", 0.05)
    monkeypatch.setattr(retry, "PROBE_LOOK_S", 0.01)
