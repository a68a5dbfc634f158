"""The comparison of the tables with the summaries: each wrong row is named, and a late one is not wrong."""

from __future__ import annotations

import datetime as dt

import pytest

from services.aggregate.bucket_reader import Dates
from services.aggregate.tables.builder import TableBuilder
from services.aggregate.tables.verify import VerifiedMonth, verify_tables
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Table
from shared.runtime.parquet import TableReader, TableWriter
from shared.storage.object_store import StoredObject
from tests.fakes.bucket import ALL, DAY, FakeBucket, trips
from tests.fakes.store import MemoryStore

GRACE = dt.timedelta(minutes=8)
MONTH = "2024-05"


@pytest.fixture
async def bucket() -> FakeBucket:
    """Give a country of two cities with tables, an hour after both were built."""
    bucket = FakeBucket()
    await bucket.fold(
        bucket.plan(1, {"armenia": (1, 2)}), bucket.store_file(1, 2, trips(3)), bucket.store_file(2, 2, trips(4))
    )
    await TableBuilder(bucket.store, clock=bucket.clock).once()
    bucket.clock.advance(3600)
    return bucket


async def verified(bucket: FakeBucket, dates: Dates = ALL) -> list[VerifiedMonth]:
    return [one async for one in verify_tables(bucket.store, dates, grace=GRACE)]


async def named(bucket: FakeBucket) -> list[tuple[str | None, str, str, str]]:
    return [
        (one.city_id, one.what, one.found, one.expected)
        for month in await verified(bucket)
        for one in month.differences
    ]


def rewrite(bucket: FakeBucket, table: Table, column: str, value: object) -> None:
    """Change a column of the first row of a table's file."""
    reader = TableReader(table, bucket.store.objects[table.key(MONTH)].body)
    first, *rows = reader.rows(DAY)
    place = table.names.index(column)
    writer = TableWriter(table)
    writer.add([(*first[:place], value, *first[place + 1 :]), *rows])
    bucket.store.write(table.key(MONTH), writer.close(reader.metadata))


async def test_current_tables_have_no_difference(bucket: FakeBucket) -> None:
    """Every row of both tables is compared."""
    [month] = await verified(bucket)
    assert (month.month, month.rows, month.behind, month.differences) == (MONTH, 3, 0, [])


async def test_each_wrong_figure_is_named(bucket: FakeBucket) -> None:
    """By its table, its column and its city."""
    rewrite(bucket, COUNTRY_DAYS, "passengers", 71)
    rewrite(bucket, CITY_DAYS, "sha256", "aa")
    [wrong, city] = await named(bucket)
    assert wrong == (None, "country_days: passengers", "71", "70")
    assert city[:3] == ("1", "city_days: sha256", "aa")


async def test_missing_and_superfluous_rows_are_named(bucket: FakeBucket) -> None:
    """A row under another key is both."""
    rewrite(bucket, CITY_DAYS, "city_id", "0")
    assert await named(bucket) == [
        ("0", "city_days", "a row", "nothing"),
        ("1", "city_days", "nothing", "a row"),
    ]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
async def test_a_lost_or_unreadable_file_is_a_difference(bucket: FakeBucket, table: Table) -> None:
    """A lost file lacks every row."""
    body = bucket.store.objects[table.key(MONTH)].body
    await bucket.store.delete(table.key(MONTH))
    assert [one[1:] for one in await named(bucket)] == [(table.name, "nothing", "a row")] * (
        1 if table is COUNTRY_DAYS else 2
    )
    bucket.store.write(table.key(MONTH), body[:-1])
    [(_, what, found, _)] = await named(bucket)
    assert (what, found.partition(":")[0]) == ("table", f"the file of {table.name} cannot be read")


async def test_a_summary_that_changed_recently_is_behind_and_no_difference(bucket: FakeBucket) -> None:
    """After the grace, the same row is a difference."""
    await bucket.fold(bucket.store_file(1, 3, trips(9)))
    [month] = await verified(bucket)
    assert (month.rows, month.behind, month.differences) == (0, 1, [])
    bucket.clock.advance(GRACE.total_seconds() + 1)
    assert (None, "country_days: trips", "7", "13") in await named(bucket)


async def test_a_summary_that_changes_during_the_comparison_is_behind(bucket: FakeBucket) -> None:
    """The listing of its month shows an old version, and the summary that is read then is a new one."""

    class Changing(MemoryStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            if key.startswith(keys.SUMMARIES):
                await bucket.fold(bucket.store_file(1, 3, trips(9)))
            return await super().get(key, first_bytes=first_bytes)

    store = Changing(bucket.clock)
    store.objects = bucket.store.objects
    [month] = [one async for one in verify_tables(store, ALL, grace=GRACE)]
    assert (month.behind, month.differences) == (1, [])


async def test_rows_of_a_generation_that_is_live_for_a_short_time_are_behind(bucket: FakeBucket) -> None:
    """The tables follow the pointer within the same time."""
    summary = await bucket.summary()
    bucket.store.write(keys.summary(2, DAY, CountrySlug("armenia")), objects.encode(summary))
    bucket.clock.advance(3600)
    bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=2, highest=2)))
    [month] = await verified(bucket)
    assert (month.behind, month.differences) == (1, [])
    bucket.clock.advance(GRACE.total_seconds() + 1)
    assert (None, "country_days: generation", "1", "2") in await named(bucket)


async def test_a_row_without_a_summary_is_a_difference(bucket: FakeBucket) -> None:
    """Also if the generation has no summary of the whole month."""
    await bucket.store.delete(await bucket.summary_key())
    assert [one[1:] for one in await named(bucket)] == [("country_days", "a row", "nothing")] + [
        ("city_days", "a row", "nothing")
    ] * 2


async def test_a_range_leaves_out_other_dates(bucket: FakeBucket) -> None:
    """Rows of other dates of a month are not compared."""
    rewrite(bucket, COUNTRY_DAYS, "passengers", 71)
    after = DAY + dt.timedelta(days=1)
    assert [one.differences for one in await verified(bucket, Dates(after, after))] == [[]]
