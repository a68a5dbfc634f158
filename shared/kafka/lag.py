"""Measures how many records a consumer has not processed, and for how long the oldest of them has waited."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from shared.domain.topics import Topic
from shared.kafka.offset_tracker import OffsetTracker
from shared.runtime import metrics


class Offsets(msgspec.Struct, frozen=True):
    """The next offset that the consumer reads from a partition, and the end of the partition."""

    position: int
    end: int


class Lag:
    """Exports the lag of the consumer of one topic. A record counts until its batch is done.

    The age of a record is known from its timestamp once the consumer has taken it. The age of another record counts
    from the first measurement that finds it at the consumer's position. Its real age is greater.
    """

    def __init__(self, topic: Topic, tracker: OffsetTracker, *, clock_s: Callable[[], float] = time.time) -> None:
        self._topic = topic.value
        self._tracker = tracker
        self._clock_s = clock_s
        self._offsets: Mapping[int, Offsets] = {}
        self._waits_since_s: dict[int, tuple[int, float]] = {}  # the oldest unprocessed offset of each partition

    def measure(self, offsets: Mapping[int, Offsets] | None) -> None:
        """Export the lag of the assigned partitions. None, while Kafka is unavailable, stands for the last offsets."""
        if offsets is not None:
            for partition in self._offsets.keys() - offsets.keys():
                metrics.consumer_lag.remove(self._topic, str(partition))
            self._offsets = offsets
        now_s = self._clock_s()
        waits_since_s: dict[int, tuple[int, float]] = {}
        for partition, read in self._offsets.items():
            taken = self._tracker.oldest(partition)
            offset = taken.offset if taken else read.position
            lag = max(0, read.end - offset)
            metrics.consumer_lag.labels(self._topic, str(partition)).set(lag)
            if taken and taken.timestamp_ms:
                waits_since_s[partition] = offset, taken.timestamp_ms / 1000
            elif lag:
                measured = self._waits_since_s.get(partition)
                waits_since_s[partition] = measured if measured and measured[0] == offset else (offset, now_s)
        self._waits_since_s = waits_since_s
        oldest_s = min((since_s for _, since_s in waits_since_s.values()), default=now_s)
        metrics.oldest_record_age.labels(self._topic).set(max(0.0, now_s - oldest_s))
