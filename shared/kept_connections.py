"""HTTP/1.1 over connections that are kept: the plain answer to a small request, at a fifth of a general client's cost.

Only what no sensible server answers otherwise is understood: a final status, a body of a known length or in chunks.
Whatever else comes is `Declined` and ends its connection; so is what comes although nobody has asked, since it would be
taken for the answer to the next request. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import NamedTuple, cast

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0  # racing writers of one key can be made to wait for seconds by the store
IDLE_MAX_S = 15.0
HEAD_BYTES_MAX = 64 * 1024
CHUNK_LINE_BYTES_MAX = 20

_STATUS = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: |$)")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_BODILESS = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}


class Declined(Exception):
    """The answer is not the plain one, or there is none. The request may have been carried out."""


class Origin(NamedTuple):
    """Where a server is reached."""

    host: str
    port: int


class Answer(NamedTuple):
    """What a server answered; the names of the fields are in lower case."""

    status: int
    fields: Mapping[str, str]
    body: bytes


class KeptConnections:
    """At most ``connections_max`` connections, each used over and over; with ``tls``, all of them are encrypted."""

    def __init__(self, *, connections_max: int, tls: ssl.SSLContext | None) -> None:
        self._room = asyncio.Semaphore(connections_max)
        self._tls = tls
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def ask(self, origin: Origin, head: bytes, body: bytes = b"") -> Answer:
        """Send a request, ``head`` with the empty line at its end, and return the answer. Raises Declined."""
        async with self._room:
            try:
                connection = self._kept(origin) or await self._connect(origin)
                try:
                    answer = await connection.ask(head, body)
                except BaseException:
                    connection.end()
                    raise
            except OSError as error:  # TimeoutError and the errors of TLS are among them
                raise Declined(str(error) or type(error).__name__) from error
            if not connection.ended:
                connection.idle_since_s = time.monotonic()
                self._idle.append(connection)
            return answer

    def close(self) -> None:
        """End all connections. What is under way on them is declined."""
        for connection in list(self._open):
            connection.end()

    def _kept(self, origin: Origin) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.ended:
                continue
            if connection.origin == origin and time.monotonic() - connection.idle_since_s < IDLE_MAX_S:
                return connection
            connection.end()
        return None

    async def _connect(self, origin: Origin) -> _Connection:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(origin, self._open), origin.host, origin.port, ssl=self._tls
            )
        return connection


class _Connection(asyncio.Protocol):
    """One connection: a request is written to it, and the answer is taken apart as it comes."""

    def __init__(self, origin: Origin, open_ones: set[_Connection]) -> None:
        self.origin = origin
        self.idle_since_s = 0.0
        self.ended = False
        self._open_ones = open_ones
        self._loop = asyncio.get_running_loop()  # asking for it is a system call
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._answer = PartialAnswer()

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request and return the answer to it. Raises Declined."""
        if self._transport is None or self.ended:
            raise Declined("the connection has ended")
        self._answer = PartialAnswer()
        self._waiting = self._loop.create_future()
        timer = self._loop.call_later(ANSWER_TIMEOUT_S, self._decline, f"no answer within {ANSWER_TIMEOUT_S:g} s")
        try:
            self._transport.writelines([head, body] if body else [head])
            return await self._waiting
        finally:
            timer.cancel()
            self._waiting = None

    def end(self) -> None:
        """End the connection at once, whatever is under way on it."""
        self.ended = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._open_ones.add(self)

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            self.end()
            return
        try:
            answer = self._answer.take(data)
        except Declined as error:
            self._waiting.set_exception(error)
            return
        if answer is not None:
            if answer.fields.get("connection", "keep-alive").lower() != "keep-alive":
                self.end()
            self._waiting.set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True
        self._open_ones.discard(self)
        self._decline(f"the connection broke off: {exc or 'it was closed'}")

    def _decline(self, reason: str) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(Declined(reason))


class PartialAnswer:
    """An answer as far as it has come."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._head: tuple[int, dict[str, str]] | None = None
        self._length: int | None = None  # None: in chunks
        self._chunks = bytearray()

    def take(self, data: bytes) -> Answer | None:
        """Add what came; return the answer once it is whole. Raises Declined."""
        self._received += data
        if self._head is None:
            end = self._received.find(b"\r\n\r\n")
            if end > HEAD_BYTES_MAX or (end < 0 and len(self._received) > HEAD_BYTES_MAX):
                raise Declined("a head that is too long")
            if end < 0:
                return None
            status, fields = self._head = parse_head(bytes(self._received[:end]))
            del self._received[: end + 4]
            self._length = _length_of(status, fields)
        body = self._body_in_chunks() if self._length is None else self._body_of(self._length)
        return None if body is None else Answer(*self._head, body)

    def _body_of(self, length: int) -> bytes | None:
        if len(self._received) > length:
            raise Declined("more bytes than were announced")
        return bytes(self._received) if len(self._received) == length else None

    def _body_in_chunks(self) -> bytes | None:
        while (line_end := self._received.find(b"\r\n", 0, CHUNK_LINE_BYTES_MAX)) >= 0:
            line = bytes(self._received[:line_end])
            if not _CHUNK_SIZE.fullmatch(line):
                raise Declined("a chunk without a plain size")
            begin = line_end + 2
            end = begin + int(line, 16)
            if len(self._received) < end + 2:
                return None
            if self._received[end : end + 2] != b"\r\n":
                raise Declined("a chunk of another size than it says, or a trailer")
            self._chunks += memoryview(self._received)[begin:end]
            del self._received[: end + 2]
            if begin == end:
                if self._received:
                    raise Declined("more bytes than were announced")
                return bytes(self._chunks)
        if len(self._received) >= CHUNK_LINE_BYTES_MAX:
            raise Declined("a chunk without a size")
        return None


def parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return the status and the fields of an answer's head, without the empty line. Raises Declined."""
    first, *lines = head.split(b"\r\n")
    status = _STATUS.match(first)
    if status is None:
        raise Declined(f"a first line that is not plain: {first[:80]!r}")
    fields: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise Declined(f"a field that is not plain: {line[:80]!r}")
        name, value = field[1].decode().lower(), field[2].decode("latin-1").rstrip(" \t")
        if name in fields and name in {"content-length", "transfer-encoding", "etag"}:
            raise Declined(f"two fields {name}")
        fields[name] = value
    return int(status[1]), fields


def _length_of(status: int, fields: Mapping[str, str]) -> int | None:
    length, encoding = fields.get("content-length"), fields.get("transfer-encoding")
    if status in _BODILESS:
        return 0
    if encoding is not None:
        if encoding.lower() != "chunked" or length is not None:
            raise Declined("a body whose end is not plain")
        return None
    if length is None or not _LENGTH.fullmatch(length):
        raise Declined("a body of no plain length")
    return int(length)
