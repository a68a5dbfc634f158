"""Liveness, readiness and serving. Kafka is probed on demand, at most once a second; S3 every ten seconds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated

import msgspec

from shared.runtime.health import STOPPING, Health
from shared.runtime.metrics import Concern

PROBE_AGE_MAX_S = 1.0
BUCKET_AGE_MAX_S = 10.0
"""A request to S3 costs money. Every second one tries a write, so the rights to write are at most 26 s old."""
WATCH_INTERVAL_S = 3.0
PROBE_TIMEOUT_S = 1.5
"""The longest wait for Kafka, and for each request to S3."""

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
        self._reached: set[Concern] = set()
        self._probing = asyncio.Lock()

    async def report(self) -> ReadinessReport:
        """Return the latest results; probe first what was not probed lately."""
        await self._probe(self._checks)
        return ReadinessReport(ready=self._health.ready, faults=self._health.faults)

    async def serving(self) -> ReadinessReport:
        """Return whether a load balancer should send requests: from the first response of S3 until the process stops.

        Reads need no Kafka. In an outage of S3 every process is the same, and the API tells its clients the reason.
        """
        if waits := self._bucket_checks().keys() - self._reached:
            await self._probe(self._bucket_checks())
            waits -= self._reached
        faults = {name: fault for name, fault in self._health.faults.items() if name in waits or name in STOPPING}
        return ReadinessReport(ready=self._health.started and not waits and not faults, faults=faults)

    async def watch(self) -> None:
        """Probe S3 until cancelled. An API that nobody asks also follows the bucket's switches and shows its faults."""
        while True:
            await self._probe(self._bucket_checks())
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _bucket_checks(self) -> dict[Concern, Check]:
        return {name: check for name, check in self._checks.items() if name == "s3"}

    async def _probe(self, checks: Mapping[Concern, Check]) -> None:
        async with self._probing:
            due = {name: check for name, check in checks.items() if self._is_due(name)}
            # The check of the bucket limits each of its requests.
            limits = {name: None if name == "s3" else PROBE_TIMEOUT_S for name in due}
            await asyncio.gather(*(self._health.probe(name, due[name], timeout_s=limits[name]) for name in due))
            self._probed_at_s |= dict.fromkeys(due, self._clock())
            self._reached |= due.keys() - self._health.faults.keys()

    def _is_due(self, name: Concern) -> bool:
        age_max_s = BUCKET_AGE_MAX_S if name == "s3" else PROBE_AGE_MAX_S
        return self._clock() - self._probed_at_s.get(name, -math.inf) >= age_max_s
