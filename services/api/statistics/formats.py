"""Encodes statistics as JSON, NDJSON, CSV or Parquet: each month by country, then the response from its months."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple

import msgspec

from services.api.http.date_range import DateRange
from services.api.statistics import parquet_format
from services.api.statistics.model import DayStats, MonthStats, days_without_data

VERSION = "4"  # increase it when the encoding of the same numbers changes

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
PARQUET = "application/vnd.apache.parquet"
MEDIA_TYPES = (JSON, NDJSON, CSV, PARQUET)

MONTH_BYTES = 500
COUNTRY_BYTES = 200  # the memory of an encoded country-month beside its bytes

# As in the page's csv.js. The last four are full-width forms, which some spreadsheets take for the first four.
_FORMULA_BEGINS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_PLAIN = ("bus_count", "passenger_count", "exist_accident", "average_delay_s")


class EncodedMonth(NamedTuple):
    """The encoded statistics of some days of a month, by country. Equal tags of the month mean equal bytes."""

    days: DateRange
    shown: frozenset[str]
    names: dict[str, str]
    by_country: dict[str, bytes]

    @property
    def size_bytes(self) -> int:
        """The memory that it takes."""
        return MONTH_BYTES + sum(COUNTRY_BYTES + len(encoded) for encoded in self.by_country.values())


def encode_month(stats: MonthStats, media_type: str, *, detailed: bool) -> EncodedMonth:
    """Encode the statistics of a month in one of MEDIA_TYPES."""
    encoded = {
        country: _encode_days(country, days, media_type, detailed=detailed)
        for country, days in stats.by_country.items()
    }
    return EncodedMonth(stats.days, stats.shown, stats.names, encoded)


def encoded_parts(months: Sequence[EncodedMonth], media_type: str, *, detailed: bool) -> Iterator[bytes]:
    """Join encoded months to a response, country by country. All but JSON have a line or row for each country-day.

    A country that any month shows has every day of every month.
    """
    if media_type == PARQUET:
        yield parquet_format.encode(encoded_parts(months, NDJSON, detailed=detailed), detailed=detailed)
        return
    names = {country: name for month in months for country, name in month.names.items()}
    if media_type == CSV:
        yield _rows([["country", "date", *_fields(detailed=detailed)]])
    before = b"{"
    for country in sorted(frozenset[str]().union(*(month.shown for month in months))):
        parts = []
        for month in months:
            part = month.by_country.get(country)
            if part is None:
                name = names.get(country, country)
                empty = days_without_data(month.days, detailed=detailed, country_name=name)
                part = _encode_days(country, empty, media_type, detailed=detailed)
            parts.append(part)
        if media_type == JSON:
            yield b"%b%b:{%b}" % (before, msgspec.json.encode(country), b",".join(filter(None, parts)))
            before = b","
        else:
            yield b"".join(parts)
    if media_type == JSON:
        yield b"{}" if before == b"{" else b"}"


def version_of(media_type: str) -> str:
    """Return a part of the ETag that changes with the encoding of the same numbers."""
    return f"{VERSION} {_pyarrow_version()}" if media_type == PARQUET else VERSION


def content_type(media_type: str) -> str:
    """Return the media type with its parameters. Litestar adds the charset of text types."""
    return f"{media_type}; header=present" if media_type == CSV else media_type


def estimated_day_bytes(*, detailed: bool, compressed: bool) -> int:
    """Return an upper estimate of the size of a country-day in any media type."""
    plain_bytes = 410 if detailed else 150
    return plain_bytes // 3 if compressed else plain_bytes


def _encode_days(country: str, days: Mapping[str, DayStats], media_type: str, *, detailed: bool) -> bytes:
    if media_type == JSON:
        return msgspec.json.encode(days)[1:-1]
    if media_type in {NDJSON, PARQUET}:
        encode = msgspec.json.encode
        begin = b'{"country":%b,"date":' % encode(country)
        return b"".join(b"%b%b,%b\n" % (begin, encode(date), encode(day)[1:]) for date, day in days.items())
    fields = _fields(detailed=detailed)
    lines = ({"country": country, "date": date, **msgspec.to_builtins(day)} for date, day in days.items())
    return _rows([_cell(line[field]) for field in ("country", "date", *fields)] for line in lines)


@functools.cache
def _pyarrow_version() -> str:
    return version("pyarrow")


def _fields(*, detailed: bool) -> tuple[str, ...]:
    return DayStats.__struct_fields__ if detailed else _PLAIN


def _rows(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)  # RFC 4180: commas, double quotes, lines that end in CRLF
    return text.getvalue().encode()


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULA_BEGINS):
        return f"'{value}"  # names and slugs come from the upstream; a spreadsheet would run this one as a formula
    return str(value).lower() if isinstance(value, bool) else value
