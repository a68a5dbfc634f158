"""The page at ``/``: serves the files in the folder ``files``, which are read once.

Its scripts are ES modules without a build step. Its content security policy forbids other hosts.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from litestar import Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from services.api.web.static_files import MEDIA_TYPES, StaticFile, extension_of

DOCUMENT = "index.html"

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # the browser checks the ETag each time, so that the versions of an upgrade never mix
}


def page_files() -> dict[str, StaticFile]:
    """Read the files of the page, by name."""
    return {
        entry.name: StaticFile(entry.name, entry.read_bytes())
        for entry in (files("services.api.web") / "files").iterdir()
        if extension_of(entry.name) in MEDIA_TYPES
    }


def page_handlers() -> list[HTTPRouteHandler]:
    """Return the handlers of the page and its files."""
    return [document, page_file]


@get("/", include_in_schema=False)
async def document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Return the page."""
    return await _response(request, DOCUMENT)


@get("/page/{name:str}", include_in_schema=False)
async def page_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Return a file that the page loads."""
    return await _response(request, name)


async def _response(request: Request[Any, Any, Any], name: str) -> Response[bytes]:
    file = _FILES.get(name)
    if file is None:
        raise NotFoundException
    return await file.respond(request, _HEADERS)


_FILES = page_files()
