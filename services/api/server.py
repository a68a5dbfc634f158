"""The HTTP server of the API: its options, and how it stops.

uvicorn closes its socket 0.1 s after SIGTERM. A load balancer that has not checked the process since then would send
requests to a closed port. So the order is:

1. SIGTERM comes. `/health/ready` and `/health/serving` say that the process stops.
2. The server serves for TRIPFOLD_API_SHUTDOWN_DELAY_S more. Meanwhile the load balancers check it, and forget it.
3. uvicorn closes its socket. Open requests get SHUTDOWN_GRACE_S to finish.

SIGINT, such as Ctrl-C, skips step 2, also while it lasts.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from services.api.connections import BoundedConnection
from services.api.middleware.size_limits import HEADER_BYTES_MAX, URL_BYTES_MAX
from shared.runtime.settings import Settings

SHUTDOWN_GRACE_S = 5
SIGNAL_INTERVAL_S = 0.1


class ApiServer(uvicorn.Server):
    """Serves ``app`` until a signal, and for the delay of the settings after it. ``on_stop`` is called in between."""

    def __init__(self, app: Any, settings: Settings, *, on_stop: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, **server_options(settings)))
        self._delay_s = settings.api_shutdown_delay_s
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. SIGINT ends the delay."""
        if sig == signal.SIGINT:
            self._delay_s = 0.0
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on for the delay, then close the socket and wait for open requests."""
        self._on_stop()
        began_s = time.monotonic()
        while time.monotonic() < began_s + self._delay_s:  # noqa: ASYNC110  # a signal shortens it
            await asyncio.sleep(SIGNAL_INTERVAL_S)
        await super().shutdown(sockets)


def server_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the HTTP server."""
    return {
        "host": settings.api_host,
        "port": settings.api_port,
        "loop": "uvloop",
        "http": BoundedConnection,
        "h11_max_incomplete_event_size": URL_BYTES_MAX + HEADER_BYTES_MAX,
        "ws": "none",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,  # by default uvicorn would trust every client of this machine
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": SHUTDOWN_GRACE_S,
    }
