"""Alive, ready and why not, and the metrics. Readiness is probed when it is asked for, at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Annotated

import msgspec
from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import SkipValidation
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.api.http.problems import open_responses
from shared.runtime.health import Health
from shared.runtime.metrics import REGISTRY, Concern

PROBE_AGE_MAX_S = 1.0
PROBE_TIMEOUT_S = 1.5

Check = Callable[[], Awaitable[None]]


class Liveness(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    live: bool


class ReadinessReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the API can do all its work, and if not, what is in the way."""

    ready: bool
    faults: Annotated[
        dict[str, str],
        msgspec.Meta(
            description="What cannot be used, and why.",
            examples=[{"kafka": "Kafka at 127.0.0.1:9092 cannot be reached"}],
        ),
    ]


class Readiness:
    """Whether S3 and Kafka can be reached: as of a second ago at most."""

    def __init__(
        self, health: Health, checks: Mapping[Concern, Check], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._checks = checks
        self._clock = clock
        self._probed_at_s: float | None = None
        self._probing = asyncio.Lock()

    async def report(self) -> ReadinessReport:
        """Probe, unless that was done just now, and say what was found."""
        async with self._probing:
            if self._probed_at_s is None or self._clock() - self._probed_at_s >= PROBE_AGE_MAX_S:
                await asyncio.gather(*(self._probe(what, check) for what, check in self._checks.items()))
                self._probed_at_s = self._clock()
        return ReadinessReport(ready=self._health.ready, faults=self._health.faults)

    async def _probe(self, what: Concern, check: Check) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await check()
        except TimeoutError:
            self._health.failing(what, f"it did not answer within {PROBE_TIMEOUT_S:g} s")
        except Exception as error:  # noqa: BLE001  # whatever keeps it from answering is what readiness reports
            self._health.failing(what, str(error) or type(error).__name__)
        else:
            self._health.recovered(what)


ReadinessPort = NamedDependency[SkipValidation[Readiness]]


@get(
    "/health/live",
    summary="Ask whether the process answers",
    operation_id="getLiveness",
    tags=["operating"],
    response_description="It does.",
    responses=open_responses(),
)
async def live() -> Liveness:
    """Answer. A process that does not is to be started again."""
    return Liveness(live=True)


@get(
    "/health/ready",
    summary="Ask whether S3 and Kafka can be reached",
    operation_id="getReadiness",
    tags=["operating"],
    response_description="Both can.",
    responses={
        HTTPStatus.SERVICE_UNAVAILABLE: ResponseSpec(
            ReadinessReport, generate_examples=False, description="Something cannot be reached; `faults` says what."
        ),
        **open_responses(),
    },
)
async def ready(readiness: ReadinessPort) -> Response[ReadinessReport]:
    """Answer 503 with the reasons while something cannot be reached: such an API still serves what it can."""
    report = await readiness.report()
    return Response(report, status_code=HTTPStatus.OK if report.ready else HTTPStatus.SERVICE_UNAVAILABLE)


@get("/metrics", include_in_schema=False)
async def metrics(readiness: ReadinessPort) -> Response[bytes]:
    """Return the metrics in the text format of Prometheus."""
    await readiness.report()  # so that tripfold_ready tells of now
    # Litestar adds the charset of a text itself.
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8"))
