"""The relay before the embedded broker, with a broker that responds to each request at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tripfold.local import long_poll
from tripfold.local.long_poll import Relay
from tripfold.local.ports import free_port

HOST = "127.0.0.1"
PRODUCE, FETCH, METADATA = 0, 1, 3
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def two_clients() -> AsyncIterator[tuple[Connection, Connection]]:
    """Connect two clients through a relay to a broker; its responses hold the correlation id and its address."""
    port, broker_port = free_port("the relay"), free_port("the broker")
    address = HOST.encode() + broker_port.to_bytes(4, "big")

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                request = await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
                writer.write((4 + len(address)).to_bytes(4, "big") + request[4:8] + address)
        writer.close()

    async with await asyncio.start_server(respond, HOST, broker_port), Relay(HOST, port, broker_port).serve():
        one = await asyncio.open_connection(HOST, port)
        two = await asyncio.open_connection(HOST, port)
        yield one, two
        for _, writer in (one, two):
            writer.close()


def send(client: Connection, api_key: int, correlation_id: bytes, *, wait_ms: int = 600_000) -> None:
    request = (
        api_key.to_bytes(2, "big") + b"\0\x0b" + correlation_id + b"\0\2me" + bytes(4) + wait_ms.to_bytes(4, "big")
    )
    client[1].write(len(request).to_bytes(4, "big") + request)


async def receive(client: Connection) -> bytes:
    return await client[0].readexactly(int.from_bytes(await client[0].readexactly(4), "big"))


async def test_an_empty_fetch_response_waits_until_a_client_produces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay holds the response of a fetch without records until another client produces."""
    monkeypatch.setattr(long_poll, "HOLD_S", 600.0)
    async with two_clients() as (consumer, producer):
        send(consumer, FETCH, b"9999")
        fetched = asyncio.create_task(receive(consumer))
        send(producer, METADATA, b"1111")
        assert (await receive(producer)).startswith(b"1111")
        assert not fetched.done()
        send(producer, PRODUCE, b"2222")
        assert (await receive(producer)).startswith(b"2222")
        assert (await fetched).startswith(b"9999")


async def test_an_empty_fetch_response_is_sent_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without new records, the relay sends the response after HOLD_S, or after the wait of the request."""
    monkeypatch.setattr(long_poll, "HOLD_S", 0.01)
    async with two_clients() as (consumer, _):
        send(consumer, FETCH, b"9999")
        assert (await receive(consumer)).startswith(b"9999")
        monkeypatch.setattr(long_poll, "HOLD_S", 600.0)
        send(consumer, FETCH, b"9999", wait_ms=10)
        assert (await receive(consumer)).startswith(b"9999")


async def test_clients_learn_the_address_of_the_relay() -> None:
    """The relay replaces the broker's address in the metadata by its own."""
    async with two_clients() as (client, _):
        send(client, METADATA, b"1111")
        port = client[1].get_extra_info("peername")[1]
        assert await receive(client) == b"1111" + HOST.encode() + port.to_bytes(4, "big")
