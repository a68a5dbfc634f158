"""The events' documentation: the AsyncAPI document at ``/asyncapi.json``, and a page at ``/asyncapi`` that shows it.

The page is asyncapi-viewer, a web component from a package that ships its script: nothing is loaded from anywhere
else, and nothing stands in place, so that the page's policy allows no script or style but its own files.
"""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import Any, Final

from litestar import MediaType, Request, Response, get
from litestar.handlers import BaseRouteHandler

from services.api.documentation.asyncapi import asyncapi_document, encode_document
from services.api.documentation.openapi import ASSET_AGE_MAX_S
from services.api.web.static_files import StaticFile

DOCUMENT_PATH: Final = "/asyncapi.json"
SCRIPT_PATH: Final = "/asyncapi/viewer.js"
STYLE_PATH: Final = "/asyncapi/page.css"

_PAGE = f"""\
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
<a href="{DOCUMENT_PATH}">This document as JSON</a></nav>
<main><asyncapi-viewer src="{DOCUMENT_PATH}" sidebar></asyncapi-viewer></main>
<noscript>This page needs JavaScript. The document it shows is at <a href="{DOCUMENT_PATH}">{DOCUMENT_PATH}</a>.
</noscript>
</body>
</html>
"""
_STYLE = """\
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { margin: 0; }
nav { display: flex; gap: 1.5rem; padding: .75rem 1.5rem; border-bottom: 1px solid #8885; }
nav a { color: inherit; }
main { padding: 1rem 1.5rem; max-width: 90rem; margin: auto; }
"""
_CONTENT_SECURITY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_FOR_A_DAY = {"Cache-Control": f"public, max-age={ASSET_AGE_MAX_S}"}


def asyncapi_handlers(*, topic_prefix: str) -> list[BaseRouteHandler]:
    """Return the handlers of the document, with the topics' names on this installation, and of its page."""
    file = StaticFile("asyncapi.json", encode_document(asyncapi_document(topic_prefix=topic_prefix)))

    @get(DOCUMENT_PATH, include_in_schema=False)
    async def document(request: Request[Any, Any, Any]) -> Response[bytes]:
        return await file.answer(request, {"Cache-Control": "no-cache"})

    return [document, page, script, style]


@get("/asyncapi", media_type=MediaType.HTML, include_in_schema=False)
async def page() -> Response[str]:
    """Show the document."""
    return Response(_PAGE, headers={"Content-Security-Policy": _CONTENT_SECURITY})


@get(SCRIPT_PATH, include_in_schema=False)
async def script(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Return the viewer."""
    return await _viewer().answer(request, _FOR_A_DAY)


@get(STYLE_PATH, media_type="text/css", include_in_schema=False)
async def style() -> str:
    """Return the style of what is around the viewer."""
    return _STYLE


@functools.cache
def _viewer() -> StaticFile:
    return StaticFile("viewer.js", (files("asyncapi_viewer") / "static" / "asyncapi-viewer.iife.js").read_bytes())
