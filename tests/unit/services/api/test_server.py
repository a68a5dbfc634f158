"""How the HTTP server of the API stops."""

from __future__ import annotations

import signal
import socket
import threading
import time

import httpx

from services.api.server import ApiServer
from shared.runtime.settings import Settings
from tests.fakes.api import DAY, World, stats

DEADLINE_S = 30.0
QUERY = {"from": str(DAY), "to": str(DAY)}


def test_a_stopping_api_serves_and_says_that_it_stops() -> None:
    """After SIGTERM it serves for the delay, and its health says that it stops. SIGINT ends the delay."""
    world = World()
    world.fold_in(stats("armenia"))
    with world.shared_app() as app, socket.create_server(("127.0.0.1", 0)) as listener:
        server = ApiServer(app, Settings(api_shutdown_delay_s=3600), on_stop=app.state.context.health.stop)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        with httpx.Client(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=DEADLINE_S, trust_env=False
        ) as client:
            _wait_for(client, httpx.codes.OK)
            server.handle_exit(signal.SIGTERM, None)
            _wait_for(client, httpx.codes.SERVICE_UNAVAILABLE)
            assert client.get("/country-stats", params=QUERY, headers={"Connection": "close"}).is_success
        server.handle_exit(signal.SIGINT, None)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def _wait_for(client: httpx.Client, status: int) -> None:
    """Wait until a load balancer would get ``status``."""
    ends_at_s = time.monotonic() + DEADLINE_S
    while client.get("/health/serving", headers={"Connection": "close"}).status_code != status:
        assert time.monotonic() < ends_at_s
        time.sleep(0.01)
