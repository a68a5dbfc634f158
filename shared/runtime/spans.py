"""The spans of OpenTelemetry, exported with OTLP over HTTP. Imported only when traces are on.

The standard variables (``OTEL_…``) choose endpoint, headers, sampling, batches and resource attributes.

FastStream's middleware does not fit: it begins a new trace with each batch, and its span ends before the batch is
handled, because batches are handled side by side. Litestar's ends its span before the access log is written. Its names
have the path with all ids.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from shared.runtime.tracing import HEADER, Attributes, Kind, Span

LINKS_MAX = 32
SHUTDOWN_S_MAX = 2.0

_KINDS: dict[Kind, SpanKind] = {"client": SpanKind.CLIENT, "producer": SpanKind.PRODUCER}
_propagator = TraceContextTextMapPropagator()


class Spans:
    """Begins spans as those of one service. ``processor`` replaces the export."""

    def __init__(self, service: str, processor: SpanProcessor | None = None) -> None:
        own = Resource(
            {
                "service.name": service,
                "service.version": version("tripfold"),
                "service.instance.id": str(uuid.uuid4()),
            }
        )
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())  # the variables win
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("tripfold", version("tripfold"))

    def server(self, name: str, caller: str | None, attributes: Attributes) -> Span:
        """See `shared.runtime.tracing.server_span`."""
        context = _propagator.extract({HEADER: caller}) if caller else None
        return self._tracer.start_as_current_span(name, context, SpanKind.SERVER, attributes)

    def root(self, name: str, attributes: Attributes) -> Span:
        """See `shared.runtime.tracing.root_span`."""
        return self._tracer.start_as_current_span(name, Context(), attributes=attributes)

    def consumer(self, name: str, traceparents: Iterable[str | None], attributes: Attributes) -> Span:
        """See `shared.runtime.tracing.consumer_span`."""
        traces: dict[int, SpanContext] = {}
        for one in dict.fromkeys(traceparents):
            context = _context_of(one)
            if context.is_valid and len(traces) <= LINKS_MAX:
                traces.setdefault(context.trace_id, context)
        if not traces:
            return trace.use_span(trace.INVALID_SPAN)
        first, *others = traces.values()
        parent = trace.set_span_in_context(trace.NonRecordingSpan(first))
        links = [Link(other) for other in others]
        return self._tracer.start_as_current_span(name, parent, SpanKind.CONSUMER, attributes, links)

    def inner(self, name: str, kind: Kind, attributes: Attributes, *, errors: bool) -> Span:
        """See `shared.runtime.tracing.inner_span`."""
        if not trace.get_current_span().get_span_context().is_valid:
            return trace.use_span(trace.INVALID_SPAN)
        return self._tracer.start_as_current_span(
            name, None, _KINDS[kind], attributes, record_exception=errors, set_status_on_exception=errors
        )

    def describe(self, attributes: Attributes, *, name: str | None, failed: bool) -> None:
        """See `shared.runtime.tracing.describe_span`."""
        span = trace.get_current_span()
        span.set_attributes(attributes)
        if name is not None:
            span.update_name(name)
        if failed:
            span.set_status(StatusCode.ERROR)

    def traceparent(self) -> str | None:
        """See `shared.runtime.tracing.traceparent`."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier)
        return carrier.get(HEADER)

    def trace_id(self) -> str | None:
        """Return the id of the present trace, in hexadecimal."""
        context = trace.get_current_span().get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    def shut_down(self) -> None:
        """Export the spans that are left. The exporter retries for longer than a shutdown may last."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(SHUTDOWN_S_MAX)


def _context_of(traceparent: str | None) -> SpanContext:
    context = _propagator.extract({HEADER: traceparent or ""})
    return trace.get_current_span(context).get_span_context()
