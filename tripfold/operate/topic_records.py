"""Compares the records of a compacted topic with the events of the bucket, key by key. Pure.

Consumers keep the highest revision of a key; compaction keeps its last record. Both must equal the event of the bucket.
Then a consumer that has always run and one that starts after a compaction have the same data.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Mapping

import msgspec

from shared.domain import events
from shared.domain.events import (
    CityDayRetracted,
    CityDayStats,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    NewerContract,
    PoisonRecord,
)
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord

NOTHING = "nothing"
UNREADABLE = 0
"""Stands for the revision of a record that cannot be decoded. Revisions begin at 1."""
UNREAD_MAX = 100_000
UNREAD_NAMED_MAX = 1_000


class Seen(msgspec.Struct):
    """The last record of a key, and the one of the highest revision: its revision, and a hash of its content."""

    last: int
    last_hash: int
    highest: int
    highest_hash: int


class RecordDifference(msgspec.Struct, frozen=True, kw_only=True):
    """A key whose records differ from the event of the bucket.

    ``ahead`` is the revision of the topic if it is higher than the bucket's: publishing again cannot repair that.
    ``unnamed`` marks a key that no object in the bucket has.
    """

    topic: Topic
    date: dt.date
    key: str
    what: str
    found: str
    expected: str
    ahead: int | None = None
    unnamed: bool = False


class UnreadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A skipped record: its place, and why this build cannot read it (a later version, or not an event).

    The reason of a ``newer`` record names its place too.
    """

    topic: Topic
    partition: int
    offset: int
    newer: bool
    why: str

    def __str__(self) -> str:
        place = f"{self.topic.value}, partition {self.partition}, offset {self.offset}"
        return self.why if self.newer else f"{place}: {self.why}"


class UnreadRecords:
    """The skipped records: their number (up to a bound), and the first of them. A repeated record counts once."""

    def __init__(self) -> None:
        self.named: list[UnreadRecord] = []
        self._places: set[tuple[Topic, int, int]] = set()

    @property
    def total(self) -> int:
        """The number of skipped records."""
        return len(self._places)

    def note(self, record: ConsumedRecord, error: PoisonRecord | NewerContract) -> None:
        """Note a skipped record, and why it was skipped."""
        place = (record.topic, record.partition, record.offset)
        if place in self._places or self.total == UNREAD_MAX:
            return
        self._places.add(place)
        if len(self.named) < UNREAD_NAMED_MAX:
            newer = isinstance(error, NewerContract)
            why = str(error.at(record.partition, record.offset) if isinstance(error, NewerContract) else error)
            topic, partition, offset = place
            self.named.append(UnreadRecord(topic=topic, partition=partition, offset=offset, newer=newer, why=why))

    def decode(self, record: ConsumedRecord) -> Event | None:
        """Return the event of a record, or note the record and return None."""
        try:
            return events.decode(record.topic, record.value)
        except (PoisonRecord, NewerContract) as error:
            self.note(record, error)
            return None


class LastRecords:
    """The last and the highest record of each key of some dates (None: of all). Takes about 300 bytes a key."""

    def __init__(self, dates: Collection[dt.date] | None, unread: UnreadRecords | None = None) -> None:
        self._dates = dates
        self._unread = unread or UnreadRecords()
        self._by_date: dict[dt.date, dict[str, Seen]] = {}
        self.records = 0

    def add(self, records: Iterable[ConsumedRecord]) -> None:
        """Note records, in the order of their topic. Unreadable ones are noted as such, and skipped."""
        for record in records:
            date = date_of(record)
            if date is None:
                self._unread.decode(record)  # notes an unreadable record
            if date is None or (self._dates is not None and date not in self._dates):
                continue
            self.records += 1
            self._note(date, (record.key or b"").decode(errors="replace"), *self._read(record))

    def _read(self, record: ConsumedRecord) -> tuple[int, int]:
        event = self._unread.decode(record)
        return (UNREADABLE, 0) if event is None else (revision_of(event), _hash_of(event))

    def of_date(self, date: dt.date) -> Mapping[str, Seen]:
        """Return the records of each key of a date."""
        return self._by_date.get(date, {})

    @property
    def dates(self) -> set[dt.date]:
        """The dates of all keys."""
        return set(self._by_date)

    def _note(self, date: dt.date, key: str, revision: int, content_hash: int) -> None:
        of_date = self._by_date.setdefault(date, {})
        seen = of_date.get(key)
        if seen is None:
            of_date[key] = Seen(revision, content_hash, revision, content_hash)
            return
        seen.last, seen.last_hash = revision, content_hash
        if revision >= seen.highest:
            seen.highest, seen.highest_hash = revision, content_hash


def date_of(record: ConsumedRecord) -> dt.date | None:
    """Return the date at the beginning of a record's key, or None if there is none."""
    try:
        return dt.date.fromisoformat((record.key or b"")[:10].decode())
    except ValueError:
        return None


def revision_of(event: Event) -> int:
    """Return the number in an event of a compacted topic that grows with every change."""
    match event:
        case CityDayStats() | CityDayRetracted():
            return event.revision
        case CountryDayPlanned():
            return event.plan_revision
        case CountryDaySummary():
            return event.version
    raise AssertionError(f"{type(event).__name__} is in no compacted topic")


def record_differences(
    topic: Topic, date: dt.date, seen: Mapping[str, Seen], expected: Mapping[str, Event]
) -> list[RecordDifference]:
    """Compare the records of a date with the events of the bucket, by key."""
    differences = []
    for key in sorted({*seen, *expected}):
        difference = _of_key(topic, date, key, seen.get(key), expected)
        if difference is not None:
            differences.append(difference)
    return differences


def _of_key(
    topic: Topic, date: dt.date, key: str, seen: Seen | None, expected: Mapping[str, Event]
) -> RecordDifference | None:
    event = expected.get(key)
    if event is None:
        assert seen is not None
        if seen.highest == UNREADABLE:  # it is named among the skipped records
            return None
        if _is_left_over(key, seen, expected):
            return None
        return RecordDifference(
            topic=topic, date=date, key=key, what="record", found=_text(seen.highest), expected=NOTHING, unnamed=True
        )
    revision, content_hash = revision_of(event), _hash_of(event)
    if seen is None:
        return RecordDifference(topic=topic, date=date, key=key, what="record", found=NOTHING, expected=_text(revision))
    for what, found, found_hash in (
        ("highest record", seen.highest, seen.highest_hash),
        ("last record", seen.last, seen.last_hash),
    ):
        if (found, found_hash) != (revision, content_hash):
            other = " of other content" if found == revision else ""
            return RecordDifference(
                topic=topic,
                date=date,
                key=key,
                what=what,
                found=_text(found) + other,
                expected=_text(revision),
                ahead=found if found > revision else None,
            )
    return None


def _is_left_over(key: str, seen: Seen, expected: Mapping[str, Event]) -> bool:
    """Return whether this is a chunk of an older plan, of which the newer plan has fewer."""
    country_day, _, chunk = key.rpartition("/")
    plan = expected.get(country_day)
    return chunk.startswith("+") and isinstance(plan, CountryDayPlanned) and seen.highest < plan.plan_revision


def _hash_of(event: Event) -> int:
    return hash(events.encode(event))


def _text(revision: int) -> str:
    return f"revision {revision}" if revision else "cannot be decoded"
