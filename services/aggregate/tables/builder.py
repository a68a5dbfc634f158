"""Builds the Parquet tables of the bucket from the live summaries, a month at a time.

Any number of processes build at once. The effects of a build, in their order:

1. It reads the two files of the month, and then lists the month's summaries. It reads only the summaries whose
   version the file does not have, and copies the other rows.
2. It writes each file by compare-and-swap on the version that it read. So a file never goes back to an earlier listing:
   a build that began before the last write conflicts, and gives up.
3. It records the summaries that the files show, and the ETags of the files, in ``lake/tables.json``.

After a crash between two of these, the record does not fit the files or the summaries, and the next build repairs that.
The record alone says that there is nothing to do, so a file that was lost or damaged is written again too.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence

import msgspec
import structlog

from services.aggregate.tables.moved_months import MovedMonths
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import CorruptObject, NewerObject, Summary
from shared.domain.tables import (
    CITY_DAYS,
    COUNTRY_DAYS,
    TABLE_FORMAT,
    TABLES,
    CountryDay,
    MonthTables,
    Row,
    TableRecord,
    Version,
    city_rows,
    country_row,
    tag_of,
)
from shared.runtime import metrics
from shared.runtime.concurrency import bounded_map
from shared.runtime.parquet import TableReader, TableWriter, UnreadableTable
from shared.runtime.retry import Retrier
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import CasConflict, ObjectInfo, ObjectStore, StoredObject
from shared.storage.repository import Repository

GETS_AT_ONCE_MAX = 16

_log = structlog.get_logger()


class ReadSummary(msgspec.Struct, frozen=True):
    """A summary as it was read, and its rows; no row if it is unreadable."""

    country: CountrySlug
    version: Version
    country_rows: list[Row]
    city_rows: list[Row]


class _Files(msgspec.Struct, frozen=True):
    """The files of a month as they were found: their ETags by table, and how to read them if both are usable."""

    etags: dict[str, str | None]
    readers: dict[str, TableReader]

    @property
    def tag(self) -> str | None:
        return self.readers[COUNTRY_DAYS.name].metadata["tag"] if self.readers else None


class TableBuilder:
    """Builds the tables of changed months."""

    def __init__(self, store: ObjectStore, *, clock: Callable[[], dt.datetime]) -> None:
        self._store = store
        self._records = Repository(store)
        self._clock = clock
        self._moved_months = MovedMonths(store, clock=clock)

    async def run(self, retrier: Retrier, *, interval_s: float) -> None:
        """Build the changed months every ``interval_s`` until asked to stop.

        Nothing depends on the tables: an error is logged and counted, and the next pass tries again.
        """
        metrics.tables_current.set_to_current_time()  # so that an alert also notices that no pass succeeds
        while not retrier.stopping.is_set():
            await retrier.pause(interval_s)
            if not retrier.stopping.is_set():
                try:
                    await self.once()
                except Exception as error:  # noqa: BLE001  # see the docstring
                    _report(error)

    async def once(self) -> list[str]:
        """Build every changed month, and return those that it wrote.

        An error of one month is logged and counted, and the other months are built.
        """
        began = self._clock()
        pointer = await read_current(self._store)
        moved = await self._moved_months.look(pointer)
        changed = await self.changed_months(pointer.live, moved)
        random.shuffle(changed)  # so that several processes begin with different months
        built = []
        for month in changed:
            try:
                if await self.build(pointer.live, month) is not None:
                    built.append(month)
            except Exception as error:  # noqa: BLE001  # see the docstring
                _report(error, month=month)
        if len(built) == len(changed):
            self._moved_months.settle()
            metrics.tables_current.set(began.timestamp())
        return built

    async def changed_months(self, generation: int, moved: Collection[str] | None = None) -> list[str]:
        """Return the months whose files do not show the summaries of a generation, in order.

        If ``moved`` is given, the summaries of all other months are as they were when their files were written.
        """
        return [month for month, current in (await self.months(generation, moved)).items() if not current]

    async def months(self, generation: int, moved: Collection[str] | None = None) -> dict[str, bool]:
        """Return the months of the summaries and the tables, in order, and whether the files of each are current.

        If ``moved`` is given, only the files of all other months are looked at.
        """
        record = await self._records.get(TableRecord, keys.TABLES) or TableRecord()
        etags = {listed.key: listed.etag async for listed in self._store.list(keys.LAKE)}
        if moved is None or keys.TABLES not in etags:
            tags = dict.fromkeys(record.months, tag_of({}))
            prefixes = [keys.summaries_of_generation(generation)]
        else:
            tags = {month: tag_of({}) if month in moved else one.tag for month, one in record.months.items()}
            prefixes = [keys.summaries_of_month(generation, month) for month in sorted(moved)]
        for prefix in prefixes:
            async for month, versions in self._versions(generation, prefix):
                tags[month] = tag_of(versions)
        return {month: _is_current(record.months.get(month), month, tag, etags) for month, tag in sorted(tags.items())}

    async def build(self, generation: int, month: str, *, again: bool = False) -> MonthTables | None:
        """Build the files of a month, unless they show its summaries already; return what was recorded.

        ``again`` makes it read every summary, and write the files in any case. Returns None if another process wrote a
        file meanwhile, or the live generation changed.
        """
        try:
            return await self._build(generation, month, reuse=not again)
        except UnreadableTable as error:
            _log.warning("table_unreadable", month=month, error=str(error))
            return await self._build(generation, month, reuse=False)

    async def _build(self, generation: int, month: str, *, reuse: bool) -> MonthTables | None:
        as_of = self._clock()
        files = await self._read_files(month, reuse=reuse)
        prefix = keys.summaries_of_month(generation, month)
        listed = {
            named: one async for one in self._store.list(prefix) if (named := keys.parse_summary(one.key)) is not None
        }
        writers = await asyncio.to_thread(lambda: {table.name: TableWriter(table) for table in TABLES})
        versions: dict[CountryDay, Version] = {}
        unreadable = 0
        known = await asyncio.to_thread(_known_versions, files)
        for date in sorted({date for date, _ in listed}):
            of_date = {country: one for (day, country), one in listed.items() if day == date}
            kept = {country for country, one in of_date.items() if known.get((date, country)) == (generation, one.etag)}
            versions |= {(date, country): (generation, of_date[country].etag) for country in kept}
            changed = [one for country, one in of_date.items() if country not in kept]
            read = await read_summaries(self._store, generation, changed)
            versions |= {(date, one.country): one.version for one in read}
            unreadable += sum(not one.country_rows for one in read)
            await asyncio.to_thread(_add_date, writers, files.readers, date, kept, read)
        tag = tag_of(versions)
        if files.tag == tag:
            return await self._record(month, _recorded(files, generation))
        if (await read_current(self._store)).live != generation:
            return None
        metadata = {
            "tag": tag,
            "generation": str(generation),
            "as_of": as_of.isoformat(),
            "unreadable": str(unreadable),
            "format": str(TABLE_FORMAT),
        }
        etags: dict[str, str] = {}
        for table in TABLES:
            body = await asyncio.to_thread(writers[table.name].close, metadata)
            try:
                etags[table.name] = await self._store.compare_and_swap(
                    table.key(month), body, etag=files.etags[table.name]
                )
            except CasConflict:
                metrics.cas_conflicts.labels("tables").inc()
                return None
        built = MonthTables(
            tag=tag,
            generation=generation,
            as_of=as_of,
            etags=etags,
            country_days=writers[COUNTRY_DAYS.name].rows,
            city_days=writers[CITY_DAYS.name].rows,
            unreadable=unreadable,
        )
        return await self._record(month, built)

    async def _versions(self, generation: int, prefix: str) -> AsyncIterator[tuple[str, Mapping[CountryDay, Version]]]:
        """Yield the months under a prefix of summaries, each with the versions in one listing."""
        month, versions = "", dict[CountryDay, Version]()
        async for listed in self._store.list(prefix):
            named = keys.parse_summary(listed.key)
            if named is None:
                continue
            following = keys.month_of(named[0])
            if following != month and versions:
                yield month, versions
                versions = {}
            month = following
            versions[named] = (generation, listed.etag)
        if versions:
            yield month, versions

    async def _read_files(self, month: str, *, reuse: bool) -> _Files:
        found = {table.name: await self._store.get(table.key(month)) for table in TABLES}
        etags = {name: one.etag if one else None for name, one in found.items()}
        return _Files(etags, await asyncio.to_thread(_readers_of, found) if reuse else {})

    async def _record(self, month: str, built: MonthTables) -> MonthTables:
        async def change(record: TableRecord | None) -> TableRecord:
            before = record or TableRecord()
            if before.months.get(month) == built:
                return before
            return TableRecord(months=dict(sorted({**before.months, month: built}.items())))

        await self._records.update(TableRecord, keys.TABLES, change, counted_as="tables")
        return built


async def read_summaries(store: ObjectStore, generation: int, listed: Sequence[ObjectInfo]) -> list[ReadSummary]:
    """Read summaries, and return their rows. Those that were deleted meanwhile are left out.

    Raises NewerObject for a summary of a later build, which can read it and has a row for it.
    """

    async def read(one: ObjectInfo) -> ReadSummary | None:
        found = await store.get(one.key)
        return None if found is None else await asyncio.to_thread(_rows_of, found, one.key, generation)

    return [one for one in await bounded_map(read, listed, limit=GETS_AT_ONCE_MAX) if one is not None]


def _report(error: Exception, **where: str) -> None:
    metrics.faults.labels("tables").inc()
    _log.warning("tables_not_built", **where, error=str(error) or type(error).__name__)


def _is_current(recorded: MonthTables | None, month: str, tag: str, etags: Mapping[str, str]) -> bool:
    """Return whether the recorded files of a month show the summaries of ``tag``, and are the stored ones.

    A later build of Tripfold may write other columns. This one leaves its files alone.
    """
    if recorded is None:
        return False
    return recorded.format > TABLE_FORMAT or (
        recorded.tag == tag and all(etags.get(table.key(month)) == recorded.etags[table.name] for table in TABLES)
    )


def _readers_of(found: Mapping[str, StoredObject | None]) -> dict[str, TableReader]:
    """Return how to read both files of a month; nothing unless both are there and show the same summaries."""
    readers = {table.name: TableReader(table, one.body) for table in TABLES if (one := found[table.name])}
    tags = {reader.metadata.get("tag") for reader in readers.values()}
    return readers if len(readers) == len(TABLES) and len(tags) == 1 and None not in tags else {}


def _known_versions(files: _Files) -> dict[CountryDay, Version]:
    if not files.readers or files.readers[COUNTRY_DAYS.name].metadata.get("format") != str(TABLE_FORMAT):
        return {}
    columns = files.readers[COUNTRY_DAYS.name].columns("date", "country", "generation", "summary_etag")
    return {(date, country): (generation, etag) for date, country, generation, etag in zip(*columns, strict=True)}


def _recorded(files: _Files, generation: int) -> MonthTables:
    """Return what a build recorded, or would have recorded before a crash."""
    country_days, city_days = (files.readers[table.name] for table in (COUNTRY_DAYS, CITY_DAYS))
    metadata = country_days.metadata
    return MonthTables(
        tag=metadata["tag"],
        generation=generation,
        as_of=dt.datetime.fromisoformat(metadata["as_of"]),
        etags={name: etag for name, etag in files.etags.items() if etag is not None},
        country_days=country_days.rows_total,
        city_days=city_days.rows_total,
        unreadable=int(metadata["unreadable"]),
    )


def _rows_of(found: StoredObject, key: str, generation: int) -> ReadSummary:
    version = (generation, found.etag)
    named = keys.parse_summary(key)
    assert named is not None
    try:
        summary = objects.decode(Summary, found.body, key)
        return ReadSummary(named[1], version, [country_row(summary, version, key)], city_rows(summary, version))
    except NewerObject:
        raise
    except CorruptObject as error:
        _log.error("object_unreadable", key=key, error=str(error))
        return ReadSummary(named[1], version, [], [])


def _add_date(
    writers: Mapping[str, TableWriter],
    readers: Mapping[str, TableReader],
    date: dt.date,
    kept: set[CountrySlug],
    read: Sequence[ReadSummary],
) -> None:
    by_country = sorted(read, key=lambda one: one.country)
    rows = {
        COUNTRY_DAYS.name: [row for one in by_country for row in one.country_rows],
        CITY_DAYS.name: [row for one in by_country for row in one.city_rows],
    }
    for table in TABLES:
        stored = readers[table.name].stored_rows(date, kept) if readers else None
        writers[table.name].add(rows[table.name], stored)
