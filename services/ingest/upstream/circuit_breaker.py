"""The circuit breaker of the upstream, which all streams of a process share.

It opens when the upstream cannot be reached. While it is open, one stream at a time probes the upstream, and the other
streams wait. They wait without blocking the event loop, so Kafka still receives heartbeats.

The breakers of libraries raise an error while they are open. Here a request waits, as it does for a Retry-After.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from services.ingest.upstream.errors import (
    OutageTooLong,
    PermanentUpstreamError,
    TransientUpstreamError,
    UpstreamDown,
    UpstreamHeld,
)
from services.ingest.upstream.retry import jittered_s
from shared.runtime import metrics
from shared.runtime.retry import Retrier

RETRY_AFTER_MAX_S = 300.0
"""The longest ``Retry-After`` that is honoured."""
PROBE_POLL_S = 0.25
"""How often a waiting stream checks whether the probe of another stream has reached the upstream."""

_HEALTH: Final = "upstream"


class CircuitBreaker:
    """Knows whether the upstream can be reached, and until when a Retry-After asks to wait."""

    def __init__(self, retrier: Retrier, *, retry_after_max_s: float = RETRY_AFTER_MAX_S) -> None:
        self.retrier = retrier
        self._retry_after_max_s = retry_after_max_s
        self._held_until_s = 0.0
        self._open_since_s: float | None = None
        self._reason = ""
        self._probes_failed = 0
        self._probe_at_s = 0.0
        self._probe: object | None = None

    @contextlib.asynccontextmanager
    async def acquire(self, *, since_s: float, outage_limit_s: float) -> AsyncIterator[None]:
        """Wait until a request is allowed, and learn the state of the upstream from how the block ends.

        Raises OutageTooLong if the upstream has been down for ``outage_limit_s`` since ``since_s``, by the retrier's
        clock. Raises Stopping at shutdown.
        """
        probe = await self._admission(since_s, outage_limit_s)
        try:
            yield
        except UpstreamDown as error:
            self._down(str(error), probe)
            raise
        except TransientUpstreamError as error:
            self._responded(probe)
            self._hold(error.retry_after_s)
            raise
        except PermanentUpstreamError:
            self._responded(probe)
            raise
        else:
            self._responded(probe)
        finally:
            if self._probe is probe:
                self._probe = None

    def raise_if_it_must_wait(self) -> None:
        """Raise UpstreamDown or UpstreamHeld if a request had to wait now."""
        now_s = self.retrier.now_s()
        if now_s < self._held_until_s:
            raise UpstreamHeld(self._held_until_s - now_s + jittered_s(0))
        if self._open_since_s is not None and (self._probe is not None or now_s < self._probe_at_s):
            raise UpstreamDown(self._reason)

    def reached(self) -> None:
        """Close the circuit: the upstream has sent at least the head of a response."""
        self._open_since_s = None
        self._probes_failed = 0
        self._probe = None
        self.retrier.health.recovered(_HEALTH)
        metrics.upstream_reachable.set(1)

    def _responded(self, probe: object | None) -> None:
        # A request from before the circuit opened, or an old probe, says nothing about the upstream now.
        if probe is not None and self._probe is probe:
            self.reached()

    def _down(self, reason: str, probe: object | None) -> None:
        now_s = self.retrier.now_s()
        self._reason = reason
        self.retrier.health.failing(_HEALTH, reason)
        metrics.upstream_reachable.set(0)
        if self._open_since_s is None:
            self._open_since_s = now_s
        elif probe is None:
            return  # sent before the circuit opened: no probe has failed
        self._probe_at_s = now_s + jittered_s(self._probes_failed)
        self._probes_failed += 1

    def _hold(self, seconds: float) -> None:
        if seconds > 0:
            until_s = self.retrier.now_s() + min(seconds, self._retry_after_max_s)
            self._held_until_s = max(self._held_until_s, until_s)

    async def _admission(self, since_s: float, outage_limit_s: float) -> object | None:
        """Wait until a request is allowed. Return a token for the probe of an open circuit, or None if it is closed."""
        while True:
            self.retrier.raise_if_stopping()
            now_s = self.retrier.now_s()
            give_up_at_s = max(since_s, self._open_since_s or since_s) + outage_limit_s
            if self._open_since_s is not None and now_s >= give_up_at_s:
                raise OutageTooLong(self._reason)
            if now_s < self._held_until_s:
                # Jitter, so that the streams do not all send at once.
                await self.retrier.sleep(self._held_until_s - now_s + jittered_s(0))
            elif self._open_since_s is None:
                return None
            elif self._probe is not None:
                await self.retrier.sleep(PROBE_POLL_S)
            elif now_s < self._probe_at_s:
                await self.retrier.sleep(min(self._probe_at_s, give_up_at_s) - now_s)
            else:
                self._probe = object()
                return self._probe
