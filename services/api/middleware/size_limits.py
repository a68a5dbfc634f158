"""Limits on the size of a request's URL, headers and body, and on the time of the body.

Litestar limits a body only if a handler reads it, and no handler does. It limits neither URLs nor headers.

uvicorn would read an unread body to its end after the response, however long it is. So the body is read here, before
anything else: the next request of the connection comes after it.
"""

from __future__ import annotations

import asyncio
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
BODY_TIMEOUT_S = 10.0


class SizeLimits:
    """ASGI middleware that reads the body of a request, and refuses requests that are too large or slow."""

    def __init__(self, app: ASGIApp, *, body_timeout_s: float = BODY_TIMEOUT_S) -> None:
        self.app = app
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it with 408, 413, 414 or 431 and close the connection."""
        status = None
        if scope["type"] == ScopeType.HTTP:
            status = _size_error(scope["raw_path"], scope["query_string"], scope["headers"])
            if status is None and _has_body(scope["headers"]):
                status = await _read_body(receive, self._body_timeout_s)
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
    if any(name == b"content-length" and _number(value) > BODY_BYTES_MAX for name, value in headers):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return None


def _has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


async def _read_body(receive: Receive, timeout_s: float) -> HTTPStatus | None:
    """Read a body to its end. Return the status of the refusal if it is too long, too slow or broken off."""
    left_bytes = BODY_BYTES_MAX
    try:
        async with asyncio.timeout(timeout_s):
            while left_bytes >= 0:
                message = await receive()
                if message["type"] != "http.request":
                    return HTTPStatus.BAD_REQUEST
                left_bytes -= len(message["body"])
                if not message["more_body"] and left_bytes >= 0:
                    return None
    except TimeoutError:
        return HTTPStatus.REQUEST_TIMEOUT
    return HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def _number(value: bytes) -> float:
    digits = value[:20]
    return int(digits) if digits.isdigit() else math.inf


_REASONS = {
    HTTPStatus.BAD_REQUEST: "The connection ended before the body did.",
    HTTPStatus.REQUEST_TIMEOUT: f"The body took longer than {BODY_TIMEOUT_S:g} s. No operation reads a body.",
    HTTPStatus.REQUEST_URI_TOO_LONG: f"The request is too large: a URL is limited to {URL_BYTES_MAX} bytes.",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"The request is too large: headers are limited to {HEADER_BYTES_MAX} "
    "bytes.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: f"The request is too large: a body is limited to {BODY_BYTES_MAX} bytes.",
}


async def _refuse(status: HTTPStatus, send: Send) -> None:
    body = msgspec.json.encode(blank_problem(status, _REASONS[status]))
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
