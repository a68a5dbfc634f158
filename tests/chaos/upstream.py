"""A transit authority's server that corrects its files, moves its cities, and misbehaves at rates that can be changed.

Its truth is told by ``/truth``: every version of every file that was ever served, by its SHA-256, so that a program
of its own can judge what became of them.
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
"""One city of so many has files that take several parts of an upload."""
READ_TIMEOUT_S = 60.0
COUNTRIES = ("Armenia", "Peru", "Россия", "Rossiia", "🇫🇷", 'A/B "quoted"')


class Mischief(enum.Enum):
    """How one answer is wrong."""

    ERROR_500 = "upstream answered 500"
    BUSY_503 = "upstream answered 503 with Retry-After"
    NOT_FOUND = "upstream answered 404"
    BROKEN = "upstream reset before an answer"
    CUT = "upstream file cut off"
    STALLED = "upstream stalled in the middle"
    SLOW = "upstream slow"
    GARBAGE = "upstream file damaged"
    PAGE = "upstream answered an HTML page"


class _Request(msgspec.Struct, frozen=True):
    target: str
    fields: dict[str, str]


class ChaosUpstream:
    """Serves on a free port; use it as an async context manager.

    ``rates`` maps mischief to its probability. ``pause_s`` is waited before each file. ``asked`` counts by target.
    """

    def __init__(self, *, cities: int, dates: list[str], seed: int, large_files: bool = True) -> None:
        self.rates: dict[Mischief, float] = {}
        self.injected: Counter[Mischief] = Counter()
        self.corrections = 0
        self.moves = 0
        self.requests = 0
        self.asked: Counter[str] = Counter()
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

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def correct(self, date: str | None = None) -> None:
        """Replace the file of some city, of ``date`` or of any."""
        self.corrections += 1
        self._write(self._draw.choice(list(self._countries)), date or self._draw.choice(self.dates))

    def move(self) -> None:
        """Move some city to another country."""
        self.moves += 1
        city = self._draw.choice(list(self._countries))
        self._countries[city] = self._draw.choice([one for one in COUNTRIES if one != self._countries[city]])

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
                    self.asked[target] += 1
                    await self._answer(_Request(target, parse_fields(head)), writer)
        except asyncio.CancelledError:
            reset(writer)  # asked to by ``__aexit__`` alone: the task ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _answer(self, request: _Request, writer: asyncio.StreamWriter) -> None:
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
            await self._send_somehow(request, json.dumps(listed).encode(), writer)
            return
        file = int(path.split("/")[2]), parse_qs(query)["date"][0]
        body = self._bodies.get(file)
        if body is None:
            await _send(writer, 404, b"")
            return
        if "x-truthful" not in request.fields:
            await asyncio.sleep(self.pause_s)
        await self._send_somehow(request, body, writer)

    async def _send_somehow(self, request: _Request, body: bytes, writer: asyncio.StreamWriter) -> None:
        mischief = self._choose()
        # A probe that is to learn the truth is answered well, always.
        if "x-truthful" in request.fields:
            mischief = None
        if mischief is not None:
            self.injected[mischief] += 1
        match mischief:
            case Mischief.ERROR_500:
                await _send(writer, 500, b"oh")
            case Mischief.BUSY_503:
                await _send(writer, 503, b"", retry_after="1")
            case Mischief.NOT_FOUND:
                await _send(writer, 404, b"")
            case Mischief.BROKEN:
                reset(writer)
            case Mischief.GARBAGE:
                await _send(writer, 200, body[: len(body) // 2] + b'{"passengers": oops' + body[len(body) // 2 :])
            case Mischief.PAGE:
                await _send(writer, 200, b"<html>please log in</html>", content_type="text/html")
            case _:
                await self._send_file(request, body, mischief, writer)

    async def _send_file(
        self, request: _Request, body: bytes, mischief: Mischief | None, writer: asyncio.StreamWriter
    ) -> None:
        etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if request.fields.get("if-none-match") == etag:
            await _send(writer, 304, b"", etag=etag)
            return
        start = 0
        headers = {"etag": etag, "accept-ranges": "bytes"}
        asked = request.fields.get("range", "")
        if asked.startswith("bytes=") and request.fields.get("if-range") == etag:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["content_range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        part = body[start:]
        writer.write(_head(206 if start else 200, len(part), headers))
        stop = len(part) // 2 if mischief in {Mischief.CUT, Mischief.STALLED} else len(part)
        for offset in range(0, stop, CHUNK_BYTES):
            writer.write(part[offset : min(stop, offset + CHUNK_BYTES)])
            await writer.drain()
            await asyncio.sleep(0.15 if mischief is Mischief.SLOW else 0)
        if mischief is Mischief.STALLED:
            await asyncio.sleep(4)
        if stop < len(part):
            reset(writer)

    def _choose(self) -> Mischief | None:
        for mischief, rate in self.rates.items():
            if self._draw.random() < rate:
                return mischief
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
