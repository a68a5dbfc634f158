"""The REST API over HTTP, as its clients see it: nothing here is shared with the service."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx
import msgspec

from shared.domain.errors import OperatorError
from tripfold.client.server_sent import Event, EventStream

TRIES_MAX = 4
TRY_AGAIN_S = 1.0
RETRY_AFTER_MAX_S = 30.0
TIMEOUT_S = 75.0  # past the 60 s that an answer may be held for
QUIET_MAX_S = 45.0  # a stream that lives sends something every 15 s

_ENDS = frozenset({"completed", "completed with failures", "failed", "cancelled"})


class ApiUnusable(OperatorError):
    """The API cannot be reached, or refuses. The message says which, where, and what to do."""


class NotFound(ApiUnusable):
    """The API has nothing of that id."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """How far a request has come."""

    cities_total: int
    cities_done: int
    cities_failed: int
    cities_skipped: int
    cities_unchanged: int
    bytes_done: int
    trips_done: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A city that failed, and why."""

    city_id: str
    city_name: str
    reason: str


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A request, and how far it has come. A list of them names no failures."""

    id: str
    date: dt.date
    status: str
    version: int
    requested_at: dt.datetime
    counts: Counts
    failed_reason: str | None = None
    failures: tuple[Failure, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.status in _ENDS


class _Requests(msgspec.Struct, frozen=True):
    requests: tuple[RequestState, ...]


class ApiClient:
    """A client of one API; an async context manager."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        headers = {"X-API-Key": key} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def ask(self, first: dt.date, last: dt.date) -> tuple[str, tuple[RequestState, ...]]:
        """Ask for the dates from ``first`` to ``last``; return the id of what was asked for, and its requests.

        An answer that is lost is asked for again, under a key that makes it one request.
        """
        query = {"date": str(first)} if first == last else {"from": str(first), "to": str(last)}
        answer = await self._answer("POST", "/process-request", query, {"Idempotency-Key": uuid.uuid4().hex})
        if first != last:
            return msgspec.json.decode(answer.content, type=_Id).id, _requests_of(answer)
        state = msgspec.json.decode(answer.content, type=RequestState)
        return state.id, (state,)

    async def requests_of(self, wanted: str) -> tuple[RequestState, ...]:
        """Return the request of an id, or the requests of the range of that id. Raises NotFound."""
        try:
            return (await self.request(wanted),)
        except NotFound:
            return _requests_of(await self._range("GET", wanted))

    async def request(self, request_id: str) -> RequestState:
        """Return a request. Raises NotFound."""
        answer = await self._answer("GET", f"/process-requests/{_segment(request_id)}")
        return msgspec.json.decode(answer.content, type=RequestState)

    async def latest(self, limit: int) -> tuple[RequestState, ...]:
        """Return the latest requests, the latest first."""
        return _requests_of(await self._answer("GET", "/process-requests", {"limit": str(limit)}))

    async def cancel(self, wanted: str) -> None:
        """Cancel the request, or the range, of an id. Raises NotFound."""
        try:
            await self._answer("DELETE", f"/process-requests/{_segment(wanted)}")
        except NotFound:
            await self._range("DELETE", wanted)

    async def follow(self, state: RequestState) -> AsyncIterator[RequestState]:
        """Yield each state of a request after ``state``, until it has ended.

        A stream that breaks is taken up again after its last event.
        """
        failures = 0
        while not state.ended:
            try:
                async for event in self._events(state):
                    failures = 0
                    if event.name == "progress":
                        state = msgspec.json.decode(event.data, type=RequestState)
                        yield state
            except httpx.TransportError as error:
                failures += 1
                if failures >= TRIES_MAX:
                    raise self._unreachable(error) from error
            if not state.ended:
                await asyncio.sleep(TRY_AGAIN_S)

    async def statistics(self, first: dt.date, last: dt.date, country: str | None, media_type: str) -> bytes:
        """Return the statistics of a range, with all details, in a media type."""
        query = {"from": str(first), "to": str(last), "detail": "full", **({"country": country} if country else {})}
        return (await self._answer("GET", "/country-stats", query, {"Accept": media_type})).content

    async def _range(self, method: str, wanted: str) -> httpx.Response:
        try:
            return await self._answer(method, f"/process-ranges/{_segment(wanted)}")
        except NotFound:
            raise NotFound(
                f"{self._url} has no request and no range {wanted!r}; tripfold watch lists the latest"
            ) from None

    async def _events(self, state: RequestState) -> AsyncIterator[Event]:
        headers = {"Last-Event-ID": str(state.version), "Accept": "text/event-stream"}
        path = f"/process-requests/{state.id}/events"
        timeout = httpx.Timeout(TIMEOUT_S, read=QUIET_MAX_S)
        async with self._http.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if answer.status_code in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
                await asyncio.sleep(_retry_after_s(answer))
                return
            if answer.is_error:
                await answer.aread()
                raise self._refused(answer)
            stream = EventStream()
            async for line in answer.aiter_lines():
                event = stream.line(line)
                if event is not None:
                    yield event

    async def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        for tries in range(1, TRIES_MAX + 1):
            try:
                answer = await self._http.request(method, path, params=query, headers=headers)
            except httpx.TransportError as error:
                # Who is not there at all is more often a wrong address than a restart.
                if tries == TRIES_MAX or isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol):
                    raise self._unreachable(error) from error
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            busy = answer.status_code in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
            if not busy or tries == TRIES_MAX:
                break
            await asyncio.sleep(_retry_after_s(answer))
        if answer.is_error:
            raise self._refused(answer)
        return answer

    def _unreachable(self, error: httpx.TransportError) -> ApiUnusable:
        reason = str(error) or type(error).__name__
        return ApiUnusable(
            f"the API at {self._url} cannot be reached ({reason}): is it running? --api or TRIPFOLD_API_URL says where"
        )

    def _refused(self, answer: httpx.Response) -> ApiUnusable:
        try:
            told = msgspec.json.decode(answer.content, type=_Problem).detail
        except msgspec.MsgspecError:
            told = f"{answer.status_code} {answer.reason_phrase}: is this Tripfold's API?"
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return NotFound(told)
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            told += " --key or TRIPFOLD_API_KEY has it."
        return ApiUnusable(f"{self._url} refuses: {told}")


class _Id(msgspec.Struct, frozen=True):
    id: str


class _Problem(msgspec.Struct, frozen=True):
    detail: str


def _segment(text: str) -> str:
    return quote(text, safe="") or "-"  # an empty one would be another path


def _requests_of(answer: httpx.Response) -> tuple[RequestState, ...]:
    return msgspec.json.decode(answer.content, type=_Requests).requests


def _retry_after_s(answer: httpx.Response) -> float:
    told = answer.headers.get("retry-after", "")
    return min(float(told), RETRY_AFTER_MAX_S) if told.isdigit() else TRY_AGAIN_S
