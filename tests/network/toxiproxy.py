"""Toxiproxy, as far as the tests use it: proxies that are made once, and toxics that come and go."""

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
"""What Toxiproxy 2.12 logs when it closed a connection and whoever is at its other end had not: local port first."""


class Toxic(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to the bytes of a proxy's connections, or of a part of these: of so many in one.

    ``type`` and ``attributes`` are Toxiproxy's own; ``stream`` is ``upstream`` for what a client sends, and
    ``downstream`` for what it is answered.
    """

    type: str
    stream: str = "downstream"
    toxicity: float = 1.0
    attributes: dict[str, int] = {}


class Toxiproxy:
    """The proxy's own API; use it as a context manager."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=10, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def make(self, name: str, *, listen: str, upstream: str) -> None:
        """Make a proxy that passes everything on."""
        self._ask("POST", "/proxies", {"name": name, "listen": listen, "upstream": upstream, "enabled": True})

    @contextlib.contextmanager
    def away(self, name: str) -> Iterator[None]:
        """Close a proxy and all its connections while the block lasts."""
        self._ask("PATCH", f"/proxies/{name}", {"enabled": False})
        try:
            yield
        finally:
            self._ask("PATCH", f"/proxies/{name}", {"enabled": True})

    @contextlib.contextmanager
    def poisoned(self, name: str, toxics: tuple[Toxic, ...]) -> Iterator[None]:
        """Let toxics act on a proxy's connections while the block lasts."""
        made = []
        try:
            for number, toxic in enumerate(toxics):
                toxic_name = f"{toxic.type}-{number}"
                self._ask("POST", f"/proxies/{name}/toxics", {"name": toxic_name, **msgspec.to_builtins(toxic)})
                made.append(toxic_name)
            yield
        finally:
            with contextlib.ExitStack() as lifting:  # one that cannot be lifted is no reason to leave the others
                for toxic_name in made:
                    lifting.callback(self._ask, "DELETE", f"/proxies/{name}/toxics/{toxic_name}", None)

    def draw_again(self, name: str, toxics: tuple[Toxic, ...]) -> None:
        """Draw the connections anew that toxics act on, which otherwise are drawn once, when they are made.

        Not for a ``timeout``: what it swallowed would be missing in the middle of a connection that then goes on.
        """
        for number, toxic in enumerate(toxics):
            self._ask("PATCH", f"/proxies/{name}/toxics/{toxic.type}-{number}", {"toxicity": toxic.toxicity})

    def _ask(self, method: str, path: str, body: object) -> None:
        answer = self._client.request(method, path, json=body)
        assert answer.is_success, f"Toxiproxy: {method} {path}: {answer.status_code} {answer.text}"


class ToxiproxyLog:
    """The log of the container that Toxiproxy runs in; use it as a context manager."""

    def __init__(self, container: str) -> None:
        self._docker = docker.from_env()
        self._container = self._docker.containers.get(container)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._docker.close()

    def broken(self, name: str) -> int:
        """Return how many connections a proxy has broken so far that its client still held."""
        lines = [json.loads(line) for line in self._container.logs().splitlines()]
        return sum(
            (match := BROKEN.search(line.get("error", ""))) is not None
            and line.get("name") == name
            and line["listen"].endswith(f":{match[1]}")
            for line in lines
        )
