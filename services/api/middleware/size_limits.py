"""Limits on the size of a request's URL, headers and body.

Litestar limits a body only if a handler reads it, and no handler does. It limits neither URLs nor headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from http import HTTPStatus

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from services.api.http.problems import MEDIA_TYPE, blank_problem

HEADER_BYTES_MAX = 32 * 1024
URL_BYTES_MAX = 32 * 1024
BODY_BYTES_MAX = 32 * 1024


class SizeLimits:
    """ASGI middleware that refuses requests that are too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it with 413, 414 or 431 if it is too large."""
        status = None
        if scope["type"] == ScopeType.HTTP:
            status = _size_error(scope["raw_path"], scope["query_string"], scope["headers"])
        if status is None:
            await self.app(scope, receive, send)
        else:
            await _refuse(status, send)


def _size_error(path: bytes, query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> HTTPStatus | None:
    if len(path) + len(query) > URL_BYTES_MAX:
        return HTTPStatus.REQUEST_URI_TOO_LONG
    headers = list(headers)
    if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES_MAX:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    # A body without a length needs no limit: no operation reads it.
    if any(name == b"content-length" and _number(value) > BODY_BYTES_MAX for name, value in headers):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return None


def _number(value: bytes) -> float:
    digits = value[:20]
    return int(digits) if digits.isdigit() else math.inf


_LIMITS = {
    HTTPStatus.REQUEST_URI_TOO_LONG: f"a URL is limited to {URL_BYTES_MAX} bytes",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"headers are limited to {HEADER_BYTES_MAX} bytes",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: f"a body is limited to {BODY_BYTES_MAX} bytes",
}


async def _refuse(status: HTTPStatus, send: Send) -> None:
    body = msgspec.json.encode(blank_problem(status, f"The request is too large: {_LIMITS[status]}."))
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
