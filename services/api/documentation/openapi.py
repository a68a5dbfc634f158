"""The documentation: the OpenAPI document at ``/schema/openapi.json``, and a page at ``/docs`` that shows it.

The page is Swagger UI, from a package that ships its script: nothing is loaded from anywhere else.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any

from litestar import MediaType, Request, Response, Router, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag
from litestar.params import FromPath

from services.api.auth import KEY_HEADER
from services.api.web.static_files import StaticFile

API_VERSION = "1.0.0"
DOCUMENT_PATH = "/schema/openapi.json"
ASSET_AGE_MAX_S = 24 * 60 * 60

_ASSETS = frozenset({"swagger-ui-bundle.js", "swagger-ui.css"})
_PAGE = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tripfold API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="documentation"></div>
<noscript>This page needs JavaScript. The document it shows is at <a href="{DOCUMENT_PATH}">{DOCUMENT_PATH}</a>.
</noscript>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = f"""\
SwaggerUIBundle({{
  url: "{DOCUMENT_PATH}",
  dom_id: "#documentation",
  validatorUrl: null,
  displayRequestDuration: true,
  tryItOutEnabled: true,
}});
"""
# Swagger UI styles its elements in place and draws from data URLs; nothing comes from other hosts.
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def openapi_config() -> OpenAPIConfig:
    """Return how the OpenAPI document is made and served."""
    return OpenAPIConfig(
        title="Tripfold",
        version=API_VERSION,
        summary="Exact per-country, per-day statistics of a transit authority's trips.",
        description="Ask for a date, watch it being processed, read its numbers. Dates are the upstream's local dates. "
        "Errors are `application/problem+json` (RFC 9457). The events on Kafka are at [/asyncapi](/asyncapi).",
        tags=[
            Tag(name="requests", description="Asking for dates, and watching them being processed."),
            Tag(name="statistics", description="The numbers, and where they come from."),
            Tag(name="operating", description="For those who run Tripfold."),
        ],
        components=Components(
            security_schemes={
                "key": SecurityScheme(
                    type="apiKey",
                    security_scheme_in="header",
                    name=KEY_HEADER,
                    description="Not needed where the service is open to everybody.",
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


def docs_handlers() -> list[HTTPRouteHandler]:
    """Return the handlers of the page and of its assets."""
    return [page, start, asset]


async def _only_the_document(request: Request[Any, Any, Any]) -> None:
    # Litestar would answer other paths under /schema with a page of its own.
    if request.url.path != DOCUMENT_PATH:
        raise NotFoundException


@get("/docs", media_type=MediaType.HTML, include_in_schema=False)
async def page() -> Response[str]:
    """Show the documentation."""
    return Response(_PAGE, headers={"Content-Security-Policy": _CONTENT_SECURITY})


@get("/docs/start.js", media_type="text/javascript", include_in_schema=False)
async def start() -> str:
    """Return the script that starts Swagger UI: a file, so that the page needs no script in place."""
    return _START


@get("/docs/{name:str}", include_in_schema=False)
async def asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Return a file of Swagger UI."""
    if name not in _ASSETS:
        raise NotFoundException
    return await _asset(name).answer(request, {"Cache-Control": f"public, max-age={ASSET_AGE_MAX_S}"})


@functools.cache
def _asset(name: str) -> StaticFile:
    return StaticFile(name, (files("swagger_ui") / "static" / name).read_bytes())
