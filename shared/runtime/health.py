"""The health of a service: whether it is ready, why not, and how late its event loop runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from shared.runtime import metrics
from shared.runtime.metrics import Concern

LAG_INTERVAL_S = 0.05
"""How often the lag is measured. A call that blocks the event loop for longer than this shows up."""
STOPPING = {"shutdown": "the process was asked to stop"}

_log = structlog.get_logger()


class Health:
    """Collects the current faults of a service. It is ready from its start until it stops or cannot do its work."""

    def __init__(self, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.started = self._stopping = False
        self._clock_s = clock_s
        self._faults: dict[str, str] = {}
        self._began_s: dict[str, float] = {}
        self._harmless: set[str] = set()
        metrics.ready.set_function(lambda: float(self.ready))

    @property
    def ready(self) -> bool:
        """Whether the service can do its work."""
        return self.started and self.faults.keys() <= self._harmless

    @property
    def faults(self) -> dict[str, str]:
        """The current faults: a sentence for each concern, and one while the process stops."""
        return self._faults | (STOPPING if self._stopping else {})

    def stop(self) -> None:
        """Record that the process stops: it is not ready until it has ended."""
        self._stopping = True

    def failing(self, what: Concern, reason: str, *, detail: str = "", still_ready: bool = False) -> None:
        """Record that ``what`` fails, and why. ``detail`` says which of its kind; metrics do not have it.

        A service that is ``still_ready`` does all its other work. The log says when a fault begins and when it ends.
        """
        metrics.faults.labels(what).inc()
        name = f"{what} {detail}".rstrip()
        if still_ready:
            self._harmless.add(name)
        if name not in self._faults:
            self._began_s[name] = self._clock_s()
            _log.warning("fault_began", what=what, detail=detail, error=reason)
        self._faults[name] = reason

    def recovered(self, what: Concern, *, detail: str = "") -> None:
        """Record that ``what`` works again."""
        name = f"{what} {detail}".rstrip()
        reason = self._faults.pop(name, None)
        self._harmless.discard(name)
        if reason is not None:
            duration_s = round(self._clock_s() - self._began_s.pop(name), 1)
            _log.info("fault_ended", what=what, detail=detail, duration_s=duration_s, error=reason)

    async def probe(self, what: Concern, check: Callable[[], Awaitable[None]], *, timeout_s: float | None) -> None:
        """Run a check of ``what``, and record whether it succeeds in time. None: the check limits each request."""
        try:
            async with asyncio.timeout(timeout_s):
                await check()
        except TimeoutError:
            self.failing(what, f"no response within {timeout_s:g} s")
        except Exception as error:  # noqa: BLE001  # readiness reports every kind of failure
            self.failing(what, str(error) or type(error).__name__)
        else:
            self.recovered(what)


async def measure_loop_lag() -> None:
    """Measure without end how late the event loop wakes a task. A blocked loop delays every stream of the process."""
    loop = asyncio.get_running_loop()
    longest_s = 0.0
    while True:
        due_s = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lag_s = max(0.0, loop.time() - due_s)
        metrics.event_loop_lag.observe(lag_s)
        longest_s = max(longest_s, lag_s)
        metrics.event_loop_lag_max.set(longest_s)
