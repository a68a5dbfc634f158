"""The HTTP client's transport: a hardened aiohttp session, and its errors as errors of the upstream."""

from __future__ import annotations

import asyncio
import http.cookiejar
import ssl
from types import TracebackType
from typing import Any, cast

import aiohttp
import httpx
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport
from httpx_aiohttp.transport import AiohttpResponseStream
from yarl import URL

from services.ingest.upstream.decoding import ACCEPTED
from services.ingest.upstream.errors import TransientUpstreamError, UpstreamDown

HEADER_BYTES_MAX = 16 * 1024
HEADERS_MAX = 256

READ_BYTES = 32 * 1024
"""How much one read from a socket takes. The HTTP client handles all of it at once, up to 5,000 chunks of a byte."""

READ_BUFFER_BYTES = 64 * 1024
"""How much unread body a connection buffers. The client stops reading at twice as much."""

AiohttpResponseStream.CHUNK_SIZE = 2 * READ_BUFFER_BYTES  # chunks of 16 KiB cost more to pass on than to receive

_URL_AS_WRITTEN = "x-tripfold-url"
"""Carries the URL of a request to `_send_once`, which removes it."""


def make_client(context: ssl.SSLContext, *, connect_timeout_s: float, read_timeout_s: float) -> httpx.AsyncClient:
    """Return a client that follows no redirect, keeps no cookie, reads no environment and decodes no body."""
    return httpx.AsyncClient(
        transport=AiohttpTransport(verify=context, client=lambda: _session(context)),
        timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=connect_timeout_s),
        follow_redirects=False,
        headers={
            "user-agent": "tripfold",
            "accept": "application/json, text/html;q=0.9, */*;q=0.1",
            "accept-encoding": ACCEPTED,
            "connection": "close",
        },
        event_hooks={"response": [_set_location_apart]},
        cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
        trust_env=False,
    )


async def _set_location_apart(response: httpx.Response) -> None:
    """Move the ``Location`` into the extensions of a response.

    httpx builds the next request of a redirect that it does not follow, and fails if it cannot read the ``Location``.
    """
    if "location" in response.headers:
        response.extensions["location"] = response.headers.pop("location")


def build_get(client: httpx.AsyncClient, url: httpx.URL, headers: dict[str, str]) -> httpx.Request:
    """Build a GET request that is sent to the URL exactly as it is written."""
    return client.build_request("GET", url, headers=headers | {_URL_AS_WRITTEN: str(url)})


def _session(context: ssl.SSLContext) -> aiohttp.ClientSession:
    """Return a session that keeps no connection and no cookie, reads no environment and decodes no body."""
    return aiohttp.ClientSession(
        connector=_Connector(ssl=context, limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(_send_once,),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        max_headers=HEADERS_MAX,
    )


class _Connector(aiohttp.TCPConnector):
    """Lets each connection read in small pieces. By default uvloop allocates and reads 256 KiB at once."""

    async def connect(self, *args: Any, **options: Any) -> Connection:
        connection = await super().connect(*args, **options)
        transport = connection.transport
        if transport is not None and not transport.is_closing():
            transport.pause_reading()
            transport.set_protocol(_SmallReads(cast("asyncio.Protocol", transport.get_protocol())))
            transport.resume_reading()
        return connection


class _SmallReads(asyncio.BufferedProtocol):
    """Passes everything on to a protocol, and received bytes as much as its buffer holds at a time."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self._protocol = protocol
        self._buffer = memoryview(bytearray(READ_BYTES))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  # its size is fixed
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._protocol.data_received(bytes(self._buffer[:nbytes]))

    def eof_received(self) -> bool | None:
        return self._protocol.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()


async def _send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once, to its URL as it is written.

    By default aiohttp quotes URLs again (``%2F`` in a query becomes ``/``), which breaks signed URLs. It also repeats
    a GET whose connection was lost, unless the error has another type.
    """
    request.url = URL(request.headers.pop(_URL_AS_WRITTEN), encoded=True)
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientPayloadError(str(error)) from error


class translate_errors:  # noqa: N801  # a context manager, named like a function
    """Turns every error of the HTTP client into UpstreamDown or TransientUpstreamError."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # httpx-aiohttp reports a lost connection as a connect timeout, so aiohttp's own error decides.
        fault = (error.__cause__ or error) if isinstance(error, httpx.TransportError) else error
        match fault:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                raise UpstreamDown(f"{self._url} cannot be reached: {_root_of(fault)}"[:1_000]) from error
            case TimeoutError():
                raise TransientUpstreamError(f"{self._url} stalled: no byte came in time") from error
            case Exception():
                # Includes errors of other types: a response that the client cannot handle is the upstream's fault.
                raise TransientUpstreamError(
                    f"{self._url} broke off: {' '.join(_root_of(fault).split())}"[:500]
                ) from error


def _root_of(error: BaseException) -> str:
    """Return the message of the root cause: only the system's error distinguishes refused from lost connections."""
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    return str(root) or type(root).__name__
