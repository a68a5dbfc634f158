"""The statistics as JSON, as NDJSON and as CSV, plain or compressed. Pure."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator

import cramjam
import msgspec

from services.api.statistics import CountryStats, DayStats

VERSION = "1"  # part of every ETag: to be raised when the same numbers are written in another way

JSON = "application/json"
NDJSON = "application/x-ndjson"
CSV = "text/csv"
MEDIA_TYPES = (JSON, NDJSON, CSV)

ZSTD = "zstd"
GZIP = "gzip"
CODINGS = (ZSTD, GZIP)
ZSTD_LEVEL = 3
GZIP_LEVEL = 5

_PLAIN = ("bus_count", "passenger_count", "exist_accident", "average_delay_s")


def written(stats: CountryStats, media_type: str, *, detailed: bool) -> bytes:
    """Write statistics in one of MEDIA_TYPES. NDJSON and CSV have a line for each country-day."""
    if media_type == NDJSON:
        return b"".join(msgspec.json.encode(line) + b"\n" for line in _lines(stats))
    if media_type == CSV:
        return _csv(stats, detailed=detailed)
    return msgspec.json.encode(stats)


def coded(body: bytes, coding: str) -> bytes:
    """Compress an answer by one of CODINGS; anything else leaves it as it is. Equal bytes in are equal bytes out."""
    if coding == ZSTD:
        return bytes(cramjam.zstd.compress(body, level=ZSTD_LEVEL))
    if coding == GZIP:
        return gzip.compress(body, GZIP_LEVEL, mtime=0)
    return body


def content_type(media_type: str) -> str:
    """Return the media type with the parameters that it is sent with; the charset of a text is added to them."""
    return f"{media_type}; header=present" if media_type == CSV else media_type


def _lines(stats: CountryStats) -> Iterator[dict[str, object]]:
    for country, days in stats.items():
        for date, day in days.items():
            yield {"country": country, "date": date, **msgspec.to_builtins(day)}


def _csv(stats: CountryStats, *, detailed: bool) -> bytes:
    fields = DayStats.__struct_fields__ if detailed else _PLAIN
    text = io.StringIO()
    writer = csv.writer(text)  # RFC 4180: commas, double quotes, lines that end in CRLF
    writer.writerow(["country", "date", *fields])
    for line in _lines(stats):
        writer.writerow([line["country"], line["date"], *(_cell(line[field]) for field in fields)])
    return text.getvalue().encode()


def _cell(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value
