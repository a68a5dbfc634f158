"""The errors of the client. All of them are a TripfoldError."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from tripfold_client.models import Backfill, Request


class TripfoldError(Exception):
    """The base of all errors of the client."""


class InvalidUrl(TripfoldError, ValueError):
    """The URL of the API is no HTTP URL."""


class ConnectionFailed(TripfoldError):
    """The API did not respond: it cannot be reached, or the connection broke or timed out."""


class UnexpectedResponse(TripfoldError):
    """Something responded that is not the API of Tripfold, such as another server or a proxy."""


class InvalidParameter(msgspec.Struct, frozen=True):
    """A parameter that the API refused, and why."""

    name: str
    reason: str


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """The problem details (RFC 9457) of an error response."""

    type: str
    title: str
    status: int
    detail: str
    invalid_parameters: tuple[InvalidParameter, ...] = ()
    request_id: str | None = None
    http_request_id: str = ""


class ApiError(TripfoldError):
    """The API refused a call. The attributes are those of its problem details.

    ``http_request_id`` finds the call in the log of the API. ``request_id`` names a processing request that was
    accepted although its status cannot be shown yet. ``response_lost`` says that the call was retried after a lost
    response, so an earlier attempt may have had its effect.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.type = problem.type
        self.title = problem.title
        self.status = problem.status
        self.detail = problem.detail
        self.invalid_parameters = problem.invalid_parameters
        self.request_id = problem.request_id
        self.http_request_id = problem.http_request_id
        self.response_lost = False


class InvalidCall(ApiError):
    """A parameter is invalid (400), or an idempotency key was used for another call (422)."""


class NotAuthorized(ApiError):
    """The API key is missing or unknown (401), or lacks the scope for this call (403)."""


class NotFound(ApiError):
    """There is no such request, backfill, schedule or country (404)."""


class Conflict(ApiError):
    """The present state does not allow the call (409): for example, what is cancelled has ended."""


class Unavailable(ApiError):
    """The API is overloaded (429), or its storage or Kafka cannot be reached (503), also after all retries."""


class ProcessingFailed(TripfoldError):
    """A request or backfill has ended, and not every city was processed. ``state`` is its last state."""

    def __init__(self, message: str, state: Request | Backfill) -> None:
        super().__init__(message)
        self.state = state


class WaitTimeout(TripfoldError, TimeoutError):
    """A request or backfill has not ended in time. It goes on."""


class MissingDependency(TripfoldError, ImportError):
    """An optional package is not installed. The message says how to install it."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidCall,
    401: NotAuthorized,
    403: NotAuthorized,
    404: NotFound,
    409: Conflict,
    422: InvalidCall,
    429: Unavailable,
    503: Unavailable,
}


def api_error(problem: Problem) -> ApiError:
    """Return the error of problem details."""
    return _BY_STATUS.get(problem.status, ApiError)(problem)
