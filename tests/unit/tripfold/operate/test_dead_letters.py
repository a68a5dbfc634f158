"""Dead letters: selected by origin and day, sent back unchanged, and not twice by accident."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Iterable

import pytest
from rich.text import Text

from services.aggregate.replay.topic_reader import TopicReader
from shared.domain.topics import DEAD_LETTER_BYTES_MAX, RECORD_BYTES_MAX, Topic
from shared.kafka.dead_letters import CUT_HEADER
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import ConsumedRecord
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher, MemoryTopicReader
from tripfold.console import printable
from tripfold.operate import dead_letters
from tripfold.operate.dead_letters import (
    RETRIED_FROM_HEADER,
    DeadLetter,
    DeadLetterFilter,
    NotSentBack,
    UnknownDeadLetter,
    list_dead_letters,
    read_dead_letter,
    send_back,
)

NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)
HEADERS = (("ce_type", b"x"), ("not utf-8", b"\xff"), ("tripfold_error", b"forged"))


class DeadLetterLog:
    """A log with dead letters, which were sent as a service sends them, one an hour."""

    def __init__(self) -> None:
        self.clock = Clock(NOON)
        self.log = MemoryLog()
        self.publisher = MemoryPublisher(self.log)
        self._times_ms: list[int] = []

    async def send_to_dead_letters(
        self, topic: Topic, value: bytes | None, *, key: bytes | None = b"2024-05-01/7"
    ) -> None:
        """Send a record of a topic to the dead letters."""
        record = self.log.append(topic, key, value, HEADERS)
        await self.publisher.send_to_dead_letters(record, f"not an event of {topic.value}: \x1b[31m")
        self._stamp()

    def _stamp(self) -> None:
        while len(self._times_ms) < len(self.log.records(Topic.DEAD_LETTERS)):
            self._times_ms.append(int(self.clock().timestamp() * 1000))
        self.clock.advance(3600)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[TopicReader]:
        """Open the topic of dead letters; its records have the times at which they were sent."""
        records = sorted(self.log.records(Topic.DEAD_LETTERS), key=self.log.appended.index)
        timed = [_at(record, at) for record, at in zip(records, self._all_times(records), strict=True)]
        yield MemoryTopicReader(lambda: timed)

    def _all_times(self, records: list[ConsumedRecord]) -> Iterable[int]:
        return [*self._times_ms, *[int(self.clock().timestamp() * 1000)] * (len(records) - len(self._times_ms))]

    async def letters(self, wanted: DeadLetterFilter | None = None, limit: int = 100) -> tuple[DeadLetter, ...]:
        """List dead letters."""
        return (await list_dead_letters(self.open, wanted or DeadLetterFilter(), limit=limit)).letters


def _at(record: ConsumedRecord, timestamp_ms: int) -> ConsumedRecord:
    return ConsumedRecord(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=record.key,
        value=record.value,
        headers=record.headers,
        timestamp_ms=timestamp_ms,
    )


@pytest.fixture(name="world")
async def _world() -> DeadLetterLog:
    world = DeadLetterLog()
    await world.send_to_dead_letters(Topic.PROCESS_REQUESTS, b"{", key=b"2024-05-01")
    await world.send_to_dead_letters(Topic.CITY_TASKS, b"\xff" * 5_000)
    await world.send_to_dead_letters(Topic.CITY_TASKS, None, key=None)
    return world


async def test_the_latest_dead_letters_come_first(world: DeadLetterLog) -> None:
    """A list has the latest dead letters: origin, error, beginning of the value, and how many there are."""
    listing = await list_dead_letters(world.open, DeadLetterFilter(), limit=2)
    assert [one.origin_topic for one in listing.letters] == ["city-tasks", "city-tasks"]
    assert listing.total == 3
    latest, before = listing.letters
    assert (latest.key, latest.value, latest.size_bytes, latest.dead_lettered_at) == (
        None,
        None,
        0,
        NOON.replace(hour=14),
    )
    assert (before.size_bytes, before.value) == (5_000, b"\xff" * dead_letters.KEPT_VALUE_BYTES)
    assert before.error.startswith("not an event of city-tasks")
    assert before.headers == HEADERS


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (DeadLetterFilter(origin_topic="process-requests"), 1),
        (DeadLetterFilter(origin_topic="city-stats"), 0),
        (DeadLetterFilter(first=NOON.date()), 3),
        (DeadLetterFilter(first=dt.date(2024, 5, 3)), 0),
        (DeadLetterFilter(last=dt.date(2024, 5, 1)), 0),
    ],
)
async def test_dead_letters_are_selected_by_origin_and_day(
    world: DeadLetterLog, wanted: DeadLetterFilter, found: int
) -> None:
    """Only dead letters of the selected topic and days are listed."""
    assert len(await world.letters(wanted)) == found


async def test_a_dead_letter_is_sent_back_unchanged(world: DeadLetterLog) -> None:
    """The record keeps its key, value and headers, even forged ones; one more header names the dead letter."""
    (letter,) = await world.letters(DeadLetterFilter(origin_topic="process-requests"))
    await send_back(world.open, world.publisher, [letter.id], clock=world.clock)
    first, again = world.log.records(Topic.PROCESS_REQUESTS)
    assert (again.key, again.value) == (first.key, first.value)
    assert again.headers == (*HEADERS, (RETRIED_FROM_HEADER, f"dead-letters/{letter.id}".encode()))


async def test_a_dead_letter_is_marked_and_not_sent_back_twice(world: DeadLetterLog) -> None:
    """A dead letter that was sent back says when; a call that names it again sends nothing, unless it asks for that."""
    letters = await world.letters()
    await send_back(world.open, world.publisher, [letters[0].id], clock=world.clock)
    marked = await world.letters()
    assert [one.retried_at is not None for one in marked] == [True, False, False]
    sent = len(world.log.appended)
    with pytest.raises(NotSentBack, match=f"already sent back: {letters[0].id} "):
        await send_back(world.open, world.publisher, [one.id for one in letters], clock=world.clock)
    assert len(world.log.appended) == sent
    await send_back(world.open, world.publisher, [one.id for one in letters], clock=world.clock, again=True)
    assert len(world.log.appended) == sent + 6
    assert all(one.retried_at for one in await world.letters())


async def test_dead_letters_of_one_record_count_once(world: DeadLetterLog) -> None:
    """A record with several dead letters is listed and sent back once, whichever of them is named."""
    record = world.log.append(Topic.CITY_STATS, b"2024-05-01/x/1", b"?")
    for _ in range(3):
        await world.publisher.send_to_dead_letters(record, "unknown")
    copies = [f"{one.partition}/{one.offset}" for one in world.log.records(Topic.DEAD_LETTERS) if one.value == b"?"]
    listing = await list_dead_letters(world.open, DeadLetterFilter(origin_topic="city-stats"), limit=10)
    assert (listing.total, [one.id for one in listing.letters]) == (1, copies[:1])
    sent = await send_back(world.open, world.publisher, copies[1:], clock=world.clock)
    assert len(sent) == 1
    assert len(world.log.records(Topic.CITY_STATS)) == 2
    with pytest.raises(NotSentBack, match="already"):
        await send_back(world.open, world.publisher, copies[:1], clock=world.clock)


async def test_dead_letters_are_sent_back_oldest_first(world: DeadLetterLog) -> None:
    """The oldest dead letter is sent back first, in whatever order the ids are given."""
    letters = [one for one in await world.letters() if one.origin_topic == "city-tasks"]
    sent = await send_back(world.open, world.publisher, [one.id for one in letters], clock=world.clock)
    assert [one.size_bytes for one in sent] == [5_000, 0]


async def test_dead_letters_of_several_partitions_are_sent_back_oldest_first(world: DeadLetterLog) -> None:
    """The topic is read partition by partition, and still the oldest dead letter is sent back first."""
    for number in range(6):
        await world.send_to_dead_letters(Topic.CITY_STATS, str(number).encode(), key=f"2024-05-01/{number}".encode())

    @contextlib.asynccontextmanager
    async def by_partition() -> AsyncIterator[TopicReader]:
        async with world.open() as replay:
            await replay.take_end()
            records = [record async for batch in replay.read() for record in batch]
        records.sort(key=lambda record: record.partition)
        yield MemoryTopicReader(lambda: records)

    letters = await world.letters(DeadLetterFilter(origin_topic="city-stats"))
    sent = await send_back(by_partition, world.publisher, [one.id for one in letters], clock=world.clock)
    assert [one.value for one in sent] == [str(number).encode() for number in range(6)]


async def test_a_crash_before_the_mark_may_send_a_record_again(world: DeadLetterLog) -> None:
    """A dead letter counts as sent back only once its mark is written: a crash before that loses nothing."""

    class Dying(MemoryPublisher):
        async def publish_record(
            self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
        ) -> None:
            if topic is Topic.DEAD_LETTERS:
                raise KafkaUnavailable("gone")
            await super().publish_record(topic, key=key, value=value, headers=headers)

    (letter,) = await world.letters(DeadLetterFilter(origin_topic="process-requests"))
    with pytest.raises(KafkaUnavailable):
        await send_back(world.open, Dying(world.log), [letter.id], clock=world.clock)
    assert (await read_dead_letter(world.open, letter.id)).retried_at is None
    await send_back(world.open, world.publisher, [letter.id], clock=world.clock)
    assert len(world.log.records(Topic.PROCESS_REQUESTS)) == 3


@pytest.mark.parametrize("letter_id", ["0/99", "x", "1", "-1/3", "1/2/3"])
async def test_an_unknown_dead_letter_is_named(world: DeadLetterLog, letter_id: str) -> None:
    """An invalid id, or one of no dead letter, is refused, and the error names it."""
    with pytest.raises(UnknownDeadLetter, match=letter_id):
        await read_dead_letter(world.open, letter_id)


async def test_a_record_too_long_for_a_dead_letter_is_cut_and_not_sent_back(world: DeadLetterLog) -> None:
    """A compressed record may be longer than a topic accepts once unpacked: its beginning becomes a dead letter."""
    await world.send_to_dead_letters(Topic.CITY_STATS, b"x" * (RECORD_BYTES_MAX + 1), key=b"k" * 100_000)
    record = world.log.appended[-1]
    headers = sum(len(name) + len(value) for name, value in record.headers)
    assert len(record.key or b"") + len(record.value or b"") + headers < DEAD_LETTER_BYTES_MAX
    whole = RECORD_BYTES_MAX + 1 + 100_000 + sum(len(name) + len(value) for name, value in HEADERS)
    assert (CUT_HEADER, str(whole).encode()) in record.headers
    letter = f"{record.partition}/{record.offset}"
    with pytest.raises(NotSentBack, match="does not hold the whole record at offset"):
        await send_back(world.open, world.publisher, [letter], clock=world.clock)


async def test_a_dead_letter_of_no_topic_is_not_sent_back() -> None:
    """A record that somebody else wrote into the topic, without our headers, is listed and cannot be sent back."""
    world = DeadLetterLog()
    world.log.append(Topic.DEAD_LETTERS, b"k", b"v", [("tripfold_retried", b"not a mark")])
    (letter,) = await world.letters()
    assert (letter.origin_topic, letter.error, letter.value) == ("", "", b"v")
    with pytest.raises(NotSentBack, match="no topic"):
        await send_back(world.open, world.publisher, [letter.id], clock=world.clock)


def test_control_characters_are_not_sent_to_the_terminal() -> None:
    """Escape sequences, other control characters and markup are shown, not obeyed; long text is shortened."""
    shown = printable("a\x1b[31m[red]b\u202e\n\r")
    assert Text.from_markup(shown).plain == "a\\x1b[31m[red]b\\u202e\n\\r"
    assert printable("x" * 10, length_max=4) == "xxx…"
