"""``HEAD``, as HTTP has it: the answer to ``GET`` without its body, on every path that takes ``GET``."""

from __future__ import annotations

from typing import Any

from litestar.enums import HttpMethod, ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send


def answer_head(app: ASGIApp) -> ASGIApp:
    """Return an ASGI app that passes on to ``app``, and answers HEAD by the headers of what GET would be answered.

    Once these are sent, the client is gone as far as ``app`` can see: a stream would go on for an hour.
    """

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        told = _telling_of_head(send)
        if scope["type"] != ScopeType.HTTP or scope["method"] != "HEAD":
            await app(scope, receive, told)
            return
        begun = False

        async def receiving() -> Any:
            return {"type": "http.disconnect"} if begun else await receive()

        async def headers_alone(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                await told(message)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        scope["method"] = HttpMethod.GET
        await app(scope, receiving, headers_alone)

    return answering


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
