"""The Parquet tables of the bucket: their columns, the rows of a summary, and which summaries a month was built from.

docs/reference/tables.md lists the columns. Pure.
"""

from __future__ import annotations

import datetime as dt
import enum
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from shared.domain import keys
from shared.domain.contribution import Contribution, average_delay_s
from shared.domain.ids import CountField, CountrySlug
from shared.domain.objects import BucketObject, Summary, require_exact

TABLE_FORMAT = 1
"""Raise it with every change of the columns or of their values: then every month is built again."""

Row = tuple[Any, ...]
CountryDay = tuple[dt.date, CountrySlug]
Version = tuple[int, str]
"""The generation and the ETag of a summary."""


class Kind(enum.Enum):
    """The type of a column. A label is a text of few distinct values."""

    DATE = "date"
    LABEL = "label"
    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    FLAG = "flag"
    INSTANT = "instant"


class Column(msgspec.Struct, frozen=True):
    """A column of a table. Only a ``nullable`` one can be null."""

    name: str
    kind: Kind
    nullable: bool = False


class Table(msgspec.Struct, frozen=True):
    """A table. Its rows are sorted by the first ``sorted_by`` of its columns, which identify a row."""

    name: str
    columns: tuple[Column, ...]
    sorted_by: int

    def key(self, month: str) -> str:
        """Return the key of the file with a month of the table."""
        return keys.table(self.name, month)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)


_FIGURES = (
    Column("trips", Kind.INTEGER),
    Column("passengers", Kind.INTEGER),
    Column("accidents", Kind.INTEGER),
    Column("delay_total_ms", Kind.INTEGER),
    Column("average_delay_s", Kind.NUMBER),
)

COUNTRY_DAYS = Table(
    "country_days",
    (
        Column("date", Kind.DATE),
        Column("country", Kind.LABEL),
        Column("country_name", Kind.LABEL),
        *_FIGURES,
        Column("has_data", Kind.FLAG),
        Column("complete", Kind.FLAG),
        Column("cities_reported", Kind.INTEGER),
        Column("cities_expected", Kind.INTEGER),
        Column("cities_suspicious", Kind.INTEGER, nullable=True),
        Column("last_ingested_at", Kind.INSTANT, nullable=True),
        Column("version", Kind.INTEGER),
        Column("plan_revision", Kind.INTEGER),
        Column("schema_version", Kind.INTEGER),
        Column("generation", Kind.INTEGER),
        Column("summary_etag", Kind.TEXT),
    ),
    sorted_by=2,
)
CITY_DAYS = Table(
    "city_days",
    (
        Column("date", Kind.DATE),
        Column("country", Kind.LABEL),
        Column("city_id", Kind.LABEL),
        Column("country_name", Kind.LABEL),
        Column("city_name", Kind.LABEL),
        *_FIGURES,
        Column("trips_on_other_dates", Kind.INTEGER),
        Column("suspicious", Kind.LABEL, nullable=True),
        Column("revision", Kind.INTEGER),
        Column("sha256", Kind.TEXT),
        Column("ingested_at", Kind.INSTANT, nullable=True),
        Column("manifest_key", Kind.TEXT),
        Column("generation", Kind.INTEGER),
    ),
    sorted_by=3,
)
TABLES = (COUNTRY_DAYS, CITY_DAYS)


class MonthTables(msgspec.Struct, frozen=True, kw_only=True):
    """The two files of a month, as they were last written.

    ``tag`` names the summaries that they show, `tag_of`. ``as_of`` is a time before the first of them was read.
    ``etags`` has the ETag of each file by the name of its table. ``unreadable`` counts the summaries that are left out.
    """

    tag: str
    generation: CountField
    as_of: dt.datetime
    etags: dict[str, str]
    country_days: CountField
    city_days: CountField
    unreadable: CountField = 0
    format: CountField = TABLE_FORMAT


class TableRecord(BucketObject, frozen=True, kw_only=True):
    """The months of the tables, by ``YYYY-MM``."""

    months: dict[str, MonthTables] = msgspec.field(default_factory=dict)


def tag_of(versions: Mapping[CountryDay, Version]) -> str:
    """Return what names a set of summaries. It also names the format of the rows."""
    lines = sorted(f"{date}/{country} {generation} {etag}" for (date, country), (generation, etag) in versions.items())
    return hashlib.sha256("\n".join([str(TABLE_FORMAT), *lines]).encode()).hexdigest()


def country_row(summary: Summary, version: Version, key: str) -> Row:
    """Return the row of a summary. Raises CorruptObject, with its ``key``, for totals that cannot be served."""
    require_exact(summary, key)
    generation, etag = version
    return (
        summary.date,
        summary.country,
        summary.country_name,
        *_figures(summary.totals),
        summary.has_data,
        summary.complete,
        summary.cities_reported,
        summary.cities_expected,
        None if summary.cities_suspicious is UNSET else summary.cities_suspicious,
        summary.last_ingested_at,
        summary.version,
        summary.plan_revision,
        summary.schema_version,
        generation,
        etag,
    )


def city_rows(summary: Summary, version: Version) -> list[Row]:
    """Return the rows of the cities that a summary counts, sorted by city id."""
    generation, _ = version
    return [
        (
            summary.date,
            summary.country,
            city_id,
            summary.country_name,
            entry.city_name,
            *_figures(contribution),
            entry.trips_on_other_dates,
            entry.suspicious or None,
            entry.revision,
            entry.sha256,
            entry.ingested_at,
            keys.manifest(summary.date, city_id),
            generation,
        )
        for city_id, entry in sorted(summary.ledger.items())
        if (contribution := entry.contribution) is not None
    ]


def optional_figure(stored: int | None) -> int | UnsetType:
    """Return the figure of a summary from a nullable column."""
    return UNSET if stored is None else stored


def _figures(totals: Contribution) -> Row:
    return (totals.trips, totals.passengers, totals.accidents, totals.delay_total_ms, average_delay_s(totals))
