"""Dead letters: found by where they came from and when, sent back as they came, and not twice by accident."""

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
from tripfold.operate import dead_letters
from tripfold.operate.command_line import printable
from tripfold.operate.dead_letters import (
    RETRIED_FROM_HEADER,
    DeadLetter,
    NotSentBack,
    UnknownLetter,
    Wanted,
    list_letters,
    read_letter,
    send_back,
)

NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)
HEADERS = (("ce_type", b"x"), ("not utf-8", b"\xff"), ("tripfold_error", b"forged"))


class Cemetery:
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

    async def letters(self, wanted: Wanted | None = None, limit: int = 100) -> tuple[DeadLetter, ...]:
        """List letters."""
        return (await list_letters(self.open, wanted or Wanted(), limit=limit)).letters


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


@pytest.fixture(name="cemetery")
async def _cemetery() -> Cemetery:
    cemetery = Cemetery()
    await cemetery.send_to_dead_letters(Topic.PROCESS_REQUESTS, b"{", key=b"2024-05-01")
    await cemetery.send_to_dead_letters(Topic.CITY_TASKS, b"\xff" * 5_000)
    await cemetery.send_to_dead_letters(Topic.CITY_TASKS, None, key=None)
    return cemetery


async def test_the_latest_letters_come_first(cemetery: Cemetery) -> None:
    """A list has the latest letters with their origin and error, each value's beginning, and how many there are."""
    listing = await list_letters(cemetery.open, Wanted(), limit=2)
    assert [one.origin_topic for one in listing.letters] == ["city-tasks", "city-tasks"]
    assert listing.total == 3
    latest, before = listing.letters
    assert (latest.key, latest.value, latest.size_bytes, latest.buried_at) == (None, None, 0, NOON.replace(hour=14))
    assert (before.size_bytes, before.value) == (5_000, b"\xff" * dead_letters.KEPT_VALUE_BYTES)
    assert before.error.startswith("not an event of city-tasks")
    assert before.headers == HEADERS


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(origin_topic="process-requests"), 1),
        (Wanted(origin_topic="city-stats"), 0),
        (Wanted(first=NOON.date()), 3),
        (Wanted(first=dt.date(2024, 5, 3)), 0),
        (Wanted(last=dt.date(2024, 5, 1)), 0),
    ],
)
async def test_letters_are_chosen_by_origin_and_day(cemetery: Cemetery, wanted: Wanted, found: int) -> None:
    """Only letters of that topic and of those days are listed."""
    assert len(await cemetery.letters(wanted)) == found


async def test_a_letter_is_sent_back_as_it_came(cemetery: Cemetery) -> None:
    """Key, value and headers are the record's own, a forged header of ours among them; one more names the letter."""
    (letter,) = await cemetery.letters(Wanted(origin_topic="process-requests"))
    await send_back(cemetery.open, cemetery.publisher, [letter.id], clock=cemetery.clock)
    first, again = cemetery.log.records(Topic.PROCESS_REQUESTS)
    assert (again.key, again.value) == (first.key, first.value)
    assert again.headers == (*HEADERS, (RETRIED_FROM_HEADER, f"dead-letters/{letter.id}".encode()))


async def test_what_was_sent_back_is_marked_and_not_sent_twice(cemetery: Cemetery) -> None:
    """A letter that was sent back says when, is refused with all others named, and goes again only if that is asked."""
    letters = await cemetery.letters()
    await send_back(cemetery.open, cemetery.publisher, [letters[0].id], clock=cemetery.clock)
    marked = await cemetery.letters()
    assert [one.retried_at is not None for one in marked] == [True, False, False]
    sent = len(cemetery.log.appended)
    with pytest.raises(NotSentBack, match=f"already sent back: {letters[0].id} "):
        await send_back(cemetery.open, cemetery.publisher, [one.id for one in letters], clock=cemetery.clock)
    assert len(cemetery.log.appended) == sent
    await send_back(cemetery.open, cemetery.publisher, [one.id for one in letters], clock=cemetery.clock, again=True)
    assert len(cemetery.log.appended) == sent + 6
    assert all(one.retried_at for one in await cemetery.letters())


async def test_letters_of_one_record_count_once(cemetery: Cemetery) -> None:
    """A record with several letters is listed and sent back once, by whichever of them it is named."""
    record = cemetery.log.append(Topic.CITY_STATS, b"2024-05-01/x/1", b"?")
    for _ in range(3):
        await cemetery.publisher.send_to_dead_letters(record, "unknown")
    copies = [f"{one.partition}/{one.offset}" for one in cemetery.log.records(Topic.DEAD_LETTERS) if one.value == b"?"]
    listing = await list_letters(cemetery.open, Wanted(origin_topic="city-stats"), limit=10)
    assert (listing.total, [one.id for one in listing.letters]) == (1, copies[:1])
    sent = await send_back(cemetery.open, cemetery.publisher, copies[1:], clock=cemetery.clock)
    assert len(sent) == 1
    assert len(cemetery.log.records(Topic.CITY_STATS)) == 2
    with pytest.raises(NotSentBack, match="already"):
        await send_back(cemetery.open, cemetery.publisher, copies[:1], clock=cemetery.clock)


async def test_dead_letters_are_sent_back_oldest_first(cemetery: Cemetery) -> None:
    """The oldest dead letter is sent back first, in whatever order the ids are given."""
    letters = [one for one in await cemetery.letters() if one.origin_topic == "city-tasks"]
    sent = await send_back(cemetery.open, cemetery.publisher, [one.id for one in letters], clock=cemetery.clock)
    assert [one.size_bytes for one in sent] == [5_000, 0]


async def test_dead_letters_of_several_partitions_are_sent_back_oldest_first(cemetery: Cemetery) -> None:
    """The topic is read partition by partition, and still the oldest dead letter is sent back first."""
    for number in range(6):
        await cemetery.send_to_dead_letters(Topic.CITY_STATS, str(number).encode(), key=f"2024-05-01/{number}".encode())

    @contextlib.asynccontextmanager
    async def by_partition() -> AsyncIterator[TopicReader]:
        async with cemetery.open() as replay:
            await replay.take_end()
            records = [record async for batch in replay.read() for record in batch]
        records.sort(key=lambda record: record.partition)
        yield MemoryTopicReader(lambda: records)

    letters = await cemetery.letters(Wanted(origin_topic="city-stats"))
    sent = await send_back(by_partition, cemetery.publisher, [one.id for one in letters], clock=cemetery.clock)
    assert [one.value for one in sent] == [str(number).encode() for number in range(6)]


async def test_a_command_that_dies_before_its_mark_may_send_again(cemetery: Cemetery) -> None:
    """A dead letter counts as sent back only once its mark is written: a crash before that loses nothing."""

    class Dying(MemoryPublisher):
        async def publish_record(
            self, topic: Topic, *, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
        ) -> None:
            if topic is Topic.DEAD_LETTERS:
                raise KafkaUnavailable("gone")
            await super().publish_record(topic, key=key, value=value, headers=headers)

    (letter,) = await cemetery.letters(Wanted(origin_topic="process-requests"))
    with pytest.raises(KafkaUnavailable):
        await send_back(cemetery.open, Dying(cemetery.log), [letter.id], clock=cemetery.clock)
    assert (await read_letter(cemetery.open, letter.id)).retried_at is None
    await send_back(cemetery.open, cemetery.publisher, [letter.id], clock=cemetery.clock)
    assert len(cemetery.log.records(Topic.PROCESS_REQUESTS)) == 3


@pytest.mark.parametrize("letter_id", ["0/99", "x", "1", "-1/3", "1/2/3"])
async def test_a_letter_that_is_not_there_is_named(cemetery: Cemetery, letter_id: str) -> None:
    """An invalid id, or one of no dead letter, is refused with a sentence."""
    with pytest.raises(UnknownLetter, match=letter_id):
        await read_letter(cemetery.open, letter_id)


async def test_a_record_that_is_too_long_for_a_letter_is_cut_and_not_sent_back(cemetery: Cemetery) -> None:
    """A compressed record may be longer than a topic accepts once unpacked: its beginning becomes a dead letter."""
    await cemetery.send_to_dead_letters(Topic.CITY_STATS, b"x" * (RECORD_BYTES_MAX + 1), key=b"k" * 100_000)
    record = cemetery.log.appended[-1]
    headers = sum(len(name) + len(value) for name, value in record.headers)
    assert len(record.key or b"") + len(record.value or b"") + headers < DEAD_LETTER_BYTES_MAX
    whole = RECORD_BYTES_MAX + 1 + 100_000 + sum(len(name) + len(value) for name, value in HEADERS)
    assert (CUT_HEADER, str(whole).encode()) in record.headers
    letter = f"{record.partition}/{record.offset}"
    with pytest.raises(NotSentBack, match="beginning of a longer record, at offset"):
        await send_back(cemetery.open, cemetery.publisher, [letter], clock=cemetery.clock)


async def test_a_letter_of_no_topic_is_not_sent_anywhere() -> None:
    """A record that somebody else wrote into the topic, without our headers, is listed and cannot be sent back."""
    cemetery = Cemetery()
    cemetery.log.append(Topic.DEAD_LETTERS, b"k", b"v", [("tripfold_retried", b"not a mark")])
    (letter,) = await cemetery.letters()
    assert (letter.origin_topic, letter.error, letter.value) == ("", "", b"v")
    with pytest.raises(NotSentBack, match="no topic"):
        await send_back(cemetery.open, cemetery.publisher, [letter.id], clock=cemetery.clock)


def test_what_is_printed_does_nothing_to_a_terminal() -> None:
    """Escape sequences, other control characters and markup are shown, not obeyed; long text is shortened."""
    shown = printable("a\x1b[31m[red]b\u202e\n\r")
    assert Text.from_markup(shown).plain == "a\\x1b[31m[red]b\\u202e\n\\r"
    assert printable("x" * 10, length_max=4) == "xxx…"
