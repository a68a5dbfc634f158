"""HTTP operations for statistics: a range of dates by country, and the ledger of one country-day."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example, OpenAPIMediaType, OpenAPIResponse, Operation, Schema
from litestar.openapi.spec.enums import OpenAPIType
from litestar.params import PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from services.api.documentation import examples
from services.api.http.date_range import DateRange, DaysMax, date_range
from services.api.http.errors import NotFound, quoted
from services.api.http.etag import matches, strong_etag
from services.api.http.negotiation import content_coding, media_type
from services.api.http.problems import UNREADABLE, responses
from services.api.http.query_parameters import date_parameter
from services.api.http.unreadable import RequestedObjectUnreadable, unreadable_header
from services.api.middleware.compression import CODINGS, IDENTITY, compress_parts
from services.api.middleware.legacy_query import LegacyQuery
from services.api.statistics import formats
from services.api.statistics.cache import Body, EncodedMonths, ResponseCache, iterate_in_thread
from services.api.statistics.countries import CountryNames
from services.api.statistics.formats import EncodedMonth
from services.api.statistics.ledger import Ledger, ledger_of, needs_names, page_of, parse_date
from services.api.statistics.listings import MonthPart
from services.api.statistics.model import CountryStats, month_stats
from services.api.statistics.reader import MonthReading, Reading, SummaryReader
from shared.runtime import metrics

LEDGER_CITIES_MAX = 1_000
COUNTRY_LENGTH_MAX = 300
AFTER_LENGTH_MAX = 1_000
BUFFERED_COUNTRY_DAYS_MAX = 2_000
"""Responses with more country-days are streamed and cached; smaller ones are built in memory for each request."""

CountriesPort = NamedDependency[SkipValidation[CountryNames]]
ReaderPort = NamedDependency[SkipValidation[SummaryReader]]
ResponseCachePort = NamedDependency[SkipValidation[ResponseCache]]


@dataclass
class StatisticsOperation(Operation):
    """Documents the NDJSON, CSV and Parquet forms of an operation beside its JSON."""

    def __post_init__(self) -> None:
        response = (self.responses or {})["200"]
        assert isinstance(response, OpenAPIResponse)
        assert response.content is not None
        for form, example in (
            (formats.NDJSON, examples.COUNTRY_STATS_NDJSON),
            (formats.CSV, examples.COUNTRY_STATS_CSV),
        ):
            response.content[form] = OpenAPIMediaType(
                schema=Schema(type=OpenAPIType.STRING), examples={"as it is": Example(value=example)}
            )
        response.content[formats.PARQUET] = OpenAPIMediaType(
            schema=Schema(type=OpenAPIType.STRING, content_media_type=formats.PARQUET)
        )


@get(
    "/country-stats",
    middleware=[LegacyQuery],
    summary="Get the statistics of a range of dates, by country",
    operation_id="getCountryStats",
    tags=["statistics"],
    operation_class=StatisticsOperation,
    responses={
        HTTPStatus.OK: ResponseSpec(
            CountryStats,
            generate_examples=False,
            description="The statistics. With `detail=full`, each day also shows how complete it is.",
            examples=[
                Example(summary="as it is", value=examples.COUNTRY_STATS),
                Example(summary="with detail=full", value=examples.COUNTRY_STATS_FULL),
            ],
        ),
        HTTPStatus.NOT_MODIFIED: ResponseSpec(
            None,
            generate_examples=False,
            description="The client's copy, whose ETag is in `If-None-Match`, is current.",
        ),
        **responses(
            not_found="There is no such country. The response suggests countries with similar names.",
            not_acceptable="`Accept` allows none of JSON, NDJSON, CSV and Parquet.",
            internal_server_error=UNREADABLE,
        ),
    },
)
async def statistics_by_country(
    *,
    request: Request[Any, Any, Any],
    reader: ReaderPort,
    countries: CountriesPort,
    response_cache: ResponseCachePort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: Annotated[dt.date, date_parameter("from", "The first day.", "2024-05-01")],
    to: Annotated[dt.date, date_parameter("to", "The last day, included.", "2024-05-31")],
    country: Annotated[
        str | None,
        QueryParameter(
            description="One country: its slug, or its name if that is unique. Default: all countries.",
            min_length=1,
            max_length=COUNTRY_LENGTH_MAX,
            examples=[Example(value="armenia")],
        ),
    ] = None,
    detail: Annotated[
        Literal["full"] | None,
        QueryParameter(
            description="`full` adds the completeness of each day and the exact sums behind its figures.",
            examples=[Example(value="full")],
        ),
    ] = None,
) -> Response[Any]:
    """Return the statistics by country slug and date, both sorted.

    A country with data on any day of the range has every day of it; a day without data has zeros and `false`.
    `detail=full` adds countries that are planned and have no data yet. There, `version` 0 marks a day
    that was never requested.

    `Tripfold-Unreadable` names stored days that cannot be read. They are left out, or give the reason with
    `detail=full`.

    `Accept` chooses JSON, NDJSON, CSV or Parquet (a line or row for each country-day); `Accept-Encoding` chooses zstd
    or gzip, except for Parquet, which is compressed itself. The ETag is strong: a request with `If-None-Match` gets 304
    until a number changes.
    """
    days = date_range(from_, to, days_max=days_max)
    form = media_type(request.headers.get("accept", ""), formats.MEDIA_TYPES)
    coding = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
    if form == formats.PARQUET:  # its columns are compressed
        coding = IDENTITY
    slug, listed = await countries.find_or_all(country)
    query = (days.first.isoformat(), days.last.isoformat(), slug or "", detail or "")
    if_none_match = request.headers.get("if-none-match", "")

    detailed = detail == "full"
    body: Body | None = None
    months = _MonthsOfResponse(response_cache.months, form, detailed=detailed)

    def etag_of(tag: str) -> str:
        return strong_etag([formats.version_of(form), *query, form, coding, tag])

    def tag_suffices(tag: str) -> bool:
        nonlocal body
        body = response_cache.find(etag_of(tag))
        return listed and (body is not None or matches(if_none_match, etag_of(tag)))

    reading = await reader.read(days, slug, tag_suffices=tag_suffices, month_suffices=months.suffices)
    if reading.unreadable and slug is not None and days.days == 1:
        raise RequestedObjectUnreadable(reading.unreadable[0])
    if not listed and not reading.country_days:
        raise await countries.unknown(country or "")
    etag = etag_of(reading.tag)
    headers = {
        "ETag": etag,
        "Vary": "Accept, Accept-Encoding",
        "Cache-Control": "no-cache",
        **unreadable_header(reading.unreadable),
    }
    if matches(if_none_match, etag):
        return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=headers)

    headers |= {} if coding == IDENTITY else {"Content-Encoding": coding}
    if reading.months is not None:
        body = response_cache.find(etag)  # another client may have started it since
    content_type = formats.content_type(form)
    if body is not None:
        metrics.count_lookups("responses", hits=1)
        return Stream(body.parts(), media_type=content_type, headers=headers | _length_of(body))
    parts = compress_parts(months.parts(reading), coding)
    day_bytes = formats.estimated_day_bytes(detailed=detailed, compressed=coding != IDENTITY)
    content = await _content_of(response_cache, etag, parts, country_days=reading.country_days, day_bytes=day_bytes)
    if isinstance(content, bytes):
        return Response(content, media_type=content_type, headers=headers)
    return Stream(content, media_type=content_type, headers=headers)


class _MonthsOfResponse:
    """The encoded months of one response. Those that it does not find in the cache are encoded when it is made."""

    def __init__(self, cache: EncodedMonths, form: str, *, detailed: bool) -> None:
        self._cache = cache
        self._form = form
        self._detailed = detailed
        self._found: dict[DateRange, EncodedMonth] = {}

    def suffices(self, part: MonthPart) -> bool:
        """Return whether the encoded month is in the cache, so that nobody needs its heads."""
        found = self._cache.get((part.tag, part.days, self._form, self._detailed))
        if found is not None:
            self._found[part.days] = found
        return found is not None

    def parts(self, reading: Reading) -> Iterator[bytes]:
        """Yield the response. Months of a long response are kept."""
        months = [self._found.get(month.days) or self._encode(month) for month in reading.months or ()]
        if reading.country_days > BUFFERED_COUNTRY_DAYS_MAX:
            for month, encoded in zip(reading.months or (), months, strict=True):
                self._cache.keep((month.tag, month.days, self._form, self._detailed), encoded)
        yield from formats.encoded_parts(months, self._form, detailed=self._detailed)

    def _encode(self, month: MonthReading) -> EncodedMonth:
        stats = month_stats(month.heads or (), month.days, detailed=self._detailed, unreadable=month.unreadable)
        return formats.encode_month(stats, self._form, detailed=self._detailed)


async def _content_of(
    response_cache: ResponseCache, etag: str, parts: Iterator[bytes], *, country_days: int, day_bytes: int
) -> bytes | AsyncIterator[bytes]:
    """Return a short body as bytes; stream a long one through the cache, if it has room, and uncached otherwise."""
    if country_days <= BUFFERED_COUNTRY_DAYS_MAX:
        return await asyncio.to_thread(b"".join, parts)
    metrics.count_lookups("responses", misses=1)
    body = response_cache.begin(etag, parts, expected_bytes=country_days * day_bytes)
    return iterate_in_thread(parts) if body is None else body.parts()


def _length_of(body: Body) -> dict[str, str]:
    return {"Content-Length": str(body.size_bytes)} if body.done else {}


@get(
    "/country-stats/{country:str}/{date:str}",
    summary="Get the ledger of a country-day: every city's contribution and its source",
    operation_id="getCountryDayLedger",
    tags=["statistics"],
    response_description="The totals of the day, and a page of its cities.",
    responses=responses(
        not_found="There is no data for this country-day.",
        internal_server_error=UNREADABLE,
    ),
)
async def ledger_of_country_day(
    *,
    reader: ReaderPort,
    countries: CountriesPort,
    country: Annotated[
        str, PathParameter(description="The country's slug, or its name.", examples=[Example(value="armenia")])
    ],
    date: Annotated[
        str,
        PathParameter(description="The date.", schema_extra={"format": "date"}, examples=[Example(value="2024-05-01")]),
    ],
    limit: Annotated[
        int,
        QueryParameter(
            description="The maximum number of cities on a page.",
            ge=1,
            le=LEDGER_CITIES_MAX,
            examples=[Example(value=100)],
        ),
    ] = 100,
    after: Annotated[
        str,
        QueryParameter(
            description="A city id: the page begins after it. Follow `next` to page.",
            max_length=AFTER_LENGTH_MAX,
            examples=[Example(value="7")],
        ),
    ] = "",
) -> Response[Ledger]:
    """Return the totals of the day, and its cities page by page, sorted by city id."""
    found = await countries.find(country)
    day = parse_date(date)
    summary = await reader.summary(found.slug, day) if day else None
    if summary is None:
        if not found.listed:
            raise await countries.unknown(country)
        raise NotFound(
            f"There is no data for the country {quoted(country)} on {quoted(date)}. "
            "POST /process-request processes a date."
        )
    page = page_of(summary, after=after, limit=limit)
    manifests, unreadable = await reader.manifests(summary.date, page.city_ids)
    names = {}
    if needs_names(summary, page, manifests):
        names = await reader.city_names(summary.date, summary.country)
    ledger = ledger_of(summary, page, manifests, limit=limit, planned_names=names)
    return Response(ledger, headers=unreadable_header(unreadable))


HANDLERS = [statistics_by_country, ledger_of_country_day]
