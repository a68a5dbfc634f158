"""Encodes statistics as Parquet, from their NDJSON: its lines have every country-day in order.

Months are kept as NDJSON, because Parquet files cannot be joined by their bytes.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from operator import attrgetter

import msgspec

from services.api.statistics.model import DayStats
from shared.domain.tables import Column, Kind, Table
from shared.runtime.parquet import TableWriter


class Line(DayStats, frozen=True, kw_only=True):
    """A country-day of NDJSON."""

    country: str
    date: dt.date


_COLUMNS = (
    Column("country", Kind.LABEL),
    Column("date", Kind.DATE),
    Column("bus_count", Kind.INTEGER),
    Column("passenger_count", Kind.INTEGER),
    Column("exist_accident", Kind.FLAG),
    Column("average_delay_s", Kind.NUMBER),
    Column("country_name", Kind.LABEL),
    Column("accident_count", Kind.INTEGER),
    Column("delay_total_ms", Kind.INTEGER),
    Column("cities_reported", Kind.INTEGER),
    Column("cities_expected", Kind.INTEGER),
    Column("complete", Kind.FLAG),
    Column("version", Kind.INTEGER),
    Column("last_ingested_at", Kind.INSTANT, nullable=True),
    Column("unreadable", Kind.TEXT, nullable=True),
    Column("cities_suspicious", Kind.INTEGER),
)
PLAIN = Table("country_stats", _COLUMNS[:6], sorted_by=2)
DETAILED = Table("country_stats", _COLUMNS, sorted_by=2)

_decoder = msgspec.json.Decoder(Line)


def encode(ndjson: Iterable[bytes], *, detailed: bool) -> bytes:
    """Return the Parquet file of the country-days in pieces of NDJSON."""
    table = DETAILED if detailed else PLAIN
    row_of = attrgetter(*table.names)
    writer = TableWriter(table)
    for piece in ndjson:
        writer.add([row_of(line) for line in _decoder.decode_lines(piece)])
    return writer.close({})
