"""Structured logs: one event a line on standard error, as JSON or as text."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import structlog

from shared.runtime import tracing
from shared.runtime.settings import Settings

REPEATED_AFTER_S = 10.0


class RepeatFilter(logging.Filter):
    """Lets each message of one library pass at most once in REPEATED_AFTER_S, and every message of others.

    While Kafka is unavailable, aiokafka logs the same messages dozens of times a second; OpenTelemetry repeats that its
    collector is unavailable. The filter compares message templates, before arguments are filled in, so it remembers few
    of them.
    """

    def __init__(self, library: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._library = library
        self._clock = clock
        self._logged_at_s: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self._library) or not isinstance(record.msg, str):
            return True
        now_s = self._clock()
        logged_at_s = self._logged_at_s.get(record.msg)
        if logged_at_s is not None and now_s - logged_at_s < REPEATED_AFTER_S:
            return False
        self._logged_at_s[record.msg] = now_s
        return True


def configure_logging(settings: Settings) -> None:
    """Write logs to standard error, one event a line, as JSON or as text."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared_steps: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        tracing.add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    tail = [structlog.processors.format_exc_info] if settings.log_format == "json" else []
    structlog.configure(
        processors=[*shared_steps, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_steps,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail, renderer],
        )
    )
    for library in ("aiokafka", "opentelemetry"):
        handler.addFilter(RepeatFilter(library))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("httpx", "httpcore", "botocore", "aiobotocore", "aiokafka.consumer.group_coordinator"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # At debug level this logger writes every request, and with it the SASL password.
    logging.getLogger("aiokafka.conn").setLevel(max(logging.INFO, root.level))
