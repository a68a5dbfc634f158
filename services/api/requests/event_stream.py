"""Following a request until its end: by server-sent events, or by an answer that is held back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec

from services.api.http.errors import NotFound
from services.api.requests.ranges import RangeDetail, RangeRequests
from services.api.requests.service import Requests, detail_of
from shared.domain.objects import RequestRecord
from shared.domain.requests import status_of
from shared.runtime.retry import DependencyUnavailable

LOOK_INTERVAL_S = 1.0
HEARTBEAT_INTERVAL_S = 15.0
STREAM_AGE_MAX_S = 60 * 60
STREAMS_MAX = 200
RECONNECT_AFTER_MS = 2_000

HEARTBEAT = b": still there\n\n"


class ProgressEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A server-sent event, as its lines say: the state of a request."""

    id: Annotated[
        str,
        msgspec.Meta(description="The request's version: what `Last-Event-ID` repeats.", examples=["12"]),
    ]
    event: Literal["progress"]
    data: Annotated[
        str,
        msgspec.Meta(description="The request as JSON, as `GET /process-requests/{request_id}` shows it, in one line."),
    ]


class TooManyStreams(DependencyUnavailable):
    """As many follow requests as this process takes at a time."""


class RequestEventStream:
    """Watches the records of requests for those who follow them."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._streams = 0

    async def until_ended(self, record: RequestRecord, limit_s: float) -> RequestRecord:
        """Return the record once its request has ended, or as it is after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while not ended(record) and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.sleep(min(LOOK_INTERVAL_S, left_s))
            try:
                record = await self._requests.read(record.request_id)
            except DependencyUnavailable:
                continue  # the request was taken in: that answer is good whatever S3 does
        return record

    async def until_range_ended(self, ranges: RangeRequests, detail: RangeDetail, limit_s: float) -> RangeDetail:
        """Return a range once all its requests have ended, or as it is after ``limit_s``."""
        deadline_s = time.monotonic() + limit_s
        while not detail.status.ended and (left_s := deadline_s - time.monotonic()) > 0:
            await asyncio.sleep(min(LOOK_INTERVAL_S, left_s))
            try:
                detail = await ranges.read(detail.id)
            except DependencyUnavailable:
                continue
        return detail

    def events(self, record: RequestRecord, last_seen: str) -> AsyncIterator[bytes] | None:
        """Return the events of a request from its present state on, or None if all of them were seen.

        ``last_seen`` is the id of the last event that the client has, or empty. Raises TooManyStreams.
        """
        if ended(record) and last_seen == str(record.version):
            return None
        if self._streams >= STREAMS_MAX:
            raise TooManyStreams(f"{STREAMS_MAX} clients follow requests here, and no more can")
        return self._events(record, last_seen)

    async def _events(self, record: RequestRecord, last_seen: str) -> AsyncIterator[bytes]:
        self._streams += 1
        try:
            began_s = sent_s = time.monotonic()
            yield b"retry: %d\n\n" % RECONNECT_AFTER_MS
            while True:
                if last_seen != str(record.version):
                    last_seen = str(record.version)
                    sent_s = time.monotonic()
                    yield event_of(record)
                if ended(record) or time.monotonic() - began_s > STREAM_AGE_MAX_S:
                    return
                await asyncio.sleep(LOOK_INTERVAL_S)
                if time.monotonic() - sent_s >= HEARTBEAT_INTERVAL_S:
                    sent_s = time.monotonic()
                    yield HEARTBEAT
                try:
                    record = await self._requests.read(record.request_id)
                except DependencyUnavailable:
                    continue
                except NotFound:
                    return
        finally:
            self._streams -= 1


def ended(record: RequestRecord) -> bool:
    """Return whether nothing more happens by itself."""
    return status_of(record).ended


def event_of(record: RequestRecord) -> bytes:
    """Write the state of a request as a server-sent event. JSON has no line breaks of its own."""
    return b"id: %d\nevent: progress\ndata: %b\n\n" % (record.version, msgspec.json.encode(detail_of(record)))
