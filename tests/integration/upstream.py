"""A transit upstream's server that tests control: its cities and files are data that can change at any time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import threading
from typing import Any, Self
from urllib.parse import parse_qs, unquote

import uvicorn

CHUNK_BYTES = 64 * 1024


class UpstreamServer:
    """Serves ``/cities`` and ``/cities/{id}/stats?date=`` on a free port, from a thread of its own.

    ``files`` maps (city id, date) to a body; a city without one gets 404, and a number in place of a body
    is the status of the response. Paths in ``silent`` get no response while they are in it. It waits
    ``pace_s`` after each chunk. ``requests`` lists the requested paths.
    """

    def __init__(self, *, content_type: str = "text/html", etags: bool = False) -> None:
        self.cities: list[Any] = []
        self.files: dict[tuple[str, str], bytes | int] = {}
        self.content_type = content_type
        self.etags = etags
        self.pace_s = 0.0
        self.silent: set[str] = set()
        self.requests: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self._app, log_config=None, lifespan="off", ws="none", interface="asgi3")
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def add_city(self, city_id: int | str, name: str, country: str) -> None:
        """List a city, or move it to another country if it is listed."""
        self.cities = [city for city in self.cities if city["id"] != city_id]
        self.cities.append({"id": city_id, "name": name, "country": country, "mayor": "ignored"})

    def put(self, city_id: int | str, date: str, trips: list[dict[str, Any]]) -> None:
        """Set a city's file of a date."""
        self.files[str(city_id), date] = json.dumps(trips).encode()

    async def _app(self, scope: Any, _receive: Any, send: Any) -> None:
        path = scope["raw_path"].decode().split("?")[0]
        query = scope["query_string"].decode()
        self.requests.append(f"{path}?{query}" if query else path)
        headers = dict(scope["headers"])
        while path in self.silent:  # noqa: ASYNC110  # the test changes it in another thread
            await asyncio.sleep(0.02)
        if path == "/cities":
            await self._answer(send, 200, json.dumps(self.cities).encode(), headers)
            return
        city_id = unquote(path.split("/")[2])
        body = self.files.get((city_id, parse_qs(query)["date"][0]), 404)
        if isinstance(body, int):
            await self._answer(send, body, b"", {})
        else:
            await self._answer(send, 200, body, headers)

    async def _answer(self, send: Any, status: int, body: bytes, asked: dict[bytes, bytes]) -> None:
        etag = f'"{hashlib.md5(body).hexdigest()}"'.encode()
        headers = [(b"content-type", self.content_type.encode())]
        if self.etags:
            headers.append((b"etag", etag))
            if asked.get(b"if-none-match") == etag:
                status, body = 304, b""
        if status != 304:
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for start in range(0, len(body), CHUNK_BYTES):
            await send({"type": "http.response.body", "body": body[start : start + CHUNK_BYTES], "more_body": True})
            await asyncio.sleep(self.pace_s)
        await send({"type": "http.response.body", "body": b""})
