"""The page: serves the files in the folder ``files``, which are read once. Each view of the page has its own path.

Its scripts are ES modules without a build step. Its content security policy forbids other hosts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litestar import Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

from services.api.web.static_files import MEDIA_TYPES, StaticFile, extension_of

DOCUMENT = "index.html"
VIEWS = ("/", "/completeness", "/jobs", "/pipeline")

_FOLDER = Path(__file__).parent / "files"
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
    """Read the files of the page, by their path in the folder."""
    return {
        path.relative_to(_FOLDER).as_posix(): StaticFile(path.name, path.read_bytes())
        for path in sorted(_FOLDER.rglob("*"))
        if extension_of(path.name) in MEDIA_TYPES
    }


def page_handlers() -> list[HTTPRouteHandler]:
    """Return the handlers of the page and its files."""
    return [document, page_file]


@get(list(VIEWS), include_in_schema=False)
async def document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Return the page, which opens the view of the path."""
    return await _response(request, DOCUMENT)


@get("/page/{name:path}", include_in_schema=False)
async def page_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Return a file that the page loads."""
    return await _response(request, name.removeprefix("/"))


async def _response(request: Request[Any, Any, Any], name: str) -> Response[bytes]:
    file = _FILES.get(name)
    if file is None:
        raise NotFoundException
    return await file.respond(request, _HEADERS)


_FILES = page_files()
