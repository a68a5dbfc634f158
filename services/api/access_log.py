"""One log line and one measurement for each HTTP request, the ones that match no route included."""

from __future__ import annotations

import time

import structlog
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import Histogram

KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

request_seconds = Histogram(
    "tripfold_http_request_seconds", "Time from an HTTP request to the end of its answer", ["method", "route", "status"]
)
_log = structlog.get_logger()


def log_access(app: ASGIApp) -> ASGIApp:
    """Return an ASGI app that passes on to ``app`` and logs each HTTP request: its path, never its query."""

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 500
        method, path = scope["method"], scope["path"]

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await app(scope, receive, watching)
        finally:
            took_s = time.perf_counter() - began_s
            # Labels come from the route and not from the client: their number is bounded.
            request_seconds.labels(
                method if method in KNOWN_METHODS else "other", scope.get("path_template", "unmatched"), status
            ).observe(took_s)
            _log.info("request", method=method, path=path, status=status, duration_ms=round(took_s * 1000, 1))

    return logged
