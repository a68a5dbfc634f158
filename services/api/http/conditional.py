"""JSON responses with a strong ETag: a client that has the current one gets 304."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from litestar import MediaType, Request, Response

from services.api.http.etag import matches, strong_etag
from services.api.http.negotiation import content_coding
from services.api.middleware.compression import CODINGS, IDENTITY, SIZE_BYTES_MIN, compress


async def conditional_json(
    request: Request[Any, Any, Any], content: msgspec.Struct, headers: Mapping[str, str]
) -> Response[bytes]:
    """Return ``content`` as JSON in the coding that the client prefers, or 304 if the client has it."""
    wanted = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
    if_none_match = request.headers.get("if-none-match", "")
    return await asyncio.to_thread(_response, content, wanted, if_none_match, headers)


def _response(content: msgspec.Struct, wanted: str, if_none_match: str, headers: Mapping[str, str]) -> Response[bytes]:
    body = msgspec.json.encode(content)
    coding = wanted if len(body) >= SIZE_BYTES_MIN else IDENTITY
    etag = strong_etag([body.decode(), coding])
    sent = {**headers, "ETag": etag, "Vary": "Accept-Encoding", "Cache-Control": "no-cache"}
    if matches(if_none_match, etag):
        return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=sent)
    if coding != IDENTITY:
        sent["Content-Encoding"] = coding
    return Response(compress(body, coding), media_type=MediaType.JSON, headers=sent)
