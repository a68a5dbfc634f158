"""The spans of OpenTelemetry: their trace, links, errors and resource."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shared.runtime import tracing
from shared.runtime.spans import LINKS_MAX, Spans
from tests.fakes.traces import traced


def traceparent(trace: int) -> str:
    return f"00-{trace:032x}-00f067aa0ba902b7-01"


def traces_of(span: ReadableSpan) -> tuple[int, list[int]]:
    """Return the trace of a span, and those that it links to."""
    assert span.context is not None
    return span.context.trace_id, [link.context.trace_id for link in span.links]


def test_a_batch_continues_its_first_trace_and_links_to_the_others() -> None:
    """Records of one trace make no links. Records without a valid trace are ignored, and links are bounded."""
    with traced() as exporter:
        with tracing.consumer_span("process", [None, "nonsense", *map(traceparent, (7, 7, 8, 9, 8))], {}):
            pass
        with tracing.consumer_span("process", map(traceparent, range(1, 200)), {}):
            pass
        few, many = exporter.get_finished_spans()
    assert traces_of(few) == (7, [8, 9])
    assert len(many.links) == LINKS_MAX


def test_consumers_and_calls_begin_no_trace() -> None:
    """Records without a trace and requests to S3 outside one make no span, so health checks fill no collector."""
    with traced() as exporter:
        with tracing.consumer_span("process", [None], {}), tracing.inner_span("S3 GetObject", "client", {}):
            tracing.describe_span({"key": "value"}, failed=True)
            assert tracing.traceparent() is None
        assert exporter.get_finished_spans() == ()
        with tracing.server_span("GET", "nonsense", {}), tracing.inner_span("S3 GetObject", "client", {"key": 1}):
            tracing.describe_span({"result": "ok"})
        inner, server = exporter.get_finished_spans()
    assert inner.parent == server.context
    assert inner.attributes == {"key": 1, "result": "ok"}


def test_an_exception_marks_a_span_as_failed_unless_it_is_expected() -> None:
    """A missing object is no error of a trace; an outage is."""
    with traced() as exporter:
        for errors in (True, False):
            with (
                pytest.raises(OSError, match="away"),
                tracing.server_span("GET", None, {}),
                tracing.inner_span("S3 GetObject", "client", {}, errors=errors),
            ):
                raise OSError("away")
        failed = [span.status.is_ok for span in exporter.get_finished_spans() if span.name == "S3 GetObject"]
    assert failed == [False, True]


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "tripfold-worker"),
        ({"OTEL_SERVICE_NAME": "trips"}, "trips"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=trips,deployment.environment=test"}, "trips"),
    ],
)
def test_the_standard_variables_override_the_resource(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], name: str
) -> None:
    """A span names its service and version; the standard variables may name another service, and add attributes."""
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    exporter = InMemorySpanExporter()
    with Spans("tripfold-worker", SimpleSpanProcessor(exporter)).server("GET", None, {}):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.resource.attributes["service.name"] == name
    assert span.resource.attributes["service.version"] == version("tripfold")
    assert ("deployment.environment" in span.resource.attributes) == ("deployment" in str(variables))
