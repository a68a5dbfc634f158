"""The OpenAPI document at ``/schema/openapi.json``. Litestar makes it from the handlers' signatures and docstrings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from litestar import Litestar, Request, Router
from litestar.exceptions import NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, Contact, License, SecurityRequirement, SecurityScheme, Tag

from services.api.auth import KEY_HEADER
from shared.domain.events import Source
from shared.domain.objects import DateSelection

OPENAPI_PATH = "/schema/openapi.json"

KEY: list[SecurityRequirement] = [{"key": []}, {"bearer": []}]
"""An operation needs a key, in one of two headers."""
NO_KEY: list[SecurityRequirement] = [{}]
"""An operation needs no key."""

Json = dict[str, Any]


def openapi_config() -> OpenAPIConfig:
    """Return the configuration of the OpenAPI document."""
    return OpenAPIConfig(
        title="Tripfold",
        version=version("tripfold"),
        summary="Exact per-country, per-day statistics of a transit authority's trips.",
        description="Request a date, watch its progress, read its statistics. Dates are the upstream's local dates. "
        "Errors are `application/problem+json` (RFC 9457). The events on Kafka are at [/asyncapi](/asyncapi).",
        contact=Contact(name="The operator of this installation"),
        license=License(name="Apache License 2.0", identifier="Apache-2.0"),
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
                    description="An API key. Its scope `read` allows `GET`. Its scope `process` allows `POST`, `PUT` "
                    "and `DELETE`, and to read the status of requests and backfills. A key can have both scopes. A "
                    "service that is open to everybody needs none.",
                ),
                "bearer": SecurityScheme(
                    type="http", scheme="bearer", description="The same key, as `Authorization: Bearer KEY`."
                ),
            }
        ),
        use_handler_docstrings=True,
        render_plugins=[_Document()],
        openapi_router=Router(
            path="/schema", route_handlers=[], include_in_schema=False, before_request=_only_the_document
        ),
    )


def openapi_document(app: Litestar) -> Json:
    """Return the document of the API."""
    return _with_plain_schemas(app.openapi_schema.to_schema())


class _Document(JsonRenderPlugin):
    """Serves the document."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: Json) -> bytes:
        return super().render(request, _with_plain_schemas(openapi_schema))


def _with_plain_schemas(document: Json) -> Json:
    """Simplify the schemas that Litestar makes of unions, in place.

    A parameter that may be left out is never null. A union with UNSET has one type only. Litestar makes sets of types,
    and gives an enum the description of any parameter of its type, so its document differs between processes.
    """
    _simplify(document)
    enums = document["components"]["schemas"]
    defaults = {}
    for kind in (DateSelection, Source):
        defaults[f"#/components/schemas/{kind.__name__}"] = enums[kind.__name__].pop(
            "default", None
        )  # None: done before
        enums[kind.__name__]["description"] = " ".join((kind.__doc__ or "").split())
    for item in document["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                _remove_null(parameter["schema"])
                (reference,) = parameter["schema"].get("allOf", ({},))
                if default := defaults.get(reference.get("$ref")):
                    parameter["schema"]["default"] = default
    return document


def _simplify(node: object) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("type"), list):
            node["type"].sort()
        if len(alternatives := node.get("oneOf", ())) == 1:
            node.update(alternatives[0])
            del node["oneOf"]
    for below in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _simplify(below)


def _remove_null(schema: Json) -> None:
    null: Json = {"type": "null"}
    if null in schema.get("oneOf", ()):
        schema["oneOf"].remove(null)
        _simplify(schema)
    if isinstance(schema.get("type"), list):
        schema["type"] = next(kind for kind in schema["type"] if kind != "null")
    if "enum" in schema:
        schema["enum"] = [value for value in schema["enum"] if value is not None]


async def _only_the_document(request: Request[Any, Any, Any]) -> None:
    # Litestar serves pages of its own under other paths of /schema.
    if request.url.path != OPENAPI_PATH:
        raise NotFoundException
