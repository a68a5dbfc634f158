"""Compresses responses by ``Accept-Encoding``: whole bodies in the middleware, streamed bodies part by part.

The middleware skips responses with an ETag. A strong ETag names exact bytes, so their handlers choose the coding.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Iterable, Iterator

from litestar.datastructures import MutableScopeHeaders
from litestar.enums import ScopeType
from litestar.types import ASGIApp, HTTPResponseStartEvent, Message, Receive, Scope, Send

from services.api.http.negotiation import content_coding
from shared.runtime import zstd

ZSTD = "zstd"
GZIP = "gzip"
IDENTITY = "identity"
CODINGS = (ZSTD, GZIP)
ZSTD_LEVEL = 3
GZIP_LEVEL = 5
SIZE_BYTES_MIN = 1024
INLINE_BYTES_MAX = 64 * 1024  # larger bodies are compressed in a thread, because they would block the event loop
PART_BYTES_MIN = 256 * 1024

_TEXTS = ("application/json", "application/problem+json", "application/vnd.oai.openapi+json", "text/")
_STREAMED = "text/event-stream"


def compress(body: bytes, coding: str) -> bytes:
    """Compress a body by one of CODINGS; return it unchanged for any other. The result is deterministic."""
    if coding == ZSTD:
        return zstd.compress(body, ZSTD_LEVEL)
    if coding == GZIP:
        return gzip.compress(body, GZIP_LEVEL, mtime=0)
    return body


def compress_parts(parts: Iterable[bytes], coding: str) -> Iterator[bytes]:
    """Compress a stream in pieces of at least PART_BYTES_MIN. The result is deterministic."""
    pieces = _pieces(parts)
    if coding == ZSTD:
        compressor = zstd.ZstdCompressor(ZSTD_LEVEL)
        for piece in pieces:
            yield compressor.compress(piece, compressor.FLUSH_BLOCK)
        yield compressor.flush()
    elif coding == GZIP:
        deflate = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        for piece in pieces:
            yield deflate.compress(piece)
        yield deflate.flush()
    else:
        yield from pieces


def _pieces(parts: Iterable[bytes]) -> Iterator[bytes]:
    gathered: list[bytes] = []
    size_bytes = 0
    for part in parts:
        gathered.append(part)
        size_bytes += len(part)
        if size_bytes >= PART_BYTES_MIN:
            yield b"".join(gathered)
            gathered, size_bytes = [], 0
    yield b"".join(gathered)


class Compression:
    """ASGI middleware that compresses whole text responses of SIZE_BYTES_MIN and more.

    Litestar's own middleware ignores ``q=0``, compresses images and event streams, and breaks strong ETags.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, and compress its response."""
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        accepted = ",".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"accept-encoding")
        coding = content_coding(accepted, CODINGS)
        held: HTTPResponseStartEvent | None = None

        async def send_compressed(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                held = message
                return
            if message["type"] == "http.response.body" and held is not None:
                start, held = held, None
                headers = MutableScopeHeaders(start)
                if _compressible(headers) and not message["more_body"] and len(message["body"]) >= SIZE_BYTES_MIN:
                    headers.add("Vary", "Accept-Encoding")
                    if coding != IDENTITY:
                        message["body"] = await _compressed(message["body"], coding)
                        headers["Content-Encoding"] = coding
                        headers["Content-Length"] = str(len(message["body"]))
                await send(start)
            await send(message)

        await self.app(scope, receive, send_compressed)


def _compressible(headers: MutableScopeHeaders) -> bool:
    media_type = str(headers.get("content-type", ""))
    if "etag" in headers or "content-encoding" in headers or media_type.startswith(_STREAMED):
        return False
    return media_type.startswith(_TEXTS)


async def _compressed(body: bytes, coding: str) -> bytes:
    if len(body) <= INLINE_BYTES_MAX:
        return compress(body, coding)
    return await asyncio.to_thread(compress, body, coding)
