"""Tracks the records that a consumer has taken, to commit offsets when records finish out of order.

A committed offset says that all records before it are done. So the offset of a partition moves only past the records
that are done without a gap. aiokafka knows only which records were delivered, and one batch is taken after the other.

A committed offset covers all records before it, so a record that the client drops would be lost silently. On a topic
without compaction the tracker therefore refuses offsets that do not follow each other.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import msgspec

from shared.domain.errors import OperatorError
from shared.domain.topics import COMPACTED, Topic
from shared.kafka.records import ConsumedRecord


class TrackedRecord(msgspec.Struct, gc=False):
    """A record that was taken: its partition, offset and timestamp (0 if unknown)."""

    partition: int
    offset: int
    timestamp_ms: int
    done: bool = False


class OffsetGap(OperatorError):
    """The client returned a record, and not those before it. To commit it would lose them."""

    def __init__(self, topic: Topic, partition: int, expected: int, found: int) -> None:
        super().__init__(
            f"partition {partition} of {topic.value}: after the record before offset {expected}, the Kafka client "
            f"returned offset {found}"
        )


class OffsetTracker:
    """The records of one consumer that are taken and not committed, for each partition in order.

    It also knows the offset that the client must return next, from the first record of an assignment on.
    """

    def __init__(self, topic: Topic) -> None:
        self._topic = topic
        self._partitions: defaultdict[int, deque[TrackedRecord]] = defaultdict(deque)
        self._next_offsets: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._partitions.values()))

    def next_offset(self, partition: int) -> int | None:
        """Return the offset of the record that is expected next, or None before the first one."""
        return self._next_offsets.get(partition)

    def take(self, partition: int, offsets: Sequence[int]) -> None:
        """Note the ascending offsets that the client returned. Raises OffsetGap, and then expects what it did."""
        expected = self._next_offsets.setdefault(partition, offsets[0])
        if self._topic not in COMPACTED:
            for offset in offsets:
                if offset > expected:
                    raise OffsetGap(self._topic, partition, expected, offset)
                expected = offset + 1
        self._next_offsets[partition] = offsets[-1] + 1

    def move_to(self, partition: int, offset: int) -> None:
        """Expect this offset next: no record is before it that has not been taken."""
        self._next_offsets[partition] = offset

    def forget_next_offset(self, partition: int | None = None) -> None:
        """Expect any offset of a partition next, or of all: they were assigned anew, or Kafka has deleted records."""
        if partition is None:
            self._next_offsets.clear()
        else:
            self._next_offsets.pop(partition, None)

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
