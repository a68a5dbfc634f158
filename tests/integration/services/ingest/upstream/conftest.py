"""Shortens every wait for the upstream, and reads the system's certificates once."""

from __future__ import annotations

import functools

import pytest

from services.ingest.upstream import circuit_breaker, client, retry
from shared.runtime.settings import tls_client_context

_tls_client_context = functools.cache(tls_client_context)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAIT_FIRST_S", 0.01)
    monkeypatch.setattr(retry, "WAIT_MAX_S", 0.05)
    monkeypatch.setattr(circuit_breaker, "PROBE_POLL_S", 0.01)


@pytest.fixture(autouse=True)
def _certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "tls_client_context", _tls_client_context)
