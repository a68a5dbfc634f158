"""Records as they were consumed, and events as they are published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from aiokafka import ConsumerRecord

from shared.domain.events import Cause, Event
from shared.domain.topics import Topic


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
    """An event to publish, with the task that caused it, if any. ``topic`` overrides the event's own topic."""

    event: Event
    cause: Cause | None = None
    topic: Topic | None = None


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
