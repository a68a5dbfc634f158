"""Writes and reads the tables as Parquet. No other module uses pyarrow.

pyarrow is imported on first use, so only a process that needs it has it: it maps 60 MB of code, and takes 9 MB of
memory. Its work is done outside the interpreter lock, so callers run these functions in threads.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.domain.ids import CountrySlug
from shared.domain.tables import Kind, Row, Table

if TYPE_CHECKING:
    import pyarrow as pa

# pyarrow's own allocator keeps the memory of a build for the next one. This must be set before the first import.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

ROW_GROUP_ROWS_MIN = 10_000
"""A row group has at least so many rows, except the last one, and all rows of each of its dates."""
ZSTD_LEVEL = 3
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class UnreadableTable(ValueError):
    """The bytes are no Parquet file, or one with other columns."""


class TableWriter:
    """Writes a table date by date, so that only one row group is in memory beside the compressed file."""

    def __init__(self, table: Table) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa = pa
        self._table = table
        self._schema = _schema_of(table)
        self._sink = pa.BufferOutputStream()
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            write_page_checksum=True,
            use_dictionary=[column.name for column in table.columns if column.kind is Kind.LABEL],
        )
        self._pending: list[pa.Table] = []
        self.rows = 0

    def add(self, rows: Sequence[Row], kept: pa.Table | None = None) -> None:
        """Add the rows of the next date: new ones, and those that another file has."""
        columns = zip(*rows, strict=True) if rows else [()] * len(self._schema)
        arrays = [self._pa.array(values, field.type) for values, field in zip(columns, self._schema, strict=True)]
        of_date = self._pa.Table.from_arrays(arrays, schema=self._schema)
        if kept is not None:
            names = self._table.names[: self._table.sorted_by]
            of_date = self._pa.concat_tables([of_date, kept]).sort_by([(name, "ascending") for name in names])
        self._pending.append(of_date)
        self.rows += len(of_date)
        if sum(map(len, self._pending)) >= ROW_GROUP_ROWS_MIN:
            self._flush()

    def close(self, metadata: Mapping[str, str]) -> bytes:
        """Return the file, with ``metadata`` as its key-value metadata."""
        self._flush()
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()
        return bytes(self._sink.getvalue())

    def _flush(self) -> None:
        group = self._pa.concat_tables([self._schema.empty_table(), *self._pending])
        self._pending = []
        if len(group):
            self._writer.write_table(group, row_group_size=len(group))


class TableReader:
    """Reads a file that `TableWriter` wrote. Raises UnreadableTable for any other."""

    def __init__(self, table: Table, body: bytes) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._table = table
        with self._readable():
            self._file = pq.ParquetFile(pa.BufferReader(body), page_checksum_verification=True)
            if not self._file.schema_arrow.equals(_schema_of(table)):
                raise UnreadableTable(f"the file has other columns than {table.name}")
            self._places = self._places_of_dates()
        self._group: tuple[int, pa.Table] | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """The key-value metadata."""
        stored = self._file.metadata.metadata or {}
        return {key.decode(): value.decode() for key, value in stored.items() if key != b"ARROW:schema"}

    @property
    def rows_total(self) -> int:
        """The number of rows."""
        return int(self._file.metadata.num_rows)

    @property
    def dates(self) -> list[dt.date]:
        """The dates of which the file has rows, in order."""
        return list(self._places)

    def columns(self, *names: str) -> list[list[Any]]:
        """Return the values of some columns."""
        with self._readable():
            read = self._file.read(list(names), use_threads=False).select(list(names))
        return [_values(column) for column in read.columns]

    def rows(self, date: dt.date) -> list[Row]:
        """Return the rows of a date."""
        return list(zip(*map(_values, self._of_date(date).columns), strict=True)) if date in self._places else []

    def stored_rows(self, date: dt.date, countries: Collection[CountrySlug]) -> pa.Table | None:
        """Return the rows of some countries on a date, for `TableWriter.add`; None if there are none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if date not in self._places or not countries:
            return None
        of_date = self._of_date(date)
        return of_date.filter(pc.is_in(of_date["country"], value_set=pa.array(sorted(countries))))

    def _of_date(self, date: dt.date) -> pa.Table:
        group, begin, length = self._places[date]
        if self._group is None or self._group[0] != group:
            with self._readable():
                self._group = (group, self._file.read_row_group(group, use_threads=False))
        return self._group[1].slice(begin, length)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise UnreadableTable(f"the file of {self._table.name} cannot be read: {error}") from error

    def _places_of_dates(self) -> dict[dt.date, tuple[int, int, int]]:
        """Return the row group of each date, where its rows begin there, and how many there are."""
        places: dict[dt.date, tuple[int, int, int]] = {}
        for group in range(self._file.num_row_groups):
            counted = self._file.read_row_group(group, columns=["date"], use_threads=False)["date"].value_counts()
            begin = 0
            for one in counted.to_pylist():  # in the order of their first row
                places[one["values"]] = (group, begin, one["counts"])
                begin += one["counts"]
        return places


def _schema_of(table: Table) -> pa.Schema:
    import pyarrow as pa

    types = {
        Kind.DATE: pa.date32(),
        Kind.LABEL: pa.string(),
        Kind.TEXT: pa.string(),
        Kind.INTEGER: pa.int64(),
        Kind.NUMBER: pa.float64(),
        Kind.FLAG: pa.bool_(),
        Kind.INSTANT: pa.timestamp("us", "UTC"),
    }
    return pa.schema([pa.field(column.name, types[column.kind], nullable=column.nullable) for column in table.columns])


def _values(column: pa.ChunkedArray) -> list[Any]:
    """Return the values of a column. pyarrow itself takes ten times as long for dates and instants."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        microseconds = column.cast(pa.int64()).to_pylist()
        return [None if one is None else _EPOCH + dt.timedelta(microseconds=one) for one in microseconds]
    if pa.types.is_date(column.type):
        days = column.cast(pa.int32()).to_pylist()
        dates = {day: _EPOCH.date() + dt.timedelta(days=day) for day in set(days)}
        return [dates[day] for day in days]
    values: list[Any] = column.to_pylist()
    return values
