"""Runs requests to the upstream through the circuit breaker. `services.ingest.retries` decides on further attempts.

Retry libraries limit attempts or time. Here an outage is limited by its time and costs no attempt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from services.ingest.upstream.circuit_breaker import CircuitBreaker

WAIT_FIRST_S = 0.5
WAIT_MAX_S = 30.0

_Result = TypeVar("_Result")


def jittered_s(tries: int) -> float:
    """Return the wait after ``tries`` failed tries: exponential backoff with full jitter, to spread the streams."""
    return random.uniform(0, min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** min(tries, 20)))  # noqa: S311  # not a secret


class UpstreamRetryPolicy:
    """Runs requests through the circuit breaker. It has the limits of attempts and of outage time."""

    def __init__(
        self,
        circuit: CircuitBreaker,
        *,
        attempts_max: int,
        outage_limit_s: float,
        concurrency_max: int = 64,
    ) -> None:
        self._retrier = circuit.retrier
        self._circuit = circuit
        self.attempts_max = attempts_max
        self.outage_limit_s = outage_limit_s
        self._slots = asyncio.Semaphore(concurrency_max)

    async def run_once(self, attempt: Callable[[], Awaitable[_Result]], *, down_s: float = 0.0) -> _Result:
        """Run ``attempt`` once, when the circuit breaker allows it. Its outage has already lasted for ``down_s``.

        Raises the errors of ``attempt``, OutageTooLong, and Stopping.
        """
        since_s = self._retrier.now_s() - down_s
        async with self._slots, self._circuit.acquire(since_s=since_s, outage_limit_s=self.outage_limit_s):
            return await attempt()

    async def run_at_once(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run ``attempt`` once, without a wait: it takes no slot.

        Raises the errors of ``attempt``, UpstreamDown while the circuit breaker is open, UpstreamHeld, and Stopping.
        """
        self._circuit.raise_if_it_must_wait()
        async with self._circuit.acquire(since_s=self._retrier.now_s(), outage_limit_s=self.outage_limit_s):
            return await attempt()
