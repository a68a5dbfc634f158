"""The errors that a request can end in. How they are told is in ``problems.py``."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shared.domain.ids import RequestId
from shared.runtime.retry import DependencyUnavailable

SHOWN_LENGTH_MAX = 100


class InvalidParameter(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter that cannot be used, and why."""

    name: Annotated[str, msgspec.Meta(examples=["from"])]
    reason: Annotated[str, msgspec.Meta(examples=["2024-05-02 is after to=2024-05-01: swap the two"])]


class InvalidRequest(ValueError):
    """A request that cannot be meant: it names each parameter that is at fault."""

    def __init__(self, *parameters: InvalidParameter) -> None:
        super().__init__("; ".join(f"{parameter.name}: {parameter.reason}" for parameter in parameters))
        self.parameters = parameters


class NotFound(LookupError):
    """What was asked for does not exist. The message says what."""


class IdempotencyKeyReused(ValueError):
    """An idempotency key that came with other parameters before. The message says with which."""


class StatusNotWritten(DependencyUnavailable):
    """A request was published, but its status could not be written."""

    def __init__(self, message: str, request_id: RequestId) -> None:
        super().__init__(message)
        self.request_id = request_id


def shown(value: str) -> str:
    """Return a value of a request as an error may repeat it: quoted, and of bounded length."""
    return repr(value if len(value) <= SHOWN_LENGTH_MAX else f"{value[:SHOWN_LENGTH_MAX]}…")


class Conflict(RuntimeError):
    """What was asked for does not fit what the request is at present: the message says how it is."""
