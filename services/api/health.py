"""Liveness and readiness. A readiness check probes S3 and Kafka on demand, at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

import msgspec

from shared.runtime.health import Health
from shared.runtime.metrics import Concern

PROBE_AGE_MAX_S = 1.0
PROBE_TIMEOUT_S = 1.5

Check = Callable[[], Awaitable[None]]


class Liveness(msgspec.Struct, frozen=True, kw_only=True):
    """The process responds."""

    live: bool


class ReadinessReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the API can reach its dependencies, and the reasons if it cannot."""

    ready: bool
    faults: Annotated[
        dict[str, str],
        msgspec.Meta(
            description="Each dependency that cannot be used, and why.",
            examples=[{"kafka": "Kafka at 127.0.0.1:9092 cannot be reached"}],
        ),
    ]


class Readiness:
    """Probes S3 and Kafka, and caches the result for a second."""

    def __init__(
        self, health: Health, checks: Mapping[Concern, Check], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._checks = checks
        self._clock = clock
        self._probed_at_s: float | None = None
        self._probing = asyncio.Lock()

    async def report(self) -> ReadinessReport:
        """Return the latest result; probe first if it is older than PROBE_AGE_MAX_S."""
        async with self._probing:
            if self._probed_at_s is None or self._clock() - self._probed_at_s >= PROBE_AGE_MAX_S:
                probes = (
                    self._health.probe(name, check, timeout_s=PROBE_TIMEOUT_S) for name, check in self._checks.items()
                )
                await asyncio.gather(*probes)
                self._probed_at_s = self._clock()
        return ReadinessReport(ready=self._health.ready, faults=self._health.faults)
