"""Lists and shows dead letters, and sends them back to the topics that they came from.

The order of effects of a retry: a dead letter is sent back, then marked as sent back. The mark is another record of the
topic of dead letters, which names the dead letter in a header. If the command crashes between the two, the dead letter
looks as if it had not been sent back. Sending it twice is harmless, as is every redelivery of Tripfold's events. The
record that was sent back names its dead letter in a header.

One record can have several dead letters: a process that is restarted while it retries a batch publishes them again.
They have the same origin and value, and count as one dead letter, the first of them.
"""

from __future__ import annotations

import datetime as dt
import heapq
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Annotated

import msgspec
import typer

from services.aggregate.replay.topic_reader import TopicReader
from shared.domain.errors import OperatorError
from shared.domain.ids import utc_now
from shared.domain.topics import Topic
from shared.kafka.dead_letters import (
    CUT_HEADER,
    DEAD_LETTER_HEADERS,
    ERROR_HEADER,
    ORIGIN_OFFSET_HEADER,
    ORIGIN_PARTITION_HEADER,
    ORIGIN_TOPIC_HEADER,
)
from shared.kafka.producer import KafkaPublisher, RecordPublisher
from shared.kafka.records import ConsumedRecord
from shared.runtime.settings import Settings
from tripfold.console import Records, print_remark, printable
from tripfold.operate.command_line import (
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    print_json,
    print_line,
    run_command,
)
from tripfold.operate.topic_audit import kafka_topics

RETRIED_HEADER = "tripfold_retried"
"""In a mark: the dead letter that was sent back."""
RETRIED_FROM_HEADER = "tripfold_retried_from"
"""In a record that was sent back: its dead letter."""

RETRIED_MAX = 10_000
"""The most dead letters that one command sends back."""
KEPT_VALUE_BYTES = 1_000
"""The first bytes of each value that a listing keeps."""
SHOWN_LENGTH_MAX = 300
SHOWN_VALUE_LENGTH_MAX = 20_000

dead_letters_commands = typer.Typer(
    help="Dead letters: records that could not be processed.", no_args_is_help=True, add_completion=False
)

_ID = re.compile(r"[0-9]{1,9}/[0-9]{1,18}")

_Order = tuple[dt.datetime, int, int]

OpenTopic = Callable[[], AbstractAsyncContextManager[TopicReader]]
"""Opens the topic of dead letters for reading once."""

_OriginTopic = Annotated[
    str | None,
    typer.Option("--topic", metavar="TOPIC", help="Only dead letters that came from this topic, such as city-tasks."),
]
_Depth = Annotated[
    int, typer.Option("--depth", metavar="N", min=1, max=10_000_000, help="The last records of each partition to read.")
]


class UnknownDeadLetter(OperatorError):
    """There is no dead letter with this id among the records that were read."""


class NotSentBack(OperatorError):
    """A dead letter cannot be sent back, or already was. The message says which and why."""


class UnknownTopic(OperatorError):
    """Dead letters cannot come from a topic of this name."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A record that could not be processed, unchanged.

    ``id`` is its partition and offset in the topic of dead letters. ``value`` may be only the first of ``size_bytes``
    bytes.
    """

    id: str
    dead_lettered_at: dt.datetime
    origin_topic: str
    origin_partition: str
    origin_offset: str
    error: str
    key: bytes | None
    value: bytes | None
    size_bytes: int
    headers: tuple[tuple[str, bytes], ...]
    retried_at: dt.datetime | None = None


class DeadLetterFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Selects dead letters by origin topic, and by the date (UTC, both included) on which they became dead letters."""

    origin_topic: str | None = None
    first: dt.date | None = None
    last: dt.date | None = None

    def __call__(self, letter: DeadLetter) -> bool:
        """Return whether a dead letter is selected."""
        day = letter.dead_lettered_at.date()
        return (
            self.origin_topic in {None, letter.origin_topic}
            and (self.first is None or day >= self.first)
            and (self.last is None or day <= self.last)
        )


class _Duplicates:
    """Finds dead letters of the same record, by origin and value."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str, str, int], str] = {}
        self._first_of: dict[str, str] = {}

    def is_first(self, letter: DeadLetter) -> bool:
        """Note a dead letter, and return whether it is the first of its record."""
        if not letter.origin_topic:
            return True  # no service of Tripfold wrote it
        value_hash = hash((letter.key, letter.value))
        origin = (letter.origin_topic, letter.origin_partition, letter.origin_offset, value_hash)
        first = self._first.setdefault(origin, letter.id)
        if first != letter.id:
            self._first_of[letter.id] = first
        return first == letter.id

    def first_of(self, letter_id: str) -> str:
        """Return the id of the first dead letter of the same record."""
        return self._first_of.get(letter_id, letter_id)

    def marks(self, marks: Mapping[str, dt.datetime]) -> dict[str, dt.datetime]:
        """Return the marks by the first dead letter of each record: a mark of one counts for all of them."""
        return {self.first_of(letter_id): marked_at for letter_id, marked_at in marks.items()}


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """The latest selected dead letters, the latest first, and the number of all selected ones.

    Duplicates are left out.
    """

    total: int
    letters: tuple[DeadLetter, ...]


@dead_letters_commands.command("list")
def list_command(
    first: FirstDate = None,
    last: LastDate = None,
    topic: _OriginTopic = None,
    *,
    limit: Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="The most dead letters to show.")] = 50,
    depth: _Depth = 100_000,
    as_json: AsJson = False,
) -> None:
    """List dead letters, the latest first: origin, key and error.

    Example: tripfold dead-letters list --topic city-stats --from 2024-05-01
    """
    settings = command_settings()
    selection = _filter(topic, first, last)
    found = run_command(list_dead_letters(_dead_letters_topic(settings, depth), selection, limit=limit))
    if as_json:
        print_json({"total": found.total, "letters": [_for_json(letter) for letter in found.letters]})
        return
    records = Records(
        *("dead letter", "since (UTC)", "from", "key", "error", "sent back"),
        whole={"dead letter"},
        length_max=SHOWN_LENGTH_MAX,
    )
    for one in found.letters:
        origin = f"{one.origin_topic} {one.origin_partition}/{one.origin_offset}"
        back = f"{one.retried_at:%Y-%m-%d %H:%M}" if one.retried_at else ""
        records.add(one.id, f"{one.dead_lettered_at:%Y-%m-%d %H:%M:%S}", origin, _text_of(one.key), one.error, back)
    records.print(console)
    print_remark(f"{len(found.letters):,} of {found.total:,} dead letters.")


@dead_letters_commands.command("show")
def show_command(
    letter_id: Annotated[str, typer.Argument(metavar="ID", help="Partition and offset, as in the list: 3/17.")],
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Write only the value, byte for byte.")] = False,
    depth: _Depth = 100_000,
    as_json: AsJson = False,
) -> None:
    """Show one dead letter: origin, error, key, headers and value.

    Example: tripfold dead-letters show 3/17
    """
    settings = command_settings()
    letter = run_command(read_dead_letter(_dead_letters_topic(settings, depth), letter_id))
    if raw:
        sys.stdout.buffer.write(letter.value or b"")
        return
    if as_json:
        print_json(_for_json(letter))
        return
    lines = {
        "dead letter": letter.id,
        "since": f"{letter.dead_lettered_at:%Y-%m-%d %H:%M:%S} UTC",
        "from": f"{letter.origin_topic}, partition {letter.origin_partition}, offset {letter.origin_offset}",
        "error": letter.error,
        "sent back": f"{letter.retried_at:%Y-%m-%d %H:%M:%S} UTC" if letter.retried_at else "no",
        "key": _text_of(letter.key),
        **{f"header {name}": _text_of(value) for name, value in letter.headers},
        f"value, {letter.size_bytes:,} bytes": _text_of(letter.value),
    }
    for name, text in lines.items():
        print_line(f"[bold]{printable(name)}[/bold]  {printable(text, length_max=SHOWN_VALUE_LENGTH_MAX)}")


@dead_letters_commands.command("retry")
def retry_command(
    letter_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Dead letters, as in the list.")
    ] = None,
    first: FirstDate = None,
    last: LastDate = None,
    topic: _OriginTopic = None,
    *,
    everything: Annotated[
        bool, typer.Option("--all", help="All that --topic, --from and --to select and that were not sent back yet.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also those that were sent back before.")] = False,
    depth: _Depth = 100_000,
    as_json: AsJson = False,
) -> None:
    """Send dead letters back to the topics that they came from, unchanged: after an upgrade that can read them.

    Each is marked in the topic of dead letters, and not sent back again without --again. A record that still cannot be
    processed comes back as a new dead letter.

    Example: tripfold dead-letters retry 3/17 3/18
    """
    if everything == bool(letter_ids):
        raise typer.BadParameter("give ids, or select with --all", param_hint="ID")
    settings = command_settings()
    selection = _filter(topic, first, last)
    open_topic = _dead_letters_topic(settings, depth)

    async def retry() -> list[DeadLetter]:
        selected: Sequence[str] = letter_ids or ()
        if not selected:
            listing = await list_dead_letters(open_topic, selection, limit=RETRIED_MAX)
            selected = [letter.id for letter in listing.letters if again or letter.retried_at is None]
        async with KafkaPublisher(settings, source="retry") as publisher:
            return await send_back(open_topic, publisher, selected, clock=utc_now, again=again)

    letters = run_command(retry())
    if as_json:
        print_json([{"id": letter.id, "topic": letter.origin_topic} for letter in letters])
        return
    for letter in letters:
        console.print(f"Sent {letter.id} back to {letter.origin_topic}.")
    if not letters:
        console.print("Nothing to send back.")


def _filter(topic: str | None, first: dt.datetime | None, last: dt.datetime | None) -> DeadLetterFilter:
    known = [one.value for one in Topic if one is not Topic.DEAD_LETTERS]
    if topic is not None and topic not in known:
        raise UnknownTopic(f"there is no topic {topic[:100]!r}: expected one of {', '.join(known)}")
    first_date, last_date = date_range(first, last)
    return DeadLetterFilter(origin_topic=topic, first=first_date, last=last_date)


def _dead_letters_topic(settings: Settings, depth: int) -> OpenTopic:
    return partial(kafka_topics(settings, last_records_max=depth), Topic.DEAD_LETTERS)


def _for_json(letter: DeadLetter) -> dict[str, object]:
    """Return a dead letter for JSON: bytes become text, in which bytes that are not UTF-8 are escaped."""
    fields = msgspec.structs.asdict(letter)
    fields["key"] = None if letter.key is None else _text_of(letter.key)
    fields["value"] = None if letter.value is None else _text_of(letter.value)
    fields["headers"] = [[name, _text_of(value)] for name, value in letter.headers]
    return fields


def _text_of(data: bytes | None) -> str:
    return "none" if data is None else data.decode(errors="backslashreplace")


async def list_dead_letters(open_topic: OpenTopic, selection: DeadLetterFilter, *, limit: int) -> Listing:
    """Read the topic; return the latest selected dead letters, with the first bytes of each value."""
    kept: list[tuple[_Order, DeadLetter]] = []
    marks: dict[str, dt.datetime] = {}
    duplicates = _Duplicates()
    total = 0
    async with open_topic() as replay:
        await replay.take_end()
        async for batch in replay.read():
            for record in batch:
                letter = as_dead_letter(record)
                if letter is None:
                    marks |= _mark_of(record)
                elif duplicates.is_first(letter) and selection(letter):
                    total += 1
                    short = msgspec.structs.replace(letter, value=letter.value and letter.value[:KEPT_VALUE_BYTES])
                    heapq.heappush(kept, (_order_of(letter), short))
                    if len(kept) > limit:
                        heapq.heappop(kept)
    marks = duplicates.marks(marks)
    latest_first = (letter for _, letter in sorted(kept, reverse=True))
    letters = tuple(msgspec.structs.replace(letter, retried_at=marks.get(letter.id)) for letter in latest_first)
    return Listing(total=total, letters=letters)


async def read_dead_letter(open_topic: OpenTopic, letter_id: str) -> DeadLetter:
    """Return one dead letter with its whole value. Raises UnknownDeadLetter if there is none."""
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
    """Publish dead letters to their origin topics, the oldest first, and mark each; return them.

    Several dead letters of one record are sent back once. Key, value and headers are unchanged, with one header more.
    Publishes nothing unless every dead letter can be sent back. Raises UnknownDeadLetter, and NotSentBack for one that
    came from no topic of Tripfold or, unless ``again``, was sent back before.
    """
    letters = sorted(await _read_whole(open_topic, letter_ids), key=_order_of)
    topics = {letter.id: _origin_of(letter) for letter in letters}
    before = [letter for letter in letters if letter.retried_at is not None]
    if before and not again:
        raise NotSentBack(
            f"already sent back: {', '.join(f'{one.id} ({one.retried_at:%Y-%m-%d %H:%M})' for one in before[:10])}. "
            "Send them back again: --again."
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
    if len(letter_ids) > RETRIED_MAX:
        raise NotSentBack(
            f"{len(letter_ids):,} dead letters are too many for one command: name at most {RETRIED_MAX:,}"
        )
    for letter_id in letter_ids:
        if not _ID.fullmatch(letter_id):
            raise UnknownDeadLetter(f"the id is {letter_id[:50]!r}; it must be a partition and an offset, such as 3/17")
    found = await _collect(open_topic, frozenset(letter_ids))
    missing = [letter_id for letter_id in letter_ids if letter_id not in found]
    if missing:
        raise UnknownDeadLetter(
            f"there is no dead letter {', '.join(missing[:10])}. List them: 'tripfold dead-letters list'."
        )
    return list(dict(found.values()).values())


async def _collect(open_topic: OpenTopic, letter_ids: Collection[str]) -> dict[str, tuple[str, DeadLetter]]:
    """Return dead letters by their ids, each with the id of the first one of the same record."""
    found: dict[str, DeadLetter] = {}
    duplicates = _Duplicates()
    marks: dict[str, dt.datetime] = {}
    async with open_topic() as replay:
        await replay.take_end()
        async for batch in replay.read():
            for record in batch:
                letter = as_dead_letter(record)
                if letter is None:
                    marks |= _mark_of(record)
                else:
                    duplicates.is_first(letter)
                    if letter.id in letter_ids:
                        found[letter.id] = letter
    marks = duplicates.marks(marks)
    firsts = {letter_id: duplicates.first_of(letter_id) for letter_id in found}
    return {
        letter_id: (firsts[letter_id], msgspec.structs.replace(one, retried_at=marks.get(firsts[letter_id])))
        for letter_id, one in found.items()
    }


def _order_of(letter: DeadLetter) -> _Order:
    partition, _, offset = letter.id.partition("/")
    return letter.dead_lettered_at, int(partition), int(offset)


def as_dead_letter(record: ConsumedRecord) -> DeadLetter | None:
    """Return a record of the topic of dead letters as a DeadLetter, or None if it is a mark."""
    if _mark_of(record):
        return None
    own, added = record.headers, dict[str, bytes]()
    if tuple(name for name, _ in own[-len(DEAD_LETTER_HEADERS) :]) == DEAD_LETTER_HEADERS:
        added = dict(own[-len(DEAD_LETTER_HEADERS) :])
        own = own[: -len(DEAD_LETTER_HEADERS)]

    def text(name: str) -> str:
        return added.get(name, b"").decode(errors="backslashreplace")

    return DeadLetter(
        id=f"{record.partition}/{record.offset}",
        dead_lettered_at=dt.datetime.fromtimestamp(record.timestamp_ms / 1000, dt.UTC),
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
    """Return the dead letter that a mark names, and when it was sent back; nothing if the record is no mark."""
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
            f"dead letter {letter.id} does not hold the whole record at offset {letter.origin_offset[:20]} of "
            f"partition {letter.origin_partition[:20]} of {letter.origin_topic[:100]}"
        )
    try:
        topic = Topic(letter.origin_topic)
    except ValueError:
        topic = Topic.DEAD_LETTERS
    if topic is Topic.DEAD_LETTERS:
        raise NotSentBack(
            f"dead letter {letter.id} came from {letter.origin_topic[:100]!r}, which is no topic to send it back to"
        )
    return topic
