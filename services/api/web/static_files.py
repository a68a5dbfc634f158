"""Static files of the service: read once, and compressed once for each coding.

Litestar's static files ignore ``If-None-Match`` and have one ETag for all codings.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from litestar import Request, Response

from services.api.http.etag import matches
from services.api.http.negotiation import content_coding
from services.api.middleware.compression import CODINGS, IDENTITY, SIZE_BYTES_MIN, compress

MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "json": "application/json",
}


class StaticFile:
    """A file, its media type, and its bytes in each content coding."""

    def __init__(self, name: str, body: bytes) -> None:
        self.body = body
        self.media_type = MEDIA_TYPES[extension_of(name)]
        self._digest = hashlib.sha256(body).hexdigest()[:32]
        self._encoded = {IDENTITY: body}

    def etag(self, coding: str) -> str:
        """Return the strong ETag of the file in one coding."""
        return f'"{self._digest}"' if coding == IDENTITY else f'"{self._digest}-{coding}"'

    async def body_in(self, coding: str) -> bytes:
        """Return the file in a coding. The first use compresses it in a thread."""
        if coding not in self._encoded:
            self._encoded[coding] = await asyncio.to_thread(compress, self.body, coding)
        return self._encoded[coding]

    async def respond(self, request: Request[Any, Any, Any], headers: Mapping[str, str]) -> Response[bytes]:
        """Return the file in the coding that the client prefers, or 304 if the client has it."""
        wanted = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
        if len(self.body) < SIZE_BYTES_MIN:
            wanted = IDENTITY
        etag = self.etag(wanted)
        sent = {**headers, "ETag": etag, "Vary": "Accept-Encoding"}
        if matches(request.headers.get("if-none-match", ""), etag):
            return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=sent)
        if wanted != IDENTITY:
            sent["Content-Encoding"] = wanted
        return Response(await self.body_in(wanted), media_type=self.media_type, headers=sent)


def extension_of(name: str) -> str:
    """Return the part of a name after its last dot."""
    return name.rpartition(".")[2]
