"""Decides how often, when and for how long a failed request to the upstream is retried.

Retry libraries limit attempts or time. Here an outage is limited by its time and costs no attempt.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from services.ingest.upstream.errors import OutageTooLong, PermanentUpstreamError, TransientUpstreamError, UpstreamDown

if TYPE_CHECKING:
    from services.ingest.upstream.circuit_breaker import CircuitBreaker

WAIT_FIRST_S = 0.5
WAIT_MAX_S = 30.0

_Result = TypeVar("_Result")


def jittered_s(tries: int) -> float:
    """Return the wait after ``tries`` failed tries: exponential backoff with full jitter, to spread the streams."""
    return random.uniform(0, min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** min(tries, 20)))  # noqa: S311  # not a secret


class UpstreamRetryPolicy:
    """Runs requests through the circuit breaker, and retries them until a limit of attempts or of outage time."""

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

    async def run(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run ``attempt`` until it succeeds.

        An outage costs no attempt. Raises PermanentUpstreamError with the last reason after all attempts, or after an
        outage that is longer than the limit. Raises Stopping at shutdown.
        """
        attempts = 0
        down_since_s: float | None = None
        while True:
            now_s = self._retrier.now_s()
            try:
                return await self.run_once(attempt, down_s=now_s - (now_s if down_since_s is None else down_since_s))
            except OutageTooLong as error:
                raise self._outage_of(error) from error
            except UpstreamDown as error:
                # A host behind a redirect can be down for this request alone, and the circuit stays closed.
                now_s = self._retrier.now_s()
                down_since_s = now_s if down_since_s is None else down_since_s
                if now_s - down_since_s >= self.outage_limit_s:
                    raise self._outage_of(error) from error
                continue
            except TransientUpstreamError as error:
                attempts += 1
                down_since_s = None
                if attempts >= self.attempts_max:
                    raise PermanentUpstreamError(f"{error} ({attempts} attempts)") from error
            await self._retrier.sleep(jittered_s(attempts - 1))

    def _outage_of(self, error: UpstreamDown) -> PermanentUpstreamError:
        return PermanentUpstreamError(f"{error} (for {self.outage_limit_s:.0f} s)")
