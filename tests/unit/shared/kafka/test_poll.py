"""Which records a poll takes, while aiokafka's own fetcher raises at records that it cannot decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.topics import Topic
from shared.kafka.offset_tracker import OffsetTracker
from shared.kafka.poll import WAIT_FIRST_S, Poll
from shared.kafka.raw_batches import RawBatch, Undecodable, first_batch
from shared.kafka.records import ConsumedRecord
from tests.fakes.fetching import BAD_HEADER, FetchingConsumer, damaged, fetched

Place = tuple[int, int]
TAKES_MAX = 200


class Polled:
    """A poll over partitions of ``city-tasks``, of which ``records[n]`` are those of partition n."""

    def __init__(self, *counts: int, bad: Sequence[Place] = (), gone: Sequence[Place] = ()) -> None:
        self.records = [
            [record(number, offset, (number, offset) in bad) for offset in range(count) if (number, offset) not in gone]
            for number, count in enumerate(counts)
        ]
        self.now_s = 0.0
        self.damage: Callable[[int], bool] = lambda _: False
        self.reports: list[tuple[int, str | None]] = []
        self.passed: list[Place] = []
        self.may_pass = False
        self.deleted_before = 0
        self.consumer = FetchingConsumer("city-tasks", self.fetch)
        self.consumer.assign(dict.fromkeys(range(len(counts)), 0))
        self.poll = Poll(
            Topic.CITY_TASKS,
            OffsetTracker(Topic.CITY_TASKS),
            read_batch=self.read_batch,
            pass_over=self.pass_over,
            report=lambda partition, reason: self.reports.append((partition, reason)),
            now_s=lambda: self.now_s,
            wait_max_s=30.0,
        )

    def fetch(self, partition: int, offset: int) -> bytes:
        found = fetched(self.records[partition], offset)
        return damaged(found) if found and self.damage(partition) else found

    async def read_batch(self, partition: TopicPartition, offset: int) -> RawBatch | None:
        if offset < self.deleted_before:
            raise OffsetOutOfRangeError
        return first_batch(self.fetch(partition.partition, offset), partition, offset)

    async def pass_over(self, bad: Undecodable) -> bool:
        if self.may_pass:
            self.passed += [(bad.record.partition, offset) for offset in range(bad.record.offset, bad.next_offset)]
        return self.may_pass

    async def take(self, records_max: int = 100, *, in_turns: bool = False) -> list[Place]:
        taken = await self.poll.take(self.consumer, records_max=records_max, wait_ms=1, in_turns=in_turns)
        return [(one.partition, one.offset) for one in taken]

    async def take_all(self, records_max: int = 100, *, in_turns: bool = False) -> list[Place]:
        """Take until nothing comes, while time passes."""
        taken: list[Place] = []
        nothing = 0
        for _ in range(TAKES_MAX):
            found = await self.take(records_max, in_turns=in_turns)
            taken += found
            nothing = 0 if found else nothing + 1
            if nothing == 10:
                return taken
            self.now_s += 60
        raise AssertionError("it takes records without end")


def record(partition: int, offset: int, bad: bool) -> ConsumedRecord:
    """Make a record; aiokafka cannot decode a bad one."""
    headers = ((BAD_HEADER, b""),) if bad else ()
    return ConsumedRecord(
        topic=Topic.CITY_TASKS, partition=partition, offset=offset, key=b"k", value=b"v", headers=headers
    )


def places(*counts: int) -> list[Place]:
    """Return all places of partitions."""
    return [(number, offset) for number, count in enumerate(counts) for offset in range(count)]


async def test_partitions_take_turns() -> None:
    """Each partition gives one record in each round; without turns, it gives all that was fetched."""
    polled = Polled(3, 1, 3)
    assert await polled.take(6, in_turns=True) == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]
    assert await polled.take(6, in_turns=True) == [(2, 2)]
    assert await Polled(3, 1, 3).take(6) == places(3, 1, 2)
    polled = Polled(9, 9, 9)
    assert [(await polled.take(1, in_turns=True))[0][0] for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    polled = Polled(9, 9, 9)
    assert [(await polled.take(2))[0][0] for _ in range(6)] == [0, 0, 0, 0, 0, 1]


@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=3),
    st.sets(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=4),
    st.integers(1, 9),
    st.booleans(),
    st.integers(),
)
async def test_every_record_is_taken_up_to_the_first_bad_one_of_its_partition(
    counts: list[int], bad: set[Place], records_max: int, in_turns: bool, seed: int
) -> None:
    """Nothing is lost or taken twice, some responses are damaged, and an operator can pass over the bad records."""
    polled = Polled(*counts, bad=sorted(bad))
    chance = Random(seed)
    polled.damage = lambda _: chance.random() < 0.2
    bad &= set(places(*counts))
    taken = await polled.take_all(records_max, in_turns=in_turns)
    first_bad = {number: min([offset for part, offset in bad if part == number], default=99) for number in range(3)}
    assert sorted(taken) == [one for one in places(*counts) if one[1] < first_bad[one[0]]]
    polled.may_pass = True
    polled.damage = lambda _: False
    taken += await polled.take_all(records_max, in_turns=in_turns)
    assert sorted([*taken, *polled.passed]) == places(*counts)
    assert polled.passed == sorted(bad, key=polled.passed.index)
    assert polled.poll.suspects == {}


async def test_a_bad_record_is_named_until_it_is_passed_over() -> None:
    """Its partition is reported with the place, the reason and the remedy, again and again, ever more rarely."""
    polled = Polled(2, 3, bad=[(1, 1)])
    assert sorted(await polled.take_all()) == [(0, 0), (0, 1), (1, 0)]
    reasons = {reason for partition, reason in polled.reports if partition == 1 and reason}
    assert len(reasons) == 1
    for text in ("partition 1, offset 1 of city-tasks", "not UTF-8", "tripfold skip city-tasks 1 1"):
        assert text in reasons.copy().pop()
    reports = len(polled.reports)
    for _ in range(20):
        await polled.take()
    assert len(polled.reports) == reports
    polled.now_s += WAIT_FIRST_S
    polled.may_pass = True
    assert await polled.take_all() == [(1, 2)]
    assert polled.reports[-1] == (1, None)


async def test_a_batch_with_a_wrong_checksum_is_passed_over_as_a_whole() -> None:
    """Kafka cannot say which of its records are damaged. The remedy names all of them."""
    polled = Polled(6, 1)
    polled.damage = lambda partition: partition == 0
    assert await polled.take_all() == [(1, 0)]
    assert "offsets 0 to 2 of city-tasks cannot be decoded" in str(polled.reports[-1])
    polled.may_pass = True
    assert await polled.take_all() == []
    assert polled.passed == places(6)


async def test_records_that_the_client_left_out_are_read_again() -> None:
    """A gap of offsets is refused; the records in it are taken if Kafka has them."""
    polled = Polled(6)
    assert await polled.take(2) == [(0, 0), (0, 1)]
    polled.consumer.seek(TopicPartition("city-tasks", 0), 4)
    assert await polled.take_all() == [(0, 2), (0, 3), (0, 4), (0, 5)]


async def test_offsets_that_kafka_no_longer_has_are_no_loss() -> None:
    """Control records, and records that were deleted, leave gaps that block nothing."""
    polled = Polled(9, gone=[(0, 1), (0, 4)])
    assert await polled.take_all() == [(0, offset) for offset in (0, 2, 3, 5, 6, 7, 8)]
    assert [reason for _, reason in polled.reports if reason] == []
    polled = Polled(9)
    await polled.take(2)
    polled.records[0], polled.deleted_before = polled.records[0][6:], 6
    polled.consumer.seek(TopicPartition("city-tasks", 0), 6)  # as aiokafka does when its offset is out of range
    assert await polled.take_all() == [(0, 6), (0, 7), (0, 8)]


async def test_a_lost_partition_is_reported_no_more() -> None:
    """A bad record of a partition that another process has is not this one's fault."""
    polled = Polled(2, 2, bad=[(1, 0)])
    await polled.take_all()
    polled.consumer.assign({0: 2})
    polled.poll.forget()
    assert (polled.reports[-1], polled.poll.suspects) == ((1, None), {})


@pytest.mark.parametrize("idle", [True, False])
async def test_a_fault_of_kafka_loses_nothing_that_was_taken(monkeypatch: pytest.MonkeyPatch, idle: bool) -> None:
    """What was taken before a fault is handled: the next commit covers it. The fault is raised the next time."""
    polled = Polled(0, 0)
    if idle:
        assert await polled.take() == []
    polled.records[0] = [record(0, 0, False)]
    getmany = polled.consumer.getmany

    async def failing(*partitions: TopicPartition, timeout_ms: int, max_records: int) -> object:
        if TopicPartition("city-tasks", 1) in partitions:
            raise KafkaError("away")
        return await getmany(*partitions, timeout_ms=timeout_ms, max_records=max_records)

    monkeypatch.setattr(polled.consumer, "getmany", failing)
    assert await polled.take() == [(0, 0)]
    with pytest.raises(KafkaError, match="away"):
        await polled.take()
    assert polled.reports == []
