"""The blocking client. It runs the coroutines of the client for asyncio over a transport that blocks."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Generic, Self, Unpack, overload

import httpx

from tripfold_client.aio import (
    DIRECT,
    RETRIES,
    TIMEOUT_S,
    AsyncJob,
    AsyncTripfold,
    BackfillOptions,
    Date,
    Format,
)
from tripfold_client.jobs import State
from tripfold_client.models import (
    Backfill,
    Preview,
    Quarantine,
    QuarantineRetry,
    Report,
    Request,
    Schedule,
    warn_unreadable,
)
from tripfold_client.progress import Show
from tripfold_client.statistics import Statistics
from tripfold_client.transport import BlockingTransport, iterate, run


class Job(Generic[State]):
    """A request of a date, or a backfill of many. ``state`` is its last known state."""

    def __init__(self, job: AsyncJob[State]) -> None:
        self._job = job

    @property
    def state(self) -> State:
        """The last known state."""
        return self._job.state

    @property
    def id(self) -> str:
        """The id of the request or backfill."""
        return self._job.id

    @property
    def status(self) -> str:
        """The last known status, such as ``running`` or ``completed``."""
        return self._job.status

    def __repr__(self) -> str:
        return repr(self._job)

    def refresh(self) -> Self:
        """Read the present state."""
        run(self._job.refresh())
        return self

    def states(self, *, timeout: float | None = None) -> Iterator[State]:
        """Yield each later state until the last one. Raises WaitTimeout after ``timeout`` seconds."""
        return iterate(self._job.states(timeout=timeout))

    def wait(self, *, timeout: float | None = None, progress: bool | Show = False, check: bool = True) -> Self:
        """Wait until the job has ended: completed means that its numbers are served.

        ``progress`` shows the progress on standard error, or calls a function with each state. Raises ProcessingFailed
        unless the job is completed; with ``check=False`` it returns. Raises WaitTimeout after ``timeout`` seconds.
        """
        run(self._job.wait(timeout=timeout, progress=progress, check=check))
        return self

    def cancel(self) -> Self:
        """Cancel it: cities in progress finish, and the others are skipped. Raises Conflict if it has ended."""
        run(self._job.cancel())
        return self

    def retry(self) -> Self:
        """Retry what has failed. Raises Conflict if nothing has failed, or a request has not ended."""
        run(self._job.retry())
        return self


class Tripfold:
    """Tripfold at a URL. A context manager.

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
        http: httpx.Client | None = None,
    ) -> None:
        transport = BlockingTransport(http or httpx.Client(mounts=DIRECT))
        self._api = AsyncTripfold(url, api_key, timeout=timeout, retries=retries, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        run(self._api.close())

    @overload
    def process(self, date: Date, *, idempotency_key: str | None = None) -> Job[Request]: ...
    @overload
    def process(self, date: Date, last: Date, *, idempotency_key: str | None = None) -> Job[Backfill]: ...
    def process(
        self, date: Date, last: Date | None = None, *, idempotency_key: str | None = None
    ) -> Job[Request] | Job[Backfill]:
        """Process a date, or all dates up to ``last``. Unchanged files are not fetched again.

        A range is a backfill of all its dates. The same ``idempotency_key`` gives the same job for 24 hours; by default
        each call has its own.
        """
        if last is not None:
            return Job(run(self._api.process(date, last, idempotency_key=idempotency_key)))
        return Job(run(self._api.process(date, idempotency_key=idempotency_key)))

    def backfill(
        self, first: Date, last: Date, idempotency_key: str | None = None, **options: Unpack[BackfillOptions]
    ) -> Job[Backfill]:
        """Process many dates, at most 4,000, a few at a time. It goes on after a crash of any process."""
        return Job(run(self._api.backfill(first, last, idempotency_key, **options)))

    def preview_backfill(self, first: Date, last: Date, **options: Unpack[BackfillOptions]) -> Preview:
        """Return the dates that a backfill would process. Changes nothing."""
        return run(self._api.preview_backfill(first, last, **options))

    def job(self, job_id: str) -> Job[Request] | Job[Backfill]:
        """Return the request or backfill with an id. Raises NotFound."""
        found: AsyncJob[Any] = run(self._api.job(job_id))
        return Job(found)

    def requests(self, limit: int | None = None, *, on_unreadable: Report = warn_unreadable) -> Iterator[Request]:
        """Yield requests, newest first: all, or at most ``limit``. They lack their failures: see ``job``.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        return iterate(self._api.requests(limit, on_unreadable=on_unreadable))

    def backfills(self, limit: int | None = None, *, on_unreadable: Report = warn_unreadable) -> Iterator[Backfill]:
        """Yield backfills, newest first: all, or at most ``limit``. They lack their failed dates: see ``job``.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        return iterate(self._api.backfills(limit, on_unreadable=on_unreadable))

    def cancel(self, job_id: str) -> Request | Backfill:
        """Cancel a request or backfill. Raises NotFound, and Conflict if it has ended."""
        return run(self._api.cancel(job_id))

    def retry(self, job_id: str) -> Request | Backfill:
        """Retry what has failed of a request or backfill. Raises NotFound, and Conflict if there is nothing."""
        return run(self._api.retry(job_id))

    def pause(self, backfill_id: str) -> Backfill:
        """Pause a backfill: its dates under way end, and no further one is requested. Raises NotFound and Conflict."""
        return run(self._api.pause(backfill_id))

    def resume(self, backfill_id: str) -> Backfill:
        """Continue a paused backfill. Raises NotFound and Conflict."""
        return run(self._api.resume(backfill_id))

    def stats(self, first: Date, last: Date, country: str | None = None) -> Statistics:
        """Return the statistics of a range, both dates included: of all countries, or one by its slug or name."""
        return run(self._api.stats(first, last, country))

    def export(
        self,
        first: Date,
        last: Date,
        country: str | None = None,
        *,
        format: Format = "csv",  # noqa: A002  # its usual name
    ) -> bytes:
        """Return the statistics of a range as CSV, JSON or Parquet, or with a JSON object in each line."""
        return run(self._api.export(first, last, country, format=format))

    def quarantine(
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
        return run(self._api.quarantine(first, last, country=country, city=city, detail=detail, limit=limit))

    def retry_quarantined(
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
        return run(self._api.retry_quarantined(first, last, country=country, city=city))

    def schedules(self, *, on_unreadable: Report = warn_unreadable) -> tuple[Schedule, ...]:
        """Return all schedules.

        Those that cannot be read are left out: ``on_unreadable`` gets each, and warns by default.
        """
        return run(self._api.schedules(on_unreadable=on_unreadable))

    def schedule(self, name: str) -> Schedule:
        """Return a schedule. Raises NotFound."""
        return run(self._api.schedule(name))

    def set_schedule(
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
        return run(
            self._api.set_schedule(
                name,
                cron,
                timezone=timezone,
                date=date,
                recheck=recheck,
                complete_by=complete_by,
                max_parallel=max_parallel,
            )
        )

    def pause_schedule(self, name: str) -> Schedule:
        """Let no further run of a schedule begin. A run that has begun goes on. Raises NotFound."""
        return run(self._api.pause_schedule(name))

    def resume_schedule(self, name: str) -> Schedule:
        """Let a paused schedule run again. Runs that were due during the pause are not caught up. Raises NotFound."""
        return run(self._api.resume_schedule(name))

    def run_schedule(self, name: str) -> Schedule:
        """Start a run now. Raises NotFound, and Conflict while the last run has not ended."""
        return run(self._api.run_schedule(name))

    def delete_schedule(self, name: str) -> None:
        """Delete a schedule. Its runs go on. Raises NotFound."""
        run(self._api.delete_schedule(name))
