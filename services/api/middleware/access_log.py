"""The access log: a log line and a metric for each HTTP request, including those that match no route.

A line says which client did what, with which result: the audit log.

The response and the log have an id for each HTTP request, ``X-Request-ID``. It is not the id of a processing request.
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
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from services.api.auth import API_KEY, client_address
from services.api.http.errors import InvalidRequest
from services.api.http.query_parameters import declared_in, query_pairs
from shared.runtime import metrics

HEADER = "X-Request-ID"
PROBED = frozenset({"/health/live", "/health/ready", "/metrics"})
"""Paths that programs request every few seconds."""
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

PARAMETER_LENGTH_MAX = 100
"""The most characters of a parameter that the log shows."""
_TRACE_ID = "http_request_id"
_RESULT = "logged_result"
_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_log = structlog.get_logger()


class AccessLog:
    """ASGI middleware that logs each HTTP request; successful probes only at the level debug.

    The log shows only those query parameters that the operation declares: a client may have sent a secret under another
    name.

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
                client=client_address(scope),
                http_request_id=trace_id,
                **_operation_of(scope),
            )


def trace_id_of(scope: Scope) -> str:
    """Return the id of an HTTP request in the log."""
    return str(scope["state"].get(_TRACE_ID, ""))


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


def _trace_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    given = next((value.decode("latin-1") for name, value in headers if name == HEADER.lower().encode()), "")
    return given if _VALID_ID.fullmatch(given) else uuid.uuid4().hex
