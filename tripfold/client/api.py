"""A client of the REST API. It shares no code with the service."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from httpx_sse import EventSource, ServerSentEvent

from shared.domain.errors import OperatorError

TRIES_MAX = 4
TRY_AGAIN_S = 1.0
RETRY_AFTER_MAX_S = 30.0
TIMEOUT_S = 75.0  # the API holds a response for up to 60 s
QUIET_MAX_S = 45.0  # the API sends a comment on an idle stream every 15 s

ENDS = frozenset({"completed", "completed with failures", "failed", "cancelled"})


class ApiUnusable(OperatorError):
    """The API cannot be reached, or refuses the request."""


class NotFound(ApiUnusable):
    """The API has nothing with this id or name."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a request."""

    cities_total: int
    cities_done: int
    cities_failed: int
    cities_skipped: int
    cities_unchanged: int
    bytes_done: int
    trips_done: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A city that failed, with the reason."""

    city_id: str
    city_name: str
    reason: str


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A request and its progress. A listing leaves out the failures."""

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
        """Whether the request has reached its last status."""
        return self.status in ENDS


class DateCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The dates of a backfill by their state."""

    dates_total: int
    dates_completed: int
    dates_failed: int
    dates_skipped: int
    dates_cancelled: int
    dates_under_way: int

    @property
    def dates_done(self) -> int:
        """The dates that have ended."""
        return self.dates_completed + self.dates_failed + self.dates_skipped + self.dates_cancelled


class BackfillDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date of a backfill, and the id of its request."""

    date: dt.date
    request_id: str


class BackfillState(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A backfill and its progress. A listing leaves out the dates under way and the failed dates."""

    id: str
    first: dt.date
    last: dt.date
    only: str
    order: str
    max_parallel: int
    source: str
    country: str | None
    city: str | None
    schedule: str | None
    status: str
    version: int
    created_at: dt.datetime
    counts: DateCounts
    dates_per_hour: float | None
    estimated_end: dt.datetime | None
    under_way: tuple[BackfillDate, ...] = ()
    failed: tuple[BackfillDate, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the backfill has reached its last status, and no date of it is processed any more."""
        return self.status in ENDS and not self.counts.dates_under_way


class BackfillPreview(msgspec.Struct, frozen=True, kw_only=True):
    """The dates that a backfill would process: their number, and the first of them."""

    dates_total: int
    dates_selected: int
    dates: tuple[dt.date, ...]


class RunState(msgspec.Struct, frozen=True, kw_only=True, rename={"first": "from", "last": "to"}):
    """A run of a schedule."""

    due: dt.datetime
    first: dt.date
    last: dt.date
    backfill_id: str
    status: str | None


class LateDate(msgspec.Struct, frozen=True, kw_only=True):
    """A date that is not complete after its deadline."""

    date: dt.date
    deadline: dt.datetime


class ScheduleState(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule, its next and last run, and its late dates."""

    name: str
    cron: str
    timezone: str
    date: int
    recheck: int
    max_parallel: int
    complete_by: str | None
    next_run: dt.datetime | None
    last_run: RunState | None
    late: tuple[LateDate, ...]


class _Requests(msgspec.Struct, frozen=True):
    requests: tuple[RequestState, ...]


class _Schedules(msgspec.Struct, frozen=True):
    schedules: tuple[ScheduleState, ...]


class _Backfills(msgspec.Struct, frozen=True):
    backfills: tuple[BackfillState, ...]


_State = TypeVar("_State", RequestState, BackfillState)


class ApiClient:
    """Calls the API at a URL. An async context manager."""

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

    async def process(self, date: dt.date) -> RequestState:
        """Request that a date is processed.

        An idempotency key lets the client retry a lost response without a second request.
        """
        response = await self._call("POST", "/process-request", {"date": str(date)}, _idempotency_key())
        return msgspec.json.decode(response.content, type=RequestState)

    async def find(self, wanted: str) -> RequestState | BackfillState:
        """Return the request or the backfill with this id. Raises NotFound."""
        try:
            return await self.request(wanted)
        except NotFound:
            pass
        try:
            return await self.backfill(wanted)
        except NotFound:
            raise NotFound(
                f"{self._url} has no request or backfill {wanted!r}. List the latest: 'tripfold watch', "
                "'tripfold backfills list'."
            ) from None

    async def request(self, request_id: str) -> RequestState:
        """Return a request. Raises NotFound."""
        response = await self._call("GET", f"/process-requests/{_segment(request_id)}")
        return msgspec.json.decode(response.content, type=RequestState)

    async def latest(self, limit: int) -> tuple[RequestState, ...]:
        """Return the latest requests, newest first."""
        response = await self._call("GET", "/process-requests", {"limit": str(limit)})
        return msgspec.json.decode(response.content, type=_Requests).requests

    async def cancel(self, wanted: str) -> None:
        """Cancel the request or the backfill with this id. Raises NotFound."""
        if isinstance(await self.find(wanted), BackfillState):
            await self.cancel_backfill(wanted)
        else:
            await self._call("DELETE", f"/process-requests/{_segment(wanted)}")

    async def create_backfill(self, query: Mapping[str, str]) -> BackfillState:
        """Make a backfill with the parameters of the API."""
        response = await self._call("POST", "/backfills", query, _idempotency_key())
        return msgspec.json.decode(response.content, type=BackfillState)

    async def preview_backfill(self, query: Mapping[str, str]) -> BackfillPreview:
        """Return the dates that a backfill would process."""
        response = await self._call("POST", "/backfills", {**query, "dry_run": "true"})
        return msgspec.json.decode(response.content, type=BackfillPreview)

    async def backfill(self, backfill_id: str) -> BackfillState:
        """Return a backfill. Raises NotFound."""
        response = await self._call("GET", f"/backfills/{_segment(backfill_id)}")
        return msgspec.json.decode(response.content, type=BackfillState)

    async def latest_backfills(self, limit: int) -> tuple[BackfillState, ...]:
        """Return the latest backfills, newest first."""
        response = await self._call("GET", "/backfills", {"limit": str(limit)})
        return msgspec.json.decode(response.content, type=_Backfills).backfills

    async def change_backfill(self, backfill_id: str, change: str) -> BackfillState:
        """Pause, resume or retry a backfill. Raises NotFound."""
        response = await self._call("POST", f"/backfills/{_segment(backfill_id)}/{change}")
        return msgspec.json.decode(response.content, type=BackfillState)

    async def cancel_backfill(self, backfill_id: str) -> None:
        """Cancel a backfill. Raises NotFound."""
        await self._call("DELETE", f"/backfills/{_segment(backfill_id)}")

    async def put_schedule(self, name: str, query: Mapping[str, str]) -> ScheduleState:
        """Make or change a schedule with the parameters of the API."""
        response = await self._call("PUT", f"/schedules/{_segment(name)}", query)
        return msgspec.json.decode(response.content, type=ScheduleState)

    async def schedules(self) -> tuple[ScheduleState, ...]:
        """Return all schedules."""
        response = await self._call("GET", "/schedules")
        return msgspec.json.decode(response.content, type=_Schedules).schedules

    async def schedule(self, name: str) -> ScheduleState:
        """Return a schedule. Raises NotFound."""
        response = await self._call("GET", f"/schedules/{_segment(name)}")
        return msgspec.json.decode(response.content, type=ScheduleState)

    async def change_schedule(self, name: str, change: str) -> ScheduleState:
        """Pause, resume or run a schedule. Raises NotFound."""
        response = await self._call("POST", f"/schedules/{_segment(name)}/{change}")
        return msgspec.json.decode(response.content, type=ScheduleState)

    async def delete_schedule(self, name: str) -> None:
        """Delete a schedule. Raises NotFound."""
        await self._call("DELETE", f"/schedules/{_segment(name)}")

    async def follow(self, state: _State) -> AsyncIterator[_State]:
        """Yield each state of a request or backfill after ``state``, until it has ended.

        A broken stream resumes after its last event.
        """
        failures = 0
        while not state.ended:
            try:
                async for event in self._events(state):
                    failures = 0
                    if event.event == "progress":
                        state = msgspec.json.decode(event.data, type=type(state))
                        yield state
            except httpx.TransportError as error:
                failures += 1
                if failures >= TRIES_MAX:
                    raise self._unreachable(error) from error
            if not state.ended:
                await asyncio.sleep(TRY_AGAIN_S)

    async def statistics(self, first: dt.date, last: dt.date, country: str | None, media_type: str) -> bytes:
        """Return the body of the statistics of a range, with all details, in a media type."""
        query = {"from": str(first), "to": str(last), "detail": "full", **({"country": country} if country else {})}
        return (await self._call("GET", "/country-stats", query, {"Accept": media_type})).content

    async def _events(self, state: RequestState | BackfillState) -> AsyncIterator[ServerSentEvent]:
        headers = {"Last-Event-ID": str(state.version), "Accept": "text/event-stream"}
        folder = "backfills" if isinstance(state, BackfillState) else "process-requests"
        path = f"/{folder}/{state.id}/events"
        timeout = httpx.Timeout(TIMEOUT_S, read=QUIET_MAX_S)
        async with self._http.stream("GET", path, headers=headers, timeout=timeout) as response:
            if response.status_code in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
                await asyncio.sleep(_retry_after_s(response))
                return
            if response.is_error:
                await response.aread()
                raise self._refused(response)
            async for event in EventSource(response).aiter_sse():
                yield event

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        for tries in range(1, TRIES_MAX + 1):
            try:
                response = await self._http.request(method, path, params=query, headers=headers)
            except httpx.TransportError as error:
                # A refused connection is more often a wrong address than a restart.
                if tries == TRIES_MAX or isinstance(error, httpx.ConnectError | httpx.UnsupportedProtocol):
                    raise self._unreachable(error) from error
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            busy = response.status_code in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}
            if not busy or tries == TRIES_MAX:
                break
            await asyncio.sleep(_retry_after_s(response))
        if response.is_error:
            raise self._refused(response)
        return response

    def _unreachable(self, error: httpx.TransportError) -> ApiUnusable:
        silent = isinstance(error, httpx.TimeoutException)
        reason = str(error) or ("it did not respond in time" if silent else "the connection broke")
        return ApiUnusable(
            f"the API at {self._url} cannot be reached: {reason}. Check that it runs there, "
            "or set its address with --api or TRIPFOLD_API_URL."
        )

    def _refused(self, response: httpx.Response) -> ApiUnusable:
        try:
            problem = msgspec.json.decode(response.content, type=_Problem)
            detail = problem.detail
            if response.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
                detail += f" The log of the API has the reason under {problem.http_request_id}."
        except msgspec.MsgspecError:
            detail = f"status {response.status_code}, not in Tripfold's format. Check --api or TRIPFOLD_API_URL."
        if response.status_code == HTTPStatus.NOT_FOUND:
            return NotFound(detail)
        if response.status_code == HTTPStatus.UNAUTHORIZED:
            detail += " Set it with --key or TRIPFOLD_API_KEY."
        return ApiUnusable(f"{self._url} refused the request: {detail}")


class _Problem(msgspec.Struct, frozen=True):
    detail: str
    http_request_id: str = ""


def _idempotency_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def _segment(text: str) -> str:
    return quote(text, safe="") or "-"  # an empty segment would be another path


def _retry_after_s(response: httpx.Response) -> float:
    header = response.headers.get("retry-after", "")
    return min(float(header), RETRY_AFTER_MAX_S) if header.isdigit() else TRY_AGAIN_S
