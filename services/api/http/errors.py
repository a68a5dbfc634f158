"""The errors of requests. ``problems.py`` turns them into problem details."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.domain.ids import RequestId
from shared.runtime.retry import DependencyUnavailable

QUOTED_LENGTH_MAX = 100


class InvalidParameter(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter that cannot be used, and why."""

    name: Annotated[str, msgspec.Meta(examples=["from"])]
    reason: Annotated[str, msgspec.Meta(examples=["2024-05-02 is after to=2024-05-01: swap the two"])]


class InvalidRequest(ValueError):
    """A request with invalid parameters. It names each of them."""

    def __init__(self, *parameters: InvalidParameter) -> None:
        super().__init__("; ".join(f"{parameter.name}: {parameter.reason}" for parameter in parameters))
        self.parameters = parameters


class NotFound(LookupError):
    """The requested resource does not exist. The message names it."""


class Conflict(RuntimeError):
    """The state of the request does not allow the operation. The message states it."""


class IdempotencyKeyReused(ValueError):
    """An idempotency key came with other parameters before. The message names them."""


class StatusNotWritten(DependencyUnavailable):
    """A request was published, and its status could not be written."""

    def __init__(self, message: str, request_id: RequestId) -> None:
        super().__init__(message)
        self.request_id = request_id


def quoted(value: str) -> str:
    """Return a client's value for an error message: in quotes, and cut to QUOTED_LENGTH_MAX."""
    return repr(value if len(value) <= QUOTED_LENGTH_MAX else f"{value[:QUOTED_LENGTH_MAX]}…")
