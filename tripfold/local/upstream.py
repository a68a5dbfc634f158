"""The reference upstream: an HTTP server of generated city lists and trip files.

It replaces a transit authority's server, so that users can try Tripfold with files of real size.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from datetime import date
from typing import Annotated, Any

import msgspec
import uvicorn
from litestar import Litestar, MediaType, Request, Response, get, head
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import FromPath, QueryParameter
from litestar.response import Stream

from tripfold.local.trip_files import (
    City,
    NoTripFileError,
    TripFile,
    UpstreamOptions,
    block_pool,
    city_list,
    trip_file,
)

__all__ = ["UpstreamOptions", "city_list", "create_app", "serve", "trip_file"]

# 19 digits exceed any file, and keep int() cheap. Several ranges in one request do not match. For them, as for any
# unknown range, the server returns the whole file.
BYTE_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})", re.IGNORECASE)
SHUTDOWN_GRACE_S = 1

DateParameter = Annotated[date, QueryParameter(name="date")]
Options = NamedDependency[UpstreamOptions]


class UnsatisfiableRangeError(ValueError):
    """A valid byte range without a byte of the file."""


class ByteRange(msgspec.Struct, frozen=True):
    """The bytes from ``start`` to ``stop``, without ``stop``. It is never empty."""

    start: int
    stop: int


def create_app(options: UpstreamOptions) -> Litestar:
    """Return the server. Renders the blocks of the seed, which takes about 0.2 s."""
    block_pool(options.seed)
    return Litestar(
        [list_cities, send_stats, describe_stats, report_health],
        dependencies={"options": Provide(lambda: options, sync_to_thread=False)},
        openapi_config=None,
        logging_config=None,
    )


def serve(options: UpstreamOptions, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM, which also end running streams."""
    config = uvicorn.Config(
        create_app(options),
        host=host,
        port=port,
        loop="uvloop",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )
    with suppress(KeyboardInterrupt):
        CuttingServer(config).run()


class CuttingServer(uvicorn.Server):
    """A server that does not wait for clients at shutdown.

    A file may take hours to send. uvicorn would cancel such a stream, and log a traceback.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection, then shut down."""
        for connection in self.server_state.connections:
            connection.transport.abort()
        await super().shutdown(sockets)


@get("/health")
async def report_health() -> dict[str, str]:
    """Return 200."""
    return {"status": "ok"}


@get("/cities")
async def list_cities(options: Options) -> list[City]:
    """Return every city with its country."""
    return city_list(options)


@get("/cities/{city_id:int}/stats")
async def send_stats(
    city_id: FromPath[int], day: DateParameter, request: Request[Any, Any, Any], options: Options
) -> Response[Any]:
    """Stream the file of a city-day or a byte range of it, or return 304 if the client's copy is current."""
    file = _find(options, city_id, day)
    headers = _headers(options, file)
    if options.etag and names_etag(request.headers.get("if-none-match", ""), file.etag):
        return Response(None, status_code=304, headers={"etag": file.etag})
    wanted = _wanted_range(options, request, file)
    if wanted is None:
        return Stream(_stream(file.read()), headers=headers, media_type=MediaType.JSON)
    headers["content-length"] = str(wanted.stop - wanted.start)
    headers["content-range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{file.size_bytes}"
    return Stream(
        _stream(file.read(wanted.start, wanted.stop)),
        status_code=206,
        headers=headers,
        media_type=MediaType.JSON,
    )


@head("/cities/{city_id:int}/stats")
async def describe_stats(
    city_id: FromPath[int], day: DateParameter, request: Request[Any, Any, Any], options: Options
) -> Response[None]:
    """Return the headers of a whole file, because ranges apply to GET only."""
    file = _find(options, city_id, day)
    if options.etag and names_etag(request.headers.get("if-none-match", ""), file.etag):
        return Response(None, status_code=304, headers={"etag": file.etag})
    return Response(None, headers={**_headers(options, file), "content-type": MediaType.JSON})


def names_etag(if_none_match: str, etag: str) -> bool:
    """Return whether an ``If-None-Match`` header matches this entity tag (weak comparison)."""
    candidates = [candidate.strip().removeprefix("W/") for candidate in if_none_match.split(",")]
    return etag in candidates or candidates == ["*"]


def byte_range(header: str, size_bytes: int) -> ByteRange | None:
    """Parse a ``Range`` header with one range of a file; return None if it is not valid.

    Raises UnsatisfiableRangeError if the range starts after the file's end or is an empty suffix.
    """
    match = BYTE_RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(size_bytes - int(last), 0), size_bytes
    else:
        start, stop = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= stop:
        raise UnsatisfiableRangeError(f"{header!r} has no byte of a file of {size_bytes} bytes")
    return ByteRange(start, stop)


def _find(options: UpstreamOptions, city_id: int, day: date) -> TripFile:
    try:
        return trip_file(options, city_id, day)
    except NoTripFileError as error:
        raise NotFoundException(str(error)) from error


def _headers(options: UpstreamOptions, file: TripFile) -> dict[str, str]:
    headers = {"content-length": str(file.size_bytes)}
    if options.etag:
        headers["etag"] = file.etag
    if options.ranges:
        headers["accept-ranges"] = "bytes"
    return headers


def _wanted_range(options: UpstreamOptions, request: Request[Any, Any, Any], file: TripFile) -> ByteRange | None:
    if not options.ranges:
        return None
    # If-Range uses strong comparison: with a weak tag, a date or another tag the client's part may be of another file.
    condition = request.headers.get("if-range")
    if condition is not None and not (options.etag and condition.strip() == file.etag):
        return None
    try:
        return byte_range(request.headers.get("range", ""), file.size_bytes)
    except UnsatisfiableRangeError as error:
        raise HTTPException(
            str(error), status_code=416, headers={"content-range": f"bytes */{file.size_bytes}"}
        ) from error


async def _stream(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
        # A write to a fast client never waits, so without this a stream would block all others.
        await asyncio.sleep(0)
