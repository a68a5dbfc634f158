"""Calls the API at a URL: retries, decodes responses, and raises the errors of the client.

A call is retried after a broken connection, a timeout, and the statuses 429, 502, 503 and 504. A call that makes
something has an idempotency key, so a retry makes it once.
"""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from httpx_sse import ServerSentEvent

from tripfold_client.errors import ApiError, ConnectionFailed, InvalidUrl, Problem, UnexpectedResponse, api_error
from tripfold_client.transport import EVENT_STREAM, Transport

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
BACKOFF_S = 0.5
BACKOFF_MAX_S = 10.0
RETRY_AFTER_MAX_S = 60.0
CONNECT_TIMEOUT_S = 10.0
QUIET_MAX_S = 45.0
"""The API sends a comment on an idle stream every 15 s."""

JSON = "application/json"

_T = TypeVar("_T")


class Connection:
    """Calls the API at a URL with an API key.

    ``retries`` is the number of times that a call is repeated. ``timeout_s`` limits each wait for bytes of a response.
    """

    def __init__(
        self, transport: Transport, url: str, api_key: str | None, *, timeout_s: float = 75.0, retries: int = 4
    ) -> None:
        self.url = checked_url(url)
        self.transport = transport
        self._retries = retries
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))
        version = importlib.metadata.version("tripfold-client")
        self._headers = {"User-Agent": f"tripfold-client/{version}", "Accept-Encoding": "gzip"}
        if api_key:
            self._headers["X-API-Key"] = api_key
        self._reached = False

    async def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        patience_s: float | None = None,
    ) -> bytes:
        """Return the body of a response. ``patience_s`` retries for that long instead of a number of times.

        Raises ConnectionFailed, UnexpectedResponse and ApiError.
        """
        request = self._request(method, path, query, {"Accept": JSON, **(headers or {})})
        began_s = time.monotonic()
        attempts = 0
        response_lost = False
        while True:
            attempts += 1
            exhausted = attempts > self._retries if patience_s is None else time.monotonic() - began_s > patience_s
            try:
                response = await self.transport.send(request)
            except httpx.TransportError as error:
                if exhausted or not self._worth_a_retry(error):
                    raise self._failed(error) from error
                response_lost = response_lost or not isinstance(error, httpx.ConnectError)
                await self.transport.sleep(_backoff_s(attempts))
                continue
            self._reached = True
            if response.is_success:
                return response.content
            if exhausted or response.status_code not in RETRIED_STATUSES:
                refused = self._refused(response)
                refused.response_lost = response_lost
                raise refused
            response_lost = response_lost or response.status_code != httpx.codes.TOO_MANY_REQUESTS
            await self.transport.sleep(_retry_after_s(response) or _backoff_s(attempts))

    async def get(self, path: str, kind: type[_T], query: Mapping[str, str] | None = None, **options: Any) -> _T:
        """Return the decoded response to a GET."""
        return self.decode(await self.call("GET", path, query, **options), kind)

    def events(self, path: str, last_event_id: str) -> AsyncGenerator[ServerSentEvent]:
        """Yield the events of a stream after an event. Raises NoEventStream and httpx.TransportError."""
        timeout = httpx.Timeout(QUIET_MAX_S, connect=CONNECT_TIMEOUT_S)
        request = self._request("GET", path, {}, {"Accept": EVENT_STREAM, "Last-Event-ID": last_event_id}, timeout)
        return self.transport.events(request)

    def decode(self, body: bytes | str, kind: type[_T]) -> _T:
        """Decode JSON. Raises UnexpectedResponse."""
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise self._unexpected(f"the response is not in its format ({error})") from error

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        headers: Mapping[str, str],
        timeout: httpx.Timeout | None = None,
    ) -> httpx.Request:
        extensions = {"timeout": (timeout or self._timeout).as_dict()}
        url = self.url + path
        return httpx.Request(
            method, url, params=query or None, headers={**self._headers, **headers}, extensions=extensions
        )

    def _worth_a_retry(self, error: httpx.TransportError) -> bool:
        """Return whether a failed connection may be a restart. At first, it is more often a wrong URL."""
        return self._reached or not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)

    def _failed(self, error: httpx.TransportError) -> ConnectionFailed:
        silent = isinstance(error, httpx.TimeoutException)
        reason = str(error) or ("it did not respond in time" if silent else "the connection broke")
        return ConnectionFailed(
            f"the API at {self.url} cannot be reached: {reason}. Check the URL, and that the API runs."
        )

    def _refused(self, response: httpx.Response) -> ApiError:
        try:
            return api_error(msgspec.json.decode(response.content, type=Problem))
        except msgspec.MsgspecError as error:
            target = response.headers.get("location")
            what = f"status {response.status_code}" + (f", which leads to {target}" if target else "")
            raise self._unexpected(what) from error

    def _unexpected(self, what: str) -> UnexpectedResponse:
        return UnexpectedResponse(f"{self.url} is not the API of Tripfold: {what}. Check the URL.")


def checked_url(text: str) -> str:
    """Return a URL without a slash at its end. Raises InvalidUrl."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise InvalidUrl(f"the URL is {text!r}: {error}. Use one such as http://127.0.0.1:8080.") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise InvalidUrl(f"the URL is {text!r}; it must begin with http:// or https://, and name a host.")
    return text.rstrip("/")


def segment(text: str) -> str:
    """Return a text as one segment of a path."""
    return quote(text, safe="") or "-"  # an empty segment would be another path


def _backoff_s(attempts: int) -> float:
    longest_s = min(BACKOFF_S * 2 ** min(attempts - 1, 10), BACKOFF_MAX_S)
    return random.uniform(longest_s / 2, longest_s)  # noqa: S311  # spreads clients, guards no secret


def _retry_after_s(response: httpx.Response) -> float:
    header = response.headers.get("retry-after", "")
    return min(float(header), RETRY_AFTER_MAX_S) if header.isdecimal() else 0.0
