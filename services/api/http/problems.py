"""What can go wrong with a request, and how it is told: as ``application/problem+json`` (RFC 9457), always.

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
    shown,
)
from services.api.http.query_parameters import declared_of, unusable
from services.api.middleware.access_log import trace_id_of
from services.api.unreadable import UnreadableAlone, noted
from shared.domain.objects import CorruptObject
from shared.kafka.producer import KafkaUnavailable
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import StoreUnavailable

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 5

_TOO_LARGE = {
    "request_entity_too_large": "The request has a body that is too large: no operation takes any.",
    "request_uri_too_long": "The address is too long.",
    "request_header_fields_too_large": "The headers are too large.",
}
_REFUSALS = {
    "unauthorized": "There is no API key, or it is not known.",
    "forbidden": "The API key has not got the scope that this needs.",
    "too_many_requests": "The API key is used too often. `Retry-After` says when to try again.",
}

_AN_INVALID_PARAMETER = InvalidParameter(name="from", reason="2024-05-02 is after to=2024-05-01: swap the two")
_AN_ID = "018f3d2a-5c00-7aaa-8bbb-0123456789ab"
_EXAMPLES = {
    HTTPStatus.BAD_REQUEST: (
        "invalid-parameter",
        "Invalid parameter",
        f"{_AN_INVALID_PARAMETER.name}: {_AN_INVALID_PARAMETER.reason}",
    ),
    HTTPStatus.UNAUTHORIZED: (
        "about:blank",
        HTTPStatus.UNAUTHORIZED.phrase,
        "This needs an API key, in X-API-Key or as a bearer token. There is none, or it is unknown.",
    ),
    HTTPStatus.FORBIDDEN: (
        "about:blank",
        HTTPStatus.FORBIDDEN.phrase,
        "This needs a key with the scope process; reader has not got it.",
    ),
    HTTPStatus.NOT_FOUND: (
        "not-found",
        "Nothing there",
        f"There is no request with the id '{_AN_ID}'. GET /process-requests lists them.",
    ),
    HTTPStatus.NOT_ACCEPTABLE: (
        "about:blank",
        HTTPStatus.NOT_ACCEPTABLE.phrase,
        "None of what is accepted can be had; these can: application/json, application/x-ndjson, text/csv.",
    ),
    HTTPStatus.CONFLICT: ("not-now", "Not now", f"Request {_AN_ID} has ended: it is completed."),
    HTTPStatus.UNPROCESSABLE_ENTITY: (
        "idempotency-key-used-otherwise",
        "Idempotency key used otherwise",
        "The Idempotency-Key was used with date=2024-05-01 before: use another one.",
    ),
    HTTPStatus.TOO_MANY_REQUESTS: (
        "about:blank",
        HTTPStatus.TOO_MANY_REQUESTS.phrase,
        "The key reader is used too often. Try again in 7 s.",
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: (
        "unreadable-object",
        "Unreadable object",
        f"requests/fe70c2d5a3ff-{_AN_ID}.json is not a readable RequestRecord: Input data was truncated.",
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: ("unavailable", "Unavailable", "S3 cannot be used. Try again in a few seconds."),
}

_log = structlog.get_logger()


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong, as RFC 9457 has it, with two members of our own: ``invalid_parameters`` and ``request_id``."""

    type: Annotated[str, msgspec.Meta(description="The kind of problem.", examples=["about:blank"])]
    title: Annotated[str, msgspec.Meta(description="The kind of problem, in words.")]
    status: Annotated[int, msgspec.Meta(description="The HTTP status.", ge=400, le=599)]
    detail: Annotated[
        str,
        msgspec.Meta(
            description="What is wrong with this request, and what to do.",
        ),
    ]
    invalid_parameters: Annotated[
        tuple[InvalidParameter, ...], msgspec.Meta(description="Each parameter that cannot be used, and why.")
    ] = ()
    request_id: Annotated[
        str | None,
        msgspec.Meta(description="The request that was published all the same, though its status cannot be shown."),
    ] = None


def exception_handlers() -> ExceptionHandlersMap:
    """Return what turns each exception into a problem."""
    return {
        InvalidRequest: _invalid_request,
        NotFound: _nothing_there,
        IdempotencyKeyReused: _key_used_otherwise,
        Conflict: _not_now,
        DependencyUnavailable: _unavailable,
        CorruptObject: _unreadable,
        UnreadableAlone: _unreadable,
        HTTPException: _http_exception,
        Exception: _unexpected,
    }


def responses(**problems: str) -> dict[int, ResponseSpec]:
    """Describe the problems of an operation for its documentation: ``responses(bad_request="When …")``."""
    return open_responses(**problems, **_REFUSALS)


def open_responses(**problems: str) -> dict[int, ResponseSpec]:
    """Describe the problems of an operation that needs no key."""
    return {
        (status := HTTPStatus[name.upper()]): ResponseSpec(
            Problem,
            generate_examples=False,
            description=description,
            media_type=MEDIA_TYPE,
            examples=[Example(summary="as it is", value=msgspec.to_builtins(_example_of(status)))],
        )
        for name, description in {**problems, **_TOO_LARGE}.items()
    }


def _example_of(status: HTTPStatus) -> Problem:
    kind, title, detail = _EXAMPLES.get(status, ("about:blank", status.phrase, f"{status.description}."))
    return Problem(
        type=kind if kind == "about:blank" else f"urn:problem-type:tripfold:{kind}",
        title=title,
        status=status,
        detail=detail,
        invalid_parameters=(_AN_INVALID_PARAMETER,) if status is HTTPStatus.BAD_REQUEST else (),
    )


def _answer(problem: Problem, headers: Mapping[str, str] | None = None) -> Response[Any]:
    return Response(problem, status_code=problem.status, media_type=MEDIA_TYPE, headers=dict(headers or {}))


def _invalid(error: InvalidRequest) -> Response[Any]:
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:invalid-parameter",
            title="Invalid parameter",
            status=HTTPStatus.BAD_REQUEST,
            detail=str(error),
            invalid_parameters=error.parameters,
        )
    )


def _invalid_request(_: Request[Any, Any, Any], error: InvalidRequest) -> Response[Any]:
    return _invalid(error)


def _nothing_there(_: Request[Any, Any, Any], error: NotFound) -> Response[Any]:
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:not-found",
            title="Nothing there",
            status=HTTPStatus.NOT_FOUND,
            detail=str(error),
        )
    )


def _key_used_otherwise(_: Request[Any, Any, Any], error: IdempotencyKeyReused) -> Response[Any]:
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:idempotency-key-used-otherwise",
            title="Idempotency key used otherwise",
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
            detail=str(error),
        )
    )


def _not_now(_: Request[Any, Any, Any], error: Conflict) -> Response[Any]:
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:not-now",
            title="Not now",
            status=HTTPStatus.CONFLICT,
            detail=f"{str(error)[:1].upper()}{str(error)[1:]}.",
        )
    )


def _unavailable(_: Request[Any, Any, Any], error: DependencyUnavailable) -> Response[Any]:
    _log.warning("unavailable", error=str(error))
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:unavailable",
            title="Unavailable",
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            detail=f"{_outage(error)} Try again in a few seconds.",
            request_id=error.request_id if isinstance(error, StatusNotWritten) else None,
        ),
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _unreadable(_: Request[Any, Any, Any], error: CorruptObject | UnreadableAlone) -> Response[Any]:
    return _answer(
        Problem(
            type="urn:problem-type:tripfold:unreadable-object",
            title="Unreadable object",
            status=HTTPStatus.INTERNAL_SERVER_ERROR,
            detail=noted(error).reason if isinstance(error, CorruptObject) else str(error),
        )
    )


def _outage(error: DependencyUnavailable) -> str:
    """Say what cannot be used, without the addresses that the error itself may name: those are for the log."""
    match error:
        case StatusNotWritten():
            return f"Request {error.request_id} was published and will be carried out; its status cannot be read yet."
        case KafkaUnavailable():
            return "Kafka did not acknowledge the request. It may happen all the same, and asking twice is harmless."
        case StoreUnavailable():
            return "S3 cannot be used."
        case _:
            return f"{error}."


def _http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Tell what Litestar itself refused: an unknown path or method, a parameter of the wrong type."""
    if isinstance(error, ValidationException):
        return _invalid(_as_invalid_request(request, error))
    status = HTTPStatus(error.status_code)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return _unexpected(request, error)
    details = {
        HTTPStatus.NOT_FOUND: f"There is nothing at {shown(request.url.path)}. The documentation is at /docs.",
        HTTPStatus.METHOD_NOT_ALLOWED: f"{shown(request.url.path)} takes no {request.method}. "
        "The documentation is at /docs.",
    }
    return _answer(
        Problem(
            type="about:blank",
            title=status.phrase,
            status=status,
            detail=details.get(status, error.detail),
        ),
        error.headers,
    )


def _as_invalid_request(request: Request[Any, Any, Any], error: ValidationException) -> InvalidRequest:
    declared = {parameter.argument: parameter for parameter in declared_of(request)}
    faults = error.extra if isinstance(error.extra, list) else []
    return InvalidRequest(
        *(
            unusable(parameter, request.query_params.get(parameter.name, ""), fault["message"])
            for fault in faults
            if (parameter := declared.get(fault.get("key", "")))
        )
    )


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    trace_id = trace_id_of(request.scope)
    _log.error(
        "unexpected error", method=request.method, path=request.url.path, http_request_id=trace_id, exc_info=error
    )
    return _answer(
        Problem(
            type="about:blank",
            title=HTTPStatus.INTERNAL_SERVER_ERROR.phrase,
            status=HTTPStatus.INTERNAL_SERVER_ERROR,
            detail=f"This is a fault of the service. Its log tells more under http_request_id {trace_id}.",
        )
    )
