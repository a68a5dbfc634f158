"""An HTTP server that misbehaves on purpose: what it sends, and when it stops, is written out byte by byte.

Each connection is answered once, by the next answer of ``answers``; the last one is used for all that come after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from email.utils import format_datetime
from typing import Self

import msgspec

HEAD_BYTES_MAX = 64 * 1024
OLD = "Wed, 01 May 2024 00:00:00 GMT"


class Request(msgspec.Struct, frozen=True):
    """A received request: its target, and its headers by their lower-case names."""

    target: str
    headers: dict[str, str]

    @property
    def first_byte(self) -> int:
        """The start of the requested range; 0 without one."""
        return int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])


class Connection:
    """One connection to the client under test."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def trickle(self, data: bytes, *, pause_s: float) -> None:
        """Send bytes one by one."""
        for byte in data:
            await self.send(bytes([byte]))
            await asyncio.sleep(pause_s)

    def reset(self) -> None:
        """Break the connection with a TCP reset."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Answer = Callable[[Request, Connection], Awaitable[None]]


class HostileServer:
    """Serves on a free port of 127.0.0.1. ``requests`` holds what was asked, ``busy_max`` how many at a time."""

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.answers = list(answers)
        self.requests: list[Request] = []
        self.busy_max = 0
        self._busy = 0
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, sock=self._socket, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            fields = (line.partition(":") for line in head[1:] if line)
            request = Request(head[0].split(" ")[1], {name.lower(): value.strip() for name, _, value in fields})
            self.requests.append(request)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            self._busy += 1
            self.busy_max = max(self.busy_max, self._busy)
            try:
                await answer(request, Connection(writer))
            finally:
                self._busy -= 1
                writer.close()


def head_of(status: int = 200, /, **headers: str) -> bytes:
    """Write a status line and headers; ``content_type`` is ``content-type``."""
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(body: bytes, status: int = 200, /, **headers: str) -> Answer:
    """Respond with a valid file."""
    return raw(head_of(status, content_length=str(len(body)), **headers) + body)


def chunked(body: bytes, *, finished: bool = True, **headers: str) -> Answer:
    """Respond with a chunked body, with or without its end."""
    parts = [body[start : start + 10_000] for start in range(0, len(body), 10_000)]
    coded = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    return raw(head_of(transfer_encoding="chunked", **headers) + coded + (b"0\r\n\r\n" if finished else b""))


def raw(data: bytes, *, reset: bool = False, stalled: bool = False) -> Answer:
    """Send bytes as they are, and close the connection; or break it, or keep it open in silence."""

    async def answer(_request: Request, connection: Connection) -> None:
        await connection.send(data)
        if reset:
            connection.reset()
        elif stalled:
            await asyncio.sleep(3600)

    return answer


def trickled(head: bytes, slow: bytes, *, pause_s: float = 0.01) -> Answer:
    """Send some bytes at once and the others one by one."""

    async def answer(_request: Request, connection: Connection) -> None:
        await connection.send(head)
        await connection.trickle(slow, pause_s=pause_s)

    return answer


class RangeServer:
    """Answers ranges of ``body`` as it should, but breaks off at each of ``cuts``: offsets in the file, each once.

    A part is at most ``part_bytes_max`` long. ``etag`` and ``last_modified`` may be None, and may be changed.
    """

    def __init__(self, body: bytes, *, cuts: list[int], etag: str | None = '"v1"', chunked: bool = False) -> None:
        self.body = body
        self.cuts = cuts
        self.etag = etag
        self.last_modified: str | None = None
        self.reset = False
        self._chunked = chunked

    async def __call__(self, request: Request, connection: Connection) -> None:
        start = request.first_byte if request.headers.get("if-range") in {self.etag, self.last_modified} else 0
        end = len(self.body)
        cut = next((cut for cut in sorted(self.cuts) if start <= cut), None)
        headers = {"content_length": str(end - start), "date": format_datetime(dt.datetime.now(dt.UTC), usegmt=True)}
        if self.etag is not None:
            headers["etag"] = self.etag
        if self.last_modified is not None:
            headers["last_modified"] = self.last_modified
        if start or "range" in request.headers:
            headers["content_range"] = f"bytes {start}-{end - 1}/{end}"
        if self._chunked:
            del headers["content_length"]
            headers["transfer_encoding"] = "chunked"
        await connection.send(head_of(206 if "content_range" in headers else 200, **headers))
        sent = self.body[start:cut]
        if cut is not None:
            self.cuts.remove(cut)
        if self._chunked:
            for begin in range(0, len(sent), 1_000):
                part = sent[begin : begin + 1_000]
                await connection.send(b"%x\r\n%b\r\n" % (len(part), part))
            if cut is None:
                await connection.send(b"0\r\n\r\n")
        else:
            await connection.send(sent)
        if cut is not None and self.reset:
            connection.reset()
