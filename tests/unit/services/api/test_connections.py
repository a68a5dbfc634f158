"""Connections of clients that send too late, too much or too often, over real sockets."""

from __future__ import annotations

import contextlib
import functools
import json
import select
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from services.api.auth import digest_of, mint_key
from services.api.connections import BoundedConnection
from services.api.middleware.size_limits import BODY_BYTES_MAX, SizeLimits
from tests.fakes.api import World
from tests.serving import listening, served

WAIT_MAX_S = 15.0
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CHUNKED = "POST /process-request?date=2024-05-01 HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
CHUNK = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
KEY = mint_key()


@pytest.fixture(name="address", scope="module")
def _address() -> Iterator[str]:
    """Serve the API with the usual limits, and a key."""
    with served(World(), api_access="keys", api_keys=f"all:read+process:{digest_of(KEY)}") as address:
        yield address


@contextlib.contextmanager
def limited(**limits: Any) -> Iterator[str]:
    """Serve the API with some other limits of connections."""
    protocol = functools.partial(BoundedConnection, **limits)
    with World().shared_app() as app, listening(app, http=protocol) as address:
        yield address


def connected(address: str) -> socket.socket:
    """Return a connection to the API."""
    host, _, port = address.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_MAX_S)


def received(connection: socket.socket) -> bytes:
    """Return everything that the server sends until it ends the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def status(connection: socket.socket, request: bytes = LIVE) -> int:
    """Send a request; return the status of its whole response."""
    connection.sendall(request)
    response = HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


def refuses(connection: socket.socket, data: bytes) -> bool:
    """Send data; return whether the server has ended the connection."""
    try:
        connection.sendall(data)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return False


@pytest.mark.parametrize("sent", [b"", b"GET /health/li", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_connection_without_a_whole_head_ends(sent: bytes) -> None:
    """A connection that sends nothing, or no whole head, ends; also after a request that was served."""
    with limited(head_timeout_s=0.1) as address, connected(address) as fresh, connected(address) as used:
        assert status(used) == 200
        for connection in (fresh, used) if sent else (fresh,):
            connection.sendall(sent)
            assert received(connection) == b""


def test_slowly_arriving_head_ends_too() -> None:
    """Each byte of a head arrives in time, and the head as a whole does not."""
    with limited(head_timeout_s=0.2) as address, connected(address) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
        deadline_s = time.monotonic() + WAIT_MAX_S
        while not select.select([connection], [], [], 0.02)[0]:
            assert time.monotonic() < deadline_s
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        assert received(connection) == b""


def test_a_request_may_take_longer_than_its_head() -> None:
    """The limit is for heads: a request that is served outlasts it, and so does the next one."""
    wait = b"POST /process-request?date=2024-05-01 HTTP/1.1\r\nHost: 127.0.0.1\r\nPrefer: wait=1\r\n\r\n"
    with limited(head_timeout_s=0.3) as address, connected(address) as connection:
        assert [status(connection, request) for request in (wait, LIVE)] == [202, 200]


def test_connections_are_bounded() -> None:
    """A connection over the limit gets 503; those within it go on; one that ends makes room."""
    with limited(connections_max=2) as address, connected(address) as first:
        with connected(address) as second:
            assert [status(first), status(second)] == [200, 200]
            with connected(address) as third:
                head, _, body = received(third).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: " in head
            assert "2 connections are open" in json.loads(body)["detail"]
            assert [status(first), status(second)] == [200, 200]
        deadline_s = time.monotonic() + WAIT_MAX_S
        while not has_room(address):
            assert time.monotonic() < deadline_s


def has_room(address: str) -> bool:
    """Return whether a new connection is served."""
    with connected(address) as connection, contextlib.suppress(OSError):
        return status(connection) == 200
    return False


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the limit needs Linux")
def test_connection_ends_if_nobody_reads_the_response() -> None:
    """A client that accepts no data does not hold its connection for ever."""
    with limited(unread_timeout_s=0.5) as address, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, _, port = address.removeprefix("http://").partition(":")
        connection.connect((host, int(port)))
        connection.sendall(b"GET /schema/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
        connection.setblocking(False)
        deadline_s = time.monotonic() + WAIT_MAX_S
        while not refuses(connection, b"G"):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


@pytest.mark.parametrize("key", [f"X-API-Key: {KEY}\r\n", "", "X-API-Key: wrong\r\n"], ids=["known", "none", "unknown"])
def test_endless_body_is_413(address: str, key: str) -> None:
    """A chunked body is read to the limit, whoever sends it, and the connection ends."""
    with connected(address) as connection:
        connection.sendall(f"{CHUNKED}{key}\r\n".encode())
        assert any(refuses(connection, CHUNK) for _ in range(10_000))
        response = received(connection)
    assert response.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in response


def test_body_within_the_limit_is_read_and_ignored(address: str) -> None:
    """The request after a body is served on the same connection."""
    client = HTTPConnection(address.removeprefix("http://"), timeout=WAIT_MAX_S)
    with contextlib.closing(client):
        for body in (b"{}", iter([b"x" * 1000] * 32), b"x" * BODY_BYTES_MAX):
            client.request("POST", "/process-request?date=2024-05-01", body=body, headers={"X-API-Key": KEY})
            response = client.getresponse()
            assert (response.status, response.getheader("connection")) == (202, None)
            response.read()


def test_late_body_is_408() -> None:
    """A body that does not come in time ends the connection, and the application gets no request."""

    async def application(*_: object) -> None:
        raise AssertionError

    slow = SizeLimits(application, body_timeout_s=0.1)
    with listening(slow, lifespan="off") as address, connected(address) as connection:
        connection.sendall(f"{CHUNKED}\r\n5\r\nab".encode())
        response = received(connection)
    assert response.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in response


def test_head_up_to_the_documented_limits_is_read(address: str) -> None:
    """Headers over 32 KiB get 431 and an address over 32 KiB gets 414, although they come in pieces."""
    for sent, status in (
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Large: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
        (b"GET /health/live?x=" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"414"),
    ):
        with connected(address) as connection:
            for begin in range(0, len(sent), 10_000):
                connection.sendall(sent[begin : begin + 10_000])
                time.sleep(0.01)
            assert received(connection).startswith(b"HTTP/1.1 " + status)
