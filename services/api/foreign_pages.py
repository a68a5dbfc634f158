"""Refuses what a foreign web page lets a user's browser send to the API.

A user runs ``tripfold up`` and visits https://evil.example in the same browser. That page has two ways to use the API:

1. It sends ``POST http://127.0.0.1:8080/process-request``. The browser sends it and hides only the response. So a write
   is refused if the browser says that it comes from another site or origin, except an origin that may use CORS.
2. It lets its own name resolve to 127.0.0.1 (DNS rebinding). The browser then takes the API for a part of the page. So
   an API without keys knows only itself by address, as ``localhost``, or by a name in the settings.

Litestar's middleware for allowed hosts compares the port too, and cannot allow all addresses.
"""

from __future__ import annotations

import ipaddress
import re
from http import HTTPStatus
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler

from services.api.http.errors import quoted
from services.api.middleware.cors import cors_config
from shared.runtime.settings import PREFIX, Settings

WRITES = frozenset({"POST", "PUT", "DELETE"})

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:@\[\]]+))(?::\d*)?")


class ForeignPages:
    """Guards the operations of the API against web pages of other origins and hosts."""

    def __init__(self, settings: Settings) -> None:
        self._cors = cors_config(settings.api_cors_origins)
        names = (settings.api_host, *settings.api_hosts.split(","))
        self._names = {"localhost", *(name.strip().lower() for name in names)} - {""}

    def guard(self, connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        """Raise HTTPException: 421 for an unknown host of an API without keys, 403 for a write of a foreign page."""
        host = connection.headers.get("host", "").lower()
        if not connection.app.state.context.access.needs_key and not self._is_known(host):
            raise HTTPException(
                status_code=HTTPStatus.MISDIRECTED_REQUEST,
                detail=f"This API is open to everybody and does not know the host {quoted(host)}. Use its address, or "
                f"let its operator add the name to {PREFIX}API_HOSTS.",
            )
        origin = connection.headers.get("origin", "")
        if connection.scope.get("method") in WRITES and self._is_foreign(origin, host, connection):
            raise HTTPException(
                status_code=HTTPStatus.FORBIDDEN,
                detail=f"The request comes from a web page of another origin, {quoted(origin)}. Its operator can "
                f"allow that origin with {PREFIX}API_CORS_ORIGINS.",
            )

    def _is_known(self, host: str) -> bool:
        """Return whether a host needs no DNS, or is named. Every browser sends one."""
        if not host:
            return True
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        address, name = match.groups()
        return (name or "").removesuffix(".") in self._names or _is_address(address or name)

    def _is_foreign(self, origin: str, host: str, connection: ASGIConnection[Any, Any, Any, Any]) -> bool:
        if origin and self._cors and self._cors.is_origin_allowed(origin):
            return False
        if site := connection.headers.get("sec-fetch-site"):
            return site not in {"same-origin", "none"}
        # An older browser, or a page without TLS. Other programs send no Origin.
        return bool(origin) and origin.lower().partition("://")[2] != host


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
