"""Records as they were consumed, events as they are published, and the trace that their headers continue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from aiokafka import ConsumerRecord

from shared.domain import events
from shared.domain.events import Cause, Event
from shared.domain.topics import Topic
from shared.runtime import tracing


class ConsumedRecord(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A record of a topic, not decoded. ``timestamp_ms`` counts from 1970; 0 if unknown."""

    topic: Topic
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_ms: int = 0


class OutgoingEvent(msgspec.Struct, frozen=True):
    """An event to publish, with the task that caused it, if any.

    ``topic`` overrides the event's own topic, and ``traceparent`` the present trace.
    """

    event: Event
    cause: Cause | None = None
    topic: Topic | None = None
    traceparent: str | None = None


def consumed_records(topic: Topic, records: Sequence[ConsumerRecord[Any, Any]]) -> list[ConsumedRecord]:
    """Return the records of aiokafka as ConsumedRecord, without decoding them."""
    return [
        ConsumedRecord(
            topic=topic,
            partition=record.partition,
            offset=record.offset,
            key=record.key,
            value=record.value,
            headers=tuple([one if one[1] is not None else (one[0], b"") for one in record.headers]),
            timestamp_ms=record.timestamp,
        )
        for record in records
    ]


def headers_of(outgoing: OutgoingEvent, *, source: str, traceparent: str | None = None) -> list[tuple[str, bytes]]:
    """Return the record headers of an event. ``traceparent`` is the present trace."""
    headers = events.headers_of(outgoing.event, source=source, cause=outgoing.cause)
    trace = outgoing.traceparent or traceparent
    return [*headers, (tracing.HEADER, trace.encode())] if trace else headers


def traceparent_of(headers: Mapping[str, bytes]) -> str | None:
    """Return the trace that a record continues, from its headers, or None."""
    value = headers.get(tracing.HEADER)
    return None if value is None else value.decode("latin-1")


def process_span(topic: Topic, traceparents: Iterable[str | None], **attributes: str | int) -> tracing.Span:
    """Begin the span in which records of a topic are processed. ``attributes`` are Tripfold's own."""
    return tracing.consumer_span(
        f"process {topic.value}",
        traceparents,
        {
            "messaging.system": "kafka",
            "messaging.operation.type": "process",
            "messaging.destination.name": topic.value,
            **{f"tripfold.{name}": value for name, value in attributes.items()},
        },
    )
