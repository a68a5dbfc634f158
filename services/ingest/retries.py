"""Retries city-days and requests through a topic, so that nothing waits behind a retry for the upstream.

The order of effects:

1. the worker publishes its task, or the planner its request, to ``retries``, with its count of failed attempts and the
   time when it is due, and commits;
2. `Retries` waits until the event is due, and publishes it to the topic that it came from;
3. it commits.

A crash after 1 or 2 publishes the same event twice. Both copies run, one after the other: that costs attempts and
changes no result. If the waiting event of a request is lost, the requeue of stalled requests publishes the request.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from services.ingest.upstream.errors import (
    OutageTooLong,
    PermanentUpstreamError,
    TransientUpstreamError,
    UpstreamDown,
    UpstreamHeld,
)
from services.ingest.upstream.retry import WAIT_FIRST_S, WAIT_MAX_S, jittered_s
from shared.domain.events import Retryable
from shared.kafka.consumer import decode_batch
from shared.kafka.failed_keys import KeyResult
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent, traceparent_of
from shared.runtime.retry import Retrier

_Retryable = TypeVar("_Retryable", bound=Retryable)


def next_attempt(
    event: _Retryable,
    fault: TransientUpstreamError | UpstreamDown,
    *,
    began_at: dt.datetime,
    now: dt.datetime,
    attempts_max: int,
    outage_limit_s: float,
) -> _Retryable:
    """Return the event for its next attempt. Raises PermanentUpstreamError after the last attempt or a long outage.

    An outage costs no attempt. It started at ``began_at``, or when an earlier run of the event met it. A wait that the
    upstream asked for costs no attempt either, and is no outage.
    """
    if isinstance(fault, UpstreamHeld):
        return msgspec.structs.replace(event, not_before=now + dt.timedelta(seconds=fault.wait_s))
    if isinstance(fault, TransientUpstreamError):
        failed = event.failed_attempts + 1
        if failed >= attempts_max:
            raise PermanentUpstreamError(f"{fault} ({failed} attempts)") from fault
        not_before = now + dt.timedelta(seconds=jittered_s(failed - 1))
        return msgspec.structs.replace(event, failed_attempts=failed, not_before=not_before, down_since=None)
    down_since = event.down_since or began_at
    down_s = (now - down_since).total_seconds()
    if isinstance(fault, OutageTooLong) or down_s >= outage_limit_s:
        raise PermanentUpstreamError(f"{fault} (for {outage_limit_s:.0f} s)") from fault
    wait_s = min(WAIT_MAX_S, max(WAIT_FIRST_S, down_s)) * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret
    return msgspec.structs.replace(event, not_before=now + dt.timedelta(seconds=wait_s), down_since=down_since)


class Retries:
    """Publishes each event of ``retries`` to the topic that it runs from when it is due."""

    def __init__(self, publisher: Publisher, *, clock: Callable[[], dt.datetime], retrier: Retrier) -> None:
        self._publisher = publisher
        self._clock = clock
        self._retrier = retrier

    async def process(self, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        """Publish each event of a batch when it is due, or after WAIT_MAX_S. Afterwards the batch can be committed."""
        now, began_s = self._clock(), self._retrier.now_s()
        waiting: list[tuple[float, OutgoingEvent]] = []
        for item in await decode_batch(batch, self._publisher):
            assert isinstance(item.event, Retryable)
            wait_s = (item.event.not_before - now).total_seconds() if item.event.not_before else 0.0
            traceparent = traceparent_of(dict(item.record.headers))
            again = OutgoingEvent(item.event, topic=item.event.runs_from, traceparent=traceparent)
            waiting.append((min(wait_s, WAIT_MAX_S), again))
        waiting.sort(key=lambda one: one[0])
        while waiting:
            first_s = waiting[0][0]
            await self._retrier.sleep(max(0.0, first_s - (self._retrier.now_s() - began_s)))
            self._retrier.raise_if_stopping()
            passed_s = max(first_s, self._retrier.now_s() - began_s)
            due = [again for wait_s, again in waiting if wait_s <= passed_s]
            await self._publisher.publish(due)
            waiting = waiting[len(due) :]
        return ()
