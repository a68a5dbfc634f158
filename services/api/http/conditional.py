"""JSON responses with a strong ETag: a client that has the current one gets 304."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from litestar import MediaType, Request, Response

from services.api.http.etag import matches, strong_etag
from services.api.http.negotiation import content_coding
from services.api.middleware.compression import CODINGS, IDENTITY, SIZE_BYTES_MIN, compress


class EncodedJson(NamedTuple):
    """A response as JSON, a hash of it, and headers that come with it."""

    body: bytes
    body_hash: str
    headers: Mapping[str, str]

    @classmethod
    def of(cls, content: msgspec.Struct, headers: Mapping[str, str]) -> EncodedJson:
        """Return ``content`` as JSON, with ``headers``."""
        body = msgspec.json.encode(content)
        return cls(body, hashlib.sha256(body).hexdigest(), headers)


async def conditional_json(request: Request[Any, Any, Any], content: EncodedJson) -> Response[bytes]:
    """Return ``content`` in the coding that the client prefers, or 304 if the client has it."""
    wanted = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
    coding = wanted if len(content.body) >= SIZE_BYTES_MIN else IDENTITY
    etag = strong_etag([content.body_hash, coding])
    headers = {**content.headers, "ETag": etag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
    if matches(request.headers.get("if-none-match", ""), etag):
        return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    if coding != IDENTITY:
        headers["Content-Encoding"] = coding
    body = await asyncio.to_thread(compress, content.body, coding)
    return Response(body, media_type=MediaType.JSON, headers=headers)
