"""Compares the Parquet tables with the live summaries, row by row.

A table may be behind a summary that changed a short while ago: such a country-day is counted, and is no difference.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable

import msgspec

from services.aggregate.audit.compare import NOTHING, Difference
from services.aggregate.bucket_reader import Dates, known_dates
from services.aggregate.tables.builder import read_summaries
from shared.domain import keys
from shared.domain.ids import CityId, CountrySlug
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Row, Table, TableRecord
from shared.runtime.parquet import TableReader, UnreadableTable
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, ObjectInfo
from shared.storage.repository import Repository

TABLE = "table"


class VerifiedMonth(msgspec.Struct, frozen=True, kw_only=True):
    """The differences of a month's tables from the summaries, and the progress over all months.

    ``behind`` counts the country-days whose summary changed too recently for the tables to show it.
    """

    month: str
    rows: int
    behind: int
    differences: list[Difference]
    months_done: int
    months_total: int


async def verify_tables(store: AdminObjectStore, dates: Dates, *, grace: dt.timedelta) -> AsyncIterator[VerifiedMonth]:
    """Compare the tables of each month with the live summaries of the dates in the range.

    A summary that changed within ``grace`` may be newer than the tables, and so may a whole generation.
    """
    generation = (await read_current(store)).live
    record = await Repository(store).get(TableRecord, keys.TABLES) or TableRecord()
    known = await known_dates(store, dates, keys.summaries_of_generation(generation))
    months = sorted(set(map(keys.month_of, known)) | {month for month in record.months if dates.overlaps(month)})
    for done, month in enumerate(months, 1):
        before = await store.now() - grace
        async for pointer in store.list(keys.CURRENT):
            if pointer.last_modified >= before:
                before = dt.datetime.min.replace(tzinfo=dt.UTC)
        rows, behind, differences = await _verify_month(store, generation, month, dates, before)
        yield VerifiedMonth(
            month=month,
            rows=rows,
            behind=behind,
            differences=differences,
            months_done=done,
            months_total=len(months),
        )


async def _verify_month(
    store: AdminObjectStore, generation: int, month: str, dates: Dates, before: dt.datetime
) -> tuple[int, int, list[Difference]]:
    """Return the number of compared rows, the number of country-days that are behind, and the differences."""
    found = {table.name: await store.get(table.key(month)) for table in TABLES}
    by_date: defaultdict[dt.date, list[ObjectInfo]] = defaultdict(list)
    async for listed in store.list(keys.summaries_of_month(generation, month)):
        date = keys.parse_date(listed.key)
        if date is not None and date in dates:
            by_date[date].append(listed)
    try:
        readers = {
            table.name: await asyncio.to_thread(TableReader, table, one.body)
            for table in TABLES
            if (one := found[table.name])
        }
    except UnreadableTable as error:
        first = dt.date.fromisoformat(f"{month}-01")
        return 0, 0, [_difference((first, ""), what=TABLE, found=str(error), expected="a readable file")]
    rows = 0
    behind: set[Row] = set()
    differences: list[Difference] = []
    stored_dates = {date for reader in readers.values() for date in reader.dates if date in dates}
    for date in sorted(by_date.keys() | stored_dates):
        read = await read_summaries(store, generation, by_date[date])
        changed = {(date, one.country): one.version for one in read}
        old = {(keys.parse_summary(one.key), one.etag) for one in by_date[date] if one.last_modified < before}
        reader = readers.get(COUNTRY_DAYS.name)
        of_table = {row[:2]: row[-2:] for row in reader.rows(date)} if reader else {}
        behind_now = {
            key for key, version in changed.items() if (key, version[1]) not in old and of_table.get(key) != version
        }
        behind |= behind_now
        expected = {
            COUNTRY_DAYS.name: [row for one in read for row in one.country_rows],
            CITY_DAYS.name: [row for one in read for row in one.city_rows],
        }
        for table in TABLES:
            stored = readers[table.name].rows(date) if table.name in readers else []
            compared = [[row for row in some if row[:2] not in behind_now] for some in (expected[table.name], stored)]
            rows += len(compared[1])
            differences += row_differences(table, *compared)
    return rows, len(behind), differences


def row_differences(table: Table, expected: Iterable[Row], stored: Iterable[Row]) -> list[Difference]:
    """Compare the rows of a table with those that the summaries give; each row that differs is named."""
    wanted = {row[: table.sorted_by]: row for row in expected}
    present = {row[: table.sorted_by]: row for row in stored}
    differences = []
    for key in sorted(wanted.keys() | present.keys()):
        before, after = present.get(key), wanted.get(key)
        if before is None or after is None:
            texts = ["a row" if row else NOTHING for row in (before, after)]
            differences.append(_difference(key, what=table.name, found=texts[0], expected=texts[1]))
            continue
        differences += [
            _difference(key, what=f"{table.name}: {name}", found=str(value), expected=str(right))
            for name, value, right in zip(table.names, before, after, strict=True)
            if value != right
        ]
    return differences


def _difference(key: Row, *, what: str, found: str, expected: str) -> Difference:
    date, country, *city = key
    return Difference(
        date=date,
        country=CountrySlug(country),
        city_id=CityId(city[0]) if city else None,
        what=what,
        found=found,
        expected=expected,
    )
