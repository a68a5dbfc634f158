"""Skip markers: an operator's decision that one record of a later schema version goes to the dead letters.

The marker is an object in the bucket. A consumer that a record blocks looks for the marker of that record. The marker
holds the digest of the value and the record's timestamp. So it never applies to another record, for example at the same
offset of a recreated topic.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence

import msgspec
import structlog

from shared.domain import keys
from shared.domain.events import NewerContract
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord
from shared.storage.object_store import CasConflict, ObjectStore

_log = structlog.get_logger()


class SkipMarker(msgspec.Struct, frozen=True, kw_only=True):
    """Identifies one record by the digest of its value and its timestamp."""

    sha256: str
    timestamp_ms: int
    marked_at: dt.datetime


class SkipMarkers:
    """Moves records that an operator has marked to the dead letters."""

    def __init__(self, store: ObjectStore, publisher: Publisher) -> None:
        self._store = store
        self._publisher = publisher

    async def take(self, error: NewerContract, batch: Sequence[ConsumedRecord]) -> list[ConsumedRecord]:
        """Send the record of ``error`` to the dead letters and return the rest of the batch.

        Raises ``error`` if the record is not marked.
        """
        position = (error.partition, error.offset)
        for record in batch:
            if (record.partition, record.offset) == position and await self.pass_over(record, str(error)):
                return [other for other in batch if other is not record]
        raise error

    async def pass_over(self, record: ConsumedRecord, why: str) -> bool:
        """Send a record to the dead letters, and return True, if an operator has marked it."""
        if not await is_marked(self._store, record):
            return False
        await self._publisher.send_to_dead_letters(record, f"skipped by an operator: {why}")
        _log.warning("record_skipped", topic=record.topic.value, partition=record.partition, offset=record.offset)
        return True


async def is_marked(store: ObjectStore, record: ConsumedRecord) -> bool:
    """Return whether an operator has marked exactly this record to be skipped."""
    found = await store.get(_key_of(record))
    if found is None:
        return False
    try:
        marker = msgspec.json.decode(found.body, type=SkipMarker)
    except msgspec.MsgspecError:
        return False  # 'tripfold skip' overwrites it
    return (marker.sha256, marker.timestamp_ms) == (_digest_of(record), record.timestamp_ms)


async def mark(store: ObjectStore, record: ConsumedRecord, now: dt.datetime) -> None:
    """Mark a record to be skipped. Replaces any marker of the same partition and offset."""
    marker = SkipMarker(sha256=_digest_of(record), timestamp_ms=record.timestamp_ms, marked_at=now)
    body = msgspec.json.encode(marker)
    while True:
        found = await store.get(_key_of(record))
        try:
            await store.compare_and_swap(_key_of(record), body, etag=found.etag if found else None)
        except CasConflict:
            continue
        return


def _key_of(record: ConsumedRecord) -> str:
    return keys.skip(record.topic.value, record.partition, record.offset)


def _digest_of(record: ConsumedRecord) -> str:
    return hashlib.sha256(record.value or b"").hexdigest()
