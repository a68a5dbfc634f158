"""An upstream server that corrects files, moves cities between countries, and injects faults at adjustable rates.

``/truth`` lists the SHA-256 of every version of every file that it ever served. A separate program compares them with
what Tripfold stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import json
import random
import socket
from collections import Counter
from typing import Self
from urllib.parse import parse_qs

import msgspec

from tests.chaos.relay import HOST, reset
from tests.chaos.s3_proxy import parse_fields

CHUNK_BYTES = 64 * 1024
POOL_RECORDS = 4_000
LARGE_EVERY = 9
"""Every ninth city has files large enough for a multipart upload."""
READ_TIMEOUT_S = 60.0
COUNTRIES = ("Armenia", "Peru", "Россия", "Rossiia", "🇫🇷", 'A/B "quoted"')


class UpstreamFault(enum.Enum):
    """A fault of one response."""

    ERROR_500 = "upstream returned 500"
    BUSY_503 = "upstream returned 503 with Retry-After"
    NOT_FOUND = "upstream returned 404"
    RESET = "upstream reset the connection before a response"
    TRUNCATED = "upstream file truncated"
    STALLED = "upstream stalled in the middle of a file"
    SLOW = "upstream slow"
    DAMAGED = "upstream file damaged"
    HTML_PAGE = "upstream returned an HTML page"


class _Request(msgspec.Struct, frozen=True):
    target: str
    fields: dict[str, str]


class ChaosUpstream:
    """Serves on a free port; use it as an async context manager.

    ``rates`` maps each fault to its probability. ``pause_s`` is the delay before each file. ``requests_by_target``
    counts requests by path and query.
    """

    def __init__(self, *, cities: int, dates: list[str], seed: int, large_files: bool = True) -> None:
        self.rates: dict[UpstreamFault, float] = {}
        self.injected: Counter[UpstreamFault] = Counter()
        self.corrections = 0
        self.moves = 0
        self.requests = 0
        self.requests_by_target: Counter[str] = Counter()
        self.pause_s = 0.0
        self.dates = dates
        self._large_files = large_files
        self._draw = random.Random(seed)
        self._files = random.Random(seed + 1)
        self._pool = [_record(self._files) for _ in range(POOL_RECORDS)]
        self._countries = {city: self._draw.choice(COUNTRIES) for city in range(cities)}
        self._served: dict[tuple[int, str], list[str]] = {}
        self._bodies: dict[tuple[int, str], bytes] = {}
        for city in range(cities):
            for date in dates:
                self._write(city, date)
        self._socket = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}"
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._socket)
        return self

    async def set_down(self, down: bool) -> None:
        """Refuse connections from now on, or accept them again."""
        if down:
            self._server.close()
        else:
            port = int(self.url.rpartition(":")[2])
            self._server = await asyncio.start_server(self._accept, HOST, port)

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def correct(self, date: str | None = None) -> None:
        """Replace the file of a random city, on ``date`` or a random date."""
        self.corrections += 1
        self._write(self._draw.choice(list(self._countries)), date or self._draw.choice(self.dates))

    def withdraw(self, city: int, date: str) -> None:
        """Serve no file of a city and date until `publish`."""
        del self._bodies[city, date]

    def publish(self, city: int, date: str) -> None:
        """Serve a new file of a city and date."""
        self._write(city, date)

    def move(self) -> None:
        """Move a random city to another country."""
        self.moves += 1
        city = self._draw.choice(list(self._countries))
        self._countries[city] = self._draw.choice([one for one in COUNTRIES if one != self._countries[city]])

    def digests(self) -> set[str]:
        """Return the SHA-256 of every version of every file."""
        return {digest for versions in self._served.values() for digest in versions}

    def _write(self, city: int, date: str) -> None:
        large = self._large_files and city % LARGE_EVERY == LARGE_EVERY - 1
        records = 48_000 if large else self._files.choice([0, 40, 400, 1500, 3000])
        records += self._files.randrange(20) if records else 0
        start = self._files.randrange(POOL_RECORDS)
        repeated = self._pool * (1 + (start + records) // POOL_RECORDS)
        body = b"[" + b",".join(repeated[start : start + records]).replace(b"DATE", date.encode()) + b"]"
        self._bodies[city, date] = body
        versions = self._served.setdefault((city, date), [])
        versions.append(hashlib.sha256(body).hexdigest())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(READ_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    self.requests += 1
                    target = head.split(b" ", 2)[1].decode()
                    self.requests_by_target[target] += 1
                    await self._respond(_Request(target, parse_fields(head)), writer)
        except asyncio.CancelledError:
            reset(writer)  # only ``__aexit__`` cancels this task, so it ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        path, _, query = request.target.partition("?")
        if path == "/truth":
            served = {f"{city}/{date}": versions for (city, date), versions in self._served.items()}
            await _send(writer, 200, json.dumps(served).encode())
            return
        if path == "/health":
            await _send(writer, 200, b"{}")
            return
        if path == "/cities":
            listed = [
                {"id": city, "name": f"City {city}", "country": country} for city, country in self._countries.items()
            ]
            await self._send_with_fault(request, json.dumps(listed).encode(), writer)
            return
        file = int(path.split("/")[2]), parse_qs(query)["date"][0]
        body = self._bodies.get(file)
        if body is None:
            await _send(writer, 404, b"")
            return
        if "x-truthful" not in request.fields:
            await asyncio.sleep(self.pause_s)
        await self._send_with_fault(request, body, writer)

    async def _send_with_fault(self, request: _Request, body: bytes, writer: asyncio.StreamWriter) -> None:
        fault = self._choose()
        # The oracle's own requests always succeed.
        if "x-truthful" in request.fields:
            fault = None
        if fault is not None:
            self.injected[fault] += 1
        match fault:
            case UpstreamFault.ERROR_500:
                await _send(writer, 500, b"oh")
            case UpstreamFault.BUSY_503:
                await _send(writer, 503, b"", retry_after="1")
            case UpstreamFault.NOT_FOUND:
                await _send(writer, 404, b"")
            case UpstreamFault.RESET:
                reset(writer)
            case UpstreamFault.DAMAGED:
                await _send(writer, 200, body[: len(body) // 2] + b'{"passengers": oops' + body[len(body) // 2 :])
            case UpstreamFault.HTML_PAGE:
                await _send(writer, 200, b"<html>please log in</html>", content_type="text/html")
            case _:
                await self._send_file(request, body, fault, writer)

    async def _send_file(
        self, request: _Request, body: bytes, fault: UpstreamFault | None, writer: asyncio.StreamWriter
    ) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if request.fields.get("if-none-match") == etag:
            await _send(writer, 304, b"", etag=etag)
            return
        start = 0
        headers = {"etag": etag, "accept-ranges": "bytes"}
        wanted = request.fields.get("range", "")
        if wanted.startswith("bytes=") and request.fields.get("if-range") == etag:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["content_range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        writer.write(_head(206 if start else 200, len(part), headers))
        stop = len(part) // 2 if fault in {UpstreamFault.TRUNCATED, UpstreamFault.STALLED} else len(part)
        for offset in range(0, stop, CHUNK_BYTES):
            writer.write(part[offset : min(stop, offset + CHUNK_BYTES)])
            await writer.drain()
            await asyncio.sleep(0.15 if fault is UpstreamFault.SLOW else 0)
        if fault is UpstreamFault.STALLED:
            await asyncio.sleep(4)
        if stop < len(part):
            reset(writer)

    def _choose(self) -> UpstreamFault | None:
        for fault, rate in self.rates.items():
            if self._draw.random() < rate:
                return fault
        return None


def _record(draw: random.Random) -> bytes:
    delay = draw.choice([f"PT{draw.randrange(5000)}S", f"PT{draw.randrange(90)}M{draw.randrange(60)}S", "PT0S"])
    trip = {
        "departure-time": f"DATET{draw.randrange(24):02}:{draw.randrange(60):02}:00",
        "bus-type": f"BUS-{draw.randrange(200)}",
        "passengers": draw.randrange(90),
        "delay": delay,
        "accident": draw.random() < 0.02,
        "line": 'a "quoted" } ] , { field [ that is ignored',
    }
    return json.dumps(trip).encode()


def _head(status: int, content_length: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-length: {content_length}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


async def _send(writer: asyncio.StreamWriter, status: int, body: bytes, **headers: str) -> None:
    writer.write(_head(status, len(body), {"content_type": "application/json", **headers}) + body)
    await writer.drain()
