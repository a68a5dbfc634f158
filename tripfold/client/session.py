"""Shared by the commands for users: the options for the API and for dates, and the connection to the API."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator
from typing import Annotated

import typer
from tripfold_client import (
    ApiError,
    Backfill,
    ConnectionFailed,
    InvalidUrl,
    Job,
    NotAuthorized,
    NotFound,
    Request,
    Tripfold,
    TripfoldError,
    Unavailable,
    UnexpectedResponse,
    UnreadableObject,
)

from shared.domain.errors import OperatorError
from tripfold.console import print_remark, printable

API_URL = "http://127.0.0.1:8080"

ApiUrl = Annotated[str, typer.Option("--api", metavar="URL", envvar="TRIPFOLD_API_URL", help="The URL of the API.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="KEY",
        envvar="TRIPFOLD_API_KEY",
        help="The API key. Others can see it in the process list: prefer the variable.",
    ),
]


class ApiUnusable(OperatorError):
    """The API cannot be reached, or refuses the call."""


class InvalidDates(OperatorError):
    """The argument is neither a date nor a range of dates."""


@contextlib.contextmanager
def open_api(url: str, key: str | None) -> Iterator[Tripfold]:
    """Connect to the API. Errors of the client become errors that name the option to change. Raises ApiUnusable."""
    try:
        with Tripfold(url, key) as api:
            yield api
    except (ConnectionFailed, InvalidUrl, UnexpectedResponse) as error:
        raise ApiUnusable(f"{error} --api or TRIPFOLD_API_URL sets the URL.") from error
    except ApiError as error:
        raise ApiUnusable(f"{url} refused the call: {error.detail}{_remedy(error)}") from error
    except TripfoldError as error:
        raise ApiUnusable(str(error)) from error


def _remedy(error: ApiError) -> str:
    if isinstance(error, NotAuthorized) and error.status == 401:
        return " Set it with --key or TRIPFOLD_API_KEY."
    if isinstance(error, Unavailable) or error.status == 500:
        return f" The log of the API has the reason under {error.http_request_id}."
    return ""


def find_job(api: Tripfold, job_id: str) -> Job[Request] | Job[Backfill]:
    """Return the request or backfill with an id. Raises ApiUnusable if there is none."""
    try:
        return api.job(job_id)
    except NotFound:
        raise ApiUnusable(
            f"there is no request or backfill {job_id!r}. List the latest: 'tripfold watch', 'tripfold backfills list'."
        ) from None


def print_unreadable(unreadable: UnreadableObject) -> None:
    """Name an object that a listing lacks because it cannot be read."""
    print_remark(printable(f"Left out: {unreadable.reason}"))


def parse_dates(text: str) -> tuple[dt.date, dt.date]:
    """Read ``DATE`` or ``FROM..TO``. Raises InvalidDates."""
    first, dots, last = text.partition("..")
    try:
        days = dt.date.fromisoformat(first), dt.date.fromisoformat(last if dots else first)
    except ValueError:
        raise InvalidDates(
            f"the argument is {text!r}; it must be a date or a range, such as 2024-05-01 or 2024-05-01..2024-05-07"
        ) from None
    if days[0] > days[1]:
        raise InvalidDates(f"the range {text!r} ends before it begins; use {days[1]}..{days[0]}")
    return days
