"""``HEAD`` and ``OPTIONS`` on every path.

The response to ``HEAD`` is that to ``GET`` without its body. The response to ``OPTIONS`` has the ``Allow`` header of a
405. Litestar's own response to ``OPTIONS`` lacks methods that were added to a path later. For ``HEAD``, Litestar needs
a second handler.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send

UNSUPPORTED_METHOD = "TRACE"


class HeadAndOptions:
    """ASGI middleware that derives the responses to HEAD and OPTIONS from those to other methods.

    CORS preflights go to the app unchanged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request: HEAD as GET, and OPTIONS as an unsupported method, whose response has ``Allow``."""
        send_with_head = _adding_head(send)
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
        elif scope["method"] == HttpMethod.HEAD:
            scope["method"] = HttpMethod.GET
            await _send_headers_only(self.app, scope, receive, send_with_head)
        elif scope["method"] == HttpMethod.OPTIONS and not _is_preflight(scope):
            scope["method"] = UNSUPPORTED_METHOD  # type: ignore[typeddict-item]  # Litestar's type lacks it
            await _send_allow_only(self.app, scope, receive, send_with_head)
        else:
            await self.app(scope, receive, send_with_head)


async def _send_headers_only(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Send the headers alone. Then report a disconnect to ``app``, because a stream would continue otherwise."""
    begun = False

    async def receive_disconnect() -> Any:
        return {"type": "http.disconnect"} if begun else await receive()

    async def send_headers(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = True
            await send(message)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    await app(scope, receive_disconnect, send_headers)


async def _send_allow_only(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Turn a 405 into a 204 with its ``Allow`` header; send any other response unchanged."""
    unchanged = True

    async def send_allow(message: Message) -> None:
        nonlocal unchanged
        if message["type"] == "http.response.start":
            unchanged = message["status"] != HTTPStatus.METHOD_NOT_ALLOWED
            if not unchanged:
                headers = [one for one in message["headers"] if not one[0].lower().startswith(b"content-")]
                message = {**message, "status": HTTPStatus.NO_CONTENT, "headers": headers}
        elif message["type"] == "http.response.body" and not unchanged:
            message = {**message, "body": b""}
        await send(message)

    await app(scope, receive, send_allow)


def _is_preflight(scope: Scope) -> bool:
    return any(name == b"access-control-request-method" for name, _ in scope["headers"])


def _adding_head(send: Send) -> Send:
    async def send_with_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                (name, _with_head(value) if name.lower() == b"allow" else value) for name, value in message["headers"]
            ]
        await send(message)

    return send_with_head


def _with_head(allowed: bytes) -> bytes:
    methods = {method.strip() for method in allowed.split(b",")}
    return b", ".join(sorted(methods | {b"HEAD"} if b"GET" in methods else methods))
