"""HTTP operations for backfills. Each parses its input, calls a service, and responds."""

from __future__ import annotations

import datetime as dt
from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, delete, get, post
from litestar.datastructures import ResponseHeader
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import PathParameter, QueryParameter, SkipValidation

from services.api.auth import PROCESS, READ_OR_PROCESS, SCOPE, caller_of
from services.api.backfills.service import (
    BackfillDetail,
    BackfillList,
    BackfillPreview,
    Backfills,
    Order,
    Wanted,
    detail_of,
)
from services.api.http.date_range import DaysMax, ProcessableDates, date_range
from services.api.http.errors import InvalidParameter, InvalidRequest
from services.api.http.problems import UNREADABLE, responses
from services.api.http.query_parameters import date_parameter
from services.api.http.unreadable import unreadable_header
from services.api.middleware.access_log import log_result
from services.api.requests.event_stream import EventStream, ProgressEvent
from services.api.routes.requests import (
    EXAMPLE_ID,
    REQUEST_ID_LENGTH,
    REQUEST_ID_PATTERN,
    AccessPort,
    IdempotencyKey,
    LastEventId,
    stream_response,
)
from shared.domain.backfills import (
    DATES_MAX,
    MAX_PARALLEL_DEFAULT,
    MAX_PARALLEL_MAX,
)
from shared.domain.events import Background, Source
from shared.domain.ids import CITY_ID_LENGTH_MAX, SLUG_LENGTH_MAX, CityId, CountrySlug, RequestId
from shared.domain.objects import Backfill, DateSelection

LISTED_MAX = 500

BackfillsPort = NamedDependency[SkipValidation[Backfills]]
BackfillStreamPort = NamedDependency[SkipValidation[EventStream[Backfill]]]

BackfillId = Annotated[str, PathParameter(description="The backfill's id.", examples=[EXAMPLE_ID])]

_NO_SUCH = "There is no such backfill."
_CHANGED = "The backfill after the change. Planners act on it within seconds."


@post(
    "/backfills",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Process many dates",
    operation_id="createBackfill",
    tags=["backfills"],
    response_description="The backfill is accepted; planners request its dates.",
    response_headers=[
        ResponseHeader(
            name="Location",
            value="/backfills/018f3d2a-5c00-7aaa-8bbb-0123456789ab",
            description="The path of the backfill.",
            documentation_only=True,
            required=True,
        )
    ],
    responses={
        HTTPStatus.OK: ResponseSpec(
            BackfillPreview,
            generate_examples=False,
            description="With `dry_run=true`: the dates that it would process.",
        ),
        **responses(
            conflict="Too many backfills are open.",
            unprocessable_entity="The `Idempotency-Key` was used for something else within the last 24 hours.",
        ),
    },
)
async def create_backfill(
    *,
    request: Request[Any, Any, Any],
    backfills: BackfillsPort,
    processable: NamedDependency[SkipValidation[ProcessableDates]],
    from_: Annotated[dt.date, date_parameter("from", "The first date.", "2024-05-01")],
    to: Annotated[dt.date, date_parameter("to", f"The last date, included: at most {DATES_MAX} dates.", "2024-05-31")],
    only: Annotated[
        DateSelection,
        QueryParameter(
            description="`missing`: dates that lack the data of a city, or were never processed. `failed`: dates that "
            "were processed and lack the data of a city. `stored`: dates that were processed. `all`: every date.",
            examples=[Example(value="missing")],
        ),
    ] = DateSelection.MISSING,
    order: Annotated[
        Order, QueryParameter(description="Which dates are processed first.", examples=[Example(value="newest-first")])
    ] = "oldest-first",
    max_parallel: Annotated[
        int,
        QueryParameter(
            description="The most dates that are processed at once.",
            ge=1,
            le=MAX_PARALLEL_MAX,
            examples=[Example(value=2)],
        ),
    ] = MAX_PARALLEL_DEFAULT,
    source: Annotated[
        Source,
        QueryParameter(
            description="`bucket` reads the stored files again under the present rules, without the upstream. It "
            "processes every date that was processed before; `only` has no effect.",
            examples=[Example(value="upstream")],
        ),
    ] = Source.UPSTREAM,
    country: Annotated[
        str | None,
        QueryParameter(
            description="With `source=bucket`: the slug of the only country to read.",
            pattern=r"^[a-z0-9-]+$",
            max_length=SLUG_LENGTH_MAX,
            examples=[Example(value="armenia")],
        ),
    ] = None,
    city: Annotated[
        str | None,
        QueryParameter(
            description="With `source=bucket`: the id of the only city to read.",
            pattern=r"^[^/\s]+$",
            max_length=CITY_ID_LENGTH_MAX,
            examples=[Example(value="7")],
        ),
    ] = None,
    again: Annotated[
        bool,
        QueryParameter(
            description="With `source=bucket`: also read files for which the rules should give the same numbers.",
            examples=[Example(value=False)],
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        QueryParameter(description="`true`: say which dates it would process.", examples=[Example(value=True)]),
    ] = False,
    idempotency_key: IdempotencyKey = None,
) -> Response[BackfillDetail | BackfillPreview]:
    """Respond once the backfill is stored. Planners then request its dates, a few at a time.

    A backfill survives the crash of any process. It can be paused, resumed and cancelled, and its failed dates retried.
    """
    days = date_range(from_, to, days_max=DaysMax(DATES_MAX))
    processable.check({"from": days.first, "to": days.last})
    if source is not Source.BUCKET and (country or city or again):
        reason = f"country, city and again need stored files, and source is {source.value}; use bucket"
        raise InvalidRequest(InvalidParameter(name="source", reason=reason))
    wanted = Wanted(
        first=days.first,
        last=days.last,
        selection=DateSelection.STORED if source is Source.BUCKET else only,
        newest_first=order == "newest-first",
        max_parallel=max_parallel,
        background=Background(
            source=source,
            country=None if country is None else CountrySlug(country),
            city_id=None if city is None else CityId(city),
            again=again,
        ),
    )
    if dry_run:
        return Response(await backfills.preview(wanted), status_code=HTTPStatus.OK)
    backfill = await backfills.accept(wanted, idempotency_key=idempotency_key, by=caller_of(request))
    log_result(request, backfill_id=backfill.backfill_id)
    return Response(detail_of(backfill), headers={"Location": f"/backfills/{backfill.backfill_id}"})


@get(
    "/backfills",
    summary="List the latest backfills",
    operation_id="listBackfills",
    tags=["backfills"],
    response_description="The latest backfills, newest first.",
    responses=responses(),
)
async def latest_backfills(
    backfills: BackfillsPort,
    limit: Annotated[
        int,
        QueryParameter(
            description="The maximum number of backfills to list.", ge=1, le=LISTED_MAX, examples=[Example(value=50)]
        ),
    ] = 50,
    after: Annotated[
        str | None,
        QueryParameter(
            description="The id of a backfill: only those made before it are listed. Follow `next` to page.",
            pattern=REQUEST_ID_PATTERN,
            max_length=REQUEST_ID_LENGTH,
            examples=[EXAMPLE_ID],
        ),
    ] = None,
) -> Response[BackfillList]:
    """Return the latest backfills, newest first, those of schedules included."""
    listed = await backfills.latest(limit, after=None if after is None else RequestId(after))
    return Response(listed, headers=unreadable_header(listed.unreadable))


@get(
    "/backfills/{backfill_id:str}",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Get the progress of a backfill",
    operation_id="getBackfill",
    tags=["backfills"],
    response_description="The backfill and its progress.",
    responses=responses(not_found=_NO_SUCH, internal_server_error=UNREADABLE),
)
async def backfill_status(backfills: BackfillsPort, backfill_id: BackfillId) -> BackfillDetail:
    """Return the counts of its dates, its speed and estimated end, and the requests of its failed dates."""
    return detail_of(await backfills.read(backfill_id))


@get(
    "/backfills/{backfill_id:str}/events",
    opt={SCOPE: READ_OR_PROCESS},
    summary="Stream the progress of a backfill",
    operation_id="followBackfill",
    tags=["backfills"],
    responses={
        HTTPStatus.OK: ResponseSpec(
            ProgressEvent,
            generate_examples=False,
            description="Server-sent events, each as the schema says. The stream ends after the event that shows the "
            "end of the backfill.",
            media_type="text/event-stream",
        ),
        HTTPStatus.NO_CONTENT: ResponseSpec(
            None, generate_examples=False, description="The backfill has ended, and the client has its last event."
        ),
        **responses(
            not_found=_NO_SUCH,
            internal_server_error=UNREADABLE,
            service_unavailable="S3 cannot be reached, or too many streams are open. `Retry-After` says when to try "
            "again.",
        ),
    },
)
async def backfill_events(
    *,
    request: Request[Any, Any, Any],
    access: AccessPort,
    backfills: BackfillsPort,
    backfill_stream: BackfillStreamPort,
    backfill_id: BackfillId,
    last_event_id: LastEventId = "",
) -> Response[Any]:
    """Send the present state of the backfill, then an event for each change."""
    return await stream_response(backfill_stream, await backfills.read(backfill_id), last_event_id, request, access)


@post(
    "/backfills/{backfill_id:str}/pause",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.OK,
    summary="Pause a backfill",
    operation_id="pauseBackfill",
    tags=["backfills"],
    response_description=_CHANGED,
    responses=responses(not_found=_NO_SUCH, conflict="It has ended.", internal_server_error=UNREADABLE),
)
async def pause_backfill(
    request: Request[Any, Any, Any], backfills: BackfillsPort, backfill_id: BackfillId
) -> BackfillDetail:
    """Request no further date. Dates under way are processed to their end."""
    return detail_of(await backfills.change(backfill_id, "pause", by=caller_of(request)))


@post(
    "/backfills/{backfill_id:str}/resume",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.OK,
    summary="Resume a backfill",
    operation_id="resumeBackfill",
    tags=["backfills"],
    response_description=_CHANGED,
    responses=responses(not_found=_NO_SUCH, conflict="It has ended.", internal_server_error=UNREADABLE),
)
async def resume_backfill(
    request: Request[Any, Any, Any], backfills: BackfillsPort, backfill_id: BackfillId
) -> BackfillDetail:
    """Continue a paused backfill. Harmless if it runs."""
    return detail_of(await backfills.change(backfill_id, "resume", by=caller_of(request)))


@post(
    "/backfills/{backfill_id:str}/retry",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.OK,
    summary="Retry the failed dates of a backfill",
    operation_id="retryBackfill",
    tags=["backfills"],
    response_description=_CHANGED,
    responses=responses(
        not_found=_NO_SUCH,
        conflict="None of its dates has failed, or it was cancelled.",
        internal_server_error=UNREADABLE,
    ),
)
async def retry_backfill(
    request: Request[Any, Any, Any], backfills: BackfillsPort, backfill_id: BackfillId
) -> BackfillDetail:
    """Retry the failed cities of each failed date, under the id of its request. This also resumes a paused backfill."""
    return detail_of(await backfills.change(backfill_id, "retry", by=caller_of(request)))


@delete(
    "/backfills/{backfill_id:str}",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Cancel a backfill",
    operation_id="cancelBackfill",
    tags=["backfills"],
    response_description=_CHANGED,
    responses=responses(
        not_found=_NO_SUCH, conflict="It has ended, so nothing is left to cancel.", internal_server_error=UNREADABLE
    ),
)
async def cancel_backfill(
    request: Request[Any, Any, Any], backfills: BackfillsPort, backfill_id: BackfillId
) -> BackfillDetail:
    """Cancel the requests of the dates under way, and request no further date. Finished dates stay."""
    return detail_of(await backfills.change(backfill_id, "cancel", by=caller_of(request)))


HANDLERS = [
    create_backfill,
    latest_backfills,
    backfill_status,
    backfill_events,
    pause_backfill,
    resume_backfill,
    retry_backfill,
    cancel_backfill,
]
