"""Turning traces on and off, and the trace id in the log."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shared.runtime import tracing
from shared.runtime.settings import InvalidSettings
from tests.fakes.traces import traced

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
WITHOUT_ENDPOINT = """
import os, sys
import services.aggregate.app, services.api.app, services.ingest.app
from shared.runtime.settings import load_settings
from shared.runtime.tracing import configure_tracing
configure_tracing("tripfold-worker")
settings = load_settings()
services.ingest.app.create_app(settings)
services.aggregate.app.create_app(settings)
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")), flush=True)
os._exit(0)  # the services were not started, and need no shutdown
"""


def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    """Services pay nothing for traces that are off. FastStream looks for an empty package of OpenTelemetry."""
    environment = {"TRIPFOLD_API_ACCESS": "open", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    loaded = subprocess.run(
        [sys.executable, "-c", WITHOUT_ENDPOINT], env=environment, check=True, capture_output=True, text=True
    )
    assert loaded.stdout == "['opentelemetry', 'opentelemetry.semconv']\n"


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
