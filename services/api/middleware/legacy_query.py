"""Supports clients of the first version, which send ``?from=2024-05-01&to2024-05-31`` without the second ``=``."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus

from litestar.types import ASGIApp, Receive, Scope, Send

_TO_WITHOUT_EQUALS = re.compile(r"to([0-9]{4}-[0-9]{2}-[0-9]{2})")


class LegacyQuery:
    """ASGI middleware that repairs the queries of the first version."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request with its repaired query."""
        scope["query_string"] = repaired_query(scope["query_string"])
        await self.app(scope, receive, send)


def repaired_query(query: bytes) -> bytes:
    """Insert the missing ``=`` into a query string; change nothing else."""
    return b"&".join(_repaired_pair(pair) for pair in query.split(b"&"))


def _repaired_pair(pair: bytes) -> bytes:
    name, _, value = pair.partition(b"=")
    match = None if value else _TO_WITHOUT_EQUALS.fullmatch(unquote_plus(name.decode("latin-1")))
    return f"to={match[1]}".encode() if match else pair
