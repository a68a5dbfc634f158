"""Files that are part of the service and served as they are: read once, compressed once for each coding."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from litestar import Request, Response

from services.api.http.etag import is_known
from services.api.http.negotiation import content_coding
from services.api.middleware.compression import CODINGS, IDENTITY, SIZE_BYTES_MIN, coded

MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "json": "application/json",
}


class StaticFile:
    """A file, its media type, and its forms by content coding."""

    def __init__(self, name: str, body: bytes) -> None:
        self.body = body
        self.media_type = MEDIA_TYPES[extension_of(name)]
        self._digest = hashlib.sha256(body).hexdigest()[:32]
        self._forms = {IDENTITY: body}

    def etag(self, coding: str) -> str:
        """Return the strong ETag of one form."""
        return f'"{self._digest}"' if coding == IDENTITY else f'"{self._digest}-{coding}"'

    async def form(self, coding: str) -> bytes:
        """Return the bytes under a coding. They are made at their first use, beside the event loop."""
        if coding not in self._forms:
            self._forms[coding] = await asyncio.to_thread(coded, self.body, coding)
        return self._forms[coding]

    async def answer(self, request: Request[Any, Any, Any], headers: Mapping[str, str]) -> Response[bytes]:
        """Answer with the file in the coding that the client wants, or with 304 if it has that."""
        wanted = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
        if len(self.body) < SIZE_BYTES_MIN:
            wanted = IDENTITY
        etag = self.etag(wanted)
        sent = {**headers, "ETag": etag, "Vary": "Accept-Encoding"}
        if is_known(request.headers.get("if-none-match", ""), etag):
            return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=sent)
        if wanted != IDENTITY:
            sent["Content-Encoding"] = wanted
        return Response(await self.form(wanted), media_type=self.media_type, headers=sent)


def extension_of(name: str) -> str:
    """Return what stands behind the last dot of a name."""
    return name.rpartition(".")[2]
