"""An HTTP proxy in front of an S3 store that injects faults, at random rates or from a script.

The proxy forwards each request byte for byte, with its ``Host`` header. So a signature made for the proxy's address is
valid at the store. Each connection carries one request. The faults:

- The proxy returns an error and the store applies nothing: 503, 500, 403, and 409 for a conditional write.

- The connection breaks before the store has the request, so the store applies nothing.

- The connection breaks in the middle of the request's body, so nothing may become visible.

- The store applies the request and the response is lost: the connection breaks, or a 500 replaces the response.

- The store applies a conditional write, and the response is 412 or lacks the new ETag.

- The response breaks off in the middle of its body.

- The proxy delays the request for some seconds, or the response to each write.
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
    """A fault of one request."""

    ERROR_503 = "S3 returned 503"
    ERROR_500 = "S3 returned 500"
    CONFLICT_409 = "S3 returned 409"
    RESET_BEFORE_APPLYING = "S3 connection reset before applying"
    RESET_MID_REQUEST = "S3 connection reset in the middle of a request"
    RESET_AFTER_APPLYING = "S3 connection reset after applying"
    ERROR_500_AFTER_APPLYING = "S3 returned 500 after applying"
    ERROR_412_AFTER_APPLYING = "S3 returned 412 after applying"
    ETAG_MISSING = "S3 response to a write had no ETag"
    RESPONSE_TRUNCATED = "S3 response truncated"
    DELAYED = "S3 request delayed"
    FORBIDDEN_403 = "S3 refused the credentials"


ERRORS = {
    Fault.ERROR_503: (503, "SlowDown"),
    Fault.ERROR_500: (500, "InternalError"),
    Fault.FORBIDDEN_403: (403, "InvalidAccessKeyId"),
    Fault.CONFLICT_409: (409, "ConditionalRequestConflict"),
    Fault.ERROR_500_AFTER_APPLYING: (500, "InternalError"),
    Fault.ERROR_412_AFTER_APPLYING: (412, "PreconditionFailed"),
}
APPLIED = frozenset({Fault.RESET_AFTER_APPLYING, Fault.ERROR_500_AFTER_APPLYING, Fault.ERROR_412_AFTER_APPLYING})


class RequestHead(msgspec.Struct, frozen=True, kw_only=True):
    """A request's line and headers, parsed and as bytes."""

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
        """The length of the body that follows."""
        return int(self.headers.get("content-length", "0"))


class FaultyS3:
    """Proxies a store on ``127.0.0.1:store_port``; use it as an async context manager.

    Tests can change these attributes at any time:

    * ``rates`` maps each fault to its probability.
    * ``down`` makes the proxy reset every connection.
    * ``write_s`` delays the response to each write, as a slow disk does.
    * ``script`` holds (method, text, fault) entries. The next request with that method and text in its target gets
      the fault of the first matching entry, which is then removed.

    ``injected`` counts the faults so far.
    """

    def __init__(self, store_port: int, *, seed: int = 0, delay_s: float = 3.0) -> None:
        self.rates: dict[Fault, float] = {}
        self.script: list[tuple[str, str, Fault]] = []
        self.injected: Counter[Fault] = Counter()
        self.requests = 0
        self.down = False
        self.write_s = 0.0
        self._store_port = store_port
        self._draw = random.Random(seed)
        self._delay_s = delay_s
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
            reset(writer)  # only ``__aexit__`` cancels this task, so it ends here
        finally:
            self._connections.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            reset(writer)
            return
        request = parse_head(await reader.readuntil(b"\r\n\r\n"))
        self.requests += 1
        fault = self._choose(request)
        if fault is not None:
            self.injected[fault] += 1
        if request.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.DELAYED:
            await asyncio.sleep(self._delay_s)
        if fault in ERRORS and fault not in APPLIED:
            await _discard(reader, request.body_bytes)
            await self._send_error(writer, request, fault)
            return
        if fault is Fault.RESET_BEFORE_APPLYING:
            await _discard(reader, request.body_bytes)
            reset(writer)
            return
        await self._forward(request, fault, reader, writer)

    async def _forward(
        self, request: RequestHead, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            store_reader, store_writer = await asyncio.open_connection(HOST, self._store_port)
        except OSError:
            reset(writer)
            raise
        try:
            store_writer.write(request.head)
            body_bytes = request.body_bytes // 2 if fault is Fault.RESET_MID_REQUEST else request.body_bytes
            await _copy(reader, store_writer, body_bytes)
            if fault is Fault.RESET_MID_REQUEST:
                reset(store_writer)
                reset(writer)
                return
            if request.method in {"PUT", "POST"}:
                await asyncio.sleep(self.write_s)
            if fault in APPLIED:
                response = await store_reader.read()
                # Without a response from the store the request may not be applied, so report no "after applying" fault.
                if not response:
                    reset(writer)
                elif fault in ERRORS:
                    await self._send_error(writer, request, fault)
                else:
                    reset(writer)
                return
            await self._relay_response(request, fault, store_reader, writer)
        finally:
            store_writer.close()

    async def _relay_response(
        self, request: RequestHead, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            head = await reader.readuntil(b"\r\n\r\n")
        if fault is Fault.ETAG_MISSING:
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"etag:"))
        writer.write(head)
        if fault is Fault.RESPONSE_TRUNCATED:
            size_bytes = int(parse_fields(head).get("content-length", "0"))
            if request.method == "GET" and size_bytes > 1:
                await _copy(reader, writer, size_bytes // 2)
                # Without this pause the reset overtakes the bytes sent before it.
                await asyncio.sleep(0.01)
            reset(writer)
            return
        while chunk := await reader.read(CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()

    def _choose(self, request: RequestHead) -> Fault | None:
        for position, (method, text, fault) in enumerate(self.script):
            if request.method == method and text in request.target:
                del self.script[position]
                return fault
        for fault, rate in self.rates.items():
            applies = {
                Fault.CONFLICT_409: request.conditional,
                Fault.ERROR_412_AFTER_APPLYING: request.conditional,
                Fault.ETAG_MISSING: request.conditional,
                Fault.RESET_MID_REQUEST: request.body_bytes > 1,
                Fault.RESPONSE_TRUNCATED: request.method == "GET",
                Fault.RESET_AFTER_APPLYING: request.method != "GET",
                Fault.ERROR_500_AFTER_APPLYING: request.method != "GET",
            }
            if applies.get(fault, True) and self._draw.random() < rate:
                return fault
        return None

    async def _send_error(self, writer: asyncio.StreamWriter, request: RequestHead, fault: Fault) -> None:
        status, code = ERRORS[fault]
        body = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>".encode()
        if request.method == "HEAD":
            body = b""
        writer.write(
            f"HTTP/1.1 {status} {code}\r\ncontent-type: application/xml\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n".encode()
            + body
        )
        await writer.drain()


def parse_head(head: bytes) -> RequestHead:
    """Parse a request's head; the result's ``head`` asks the store to close the connection after its response."""
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
    kept = [line for line in head.removesuffix(b"\r\n\r\n").split(b"\r\n") if not _is_hop_by_hop(line)]
    return RequestHead(
        method=method,
        target=target,
        headers=parse_fields(head),
        head=b"\r\n".join([*kept, b"Connection: close", b"", b""]),
    )


def parse_fields(head: bytes) -> dict[str, str]:
    """Return the header fields of a request or a response by their lower-case names."""
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
