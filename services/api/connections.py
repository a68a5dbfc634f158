"""Limits on the connections of the HTTP server: how many, how long a head may take, and how long data may wait.

uvicorn has none of the three. Its ``limit_concurrency`` refuses requests and keeps the connections; its
``timeout_keep_alive`` ends as soon as the first byte of a request has come.
"""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import Any

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.api.http.problems import MEDIA_TYPE, RETRY_AFTER_S, blank_problem
from shared.runtime import metrics

CONNECTIONS_MAX = 800
"""Below 1,024, the usual limit of open files of a process. Event streams take a quarter of them at most."""
HEAD_TIMEOUT_S = 10.0
UNREAD_TIMEOUT_S = 60.0


class BoundedConnection(H11Protocol):
    """A connection of a client, over HTTP/1.1.

    It ends if the line and the headers of a request take longer than ``head_timeout_s``, or if the client accepts
    none of the response for ``unread_timeout_s``. Beyond ``connections_max`` a new connection gets 503.
    """

    def __init__(
        self,
        *args: Any,
        connections_max: int = CONNECTIONS_MAX,
        head_timeout_s: float = HEAD_TIMEOUT_S,
        unread_timeout_s: float = UNREAD_TIMEOUT_S,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._connections_max = connections_max
        self._head_timeout_s = head_timeout_s
        self._unread_timeout_s = unread_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Wait for the first request, or refuse the connection."""
        super().connection_made(transport)
        if len(self.connections) > self._connections_max:
            self._refuse()
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._unread_timeout_s * 1000))
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Handle data. The time of a later request's head begins with its first byte."""
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._expect_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self.timeout_keep_alive_handler)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self) -> None:
        metrics.http_connections_refused.inc()
        status = HTTPStatus.SERVICE_UNAVAILABLE
        detail = f"{self._connections_max} connections are open, which is the limit of this process."
        body = msgspec.json.encode(blank_problem(status, f"{detail} Try again in a few seconds."))
        headers = [
            ("content-type", MEDIA_TYPE),
            ("content-length", str(len(body))),
            ("retry-after", str(RETRY_AFTER_S)),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=status, headers=headers, reason=status.phrase)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
