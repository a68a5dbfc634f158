"""Dead letters: finding them in their topic, and sending them back to where they came from.

A letter that was sent back is marked by another record of the same topic, which names it in a header: so whoever reads
the topic knows, and it is not sent twice by accident. The order is: send it back, then mark it. A command that dies
between the two leaves a letter that looks as if it had never been sent back; sending it again is harmless, as every
delivery of Tripfold's events is. The record that was sent back says in a header which letter it was.

One record can have several letters: a process that was restarted while it retried a batch publishes them again. They
have the same origin and value, and count as one letter, the first of them.
"""

from __future__ import annotations

import datetime as dt
import heapq
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from services.aggregate.replay.topic_reader import TopicReader
from shared.domain.errors import OperatorError
from shared.domain.topics import Topic
from shared.kafka.dead_letters import (
    CUT_HEADER,
    DEAD_LETTER_HEADERS,
    ERROR_HEADER,
    ORIGIN_OFFSET_HEADER,
    ORIGIN_PARTITION_HEADER,
    ORIGIN_TOPIC_HEADER,
)
from shared.kafka.producer import RecordPublisher
from shared.kafka.records import ConsumedRecord

RETRIED_HEADER = "tripfold_retried"
"""In a mark: the letter that was sent back."""
RETRIED_FROM_HEADER = "tripfold_retried_from"
"""In a record that was sent back: the letter that it was."""

LETTERS_MAX = 10_000
"""So many are sent back by one command."""
KEPT_VALUE_BYTES = 1_000
"""So much of a value is kept where many letters are looked at."""

_ID = re.compile(r"[0-9]{1,9}/[0-9]{1,18}")

_Order = tuple[dt.datetime, int, int]

OpenTopic = Callable[[], AbstractAsyncContextManager[TopicReader]]
"""Opens the topic for reading once."""


class UnknownLetter(OperatorError):
    """There is no dead letter with this id, or not among those that were looked at."""


class NotSentBack(OperatorError):
    """A letter cannot be sent back, or was already. The message says which and why."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record that could not be processed, as it came.

    ``id`` is its partition and offset in the topic of dead letters. ``value`` may hold its first bytes alone, of
    ``size_bytes``.
    """

    id: str
    buried_at: dt.datetime
    origin_topic: str
    origin_partition: str
    origin_offset: str
    error: str
    key: bytes | None
    value: bytes | None
    size_bytes: int
    headers: tuple[tuple[str, bytes], ...]
    retried_at: dt.datetime | None = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are looked for: of one topic, and buried from one date to another, both included (UTC)."""

    origin_topic: str | None = None
    first: dt.date | None = None
    last: dt.date | None = None

    def __call__(self, letter: DeadLetter) -> bool:
        """Tell whether a letter is one of them."""
        day = letter.buried_at.date()
        return (
            self.origin_topic in {None, letter.origin_topic}
            and (self.first is None or day >= self.first)
            and (self.last is None or day <= self.last)
        )


class _Copies:
    """Tells letters of one record from letters of different records: by origin and value."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str, str, int], str] = {}
        self._first_of_copy: dict[str, str] = {}

    def is_first(self, letter: DeadLetter) -> bool:
        """Note a letter, and tell whether it is the first of its record."""
        if not letter.origin_topic:
            return True  # nobody of ours wrote it
        value_hash = hash((letter.key, letter.value))
        origin = (letter.origin_topic, letter.origin_partition, letter.origin_offset, value_hash)
        first = self._first.setdefault(origin, letter.id)
        if first != letter.id:
            self._first_of_copy[letter.id] = first
        return first == letter.id

    def first_of(self, letter_id: str) -> str:
        """Return the id of the first letter of the same record."""
        return self._first_of_copy.get(letter_id, letter_id)

    def marks(self, marks: Mapping[str, dt.datetime]) -> dict[str, dt.datetime]:
        """Return marks by the first letter of each record: one that was sent back by any of its letters was."""
        return {self.first_of(letter_id): marked_at for letter_id, marked_at in marks.items()}


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The latest letters of those wanted, the latest first, and how many there are of them in all.

    Of several letters of one record there is the first.
    """

    total: int
    letters: tuple[DeadLetter, ...]


async def list_letters(open_topic: OpenTopic, wanted: Wanted, *, limit: int) -> Listing:
    """Look through the topic for the latest letters; of each value the first bytes are kept."""
    kept: list[tuple[_Order, DeadLetter]] = []
    marks: dict[str, dt.datetime] = {}
    copies = _Copies()
    total = 0
    async with open_topic() as replay:
        await replay.take_end()
        async for batch in replay.read():
            for record in batch:
                letter = letter_of(record)
                if letter is None:
                    marks |= _mark_of(record)
                elif copies.is_first(letter) and wanted(letter):
                    total += 1
                    short = msgspec.structs.replace(letter, value=letter.value and letter.value[:KEPT_VALUE_BYTES])
                    heapq.heappush(kept, (_order_of(letter), short))
                    if len(kept) > limit:
                        heapq.heappop(kept)
    marks = copies.marks(marks)
    latest_first = (letter for _, letter in sorted(kept, reverse=True))
    letters = tuple(msgspec.structs.replace(letter, retried_at=marks.get(letter.id)) for letter in latest_first)
    return Listing(total=total, letters=letters)


async def read_letter(open_topic: OpenTopic, letter_id: str) -> DeadLetter:
    """Return one letter, whole. Raises UnknownLetter if it is not there."""
    (letter,) = await _read_whole(open_topic, [letter_id])
    return letter


async def send_back(
    open_topic: OpenTopic,
    publisher: RecordPublisher,
    letter_ids: Sequence[str],
    *,
    clock: Callable[[], dt.datetime],
    again: bool = False,
) -> list[DeadLetter]:
    """Publish letters to where they came from, in the order in which they were buried, and mark each; return them.

    Several letters of one record are sent back once.

    Key, value and headers are as they came, with one header more. Nothing is published unless all of them can be.
    Raises UnknownLetter, and NotSentBack for one that came from no topic of Tripfold or, unless ``again``, was sent
    back before.
    """
    letters = sorted(await _read_whole(open_topic, letter_ids), key=_order_of)
    topics = {letter.id: _origin_of(letter) for letter in letters}
    before = [letter for letter in letters if letter.retried_at is not None]
    if before and not again:
        raise NotSentBack(
            f"already sent back: {', '.join(f'{one.id} ({one.retried_at:%Y-%m-%d %H:%M})' for one in before[:10])}; "
            "--again sends back what was"
        )
    for letter in letters:
        came_from = (RETRIED_FROM_HEADER, f"{Topic.DEAD_LETTERS.value}/{letter.id}".encode())
        await publisher.publish_record(
            topics[letter.id], key=letter.key, value=letter.value, headers=[*letter.headers, came_from]
        )
        mark = (RETRIED_HEADER, f"{letter.id} {clock().isoformat()}".encode())
        await publisher.publish_record(Topic.DEAD_LETTERS, key=letter.key, value=None, headers=[mark])
    return letters


async def _read_whole(open_topic: OpenTopic, letter_ids: Sequence[str]) -> list[DeadLetter]:
    if len(letter_ids) > LETTERS_MAX:
        raise NotSentBack(f"{len(letter_ids)} letters are too many at a time; at most {LETTERS_MAX} are taken")
    for letter_id in letter_ids:
        if not _ID.fullmatch(letter_id):
            raise UnknownLetter(f"{letter_id[:50]!r} is no letter: expected a partition and an offset, such as 3/17")
    found = await _collect(open_topic, frozenset(letter_ids))
    missing = [letter_id for letter_id in letter_ids if letter_id not in found]
    if missing:
        raise UnknownLetter(f"no dead letter {', '.join(missing[:10])} was found; see 'tripfold dead-letters list'")
    return list(dict(found.values()).values())


async def _collect(open_topic: OpenTopic, letter_ids: Collection[str]) -> dict[str, tuple[str, DeadLetter]]:
    """Return letters by their ids, each with the id of the first letter of the same record."""
    found: dict[str, DeadLetter] = {}
    copies = _Copies()
    marks: dict[str, dt.datetime] = {}
    async with open_topic() as replay:
        await replay.take_end()
        async for batch in replay.read():
            for record in batch:
                letter = letter_of(record)
                if letter is None:
                    marks |= _mark_of(record)
                else:
                    copies.is_first(letter)
                    if letter.id in letter_ids:
                        found[letter.id] = letter
    marks = copies.marks(marks)
    firsts = {letter_id: copies.first_of(letter_id) for letter_id in found}
    return {
        letter_id: (firsts[letter_id], msgspec.structs.replace(one, retried_at=marks.get(firsts[letter_id])))
        for letter_id, one in found.items()
    }


def _order_of(letter: DeadLetter) -> _Order:
    partition, _, offset = letter.id.partition("/")
    return letter.buried_at, int(partition), int(offset)


def letter_of(record: ConsumedRecord) -> DeadLetter | None:
    """Return a record of the topic of dead letters as a letter, or None if it is a mark."""
    if _mark_of(record):
        return None
    own, burial = record.headers, dict[str, bytes]()
    if tuple(name for name, _ in own[-len(DEAD_LETTER_HEADERS) :]) == DEAD_LETTER_HEADERS:
        burial = dict(own[-len(DEAD_LETTER_HEADERS) :])
        own = own[: -len(DEAD_LETTER_HEADERS)]

    def text(name: str) -> str:
        return burial.get(name, b"").decode(errors="backslashreplace")

    return DeadLetter(
        id=f"{record.partition}/{record.offset}",
        buried_at=dt.datetime.fromtimestamp(record.timestamp_ms / 1000, dt.UTC),
        origin_topic=text(ORIGIN_TOPIC_HEADER),
        origin_partition=text(ORIGIN_PARTITION_HEADER),
        origin_offset=text(ORIGIN_OFFSET_HEADER),
        error=text(ERROR_HEADER),
        key=record.key,
        value=record.value,
        size_bytes=len(record.value or b""),
        headers=own,
    )


def _mark_of(record: ConsumedRecord) -> dict[str, dt.datetime]:
    """Return which letter a mark says was sent back, and when; nothing if the record is no mark."""
    if len(record.headers) != 1 or record.headers[0][0] != RETRIED_HEADER or record.value is not None:
        return {}
    letter_id, _, written = record.headers[0][1].decode(errors="replace").partition(" ")
    try:
        return {letter_id: dt.datetime.fromisoformat(written)}
    except ValueError:
        return {}


def _origin_of(letter: DeadLetter) -> Topic:
    if any(name == CUT_HEADER for name, _ in letter.headers):
        raise NotSentBack(
            f"letter {letter.id} is the beginning of a longer record, at offset {letter.origin_offset[:20]} of "
            f"partition {letter.origin_partition[:20]} of {letter.origin_topic[:100]}"
        )
    try:
        topic = Topic(letter.origin_topic)
    except ValueError:
        topic = Topic.DEAD_LETTERS
    if topic is Topic.DEAD_LETTERS:
        raise NotSentBack(
            f"letter {letter.id} says that it came from {letter.origin_topic[:100]!r}: no topic to send to"
        )
    return topic
