"""The HTTP operation on the pipeline: how far the services are."""

from __future__ import annotations

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from services.api.http.problems import responses
from services.api.pipeline.service import Pipeline, PipelineReport

PipelinePort = NamedDependency[SkipValidation[Pipeline]]


@get(
    "/pipeline-status",
    summary="Get the lag and the throughput of the services",
    operation_id="getPipeline",
    tags=["pipeline"],
    response_description="The consumer groups in the order of the data flow, and what the latest requests achieved.",
    responses=responses(),
)
async def pipeline_report(pipeline: PipelinePort) -> Response[PipelineReport]:
    """Return how many records each service has not processed, and how fast it is.

    The API asks Kafka and S3, not the services. A report is up to 3 s old. The response is 200 also if a part cannot be
    read: `faults` names it.
    """
    return Response(await pipeline.report(), headers={"Cache-Control": "no-cache"})


HANDLERS = [pipeline_report]
