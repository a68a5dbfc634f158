"""The adapter of the upstream port to HTTP.

The client trusts nothing that an upstream sends: lengths, content-encodings, redirects, validators and speed are all
checked. ``docs/reference/upstream.md`` lists each fault and its handling; ``errors.py`` has the three kinds of error.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
import msgspec

from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.decoding import BadCoding, Decoder
from services.ingest.upstream.errors import OutageTooLong, PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.port import Download, Validators
from services.ingest.upstream.range_resume import CannotResume, Resumable, part_bytes, range_headers, resumable
from services.ingest.upstream.redirects import REDIRECT_STATUSES, REDIRECTS_MAX, RedirectRules
from services.ingest.upstream.responses import (
    content_length,
    decoder_for,
    require_not_busy,
    require_ok,
    require_readable_type,
    validators_in,
)
from services.ingest.upstream.retry import jittered_s
from services.ingest.upstream.transport import build_get, make_client, translate_errors
from shared.runtime import metrics, tracing
from shared.runtime.metrics import UpstreamOutcome
from shared.runtime.retry import Retrier
from shared.runtime.settings import Settings, secret_value, tls_client_context

CITY_LIST_BYTES_MAX = 64 * 1024**2
CONNECT_TIMEOUT_S = 10.0
RATIO_FREE_BYTES = 16 * 1024**2
"""Up to this size a decoded body may have any compression ratio: short files of few words compress well."""

RESUME_OUTAGE_LIMIT_S = 60.0
"""How long a broken download waits for an upstream that is down, before the whole download fails."""


class _Request(msgspec.Struct, kw_only=True):
    """A URL to fetch, the limits of its response, and how long the upstream was waited for."""

    url: str
    deadline_s: float
    bytes_max: int
    bound: str
    waited_s: float = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block: the upstream is waited for."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - began_s

    def require_in_time(self) -> None:
        """Raise TransientUpstreamError after the deadline."""
        if self.waited_s > self.deadline_s:
            raise TransientUpstreamError(f"{self.url} took longer than TRIPFOLD_UPSTREAM_DEADLINE_S allows")


class _SpeedLimit:
    """Checks the speed of the upstream. Counts only the time spent waiting for it, so a slow bucket does not matter."""

    def __init__(self, url: str, *, bytes_per_s_min: float, window_s: float) -> None:
        self._url = url
        self._bytes_per_s_min = bytes_per_s_min
        self._window_s = window_s
        self._bytes = 0
        self._waited_s = 0.0

    def check(self, size_bytes: int, waited_s: float) -> None:
        """Count bytes that came after a wait. Raises TransientUpstreamError if a whole window was too slow."""
        self._bytes += size_bytes
        self._waited_s += waited_s
        if self._waited_s < self._window_s:
            return
        if self._bytes < self._bytes_per_s_min * self._waited_s:
            raise TransientUpstreamError(f"{self._url} sent less than {self._bytes_per_s_min:g} bytes a second")
        self._bytes, self._waited_s = 0, 0.0


class _RateLimit:
    """Spaces requests evenly, at most ``requests_per_s``. The rate limiters of libraries allow bursts."""

    def __init__(self, retrier: Retrier, requests_per_s: float) -> None:
        self._retrier = retrier
        self._interval_s = 1 / requests_per_s
        self._next_s = 0.0

    async def wait(self) -> None:
        now_s = self._retrier.now_s()
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + self._interval_s
        if at_s > now_s:
            await self._retrier.sleep(at_s - now_s)
            self._retrier.raise_if_stopping()


class HttpUpstream:
    """The Upstream over HTTP. Use it as an async context manager.

    Each request uses a new connection, so extra bytes after a body are never read as the next response.
    """

    def __init__(self, settings: Settings, circuit: CircuitBreaker) -> None:
        self._settings = settings
        self._circuit = circuit
        self._base_url = settings.upstream_url
        self._credentials = _credentials(settings)
        hosts = [host for host in settings.upstream_redirect_hosts.split(",") if host]
        self._redirects = RedirectRules(settings.upstream_url, hosts)
        self._rate_limit = _RateLimit(circuit.retrier, settings.upstream_requests_per_s)
        self._client = make_client(
            tls_client_context(settings.upstream_ca_file),
            connect_timeout_s=CONNECT_TIMEOUT_S,
            read_timeout_s=settings.upstream_read_timeout_s,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def cities(self) -> bytes:
        request = self._request(f"{self._base_url}/cities", CITY_LIST_BYTES_MAX, "a list of cities may have")
        body = bytearray()
        async with self._fetch(request, {}) as download:
            assert download.chunks is not None, "only a conditional request can get a 304"
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
        request = self._request(
            self.city_url(upstream_id, date),
            self._settings.upstream_file_bytes_max,
            "TRIPFOLD_UPSTREAM_FILE_BYTES_MAX allows",
        )
        return self._fetch(request, conditions)

    def _request(self, url: str, bytes_max: int, bound: str) -> _Request:
        return _Request(url=url, deadline_s=self._settings.upstream_deadline_s, bytes_max=bytes_max, bound=bound)

    @asynccontextmanager
    async def _fetch(self, request: _Request, conditions: dict[str, str]) -> AsyncIterator[Download]:
        """Send a request, follow its redirects, and receive the body as ``chunks`` inside the block."""
        with tracing.inner_span("GET upstream", "client", {"http.request.method": "GET", "url.full": request.url}):
            async with self._response(request, conditions) as download:
                yield download

    @asynccontextmanager
    async def _response(self, request: _Request, conditions: dict[str, str]) -> AsyncIterator[Download]:
        with request.waiting():
            response = await self._open(request.url, conditions)
        try:
            if response.status_code == 304 and conditions:
                _count("unchanged")
                yield Download(url=request.url, chunks=None)
                return
            try:
                require_ok(response, request.url)
                decoder = decoder_for(response, request.url)
                require_readable_type(response, request.url)
                bytes_total = content_length(response) if decoder is None else None
                _require_bounded(bytes_total or 0, request)
            except TransientUpstreamError:
                _count("interrupted")
                raise
            except PermanentUpstreamError:
                _count("refused")
                raise
            validators = validators_in(response)
            if decoder is None:
                first = resumable(response.headers, last_modified=validators.last_modified, bytes_total=bytes_total)
                chunks = self._plain(request, response, first)
            else:
                chunks = self._decoded(request, response, decoder)
            async with aclosing(chunks):
                yield Download(url=request.url, chunks=chunks, validators=validators, bytes_total=bytes_total)
        finally:
            await response.aclose()

    async def _plain(
        self, request: _Request, response: httpx.Response | None, first: Resumable | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield a body without content-encoding. If it breaks off, request the rest from the next byte."""
        done_bytes = 0
        due_bytes = first.bytes_total if first else None
        resumptions = fruitless = 0
        while True:
            try:
                if response is None:
                    assert first is not None, "a download that cannot be resumed has raised its error"
                    with request.waiting():
                        response, due_bytes = await self._resume(request, first, done_bytes, fruitless)
                async with aclosing(self._part(request, response, done_bytes, due_bytes)) as part:
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
                    # An outage costs no attempt, but this response had started. An upstream that goes down within
                    # every response must use up its attempts.
                    raise TransientUpstreamError(
                        f"{request.url} broke off after {done_bytes} bytes, and then {error}"
                    ) from error
                if given_up or first is None:
                    raise
                request.require_in_time()
                resumptions += 1
                fruitless += 1
            finally:
                if response is not None:
                    await response.aclose()
                    response = None

    async def _part(
        self, request: _Request, response: httpx.Response, done_bytes: int, due_bytes: int | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the part of one response after the first ``done_bytes``, and check it against ``due_bytes``."""
        async with aclosing(self._receive(request, response)) as received:
            async for chunk in received:
                done_bytes += len(chunk)
                _require_bounded(done_bytes, request)
                if due_bytes is not None and done_bytes > due_bytes:
                    raise CannotResume(f"{request.url} sent more than the {due_bytes} bytes that it announced")
                yield chunk
        if due_bytes is not None and done_bytes < due_bytes:
            raise TransientUpstreamError(f"{request.url} ended after {done_bytes} of {due_bytes} bytes")

    async def _resume(
        self, request: _Request, first: Resumable, done_bytes: int, fruitless: int
    ) -> tuple[httpx.Response, int]:
        """Request the rest of a file after ``done_bytes``. Return the response, and the bytes due after it."""
        await self._circuit.retrier.sleep(jittered_s(fruitless - 1))
        now_s = self._circuit.retrier.now_s()
        async with self._circuit.acquire(since_s=now_s, outage_limit_s=RESUME_OUTAGE_LIMIT_S):
            response = await self._open(request.url, range_headers(first, done_bytes))
            try:
                require_not_busy(response, request.url)
                part = part_bytes(first, done_bytes, status=response.status_code, headers=response.headers)
            except TransientUpstreamError as error:
                await response.aclose()
                _count("interrupted")
                if isinstance(error, CannotResume):
                    raise CannotResume(f"{request.url} broke off after {done_bytes} bytes: {error}") from error
                raise
        metrics.upstream_resumptions.inc()
        return response, done_bytes + part

    async def _decoded(
        self, request: _Request, response: httpx.Response, decoder: Decoder
    ) -> AsyncGenerator[bytes, None]:
        """Yield a decoded body."""
        coded_bytes = 0
        done_bytes = 0
        try:
            async with aclosing(self._receive(request, response)) as received:
                async for coded in received:
                    coded_bytes += len(coded)
                    _require_bounded(coded_bytes, request)
                    for chunk in decoder.decode(coded):
                        done_bytes += len(chunk)
                        _require_bounded(done_bytes, request)
                        self._check_ratio(request, coded_bytes, done_bytes)
                        if chunk:
                            yield chunk
                        await asyncio.sleep(0)  # a decoder works in short steps, for the sake of the event loop
            decoder.finish()
        except BadCoding as error:
            raise TransientUpstreamError(f"{request.url} answered with a body that does not decode: {error}") from error

    def _check_ratio(self, request: _Request, coded_bytes: int, done_bytes: int) -> None:
        ratio_max = self._settings.upstream_decompression_ratio_max
        if done_bytes > max(RATIO_FREE_BYTES, coded_bytes * ratio_max):
            raise PermanentUpstreamError(
                f"{request.url} answered with a body that inflates more than {ratio_max:g} times, the most that "
                "TRIPFOLD_UPSTREAM_DECOMPRESSION_RATIO_MAX allows"
            )

    async def _receive(self, request: _Request, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """Yield the raw body. Raises TransientUpstreamError if it breaks off, stalls or is too slow."""
        settings = self._settings
        speed = _SpeedLimit(
            request.url, bytes_per_s_min=settings.upstream_bytes_per_s_min, window_s=settings.upstream_speed_window_s
        )
        outcome: UpstreamOutcome = "aborted"
        raw = response.aiter_raw()
        try:
            while True:
                waited_before_s = request.waited_s
                with translate_errors(request.url), request.waiting():
                    # The client's own timeout restarts with each byte, even with bytes of chunk framing.
                    async with asyncio.timeout(settings.upstream_read_timeout_s):
                        chunk = await anext(raw, None)
                if chunk is None:
                    outcome = "complete"
                    return
                metrics.upstream_bytes.inc(len(chunk))
                speed.check(len(chunk), request.waited_s - waited_before_s)
                request.require_in_time()
                yield chunk
        except TransientUpstreamError:
            outcome = "interrupted"
            raise
        finally:
            _count(outcome)

    async def _open(self, url: str, headers: dict[str, str]) -> httpx.Response:
        """Send a GET and follow its redirects. Return when the head of the response has arrived."""
        at = httpx.URL(url)
        for _ in range(REDIRECTS_MAX + 1):
            response = await self._send(url, at, headers)
            if response.status_code not in REDIRECT_STATUSES or "location" not in response.extensions:
                self._circuit.reached()
                return response
            await response.aclose()
            _count("redirected")
            at = self._redirects.follow(url, at, response.extensions["location"])
        raise PermanentUpstreamError(f"{url} was redirected more than {REDIRECTS_MAX} times")

    async def _send(self, url: str, at: httpx.URL, headers: dict[str, str]) -> httpx.Response:
        await self._rate_limit.wait()
        try:
            with translate_errors(url):
                async with asyncio.timeout(CONNECT_TIMEOUT_S + self._settings.upstream_read_timeout_s):
                    request = build_get(self._client, at, headers)
                    auth = self._credentials if self._redirects.may_see_credentials(at) else None
                    return await self._client.send(request, stream=True, auth=auth)
        except (TransientUpstreamError, UpstreamDown) as error:
            _count("interrupted" if isinstance(error, TransientUpstreamError) else "unavailable")
            raise


def _count(outcome: UpstreamOutcome) -> None:
    metrics.upstream_requests.labels(outcome).inc()


def _credentials(settings: Settings) -> httpx.Auth | None:
    if not settings.upstream_username:
        return None
    password = secret_value(
        settings.upstream_password, settings.upstream_password_file, "TRIPFOLD_UPSTREAM_PASSWORD_FILE"
    )
    return httpx.BasicAuth(settings.upstream_username, password)


def _require_bounded(size_bytes: int, request: _Request) -> None:
    if size_bytes > request.bytes_max:
        raise PermanentUpstreamError(
            f"{request.url} has more than {request.bytes_max} bytes, the most that {request.bound}"
        )
