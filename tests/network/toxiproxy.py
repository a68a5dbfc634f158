"""A client of Toxiproxy's API, and a reader of its log."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Self

import docker
import httpx
import msgspec

TOXIPROXY_VARIABLE = "TRIPFOLD_TEST_TOXIPROXY_URL"
TOXIPROXY_CONTAINER_VARIABLE = "TRIPFOLD_TEST_TOXIPROXY_CONTAINER"
PROXIED_KAFKA_VARIABLE = "TRIPFOLD_TEST_PROXIED_KAFKA_BOOTSTRAP_SERVERS"
PROXIED_S3_VARIABLE = "TRIPFOLD_TEST_PROXIED_S3_ENDPOINT_URL"
PROBED_KAFKA_VARIABLE = "TRIPFOLD_TEST_PROBED_KAFKA_ADDRESS"
PROBED_S3_VARIABLE = "TRIPFOLD_TEST_PROBED_S3_ADDRESS"

BROKEN = re.compile(r"read tcp \S+:(\d+)->\S+: use of closed network connection$")
"""The line that Toxiproxy 2.12 logs when it closes a connection that the peer still holds; local port first."""


class Toxic(msgspec.Struct, frozen=True, kw_only=True):
    """A fault of a proxy's connections; ``toxicity`` is the share of connections that it affects.

    ``type`` and ``attributes`` are Toxiproxy's. ``stream`` is ``upstream`` for requests and ``downstream`` for
    responses.
    """

    type: str
    stream: str = "downstream"
    toxicity: float = 1.0
    attributes: dict[str, int] = {}


class Toxiproxy:
    """A client of Toxiproxy's API; use it as a context manager."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def make(self, name: str, *, listen: str, upstream: str) -> None:
        """Create a proxy without toxics."""
        self._call("POST", "/proxies", {"name": name, "listen": listen, "upstream": upstream, "enabled": True})

    @contextlib.contextmanager
    def down(self, name: str) -> Iterator[None]:
        """Disable a proxy and close all its connections during the block."""
        self._call("PATCH", f"/proxies/{name}", {"enabled": False})
        try:
            yield
        finally:
            self._call("PATCH", f"/proxies/{name}", {"enabled": True})

    @contextlib.contextmanager
    def with_toxics(self, name: str, toxics: tuple[Toxic, ...]) -> Iterator[None]:
        """Apply toxics to a proxy's connections during the block."""
        applied = []
        try:
            for number, toxic in enumerate(toxics):
                toxic_name = f"{toxic.type}-{number}"
                self._call("POST", f"/proxies/{name}/toxics", {"name": toxic_name, **msgspec.to_builtins(toxic)})
                applied.append(toxic_name)
            yield
        finally:
            with contextlib.ExitStack() as removals:  # an error removes the other toxics all the same
                for toxic_name in applied:
                    removals.callback(self._call, "DELETE", f"/proxies/{name}/toxics/{toxic_name}", None)

    def select_again(self, name: str, toxics: tuple[Toxic, ...]) -> None:
        """Let toxics select the affected connections again; otherwise Toxiproxy selects each when it opens.

        Do not use it for a ``timeout`` toxic: the dropped bytes would be missing in a connection that continues.
        """
        for number, toxic in enumerate(toxics):
            self._call("PATCH", f"/proxies/{name}/toxics/{toxic.type}-{number}", {"toxicity": toxic.toxicity})

    def _call(self, method: str, path: str, body: object) -> None:
        response = self._client.request(method, path, json=body)
        assert response.is_success, f"Toxiproxy: {method} {path}: {response.status_code} {response.text}"


class ToxiproxyLog:
    """The log of Toxiproxy's container; use it as a context manager."""

    def __init__(self, container: str) -> None:
        self._docker = docker.from_env()
        self._container = self._docker.containers.get(container)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._docker.close()

    def broken(self, name: str) -> int:
        """Return how many open connections a proxy has broken so far."""
        lines = [json.loads(line) for line in self._container.logs().splitlines()]
        return sum(
            (match := BROKEN.search(line.get("error", ""))) is not None
            and line.get("name") == name
            and line["listen"].endswith(f":{match[1]}")
            for line in lines
        )
