"""Rebuilds all summaries into a new generation beside the live one, and makes the new one live.

The order of effects, in which no reader sees an incomplete generation and no event is lost:

1. Set the building generation in the pointer, with a number never used before, under this rebuild's token.
2. From now on, aggregates fold into both generations before they commit: they read the pointer after each batch.
3. Take the end of the topic (or list plans and manifests), and fold everything before it into the building generation.
   A batch that an aggregate received before it saw the pointer lies before that end, and its manifests were written
   before the batch was published. A rebuild from Kafka folds the manifests at the end, too.
4. Compare both generations, the live one read first. Aggregates write the live one last, so it is never ahead.
5. Count all months in the change index, and flip the pointer under the token, unless a revision would go back.
6. After a rebuild from S3, fill the compacted topics again.

No reader needs the building generation yet. So step 3 holds events back, up to a number of bytes, until the events of
their country-day are together: each saves a read and a write. Aggregates write by compare-and-swap, and so does this.

A rebuild that crashes changes nothing that readers see. Its generation stays, and its number is never used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from services.aggregate.bucket_reader import SOURCE_PREFIXES, Dates, known_dates, read_events, read_summaries
from services.aggregate.fold import StatEvent, as_stat_event
from services.aggregate.replay import generations
from services.aggregate.replay.diff import Change, change_of
from services.aggregate.replay.topic_reader import RawReader, RawRecord
from services.aggregate.summary_writer import SummaryWriter, publish_summary
from shared.domain import events, keys, objects
from shared.domain.errors import OperatorError
from shared.domain.events import NewerContract, PoisonRecord
from shared.domain.ids import CountrySlug
from shared.domain.objects import CorruptObject, NewerObject, Summary
from shared.domain.topics import Topic, affinity_of
from shared.kafka.producer import Publisher
from shared.kafka.records import OutgoingEvent
from shared.runtime.concurrency import bounded_map, prefetch
from shared.runtime.retry import DependencyUnavailable
from shared.storage.change_index import ChangeCounter
from shared.storage.object_store import AdminObjectStore, StoredObject

PENDING_BYTES_MAX = 8 * 1024 * 1024
RECORD_BYTES = 144
"""The memory of a record without the bytes of its value."""
FOLDS_AT_ONCE_MAX = 32
CHANGES_KEPT_MAX = 10_000
NEWER_NAMED_MAX = 5

EVERY_DATE = Dates()

Report = Callable[[str, int, int, int], None]
"""Reports progress: the name of the step, how much is done, the total, and the number of events read so far."""


class RebuildRefused(OperatorError):
    """A source of the summaries cannot be read, so a generation without it would be wrong."""


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a rebuild.

    ``changes`` holds at most CHANGES_KEPT_MAX of ``changes_total``. ``refused`` is the reason why the generation was
    not made live: a revision in it is older than the live one, or it lacks ``newer_records`` of the topic.
    """

    generation: int
    live_before: int
    events: int
    poison_records: int
    newer_records: int
    country_days: int
    changes: list[Change]
    changes_total: int
    flipped: bool
    refused: str | None = None


_Body = tuple[bytes, int, int]
"""The value, partition and offset of a record."""


class _PendingRecords:
    """Undecoded records that wait for others of their country-day, bounded in bytes.

    Their keys begin with the country-day. A decoded event takes a dozen times as many objects as a record, so the fold
    decodes it. Over the bound, the country-days leave first that have had no new record for the longest time.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._groups: OrderedDict[bytes, list[_Body]] = OrderedDict()

    def add(self, batch: Iterable[RawRecord]) -> None:
        """Hold records, by their country-day."""
        groups = self._groups
        for key, value, partition, offset in batch:
            group = affinity_of(key or b"")
            body = (value or b"", partition, offset)  # neither is an event
            self._bytes += RECORD_BYTES + len(body[0])
            if group in groups:
                groups.move_to_end(group)
                groups[group].append(body)
            else:
                groups[group] = [body]

    def take(self, *, whole: bool = False) -> list[list[_Body]]:
        """Return the groups that are over the bound, or all."""
        taken = []
        while self._groups and (whole or self._bytes > self._bytes_max):
            _, bodies = self._groups.popitem(last=False)
            self._bytes -= RECORD_BYTES * len(bodies) + sum(len(value) for value, _, _ in bodies)
            taken.append(bodies)
        return taken


class Rebuild:
    """One rebuild, under its own ``token``.

    ``reader`` is the topic to read, and ``seed`` is a generation to begin with. At most ``pending_bytes_max`` of
    records wait for more events of their country-days.
    """

    def __init__(
        self,
        store: AdminObjectStore,
        publisher: Publisher,
        *,
        token: str,
        report: Report,
        reader: RawReader | None = None,
        seed: int | None = None,
        pending_bytes_max: int = PENDING_BYTES_MAX,
    ) -> None:
        self._store = store
        self._publisher = publisher
        self._token = token
        self._report = report
        self._reader = reader
        self._seed = seed
        self._writer = SummaryWriter(store, cache_bytes=0)  # a country-day seldom comes twice
        self._changes = ChangeCounter(store)
        self._months: set[str] = set()
        self._pending_bytes_max = pending_bytes_max
        self._events = 0
        self._poison_records = 0
        self._newer_records = 0
        self._newer_named: list[str] = []

    async def run(self, *, take_over: bool = False, dry_run: bool = False) -> Rebuilt:
        """Rebuild. A ``dry_run`` ends before the flip and deletes the generation that it built.

        Raises RebuildInProgress, RebuildTakenOver, RebuildRefused and the errors of S3 and Kafka. The live generation
        then stays as it was.
        """
        if self._seed is not None:
            await generations.require_summaries(self._store, self._seed)
        try:
            rebuilt = await self._build(take_over=take_over, dry_run=dry_run)
        except generations.RebuildInProgress:
            raise
        except (Exception, asyncio.CancelledError):
            with contextlib.suppress(DependencyUnavailable):
                await generations.abandon(self._store, self._token)
            raise
        if not rebuilt.flipped:
            await generations.abandon(self._store, self._token)
            await generations.delete_summaries(self._store, rebuilt.generation)
        elif self._reader is None:
            await self._fill_topics(rebuilt.generation)
        return rebuilt

    async def _build(self, *, take_over: bool, dry_run: bool) -> Rebuilt:
        pointer = await generations.begin(self._store, self._token, take_over=take_over)
        number = pointer.building
        assert number is not None
        if self._reader is not None:
            await self._fold_topic(self._reader, number)
        if self._seed is not None:
            await self._join_seed(self._seed, number)
        await self._fold_bucket(number)
        country_days, changes, total, refused = await self._compare(pointer.live, number)
        refused = self._refused_for_newer() or refused
        flipped = not dry_run and refused is None
        if flipped:
            await self._changes.count(number, self._months)
            await generations.flip(self._store, self._token, number)
        return Rebuilt(
            generation=number,
            live_before=pointer.live,
            events=self._events,
            poison_records=self._poison_records,
            newer_records=self._newer_records,
            country_days=country_days,
            changes=changes,
            changes_total=total,
            flipped=flipped,
            refused=refused,
        )

    async def _fold_topic(self, reader: RawReader, number: int) -> None:
        total = await reader.take_end()
        done = 0
        self._report("reading the topic", done, total, self._events)
        pending = _PendingRecords(self._pending_bytes_max)
        async with contextlib.aclosing(prefetch(reader.read_raw())) as batches:
            async for batch in batches:
                pending.add(batch)
                await self._fold_records(number, pending.take())
                done += len(batch)
                self._report("reading the topic", done, total, self._events)
        await self._fold_records(number, pending.take(whole=True))
        self._report("reading the topic", done, total, self._events)

    async def _fold_records(self, number: int, groups: Sequence[Sequence[_Body]]) -> None:
        async def fold_group(bodies: Sequence[_Body]) -> None:
            # All are of one country-day, unless a record has the wrong key.
            for of_country_day in _by_country_day(self._decoded(bodies)):
                await self._writer.fold(number, of_country_day)

        await bounded_map(fold_group, groups, limit=FOLDS_AT_ONCE_MAX)

    def _decoded(self, bodies: Sequence[_Body]) -> list[StatEvent]:
        decoded = []
        for value, partition, offset in bodies:
            try:
                decoded.append(as_stat_event(events.decode(Topic.CITY_STATS, value)))
            except PoisonRecord:
                self._poison_records += 1  # a dead letter of the aggregate: it is in no summary
            except NewerContract as error:
                self._newer_records += 1
                if len(self._newer_named) < NEWER_NAMED_MAX:
                    place = f"{error.topic.value}, partition {partition}, offset {offset}"
                    self._newer_named.append(f"{place}: type {error.kind[:100]!r}, schema version {error.version}")
        self._events += len(decoded)
        return decoded

    def _refused_for_newer(self) -> str | None:
        if not self._newer_records:
            return None
        more = self._newer_records - len(self._newer_named)
        named = "; ".join(self._newer_named) + (f"; and {more:,} more" if more else "")
        return (
            f"{self._newer_records:,} records were left out, because this build does not know their schema version "
            f"({named}). Upgrade this build, then run this again, or run 'tripfold rebuild --from s3'"
        )

    async def _join_seed(self, seed: int, number: int) -> None:
        dates = await known_dates(self._store, EVERY_DATE, keys.summaries_of_generation(seed))
        for done, date in enumerate(dates, 1):
            for country, found in (await read_summaries(self._store, seed, date)).items():
                summary = _decode(found, keys.summary(seed, date, country))
                if summary is not None:
                    await self._writer.join(number, summary)
            self._report(f"copying generation {seed}", done, len(dates), self._events)

    async def _fold_bucket(self, number: int) -> None:
        dates = await known_dates(self._store, EVERY_DATE, *SOURCE_PREFIXES)
        for done, date in enumerate(dates, 1):
            by_country = await self._bucket_events(date)
            await self._fold_groups(number, list(by_country.values()))
            self._events += sum(map(len, by_country.values()))
            self._report("reading plans and manifests", done, len(dates), self._events)

    async def _bucket_events(self, date: dt.date) -> dict[CountrySlug, list[StatEvent]]:
        read = await read_events(self._store, date)
        if read.unreadable:
            raise RebuildRefused("; ".join(reason for _, reason in sorted(read.unreadable.items())))
        return dict(sorted(read.by_country.items()))

    async def _fold_groups(self, number: int, groups: Sequence[Sequence[StatEvent]]) -> None:
        """Fold groups of events, each of one country-day."""
        await bounded_map(lambda group: self._writer.fold(number, group), groups, limit=FOLDS_AT_ONCE_MAX)

    async def _compare(self, live: int, built: int) -> tuple[int, list[Change], int, str | None]:
        """Compare all country-days. Return their number, the changes, the count of changes, and a reason to refuse."""
        dates = await known_dates(self._store, EVERY_DATE, *map(keys.summaries_of_generation, (live, built)))
        self._months = set(map(keys.month_of, dates))
        country_days = total = 0
        changes: list[Change] = []
        older: list[str] = []
        for done, date in enumerate(dates, 1):
            of_live = await read_summaries(self._store, live, date)
            of_built = await read_summaries(self._store, built, date)
            for country in sorted({*of_live, *of_built}):
                country_days += 1
                before = _decode(of_live.get(country), keys.summary(live, date, country))
                after = _decode(of_built.get(country), keys.summary(built, date, country))
                change = change_of(before, after, unreadable=before is None and country in of_live)
                if change is None:
                    continue
                total += 1
                if len(changes) < CHANGES_KEPT_MAX:
                    changes.append(change)
                if change.goes_back and len(older) < 5:
                    older.append(f"{date}/{country}: {', '.join(change.goes_back)}")
            self._report("comparing with the live generation", done, len(dates), self._events)
        refused = (
            f"the live generation has newer revisions than manifests and plans: {'; '.join(older)}. If manifests and "
            f"plans are right, run 'tripfold repair', then run this again"
        )
        return country_days, changes, total, refused if older else None

    async def _fill_topics(self, number: int) -> None:
        """Publish the events of all manifests and plans, and all live summaries.

        A record may follow a newer one of its key. Then the aggregates publish the newer one again.
        """
        dates = await known_dates(self._store, EVERY_DATE, *SOURCE_PREFIXES, keys.summaries_of_generation(number))
        for done, date in enumerate(dates, 1):
            by_country = await self._bucket_events(date)
            await self._publisher.publish(OutgoingEvent(event) for group in by_country.values() for event in group)
            countries = sorted(await read_summaries(self._store, number, date))
            await bounded_map(
                lambda country, date=date: publish_summary(  # type: ignore[misc]  # the default binds this date
                    self._store, self._publisher, self._changes, generation=number, date=date, country=country
                ),
                countries,
                limit=FOLDS_AT_ONCE_MAX,
            )
            self._report("filling the topics", done, len(dates), self._events)


def _by_country_day(events_of_group: list[StatEvent]) -> list[list[StatEvent]]:
    if not events_of_group:
        return []
    date, country = events_of_group[0].date, events_of_group[0].country
    if all(event.country == country and event.date == date for event in events_of_group):
        return [events_of_group]  # nearly always, and much cheaper than grouping
    groups: dict[tuple[dt.date, CountrySlug], list[StatEvent]] = {}
    for event in events_of_group:
        groups.setdefault((event.date, event.country), []).append(event)
    return list(groups.values())


def _decode(found: StoredObject | None, key: str) -> Summary | None:
    """Decode a summary. One that cannot be read counts as missing: the rebuild replaces it."""
    if found is None:
        return None
    try:
        return objects.decode(Summary, found.body, key)
    except NewerObject as error:
        raise RebuildRefused(str(error)) from error
    except CorruptObject:
        return None
