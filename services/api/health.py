"""Liveness and readiness. Kafka is probed on demand, at most once a second; S3 every ten seconds, asked or not."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

import msgspec

from shared.runtime.health import Health
from shared.runtime.metrics import Concern

PROBE_AGE_MAX_S = 1.0
BUCKET_AGE_MAX_S = 10.0
"""A request to S3 costs money. Every second one tries a write, so the rights to write are at most 26 s old."""
WATCH_INTERVAL_S = 3.0
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
    """Probes S3 and Kafka, and caches the result for a time: that of S3 for longer."""

    def __init__(
        self, health: Health, checks: Mapping[Concern, Check], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._checks = checks
        self._clock = clock
        self._probed_at_s: dict[Concern, float] = {}
        self._probing = asyncio.Lock()

    async def report(self) -> ReadinessReport:
        """Return the latest results; probe first what was not probed lately."""
        await self._probe(self._checks)
        return ReadinessReport(ready=self._health.ready, faults=self._health.faults)

    async def watch(self) -> None:
        """Probe S3 until cancelled. An API that nobody asks also follows the bucket's switches and shows its faults."""
        while True:
            await self._probe({name: check for name, check in self._checks.items() if name == "s3"})
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _probe(self, checks: Mapping[Concern, Check]) -> None:
        async with self._probing:
            due = {name: check for name, check in checks.items() if self._is_due(name)}
            await asyncio.gather(*(self._health.probe(name, due[name], timeout_s=PROBE_TIMEOUT_S) for name in due))
            self._probed_at_s |= dict.fromkeys(due, self._clock())

    def _is_due(self, name: Concern) -> bool:
        age_max_s = BUCKET_AGE_MAX_S if name == "s3" else PROBE_AGE_MAX_S
        return self._clock() - self._probed_at_s.get(name, -math.inf) >= age_max_s
