"""Problem details: every error response is ``application/problem+json`` (RFC 9457).

Litestar's plugin for problem details sends untyped maps, which the OpenAPI document cannot describe.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.types import ExceptionHandlersMap

from services.api.http.errors import (
    Conflict,
    IdempotencyKeyReused,
    InvalidParameter,
    InvalidRequest,
    NotFound,
    StatusNotWritten,
    quoted,
)
from services.api.http.query_parameters import declared_of, invalid_value
from services.api.http.unreadable import RequestedObjectUnreadable, report_unreadable
from services.api.middleware.access_log import http_request_id
from shared.domain.objects import CorruptObject
from shared.kafka.producer import KafkaUnavailable
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import StoreUnavailable

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5

UNREADABLE = "The stored object of this resource cannot be read. The response names it and the remedy."

_OF_EVERY_OPERATION = {
    "request_timeout": "The request body took too long. No operation reads a body.",
    "request_entity_too_large": "The request body is too large. No operation reads a body.",
    "request_uri_too_long": "The URL is too long.",
    "request_header_fields_too_large": "The headers are too large.",
}
_USUAL = {
    "bad_request": "A parameter is missing, unknown, repeated or invalid. The response names it.",
    "unauthorized": "The API key is missing or unknown.",
    "forbidden": "The API key lacks the scope that this operation needs, or a web page of another origin wrote.",
    "misdirected_request": "The API needs no key, and its operator has not named this host.",
    "too_many_requests": "A limit of the API key or of the client is exceeded. `Retry-After` says when to try again.",
    "service_unavailable": "S3 cannot be reached. `Retry-After` says when to try again.",
}

_EXAMPLE_PARAMETER = InvalidParameter(name="from", reason="2024-05-02 is after to=2024-05-01: swap the two")
_EXAMPLE_ID = "018f3d2a-5c00-7aaa-8bbb-0123456789ab"
_EXAMPLE_DETAILS = {
    HTTPStatus.BAD_REQUEST: f"{_EXAMPLE_PARAMETER.name}: {_EXAMPLE_PARAMETER.reason}",
    HTTPStatus.UNAUTHORIZED: "The API key is missing or unknown. Send a valid key in X-API-Key or as a bearer token.",
    HTTPStatus.FORBIDDEN: 'Key "reader" can only read. Use a key with the "process" scope.',
    HTTPStatus.NOT_FOUND: f"There is no request with the id '{_EXAMPLE_ID}'. GET /process-requests lists them.",
    HTTPStatus.NOT_ACCEPTABLE: "Accept allows none of the available media types. Use one of these: application/json, "
    "text/csv.",
    HTTPStatus.CONFLICT: f"Request {_EXAMPLE_ID} has ended: it is completed.",
    HTTPStatus.REQUEST_TIMEOUT: "The body took longer than 10 s. No operation reads a body.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The request is too large: a body is limited to 32768 bytes.",
    HTTPStatus.REQUEST_URI_TOO_LONG: "The request is too large: a URL is limited to 32768 bytes.",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: "The request is too large: headers are limited to 32768 bytes.",
    HTTPStatus.MISDIRECTED_REQUEST: "This API is open to everybody and does not know the host 'trips.example.com'. Use "
    "its address, or let its operator add the name to TRIPFOLD_API_HOSTS.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Idempotency-Key 'nightly' was used for date=2024-05-01. Use another key for a "
    "request with other parameters.",
    HTTPStatus.TOO_MANY_REQUESTS: 'Key "reader" has exceeded its rate limit. Try again in 7 s.',
    HTTPStatus.INTERNAL_SERVER_ERROR: f"requests/fe70c2d5a3ff-{_EXAMPLE_ID}.json is not readable: Input data was "
    "truncated. Request its date again.",
    HTTPStatus.SERVICE_UNAVAILABLE: "S3 cannot be reached. Try again in a few seconds.",
}
# The problem types of Tripfold. An error that HTTP alone explains has the type "about:blank".
_TYPES = {
    HTTPStatus.BAD_REQUEST: "invalid-parameter",
    HTTPStatus.NOT_FOUND: "not-found",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.UNPROCESSABLE_ENTITY: "idempotency-key-reused",
    HTTPStatus.INTERNAL_SERVER_ERROR: "unreadable-object",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
}

_log = structlog.get_logger()


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A problem as in RFC 9457, with further members of Tripfold."""

    type: Annotated[str, msgspec.Meta(description="The kind of problem.", examples=["about:blank"])]
    title: Annotated[str, msgspec.Meta(description="A short name of the kind of problem.")]
    status: Annotated[int, msgspec.Meta(description="The HTTP status.", ge=400, le=599)]
    detail: Annotated[str, msgspec.Meta(description="What happened, and what to do next.")]
    invalid_parameters: Annotated[
        tuple[InvalidParameter, ...], msgspec.Meta(description="Each invalid parameter, and why.")
    ] = ()
    request_id: Annotated[
        str | None,
        msgspec.Meta(description="The id of a request that was published, although its status cannot be shown yet."),
    ] = None
    http_request_id: Annotated[
        str,
        msgspec.Meta(
            description="The id of this HTTP request: `X-Request-ID`. The log of the API has it.", examples=["abc-1"]
        ),
    ] = ""


def exception_handlers() -> ExceptionHandlersMap:
    """Return the handlers that turn exceptions into problem details."""
    return {
        InvalidRequest: _invalid_request,
        NotFound: _not_found,
        IdempotencyKeyReused: _key_reused,
        Conflict: _conflict,
        DependencyUnavailable: _unavailable,
        CorruptObject: _unreadable,
        RequestedObjectUnreadable: _unreadable,
        HTTPException: _http_exception,
        Exception: _unexpected,
    }


def responses(**problems: str) -> dict[int, ResponseSpec]:
    """Return the documentation of an operation's problems: the usual ones, and ``responses(not_found="When …")``."""
    return open_responses(**{**_USUAL, **problems})


def open_responses(**problems: str) -> dict[int, ResponseSpec]:
    """Return the documentation of the problems of an operation that needs no key."""
    return {
        (status := HTTPStatus[name.upper()]): ResponseSpec(
            Problem,
            generate_examples=False,
            description=description,
            media_type=MEDIA_TYPE,
            examples=[Example(summary="as it is", value=msgspec.to_builtins(_example_of(status)))],
        )
        for name, description in {**problems, **_OF_EVERY_OPERATION}.items()
    }


def blank_problem(status: HTTPStatus, detail: str) -> Problem:
    """Return a problem of the type ``about:blank``, whose title is the phrase of its status."""
    return Problem(
        type="about:blank", title=status.phrase, status=status, detail=detail, http_request_id=http_request_id()
    )


def _typed_problem(
    status: HTTPStatus,
    detail: str,
    *,
    invalid_parameters: tuple[InvalidParameter, ...] = (),
    request_id: str | None = None,
) -> Problem:
    kind = _TYPES[status]
    return Problem(
        type=f"urn:problem-type:tripfold:{kind}",
        title=kind.replace("-", " ").capitalize(),
        status=status,
        detail=detail,
        invalid_parameters=invalid_parameters,
        request_id=request_id,
        http_request_id=http_request_id(),
    )


def _example_of(status: HTTPStatus) -> Problem:
    detail = _EXAMPLE_DETAILS[status]
    if status not in _TYPES:
        return blank_problem(status, detail)
    parameters = (_EXAMPLE_PARAMETER,) if status is HTTPStatus.BAD_REQUEST else ()
    return _typed_problem(status, detail, invalid_parameters=parameters)


def _response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response[Any]:
    return Response(problem, status_code=problem.status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def _invalid_request(_: Request[Any, Any, Any], error: InvalidRequest) -> Response[Any]:
    return _response(_typed_problem(HTTPStatus.BAD_REQUEST, str(error), invalid_parameters=error.parameters))


def _not_found(_: Request[Any, Any, Any], error: NotFound) -> Response[Any]:
    return _response(_typed_problem(HTTPStatus.NOT_FOUND, str(error)))


def _key_reused(_: Request[Any, Any, Any], error: IdempotencyKeyReused) -> Response[Any]:
    return _response(_typed_problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)))


def _conflict(_: Request[Any, Any, Any], error: Conflict) -> Response[Any]:
    detail = str(error)
    return _response(_typed_problem(HTTPStatus.CONFLICT, f"{detail[:1].upper()}{detail[1:]}."))


def _unavailable(_: Request[Any, Any, Any], error: DependencyUnavailable) -> Response[Any]:
    _log.warning("dependency_unavailable", error=str(error))
    request_id = error.request_id if isinstance(error, StatusNotWritten) else None
    detail = f"{_outage(error)} Try again in a few seconds."
    return _response(
        _typed_problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, request_id=request_id),
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _unreadable(_: Request[Any, Any, Any], error: CorruptObject | RequestedObjectUnreadable) -> Response[Any]:
    detail = report_unreadable(error).reason if isinstance(error, CorruptObject) else str(error)
    return _response(_typed_problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail))


def _outage(error: DependencyUnavailable) -> str:
    """Describe an outage for the client. Its own message may have internal addresses, so only the log has it."""
    match error:
        case StatusNotWritten():
            return f"Request {error.request_id} was published and will be processed; its status cannot be read yet."
        case KafkaUnavailable():
            return "Kafka did not acknowledge the request. It may be processed nevertheless; repeating it is harmless."
        case StoreUnavailable():
            return "S3 cannot be reached."
        case _:
            return f"{error}."


def _http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Handle errors that Litestar raises: an unknown path or method, or a parameter of the wrong type."""
    if isinstance(error, ValidationException):
        return _invalid_request(request, _as_invalid_request(request, error))
    status = HTTPStatus(error.status_code)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unexpected(request, error)
    details = {
        HTTPStatus.NOT_FOUND: f"There is no resource at {quoted(request.url.path)}. The documentation is at /docs.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{quoted(request.url.path)} does not support {request.method}. "
        "The documentation is at /docs.",
    }
    return _response(blank_problem(status, details.get(status, error.detail)), error.headers)


def _as_invalid_request(request: Request[Any, Any, Any], error: ValidationException) -> InvalidRequest:
    declared = {parameter.argument: parameter for parameter in declared_of(request)}
    errors = error.extra if isinstance(error.extra, list) else []
    return InvalidRequest(
        *(
            invalid_value(parameter, request.query_params.get(parameter.name, ""), one["message"])
            for one in errors
            if (parameter := declared.get(one.get("key", "")))
        )
    )


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    _log.error("request_crashed", method=request.method, path=request.url.path, exc_info=error)
    detail = f"The service failed unexpectedly. Its log has the error under http_request_id {http_request_id()}."
    return _response(blank_problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail))
