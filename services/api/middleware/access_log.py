"""The access log: a log line, a metric and a span for each HTTP request, including those that match no route.

A line says which client did what, with which result: the audit log.

The response and the log have an id for each HTTP request, ``X-Request-ID``. It is not the id of a processing request.
Every log line of the request has it as ``http_request_id``.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from typing import Any

import structlog
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars, get_contextvars

from services.api.auth import API_KEY, client_address
from services.api.http.errors import InvalidRequest
from services.api.http.query_parameters import declared_in, query_pairs
from shared.runtime import metrics, tracing

HEADER = "X-Request-ID"
PROBED = frozenset({"/health/live", "/health/ready", "/health/serving", "/metrics"})
"""Paths that programs request every few seconds."""
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

PARAMETER_LENGTH_MAX = 100
"""The most characters of a parameter that the log shows."""
_ID = "http_request_id"
_RESULT = "logged_result"
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_log = structlog.get_logger()


class AccessLog:
    """ASGI middleware that logs and traces each HTTP request; successful probes only at the level debug.

    The log shows only those query parameters that the operation declares: a client may have sent a secret under another
    name. A trace has no parameters.

    Litestar's Prometheus plugin prescribes the names of metrics, and misses requests that match no route.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request under the id that its client gave, or under a new one."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        method, path = _known(scope["method"]), scope["path"]
        with bound_contextvars(http_request_id=_id_of(scope["headers"])):
            if path in PROBED:
                await self._handle(scope, receive, send)
                return
            attributes = {"http.request.method": method, "url.path": path}
            with tracing.server_span(method, _header(scope["headers"], tracing.HEADER), attributes):
                await self._handle(scope, receive, send)

    async def _handle(self, scope: HTTPScope, receive: Receive, send: Send) -> None:
        began_s = time.perf_counter()
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                message["headers"] = [*message["headers"], (HEADER.lower().encode(), http_request_id().encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            took_s = time.perf_counter() - began_s
            # Labels come from the routes, not from the client, so that their number is bounded.
            method, route = _known(scope["method"]), scope.get("path_template", "unmatched")
            metrics.http_request_seconds.labels(method, route, status).observe(took_s)
            tracing.describe_span(
                {"http.route": route, "http.response.status_code": status},
                name=f"{method} {route}",
                failed=status >= 500,
            )
            log = _log.debug if route in PROBED and status < 400 else _log.info
            log(
                "http_request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round(took_s * 1000, 1),
                client=client_address(scope),
                **_operation_of(scope),
            )


def http_request_id() -> str:
    """Return the id of the present HTTP request in the log, or an empty string outside one."""
    return str(get_contextvars().get(_ID, ""))


def log_result(connection: ASGIConnection[Any, Any, Any, Any], **fields: str) -> None:
    """Add fields to the line of this HTTP request in the access log, such as the id of a new request."""
    connection.state[_RESULT] = fields


def _operation_of(scope: Scope) -> dict[str, Any]:
    """Return the name of the API key, the operation with its parameters, and the result that it logs."""
    fields: dict[str, Any] = {}
    if (key := scope["state"].get(API_KEY)) is not None:
        fields["key"] = key.name
    handler = scope.get("route_handler")
    if operation := getattr(handler, "operation_id", None):
        fields["operation"] = operation
        try:
            given = dict(query_pairs(scope["query_string"]))
        except InvalidRequest:
            given = {}  # too many
        declared = {parameter.name for parameter in declared_in(handler.parsed_fn_signature.parameters)}
        parameters = {name: value for name, value in given.items() if name in declared} | scope["path_params"]
        fields["parameters"] = {name: str(value)[:PARAMETER_LENGTH_MAX] for name, value in parameters.items()}
    fields.update(scope["state"].get(_RESULT, {}))
    return fields


def _known(method: str) -> str:
    return method if method in KNOWN_METHODS else "other"


def _id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = _header(headers, HEADER) or ""
    return given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: str) -> str | None:
    key = wanted.lower().encode()
    return next((value.decode("latin-1") for name, value in headers if name == key), None)
