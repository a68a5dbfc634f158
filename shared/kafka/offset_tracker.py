"""Tracks the records that a consumer has taken, to commit offsets when records finish out of order.

A committed offset says that all records before it are done. So the offset of a partition moves only past the records
that are done without a gap. aiokafka knows only which records were delivered, and FastStream handles the batches of a
subscriber one at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import msgspec

from shared.kafka.records import ConsumedRecord


class TrackedRecord(msgspec.Struct, gc=False):
    """A record that was taken: its partition, offset and timestamp (0 if unknown)."""

    partition: int
    offset: int
    timestamp_ms: int
    done: bool = False


class OffsetTracker:
    """The records of one consumer that are taken and not committed, for each partition in order."""

    def __init__(self) -> None:
        self._partitions: defaultdict[int, deque[TrackedRecord]] = defaultdict(deque)

    def __len__(self) -> int:
        return sum(map(len, self._partitions.values()))

    def track(self, batch: Sequence[ConsumedRecord]) -> list[TrackedRecord]:
        """Add records that were taken from the topic. Return what `mark_done` expects when they are done."""
        added = []
        for record in batch:
            tracked = self._partitions[record.partition]
            if tracked and record.offset <= tracked[-1].offset:
                tracked.clear()  # Kafka delivers from an earlier offset again: the partition was lost and regained
            tracked.append(TrackedRecord(record.partition, record.offset, record.timestamp_ms))
            added.append(tracked[-1])
        return added

    def oldest(self, partition: int) -> TrackedRecord | None:
        """Return the first record of a partition that is not done, or None."""
        tracked = self._partitions.get(partition)
        return tracked[0] if tracked else None

    def mark_done(self, done: Sequence[TrackedRecord]) -> dict[int, int]:
        """Mark records as done. Return the offset to commit for each partition that moves."""
        offsets: dict[int, int] = {}
        for one in done:
            one.done = True
        for partition in {one.partition for one in done}:
            tracked = self._partitions[partition]
            while tracked and tracked[0].done:
                offsets[partition] = tracked.popleft().offset + 1
        return offsets
