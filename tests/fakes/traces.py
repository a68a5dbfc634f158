"""Traces of a test's own process: its spans are kept in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.runtime import tracing
from shared.runtime.spans import Spans


@contextlib.contextmanager
def traced() -> Iterator[InMemorySpanExporter]:
    """Turn traces on inside the block; yield the exporter, whose ``get_finished_spans`` returns the ended spans."""
    exporter = InMemorySpanExporter()
    tracing._spans = Spans("tripfold-test", SimpleSpanProcessor(exporter))
    try:
        yield exporter
    finally:
        tracing._spans = None


def trace_id_of(traceparent: str) -> str:
    """Return the trace of a ``traceparent``."""
    return traceparent.split("-")[1]
