"""The tables are built from the summaries, whatever crashes, races or damage come between."""

from __future__ import annotations

import asyncio
import datetime as dt
import random

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog

from services.aggregate.bucket_reader import Dates
from services.aggregate.tables.builder import TableBuilder
from shared.domain import keys, objects, schema
from shared.domain.ids import CountrySlug
from shared.domain.objects import GenerationPointer, Summary
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Row, Table, TableRecord, city_rows, country_row
from shared.runtime.health import Health
from shared.runtime.parquet import TableReader
from shared.runtime.retry import Retrier
from shared.storage.object_store import StoredObject, StoreUnavailable
from tests.fakes.bucket import DAY, NOON, FakeBucket, trips
from tests.fakes.faults import Break, Crash, PortCalls, ProcessLife
from tests.fakes.metrics import value
from tests.fakes.store import BreakableStore, MemoryStore

MONTH = "2024-05"
JUNE = dt.date(2024, 6, 1)
EFFECTS = 3  # two files and the record


class CountingStore(MemoryStore):
    """A store that records which objects were read."""

    def __init__(self, bucket: FakeBucket) -> None:
        super().__init__(bucket.clock)
        self.objects = bucket.store.objects
        self.read: list[str] = []

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self.read.append(key)
        return await super().get(key, first_bytes=first_bytes)


@pytest.fixture
async def bucket() -> FakeBucket:
    """Give two countries on one day, and one of them in the next month."""
    bucket = FakeBucket()
    await bucket.fold(
        [*bucket.plan(1, {"armenia": (1, 2), "chad": (3,)}), *bucket.plan(1, {"chad": (3,)}, JUNE)],
        bucket.store_file(1, 2, trips(3)),
        bucket.store_file(2, 2, trips(4)),
        bucket.store_file(3, 2, trips(5), "chad"),
        bucket.store_file(3, 2, trips(6), "chad", JUNE),
    )
    return bucket


def builder(bucket: FakeBucket) -> TableBuilder:
    return TableBuilder(bucket.store, clock=bucket.clock)


def stored_rows(bucket: FakeBucket, table: Table) -> list[Row]:
    rows = []
    for body in bucket.store.bodies(f"{keys.LAKE}{table.name}/").values():
        reader = TableReader(table, body)
        rows += [row for date in reader.dates for row in reader.rows(date)]
    return rows


def expected_rows(bucket: FakeBucket, table: Table) -> list[Row]:
    pointer = objects.decode(GenerationPointer, bucket.store.objects[keys.CURRENT].body, keys.CURRENT)
    rows = []
    for key, body in bucket.store.bodies(keys.summaries_of_generation(pointer.live)).items():
        summary = objects.decode(Summary, body, key)
        version = (pointer.live, bucket.store.objects[key].etag)
        rows += [country_row(summary, version, key)] if table is COUNTRY_DAYS else city_rows(summary, version)
    return rows


async def assert_current(bucket: FakeBucket) -> None:
    for table in TABLES:
        assert stored_rows(bucket, table) == expected_rows(bucket, table)
    assert await builder(bucket).changed_months(1) == []


async def correct_a_file(bucket: FakeBucket, revision: int = 3) -> None:
    await bucket.fold(bucket.store_file(1, revision, trips(revision + 20)))


async def test_the_first_pass_builds_all_months_and_the_second_nothing(bucket: FakeBucket) -> None:
    """Both tables have a row for each summary and for each city that it counts."""
    assert sorted(await builder(bucket).once()) == [MONTH, "2024-06"]
    await assert_current(bucket)
    assert len(stored_rows(bucket, CITY_DAYS)) == 4
    before = dict(bucket.store.objects)
    assert await builder(bucket).once() == []
    assert bucket.store.objects == before


async def test_only_changed_summaries_are_read_again(bucket: FakeBucket) -> None:
    """The rows of the others are copied, and other months stay as they are."""
    await builder(bucket).once()
    await correct_a_file(bucket)
    store = CountingStore(bucket)
    assert await TableBuilder(store, clock=bucket.clock).once() == [MONTH]
    assert [key for key in store.read if key.startswith(keys.SUMMARIES)] == [await bucket.summary_key()]
    await assert_current(bucket)


async def test_a_build_from_scratch_reads_every_summary(bucket: FakeBucket) -> None:
    """So it also replaces a wrong row whose ETag is right."""
    await builder(bucket).once()
    store = CountingStore(bucket)
    assert await TableBuilder(store, clock=bucket.clock).build(1, MONTH, again=True) is not None
    assert len([key for key in store.read if key.startswith(keys.SUMMARIES)]) == 2


async def test_the_record_says_when_a_month_was_built_and_from_what(bucket: FakeBucket) -> None:
    """The file says the same in its metadata."""
    await builder(bucket).once()
    bucket.clock.advance(60)
    await correct_a_file(bucket)
    await builder(bucket).once()
    record = objects.decode(TableRecord, bucket.store.objects[keys.TABLES].body, keys.TABLES)
    assert {month: one.as_of for month, one in record.months.items()} == {
        MONTH: NOON + dt.timedelta(minutes=1),
        "2024-06": NOON,
    }
    month = record.months[MONTH]
    assert (month.generation, month.country_days, month.city_days, month.unreadable) == (1, 2, 3, 0)
    metadata = TableReader(COUNTRY_DAYS, bucket.store.objects[COUNTRY_DAYS.key(MONTH)].body).metadata
    assert metadata == {
        "tag": month.tag,
        "generation": "1",
        "as_of": "2024-05-02T12:01:00+00:00",
        "unreadable": "0",
        "format": "1",
    }


async def test_another_generation_replaces_every_row(bucket: FakeBucket) -> None:
    """A month without summaries in the live generation has empty files."""
    await builder(bucket).once()
    summary = await bucket.summary()
    bucket.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=2, highest=2)))
    bucket.store.write(keys.summary(2, DAY, CountrySlug("armenia")), objects.encode(summary))
    assert sorted(await builder(bucket).once()) == [MONTH, "2024-06"]
    for table in TABLES:
        assert stored_rows(bucket, table) == expected_rows(bucket, table)
    assert {row[-1] for row in stored_rows(bucket, CITY_DAYS)} == {2}
    assert await builder(bucket).once() == []


async def test_an_unreadable_summary_is_left_out_until_it_is_repaired(bucket: FakeBucket) -> None:
    """Its month has the other country-days; a pass that finds nothing new reads nothing again."""
    await builder(bucket).once()
    key = await bucket.summary_key()
    body = bucket.store.objects[key].body
    bucket.store.write(key, b"{}")
    await builder(bucket).once()
    assert {row[1] for row in stored_rows(bucket, CITY_DAYS)} == {"chad"}
    assert await builder(bucket).once() == []
    record = objects.decode(TableRecord, bucket.store.objects[keys.TABLES].body, keys.TABLES)
    assert record.months[MONTH].unreadable == 1
    bucket.store.write(key, body)
    await builder(bucket).once()
    await assert_current(bucket)


async def test_a_summary_of_a_later_build_leaves_its_month_to_that_build(
    bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is not left out: the later build would find the tables current, and never add it."""
    await builder(bucket).once()
    key = await bucket.summary_key()
    changed = msgspec.structs.replace(await bucket.summary(), schema_version=schema.SCHEMA_VERSION + 1)
    bucket.store.write(key, objects.encode(changed))
    assert await builder(bucket).once() == []
    monkeypatch.setattr(schema, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    assert await builder(bucket).once() == [MONTH]
    await assert_current(bucket)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize("damage", ["deleted", "no table", "a damaged page"])
async def test_a_lost_or_damaged_file_is_written_again(bucket: FakeBucket, table: Table, damage: str) -> None:
    """The record names the ETags of the files, so the next pass notices."""
    await builder(bucket).once()
    key = table.key(MONTH)
    body = bucket.store.objects[key].body
    if damage == "deleted":
        await bucket.store.delete(key)
    elif damage == "no table":
        bucket.store.write(key, b"PAR1")
    else:
        column = pq.ParquetFile(pa.BufferReader(body)).metadata.row_group(0).column(len(table.columns) - 2)
        place = column.data_page_offset + column.total_compressed_size - 1
        bucket.store.write(key, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        await correct_a_file(bucket)
    assert await builder(bucket).once() == [MONTH]
    await assert_current(bucket)


async def test_files_of_a_later_build_are_left_alone(bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """During an upgrade, builds of both versions run side by side and do not undo each other's work."""
    monkeypatch.setattr("services.aggregate.tables.builder.TABLE_FORMAT", 2)
    monkeypatch.setattr("shared.domain.tables.TABLE_FORMAT", 2)
    await builder(bucket).once()
    monkeypatch.undo()
    later = bucket.store.objects[keys.TABLES].body.replace(b'"format":1', b'"format":2')
    bucket.store.write(keys.TABLES, later)
    assert await builder(bucket).once() == []


async def test_any_crash_is_made_good_by_the_next_pass(bucket: FakeBucket) -> None:
    """A process crashes at each of its calls in turn, once in the first build and once in a later one."""
    for begun in (False, True):
        number = 0
        while True:
            world = FakeBucket()
            world.store.objects = dict(bucket.store.objects)
            if begun:
                await builder(world).once()
                await correct_a_file(world)
            life = ProcessLife("aggregate", PortCalls({number // 2: (Break.DIE_BEFORE, Break.DIE_AFTER)[number % 2]}))
            try:
                await TableBuilder(BreakableStore(world.store, life), clock=world.clock).once()
                break
            except (Crash, BaseExceptionGroup):
                assert life.dead
                await builder(world).once()
                await assert_current(world)
            number += 1
        assert number > 2 * EFFECTS


@pytest.mark.parametrize("how", [Break.LOST_ANSWER, Break.UNDECIDED, Break.REFUSED])
async def test_any_fault_of_a_write_is_made_good_by_the_next_pass(bucket: FakeBucket, how: Break) -> None:
    """A write whose response is lost may have happened; one that conflicts may have no rival."""
    writes = await writes_of(bucket)
    for number in writes:
        world = FakeBucket()
        world.store.objects = dict(bucket.store.objects)
        life = ProcessLife("aggregate", PortCalls({number: how}))
        broken = TableBuilder(BreakableStore(world.store, life), clock=world.clock)
        await broken.once()
        await broken.once()
        await assert_current(world)


async def writes_of(bucket: FakeBucket) -> list[int]:
    world = FakeBucket()
    world.store.objects = dict(bucket.store.objects)
    calls = PortCalls()
    await TableBuilder(BreakableStore(world.store, ProcessLife("aggregate", calls)), clock=world.clock).once()
    return [number for number, call in enumerate(calls.made) if call.effect]


async def test_a_slow_build_never_replaces_a_newer_table(bucket: FakeBucket) -> None:
    """A build pauses before each of its calls in turn, while a file is corrected and another process builds."""
    pause = 0
    while True:
        world = FakeBucket()
        world.store.objects = dict(bucket.store.objects)
        await builder(world).once()
        await correct_a_file(world)
        life = ProcessLife("slow", PortCalls())
        life.calls_left = pause
        slow = asyncio.create_task(TableBuilder(BreakableStore(world.store, life), clock=world.clock).once())
        paused = asyncio.create_task(life.paused.wait())
        await asyncio.wait([slow, paused], return_when=asyncio.FIRST_COMPLETED)
        paused.cancel()
        if slow.done():
            break
        await correct_a_file(world, revision=4)
        await builder(world).once()
        await assert_current(world)
        life.paused.clear()
        life.resumed.set()
        await slow
        for table in TABLES:
            assert stored_rows(world, table) == expected_rows(world, table)
        await builder(world).once()
        await assert_current(world)
        pause += 1
    assert pause > 2 * EFFECTS


class Retry(Retrier):
    """A retrier that is asked to stop in its third pause, and does not sleep."""

    def __init__(self) -> None:
        super().__init__(health=Health(), wait_max_s=1)
        self.pauses = 0

    async def sleep(self, seconds: float) -> None:
        del seconds
        self.pauses += 1
        if self.pauses == 3:
            self.stopping.set()


async def test_a_failed_pass_is_counted_and_the_next_one_succeeds(bucket: FakeBucket) -> None:
    """No error ends the job or its readiness. The metric has the last time at which all tables were current."""
    retrier = Retry()
    life = ProcessLife("aggregate", PortCalls({0: Break.REFUSED}))
    job = TableBuilder(BreakableStore(bucket.store, life), clock=bucket.clock)
    faults = value("tripfold_faults_total", what="tables")
    await job.run(retrier, interval_s=60)
    await assert_current(bucket)
    assert value("tripfold_tables_current_timestamp_seconds") == NOON.timestamp()
    assert value("tripfold_faults_total", what="tables") == faults + 1
    assert not retrier.health.faults


async def test_a_month_that_fails_keeps_no_other_back(bucket: FakeBucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is counted and logged with the month, and the tables do not count as current."""

    class Refusing(MemoryStore):
        async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
            if key.startswith(keys.summaries_of_month(1, MONTH)):
                raise StoreUnavailable("refused")
            return await super().get(key, first_bytes=first_bytes)

    monkeypatch.setattr(random, "shuffle", lambda months: months.sort())  # the month that fails comes first
    store = Refusing(bucket.clock)
    store.objects = bucket.store.objects
    faults = value("tripfold_faults_total", what="tables")
    bucket.clock.advance(60)
    job = TableBuilder(store, clock=bucket.clock)
    with structlog.testing.capture_logs() as logged:
        assert await job.once() == ["2024-06"]
    assert [(line["event"], line["month"]) for line in logged] == [("tables_not_built", MONTH)]
    assert value("tripfold_faults_total", what="tables") == faults + 1
    assert value("tripfold_tables_current_timestamp_seconds") != bucket.clock().timestamp()
    assert await job.changed_months(1) == [MONTH]


async def test_a_month_of_an_early_year_has_its_tables(bucket: FakeBucket) -> None:
    """The year has four digits in the keys of summaries and tables."""
    early = dt.date(999, 5, 1)
    await bucket.fold(bucket.plan(1, {"chad": (3,)}, early), bucket.store_file(3, 2, trips(7), "chad", early))
    assert "0999-05" in await builder(bucket).once()
    assert TableReader(CITY_DAYS, bucket.store.objects[CITY_DAYS.key("0999-05")].body).dates == [early]
    assert Dates(early, early).overlaps("0999-05")
