"""The upstream: a port, and its adapter over HTTP. The one module that knows an HTTP client.

Faults are of three kinds. The upstream is *down* (it cannot be reached at all): waited out, up to a limit. An answer
*broke* (a cut body, a stall, 5xx, 429): tried again, a bounded number of times. It *refused* (404 and other 4xx): a
fact, at once the city's failure.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Protocol, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from shared.patience import Patience
from shared.settings import Settings

CITY_LIST_BYTES_MAX = 64 * 1024**2
WAIT_FIRST_S = 0.5
WAIT_MAX_S = 30.0
LAST_MODIFIED_AGE_MIN_S = 60.0

_HEALTH = "upstream"
_Result = TypeVar("_Result")


class UpstreamDown(RuntimeError):
    """The upstream cannot be reached at all."""


class AnswerBroke(RuntimeError):
    """The upstream answered with a fault that may pass: a cut body, a stall, 5xx, 429."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class CityFailed(RuntimeError):
    """The city-day (or the list of cities) cannot be had; the message is the reason that the user is told."""


class Validators(msgspec.Struct, frozen=True, kw_only=True):
    """What a conditional GET names: the entity tag and the date of what is stored, as the upstream gave them."""

    etag: str | None = None
    last_modified: str | None = None


class Download(msgspec.Struct, kw_only=True):
    """An answer under way. ``chunks`` is None if nothing changed (304); sizes are of the body after its coding."""

    url: str
    chunks: AsyncIterator[bytes] | None
    validators: Validators = Validators()
    bytes_total: int | None = None


class Upstream(Protocol):
    """What the ingest needs of the upstream. Raises UpstreamDown, AnswerBroke and CityFailed."""

    async def cities(self) -> bytes:
        """Return the list of cities, as it came."""

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        """Return where a city-day's file is."""

    def download(
        self, upstream_id: str, date: dt.date, known: Validators | None
    ) -> AbstractAsyncContextManager[Download]:
        """Ask for a city-day's file, unless it still is the ``known`` one."""


class HttpUpstream:
    """The Upstream over HTTP. Use it as an async context manager; one of it keeps a pool of connections."""

    def __init__(self, settings: Settings) -> None:
        self._base_url = settings.upstream_url
        self._file_bytes_max = settings.upstream_file_bytes_max
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.upstream_read_timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=settings.ingest_streams + 1),
            follow_redirects=False,
            headers={"user-agent": "tripfold", "accept": "application/json, text/html;q=0.9, */*;q=0.1"},
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def cities(self) -> bytes:
        url = f"{self._base_url}/cities"
        body = bytearray()
        with _translated(url):
            async with self._client.stream("GET", url) as response:
                _require_ok(response, url)
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > CITY_LIST_BYTES_MAX:
                        raise CityFailed(f"{url} answered with more than {CITY_LIST_BYTES_MAX} bytes")
        return bytes(body)

    def city_url(self, upstream_id: str, date: dt.date) -> str:
        return f"{self._base_url}/cities/{quote(upstream_id, safe='')}/stats?date={date.isoformat()}"

    @asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        url = self.city_url(upstream_id, date)
        headers = {}
        if known is not None and known.etag is not None:
            headers["if-none-match"] = known.etag
        elif known is not None and known.last_modified is not None:
            headers["if-modified-since"] = known.last_modified
        with _translated(url):
            async with self._client.stream("GET", url, headers=headers) as response:
                if response.status_code == 304 and headers:
                    yield Download(url=url, chunks=None)
                    return
                _require_ok(response, url)
                coded = response.headers.get("content-encoding", "identity") != "identity"
                length = response.headers.get("content-length", "")
                yield Download(
                    url=url,
                    chunks=self._chunks(response, url),
                    validators=_validators(response),
                    bytes_total=int(length) if length.isdecimal() and not coded else None,
                )

    async def _chunks(self, response: httpx.Response, url: str) -> AsyncIterator[bytes]:
        total = 0
        with _translated(url):
            async for chunk in response.aiter_bytes():
                total += len(chunk)
                if total > self._file_bytes_max:
                    raise CityFailed(
                        f"{url} has more than {self._file_bytes_max} bytes, the most that "
                        "TRIPFOLD_UPSTREAM_FILE_BYTES_MAX allows"
                    )
                yield chunk


class Persistence:
    """How long and how often an upstream with faults is tried again, before a city fails."""

    def __init__(self, patience: Patience, *, attempts_max: int, outage_limit_s: float) -> None:
        self._patience = patience
        self._attempts_max = attempts_max
        self._outage_limit_s = outage_limit_s

    async def fetch(self, attempt: Callable[[], Awaitable[_Result]]) -> _Result:
        """Run ``attempt`` until it ends without a fault of the upstream.

        An upstream that is down costs no attempt. Raises CityFailed after the attempts, or after an outage that is
        longer than the limit, with the last reason.
        """
        attempts = 0
        down_since: float | None = None
        waits = 0
        while True:
            self._patience.raise_if_stopping()
            at_least_s = 0.0
            try:
                result = await attempt()
            except UpstreamDown as error:
                down_since = down_since or time.monotonic()
                self._patience.health.failing(_HEALTH, str(error))
                if time.monotonic() - down_since >= self._outage_limit_s:
                    raise CityFailed(f"{error} (for {self._outage_limit_s:.0f} s)") from error
            except AnswerBroke as error:
                down_since = None
                self._patience.health.recovered(_HEALTH)
                attempts += 1
                at_least_s = min(error.retry_after_s, WAIT_MAX_S)
                if attempts >= self._attempts_max:
                    raise CityFailed(f"{error} ({attempts} attempts)") from error
            else:
                self._patience.health.recovered(_HEALTH)
                return result
            await self._patience.pause(max(at_least_s, min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** min(waits, 20))))
            waits += 1


class _translated:  # noqa: N801  # a context manager that reads as a phrase: with _translated(url)
    """Turns the HTTP client's errors into the three kinds of fault."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout() | httpx.PoolTimeout():
                raise UpstreamDown(f"{self._url} cannot be reached: {error or type(error).__name__}") from error
            case httpx.TimeoutException():
                raise AnswerBroke(f"{self._url} stalled: {type(error).__name__}") from error
            case httpx.DecodingError():
                raise AnswerBroke(f"{self._url} answered with a body that does not decode: {error}") from error
            case httpx.HTTPError() | httpx.InvalidURL():
                raise AnswerBroke(f"{self._url} broke off: {type(error).__name__}: {error}") from error


def _require_ok(response: httpx.Response, url: str) -> None:
    status = response.status_code
    if status == 200:
        return
    if status in {408, 425, 429} or status >= 500:
        raise AnswerBroke(
            f"{url} answered {status}", retry_after_s=_retry_after_s(response.headers.get("retry-after", ""))
        )
    if status == 404:
        raise CityFailed(f"{url} answered 404: the upstream has no file for this city and date")
    raise CityFailed(f"{url} answered {status}")


def _retry_after_s(value: str) -> float:
    """Return the seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3), 0 if it says nothing readable."""
    if value.isdecimal():
        return float(value[:9])
    try:
        at = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (at - dt.datetime.now(dt.UTC)).total_seconds())


def _validators(response: httpx.Response) -> Validators:
    """Return the validators of an answer; a Last-Modified only if it was a minute old when it was given.

    A younger one cannot tell two changes within its second apart (RFC 9110, 8.8.2.2).
    """
    last_modified = response.headers.get("last-modified")
    if last_modified is not None:
        try:
            modified = email.utils.parsedate_to_datetime(last_modified)
            given = email.utils.parsedate_to_datetime(response.headers.get("date", ""))
            if (given - modified).total_seconds() < LAST_MODIFIED_AGE_MIN_S:
                last_modified = None
        except (ValueError, TypeError):
            last_modified = None
    return Validators(etag=response.headers.get("etag"), last_modified=last_modified)
