"""HTTP operations for files in quarantine: which files were refused, why, and their retry."""

from __future__ import annotations

import datetime as dt
from http import HTTPStatus
from typing import Annotated, Any, Literal

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.openapi.spec import Example
from litestar.params import QueryParameter, SkipValidation

from services.api.auth import PROCESS, SCOPE, caller_of
from services.api.http.date_range import DaysMax, date_range
from services.api.http.errors import InvalidParameter, InvalidRequest
from services.api.http.problems import responses
from services.api.http.query_parameters import date_parameter
from services.api.http.unreadable import unreadable_header
from services.api.quarantine.service import (
    Quarantine,
    QuarantineFilter,
    QuarantineList,
    QuarantineRetry,
)
from services.api.routes.requests import KAFKA_OR_S3_UNAVAILABLE
from shared.domain.ids import CITY_ID_LENGTH_MAX, SLUG_LENGTH_MAX, CityId, CountrySlug

LISTED_FILES_MAX = 1_000

QuarantinePort = NamedDependency[SkipValidation[Quarantine]]

From = Annotated[
    dt.date | None, date_parameter("from", "The first day. Default, also of `to`: all days.", "2024-05-01")
]
To = Annotated[dt.date | None, date_parameter("to", "The last day, included.", "2024-05-31")]
Country = Annotated[
    str | None,
    QueryParameter(
        description="Only files of this country, by its slug.",
        pattern=r"^[a-z0-9-]+$",
        max_length=SLUG_LENGTH_MAX,
        examples=[Example(value="armenia")],
    ),
]
City = Annotated[
    str | None,
    QueryParameter(
        description="Only files of this city, by its `city_id`.",
        pattern=r"^[^/\s]+$",
        max_length=CITY_ID_LENGTH_MAX,
        examples=[Example(value="7")],
    ),
]


@get(
    "/quarantine",
    summary="List the files that were refused",
    operation_id="listQuarantine",
    tags=["quarantine"],
    response_description="The quarantined files, by date and city.",
    responses=responses(),
)
async def files_in_quarantine(
    *,
    quarantine: QuarantinePort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: From = None,
    to: To = None,
    country: Country = None,
    city: City = None,
    detail: Annotated[
        Literal["full"] | None,
        QueryParameter(
            description="`full` shows up to a hundred bad records of each file.", examples=[Example(value="full")]
        ),
    ] = None,
    limit: Annotated[
        int,
        QueryParameter(
            description="The maximum number of files to list.",
            ge=1,
            le=LISTED_FILES_MAX,
            examples=[Example(value=100)],
        ),
    ] = 100,
) -> Response[QuarantineList]:
    """Return the files that were refused as a whole, each with the reason and its first bad records.

    A file stays listed after it is corrected upstream, until `tripfold gc` deletes it. The ledger shows what counts.
    """
    wanted = _filter_of(from_, to, country, city, days_max=days_max)
    listed = await quarantine.find(wanted, limit=limit, detailed=detail == "full")
    return Response(listed, headers=unreadable_header(listed.unreadable))


@post(
    "/quarantine/retry",
    opt={SCOPE: PROCESS},
    status_code=HTTPStatus.ACCEPTED,
    summary="Retry files that were refused",
    operation_id="retryQuarantine",
    tags=["quarantine"],
    response_description="The files will be fetched again, and their requests are running.",
    responses=responses(
        not_found="There is no such file in quarantine.",
        service_unavailable=KAFKA_OR_S3_UNAVAILABLE,
    ),
)
async def retry_files_in_quarantine(
    *,
    request: Request[Any, Any, Any],
    quarantine: QuarantinePort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: From = None,
    to: To = None,
    country: Country = None,
    city: City = None,
) -> Response[QuarantineRetry]:
    """Fetch these city-days again, each as a failed city of the request that last fetched its file.

    Other cities of a request are not fetched, unless the date's plan has changed since. One call retries at most 1,000
    files. Repeating it is harmless.
    """
    wanted = _filter_of(from_, to, country, city, days_max=days_max)
    retried = await quarantine.retry(wanted, by=caller_of(request))
    return Response(retried, headers=unreadable_header(retried.unreadable))


def _filter_of(
    first: dt.date | None, last: dt.date | None, country: str | None, city: str | None, *, days_max: DaysMax
) -> QuarantineFilter:
    if (first is None) != (last is None):
        missing = "from" if first is None else "to"
        raise InvalidRequest(InvalidParameter(name=missing, reason="it is missing: from and to are used together"))
    return QuarantineFilter(
        days=None if first is None or last is None else date_range(first, last, days_max=days_max),
        country=None if country is None else CountrySlug(country),
        city_id=None if city is None else CityId(city),
    )


HANDLERS = [files_in_quarantine, retry_files_in_quarantine]
