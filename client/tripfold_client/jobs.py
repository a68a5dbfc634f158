"""Makes, reads, follows and changes jobs: requests of one date, and backfills of many."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Generic, TypeVar

import httpx
import msgspec

from tripfold_client.connection import RETRIED_STATUSES, Connection, segment
from tripfold_client.errors import Conflict, NotFound, WaitTimeout
from tripfold_client.models import Backfill, Preview, Report, Request, UnreadableObject
from tripfold_client.transport import NoEventStream

POLL_INTERVAL_S = 2.0
OUTAGE_MAX_S = 300.0
"""The longest outage of the API that following a job outlasts."""
PAGE_MAX = 500

State = TypeVar("State", bound=Request | Backfill)


class _PollInstead(Exception):
    """The server sends no stream of events."""


class _Page(msgspec.Struct, Generic[State], frozen=True, kw_only=True):
    requests: tuple[State, ...] = ()
    backfills: tuple[State, ...] = ()
    unreadable: tuple[UnreadableObject, ...] = ()
    next: str | None


class Jobs:
    """The jobs of the API at a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def make(self, path: str, query: Mapping[str, str], kind: type[State], key: str | None) -> State:
        """Make a request or a backfill under an idempotency key: the same key makes it once within 24 hours."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        return self._connection.decode(await self._connection.call("POST", path, query, headers), kind)

    async def preview(self, query: Mapping[str, str]) -> Preview:
        """Return the dates that a backfill would process."""
        body = await self._connection.call("POST", "/backfills", {**query, "dry_run": "true"})
        return self._connection.decode(body, Preview)

    async def find(self, job_id: str) -> Request | Backfill:
        """Return the request or the backfill with an id. Raises NotFound."""
        try:
            return await self._connection.get(f"/process-requests/{segment(job_id)}", Request)
        except NotFound:
            return await self._connection.get(f"/backfills/{segment(job_id)}", Backfill)

    async def latest(self, kind: type[State], limit: int | None, report: Report) -> AsyncGenerator[State]:
        """Yield jobs of a kind, newest first: all, or at most ``limit``. Report those that cannot be read."""
        left = limit
        path: str | None = f"/{_folder(kind)}?limit={min(limit or PAGE_MAX, PAGE_MAX)}"
        while path and left != 0:
            page: _Page[State] = await self._connection.get(path, _Page[kind])  # type: ignore[valid-type]  # known late
            for unreadable in page.unreadable:
                report(unreadable)
            for one in (page.requests or page.backfills)[:left]:
                yield one
                left = None if left is None else left - 1
            path = page.next

    async def refresh(self, state: State, *, patience_s: float | None = None) -> State:
        """Return the present state of a job."""
        return await self._connection.get(_path_of(state), type(state), patience_s=patience_s)

    async def follow(self, state: State, *, timeout_s: float | None = None) -> AsyncGenerator[State]:
        """Yield each later state of a job until it has ended.

        The states come as server-sent events. If these break, and with ``timeout_s``, the state is polled. A restart of
        the API is outlasted. Raises WaitTimeout.
        """
        deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        streaming = timeout_s is None
        while not state.ended:
            if streaming:
                try:
                    async with aclosing(self._pushed(state)) as pushed:
                        async for later in pushed:
                            state = later
                            yield state
                except _PollInstead:
                    streaming = False
                if state.ended:
                    return
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise WaitTimeout(f"{state.progress} after {timeout_s:g} s. It goes on; its id is {state.id}.")
            await self._connection.transport.sleep(min(POLL_INTERVAL_S, left_s))
            later = await self.refresh(state, patience_s=min(OUTAGE_MAX_S, left_s))
            changed, state = later.version != state.version, later
            if changed:
                yield state

    async def _pushed(self, state: State) -> AsyncGenerator[State]:
        """Yield the later states from a stream, until it ends or breaks. Raises _PollInstead if it does not work."""
        try:
            stream = self._connection.events(f"{_path_of(state)}/events", str(state.version))
            async with aclosing(stream) as events:
                async for event in events:
                    if event.event == "progress":
                        yield self._connection.decode(event.data, type(state))
        except NoEventStream as refused:
            status = refused.response.status_code
            if status not in RETRIED_STATUSES and status != httpx.codes.NO_CONTENT:
                raise _PollInstead from refused
        except httpx.ReadTimeout as error:  # a proxy may hold events back
            raise _PollInstead from error
        except httpx.TransportError:
            return

    async def act(self, method: str, state: State, action: str = "") -> State:
        """Change a job, and return it. Raises NotFound and Conflict.

        A conflict after a lost response may come from the effect of our own first attempt: then return the state.
        """
        try:
            body = await self._connection.call(method, _path_of(state) + action)
        except Conflict as error:
            if not error.response_lost:
                raise
            return await self.refresh(state)
        return self._connection.decode(body, type(state))


def _folder(kind: type[object]) -> str:
    return "backfills" if kind is Backfill else "process-requests"


def _path_of(state: Request | Backfill) -> str:
    return f"/{_folder(type(state))}/{segment(state.id)}"
