"""Single connections to Kafka and S3 with a cheap request, to observe what the network does."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Self

import msgspec

from tests.integration.conftest import KAFKA_VARIABLE, S3_VARIABLE

CHUNK_BYTES = 64 * 1024
DIRECT_RESPONSES = 20
"""The number of direct responses that must arrive while proxied ones are delayed."""
SLOW_RESPONSES = 5


def _kafka_response_bytes(received: bytes) -> int | None:
    return 4 + int.from_bytes(received[:4]) if len(received) >= 4 else None


def _http_response_bytes(received: bytes) -> int | None:
    head, end, _ = received.partition(b"\r\n\r\n")
    if not end:
        return None
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(head) + len(end) + int(length.split(b":")[1])


class Server(msgspec.Struct, frozen=True):
    """A server's direct and proxied address, and a request that it always responds to."""

    address: str
    proxied: str
    request: bytes
    response_bytes: Callable[[bytes], int | None]


def kafka(proxied: str) -> Server:
    """Return Kafka with an ApiVersions request."""
    api_versions = struct.pack(">ihhih", 10, 18, 0, 1, -1)
    return Server(os.environ[KAFKA_VARIABLE], proxied, api_versions, _kafka_response_bytes)


def s3(proxied: str) -> Server:
    """Return the store with a health request."""
    request = b"GET /healthz HTTP/1.1\r\nHost: s3\r\n\r\n"
    return Server(os.environ[S3_VARIABLE].removeprefix("http://"), proxied, request, _http_response_bytes)


class Connection:
    """A connection to a server that counts responses; use it as an async context manager."""

    def __init__(self, server: Server, address: str) -> None:
        self._server = server
        self._address = address
        self.responses = 0
        self.received_bytes = 0
        self.reads = 0

    async def __aenter__(self) -> Self:
        host, _, port = self._address.rpartition(":")
        self._socket = socket.socket()
        self._socket.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(self._socket, (host, int(port)))
        except BaseException:
            self._socket.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()

    async def request(self) -> bool:
        """Send the request and read the response; return False if the connection closes before its end."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, self._server.request)
        response = b""
        while self._server.response_bytes(response) != len(response):
            chunk = await loop.sock_recv(self._socket, CHUNK_BYTES)
            if not chunk:
                return False
            response += chunk
            self.received_bytes += len(chunk)
            self.reads += 1
        self.responses += 1
        return True

    async def request_until_closed(self) -> None:
        """Send requests until the connection is closed or reset."""
        try:
            while await self.request():
                pass
        except ConnectionError:
            return


async def assert_slow_responses(server: Server, *, in_pieces: bool) -> None:
    """Check that direct responses arrive first, and that proxied ones arrive whole, and in pieces if ``in_pieces``."""
    async with Connection(server, server.proxied) as connection:
        direct = 0
        for _ in range(SLOW_RESPONSES):
            response = asyncio.create_task(connection.request())
            await asyncio.sleep(0)  # send the proxied request first
            direct += await get_direct_responses(server, DIRECT_RESPONSES, until=response)
            assert await response
        assert direct >= DIRECT_RESPONSES
        if in_pieces:
            assert connection.reads > connection.responses


async def get_direct_responses(server: Server, times: int, *, until: asyncio.Task[bool] | None = None) -> int:
    """Read direct responses, so many or until a task is done; return their number."""
    async with Connection(server, server.address) as connection:
        while connection.responses < times and not (until is not None and until.done()):
            assert await connection.request()
        return connection.responses
