"""How an upstream with faults is treated: how often it is asked again, when, and when it is left alone.

All streams of a process share one `Circuit`. It is open while the upstream cannot be reached: then one stream at a
time asks whether it is back, and the others wait. Waiting is all they do, so Kafka hears their heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeVar

import structlog

from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from shared.runtime import metrics
from shared.runtime.retry import Retrier

WAIT_FIRST_S = 0.5
WAIT_MAX_S = 30.0
PROBE_LOOK_S = 0.25
"""How often a stream looks whether another one's probe has reached the upstream."""

_HEALTH: Final = "upstream"
_log = structlog.get_logger()
_Result = TypeVar("_Result")


class OutageTooLong(UpstreamDown):
    """The upstream has been down for longer than it is waited for."""


def jittered_s(tries: int) -> float:
    """Return how long to wait after ``tries`` failed ones: full jitter, so that streams do not come back together."""
    return random.uniform(0, min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** min(tries, 20)))  # noqa: S311  # not a secret


class CircuitBreaker:
    """Whether the upstream can be reached, and until when it asked to be left alone: one for all streams."""

    def __init__(self, retrier: Retrier, *, retry_after_max_s: float = 300.0) -> None:
        self.retrier = retrier
        self._retry_after_max_s = retry_after_max_s
        self._held_until_s = 0.0
        self._open_since_s: float | None = None
        self._reason = ""
        self._probes_failed = 0
        self._probe_at_s = 0.0
        self._probe: object | None = None

    @contextlib.asynccontextmanager
    async def turn(self, *, since_s: float, outage_limit_s: float) -> AsyncIterator[None]:
        """Wait until the upstream may be asked; how the block ends says how the upstream is.

        Raises OutageTooLong if the upstream has been down for ``outage_limit_s``, of which only what came after
        ``since_s`` counts (by the clock of the patience), and Stopping.
        """
        probe = await self._admission(since_s, outage_limit_s)
        try:
            yield
        except UpstreamDown as error:
            self._down(str(error), probe)
            raise
        except TransientUpstreamError as error:
            self._answered(probe)
            self._hold(error.retry_after_s)
            raise
        except PermanentUpstreamError:
            self._answered(probe)
            raise
        else:
            self._answered(probe)
        finally:
            if self._probe is probe:
                self._probe = None

    def reached(self) -> None:
        """Note that the upstream has answered, if only with the head of an answer: everybody may ask it."""
        if self._open_since_s is not None:
            outage_s = round(self.retrier.now_s() - self._open_since_s, 1)
            _log.info("upstream_reachable_again", outage_s=outage_s, error=self._reason)
        self._open_since_s = None
        self._probes_failed = 0
        self._probe = None
        self.retrier.health.recovered(_HEALTH)
        metrics.upstream_reachable.set(1)

    def _answered(self, probe: object | None) -> None:
        # What was asked before the circuit opened, or began as a probe that was answered long ago, says nothing about
        # the upstream as it is.
        if probe is not None and self._probe is probe:
            self.reached()

    def _down(self, reason: str, probe: object | None) -> None:
        now_s = self.retrier.now_s()
        self._reason = reason
        self.retrier.health.failing(_HEALTH, reason)
        metrics.upstream_reachable.set(0)
        if self._open_since_s is None:
            self._open_since_s = now_s
            _log.warning("upstream_unreachable", error=reason)
        elif probe is None:
            return  # asked before the circuit opened: no probe has failed
        self._probe_at_s = now_s + jittered_s(self._probes_failed)
        self._probes_failed += 1

    def _hold(self, seconds: float) -> None:
        if seconds > 0:
            until_s = self.retrier.now_s() + min(seconds, self._retry_after_max_s)
            self._held_until_s = max(self._held_until_s, until_s)

    async def _admission(self, since_s: float, outage_limit_s: float) -> object | None:
        """Wait for a turn; return what stands for the probe of an open circuit, or None if it is closed."""
        while True:
            self.retrier.raise_if_stopping()
            now_s = self.retrier.now_s()
            give_up_at_s = max(since_s, self._open_since_s or since_s) + outage_limit_s
            if self._open_since_s is not None and now_s >= give_up_at_s:
                raise OutageTooLong(self._reason)
            if now_s < self._held_until_s:
                # A little later than asked, and not all at once.
                await self.retrier.sleep(self._held_until_s - now_s + jittered_s(0))
            elif self._open_since_s is None:
                return None
            elif self._probe is not None:
                await self.retrier.sleep(PROBE_LOOK_S)
            elif now_s < self._probe_at_s:
                await self.retrier.sleep(min(self._probe_at_s, give_up_at_s) - now_s)
            else:
                self._probe = object()
                return self._probe


class UpstreamRetryPolicy:
    """How long and how often an upstream with faults is tried again, before a city fails."""

    def __init__(
        self,
        retrier: Retrier,
        circuit: CircuitBreaker | None = None,
        *,
        attempts_max: int,
        outage_limit_s: float,
        concurrency_max: int = 64,
    ) -> None:
        self._patience = retrier
        self._circuit = circuit or CircuitBreaker(retrier)
        self.attempts_max = attempts_max
        self.outage_limit_s = outage_limit_s
        self._slots = asyncio.Semaphore(concurrency_max)

    async def once(self, attempt: Callable[[], Awaitable[_Result]], *, down_s: float = 0.0) -> _Result:
        """Run ``attempt`` once, as soon as the upstream may be asked, which it was found down for ``down_s`` before.

        Raises what ``attempt`` raises, OutageTooLong, and Stopping.
        """
        since_s = self._patience.now_s() - down_s
        async with self._slots, self._circuit.turn(since_s=since_s, outage_limit_s=self.outage_limit_s):
            return await attempt()

    async def fetch(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run ``attempt`` until it ends without a fault of the upstream.

        An upstream that is down costs no attempt. Raises PermanentUpstreamError with the last reason after all
        attempts, or after an outage that is longer than the limit; and Stopping.
        """
        attempts = 0
        down_since_s: float | None = None
        while True:
            now_s = self._patience.now_s()
            try:
                return await self.once(attempt, down_s=now_s - (now_s if down_since_s is None else down_since_s))
            except OutageTooLong as error:
                raise self._outage_of(error) from error
            except UpstreamDown as error:
                # What is down for this one alone, as behind a redirect, is no outage to the circuit if others get on.
                now_s = self._patience.now_s()
                down_since_s = now_s if down_since_s is None else down_since_s
                if now_s - down_since_s >= self.outage_limit_s:
                    raise self._outage_of(error) from error
                continue
            except TransientUpstreamError as error:
                attempts += 1
                down_since_s = None
                if attempts >= self.attempts_max:
                    raise PermanentUpstreamError(f"{error} ({attempts} attempts)") from error
            await self._patience.sleep(jittered_s(attempts - 1))

    def _outage_of(self, error: UpstreamDown) -> PermanentUpstreamError:
        return PermanentUpstreamError(f"{error} (for {self.outage_limit_s:.0f} s)")
