"""Waits for the end of a request or backfill: server-sent events, and ``Prefer: wait=N`` (RFC 7240).

Litestar encodes the events; this module decides when to send one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from http import HTTPStatus
from typing import Annotated, Generic, Literal, Protocol, TypeVar

import msgspec
from litestar.response.sse import ServerSentEventMessage

from services.api.auth import AccessDenied
from services.api.http.errors import NotFound
from services.api.http.problems import RETRY_AFTER_S
from services.api.requests.service import Requests, detail_of
from shared.domain.objects import RequestRecord
from shared.domain.requests import status_of
from shared.runtime.retry import DependencyUnavailable

POLL_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 15.0
STREAM_AGE_MAX_S = 60 * 60
STREAMS_MAX = 200
STREAMS_OF_CALLER_MAX = 50
"""The event streams of one key, or of one address without keys."""
RECONNECT_AFTER_MS = 2_000

WAIT_MAX_S = 60

_WAIT = re.compile(r'\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(;.*)?', re.IGNORECASE)


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A server-sent event: the state of a request or backfill."""

    id: Annotated[
        str,
        msgspec.Meta(description="The version of the state. A client repeats it in `Last-Event-ID`.", examples=["12"]),
    ]
    event: Literal["progress"]
    data: Annotated[
        str,
        msgspec.Meta(description="The JSON of the state, as `GET` returns it, in one line."),
    ]


class TooManyStreams(DependencyUnavailable):
    """The process has STREAMS_MAX open streams."""


class StreamPlaces:
    """Counts the open streams of a process, of requests and backfills together."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def taken(self, caller: str) -> Iterator[None]:
        """Hold a place for a stream. Raises TooManyStreams, or AccessDenied if the caller has too many streams."""
        if self._open[caller] >= STREAMS_OF_CALLER_MAX:
            raise AccessDenied(
                status_code=HTTPStatus.TOO_MANY_REQUESTS,
                detail=f"{caller} has {STREAMS_OF_CALLER_MAX} open event streams, which is the limit. Close one of "
                f"them, or try again in {RETRY_AFTER_S} s.",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        if self._open.total() >= STREAMS_MAX:
            raise TooManyStreams(f"{STREAMS_MAX} event streams are open, which is the limit of this process")
        self._open[caller] += 1
        try:
            yield
        finally:
            self._open[caller] -= 1
            self._open = +self._open  # forget callers without a stream


class Versioned(Protocol):
    """A state whose version grows with every change."""

    @property
    def version(self) -> int:
        """The number of the change that made this state."""


_State = TypeVar("_State", bound=Versioned)


class EventStream(Generic[_State]):
    """Polls a state for clients that wait for progress.

    ``read`` returns the state after an earlier one, ``ended`` says whether it is the last, and ``detail`` is what an
    event shows of it. Streams take a place of ``places`` while they are open.
    """

    def __init__(
        self,
        places: StreamPlaces,
        read: Callable[[_State], Awaitable[_State]],
        ended: Callable[[_State], bool],
        detail: Callable[[_State], object],
    ) -> None:
        self._places = places
        self._read = read
        self._ended = ended
        self._detail = detail

    async def until_ended(self, state: _State, limit_s: float) -> _State:
        """Return the state at the end, or that after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while not self._ended(state) and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.sleep(min(POLL_INTERVAL_S, left_s))
            try:
                state = await self._read(state)
            except DependencyUnavailable:
                continue  # the request is accepted, so an outage of S3 must not turn the response into an error
        return state

    async def events(
        self, state: _State, last_seen: str, *, caller: str, allowed: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[bytes] | None:
        """Return the events from a state on, or None if the client has all of them.

        ``last_seen`` is the id of the client's last event, or empty. ``caller`` names the client. The events end once
        ``allowed`` returns False. Raises TooManyStreams, and AccessDenied if the caller has too many streams.
        """
        if self._ended(state) and last_seen == str(state.version):
            return None
        events = self._events(state, last_seen, caller, allowed)
        await anext(events)  # takes its place. A generator that has begun returns it, however the response ends
        return events

    async def _events(
        self, state: _State, last_seen: str, caller: str, allowed: Callable[[], bool]
    ) -> AsyncIterator[bytes]:
        with self._places.taken(caller):
            yield b""
            began_s = sent_s = time.monotonic()
            yield _encoded(retry=RECONNECT_AFTER_MS)
            while True:
                if last_seen != str(state.version):
                    last_seen = str(state.version)
                    sent_s = time.monotonic()
                    yield event_of(state.version, self._detail(state))
                if self._ended(state) or time.monotonic() - began_s > STREAM_AGE_MAX_S:
                    return
                await asyncio.sleep(POLL_INTERVAL_S)
                if not allowed():
                    return
                if time.monotonic() - sent_s >= HEARTBEAT_INTERVAL_S:
                    sent_s = time.monotonic()
                    yield _encoded(comment="still there")
                try:
                    state = await self._read(state)
                except DependencyUnavailable:
                    continue
                except NotFound:
                    return


def request_stream(requests: Requests, places: StreamPlaces) -> EventStream[RequestRecord]:
    """Return the streams of requests."""
    return EventStream(
        places, lambda record: requests.read(record.request_id), lambda record: status_of(record).ended, detail_of
    )


def event_of(version: int, detail: object) -> bytes:
    """Encode a state as a server-sent event."""
    return _encoded(id=version, event="progress", data=msgspec.json.encode(detail))


def _encoded(
    *,
    id: int | None = None,  # noqa: A002  # the name of the field in the event
    event: str | None = None,
    data: bytes | None = None,
    retry: int | None = None,
    comment: str | None = None,
) -> bytes:
    return ServerSentEventMessage(id=id, event=event, data=data, retry=retry, comment=comment, sep="\n").encode()


def wait_s(prefer: str) -> int | None:
    """Return the seconds to wait, at most WAIT_MAX_S, or None if ``prefer`` has no valid ``wait``.

    Unknown and malformed preferences are ignored, as RFC 7240 requires.
    """
    matches = (_WAIT.fullmatch(preference) for preference in prefer.split(","))
    return next((min(int(match[1]), WAIT_MAX_S) for match in matches if match), None)
