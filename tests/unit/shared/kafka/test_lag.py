"""The lag of a consumer: the records that it has not processed, and the age of the oldest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.domain.topics import Topic
from shared.kafka.lag import Lag, Offsets
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.records import ConsumedRecord
from shared.runtime import metrics
from tests.fakes.metrics import REGISTRY

TOPIC = Topic.CITY_TASKS


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def no_series() -> Iterator[None]:
    """Begin and end without a series."""
    metrics.consumer_lag.clear()
    yield
    metrics.consumer_lag.clear()


@pytest.fixture
def clock() -> Clock:
    """Return a clock."""
    return Clock()


@pytest.fixture
def tracker() -> OffsetTracker:
    """Return the records that the consumer has taken."""
    return OffsetTracker(Topic.CITY_STATS)


@pytest.fixture
def lag(tracker: OffsetTracker, clock: Clock) -> Lag:
    """Return the lag to measure."""
    return Lag(TOPIC, tracker, clock_s=clock)


def lags() -> dict[str, float]:
    """Return the exported lag of each partition."""
    (family,) = metrics.consumer_lag.collect()
    return {sample.labels["partition"]: sample.value for sample in family.samples}


def age_s() -> float | None:
    """Return the exported age of the oldest record."""
    return REGISTRY.get_sample_value("tripfold_consumer_oldest_record_age_seconds", {"topic": TOPIC.value})


def record(offset: int, *, timestamp_ms: int) -> ConsumedRecord:
    """Return a record of partition 0."""
    return ConsumedRecord(topic=TOPIC, partition=0, offset=offset, key=None, value=None, timestamp_ms=timestamp_ms)


def test_a_consumer_that_has_processed_all_has_no_lag(lag: Lag) -> None:
    """Without an unprocessed record, lag and age are 0."""
    lag.measure({0: Offsets(5, 5), 1: Offsets(0, 0)})
    assert lags() == {"0": 0, "1": 0}
    assert age_s() == 0


def test_a_record_counts_until_its_batch_is_done(lag: Lag, tracker: OffsetTracker) -> None:
    """The lag of a batch in progress includes its records; their timestamps give the age."""
    taken = tracker.track([record(3, timestamp_ms=940_000), record(4, timestamp_ms=950_000)])
    lag.measure({0: Offsets(5, 9), 1: Offsets(7, 7)})
    assert lags() == {"0": 6, "1": 0}
    assert age_s() == 60
    tracker.mark_done(taken[:1])
    lag.measure({0: Offsets(5, 9), 1: Offsets(7, 7)})
    assert lags() == {"0": 5, "1": 0}
    assert age_s() == 50


def test_the_oldest_record_of_all_partitions_gives_the_age(lag: Lag, tracker: OffsetTracker, clock: Clock) -> None:
    """The age is that of the partition that waits longest."""
    lag.measure({0: Offsets(3, 3), 1: Offsets(7, 8)})
    clock.now_s += 30
    tracker.track([record(3, timestamp_ms=1_020_000)])
    lag.measure({0: Offsets(4, 4), 1: Offsets(7, 8)})
    assert age_s() == 30


def test_the_age_of_a_consumer_that_hangs_grows(lag: Lag, clock: Clock) -> None:
    """Records that are not taken age from the first measurement that finds them, until the consumer moves."""
    for _ in range(3):
        lag.measure({0: Offsets(5, 9)})
        clock.now_s += 10
    assert (lags(), age_s()) == ({"0": 4}, 20)
    lag.measure({0: Offsets(6, 9)})
    assert (lags(), age_s()) == ({"0": 3}, 0)


def test_the_age_grows_while_kafka_is_unavailable(lag: Lag, tracker: OffsetTracker, clock: Clock) -> None:
    """While Kafka is unavailable, the last known lag stays, and its age grows."""
    tracker.track([record(4, timestamp_ms=990_000)])
    lag.measure({0: Offsets(5, 9)})
    clock.now_s += 100
    lag.measure(None)
    assert (lags(), age_s()) == ({"0": 5}, 110)


def test_partitions_that_are_no_longer_assigned_lose_their_series(lag: Lag, tracker: OffsetTracker) -> None:
    """After a rebalance, only the assigned partitions have a lag, and only their records an age."""
    tracker.track([record(4, timestamp_ms=990_000)])
    lag.measure({0: Offsets(5, 9), 1: Offsets(7, 7)})
    lag.measure({1: Offsets(7, 7)})
    assert (lags(), age_s()) == ({"1": 0}, 0)
    lag.measure({})
    assert lags() == {}
