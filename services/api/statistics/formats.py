"""Encodes statistics as JSON, NDJSON or CSV, in a part for each country. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator

import msgspec

from services.api.statistics.model import CountryDays, DayStats

VERSION = "3"  # part of every ETag: increase it when the encoding of the same numbers changes

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
MEDIA_TYPES = (JSON, NDJSON, CSV)

_FORMULA_BEGINS = ("=", "+", "-", "@", "\t", "\r")
_PLAIN = ("bus_count", "passenger_count", "exist_accident", "average_delay_s")


def encoded_parts(countries: Iterable[CountryDays], media_type: str, *, detailed: bool) -> Iterator[bytes]:
    """Encode statistics in one of MEDIA_TYPES, country by country. NDJSON and CSV have a line for each country-day."""
    if media_type == NDJSON:
        return _ndjson(countries)
    if media_type == CSV:
        return _csv(countries, detailed=detailed)
    return _json(countries)


def content_type(media_type: str) -> str:
    """Return the media type with its parameters. Litestar adds the charset of text types."""
    return f"{media_type}; header=present" if media_type == CSV else media_type


def estimated_day_bytes(*, detailed: bool, compressed: bool) -> int:
    """Return an upper estimate of the size of a country-day in any media type."""
    plain_bytes = 410 if detailed else 150
    return plain_bytes // 3 if compressed else plain_bytes


def _json(countries: Iterable[CountryDays]) -> Iterator[bytes]:
    before = b"{"
    for country, days in countries:
        yield before + msgspec.json.encode(country) + b":" + msgspec.json.encode(days)
        before = b","
    yield b"{}" if before == b"{" else b"}"


def _ndjson(countries: Iterable[CountryDays]) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    for country, days in countries:
        begin = b'{"country":%b,"date":' % encode(country)
        yield b"".join(b"%b%b,%b\n" % (begin, encode(date), encode(day)[1:]) for date, day in days.items())


def _csv(countries: Iterable[CountryDays], *, detailed: bool) -> Iterator[bytes]:
    fields = DayStats.__struct_fields__ if detailed else _PLAIN
    yield _rows([["country", "date", *fields]])
    for country in countries:
        yield _rows(
            [line["country"], line["date"], *(_cell(line[field]) for field in fields)] for line in _lines(country)
        )


def _rows(rows: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(rows)  # RFC 4180: commas, double quotes, lines that end in CRLF
    return text.getvalue().encode()


def _lines(country_days: CountryDays) -> Iterator[dict[str, object]]:
    country, days = country_days
    for date, day in days.items():
        yield {"country": country, "date": date, **msgspec.to_builtins(day)}


def _cell(value: object) -> object:
    if isinstance(value, str) and value.startswith(_FORMULA_BEGINS):
        return f"'{value}"  # names come from the upstream, and a spreadsheet would run this one as a formula
    return str(value).lower() if isinstance(value, bool) else value
