"""The upstream: a port, and its adapter over HTTP. The one module that knows an HTTP client.

Nothing that an upstream sends is believed: not its lengths, codings, redirects, validators or speed. What it may do,
and what then happens, is the table in ``docs/reference/upstream.md``; the three kinds of fault are in ``faults.py``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import email.utils
import http.cookiejar
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote

import aiohttp
import httpx
import msgspec
from httpx_aiohttp import AiohttpTransport
from httpx_aiohttp.transport import AiohttpResponseStream
from yarl import URL

from services.ingest.upstream.decoding import ACCEPTED, BadCoding, Decoder, UnknownCoding, decoder_of
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.range_resume import CannotResume, Resumable, part_bytes, range_headers, resumable
from services.ingest.upstream.retry import CircuitBreaker, OutageTooLong, UpstreamRetryPolicy, jittered_s
from shared.runtime import metrics
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings, secret_value, tls_client_context

__all__ = [
    "Download",
    "HttpUpstream",
    "PermanentUpstreamError",
    "TransientUpstreamError",
    "Upstream",
    "UpstreamDown",
    "UpstreamRetryPolicy",
    "Validators",
]

CITY_LIST_BYTES_MAX = 64 * 1024**2
CONNECT_TIMEOUT_S = 10.0
HEADER_BYTES_MAX = 16 * 1024
HEADERS_MAX = 256
LAST_MODIFIED_AGE_MIN_S = 60.0
REDIRECTS_MAX = 5
RATIO_FREE_BYTES = 16 * 1024**2
"""So much may come out of any coded body before the ratio is looked at: short files of few words compress well."""

READ_BUFFER_BYTES = 64 * 1024
"""How much of a body may lie unread in a connection. The client stops reading at twice as much."""

AiohttpResponseStream.CHUNK_SIZE = 2 * READ_BUFFER_BYTES  # 16 KiB at a time takes more to pass on than to receive

RESUME_OUTAGE_LIMIT_S = 60.0
"""How long a broken download waits for an upstream that is down, before all of it is given up."""

_JSON_TYPE = re.compile(
    r"application/([a-z0-9.-]+\+)?json|text/json|(application|text)/(x-)?(ndjson|jsonl|json-?lines)"
)
_OPAQUE_TYPES = {"", "text/html", "text/plain", "application/octet-stream", "binary/octet-stream"}
_REDIRECTS = {301, 302, 303, 307, 308}
_SENDABLE = re.compile(r"[\x20-\x7e]{1,1000}")
_AS_WRITTEN = "x-tripfold-url"
"""Carries the URL of a request to the HTTP client's middleware, which takes it out."""


class Validators(msgspec.Struct, frozen=True, kw_only=True):
    """What a conditional GET names: the entity tag and the date of what is stored, as the upstream gave them."""

    etag: str | None = None
    last_modified: str | None = None


class Download(msgspec.Struct, kw_only=True):
    """An answer under way. ``chunks`` is None if nothing changed (304); sizes are of the body without its coding."""

    url: str
    chunks: AsyncIterator[bytes] | None
    validators: Validators = Validators()
    bytes_total: int | None = None


class Upstream(Protocol):
    """What the ingest needs of the upstream. Raises UpstreamDown, TransientUpstreamError and PermanentUpstreamError."""

    async def cities(self) -> bytes:
        """Return the list of cities, as it came."""

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        """Return where a city-day's file is."""

    def download(
        self, upstream_id: str, date: dt.date, known: Validators | None
    ) -> AbstractAsyncContextManager[Download]:
        """Ask for a city-day's file, unless it still is the ``known`` one."""


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, and the bounds of its answer."""

    url: str
    deadline_s: float
    bytes_max: int
    bound: str


class _Speed:
    """How fast the upstream is, by the time that was spent waiting for it: a slow bucket is not its fault."""

    def __init__(self, url: str, *, bytes_per_s_min: float, window_s: float) -> None:
        self._url = url
        self._bytes_per_s_min = bytes_per_s_min
        self._window_s = window_s
        self._bytes = 0
        self._waited_s = 0.0

    def require(self, size_bytes: int, waited_s: float) -> None:
        """Count what came after a wait; raise TransientUpstreamError if a window has ended that brought too little."""
        self._bytes += size_bytes
        self._waited_s += waited_s
        if self._waited_s < self._window_s:
            return
        if self._bytes < self._bytes_per_s_min * self._waited_s:
            raise TransientUpstreamError(f"{self._url} sent less than {self._bytes_per_s_min:g} bytes a second")
        self._bytes, self._waited_s = 0, 0.0


class _Pace:
    """Keeps requests apart in time, so that no more than so many are made in a second."""

    def __init__(self, retrier: Retrier, requests_per_s: float) -> None:
        self._patience = retrier
        self._interval_s = 1 / requests_per_s
        self._next_s = 0.0

    async def wait(self) -> None:
        now_s = self._patience.now_s()
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + self._interval_s
        if at_s > now_s:
            await self._patience.sleep(at_s - now_s)
            self._patience.raise_if_stopping()


class HttpUpstream:
    """The Upstream over HTTP. Use it as an async context manager.

    Every request has a connection of its own: what follows a body on its connection is never read as an answer.
    """

    def __init__(self, settings: Settings, circuit: CircuitBreaker) -> None:
        self._settings = settings
        self._circuit = circuit
        self._base_url = settings.upstream_url
        self._login = _login(settings)
        self._redirect_hosts = {host for host in settings.upstream_redirect_hosts.lower().split(",") if host}
        self._pace = _Pace(circuit.retrier, settings.upstream_requests_per_s)
        context = tls_client_context(settings.upstream_ca_file)
        self._client = httpx.AsyncClient(
            transport=AiohttpTransport(verify=context, client=lambda: _session(context)),
            timeout=httpx.Timeout(settings.upstream_read_timeout_s, connect=CONNECT_TIMEOUT_S, pool=CONNECT_TIMEOUT_S),
            follow_redirects=False,
            headers={
                "user-agent": "tripfold",
                "accept": "application/json, text/html;q=0.9, */*;q=0.1",
                "accept-encoding": ACCEPTED,
                "connection": "close",
            },
            cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=[])),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def cities(self) -> bytes:
        asked = self._asked(f"{self._base_url}/cities", CITY_LIST_BYTES_MAX, "a list of cities may have")
        body = bytearray()
        async with self._answered(asked, {}) as download:
            assert download.chunks is not None, "only a conditional request can be answered with 304"
            async for chunk in download.chunks:
                body += chunk
        return bytes(body)

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return f"{self._base_url}/cities/{quote(upstream_id, safe='')}/stats?date={date.isoformat()}"

    def download(
        self, upstream_id: str, date: dt.date, known: Validators | None
    ) -> AbstractAsyncContextManager[Download]:
        conditions = {}
        if known is not None and known.etag is not None:
            conditions["if-none-match"] = known.etag
        elif known is not None and known.last_modified is not None:
            conditions["if-modified-since"] = known.last_modified
        asked = self._asked(
            self.city_url(upstream_id, date),
            self._settings.upstream_file_bytes_max,
            "TRIPFOLD_UPSTREAM_FILE_BYTES_MAX allows",
        )
        return self._answered(asked, conditions)

    def _asked(self, url: str, bytes_max: int, bound: str) -> _Asked:
        deadline_s = time.monotonic() + self._settings.upstream_deadline_s
        return _Asked(url=url, deadline_s=deadline_s, bytes_max=bytes_max, bound=bound)

    @asynccontextmanager
    async def _answered(self, asked: _Asked, conditions: dict[str, str]) -> AsyncIterator[Download]:
        """Send a request, and follow its redirects; the body comes as ``chunks`` while the block lasts."""
        response = await self._opened(asked.url, conditions)
        try:
            if response.status_code == 304 and conditions:
                _count("unchanged")
                yield Download(url=asked.url, chunks=None)
                return
            try:
                _require_ok(response, asked.url)
                decoder = _decoder_of(response, asked.url)
                _require_readable_type(response, asked.url)
                bytes_total = _content_length(response) if decoder is None else None
                _require_bounded(bytes_total or 0, asked)
            except TransientUpstreamError:
                _count("interrupted")
                raise
            except PermanentUpstreamError:
                _count("refused")
                raise
            validators = _validators(response)
            if decoder is None:
                first = resumable(response.headers, last_modified=validators.last_modified, bytes_total=bytes_total)
                chunks = self._plain(asked, response, first)
            else:
                chunks = self._decoded(asked, response, decoder)
            async with aclosing(chunks):
                yield Download(url=asked.url, chunks=chunks, validators=validators, bytes_total=bytes_total)
        finally:
            await response.aclose()

    async def _plain(
        self, asked: _Asked, response: httpx.Response | None, first: Resumable | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield a body without coding. After a break it goes on at the next byte, with another answer."""
        done_bytes = 0
        due_bytes = first.bytes_total if first else None
        resumptions = fruitless = 0
        while True:
            try:
                if response is None:
                    assert first is not None, "without what is needed to resume, the break was raised"
                    response, due_bytes = await self._resumed(asked, first, done_bytes, fruitless)
                async with aclosing(self._part(asked, response, done_bytes, due_bytes)) as part:
                    async for chunk in part:
                        done_bytes += len(chunk)
                        fruitless = 0
                        yield chunk
                return
            except CannotResume:
                raise
            except (TransientUpstreamError, UpstreamDown) as error:
                given_up = isinstance(error, OutageTooLong) or resumptions >= self._settings.upstream_resumptions
                if given_up and isinstance(error, UpstreamDown):
                    # An outage costs no attempt, but this answer had begun: whoever goes down in each ends them all.
                    raise TransientUpstreamError(
                        f"{asked.url} broke off after {done_bytes} bytes, and then {error}"
                    ) from error
                if given_up or first is None:
                    raise
                _require_in_time(asked)
                resumptions += 1
                fruitless += 1
            finally:
                if response is not None:
                    await response.aclose()
                    response = None

    async def _part(
        self, asked: _Asked, response: httpx.Response, done_bytes: int, due_bytes: int | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield what one answer adds to the first ``done_bytes``: up to ``due_bytes``, if so much was announced."""
        async with aclosing(self._arriving(asked, response)) as arriving:
            async for chunk in arriving:
                done_bytes += len(chunk)
                _require_bounded(done_bytes, asked)
                if due_bytes is not None and done_bytes > due_bytes:
                    raise CannotResume(f"{asked.url} sent more than the {due_bytes} bytes that it announced")
                yield chunk
        if due_bytes is not None and done_bytes < due_bytes:
            raise TransientUpstreamError(f"{asked.url} ended after {done_bytes} of {due_bytes} bytes")

    async def _resumed(
        self, asked: _Asked, first: Resumable, done_bytes: int, fruitless: int
    ) -> tuple[httpx.Response, int]:
        """Ask for the rest of a file after ``done_bytes``; return the answer, and how many bytes are due with it."""
        await self._circuit.retrier.sleep(jittered_s(fruitless - 1))
        now_s = self._circuit.retrier.now_s()
        async with self._circuit.turn(since_s=now_s, outage_limit_s=RESUME_OUTAGE_LIMIT_S):
            response = await self._opened(asked.url, range_headers(first, done_bytes))
            try:
                _require_not_busy(response, asked.url)
                part = part_bytes(first, done_bytes, status=response.status_code, headers=response.headers)
            except TransientUpstreamError as error:
                await response.aclose()
                _count("interrupted")
                if isinstance(error, CannotResume):
                    raise CannotResume(f"{asked.url} broke off after {done_bytes} bytes: {error}") from error
                raise
        metrics.upstream_resumptions.inc()
        return response, done_bytes + part

    async def _decoded(self, asked: _Asked, response: httpx.Response, decoder: Decoder) -> AsyncGenerator[bytes, None]:
        """Yield a body with its content-coding undone."""
        coded_bytes = 0
        done_bytes = 0
        try:
            async with aclosing(self._arriving(asked, response)) as arriving:
                async for coded in arriving:
                    coded_bytes += len(coded)
                    _require_bounded(coded_bytes, asked)
                    for chunk in decoder.decode(coded):
                        done_bytes += len(chunk)
                        _require_bounded(done_bytes, asked)
                        self._require_no_bomb(asked, coded_bytes, done_bytes)
                        yield chunk
            decoder.finish()
        except BadCoding as error:
            raise TransientUpstreamError(f"{asked.url} answered with a body that does not decode: {error}") from error

    def _require_no_bomb(self, asked: _Asked, coded_bytes: int, done_bytes: int) -> None:
        ratio_max = self._settings.upstream_decompression_ratio_max
        if done_bytes > max(RATIO_FREE_BYTES, coded_bytes * ratio_max):
            raise PermanentUpstreamError(
                f"{asked.url} answered with a body that inflates more than {ratio_max:g} times, the most that "
                "TRIPFOLD_UPSTREAM_DECOMPRESSION_RATIO_MAX allows"
            )

    async def _arriving(self, asked: _Asked, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Yield a response body as it arrives; raise TransientUpstreamError if it is cut, stalls or is too slow."""
        settings = self._settings
        speed = _Speed(
            asked.url, bytes_per_s_min=settings.upstream_bytes_per_s_min, window_s=settings.upstream_speed_window_s
        )
        outcome = "aborted"
        raw = response.aiter_raw()
        try:
            while True:
                began_s = time.monotonic()
                with _translated(asked.url):
                    # The client's own timeout begins anew with each byte, also of what frames the chunks of a body.
                    async with asyncio.timeout(settings.upstream_read_timeout_s):
                        chunk = await anext(raw, None)
                if chunk is None:
                    outcome = "complete"
                    return
                metrics.upstream_bytes.inc(len(chunk))
                speed.require(len(chunk), time.monotonic() - began_s)
                _require_in_time(asked)
                yield chunk
        except TransientUpstreamError:
            outcome = "interrupted"
            raise
        finally:
            _count(outcome)

    async def _opened(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """Send a GET, and follow its redirects; return when the head of the answer has come."""
        at = httpx.URL(url)
        for _ in range(REDIRECTS_MAX + 1):
            response = await self._sent(url, at, headers)
            if response.status_code not in _REDIRECTS or "location" not in response.headers:
                self._circuit.reached()
                return response
            await response.aclose()
            _count("redirected")
            at = self._redirected(url, at, response.headers["location"])
        raise PermanentUpstreamError(f"{url} was redirected more than {REDIRECTS_MAX} times")

    async def _sent(self, url: str, at: httpx.URL, headers: dict[str, str]) -> httpx.Response:
        await self._pace.wait()
        try:
            with _translated(url):
                async with asyncio.timeout(CONNECT_TIMEOUT_S + self._settings.upstream_read_timeout_s):
                    request = self._client.build_request("GET", at, headers=headers | {_AS_WRITTEN: str(at)})
                    return await self._client.send(request, stream=True, auth=self._login_at(at))
        except (TransientUpstreamError, UpstreamDown) as error:
            _count("interrupted" if isinstance(error, TransientUpstreamError) else "unavailable")
            raise

    def _login_at(self, at: httpx.URL) -> httpx.Auth | None:
        """Return what is shown to the upstream itself, and to no host that it redirects to."""
        own = _origin(httpx.URL(self._base_url))
        return self._login if _origin(at) in {own, *_upgraded({own})} else None

    def _redirected(self, url: str, at: httpx.URL, location: str) -> httpx.URL:
        """Return where a redirect leads; raise PermanentUpstreamError if it leads where nothing may be fetched."""
        shown = f"{url} was redirected to {location[:200]!r}"
        try:
            to = at.join(location)
        except (httpx.InvalidURL, ValueError) as error:
            raise PermanentUpstreamError(f"{shown}, which is no URL") from error
        if to.scheme not in {"http", "https"} or (at.scheme, to.scheme) == ("https", "http"):
            raise PermanentUpstreamError(f"{shown}, which is not as safe")
        known = {_origin(at), _origin(httpx.URL(url))}
        named = {to.host, f"{to.host}:{_origin(to)[1]}"}
        if _origin(to) not in known | _upgraded(known) and not named & self._redirect_hosts:
            raise PermanentUpstreamError(f"{shown}, a host that TRIPFOLD_UPSTREAM_REDIRECT_HOSTS does not name")
        return to


def _session(context: ssl.SSLContext) -> aiohttp.ClientSession:
    """Return a session that keeps no connection and no cookie, asks no environment, and undoes no coding."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        middlewares=(_send_once,),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        max_headers=HEADERS_MAX,
    )


async def _send_once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once, to its URL as it is written.

    aiohttp quotes URLs anew (``%2F`` in a query becomes ``/``), which breaks signed ones. It sends a GET again whose
    connection was lost, unless it gets an error of another type.
    """
    request.url = URL(request.headers.pop(_AS_WRITTEN), encoded=True)
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientPayloadError(str(error)) from error


class _translated:  # noqa: N801  # a context manager that reads as a phrase: with _translated(url)
    """Turns whatever the HTTP client raises into a fault of the upstream."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # httpx-aiohttp calls a connection that was lost a timeout of connecting, so aiohttp's own error decides.
        fault = (error.__cause__ or error) if isinstance(error, httpx.TransportError) else error
        match fault:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                raise UpstreamDown(f"{self._url} cannot be reached: {_root_of(fault)}"[:1_000]) from error
            case TimeoutError():
                raise TransientUpstreamError(f"{self._url} stalled: no byte came in time") from error
            case Exception():
                # Not only its own errors: an answer that trips the client up is no fault of our own.
                raise TransientUpstreamError(
                    f"{self._url} broke off: {' '.join(_root_of(fault).split())}"[:500]
                ) from error


def _root_of(error: BaseException) -> str:
    """Say what is behind an error: the operating system's own words tell a refused connection from a lost one."""
    root = error
    while (deeper := root.__cause__ or root.__context__) is not None:
        root = deeper
    return str(root) or type(root).__name__


def _count(outcome: str) -> None:
    metrics.upstream_requests.labels(outcome).inc()


def _origin(url: httpx.URL) -> tuple[str, int]:
    return url.host, url.port or (443 if url.scheme == "https" else 80)


def _upgraded(origins: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return where the same hosts are by TLS, if they are at the port of plain HTTP."""
    return {(host, 443) for host, port in origins if port == 80}


def _login(settings: Settings) -> httpx.Auth | None:
    if not settings.upstream_username:
        return None
    password = secret_value(
        settings.upstream_password, settings.upstream_password_file, "TRIPFOLD_UPSTREAM_PASSWORD_FILE"
    )
    return httpx.BasicAuth(settings.upstream_username, password)


def _require_not_busy(response: httpx.Response, url: str) -> None:
    """Raise TransientUpstreamError for a status that may pass."""
    status = response.status_code
    if status in {408, 425, 429} or status >= 500:
        retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
        raise TransientUpstreamError(f"{url} answered {status}", retry_after_s=retry_after_s)


def _require_ok(response: httpx.Response, url: str) -> None:
    _require_not_busy(response, url)
    if response.status_code == 404:
        if url.endswith("/cities"):
            raise PermanentUpstreamError(
                f"{url} answered 404: the upstream has no list of cities; check TRIPFOLD_UPSTREAM_URL"
            )
        raise PermanentUpstreamError(f"{url} answered 404: the upstream has no file for this city and date")
    if response.status_code != 200:
        raise PermanentUpstreamError(f"{url} answered {response.status_code}")


def _require_readable_type(response: httpx.Response, url: str) -> None:
    written = response.headers.get("content-type", "")
    essence = written.partition(";")[0].strip().lower()
    if essence not in _OPAQUE_TYPES and not _JSON_TYPE.fullmatch(essence):
        raise PermanentUpstreamError(f"{url} answered with content-type {written[:100]!r}, which is not JSON")


def _require_bounded(size_bytes: int, asked: _Asked) -> None:
    if size_bytes > asked.bytes_max:
        raise PermanentUpstreamError(f"{asked.url} has more than {asked.bytes_max} bytes, the most that {asked.bound}")


def _require_in_time(asked: _Asked) -> None:
    if time.monotonic() > asked.deadline_s:
        raise TransientUpstreamError(f"{asked.url} took longer than TRIPFOLD_UPSTREAM_DEADLINE_S allows")


def _decoder_of(response: httpx.Response, url: str) -> Decoder | None:
    try:
        return decoder_of(response.headers.get("content-encoding", ""))
    except UnknownCoding as error:
        raise PermanentUpstreamError(f"{url} answered with {error}") from error


def _content_length(response: httpx.Response) -> int | None:
    if "transfer-encoding" in response.headers:
        return None  # it counts alone (RFC 9112, 6.3)
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _retry_after_s(value: str) -> float:
    """Return the seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3), 0 if it says nothing readable."""
    if value.isdecimal():
        return float(value[:9])
    at = _http_date(value)
    return 0.0 if at is None else max(0.0, (at - dt.datetime.now(dt.UTC)).total_seconds())


def _validators(response: httpx.Response) -> Validators:
    """Return the validators of an answer that can be sent back; a Last-Modified only if it was a minute old.

    A younger one cannot tell two changes within its second apart (RFC 9110, 8.8.2.2).
    """
    etag = response.headers.get("etag", "")
    last_modified = response.headers.get("last-modified", "")
    modified, given = _http_date(last_modified), _http_date(response.headers.get("date", ""))
    is_strong = modified and given and (given - modified).total_seconds() >= LAST_MODIFIED_AGE_MIN_S
    return Validators(
        etag=etag if _SENDABLE.fullmatch(etag) else None,
        last_modified=last_modified if is_strong and _SENDABLE.fullmatch(last_modified) else None,
    )


def _http_date(value: str) -> dt.datetime | None:
    try:
        read = email.utils.parsedate_to_datetime(value)
        return read.replace(tzinfo=read.tzinfo or dt.UTC).astimezone(dt.UTC)
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
