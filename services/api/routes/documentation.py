"""Documentation pages: Swagger UI at ``/docs``, and an AsyncAPI viewer at ``/asyncapi`` with its document.

Both viewers come from packages that ship their scripts, so the pages load nothing from other hosts. The pages have no
inline script.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, Final

from litestar import MediaType, Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath

from services.api.documentation.asyncapi import asyncapi_document, encode_document
from services.api.documentation.openapi import OPENAPI_PATH
from services.api.web.static_files import StaticFile

ASSET_AGE_MAX_S = 24 * 60 * 60
ASYNCAPI_PATH: Final = "/asyncapi.json"
SCRIPT_PATH: Final = "/asyncapi/viewer.js"
STYLE_PATH: Final = "/asyncapi/page.css"

_SWAGGER_ASSETS = frozenset({"swagger-ui-bundle.js", "swagger-ui.css"})
_OPENAPI_PAGE = f"""\
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
<noscript>This page needs JavaScript. The document it shows is at <a href="{OPENAPI_PATH}">{OPENAPI_PATH}</a>.
</noscript>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_SWAGGER_START = f"""\
SwaggerUIBundle({{
  url: "{OPENAPI_PATH}",
  dom_id: "#documentation",
  validatorUrl: null,
  displayRequestDuration: true,
  tryItOutEnabled: true,
}});
"""
# Swagger UI needs inline styles and data URLs; nothing comes from other hosts.
_OPENAPI_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_ASYNCAPI_PAGE = f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tripfold events</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{STYLE_PATH}">
<script src="{SCRIPT_PATH}" defer></script>
</head>
<body>
<nav aria-label="Elsewhere"><a href="/">Tripfold</a> <a href="/docs">REST API</a>
<a href="{ASYNCAPI_PATH}">This document as JSON</a></nav>
<main><asyncapi-viewer src="{ASYNCAPI_PATH}" sidebar></asyncapi-viewer></main>
<noscript>This page needs JavaScript. The document it shows is at <a href="{ASYNCAPI_PATH}">{ASYNCAPI_PATH}</a>.
</noscript>
</body>
</html>
"""
_ASYNCAPI_STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0; }
nav { display: flex; gap: 1.5rem; padding: .75rem 1.5rem; border-bottom: 1px solid #8885; }
nav a { color: inherit; }
main { padding: 1rem 1.5rem; max-width: 90rem; margin: auto; }
"""
_ASYNCAPI_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_CACHE_FOR_A_DAY = {"Cache-Control": f"public, max-age={ASSET_AGE_MAX_S}"}


def handlers(*, topic_prefix: str) -> list[BaseRouteHandler]:
    """Return the handlers of both pages, their assets, and the AsyncAPI document. Topic names get the prefix."""
    file = StaticFile("asyncapi.json", encode_document(asyncapi_document(topic_prefix=topic_prefix)))

    @get(ASYNCAPI_PATH, include_in_schema=False)
    async def document(request: Request[Any, Any, Any]) -> Response[bytes]:
        return await file.respond(request, {"Cache-Control": "no-cache"})

    return [openapi_page, swagger_start, swagger_asset, document, asyncapi_page, asyncapi_viewer, asyncapi_style]


@get("/docs", media_type=MediaType.HTML, include_in_schema=False)
async def openapi_page() -> Response[str]:
    """Return the page that shows the OpenAPI document."""
    return Response(_OPENAPI_PAGE, headers={"Content-Security-Policy": _OPENAPI_CONTENT_SECURITY})


@get("/docs/start.js", media_type="text/javascript", include_in_schema=False)
async def swagger_start() -> str:
    """Return the script that starts Swagger UI. It is a file, because the page allows no inline script."""
    return _SWAGGER_START


@get("/docs/{name:str}", include_in_schema=False)
async def swagger_asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Return a file of Swagger UI."""
    if name not in _SWAGGER_ASSETS:
        raise NotFoundException
    return await _swagger_file(name).respond(request, _CACHE_FOR_A_DAY)


@functools.cache
def _swagger_file(name: str) -> StaticFile:
    return StaticFile(name, (files("swagger_ui") / "static" / name).read_bytes())


@get("/asyncapi", media_type=MediaType.HTML, include_in_schema=False)
async def asyncapi_page() -> Response[str]:
    """Return the page that shows the AsyncAPI document."""
    return Response(_ASYNCAPI_PAGE, headers={"Content-Security-Policy": _ASYNCAPI_CONTENT_SECURITY})


@get(SCRIPT_PATH, include_in_schema=False)
async def asyncapi_viewer(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Return the script of the viewer."""
    return await _viewer_file().respond(request, _CACHE_FOR_A_DAY)


@get(STYLE_PATH, media_type="text/css", include_in_schema=False)
async def asyncapi_style() -> str:
    """Return the style of the page around the viewer."""
    return _ASYNCAPI_STYLE


@functools.cache
def _viewer_file() -> StaticFile:
    return StaticFile("viewer.js", (files("asyncapi_viewer") / "static" / "asyncapi-viewer.iife.js").read_bytes())
