"""Turning traces on and off, and the trace id in the log."""

from __future__ import annotations

import pytest

from shared.runtime import tracing
from shared.runtime.settings import InvalidSettings
from tests.fakes.traces import traced

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_by_default_and_by_the_standard_variables(environment: dict[str, str]) -> None:
    """Docker Compose passes empty variables on, so an empty endpoint is none."""
    tracing.configure_tracing("tripfold-api", environment)
    assert tracing.traceparent() is None
    with tracing.server_span("POST", None, {}):
        assert tracing.traceparent() is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({ENDPOINT: "collector:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT is 'collector:4318'; it must be a URL"),
        (
            {ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; only http/protobuf is supported",
        ),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused(environment: dict[str, str], message: str) -> None:
    """The error names the variable, its value and the remedy."""
    with pytest.raises(InvalidSettings, match=message):
        tracing.configure_tracing("tripfold-api", environment)


def test_a_log_event_has_the_trace_id_inside_a_trace_only() -> None:
    """The trace id of a log line is that of the caller; outside a trace, or without traces, there is none."""
    caller = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with traced(), tracing.server_span("POST", caller, {}):
        assert tracing.add_trace_id(None, "info", {}) == {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736"}
    with traced():
        assert tracing.add_trace_id(None, "info", {}) == {}
    assert tracing.add_trace_id(None, "info", {}) == {}
