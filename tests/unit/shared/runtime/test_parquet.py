"""Tables as Parquet: any rows come back as they were written, and other files are refused."""

from __future__ import annotations

import datetime as dt
from itertools import groupby

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.ids import CountrySlug
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Column, Kind, Row, Table
from shared.runtime import parquet
from shared.runtime.parquet import TableReader, TableWriter, UnreadableTable

DAY = dt.date(2024, 5, 1)
COUNTRIES = [CountrySlug(slug) for slug in ("armenia", "chad", "peru")]
VALUES: dict[Kind, st.SearchStrategy[object]] = {
    Kind.DATE: st.dates(DAY, dt.date(2024, 5, 3)),
    Kind.LABEL: st.text(max_size=3),
    Kind.TEXT: st.text(max_size=3),
    Kind.INTEGER: st.integers(-(2**63), 2**63 - 1),
    Kind.NUMBER: st.floats(allow_nan=False),
    Kind.FLAG: st.booleans(),
    Kind.INSTANT: st.datetimes(timezones=st.just(dt.UTC)),
}


def value_of(column: Column) -> st.SearchStrategy[object]:
    if column.name == "country":
        return st.sampled_from(COUNTRIES)
    return st.none() | VALUES[column.kind] if column.nullable else VALUES[column.kind]


def rows_of(table: Table) -> st.SearchStrategy[list[Row]]:
    rows = st.tuples(*map(value_of, table.columns))
    unique = st.lists(rows, max_size=4, unique_by=lambda row: row[: table.sorted_by])
    return unique.map(lambda some: sorted(some, key=lambda row: row[: table.sorted_by]))


def written(table: Table, rows: list[Row]) -> bytes:
    writer = TableWriter(table)
    for _, of_date in groupby(rows, key=lambda row: row[0]):
        writer.add(list(of_date))
    return writer.close({"tag": "t"})


def all_rows(reader: TableReader) -> list[Row]:
    return [row for date in reader.dates for row in reader.rows(date)]


@settings(max_examples=10)
@given(data=st.data(), table=st.sampled_from(TABLES), group_rows=st.integers(1, 4))
def test_rows_come_back_as_they_were_written(data: st.DataObject, table: Table, group_rows: int) -> None:
    """Every value of every column, in any division into row groups."""
    rows = data.draw(rows_of(table))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_ROWS_MIN", group_rows)
        reader = TableReader(table, written(table, rows))
    assert all_rows(reader) == rows
    assert list(zip(*reader.columns(*table.names), strict=True)) == rows
    assert (reader.rows_total, reader.metadata) == (len(rows), {"tag": "t"})


@settings(max_examples=10)
@given(data=st.data(), kept=st.sets(st.sampled_from(COUNTRIES)), group_rows=st.integers(1, 4))
def test_stored_rows_join_new_ones_in_order(data: st.DataObject, kept: set[CountrySlug], group_rows: int) -> None:
    """A new file has the stored rows of the kept countries and the new rows of the others, sorted."""
    stored, new = data.draw(rows_of(CITY_DAYS)), data.draw(rows_of(CITY_DAYS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP_ROWS_MIN", group_rows)
        reader = TableReader(CITY_DAYS, written(CITY_DAYS, stored))
        writer = TableWriter(CITY_DAYS)
        new = [row for row in new if row[1] not in kept]
        for date in sorted({row[0] for row in [*stored, *new]}):
            writer.add([row for row in new if row[0] == date], reader.stored_rows(date, kept))
        joined = all_rows(TableReader(CITY_DAYS, writer.close({})))
    expected = [*new, *(row for row in stored if row[1] in kept)]
    assert joined == sorted(expected, key=lambda row: row[: CITY_DAYS.sorted_by])


def test_a_file_has_the_types_that_other_programs_expect() -> None:
    """Dates, 64-bit integers, instants in UTC, zstd, and labels in dictionaries."""
    row = (DAY, "chad", "Chad", 1, 2, 3, 4, 5.0, True, True, 1, 1, None, None, 1, 1, 1, 1, "e")
    file = pq.ParquetFile(pa.BufferReader(written(COUNTRY_DAYS, [row])))
    schema = file.schema_arrow
    assert [str(schema.field(name).type) for name in ("date", "country", "trips", "last_ingested_at")] == [
        "date32[day]",
        "string",
        "int64",
        "timestamp[us, tz=UTC]",
    ]
    stored = [file.metadata.row_group(0).column(place) for place in range(len(COUNTRY_DAYS.columns))]
    assert {column.compression for column in stored} == {"ZSTD"}
    assert {column.path_in_schema for column in stored if column.has_dictionary_page} == {"country", "country_name"}


@pytest.mark.parametrize("body", [b"", b"PAR1", written(CITY_DAYS, [])])
def test_another_file_is_refused(body: bytes) -> None:
    """Bytes that are no Parquet file, and a file with other columns."""
    with pytest.raises(UnreadableTable, match="country_days"):
        TableReader(COUNTRY_DAYS, body)


def test_a_damaged_page_is_refused() -> None:
    """Each page has a checksum."""
    row = (DAY, "chad", "7", "Chad", "Mao", 1, 2, 3, 4, 5.0, 0, None, 1, "ab" * 32, None, "m" * 99, 1)
    body = bytearray(written(CITY_DAYS, [row]))
    column = pq.ParquetFile(pa.BufferReader(bytes(body))).metadata.row_group(0).column(CITY_DAYS.names.index("sha256"))
    body[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    reader = TableReader(CITY_DAYS, bytes(body))
    with pytest.raises(UnreadableTable, match=r"city_days cannot be read: .*checksum"):
        reader.rows(DAY)
