"""HTTP operations for completeness: a range of dates by country, and the missing cities of one country-day."""

from __future__ import annotations

import datetime as dt
from http import HTTPStatus
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import PathParameter, SkipValidation

from services.api.completeness.cities import MissingCities
from services.api.completeness.model import CompletenessGrid, CountryDayCities
from services.api.completeness.reader import CompletenessReader
from services.api.http.conditional import conditional_json
from services.api.http.date_range import DaysMax, date_range
from services.api.http.errors import NotFound, quoted
from services.api.http.problems import UNREADABLE, responses
from services.api.http.query_parameters import date_parameter
from services.api.statistics.countries import CountryNames
from services.api.statistics.ledger import parse_date

CompletenessPort = NamedDependency[SkipValidation[CompletenessReader]]
MissingCitiesPort = NamedDependency[SkipValidation[MissingCities]]
CountriesPort = NamedDependency[SkipValidation[CountryNames]]


@get(
    "/country-completeness",
    summary="Get how complete a range of dates is, by country",
    operation_id="getCompleteness",
    tags=["completeness"],
    responses={
        HTTPStatus.OK: ResponseSpec(
            CompletenessGrid, generate_examples=False, description="The state of each date and of each country-day."
        ),
        HTTPStatus.NOT_MODIFIED: ResponseSpec(
            None,
            generate_examples=False,
            description="The client's copy, whose ETag is in `If-None-Match`, is current.",
        ),
        **responses(),
    },
)
async def completeness_of_range(
    request: Request[Any, Any, Any],
    completeness: CompletenessPort,
    days_max: NamedDependency[SkipValidation[DaysMax]],
    from_: Annotated[dt.date, date_parameter("from", "The first day.", "2024-05-01")],
    to: Annotated[dt.date, date_parameter("to", "The last day, included.", "2024-05-31")],
) -> Response[Any]:
    """Return the state of each date and country-day, with the reason and the next action.

    A request processes all countries of its date, so `request_id`, `backfill_id` and `deadline` are those of the date.
    A field that is absent has its default. The ETag is strong: a request with `If-None-Match` gets 304 until a state
    changes.
    """
    return await conditional_json(request, await completeness.read(date_range(from_, to, days_max=days_max)))


@get(
    "/country-completeness/{country:str}/{date:str}",
    summary="Get the cities that a country-day lacks",
    operation_id="getMissingCities",
    tags=["completeness"],
    response_description="The missing cities, why each is missing, and when its file is usually ingested.",
    responses=responses(
        not_found="The date expects no city of this country, or was never requested.",
        internal_server_error=UNREADABLE,
    ),
)
async def missing_cities_of_country_day(
    missing_cities: MissingCitiesPort,
    countries: CountriesPort,
    country: Annotated[
        str, PathParameter(description="The country's slug, or its name.", examples=[Example(value="armenia")])
    ],
    date: Annotated[
        str,
        PathParameter(description="The date.", schema_extra={"format": "date"}, examples=[Example(value="2024-05-01")]),
    ],
) -> CountryDayCities:
    """Return the first 100 missing cities by id. The usual time is the median of the 14 days before."""
    found = await countries.find(country)
    day = parse_date(date)
    cities = await missing_cities.read(found.slug, day) if day else None
    if cities is None:
        if not found.listed:
            raise await countries.unknown(country)
        raise NotFound(f"No city of the country {quoted(country)} is expected on {quoted(date)}.")
    return cities


HANDLERS = [completeness_of_range, missing_cities_of_country_day]
