"""The API over a bucket in memory, served over HTTP on a free port by a thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from litestar.types import ASGIApp

from services.api.server import server_options
from shared.runtime.settings import Settings
from tests.fakes.api import World

START_DEADLINE_S = 15.0


@contextlib.contextmanager
def served(world: World, **settings: object) -> Iterator[str]:
    """Serve the API over a world while the block lasts; yield its address."""
    with world.shared_app(None, **settings) as app, listening(app) as address:
        yield address


@contextlib.contextmanager
def listening(app: ASGIApp, **options: object) -> Iterator[str]:
    """Serve the API while the block lasts, under some other options of the server; yield its address."""
    chosen = server_options(Settings()) | {"timeout_graceful_shutdown": 1} | options
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, **chosen))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline_s = time.monotonic() + START_DEADLINE_S
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            assert time.monotonic() < deadline_s, "the API took too long to start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(START_DEADLINE_S)
            assert not thread.is_alive(), "the API did not stop"
