"""HTTP operations for orchestrators and load balancers: liveness, readiness, serving, and metrics."""

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
            description="S3 or Kafka cannot be reached, or the process stops; `faults` says which and why.",
        ),
        **open_responses(),
    },
)
async def ready(readiness: ReadinessPort) -> Response[ReadinessReport]:
    """Respond with 503 and the reasons while S3 or Kafka cannot be reached. The API still serves what it can."""
    return _response(await readiness.report())


@get(
    "/health/serving",
    summary="Check whether a load balancer should send requests",
    operation_id="getServing",
    tags=["health"],
    security=NO_KEY,
    response_description="The process has reached S3 since its start, and does not stop.",
    responses={
        HTTPStatus.SERVICE_UNAVAILABLE: ResponseSpec(
            ReadinessReport,
            generate_examples=False,
            description="The process has not reached S3 yet, or it stops; `faults` says why.",
        ),
        **open_responses(),
    },
)
async def serving(readiness: ReadinessPort) -> Response[ReadinessReport]:
    """Respond with 503 until the process has reached S3, and again when it stops.

    An outage does not change the response: reads need no Kafka, and without S3 the API tells its clients the reason.
    """
    return _response(await readiness.serving())


def _response(report: ReadinessReport) -> Response[ReadinessReport]:
    return Response(report, status_code=HTTPStatus.OK if report.ready else HTTPStatus.SERVICE_UNAVAILABLE)


@get("/metrics", include_in_schema=False)
async def metrics(readiness: ReadinessPort, registry: RegistryPort) -> Response[bytes]:
    """Return the metrics in the text format of Prometheus."""
    await readiness.report()  # updates the gauge tripfold_ready
    # Litestar adds the charset of a text type.
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8"))


HANDLERS = [live, ready, serving, metrics]
