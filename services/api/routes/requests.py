"""HTTP operations for processing requests. Each parses its input, calls a service, and responds."""

from __future__ import annotations

import datetime as dt
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation
from litestar.response import Stream

from services.api.auth import PROCESS, READ_OR_PROCESS, SCOPE, Access, caller_of, named
from services.api.http.date_range import ProcessableDates
from services.api.http.problems import UNREADABLE, responses
from services.api.http.query_parameters import date_parameter
from services.api.http.unreadable import unreadable_header
from services.api.middleware.access_log import log_result
from services.api.requests.event_stream import WAIT_MAX_S, EventStream, ProgressEvent, wait_s
from services.api.requests.idempotency import HEADER as IDEMPOTENCY_HEADER
from services.api.requests.idempotency import KEY_PATTERN
from services.api.requests.service import RequestDetail, RequestList, Requests, detail_of, overview_of
from shared.domain.ids import RequestId
from shared.domain.objects import RequestRecord
from shared.domain.requests import Status, status_of

REQUEST_ID_PATTERN = "^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"
REQUEST_ID_LENGTH = 36
LISTED_REQUESTS_MAX = 500

RequestsPort = NamedDependency[SkipValidation[Requests]]
EventStreamPort = NamedDependency[SkipValidation[EventStream[RequestRecord]]]
AccessPort = NamedDependency[SkipValidation[Access]]

EXAMPLE_ID = Example(value="018f3d2a-5c00-7aaa-8bbb-0123456789ab")
RequestIdParameter = Annotated[str, PathParameter(description="The request's id.", examples=[EXAMPLE_ID])]

KAFKA_OR_S3_UNAVAILABLE = (
    "Kafka did not acknowledge, or S3 cannot be reached. `Retry-After` says when to try again. Repeating the request "
    "is harmless."
)

Prefer = Annotated[
    str,
    HeaderParameter(
        name="Prefer",
        description="`wait=N` delays the response until the request has ended, for at most N seconds. The limit is "
        f"{WAIT_MAX_S} seconds.",
        examples=[Example(value="wait=30")],
    ),
]

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name=IDEMPOTENCY_HEADER,
        description="A name that you make up for this request. Within 24 hours the same key returns the same "
        "request, so a retry after a lost response is safe.",
        schema_extra={"pattern": KEY_PATTERN},
        examples=[Example(value="5f0c8a52-0d1f-4f8e-9a53-7f4b1f6f0a11")],
    ),
]

LastEventId = Annotated[
    str,
    HeaderParameter(
        name="Last-Event-ID",
        description="The id of the last event that the client has; the stream continues after it.",
        examples=[Example(value="12")],
    ),
]


@post(
    "/process-request",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Request the processing of a date",
    operation_id="processRequest",
    tags=["requests"],
    response_description="The request is accepted and will be processed.",
    response_headers=[
        ResponseHeader(
            name="Location",
            value="/process-requests/018f3d2a-5c00-7aaa-8bbb-0123456789ab",
            description="The path of the request's status.",
            documentation_only=True,
            required=True,
        )
    ],
    responses={
        HTTPStatus.OK: ResponseSpec(
            RequestDetail, generate_examples=False, description="With `Prefer: wait`: the request has ended."
        ),
        **responses(
            unprocessable_entity="The `Idempotency-Key` was used with another date within the last 24 hours.",
            service_unavailable=KAFKA_OR_S3_UNAVAILABLE,
        ),
    },
)
async def process_request(
    *,
    request: Request[Any, Any, Any],
    requests: RequestsPort,
    event_stream: EventStreamPort,
    processable: NamedDependency[SkipValidation[ProcessableDates]],
    date: Annotated[
        dt.date, date_parameter("date", "The date to process, in the upstream's local time.", "2024-05-01")
    ],
    prefer: Prefer = "",
    idempotency_key: IdempotencyKey = None,
) -> Response[RequestDetail]:
    """Respond once Kafka has acknowledged the request and its status can be read at `Location`.

    The requests of one date run one after the other. All clients that ask for a date share a request that has not
    begun, and get the same `Location`. Processing a date again stores only the files that changed upstream. A file is
    not fetched at all if the upstream sends an `ETag` or `Last-Modified` and reports no change.

    `POST /backfills` processes a range of dates.
    """
    by = caller_of(request)
    limit_s = wait_s(prefer)
    applied = {} if limit_s is None else {"Preference-Applied": f"wait={limit_s}"}
    processable.check({"date": date})
    record = await requests.accept(date, idempotency_key=idempotency_key, by=by)
    log_result(request, request_id=record.request_id)
    record = await event_stream.until_ended(record, limit_s or 0)
    return Response(
        detail_of(record),
        status_code=_status_of_wait(status_of(record), limit_s),
        headers={"Location": f"/process-requests/{record.request_id}", **applied},
    )


def _status_of_wait(status: Status, limit_s: int | None) -> HTTPStatus:
    return HTTPStatus.OK if limit_s is not None and status.ended else HTTPStatus.ACCEPTED


@get(
    "/process-requests/{request_id:str}",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Get the progress of a request",
    operation_id="getProcessRequest",
    tags=["requests"],
    response_description="The request and its progress.",
    responses=responses(
        not_found="There is no such request.",
        internal_server_error=UNREADABLE,
    ),
)
async def process_request_status(
    requests: RequestsPort,
    request_id: RequestIdParameter,
) -> RequestDetail:
    """Return how much of the total is done, and every failure with its reason."""
    return detail_of(await requests.read(request_id))


@post(
    "/process-requests/{request_id:str}/retry",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Retry the failed cities of a request",
    operation_id="retryProcessRequest",
    tags=["requests"],
    response_description="The failed cities will be fetched again, and the request is running.",
    responses={
        HTTPStatus.OK: ResponseSpec(
            RequestDetail, generate_examples=False, description="With `Prefer: wait`: the retry has ended."
        ),
        **responses(
            not_found="There is no such request.",
            conflict="The request has not ended, or no city of it has failed.",
            service_unavailable=KAFKA_OR_S3_UNAVAILABLE,
        ),
    },
)
async def retry_process_request(
    request: Request[Any, Any, Any],
    requests: RequestsPort,
    event_stream: EventStreamPort,
    request_id: RequestIdParameter,
    prefer: Prefer = "",
) -> Response[RequestDetail]:
    """Respond once the retry is recorded and Kafka has acknowledged it.

    Only the failed cities are fetched, unless the date's plan has changed since.

    The request keeps its id and runs again; `retry` shows its progress. When the last failed city is served, the
    request is *completed*.
    """
    limit_s = wait_s(prefer)
    record = await event_stream.until_ended(await requests.retry(request_id, by=caller_of(request)), limit_s or 0)
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
    response_description="The request is being cancelled; its status shows when it has ended.",
    responses=responses(
        not_found="There is no such request.",
        conflict="The request has ended, so nothing is left to cancel.",
    ),
)
async def cancel_process_request(
    request: Request[Any, Any, Any],
    requests: RequestsPort,
    request_id: RequestIdParameter,
) -> RequestDetail:
    """Skip the cities that have not started; cities already in progress finish normally.

    The cancellation affects every client that shares the request. Trips of finished cities are counted. Repeating the
    call before the request ends is harmless. A request whose cities all finish is completed, not cancelled.
    """
    return detail_of(await requests.cancel(request_id, by=caller_of(request)))


@get(
    "/process-requests/{request_id:str}/events",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Stream the progress of a request",
    operation_id="followProcessRequest",
    tags=["requests"],
    responses={
        HTTPStatus.OK: ResponseSpec(
            ProgressEvent,
            generate_examples=False,
            description="Server-sent events, each as the schema says. The stream ends after the event that shows the "
            "end of the request.",
            media_type="text/event-stream",
        ),
        HTTPStatus.NO_CONTENT: ResponseSpec(
            None, generate_examples=False, description="The request has ended, and the client has its last event."
        ),
        **responses(
            not_found="There is no such request.",
            service_unavailable="S3 cannot be reached, or too many streams are open. `Retry-After` says when to try "
            "again.",
        ),
    },
)
async def process_request_events(
    *,
    request: Request[Any, Any, Any],
    access: AccessPort,
    requests: RequestsPort,
    event_stream: EventStreamPort,
    request_id: RequestIdParameter,
    last_event_id: LastEventId = "",
) -> Response[Any]:
    """Send the present state of the request, then an event for each change.

    While nothing changes, comments are sent as heartbeats, so that a lost connection is noticed. The stream also ends
    when the API key is revoked or expires.
    """
    return await stream_response(event_stream, await requests.read(request_id), last_event_id, request, access)


async def stream_response(
    event_stream: EventStream[Any], state: Any, last_seen: str, request: Request[Any, Any, Any], access: Access
) -> Response[Any]:
    """Return the response with a stream of events, or that without content if the client has all of them."""
    allowed = partial(access.still_allows, request)
    events = await event_stream.events(state, last_seen, caller=named(caller_of(request)), allowed=allowed)
    if events is None:
        return Response(None, status_code=HTTPStatus.NO_CONTENT)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Stream(events, media_type="text/event-stream", headers=headers)


@get(
    "/process-requests",
    summary="List the latest requests",
    operation_id="listProcessRequests",
    tags=["requests"],
    response_description="The latest requests, newest first.",
    responses=responses(),
)
async def latest_process_requests(
    requests: RequestsPort,
    limit: Annotated[
        int,
        QueryParameter(
            description="The maximum number of requests to list.",
            ge=1,
            le=LISTED_REQUESTS_MAX,
            examples=[Example(value=50)],
        ),
    ] = 50,
    after: Annotated[
        str | None,
        QueryParameter(
            description="The id of a request: only requests made before it are listed. Follow `next` to page.",
            pattern=REQUEST_ID_PATTERN,
            max_length=REQUEST_ID_LENGTH,
            examples=[EXAMPLE_ID],
        ),
    ] = None,
) -> Response[RequestList]:
    """Return the latest requests, newest first, without their failures."""
    latest = await requests.latest(limit, after=None if after is None else RequestId(after))
    listed = RequestList(
        requests=tuple(overview_of(record) for record in latest.records),
        unreadable=tuple(latest.unreadable),
        next=f"/process-requests?limit={limit}&after={latest.last}" if latest.last else None,
    )
    return Response(listed, headers=unreadable_header(latest.unreadable))


HANDLERS = [
    process_request,
    process_request_status,
    retry_process_request,
    process_request_events,
    cancel_process_request,
    latest_process_requests,
]
