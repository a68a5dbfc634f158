"""The client for asyncio. The blocking client runs the same coroutines."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Generic, Literal, Self, TypedDict, TypeVar, Unpack, overload

import httpx
import msgspec

from tripfold_client.connection import Connection, segment
from tripfold_client.errors import Conflict, NotFound, ProcessingFailed
from tripfold_client.jobs import Jobs, State
from tripfold_client.models import (
    Backfill,
    Preview,
    Quarantine,
    QuarantineRetry,
    Report,
    Request,
    Schedule,
    UnreadableObject,
    warn_unreadable,
)
from tripfold_client.progress import Show, showing
from tripfold_client.statistics import CountryDay, Statistics
from tripfold_client.transport import AsyncTransport, Transport

Date = dt.date | str
"""A date, or its text such as ``2024-05-01``."""

Format = Literal["csv", "json", "ndjson", "parquet"]

URL = "http://127.0.0.1:8080"
TIMEOUT_S = 75.0
RETRIES = 4
PARALLEL_DATES = 4
DIRECT = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}
"""A proxy of the environment is not used for this machine."""

_MEDIA_TYPES: dict[Format, str] = {
    "csv": "text/csv",
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}


_Changed = TypeVar("_Changed")


class BackfillOptions(TypedDict, total=False):
    """The options of a backfill.

    ``only`` selects dates that lack the data of a city (``missing``, the default), those among them that were processed
    (``failed``), dates that were processed (``stored``), or ``all``. ``max_parallel`` limits the dates that are
    processed at once. ``source="bucket"`` reads stored files again: of all countries or one ``country``, of all cities
    or one ``city``, and with ``again`` also files that the present rules should read alike.
    """

    only: Literal["missing", "failed", "stored", "all"]
    newest_first: bool
    max_parallel: int
    source: Literal["upstream", "bucket"]
    country: str | None
    city: str | None
    again: bool


class _Schedules(msgspec.Struct, frozen=True):
    schedules: tuple[Schedule, ...]
    unreadable: tuple[UnreadableObject, ...] = ()


class AsyncJob(Generic[State]):
    """A request of a date, or a backfill of many. ``state`` is its last known state."""

    def __init__(self, jobs: Jobs, state: State) -> None:
        self._jobs = jobs
        self.state = state

    @property
    def id(self) -> str:
        """The id of the request or backfill."""
        return self.state.id

    @property
    def status(self) -> str:
        """The last known status, such as ``running`` or ``completed``."""
        return self.state.status

    def __repr__(self) -> str:
        return f"<Job {self.id}: {self.state.progress}>"

    async def refresh(self) -> Self:
        """Read the present state."""
        self.state = await self._jobs.refresh(self.state)
        return self

    async def states(self, *, timeout: float | None = None) -> AsyncGenerator[State]:  # noqa: ASYNC109  # of the whole
        """Yield each later state until the last one. Raises WaitTimeout after ``timeout`` seconds."""
        async with aclosing(self._jobs.follow(self.state, timeout_s=timeout)) as states:
            async for self.state in states:
                yield self.state

    async def wait(
        self,
        *,
        timeout: float | None = None,  # noqa: ASYNC109  # of the whole job, while single calls have their own
        progress: bool | Show = False,
        check: bool = True,
    ) -> Self:
        """Wait until the job has ended: completed means that its numbers are served.

        ``progress`` shows the progress on standard error, or calls a function with each state. Raises ProcessingFailed
        unless the job is completed; with ``check=False`` it returns. Raises WaitTimeout after ``timeout`` seconds.
        """
        with showing(progress) as show:
            show(self.state)
            async for state in self.states(timeout=timeout):
                show(state)
        if check and (failure := self.state.failure):
            raise ProcessingFailed(f"{failure}. Its id is {self.id}.", self.state)
        return self

    async def cancel(self) -> Self:
        """Cancel it: cities in progress finish, and the others are skipped. Raises Conflict if it has ended."""
        self.state = await self._jobs.act("DELETE", self.state)
        return self

    async def retry(self) -> Self:
        """Retry what has failed. Raises Conflict if nothing has failed, or a request has not ended."""
        self.state = await self._jobs.act("POST", self.state, "/retry")
        return self


class AsyncTripfold:
    """Tripfold at a URL, for asyncio. An async context manager.

    Without ``url`` and ``api_key``, the variables TRIPFOLD_API_URL and TRIPFOLD_API_KEY count. ``timeout`` limits each
    wait for bytes of a response, in seconds. A call that fails for a passing reason is repeated ``retries`` times.
    ``http`` is an httpx client of your own, for example with certificates.

    Every method raises ConnectionFailed, UnexpectedResponse, or an ApiError with the problem details.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        http: httpx.AsyncClient | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._connection = Connection(
            transport or AsyncTransport(http or httpx.AsyncClient(mounts=DIRECT)),
            url or os.environ.get("TRIPFOLD_API_URL") or URL,
            api_key or os.environ.get("TRIPFOLD_API_KEY"),
            timeout_s=timeout,
            retries=retries,
        )
        self._jobs = Jobs(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.transport.close()

    @overload
    async def process(self, date: Date, *, idempotency_key: str | None = None) -> AsyncJob[Request]: ...
    @overload
    async def process(self, date: Date, last: Date, *, idempotency_key: str | None = None) -> AsyncJob[Backfill]: ...
    async def process(
        self, date: Date, last: Date | None = None, *, idempotency_key: str | None = None
    ) -> AsyncJob[Request] | AsyncJob[Backfill]:
        """Process a date, or all dates up to ``last``. Unchanged files are not fetched again.

        A range is a backfill of all its dates. The same ``idempotency_key`` gives the same job for 24 hours; by default
        each call has its own.
        """
        if last is not None:
            return await self.backfill(date, last, idempotency_key, only="all", max_parallel=PARALLEL_DATES)
        state = await self._jobs.make("/process-request", {"date": _text(date)}, Request, idempotency_key)
        return AsyncJob(self._jobs, state)

    async def backfill(
        self, first: Date, last: Date, idempotency_key: str | None = None, **options: Unpack[BackfillOptions]
    ) -> AsyncJob[Backfill]:
        """Process many dates, at most 4,000, a few at a time. It goes on after a crash of any process."""
        query = _backfill_query(first, last, options)
        return AsyncJob(self._jobs, await self._jobs.make("/backfills", query, Backfill, idempotency_key))

    async def preview_backfill(self, first: Date, last: Date, **options: Unpack[BackfillOptions]) -> Preview:
        """Return the dates that a backfill would process. Changes nothing."""
        return await self._jobs.preview(_backfill_query(first, last, options))

    async def job(self, job_id: str) -> AsyncJob[Request] | AsyncJob[Backfill]:
        """Return the request or backfill with an id. Raises NotFound."""
        state = await self._jobs.find(job_id)
        if isinstance(state, Backfill):
            return AsyncJob(self._jobs, state)
        return AsyncJob(self._jobs, state)

    def requests(self, limit: int | None = None, *, on_unreadable: Report = warn_unreadable) -> AsyncGenerator[Request]:
        """Yield requests, newest first: all, or at most ``limit``. They lack their failures: see ``job``.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        return self._jobs.latest(Request, limit, on_unreadable)

    def backfills(
        self, limit: int | None = None, *, on_unreadable: Report = warn_unreadable
    ) -> AsyncGenerator[Backfill]:
        """Yield backfills, newest first: all, or at most ``limit``. They lack their failed dates: see ``job``.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        return self._jobs.latest(Backfill, limit, on_unreadable)

    async def cancel(self, job_id: str) -> Request | Backfill:
        """Cancel a request or backfill. Raises NotFound, and Conflict if it has ended."""
        return await self._jobs.act("DELETE", await self._jobs.find(job_id))

    async def retry(self, job_id: str) -> Request | Backfill:
        """Retry what has failed of a request or backfill. Raises NotFound, and Conflict if there is nothing."""
        return await self._jobs.act("POST", await self._jobs.find(job_id), "/retry")

    async def pause(self, backfill_id: str) -> Backfill:
        """Pause a backfill: its dates under way end, and no further one is requested. Raises NotFound and Conflict."""
        return await self._change("backfills", backfill_id, "pause", Backfill)

    async def resume(self, backfill_id: str) -> Backfill:
        """Continue a paused backfill. Raises NotFound and Conflict."""
        return await self._change("backfills", backfill_id, "resume", Backfill)

    async def stats(self, first: Date, last: Date, country: str | None = None) -> Statistics:
        """Return the statistics of a range, both dates included: of all countries, or one by its slug or name."""
        body = await self.export(first, last, country, format="ndjson")
        return Statistics([self._connection.decode(line, CountryDay) for line in body.splitlines()])

    async def export(
        self,
        first: Date,
        last: Date,
        country: str | None = None,
        *,
        format: Format = "csv",  # noqa: A002  # its usual name
    ) -> bytes:
        """Return the statistics of a range as CSV, JSON or Parquet, or with a JSON object in each line."""
        query = {"from": _text(first), "to": _text(last), "detail": "full", **_given(country=country)}
        return await self._connection.call("GET", "/country-stats", query, {"Accept": _MEDIA_TYPES[format]})

    async def quarantine(
        self,
        first: Date | None = None,
        last: Date | None = None,
        *,
        country: str | None = None,
        city: str | None = None,
        detail: bool = False,
        limit: int = 1_000,
    ) -> Quarantine:
        """Return refused files, and why: of all dates or a range, of all countries and cities or one.

        ``detail`` adds up to a hundred bad records of each file. At most ``limit`` files come, and at most 1,000.
        """
        query = _quarantine_query(first, last, country, city) | {"limit": str(limit)}
        return await self._connection.get("/quarantine", Quarantine, query | ({"detail": "full"} if detail else {}))

    async def retry_quarantined(
        self,
        first: Date | None = None,
        last: Date | None = None,
        *,
        country: str | None = None,
        city: str | None = None,
    ) -> QuarantineRetry:
        """Fetch refused files again, at most 1,000: only their city-days, in the request that last fetched each.

        Raises NotFound if there is no such file.
        """
        query = _quarantine_query(first, last, country, city)
        return self._connection.decode(await self._connection.call("POST", "/quarantine/retry", query), QuarantineRetry)

    async def schedules(self, *, on_unreadable: Report = warn_unreadable) -> tuple[Schedule, ...]:
        """Return all schedules.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        found = await self._connection.get("/schedules", _Schedules)
        for unreadable in found.unreadable:
            on_unreadable(unreadable)
        return found.schedules

    async def schedule(self, name: str) -> Schedule:
        """Return a schedule. Raises NotFound."""
        return await self._connection.get(f"/schedules/{segment(name)}", Schedule)

    async def set_schedule(
        self,
        name: str,
        cron: str,
        *,
        timezone: str = "UTC",
        date: int = -1,
        recheck: int = 0,
        complete_by: str | None = None,
        max_parallel: int = 2,
    ) -> Schedule:
        """Make a schedule, or replace the options of one.

        ``cron`` has minute, hour, day, month and weekday. ``date`` is the processed date, in days from the day of the
        run. ``recheck`` is the number of days before it to check again. ``complete_by`` is a time such as ``09:00``.
        """
        numbers = {"date": str(date), "recheck": str(recheck), "max_parallel": str(max_parallel)}
        query = {"cron": cron, "timezone": timezone, **numbers, **_given(complete_by=complete_by)}
        body = await self._connection.call("PUT", f"/schedules/{segment(name)}", query)
        return self._connection.decode(body, Schedule)

    async def pause_schedule(self, name: str) -> Schedule:
        """Let no further run of a schedule begin. A run that has begun goes on. Raises NotFound."""
        return await self._change("schedules", name, "pause", Schedule)

    async def resume_schedule(self, name: str) -> Schedule:
        """Let a paused schedule run again. Runs that were due during the pause are not caught up. Raises NotFound."""
        return await self._change("schedules", name, "resume", Schedule)

    async def run_schedule(self, name: str) -> Schedule:
        """Start a run now. Raises NotFound, and Conflict while the last run has not ended."""
        try:
            return await self._change("schedules", name, "run", Schedule)
        except Conflict as error:
            if not error.response_lost:
                raise
            return await self.schedule(name)

    async def delete_schedule(self, name: str) -> None:
        """Delete a schedule. Its runs go on. Raises NotFound."""
        try:
            await self._connection.call("DELETE", f"/schedules/{segment(name)}")
        except NotFound as error:
            if not error.response_lost:
                raise

    async def _change(self, folder: str, name: str, change: str, kind: type[_Changed]) -> _Changed:
        body = await self._connection.call("POST", f"/{folder}/{segment(name)}/{change}")
        return self._connection.decode(body, kind)


def _backfill_query(first: Date, last: Date, options: BackfillOptions) -> dict[str, str]:
    given = {name: value for name, value in options.items() if value is not None and name != "newest_first"}
    order = {"order": "newest-first"} if options.get("newest_first") else {}
    texts = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}
    return {"from": _text(first), "to": _text(last), **order, **texts}


def _quarantine_query(first: Date | None, last: Date | None, country: str | None, city: str | None) -> dict[str, str]:
    dates = {"from": first, "to": last}
    given = {name: _text(date) for name, date in dates.items() if date is not None}
    return given | _given(country=country, city=city)


def _text(date: Date) -> str:
    return date if isinstance(date, str) else f"{date:%Y-%m-%d}"  # a datetime, such as pandas has, is a date too


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}
