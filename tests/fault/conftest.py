"""What all runs over the fakes need: quiet services, and files that take several parts although they are small."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from services.ingest import streaming

UPLOAD_CHUNK_BYTES = 100


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Keep the services' logs out of thousands of runs."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an upload be written chunk by chunk: it then is one of several parts, which a crash leaves unfinished."""
    monkeypatch.setattr(streaming, "CHUNK_BYTES", UPLOAD_CHUNK_BYTES)
