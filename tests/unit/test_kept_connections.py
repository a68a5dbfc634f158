"""Answers taken apart as they come, and connections that are used again only where nothing is left on them.

The faults are in the script of a server: it sends what a test tells it to, for one request after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from shared.kept_connections import Answer, Declined, KeptConnections, Origin, PartialAnswer

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
PLAIN = b'HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: "e"\r\n\r\nabc'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


def parsed(*pieces: bytes) -> Answer | None:
    """Return what an answer that comes in pieces is after the last one."""
    partial = PartialAnswer()
    answer = None
    for piece in pieces:
        assert answer is None, "the answer was taken for whole too early"
        answer = partial.take(piece)
    return answer


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED, EMPTY])
def test_an_answer_is_the_same_in_any_pieces(answer: bytes) -> None:
    """Wherever an answer is cut on its way, it is whole with its last byte, and not before."""
    whole = parsed(answer)
    assert whole is not None
    assert whole.body == (b"" if answer is EMPTY else b"abc")
    for cut in range(1, len(answer)):
        assert parsed(answer[:cut], answer[cut:]) == whole
    assert parsed(*(answer[place : place + 1] for place in range(len(answer)))) == whole


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length : 3\r\n\r\nabc",
        b'HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: "a\nb"\r\n\r\nabc',
        b'HTTP/1.1 200 OK\r\nContent-Length: 3\r\nETag: "a"\r\n folded\r\n\r\nabc',
        PLAIN + b"d",
        CHUNKED + b"d",
        CHUNKED.replace(b"\r\n2\r\nab", b"\r\n2;x=y\r\nab"),
        CHUNKED.replace(b"\r\n2\r\nab", b"\r\n+2\r\nab"),
        CHUNKED.replace(b"\r\n2\r\nab", b"\r\n1\r\nab"),
        CHUNKED.replace(b"0\r\n\r\n", b"0\r\na: b\r\n\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 100,
        b"HTTP/1.1 200 OK\r\na: " + b"b" * 70_000,
        b"SSH-2.0-x\r\n\r\n",
    ],
)
def test_what_is_not_plain_is_declined(answer: bytes) -> None:
    """An answer whose end or whose fields can be read in two ways is not read in one of them."""
    with pytest.raises(Declined):
        parsed(answer)


class Server:
    """Sends what its script tells, one entry for a request; an empty one hangs up. It counts what came."""

    def __init__(self, *script: bytes) -> None:
        self.script = list(script)
        self.requests = 0
        self.connections = 0
        self.origin = Origin("127.0.0.1", 0)
        self.writers: list[asyncio.StreamWriter] = []
        self.hung_up = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                answer = self.script.pop(0)
                if not answer:
                    break
                writer.write(answer)
                await writer.drain()
        self.hung_up.set()
        writer.close()


@contextlib.asynccontextmanager
async def serving(*script: bytes) -> AsyncIterator[tuple[Server, KeptConnections]]:
    """Run a server with a script, and connections to it."""
    server = Server(*script)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.origin = Origin(*listening.sockets[0].getsockname()[:2])
    connections = KeptConnections(connections_max=2, tls=None)
    try:
        yield server, connections
    finally:
        connections.close()
        listening.close()


async def test_a_connection_is_used_again() -> None:
    """Requests one after the other share a connection, those side by side have at most so many."""
    async with serving(*[PLAIN] * 8) as (server, connections):
        for _ in range(3):
            assert (await connections.ask(server.origin, REQUEST)).body == b"abc"
        assert server.connections == 1
        await asyncio.gather(*(connections.ask(server.origin, REQUEST) for _ in range(5)))
        assert server.connections == 2


async def test_a_connection_that_is_to_be_closed_is_not_used_again() -> None:
    """A server that says that it closes the connection gets another one for the next request."""
    closing = PLAIN.replace(b"ETag", b"Connection: close\r\nETag")
    async with serving(closing, PLAIN) as (server, connections):
        assert (await connections.ask(server.origin, REQUEST)).body == b"abc"
        assert (await connections.ask(server.origin, REQUEST)).body == b"abc"
        assert server.connections == 2


async def test_a_request_that_breaks_off_is_not_sent_again() -> None:
    """A connection that ends before the answer is declined: whether to ask again is not decided here."""
    async with serving(PLAIN, b"", PLAIN) as (server, connections):
        await connections.ask(server.origin, REQUEST)
        with pytest.raises(Declined):
            await connections.ask(server.origin, REQUEST)
        assert server.requests == 2
        assert (await connections.ask(server.origin, REQUEST)).status == 200


async def test_what_nobody_asked_for_answers_nothing() -> None:
    """Bytes that come between two requests end their connection: they are never taken for the answer to the next."""
    async with serving(PLAIN, PLAIN) as (server, connections):
        await connections.ask(server.origin, REQUEST)
        server.writers[0].write(PLAIN.replace(b"abc", b"xyz"))
        async with asyncio.timeout(5):
            await server.hung_up.wait()
        assert (await connections.ask(server.origin, REQUEST)).body == b"abc"
        assert server.connections == 2


async def test_a_request_that_is_given_up_leaves_no_answer_behind() -> None:
    """The connection of a cancelled request is not used again: its answer may still be on the way."""
    async with serving(PLAIN.replace(b"abc", b"ab"), PLAIN) as (server, connections):
        asking = asyncio.ensure_future(connections.ask(server.origin, REQUEST))
        async with asyncio.timeout(5):
            while server.requests == 0:  # noqa: ASYNC110  # the server has no event for it
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert (await connections.ask(server.origin, REQUEST)).body == b"abc"
        assert server.connections == 2


async def test_a_server_that_is_away_is_declined(unused_tcp_port: int) -> None:
    """A connection that cannot be made is declined, too."""
    connections = KeptConnections(connections_max=1, tls=None)
    with pytest.raises(Declined):
        await connections.ask(Origin("127.0.0.1", unused_tcp_port), REQUEST)
