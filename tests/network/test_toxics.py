"""Each fault of tests/network/faults.py has the effect that its name says, as a client of one connection sees it.

These tests prove that Tripfold met real faults. They apply the same toxics to every connection of separate proxies in
front of the same servers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from contextlib import AbstractContextManager

import msgspec
import pytest

from tests.network.faults import FAULTS, Fault
from tests.network.toxiproxy import PROBED_KAFKA_VARIABLE, PROBED_S3_VARIABLE, Toxiproxy
from tests.network.wire import (
    DIRECT_RESPONSES,
    Connection,
    Server,
    assert_slow_responses,
    get_direct_responses,
    kafka,
    s3,
)

DEADLINE_S = 60.0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_each_toxic_has_its_effect(toxiproxy: Toxiproxy, fault: Fault) -> None:
    """A client sees the named effect during the fault, and responses before and after it."""
    server = kafka(os.environ[PROBED_KAFKA_VARIABLE]) if fault.proxy == "kafka" else s3(os.environ[PROBED_S3_VARIABLE])
    certain = tuple(msgspec.structs.replace(toxic, toxicity=1.0) for toxic in fault.toxics)
    injected = msgspec.structs.replace(fault, toxics=certain).inject(toxiproxy, f"{fault.proxy}-probe")
    async with asyncio.timeout(DEADLINE_S):
        await assert_responds(server)
        match [(toxic.type, toxic.stream) for toxic in fault.toxics]:
            case []:
                with injected:
                    await assert_down(server)
            case [("timeout", _)] if not fault.toxics[0].attributes:
                await assert_hangs_during(server, injected)
            case [("timeout", _)]:
                with injected:
                    await assert_no_response(server)
            case [("reset_peer", _)]:
                with injected:
                    await assert_reset(server)
            case [("limit_data", stream)]:
                with injected:
                    await assert_breaks_off(server, stream, fault.toxics[0].attributes["bytes"])
            case [("latency", _), *more]:
                with injected:
                    await assert_slow_responses(server, in_pieces=bool(more))
            case toxics:
                pytest.fail(f"this test has no check for {toxics}")
        await assert_responds(server)


def through_docker(server: Server) -> bool:
    """Return whether Toxiproxy is reached through a published port, and so through Docker's own proxy."""
    return ipaddress.ip_address(server.proxied.rpartition(":")[0]).is_loopback


async def assert_responds(server: Server) -> None:
    """Check that the server responds on a new connection through the proxy."""
    async with Connection(server, server.proxied) as connection:
        assert await connection.request()


async def assert_down(server: Server) -> None:
    """Check that connections are refused, or closed at once by Docker's own proxy."""
    if through_docker(server):
        async with Connection(server, server.proxied) as connection:
            await connection.request_until_closed()
            assert connection.received_bytes == 0
        return
    with pytest.raises(ConnectionRefusedError):
        async with Connection(server, server.proxied):
            pass


async def assert_hangs_during(server: Server, injected: AbstractContextManager[None]) -> None:
    """Check that the connection stays open without a response during the fault, and closes after it."""
    async with Connection(server, server.proxied) as connection:
        with injected:
            requests = asyncio.create_task(connection.request_until_closed())
            await get_direct_responses(server, DIRECT_RESPONSES)
            assert connection.received_bytes == 0
            assert not requests.done()
        await requests
        assert connection.received_bytes == 0


async def assert_no_response(server: Server) -> None:
    """Check that the connection closes without a byte of a response."""
    async with Connection(server, server.proxied) as connection:
        await connection.request_until_closed()
        assert connection.received_bytes == 0


async def assert_reset(server: Server) -> None:
    """Check that the connection is reset, not closed, without a byte of a response."""
    if through_docker(server):
        pytest.skip("Docker's own proxy in front of Toxiproxy turns a reset into a close")
    async with Connection(server, server.proxied) as connection:
        with pytest.raises(ConnectionResetError):
            await connection.request()
        assert connection.received_bytes == 0


async def assert_breaks_off(server: Server, stream: str, limit_bytes: int) -> None:
    """Check that the connection closes after exactly so many bytes of the responses, or of the requests."""
    async with Connection(server, server.proxied) as connection:
        await connection.request_until_closed()
        if stream == "downstream":
            assert connection.received_bytes == limit_bytes
        else:
            assert connection.responses == limit_bytes // len(server.request)
