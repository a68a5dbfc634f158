"""Single connections to Kafka and the store, on which the cheapest question is asked: what the network does shows."""

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
OVERTAKING = 20
"""So many answers come past the proxy while those through it are held, or delayed."""
SLOW_ANSWERS = 5


def _kafka_answer_bytes(received: bytes) -> int | None:
    return 4 + int.from_bytes(received[:4]) if len(received) >= 4 else None


def _http_answer_bytes(received: bytes) -> int | None:
    head, end, _ = received.partition(b"\r\n\r\n")
    if not end:
        return None
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return len(head) + len(end) + int(length.split(b":")[1])


class Server(msgspec.Struct, frozen=True):
    """Where a server is, past the proxy and through it, and a question that it answers at any time."""

    address: str
    proxied: str
    question: bytes
    answer_bytes: Callable[[bytes], int | None]


def kafka(proxied: str) -> Server:
    """Return Kafka, to be asked which versions of its requests it knows."""
    api_versions = struct.pack(">ihhih", 10, 18, 0, 1, -1)
    return Server(os.environ[KAFKA_VARIABLE], proxied, api_versions, _kafka_answer_bytes)


def s3(proxied: str) -> Server:
    """Return the store, to be asked whether it is well."""
    request = b"GET /healthz HTTP/1.1\r\nHost: s3\r\n\r\n"
    return Server(os.environ[S3_VARIABLE].removeprefix("http://"), proxied, request, _http_answer_bytes)


class Connection:
    """One connection to a server, which counts what comes; use it as an async context manager."""

    def __init__(self, server: Server, address: str) -> None:
        self._server = server
        self._address = address
        self.answers = 0
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

    async def ask(self) -> bool:
        """Ask, and wait for the whole answer; return False if the connection ends before it."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, self._server.question)
        answer = b""
        while self._server.answer_bytes(answer) != len(answer):
            chunk = await loop.sock_recv(self._socket, CHUNK_BYTES)
            if not chunk:
                return False
            answer += chunk
            self.received_bytes += len(chunk)
            self.reads += 1
        self.answers += 1
        return True

    async def ask_until_it_ends(self) -> None:
        """Ask again and again until the connection is ended or reset."""
        try:
            while await self.ask():
                pass
        except ConnectionError:
            return


async def is_slow(behind: Server, *, in_pieces: bool) -> None:
    """Find that others are answered first, past the proxy; all of it comes in the end, in pieces if it is said so."""
    async with Connection(behind, behind.proxied) as connection:
        overtaken = 0
        for _ in range(SLOW_ANSWERS):
            asking = asyncio.create_task(connection.ask())
            await asyncio.sleep(0)  # the question is on its way first
            overtaken += await overtake(behind, OVERTAKING, until=asking)
            assert await asking
        assert overtaken >= OVERTAKING
        if in_pieces:
            assert connection.reads > connection.answers


async def overtake(behind: Server, times: int, *, until: asyncio.Task[bool] | None = None) -> int:
    """Be answered past the proxy, so many times or until a task is done; return how many times."""
    async with Connection(behind, behind.address) as past:
        while past.answers < times and not (until is not None and until.done()):
            assert await past.ask()
        return past.answers
