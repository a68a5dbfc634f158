"""The page at ``/``: the files in the folder ``page``, read once and served as they are.

Its scripts are ES modules without a build step. Nothing on it comes from another host, and the policy it is sent with
holds the browser to that.
"""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath

DOCUMENT = "index.html"

_MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # kept, but asked for again with its ETag: an upgraded service never mixes versions
}


class PageFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the page."""

    body: bytes
    media_type: str
    etag: str


def page_files() -> dict[str, PageFile]:
    """Read the files of the page, by name."""
    return {
        entry.name: _read(entry.name, entry.read_bytes())
        for entry in (files("services.api") / "page").iterdir()
        if _extension(entry.name) in _MEDIA_TYPES
    }


def page_handlers() -> list[HTTPRouteHandler]:
    """Return the handlers of the page and of what it loads."""
    return [document, part]


@get("/", include_in_schema=False)
async def document(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Return the page."""
    return _answer(request, DOCUMENT)


@get("/page/{name:str}", include_in_schema=False)
async def part(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
    """Return a file that the page loads."""
    return _answer(request, name)


def _answer(request: Request[Any, Any, Any], name: str) -> Response[bytes]:
    file = _FILES.get(name)
    if file is None:
        raise NotFoundException
    headers = _HEADERS | {"ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)


def _read(name: str, body: bytes) -> PageFile:
    return PageFile(
        body=body, media_type=_MEDIA_TYPES[_extension(name)], etag=f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    )


def _extension(name: str) -> str:
    return name.rpartition(".")[2]


_FILES = page_files()
