"""Traces of requests, from the HTTP request through Kafka and S3 to the summary. Off unless an endpoint is set.

A trace begins with an HTTP request, or with a date of a backfill. The header ``traceparent`` (W3C Trace Context) of
each record continues it. All other spans exist only inside a trace: health checks and old records begin none.

OpenTelemetry takes 11 MB of memory, so `shared.runtime.spans` imports it, and this module imports that only when traces
are on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import structlog

from shared.runtime.settings import InvalidSettings

if TYPE_CHECKING:
    from shared.runtime.spans import Spans

HEADER = "traceparent"

Attributes = Mapping[str, str | int]
Span = contextlib.AbstractContextManager[object]
Kind = Literal["client", "producer"]

_OFF: Span = contextlib.nullcontext()
_spans: Spans | None = None


def configure_tracing(service: str, environment: Mapping[str, str] = os.environ) -> None:
    """Export spans as those of ``service`` if the standard variables of OpenTelemetry name an endpoint.

    Raises InvalidSettings for a URL or a protocol that cannot be used.
    """
    global _spans  # noqa: PLW0603  # like the configuration of logging: one for each process
    if not _is_endpoint_set(environment):
        return
    from shared.runtime.spans import Spans  # noqa: PLC0415  # OpenTelemetry takes 11 MB

    _spans = Spans(service)


def _is_endpoint_set(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    name = next((name for name in endpoints if environment.get(name)), None)
    if name is None:
        return False
    if not environment[name].startswith(("http://", "https://")):
        raise InvalidSettings(
            f"{name} is {environment[name]!r}; it must be a URL that begins with http:// or https://, such as "
            "http://collector:4318"
        )
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environment.get(variable) or "http/protobuf"
        if protocol != "http/protobuf":
            raise InvalidSettings(
                f"{variable} is {protocol!r}; only http/protobuf is supported: unset it, and set {name} to the HTTP "
                "port of the collector, usually 4318"
            )
    return True


def server_span(name: str, caller: str | None, attributes: Attributes) -> Span:
    """Continue the trace of an HTTP request's ``traceparent``, or begin one."""
    return _OFF if _spans is None else _spans.server(name, caller, attributes)


def root_span(name: str, attributes: Attributes) -> Span:
    """Begin a trace."""
    return _OFF if _spans is None else _spans.root(name, attributes)


def consumer_span(name: str, traceparents: Iterable[str | None], attributes: Attributes) -> Span:
    """Continue the trace of the first ``traceparent``, and link to the other traces. Without any: no span."""
    return _OFF if _spans is None else _spans.consumer(name, traceparents, attributes)


def inner_span(name: str, kind: Kind, attributes: Attributes, *, errors: bool = True) -> Span:
    """Begin a span inside the present one. Outside a trace: no span. An exception marks it as failed if ``errors``."""
    return _OFF if _spans is None else _spans.inner(name, kind, attributes, errors=errors)


def describe_span(attributes: Attributes, *, name: str | None = None, failed: bool = False) -> None:
    """Add attributes to the present span, rename it, or mark it as failed."""
    if _spans is not None:
        _spans.describe(attributes, name=name, failed=failed)


def traceparent() -> str | None:
    """Return the present span as ``traceparent``, or None outside a trace."""
    return None if _spans is None else _spans.traceparent()


def add_trace_id(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Add the ``trace_id`` of the present span to a log event: a processor of structlog."""
    trace_id = None if _spans is None else _spans.trace_id()
    if trace_id is not None:
        event["trace_id"] = trace_id
    return event


def shut_down_tracing() -> None:
    """Export the spans that are left, for at most a few seconds."""
    if _spans is not None:
        _spans.shut_down()
