"""``HEAD`` and ``OPTIONS``, as HTTP has them, on every path.

``HEAD`` is the answer to ``GET`` without its body. ``OPTIONS`` tells what a path takes: what a method that no path
takes is told. Litestar has an answer of its own to it, which leaves out what was added to a path later. It answers HEAD
only where a second handler is written for it.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

TAKEN_BY_NO_PATH = "TRACE"


class HeadAndOptions:
    """ASGI middleware that answers HEAD and OPTIONS by what the app answers to other methods.

    The questions of browsers about other origins (preflights) stay the app's own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, HEAD as GET, and OPTIONS as a method that is told what is allowed."""
        told = _telling_of_head(send)
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
        elif scope["method"] == HttpMethod.HEAD:
            scope["method"] = HttpMethod.GET
            await _headers_alone(self.app, scope, receive, told)
        elif scope["method"] == HttpMethod.OPTIONS and not _is_preflight(scope):
            scope["method"] = TAKEN_BY_NO_PATH  # type: ignore[typeddict-item]  # it is none of Litestar's
            await _allowed_alone(self.app, scope, receive, told)
        else:
            await self.app(scope, receive, told)


async def _headers_alone(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Send no body. Once the headers are sent, the client is gone as far as ``app`` can see: a stream would go on."""
    begun = False

    async def receiving() -> Any:
        return {"type": "http.disconnect"} if begun else await receive()

    async def sending(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = True
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    await app(scope, receiving, sending)


async def _allowed_alone(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Make of a refusal that says what is allowed an answer that says so; any other one stays."""
    refused = True

    async def sending(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start":
            refused = message["status"] != HTTPStatus.METHOD_NOT_ALLOWED
            if not refused:
                headers = [one for one in message["headers"] if not one[0].lower().startswith(b"content-")]
                message = {**message, "status": HTTPStatus.NO_CONTENT, "headers": headers}
        elif message["type"] == "http.response.body" and not refused:
            message = {**message, "body": b""}
        await send(message)

    await app(scope, receive, sending)


def _is_preflight(scope: Scope) -> bool:
    return any(name == b"access-control-request-method" for name, _ in scope["headers"])


def _telling_of_head(send: Send) -> Send:
    async def telling(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                (name, _with_head(value) if name.lower() == b"allow" else value) for name, value in message["headers"]
            ]
        await send(message)

    return telling


def _with_head(allowed: bytes) -> bytes:
    methods = {method.strip() for method in allowed.split(b",")}
    return b", ".join(sorted(methods | {b"HEAD"} if b"GET" in methods else methods))
