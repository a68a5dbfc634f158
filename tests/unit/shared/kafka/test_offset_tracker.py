"""Offsets to commit when records finish in any order."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.topics import Topic
from shared.kafka.offset_tracker import OffsetGap, OffsetTracker, TrackedRecord
from shared.kafka.records import ConsumedRecord


def records(*offsets: int, partition: int = 0) -> list[ConsumedRecord]:
    """Return records of a partition."""
    return [
        ConsumedRecord(topic=Topic.CITY_TASKS, partition=partition, offset=offset, key=None, value=None)
        for offset in offsets
    ]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=30), st.randoms())
def test_an_offset_is_committed_only_when_all_before_are_done(batches: list[tuple[int, int]], random: Random) -> None:
    """In any order of finishing, no unfinished record is before a committed offset; at the end all are committed."""
    tracker = OffsetTracker(Topic.CITY_TASKS)
    next_offsets = dict.fromkeys(range(4), 0)
    unfinished: list[list[TrackedRecord]] = []
    for partition, count in batches:
        first = next_offsets[partition]
        next_offsets[partition] += count
        unfinished.append(tracker.track(records(*range(first, first + count), partition=partition)))
    random.shuffle(unfinished)
    committed = dict.fromkeys(range(4), 0)
    while unfinished:
        committed |= tracker.mark_done(unfinished.pop())
        left = [one for batch in unfinished for one in batch]
        assert all(one.offset >= committed[one.partition] for one in left)
    assert committed == next_offsets
    assert len(tracker) == 0


def test_a_regained_partition_starts_again() -> None:
    """Records from before a partition was lost neither hold back nor advance the offsets after it was regained."""
    tracker = OffsetTracker(Topic.CITY_TASKS)
    lost = tracker.track(records(500, 501))
    regained = tracker.track(records(0, 1))
    assert tracker.mark_done(lost) == {}
    assert tracker.mark_done(regained) == {0: 2}


def test_a_gap_of_offsets_is_refused() -> None:
    """On a topic without compaction, the error names the topic, the partition and both offsets."""
    tracker = OffsetTracker(Topic.CITY_TASKS)
    tracker.take(1, [5, 6])
    for offsets in ([8], [7, 9]):
        with pytest.raises(OffsetGap, match=r"partition 1 of city-tasks: .* offset [78], .* offset [89]"):
            tracker.take(1, offsets)
        assert tracker.next_offset(1) == 7
    tracker.take(1, [7])
    tracker.take(0, [90])  # another partition
    tracker.take(1, [2, 3])  # delivered again
    tracker.forget_next_offset(1)
    tracker.take(1, [70])
    assert (tracker.next_offset(0), tracker.next_offset(1)) == (91, 71)
    compacted = OffsetTracker(Topic.CITY_STATS)
    compacted.take(1, [5, 9])
    assert compacted.next_offset(1) == 10
