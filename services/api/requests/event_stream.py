"""Waits for the end of a request: server-sent events, and ``Prefer: wait=N`` (RFC 7240).

Litestar encodes the events; this module decides when to send one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Literal

import msgspec
from litestar.response.sse import ServerSentEventMessage

from services.api.http.errors import NotFound
from services.api.requests.ranges import RangeDetail, RangeRequests
from services.api.requests.service import Requests, detail_of
from shared.domain.objects import RequestRecord
from shared.domain.requests import status_of
from shared.runtime.retry import DependencyUnavailable

POLL_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 15.0
STREAM_AGE_MAX_S = 60 * 60
STREAMS_MAX = 200
RECONNECT_AFTER_MS = 2_000

WAIT_MAX_S = 60

_WAIT = re.compile(r'\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(;.*)?', re.IGNORECASE)


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A server-sent event: the state of a request."""

    id: Annotated[
        str,
        msgspec.Meta(description="The request's version. A client repeats it in `Last-Event-ID`.", examples=["12"]),
    ]
    event: Literal["progress"]
    data: Annotated[
        str,
        msgspec.Meta(description="The JSON of `GET /process-requests/{request_id}`, in one line."),
    ]


class TooManyStreams(DependencyUnavailable):
    """The process has STREAMS_MAX open streams."""


class RequestEventStream:
    """Polls the records of requests for clients that wait for progress."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._streams = 0

    async def until_ended(self, record: RequestRecord, limit_s: float) -> RequestRecord:
        """Return the record once its request has ended, or its state after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while not ended(record) and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.sleep(min(POLL_INTERVAL_S, left_s))
            try:
                record = await self._requests.read(record.request_id)
            except DependencyUnavailable:
                continue  # the request is accepted, so an outage of S3 must not turn the response into an error
        return record

    async def until_range_ended(self, ranges: RangeRequests, detail: RangeDetail, limit_s: float) -> RangeDetail:
        """Return a range once all its requests have ended, or its state after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while not detail.status.ended and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.sleep(min(POLL_INTERVAL_S, left_s))
            try:
                detail = await ranges.read(detail.id)
            except DependencyUnavailable:
                continue
        return detail

    def events(
        self, record: RequestRecord, last_seen: str, *, allowed: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[bytes] | None:
        """Return the events of a request from its present state on, or None if the client has all of them.

        ``last_seen`` is the id of the client's last event, or empty. The events end once ``allowed`` returns False.
        Raises TooManyStreams.
        """
        if ended(record) and last_seen == str(record.version):
            return None
        if self._streams >= STREAMS_MAX:
            raise TooManyStreams(f"{STREAMS_MAX} event streams are open, which is the limit of this process")
        return self._events(record, last_seen, allowed)

    async def _events(self, record: RequestRecord, last_seen: str, allowed: Callable[[], bool]) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            began_s = sent_s = time.monotonic()
            yield _encoded(retry=RECONNECT_AFTER_MS)
            while True:
                if last_seen != str(record.version):
                    last_seen = str(record.version)
                    sent_s = time.monotonic()
                    yield event_of(record)
                if ended(record) or time.monotonic() - began_s > STREAM_AGE_MAX_S:
                    return
                await asyncio.sleep(POLL_INTERVAL_S)
                if not allowed():
                    return
                if time.monotonic() - sent_s >= HEARTBEAT_INTERVAL_S:
                    sent_s = time.monotonic()
                    yield _encoded(comment="still there")
                try:
                    record = await self._requests.read(record.request_id)
                except DependencyUnavailable:
                    continue
                except NotFound:
                    return
        finally:
            self._streams -= 1


def ended(record: RequestRecord) -> bool:
    """Return whether the request has ended: its record changes only by a retry."""
    return status_of(record).ended


def event_of(record: RequestRecord) -> bytes:
    """Encode the state of a request as a server-sent event."""
    return _encoded(id=record.version, event="progress", data=msgspec.json.encode(detail_of(record)))


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
