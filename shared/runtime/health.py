"""The health of a service: whether it is ready, why not, and how late its event loop runs."""

from __future__ import annotations

import asyncio

from shared.runtime import metrics
from shared.runtime.metrics import Concern

LAG_INTERVAL_S = 0.05
"""How often the lag is measured. A call that blocks the event loop for longer than this shows up."""


class Health:
    """Collects the current faults of a service. It is ready once it has started and has no fault."""

    def __init__(self) -> None:
        self.started = False
        self._faults: dict[str, str] = {}
        metrics.ready.set_function(lambda: float(self.ready))

    @property
    def ready(self) -> bool:
        """Whether the service can do its work."""
        return self.started and not self._faults

    @property
    def faults(self) -> dict[str, str]:
        """The current faults: a sentence for each concern."""
        return dict(self._faults)

    def failing(self, what: Concern, reason: str, *, detail: str = "") -> None:
        """Record that ``what`` fails, and why. ``detail`` says which of its kind; metrics do not have it."""
        metrics.faults.labels(what).inc()
        self._faults[f"{what} {detail}".rstrip()] = reason

    def recovered(self, what: Concern, *, detail: str = "") -> None:
        """Record that ``what`` works again."""
        self._faults.pop(f"{what} {detail}".rstrip(), None)


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
