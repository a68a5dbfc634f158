"""Each fault of tests/network/faults.py is what its name says, seen by a client of one connection.

That what Tripfold went through was the fault, and not a calm network with the same name, rests on this: the same toxics
act on every connection of proxies that stand before the same servers, and that only these tests use.
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
from tests.network.wire import OVERTAKING, Connection, Server, is_slow, kafka, overtake, s3

DEADLINE_S = 60.0


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_fault_is_what_its_name_says(toxiproxy: Toxiproxy, fault: Fault) -> None:
    """On a connection that it acts on, a client sees what is said; before and after, the server answers."""
    behind = kafka(os.environ[PROBED_KAFKA_VARIABLE]) if fault.proxy == "kafka" else s3(os.environ[PROBED_S3_VARIABLE])
    certain = tuple(msgspec.structs.replace(toxic, toxicity=1.0) for toxic in fault.toxics)
    lasting = msgspec.structs.replace(fault, toxics=certain).lasting(toxiproxy, f"{fault.proxy}-probe")
    async with asyncio.timeout(DEADLINE_S):
        await answers(behind)
        match [(toxic.type, toxic.stream) for toxic in fault.toxics]:
            case []:
                with lasting:
                    await is_away(behind)
            case [("timeout", _)] if not fault.toxics[0].attributes:
                await is_silent_while(behind, lasting)
            case [("timeout", _)]:
                with lasting:
                    await takes_and_does_not_answer(behind)
            case [("reset_peer", _)]:
                with lasting:
                    await resets(behind)
            case [("limit_data", stream)]:
                with lasting:
                    await breaks_off(behind, stream, fault.toxics[0].attributes["bytes"])
            case [("latency", _), *more]:
                with lasting:
                    await is_slow(behind, in_pieces=bool(more))
            case toxics:
                pytest.fail(f"nobody has said what {toxics} look like")
        await answers(behind)


def through_docker(behind: Server) -> bool:
    """Whether the proxy is reached by a port that Docker publishes: a proxy of Docker's then stands before it."""
    return ipaddress.ip_address(behind.proxied.rpartition(":")[0]).is_loopback


async def answers(behind: Server) -> None:
    """Find that a new connection is answered, through the proxy."""
    async with Connection(behind, behind.proxied) as connection:
        assert await connection.ask()


async def is_away(behind: Server) -> None:
    """Find that no connection is taken; what stands before the proxy may take it, and then ends it at once."""
    if through_docker(behind):
        async with Connection(behind, behind.proxied) as connection:
            await connection.ask_until_it_ends()
            assert connection.received_bytes == 0
        return
    with pytest.raises(ConnectionRefusedError):
        async with Connection(behind, behind.proxied):
            pass


async def is_silent_while(behind: Server, lasting: AbstractContextManager[None]) -> None:
    """Find that nothing comes, and the connection stays, until the silence is over: then it ends."""
    async with Connection(behind, behind.proxied) as connection:
        with lasting:
            asking = asyncio.create_task(connection.ask_until_it_ends())
            await overtake(behind, OVERTAKING)
            assert connection.received_bytes == 0
            assert not asking.done()
        await asking
        assert connection.received_bytes == 0


async def takes_and_does_not_answer(behind: Server) -> None:
    """Find that the connection ends without a byte of an answer."""
    async with Connection(behind, behind.proxied) as connection:
        await connection.ask_until_it_ends()
        assert connection.received_bytes == 0


async def resets(behind: Server) -> None:
    """Find that the connection is reset without a byte of an answer, rather than ended."""
    if through_docker(behind):
        pytest.skip("Docker's own proxy, which is before Toxiproxy here, hands a reset on as an end")
    async with Connection(behind, behind.proxied) as connection:
        with pytest.raises(ConnectionResetError):
            await connection.ask()
        assert connection.received_bytes == 0


async def breaks_off(behind: Server, stream: str, limit_bytes: int) -> None:
    """Find that the connection ends after just so many bytes of the answers, or of the questions."""
    async with Connection(behind, behind.proxied) as connection:
        await connection.ask_until_it_ends()
        if stream == "downstream":
            assert connection.received_bytes == limit_bytes
        else:
            assert connection.answers == limit_bytes // len(behind.question)
