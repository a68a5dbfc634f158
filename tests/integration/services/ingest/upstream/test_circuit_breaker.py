"""Outages: one stream probes, the others wait."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import structlog

from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.errors import TransientUpstreamError, UpstreamDown, UpstreamHeld
from services.ingest.upstream.retry import UpstreamRetryPolicy
from shared.runtime.health import Health
from shared.runtime.retry import Retrier, Stopping
from tests.integration.services.ingest.upstream.client import (
    VirtualRetrier,
    client_of,
    fail_in_turn,
    retried,
    until,
)


async def test_one_of_many_streams_probes_the_upstream() -> None:
    """While the upstream is down its streams wait; one probes at a time, and when it is back all go on."""
    asking = asking_max = asked = 0
    reached = False
    retrier = Retrier(health=Health(), wait_max_s=1)
    circuit = CircuitBreaker(retrier)
    retry_policy = UpstreamRetryPolicy(circuit, attempts_max=1, outage_limit_s=60)

    async def attempt() -> int:
        nonlocal asking, asking_max, asked
        asked += 1
        asking += 1
        asking_max = max(asking_max, asking)
        await asyncio.sleep(0.005)
        asking -= 1
        if not reached:
            raise UpstreamDown("nobody there")
        return 1

    with contextlib.suppress(UpstreamDown):
        async with circuit.acquire(since_s=0, outage_limit_s=60):
            await attempt()
    fetching = [asyncio.create_task(retried(retry_policy, retrier, attempt)) for _ in range(20)]
    await until(lambda: asked >= 6)
    assert asking_max == 1
    assert retrier.health.faults == {"upstream": "nobody there"}
    reached = True
    assert sum(await asyncio.gather(*fetching)) == 20
    assert not retrier.health.faults


async def test_a_request_that_must_not_wait_is_refused_while_others_wait() -> None:
    """A planner's request raises at once while the circuit is open, or while the upstream asks to wait."""
    retrier = VirtualRetrier()
    circuit = CircuitBreaker(retrier)
    retry_policy = UpstreamRetryPolicy(circuit, attempts_max=1, outage_limit_s=60)

    async def attempt() -> int:
        return 1

    with pytest.raises(UpstreamDown):
        await fail_in_turn(circuit, UpstreamDown("nobody there"))
    with pytest.raises(UpstreamDown, match="nobody there"):
        await retry_policy.run_at_once(attempt)
    retrier.time_s += 1
    assert await retry_policy.run_at_once(attempt) == 1
    with pytest.raises(TransientUpstreamError):
        await fail_in_turn(circuit, TransientUpstreamError("busy", retry_after_s=100))
    with pytest.raises(UpstreamHeld) as held:
        await retry_policy.run_at_once(attempt)
    assert held.value.wait_s >= 100


async def test_an_outage_is_logged_at_its_start_and_at_its_end() -> None:
    """An outage leaves two lines in the log, however many streams and probes find the upstream down."""
    retrier = VirtualRetrier()
    circuit = CircuitBreaker(retrier)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            with pytest.raises(UpstreamDown):
                await fail_in_turn(circuit, UpstreamDown("nobody there"), UpstreamDown("nobody there"))
        circuit.reached()
        circuit.reached()
    began, ended = logged
    assert (began["event"], began["what"], began["error"]) == ("fault_began", "upstream", "nobody there")
    assert (ended["event"], ended["what"]) == ("fault_ended", "upstream")


async def test_a_probe_that_is_cancelled_lets_another_probe() -> None:
    """A stream that is aborted while it probes leaves the circuit as it was."""
    circuit = CircuitBreaker(Retrier(health=Health(), wait_max_s=1))
    with pytest.raises(UpstreamDown):
        await fail_in_turn(circuit, UpstreamDown("nobody there"))

    async def never() -> None:
        async with circuit.acquire(since_s=0, outage_limit_s=60):
            await asyncio.sleep(3600)

    probing = asyncio.create_task(never())
    await until(lambda: circuit._probe is not None)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    assert circuit.retrier.health.faults
    async with asyncio.timeout(10), circuit.acquire(since_s=0, outage_limit_s=60):
        pass
    assert not circuit.retrier.health.faults


async def test_a_request_from_before_an_outage_does_not_end_it() -> None:
    """A download that breaks when the upstream fails does not release the waiting streams."""
    retrier = VirtualRetrier()
    circuit = CircuitBreaker(retrier)
    with pytest.raises(TransientUpstreamError):
        await fail_in_turn(circuit, TransientUpstreamError("cut"), UpstreamDown("nobody there"))
    assert retrier.health.faults == {"upstream": "nobody there"}


async def test_a_probe_that_was_answered_before_an_outage_does_not_end_it() -> None:
    """A download that began as a probe and breaks in a new outage does not end that outage."""
    retrier = VirtualRetrier()
    circuit = CircuitBreaker(retrier)
    with pytest.raises(UpstreamDown):
        await fail_in_turn(circuit, UpstreamDown("nobody there"))

    async def break_after_an_outage() -> None:
        async with circuit.acquire(since_s=0, outage_limit_s=60):
            circuit.reached()
            with contextlib.suppress(UpstreamDown):
                await fail_in_turn(circuit, UpstreamDown("gone again"))
            raise TransientUpstreamError("cut")

    with pytest.raises(TransientUpstreamError):
        await break_after_an_outage()
    assert retrier.health.faults == {"upstream": "gone again"}


async def test_a_stream_that_waits_gives_up_when_the_process_stops() -> None:
    """Waiting for the upstream ends at once when the process stops."""
    retrier = Retrier(health=Health(), wait_max_s=1)
    async with client_of("http://127.0.0.1:1", retrier, outage_limit_s=3600) as client:
        fetching = asyncio.create_task(client.fetch())
        await until(lambda: bool(retrier.health.faults))
        retrier.stopping.set()
        with pytest.raises(Stopping):
            await fetching
