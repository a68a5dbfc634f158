"""The access log: a log line and a metric for each HTTP request, including those that match no route.

The response and the log have an id for each HTTP request, ``X-Request-ID``. It is not the id of a processing request.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from shared.runtime import metrics

HEADER = "X-Request-ID"
PROBED = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Paths that programs request every few seconds."""
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_TRACE_ID = "http_request_id"
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_log = structlog.get_logger()


class AccessLog:
    """ASGI middleware that logs each HTTP request, without its query; successful probes only at the level debug.

    Litestar's Prometheus plugin prescribes the names of metrics, and misses requests that match no route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request under the id that its client gave, or under a new one."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 500
        method, path = scope["method"], scope["path"]
        trace_id = scope["state"][_TRACE_ID] = _trace_id(scope["headers"])

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message["headers"], (HEADER.lower().encode(), trace_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            took_s = time.perf_counter() - began_s
            # Labels come from the routes, not from the client, so that their number is bounded.
            metrics.http_request_seconds.labels(
                method if method in KNOWN_METHODS else "other", scope.get("path_template", "unmatched"), status
            ).observe(took_s)
            log = _log.debug if scope.get("path_template") in PROBED and status < 400 else _log.info
            log(
                "http_request",
                method=method,
                path=path,
                status=status,
                duration_ms=round(took_s * 1000, 1),
                http_request_id=trace_id,
            )


def trace_id_of(scope: Scope) -> str:
    """Return the id of an HTTP request in the log."""
    return str(scope["state"].get(_TRACE_ID, ""))


def _trace_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = next((value.decode("latin-1") for name, value in headers if name == HEADER.lower().encode()), "")
    return given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
