"""An HTTP proxy that stands before an S3 store and answers wrongly on purpose: at rates, or as it is told.

A request is passed on byte for byte, its ``Host`` header included, so a signature made for the proxy's address is
valid at the store. Each connection carries one request. The faults, and what a client has to make of them:

- an error is answered and nothing was applied: 503, 500, and 409 for a conditional write;
- the connection breaks before the store has the request: nothing was applied;
- the connection breaks in the middle of the request's body: nothing may become visible;
- the store applied it, and the answer is lost: the connection breaks, or a 500 takes the answer's place;
- the store applied a conditional write, and says that the condition does not hold, or does not say the new ETag;
- the answer breaks off in the middle of its body;
- the request is held for some seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Self

import msgspec

from tests.chaos.relay import HOST, reset

HEAD_BYTES_MAX = 64 * 1024
CHUNK_BYTES = 64 * 1024
READ_TIMEOUT_S = 120.0


class Fault(enum.Enum):
    """What is done to one request."""

    ERROR_503 = "S3 answered 503"
    ERROR_500 = "S3 answered 500"
    CONFLICT_409 = "S3 answered 409"
    BROKEN_BEFORE = "S3 connection broken before applying"
    BROKEN_WITHIN = "S3 connection broken in the middle of a request"
    BROKEN_AFTER = "S3 connection broken after applying"
    ERROR_AFTER = "S3 answered 500 after applying"
    PRECONDITION_AFTER = "S3 answered 412 after applying"
    ETAG_LOST = "S3 answered a write without an ETag"
    ANSWER_CUT = "S3 answer broken off"
    HELD = "S3 request held"


ERRORS = {
    Fault.ERROR_503: (503, "SlowDown"),
    Fault.ERROR_500: (500, "InternalError"),
    Fault.CONFLICT_409: (409, "ConditionalRequestConflict"),
    Fault.ERROR_AFTER: (500, "InternalError"),
    Fault.PRECONDITION_AFTER: (412, "PreconditionFailed"),
}
AFTER = frozenset({Fault.BROKEN_AFTER, Fault.ERROR_AFTER, Fault.PRECONDITION_AFTER})


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request's head: what it asks for, and the bytes as they came."""

    method: str
    target: str
    headers: Mapping[str, str]
    head: bytes

    @property
    def conditional(self) -> bool:
        """Whether it is a compare-and-swap."""
        return self.method == "PUT" and bool({"if-match", "if-none-match"} & self.headers.keys())

    @property
    def body_bytes(self) -> int:
        """How long the body is that follows."""
        return int(self.headers.get("content-length", "0"))


class FaultyS3:
    """Proxies a store on ``127.0.0.1:store_port``; use it as an async context manager.

    ``rates`` maps faults to their probabilities, which may be changed at any time, as may ``away``: then every
    connection is reset. ``script`` holds faults for the next requests whose target contains a text, first come first
    served. ``injected`` counts the faults that happened.
    """

    def __init__(self, store_port: int, *, seed: int = 0, hold_s: float = 3.0) -> None:
        self.rates: dict[Fault, float] = {}
        self.script: list[tuple[str, str, Fault]] = []
        self.injected: Counter[Fault] = Counter()
        self.requests = 0
        self.away = False
        self._store_port = store_port
        self._draw = random.Random(seed)
        self._hold_s = hold_s
        self._socket = socket.create_server((HOST, 0))
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://{HOST}:{self.port}"
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._socket, limit=HEAD_BYTES_MAX)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                async with asyncio.timeout(READ_TIMEOUT_S):
                    await self._serve(reader, writer)
        except asyncio.CancelledError:
            reset(writer)  # asked to by ``__aexit__`` alone: the task ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.away:
            reset(writer)
            return
        asked = parse_head(await reader.readuntil(b"\r\n\r\n"))
        self.requests += 1
        fault = self._choose(asked)
        if fault is not None:
            self.injected[fault] += 1
        if asked.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.HELD:
            await asyncio.sleep(self._hold_s)
        if fault in ERRORS and fault not in AFTER:
            await _discard(reader, asked.body_bytes)
            await self._error(writer, asked, fault)
            return
        if fault is Fault.BROKEN_BEFORE:
            await _discard(reader, asked.body_bytes)
            reset(writer)
            return
        await self._pass_on(asked, fault, reader, writer)

    async def _pass_on(
        self, asked: Asked, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            store_reader, store_writer = await asyncio.open_connection(HOST, self._store_port)
        except OSError:
            reset(writer)
            raise
        try:
            store_writer.write(asked.head)
            body_bytes = asked.body_bytes // 2 if fault is Fault.BROKEN_WITHIN else asked.body_bytes
            await _copy(reader, store_writer, body_bytes)
            if fault is Fault.BROKEN_WITHIN:
                reset(store_writer)
                reset(writer)
                return
            if fault in AFTER:
                answer = await store_reader.read()
                # A client told that nobody answered would ask again all the same; but then nothing was lost here.
                if not answer:
                    reset(writer)
                elif fault in ERRORS:
                    await self._error(writer, asked, fault)
                else:
                    reset(writer)
                return
            await self._answer(asked, fault, store_reader, writer)
        finally:
            store_writer.close()

    async def _answer(
        self, asked: Asked, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = await reader.readuntil(b"\r\n\r\n")
        if fault is Fault.ETAG_LOST:
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"etag:"))
        writer.write(head)
        if fault is Fault.ANSWER_CUT:
            size_bytes = int(parse_fields(head).get("content-length", "0"))
            if asked.method == "GET" and size_bytes > 1:
                await _copy(reader, writer, size_bytes // 2)
                # Else the reset would overtake what was sent before it.
                await asyncio.sleep(0.01)
            reset(writer)
            return
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()

    def _choose(self, asked: Asked) -> Fault | None:
        for position, (method, text, fault) in enumerate(self.script):
            if asked.method == method and text in asked.target:
                del self.script[position]
                return fault
        for fault, rate in self.rates.items():
            applies = {
                Fault.CONFLICT_409: asked.conditional,
                Fault.PRECONDITION_AFTER: asked.conditional,
                Fault.ETAG_LOST: asked.conditional,
                Fault.BROKEN_WITHIN: asked.body_bytes > 1,
                Fault.ANSWER_CUT: asked.method == "GET",
                Fault.BROKEN_AFTER: asked.method != "GET",
                Fault.ERROR_AFTER: asked.method != "GET",
            }
            if applies.get(fault, True) and self._draw.random() < rate:
                return fault
        return None

    async def _error(self, writer: asyncio.StreamWriter, asked: Asked, fault: Fault) -> None:
        status, code = ERRORS[fault]
        body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
        if asked.method == "HEAD":
            body = b""
        writer.write(
            f"HTTP/1.1 {status} {code}\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()


def parse_head(head: bytes) -> Asked:
    """Read a request's head. ``head`` of the result asks the store to close the connection after its answer."""
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    kept = [line for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n") if not _is_hop_by_hop(line)]
    return Asked(
        method=method,
        target=target,
        headers=parse_fields(head),
        head=b"\r\n".join([*kept, b"Connection: close", b"", b""]),
    )


def parse_fields(head: bytes) -> dict[str, str]:
    """Read the fields of a request's or an answer's head, by their names in lower case."""
    fields = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:] if line)
    return {name.lower(): value.strip() for name, _, value in fields}


def _is_hop_by_hop(line: bytes) -> bool:
    return line.lower().startswith((b"connection:", b"keep-alive:", b"expect:"))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size_bytes: int) -> None:
    left = size_bytes
    while left and (chunk := await reader.read(min(left, CHUNK_BYTES))):
        left -= len(chunk)
        writer.write(chunk)
        await writer.drain()
    if left:
        raise asyncio.IncompleteReadError(b"", left)


async def _discard(reader: asyncio.StreamReader, size_bytes: int) -> None:
    left = size_bytes
    while left and (chunk := await reader.read(min(left, CHUNK_BYTES))):
        left -= len(chunk)
