"""Silence, slow bytes and endless responses."""

from __future__ import annotations

import asyncio

import pytest

from services.ingest.upstream import client as upstream_client
from tests.integration.services.ingest.upstream.client import (
    LARGE,
    client_of,
)
from tests.integration.services.ingest.upstream.hostile import (
    Answer,
    Connection,
    HostileServer,
    Request,
    chunked,
    head_of,
    raw,
    trickled,
)

STALLED: dict[str, Answer] = {
    "before the status": raw(b"", stalled=True),
    "in the headers": raw(b"HTTP/1.1 200 OK\r\n", stalled=True),
    "in the body": raw(head_of(content_length="1000") + b"[", stalled=True),
    "in a chunk": raw(head_of(transfer_encoding="chunked") + b"ff\r\n[", stalled=True),
}


@pytest.mark.parametrize("answer", STALLED.values(), ids=STALLED.keys())
async def test_silence_costs_an_attempt(answer: Answer) -> None:
    """A response that stalls does not hold a stream."""
    async with HostileServer(answer) as server, client_of(server.url, read_timeout_s=0.2, attempts=2) as client:
        failure = await client.failure()
        assert "stalled" in failure
        assert "(2 attempts)" in failure


async def test_a_byte_at_a_time_costs_an_attempt() -> None:
    """An occasional byte does not hold a stream."""
    answer = trickled(head_of(content_length="100000"), b" " * 100_000)
    async with HostileServer(answer) as server, client_of(server.url, speed_window_s=0.1, attempts=2) as client:
        failure = await client.failure()
        assert "bytes a second" in failure
        assert "(2 attempts)" in failure


async def test_slow_headers_are_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a response has one deadline, however often a byte of it arrives."""
    monkeypatch.setattr(upstream_client, "CONNECT_TIMEOUT_S", 0.2)
    async with (
        HostileServer(trickled(b"HTTP/1.1 200 OK\r\nx: ", b"y" * 10_000)) as server,
        client_of(server.url, read_timeout_s=0.2, attempts=1) as client,
    ):
        assert "stalled" in await client.failure()


@pytest.mark.parametrize("framing", [b"2;", b"2\r\n[]\r\n0\r\nx: "], ids=["an extension", "a trailer"])
async def test_slow_chunk_framing_costs_an_attempt(framing: bytes) -> None:
    """Framing bytes, however often one arrives, do not extend the wait for bytes of the file."""
    answer = trickled(head_of(transfer_encoding="chunked") + framing, b"y" * 10_000)
    async with HostileServer(answer) as server, client_of(server.url, read_timeout_s=0.3, attempts=1) as client:
        async with asyncio.timeout(30):
            assert "stalled" in await client.failure()


async def test_a_response_has_a_deadline() -> None:
    """A response that is fast enough at any time and never ends is aborted."""

    async def endless(_request: Request, connection: Connection) -> None:
        await connection.send(head_of(transfer_encoding="chunked"))
        while True:
            await connection.send(b"4\r\n    \r\n")
            await asyncio.sleep(0.01)

    async with (
        HostileServer(endless) as server,
        client_of(server.url, deadline_s=0.2, bytes_per_s_min=0, attempts=1) as client,
    ):
        assert "TRIPFOLD_UPSTREAM_DEADLINE_S" in await client.failure()


async def test_time_spent_on_the_bucket_does_not_count_as_a_slow_upstream() -> None:
    """Only the time spent waiting for the upstream counts for its speed."""
    async with HostileServer(chunked(LARGE)) as server, client_of(server.url, speed_window_s=0.05) as client:
        taken: list[int] = []
        await client.drain(taken, pause_s=0.01)
        assert sum(taken) == len(LARGE)
