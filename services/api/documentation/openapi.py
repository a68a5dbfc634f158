"""The OpenAPI document at ``/schema/openapi.json``. Litestar makes it from the handlers' signatures and docstrings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from litestar import Request, Router
from litestar.exceptions import NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag

from services.api.auth import KEY_HEADER

OPENAPI_PATH = "/schema/openapi.json"


def openapi_config() -> OpenAPIConfig:
    """Return the configuration of the OpenAPI document."""
    return OpenAPIConfig(
        title="Tripfold",
        version=version("tripfold"),
        summary="Exact per-country, per-day statistics of a transit authority's trips.",
        description="Request a date, watch its progress, read its statistics. Dates are the upstream's local dates. "
        "Errors are `application/problem+json` (RFC 9457). The events on Kafka are at [/asyncapi](/asyncapi).",
        tags=[
            Tag(name="requests", description="Process dates and watch the progress."),
            Tag(name="backfills", description="Process many dates, a few at a time."),
            Tag(name="schedules", description="Process dates at given times."),
            Tag(name="statistics", description="Read the statistics, and the source of each number."),
            Tag(name="completeness", description="See which days are complete, why others are not, and what to do."),
            Tag(name="pipeline", description="See how far the services are."),
            Tag(name="quarantine", description="Files that were refused."),
            Tag(name="health", description="Probes for orchestrators and operators."),
        ],
        components=Components(
            security_schemes={
                "key": SecurityScheme(
                    type="apiKey",
                    security_scheme_in="header",
                    name=KEY_HEADER,
                    description="Not needed if the service is open to everybody.",
                ),
                "bearer": SecurityScheme(type="http", scheme="bearer", description="The same key, as a bearer token."),
            }
        ),
        use_handler_docstrings=True,
        render_plugins=[JsonRenderPlugin()],
        openapi_router=Router(
            path="/schema", route_handlers=[], include_in_schema=False, before_request=_only_the_document
        ),
    )


async def _only_the_document(request: Request[Any, Any, Any]) -> None:
    # Litestar serves pages of its own under other paths of /schema.
    if request.url.path != OPENAPI_PATH:
        raise NotFoundException
