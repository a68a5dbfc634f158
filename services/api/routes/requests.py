"""The operations of the REST API. Each parses nothing itself and decides nothing: it hands on and shapes the answer."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from typing import Annotated, Any, Literal, NewType, Protocol

from litestar import Request, Response, Router, delete, get, post
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from services.api.auth import CALLER, PROCESS, READ_OR_PROCESS, SCOPE, Access
from services.api.documentation import examples
from services.api.documentation.operations import StatisticsOperation
from services.api.http.date_range import DateRange, ProcessableDates, asked_range, date_range
from services.api.http.errors import NotFound, shown
from services.api.http.etag import is_known, strong_etag
from services.api.http.negotiation import content_coding, media_type
from services.api.http.prefer import WAIT_MAX_S, wait_s
from services.api.http.problems import responses
from services.api.http.query_parameters import refuse_undeclared
from services.api.middleware.compression import CODINGS, IDENTITY, coded_parts
from services.api.middleware.legacy_query import FirstVersionQuery
from services.api.quarantine import QuarantineList
from services.api.requests.event_stream import ProgressEvent, RequestEventStream
from services.api.requests.idempotency import HEADER as IDEMPOTENCY_HEADER
from services.api.requests.idempotency import KEY_PATTERN
from services.api.requests.ranges import RangeDetail, RangeRequests
from services.api.requests.service import RequestDetail, RequestList, Requests, detail_of, overview_of
from services.api.statistics import formats
from services.api.statistics.cache import Body, ResponseCache, beside_the_loop
from services.api.statistics.countries import CountryNames
from services.api.statistics.ledger import Ledger, ledger_of, needs_names, page_of, parse_date
from services.api.statistics.model import CountryStats, country_stats
from services.api.statistics.reader import SummaryReader
from services.api.unreadable import UnreadableAlone, named
from shared.domain.ids import RequestId
from shared.domain.requests import Status, status_of

REQUEST_ID_PATTERN = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
REQUEST_ID_LENGTH = 36
LISTED_REQUESTS_MAX = 500
LISTED_FILES_MAX = 1_000
LEDGER_CITIES_MAX = 1_000
AT_ONCE_MAX = 2_000
"""Country-days of an answer that is made whole, each time; a longer one is sent as it is made, and kept."""

DaysMax = NewType("DaysMax", int)


class ReadQuarantine(Protocol):
    """Reads the files in quarantine of a range of dates."""

    async def __call__(self, days: DateRange, *, limit: int) -> QuarantineList:
        """Return the first of them, and how many there are."""


RequestsPort = NamedDependency[SkipValidation[Requests]]
RangesPort = NamedDependency[SkipValidation[RangeRequests]]
FollowingPort = NamedDependency[SkipValidation[RequestEventStream]]
QuarantinePort = NamedDependency[SkipValidation[ReadQuarantine]]
CountriesPort = NamedDependency[SkipValidation[CountryNames]]
ReaderPort = NamedDependency[SkipValidation[SummaryReader]]
AnswersPort = NamedDependency[SkipValidation[ResponseCache]]

_AN_ID = Example(value="018f3d2a-5c00-7aaa-8bbb-0123456789ab")
RequestIdParameter = Annotated[str, PathParameter(description="The id that the request was given.", examples=[_AN_ID])]
RangeIdParameter = Annotated[str, PathParameter(description="The id that the range was given.", examples=[_AN_ID])]

BAD_REQUEST = "A parameter is missing, unknown, given twice, or cannot be used; the answer names it."
UNREADABLE = "The one stored object that was asked for cannot be read; the answer names it and the remedy."
S3_DOWN = "S3 cannot be reached. `Retry-After` says when to try again."


COUNTRY_LENGTH_MAX = 300
AFTER_LENGTH_MAX = 1_000


Prefer = Annotated[
    str,
    HeaderParameter(
        name="Prefer",
        description=f"`wait=N` holds the answer until the request has ended, for at most N seconds, and at most "
        f"{WAIT_MAX_S} of them.",
        examples=[Example(value="wait=30")],
    ),
]


def _date(name: str, description: str, example: str | None) -> QueryParameter:
    examples = None if example is None else [Example(value=example)]
    return QueryParameter(name=name, description=description, examples=examples)


@post(
    "/process-request",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Ask for a date to be processed",
    operation_id="processRequest",
    tags=["requests"],
    response_description="The request is taken in, and will be carried out.",
    response_headers=[
        ResponseHeader(
            name="Location",
            value="/process-requests/018f3d2a-5c00-7aaa-8bbb-0123456789ab",
            description="Where the request's status is.",
            documentation_only=True,
            required=True,
        )
    ],
    responses={
        HTTPStatus.OK: ResponseSpec(
            RequestDetail | RangeDetail,  # type: ignore[arg-type]  # a union documents well, though it is no type[Any]
            generate_examples=False,
            description="With `Prefer: wait`: the request has ended.",
        ),
        **responses(
            bad_request=BAD_REQUEST,
            unprocessable_entity="The `Idempotency-Key` was used with another date within the last 24 hours.",
            service_unavailable="Kafka did not acknowledge, or S3 cannot be reached. `Retry-After` says when to try "
            "again; asking twice is harmless.",
        ),
    },
)
async def process_request(
    *,
    request: Request[Any, Any, Any],
    requests: RequestsPort,
    following: FollowingPort,
    ranges: RangesPort,
    request_days_max: NamedDependency[SkipValidation[DaysMax]],
    processable: NamedDependency[SkipValidation[ProcessableDates]],
    date: Annotated[
        dt.date | None, _date("date", "The date to process, in the upstream's local time.", "2024-05-01")
    ] = None,
    # Examples of these two beside that of `date` would be one of a request that is refused.
    from_: Annotated[
        dt.date | None, _date("from", "Instead of `date`: the first of several, such as `2024-05-01`.", None)
    ] = None,
    to: Annotated[dt.date | None, _date("to", "With `from`: the last of them, included.", None)] = None,
    prefer: Prefer = "",
    idempotency_key: Annotated[
        str | None,
        HeaderParameter(
            name=IDEMPOTENCY_HEADER,
            description="A name for this request that you make up. The same again within 24 hours gives the same "
            "request, so that asking again after a lost answer asks once.",
            schema_extra={"pattern": KEY_PATTERN},
            examples=[Example(value="5f0c8a52-0d1f-4f8e-9a53-7f4b1f6f0a11")],
        ),
    ] = None,
) -> Response[RequestDetail | RangeDetail]:
    """Answer once Kafka has acknowledged the request and its status can be read at `Location`.

    Requests of a date are processed one after the other. One that was not begun yet is shared by all who ask for the
    date meanwhile: `Location` is the same. Asking for a date again stores only what changed upstream. A file is not
    even fetched if the upstream gives files an `ETag` or a `Last-Modified`, and says that it is unchanged. With `from`
    and `to` instead of `date`, each date of the range becomes a request, and `Location` is where the range's status is.
    """
    caller = request.state.get(CALLER, "")
    limit_s = wait_s(prefer)
    applied = {} if limit_s is None else {"Preference-Applied": f"wait={limit_s}"}
    if date is None or from_ is not None or to is not None:
        days = asked_range(date, from_, to, days_max=request_days_max)
        processable.check({"from": days.first, "to": days.last})
        detail = await ranges.accept(days, idempotency_key=idempotency_key, caller=caller)
        detail = await following.until_range_ended(ranges, detail, limit_s or 0)
        return Response(
            detail,
            status_code=_status_of_wait(detail.status, limit_s),
            headers={"Location": f"/process-ranges/{detail.id}", **applied},
        )
    processable.check({"date": date})
    record = await requests.accept(date, idempotency_key=idempotency_key, caller=caller)
    record = await following.until_ended(record, limit_s or 0)
    return Response(
        detail_of(record),
        status_code=_status_of_wait(status_of(record), limit_s),
        headers={"Location": f"/process-requests/{record.request_id}", **applied},
    )


def _status_of_wait(status: Status, limit_s: int | None) -> HTTPStatus:
    return HTTPStatus.OK if limit_s is not None and status.ended else HTTPStatus.ACCEPTED


@get(
    "/process-ranges/{range_id:str}",
    opt={SCOPE: READ_OR_PROCESS},
    summary="See how far a range of dates has come",
    operation_id="getProcessRange",
    tags=["requests"],
    response_description="The range, and the request of each date.",
    responses=responses(bad_request=BAD_REQUEST, not_found="There is no such range.", service_unavailable=S3_DOWN),
)
async def process_range_status(
    ranges: RangesPort,
    range_id: RangeIdParameter,
) -> RangeDetail:
    """Return what is done of all its dates together, and the request of each."""
    return await ranges.read(range_id)


@get(
    "/process-requests/{request_id:str}",
    opt={SCOPE: READ_OR_PROCESS},
    summary="See how far a request has come",
    operation_id="getProcessRequest",
    tags=["requests"],
    response_description="The request, and how far it has come.",
    responses=responses(
        bad_request=BAD_REQUEST,
        not_found="There is no such request.",
        internal_server_error=UNREADABLE,
        service_unavailable=S3_DOWN,
    ),
)
async def process_request_status(
    requests: RequestsPort,
    request_id: RequestIdParameter,
) -> RequestDetail:
    """Return what is done of the total, and every failure with its reason."""
    return detail_of(await requests.read(request_id))


@post(
    "/process-requests/{request_id:str}/retry",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Take up the failed cities of a request again",
    operation_id="retryProcessRequest",
    tags=["requests"],
    response_description="The failed cities will be fetched again, and the request is running.",
    responses={
        HTTPStatus.OK: ResponseSpec(
            RequestDetail, generate_examples=False, description="With `Prefer: wait`: the retry has ended."
        ),
        **responses(
            bad_request=BAD_REQUEST,
            not_found="There is no such request.",
            conflict="The request has not ended, or no city of it has failed.",
            service_unavailable="Kafka did not acknowledge, or S3 cannot be reached. `Retry-After` says when to try "
            "again; asking twice is harmless.",
        ),
    },
)
async def retry_process_request(
    requests: RequestsPort,
    following: FollowingPort,
    request_id: RequestIdParameter,
    prefer: Prefer = "",
) -> Response[RequestDetail]:
    """Answer once the retry is recorded and Kafka has acknowledged it.

    No other city is fetched, unless the date's plan has changed since.

    The request keeps its id and is running again; `retry` says how far the retry has come. Once its last failed city is
    served, the request is *completed*.
    """
    limit_s = wait_s(prefer)
    record = await following.until_ended(await requests.retry(request_id), limit_s or 0)
    return Response(
        detail_of(record),
        status_code=_status_of_wait(status_of(record), limit_s),
        headers={} if limit_s is None else {"Preference-Applied": f"wait={limit_s}"},
    )


@delete(
    "/process-requests/{request_id:str}",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Cancel a request",
    operation_id="cancelProcessRequest",
    tags=["requests"],
    response_description="The request is being cancelled: its status says when it has ended.",
    responses=responses(
        bad_request=BAD_REQUEST,
        not_found="There is no such request.",
        conflict="The request has ended: nothing is left to cancel.",
        service_unavailable=S3_DOWN,
    ),
)
async def cancel_process_request(
    requests: RequestsPort,
    request_id: RequestIdParameter,
) -> RequestDetail:
    """Have the cities skipped that are not started yet, and let those end that are.

    Every client that joined the request shares its end. What the cities say is counted. Asking again while it has not
    ended is harmless. A request that ends with every city done all the same is completed, not cancelled.
    """
    return detail_of(await requests.cancel(request_id))


@delete(
    "/process-ranges/{range_id:str}",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Cancel a range of dates",
    operation_id="cancelProcessRange",
    tags=["requests"],
    response_description="The requests of the range are being cancelled.",
    responses=responses(
        bad_request=BAD_REQUEST,
        not_found="There is no such range.",
        conflict="Every request of the range has ended: nothing is left to cancel.",
        service_unavailable=S3_DOWN,
    ),
)
async def cancel_process_range(
    ranges: RangesPort,
    range_id: RangeIdParameter,
) -> RangeDetail:
    """Cancel each request of the range that has not ended."""
    return await ranges.cancel(range_id)


@get(
    "/process-requests/{request_id:str}/events",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Follow a request until its end",
    operation_id="followProcessRequest",
    tags=["requests"],
    responses={
        HTTPStatus.OK: ResponseSpec(
            ProgressEvent,
            generate_examples=False,
            description="Server-sent events, each as the schema says. The stream ends after the event that the request "
            "ended in.",
            media_type="text/event-stream",
        ),
        HTTPStatus.NO_CONTENT: ResponseSpec(
            None, generate_examples=False, description="The request has ended, and its last event was seen."
        ),
        **responses(
            bad_request=BAD_REQUEST,
            not_found="There is no such request.",
            service_unavailable="S3 cannot be reached, or too many clients follow requests. `Retry-After` says when to "
            "try again.",
        ),
    },
)
async def process_request_events(
    requests: RequestsPort,
    following: FollowingPort,
    request_id: RequestIdParameter,
    last_event_id: Annotated[
        str,
        HeaderParameter(
            name="Last-Event-ID",
            description="The id of the last event that was seen: the stream goes on after it.",
            examples=[Example(value="12")],
        ),
    ] = "",
) -> Response[Any]:
    """Send an event whenever the request makes progress, from its present state on.

    Comments are sent while nothing changes, so that a connection that is gone is found out.
    """
    events = following.events(await requests.read(request_id), last_event_id)
    if events is None:
        return Response(None, status_code=HTTPStatus.NO_CONTENT)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(events, media_type="text/event-stream", headers=headers)


@get(
    "/process-requests",
    summary="List the latest requests",
    operation_id="listProcessRequests",
    tags=["requests"],
    response_description="The latest requests, the latest first.",
    responses=responses(bad_request=BAD_REQUEST, service_unavailable=S3_DOWN),
)
async def latest_process_requests(
    requests: RequestsPort,
    limit: Annotated[
        int,
        QueryParameter(
            description="How many are listed at most.",
            ge=1,
            le=LISTED_REQUESTS_MAX,
            examples=[Example(value=50)],
        ),
    ] = 50,
    after: Annotated[
        str | None,
        QueryParameter(
            description="The id of the request that the list goes on after, to those made before it: `next` has it.",
            pattern=REQUEST_ID_PATTERN,
            max_length=REQUEST_ID_LENGTH,
            examples=[Example(value="018f3d2a-5c00-7aaa-8bbb-0123456789ab")],
        ),
    ] = None,
) -> Response[RequestList]:
    """Return the latest requests first, without their failures."""
    latest = await requests.latest(limit, after=None if after is None else RequestId(after))
    shown_list = RequestList(
        requests=tuple(overview_of(record) for record in latest.records),
        unreadable=tuple(latest.unreadable),
        next=f"/process-requests?limit={limit}&after={latest.last}" if latest.last else None,
    )
    return Response(shown_list, headers=named(latest.unreadable))


@get(
    "/quarantine",
    summary="List the files that were refused",
    operation_id="listQuarantine",
    tags=["requests"],
    response_description="The files in quarantine, by date and city.",
    responses=responses(bad_request=BAD_REQUEST, service_unavailable=S3_DOWN),
)
async def files_in_quarantine(
    *,
    quarantine: QuarantinePort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: Annotated[dt.date, _date("from", "The first day.", "2024-05-01")],
    to: Annotated[dt.date, _date("to", "The last day, included.", "2024-05-31")],
    limit: Annotated[
        int,
        QueryParameter(
            description="How many are listed at most.",
            ge=1,
            le=LISTED_FILES_MAX,
            examples=[Example(value=100)],
        ),
    ] = 100,
) -> Response[QuarantineList]:
    """Return the files that were refused as a whole, each with why, and with the first of its bad records.

    A file that has been put right upstream stays listed until it is cleaned up: what counts is in the ledger.
    """
    listed = await quarantine(date_range(from_, to, days_max=days_max), limit=limit)
    return Response(listed, headers=named(listed.unreadable))


@get(
    "/country-stats",
    middleware=[FirstVersionQuery],
    summary="Get the statistics of a range of dates, by country",
    operation_id="getCountryStats",
    tags=["statistics"],
    operation_class=StatisticsOperation,
    responses={
        HTTPStatus.OK: ResponseSpec(
            CountryStats,
            generate_examples=False,
            description="The statistics. With `detail=full`, each day also says how complete it is.",
            examples=[
                Example(summary="as it is", value=examples.COUNTRY_STATS),
                Example(summary="with detail=full", value=examples.COUNTRY_STATS_IN_FULL),
            ],
        ),
        HTTPStatus.NOT_MODIFIED: ResponseSpec(
            None, generate_examples=False, description="The answer still is the one whose ETag `If-None-Match` has."
        ),
        **responses(
            bad_request=BAD_REQUEST,
            not_found="There is no such country; the answer names those with the nearest names.",
            not_acceptable="`Accept` takes none of JSON, NDJSON and CSV.",
            internal_server_error=UNREADABLE,
            service_unavailable=S3_DOWN,
        ),
    },
)
async def statistics_by_country(
    *,
    request: Request[Any, Any, Any],
    reader: ReaderPort,
    countries: CountriesPort,
    answers: AnswersPort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: Annotated[dt.date, _date("from", "The first day.", "2024-05-01")],
    to: Annotated[dt.date, _date("to", "The last day, included.", "2024-05-31")],
    country: Annotated[
        str | None,
        QueryParameter(
            description="The slug of one country, or its name if no other country has it; without it, all.",
            min_length=1,
            max_length=COUNTRY_LENGTH_MAX,
            examples=[Example(value="armenia")],
        ),
    ] = None,
    detail: Annotated[
        Literal["full"] | None,
        QueryParameter(
            description="`full` adds to each day how complete it is, and what its figures are computed from.",
            examples=[Example(value="full")],
        ),
    ] = None,
) -> Response[Any]:
    """Return the statistics by country slug and date, both sorted.

    A country with data on any day of the range has every day of it; a day without data is zeros and `false`. With
    `detail=full`, `version` 0 marks a day that was never requested, and a country that is only planned is there too.
    A stored day that cannot be read is named in `Tripfold-Unreadable`; it is left out, or says why with `detail=full`.
    `Accept` chooses JSON, NDJSON or CSV (a line for each country-day), `Accept-Encoding` zstd or gzip. The ETag is
    strong: ask again with `If-None-Match`, and the answer is 304 until a number changes.
    """
    days = date_range(from_, to, days_max=days_max)
    form = media_type(request.headers.get("accept", ""), formats.MEDIA_TYPES)
    coding = content_coding(request.headers.get("accept-encoding", ""), CODINGS)
    slug, listed = await countries.find_or_all(country)
    query = (days.first.isoformat(), days.last.isoformat(), slug or "", detail or "")
    known = request.headers.get("if-none-match", "")

    body: Body | None = None

    def etag_of(tag: str) -> str:
        return strong_etag([formats.VERSION, *query, form, coding, tag])

    def suffices(tag: str) -> bool:
        nonlocal body
        body = answers.find(etag_of(tag))
        return listed and (body is not None or is_known(known, etag_of(tag)))

    reading = await reader.read(days, slug, suffices=suffices)
    if reading.unreadable and slug is not None and days.days == 1:
        raise UnreadableAlone(reading.unreadable[0])
    if not listed and not reading.heads and not reading.unreadable:
        raise await countries.unknown(country or "")
    etag = etag_of(reading.tag)
    headers = {
        "ETag": etag,
        "Vary": "Accept, Accept-Encoding",
        "Cache-Control": "no-cache",
        **named(reading.unreadable),
    }
    if is_known(known, etag):
        return Response(b"", status_code=HTTPStatus.NOT_MODIFIED, headers=headers)

    headers |= {} if coding == IDENTITY else {"Content-Encoding": coding}
    if reading.heads is not None:
        body = answers.find(etag)  # another client's, begun since
    content_type = formats.content_type(form)
    if body is not None:
        return Stream(body.parts(), media_type=content_type, headers=headers | _length_of(body))
    detailed = detail == "full"
    stats = country_stats(reading.heads or [], days, detailed=detailed, unreadable=reading.unreadable)
    parts = coded_parts(formats.written(stats, form, detailed=detailed), coding)
    day_bytes = formats.bytes_of_day(detailed=detailed, compressed=coding != IDENTITY)
    content = await _content_of(answers, etag, parts, country_days=len(reading.heads or []), day_bytes=day_bytes)
    if isinstance(content, bytes):
        return Response(content, media_type=content_type, headers=headers)
    return Stream(content, media_type=content_type, headers=headers)


async def _content_of(
    answers: ResponseCache, etag: str, parts: Iterator[bytes], *, country_days: int, day_bytes: int
) -> bytes | AsyncIterator[bytes]:
    """Make a short body whole; make a long one once for all who ask for it, if there is room to keep it."""
    if country_days <= AT_ONCE_MAX:
        return await asyncio.to_thread(b"".join, parts)
    body = answers.begin(etag, parts, expected_bytes=country_days * day_bytes)
    return beside_the_loop(parts) if body is None else body.parts()


def _length_of(body: Body) -> dict[str, str]:
    return {"Content-Length": str(body.size_bytes)} if body.done else {}


@get(
    "/country-stats/{country:str}/{date:str}",
    summary="Get the ledger of a country-day: every city's contribution, and where it comes from",
    operation_id="getCountryDayLedger",
    tags=["statistics"],
    response_description="The totals of the day, and a page of its cities.",
    responses=responses(
        bad_request=BAD_REQUEST,
        not_found="Nothing is known of this country-day.",
        internal_server_error=UNREADABLE,
        service_unavailable=S3_DOWN,
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
            description="How many cities a page has at most.",
            ge=1,
            le=LEDGER_CITIES_MAX,
            examples=[Example(value=100)],
        ),
    ] = 100,
    after: Annotated[
        str,
        QueryParameter(
            description="The city id that the page begins after: `next` has it.",
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
        raise NotFound(f"Nothing is known of the country {shown(country)} on {shown(date)}.")
    page = page_of(summary, after=after, limit=limit)
    manifests, unreadable = await reader.manifests(summary.date, page.city_ids)
    names = {}
    if needs_names(summary, page, manifests):
        names = await reader.city_names(summary.date, summary.country)
    ledger = ledger_of(summary, page, manifests, limit=limit, planned_names=names)
    return Response(ledger, headers=named(unreadable))


def api_router(access: Access) -> Router:
    """Return the operations under one router, which refuses who may not use them, and queries they do not declare."""
    return Router(
        path="/",
        route_handlers=[
            process_request,
            process_request_status,
            process_range_status,
            retry_process_request,
            process_request_events,
            cancel_process_request,
            cancel_process_range,
            latest_process_requests,
            files_in_quarantine,
            statistics_by_country,
            ledger_of_country_day,
        ],
        before_request=refuse_undeclared,
        guards=[access.guard],
        security=[{"key": []}, {"bearer": []}] if access.needs_key else None,
    )
