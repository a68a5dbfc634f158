"""The blocking client. It runs the coroutines of the client for asyncio over a transport that blocks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import httpx

from tripfold_client.aio import DIRECT, RETRIES, TIMEOUT_S, AsyncJob, AsyncTripfold, Date
from tripfold_client.jobs import State
from tripfold_client.models import Backfill, Request
from tripfold_client.transport import BlockingTransport, iterate, run

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_Job = TypeVar("_Job", bound="Job[Any]")
_Stated = TypeVar("_Stated", Request, Backfill)


def _chained(
    method: Callable[Concatenate[AsyncJob[Any], _Given], Coroutine[Any, Any, object]],
) -> Callable[Concatenate[_Job, _Given], _Job]:
    """Make a method of Job from one of AsyncJob. It returns the job itself."""

    @wraps(method)
    def call(self: _Job, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Job:
        run(method(self._job, *args, **kwargs))
        return self

    return call


def _result(
    method: Callable[Concatenate[AsyncTripfold, _Given], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[Tripfold, _Given], _Result]:
    """Make a method of Tripfold from one of AsyncTripfold."""

    @wraps(method)
    def call(self: Tripfold, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return run(method(self._api, *args, **kwargs))

    return call


def _job(
    method: Callable[Concatenate[AsyncTripfold, _Given], Coroutine[Any, Any, AsyncJob[_Stated]]],
) -> Callable[Concatenate[Tripfold, _Given], Job[_Stated]]:
    """Make a method of Tripfold from one of AsyncTripfold that returns a job."""

    @wraps(method)
    def call(self: Tripfold, /, *args: _Given.args, **kwargs: _Given.kwargs) -> Job[_Stated]:
        return Job(run(method(self._api, *args, **kwargs)))

    return call


def _iterator(
    method: Callable[Concatenate[AsyncTripfold, _Given], AsyncGenerator[_Result]],
) -> Callable[Concatenate[Tripfold, _Given], Iterator[_Result]]:
    """Make a method of Tripfold from one of AsyncTripfold that yields."""

    @wraps(method)
    def call(self: Tripfold, /, *args: _Given.args, **kwargs: _Given.kwargs) -> Iterator[_Result]:
        return iterate(method(self._api, *args, **kwargs))

    return call


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

    def states(self, *, timeout: float | None = None) -> Iterator[State]:
        """Yield each later state until the last one. Raises WaitTimeout after ``timeout`` seconds."""
        return iterate(self._job.states(timeout=timeout))

    refresh = _chained(AsyncJob.refresh)
    wait = _chained(AsyncJob.wait)
    cancel = _chained(AsyncJob.cancel)
    retry = _chained(AsyncJob.retry)


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

    def job(self, job_id: str) -> Job[Request] | Job[Backfill]:
        """Return the request or backfill with an id. Raises NotFound."""
        found: AsyncJob[Any] = run(self._api.job(job_id))
        return Job(found)

    backfill = _job(AsyncTripfold.backfill)
    requests = _iterator(AsyncTripfold.requests)
    backfills = _iterator(AsyncTripfold.backfills)
    close = _result(AsyncTripfold.close)
    preview_backfill = _result(AsyncTripfold.preview_backfill)
    cancel = _result(AsyncTripfold.cancel)
    retry = _result(AsyncTripfold.retry)
    pause = _result(AsyncTripfold.pause)
    resume = _result(AsyncTripfold.resume)
    stats = _result(AsyncTripfold.stats)
    export = _result(AsyncTripfold.export)
    quarantine = _result(AsyncTripfold.quarantine)
    retry_quarantined = _result(AsyncTripfold.retry_quarantined)
    schedules = _result(AsyncTripfold.schedules)
    schedule = _result(AsyncTripfold.schedule)
    set_schedule = _result(AsyncTripfold.set_schedule)
    pause_schedule = _result(AsyncTripfold.pause_schedule)
    resume_schedule = _result(AsyncTripfold.resume_schedule)
    run_schedule = _result(AsyncTripfold.run_schedule)
    delete_schedule = _result(AsyncTripfold.delete_schedule)
