"""The clients of the first version ask for ``?from=2024-05-01&to2024-05-31``, without the ``=``. They go on working."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from litestar.types import ASGIApp, Receive, Scope, Send

_TO_WITHOUT_EQUALS = re.compile(r"to([0-9]{4}-[0-9]{2}-[0-9]{2})")


class FirstVersionQuery:
    """ASGI middleware that makes the queries of the first version whole."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole query."""
        scope["query_string"] = whole_query(scope["query_string"])
        await self.app(scope, receive, send)


def whole_query(query: bytes) -> bytes:
    """Put the missing ``=`` into a query string; everything else stays as it is."""
    return b"&".join(_whole_pair(pair) for pair in query.split(b"&"))


def _whole_pair(pair: bytes) -> bytes:
    name, _, value = pair.partition(b"=")
    match = None if value else _TO_WITHOUT_EQUALS.fullmatch(unquote_plus(name.decode("latin-1")))
    return f"to={match[1]}".encode() if match else pair
