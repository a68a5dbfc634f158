"""The health check of the image."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tripfold.healthcheck import check
from tripfold.local.ports import free_port

VARIABLES = ("TRIPFOLD_HEALTH_PORT", "TRIPFOLD_API_PORT")


@contextmanager
def service(status: int) -> Iterator[int]:
    """Run an HTTP server that responds with one status; yield its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/health/ready"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"kafka is down")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize(("status", "reason"), [(200, ""), (503, "kafka is down")])
def test_a_service_on_either_port_is_healthy_if_it_is_ready(
    variable: str, status: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check passes for a ready service, and returns the faults of another, whichever port it listens on."""
    for other in VARIABLES:
        monkeypatch.setenv(other, str(free_port("nothing")))
    with service(status) as port:
        monkeypatch.setenv(variable, str(port))
        assert check() == reason


def test_a_container_without_a_service_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check fails while nothing listens on either port."""
    for variable in VARIABLES:
        monkeypatch.setenv(variable, str(free_port("nothing")))
    assert check() == "no service listens"
