"""Compares the compacted topics with the bucket, date by date.

The topic is read to its end first, then the bucket. So only the bucket can be ahead, by events that are on their way.
Where the two differ, the new records of the topic are read after a wait, and the dates that differed are compared
again. A difference counts after a bounded number of comparisons.

The number of keys in memory is bounded. A topic with more records is read several times, each time for other dates.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import msgspec

from services.aggregate.bucket_reader import SOURCE_PREFIXES, Dates, known_dates, read_events, read_summaries
from services.aggregate.replay.topic_reader import KafkaTopicReader, RewindableReader
from services.aggregate.summary_writer import summary_event
from shared.domain import keys, objects
from shared.domain.events import Event
from shared.domain.objects import CorruptObject, Summary
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.runtime.settings import Settings
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore
from tripfold.console import print_remark, printable
from tripfold.operate.command_line import console, print_line
from tripfold.operate.topic_records import (
    LastRecords,
    RecordDifference,
    UnreadRecord,
    UnreadRecords,
    date_of,
    record_differences,
)

KEYS_AT_ONCE_MAX = 200_000
COMPARISONS_MAX = 4
UNREAD_LINES_MAX = 20

Wait = Callable[[int], Awaitable[None]]
OpenTopic = Callable[[Topic], contextlib.AbstractAsyncContextManager[RewindableReader]]
Report = Callable[[str, int, int], None]
"""Takes the progress of a step: its name, what is done, and the total."""


class AuditedDate(msgspec.Struct, frozen=True, kw_only=True):
    """The differences of one date in one topic, and the number of keys that were compared."""

    topic: Topic
    date: dt.date
    keys: int
    differences: list[RecordDifference]


class TopicAudit:
    """Compares topics with the bucket. ``keys_at_once_max`` bounds its memory, at about 300 bytes a key.

    ``unread`` has the records that this build cannot read and skips.
    """

    def __init__(
        self,
        store: AdminObjectStore,
        open_topic: OpenTopic,
        *,
        wait: Wait,
        report: Report,
        keys_at_once_max: int = KEYS_AT_ONCE_MAX,
    ) -> None:
        self._store = store
        self._open_topic = open_topic
        self._wait = wait
        self._report = report
        self._keys_at_once_max = keys_at_once_max
        self.unread = UnreadRecords()

    async def run(self, topic: Topic, dates: Dates) -> AsyncIterator[AuditedDate]:
        """Compare a topic with the bucket over a range of dates."""
        async with self._open_topic(topic) as reader:
            for group in await self._groups(topic, reader, dates):
                async for audited in self._of_group(topic, reader, group):
                    yield audited

    async def _groups(self, topic: Topic, reader: RewindableReader, dates: Dates) -> list[list[dt.date]]:
        """Divide the dates into groups that each fit in memory, by counting the records of the topic."""
        records: Counter[dt.date] = Counter()
        async for batch in self._read(topic, reader, "counting"):
            records.update(date for record in batch if (date := date_of(record)) is not None and date in dates)
        live = (await read_current(self._store)).live
        of_bucket = SOURCE_PREFIXES if topic is Topic.CITY_STATS else (keys.summaries_of_generation(live),)
        found = sorted({*records, *await known_dates(self._store, dates, *of_bucket)})
        groups: list[list[dt.date]] = []
        held = 0
        for date in found:
            if not groups or held + records[date] > self._keys_at_once_max:
                groups.append([])
                held = 0
            groups[-1].append(date)
            held += records[date]
        return groups or [[]]  # without any date the topic is still read: it may hold unreadable records

    async def _of_group(
        self, topic: Topic, reader: RewindableReader, dates: list[dt.date]
    ) -> AsyncIterator[AuditedDate]:
        await reader.rewind()
        seen = LastRecords(frozenset(dates), self.unread)
        async for batch in self._read(topic, reader, "reading"):
            seen.add(batch)
        pending = dates
        for look in range(1, COMPARISONS_MAX + 1):
            if look > 1:
                await self._wait(look)
                async for batch in self._read(topic, reader, "reading"):
                    seen.add(batch)
            differing: list[dt.date] = []
            for done, date in enumerate(pending, 1):
                audited = await self._compare(topic, date, seen)
                if look == COMPARISONS_MAX or not audited.differences:
                    yield audited
                else:
                    differing.append(date)
                self._report(f"{topic.value}: comparing", done, len(pending))
            pending = differing
            if not pending:
                return

    async def _read(self, topic: Topic, reader: RewindableReader, step: str) -> AsyncIterator[Sequence[ConsumedRecord]]:
        total = await reader.take_end()
        done = 0
        async for batch in reader.read():
            yield batch
            done += len(batch)
            self._report(f"{topic.value}: {step}", done, total)

    async def _compare(self, topic: Topic, date: dt.date, seen: LastRecords) -> AuditedDate:
        of_date = seen.of_date(date)
        expected, unreadable = await (_stats if topic is Topic.CITY_STATS else _summaries)(self._store, date)
        differences = record_differences(topic, date, of_date, expected)
        if unreadable:
            # An unreadable object may stand for any key, so no key counts as unknown to the bucket.
            differences = [difference for difference in differences if not difference.unnamed]
            differences += [
                RecordDifference(topic=topic, date=date, key=key, what="object", found=reason, expected="readable")
                for key, reason in sorted(unreadable.items())
            ]
        return AuditedDate(topic=topic, date=date, keys=len({*of_date, *expected}), differences=differences)


async def _stats(store: AdminObjectStore, date: dt.date) -> tuple[Mapping[str, Event], dict[str, str]]:
    """Return the events of the plan and manifests of a date by key, and the unreadable objects with the reason."""
    read = await read_events(store, date)
    return {event.key: event for of_country in read.by_country.values() for event in of_country}, read.unreadable


async def _summaries(store: AdminObjectStore, date: dt.date) -> tuple[Mapping[str, Event], dict[str, str]]:
    """Return the events of the live summaries of a date by key, and the unreadable objects with the reason."""
    live = (await read_current(store)).live
    expected: dict[str, Event] = {}
    unreadable: dict[str, str] = {}
    for country, found in (await read_summaries(store, live, date)).items():
        key = keys.summary(live, date, country)
        try:
            summary = objects.decode(Summary, found.body, key)
        except CorruptObject as error:
            unreadable[key] = str(error)
            continue
        if summary.version:
            event = summary_event(summary)
            expected[event.key] = event
    return expected, unreadable


def kafka_topics(
    settings: Settings, *, last_records_max: int | None = None
) -> Callable[[Topic], contextlib.AbstractAsyncContextManager[KafkaTopicReader]]:
    """Return a function that opens a topic on the Kafka of the settings.

    At the end it names the records that the Kafka client could not decode.
    """

    @contextlib.asynccontextmanager
    async def open_topic(topic: Topic) -> AsyncIterator[KafkaTopicReader]:
        reader = KafkaTopicReader(settings, topic, last_records_max=last_records_max)
        try:
            yield reader
        finally:
            await reader.close()
            for bad in reader.undecodable.values():
                print_remark(printable(f"The Kafka client cannot decode {bad.place} of {topic.value}: {bad.why}."))

    return open_topic


def print_unread(total: int, named: Sequence[UnreadRecord]) -> None:
    """Name the records that were skipped because this build cannot read them."""
    for one in named[:UNREAD_LINES_MAX]:
        print_line(f"Skipped: {printable(str(one))}")
    if total > UNREAD_LINES_MAX:
        console.print(f"{total - UNREAD_LINES_MAX:,} more records were skipped; --json names up to 1,000.")
