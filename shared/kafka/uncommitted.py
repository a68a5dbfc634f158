"""Tracks the records that a consumer has taken, to commit offsets when records finish out of order.

A committed offset says that all records before it are done. So the offset of a partition moves only past the records
that are done without a gap. aiokafka knows only which records were delivered, and FastStream handles the batches of a
subscriber one at a time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from shared.kafka.records import ConsumedRecord


class Uncommitted:
    """The records of one consumer that are taken and not committed, for each partition in order."""

    def __init__(self) -> None:
        self._partitions: defaultdict[int, deque[Taken]] = defaultdict(deque)

    def __len__(self) -> int:
        return sum(map(len, self._partitions.values()))

    def take(self, batch: Sequence[ConsumedRecord]) -> list[Taken]:
        """Add records that were taken from the topic. Return what `finish` expects when they are done."""
        added = []
        for record in batch:
            before = self._partitions[record.partition]
            if before and record.offset <= before[-1].offset:
                before.clear()  # Kafka delivers from an earlier offset again: the partition was lost and regained
            before.append(Taken(record.partition, record.offset, record.timestamp_ms))
            added.append(before[-1])
        return added

    def oldest(self, partition: int) -> Taken | None:
        """Return the first record of a partition that is not done, or None."""
        taken = self._partitions.get(partition)
        return taken[0] if taken else None

    def finish(self, done: Sequence[Taken]) -> dict[int, int]:
        """Mark records as done. Return the offset to commit for each partition that moves."""
        offsets: dict[int, int] = {}
        for one in done:
            one.done = True
        for partition in {one.partition for one in done}:
            taken = self._partitions[partition]
            while taken and taken[0].done:
                offsets[partition] = taken.popleft().offset + 1
        return offsets


class Taken:
    """A record that was taken: its partition, offset and timestamp (0 if unknown)."""

    __slots__ = ("done", "offset", "partition", "timestamp_ms")

    def __init__(self, partition: int, offset: int, timestamp_ms: int) -> None:
        self.partition = partition
        self.offset = offset
        self.timestamp_ms = timestamp_ms
        self.done = False
