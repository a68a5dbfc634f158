"""HTTP operations for orchestrators: liveness, readiness, and metrics."""

from __future__ import annotations

from http import HTTPStatus

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import SkipValidation
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from services.api.documentation.openapi import NO_KEY
from services.api.health import Liveness, Readiness, ReadinessReport
from services.api.http.problems import open_responses

ReadinessPort = NamedDependency[SkipValidation[Readiness]]
RegistryPort = NamedDependency[SkipValidation[CollectorRegistry]]


@get(
    "/health/live",
    summary="Check whether the process is alive",
    operation_id="getLiveness",
    tags=["health"],
    security=NO_KEY,
    response_description="The process responds.",
    responses=open_responses(),
)
async def live() -> Liveness:
    """Respond. Restart a process that does not."""
    return Liveness(live=True)


@get(
    "/health/ready",
    summary="Check whether S3 and Kafka can be reached",
    operation_id="getReadiness",
    tags=["health"],
    security=NO_KEY,
    response_description="Both can be reached.",
    responses={
        HTTPStatus.SERVICE_UNAVAILABLE: ResponseSpec(
            ReadinessReport,
            generate_examples=False,
            description="S3 or Kafka cannot be reached; `faults` says which and why.",
        ),
        **open_responses(),
    },
)
async def ready(readiness: ReadinessPort) -> Response[ReadinessReport]:
    """Respond with 503 and the reasons while S3 or Kafka cannot be reached. The API still serves what it can."""
    report = await readiness.report()
    return Response(report, status_code=HTTPStatus.OK if report.ready else HTTPStatus.SERVICE_UNAVAILABLE)


@get("/metrics", include_in_schema=False)
async def metrics(readiness: ReadinessPort, registry: RegistryPort) -> Response[bytes]:
    """Return the metrics in the text format of Prometheus."""
    await readiness.report()  # updates the gauge tripfold_ready
    # Litestar adds the charset of a text type.
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8"))


HANDLERS = [live, ready, metrics]
