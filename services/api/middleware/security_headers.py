"""What holds for every request and answer: bounded sizes, and headers that keep browsers careful."""

from __future__ import annotations

import math
from collections.abc import Iterable
from http import HTTPStatus

import msgspec
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from services.api.http.problems import MEDIA_TYPE, Problem

HEADER_BYTES_MAX = 32 * 1024
ADDRESS_BYTES_MAX = 32 * 1024
BODY_BYTES_MAX = 32 * 1024

_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-opener-policy": b"same-origin",
}


class Hardening:
    """ASGI middleware that refuses what is too long, and adds security headers to the responses that lack them.

    Litestar bounds a body only where a handler reads it, and none does; it bounds neither addresses nor headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless it is too long."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return

        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = [(name, value) for name, value in _HEADERS.items() if name not in given]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        status = _too_long(scope["raw_path"], scope["query_string"], scope["headers"])
        if status is None:
            await self.app(scope, receive, adding)
        else:
            await _refuse(status, adding)


def _too_long(path: bytes, query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> HTTPStatus | None:
    if len(path) + len(query) > ADDRESS_BYTES_MAX:
        return HTTPStatus.REQUEST_URI_TOO_LONG
    headers = list(headers)
    if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES_MAX:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    # A body without a length is never read either: no operation takes one.
    if any(name == b"content-length" and _number(value) > BODY_BYTES_MAX for name, value in headers):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    return None


def _number(value: bytes) -> float:
    digits = value[:20]
    return int(digits) if digits.isdigit() else math.inf


_TAKEN = {
    HTTPStatus.REQUEST_URI_TOO_LONG: f"an address of {ADDRESS_BYTES_MAX} bytes",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"headers of {HEADER_BYTES_MAX} bytes",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: f"a body of {BODY_BYTES_MAX} bytes",
}


async def _refuse(status: HTTPStatus, send: Send) -> None:
    problem = Problem(
        type="about:blank", title=status.phrase, status=status, detail=f"This service takes {_TAKEN[status]} at most."
    )
    body = msgspec.json.encode(problem)
    headers = [
        (b"content-type", MEDIA_TYPE.encode()),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
