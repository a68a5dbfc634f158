"""The commands for users: they call the REST API."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.domain.errors import OperatorError
from tripfold.console import open_console

if TYPE_CHECKING:
    from tripfold.client.api import ApiClient, BackfillState, RequestState

API_URL = "http://127.0.0.1:8080"

PARALLEL_DATES = 4
"""The dates of a requested range that are processed at once."""

client_commands = typer.Typer()

ApiUrl = Annotated[str, typer.Option("--api", envvar="TRIPFOLD_API_URL", help="The URL of the API.")]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="TRIPFOLD_API_KEY",
        help="The API key. Others can see it in the process list: prefer the variable.",
    ),
]
_First = Annotated[
    dt.datetime, typer.Option("--from", metavar="YYYY-MM-DD", formats=["%Y-%m-%d"], help="The first day.")
]
_Last = Annotated[
    dt.datetime, typer.Option("--to", metavar="YYYY-MM-DD", formats=["%Y-%m-%d"], help="The last day (included).")
]
_Id = Annotated[str, typer.Argument(help="The id of a request or of a backfill.", show_default=False)]


class Format(enum.Enum):
    """The format of printed statistics."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class InvalidDates(OperatorError):
    """The argument is neither a date nor a range of dates."""


@client_commands.command("request", rich_help_panel="Use")
def request(
    dates: Annotated[
        str, typer.Argument(metavar="DATE|FROM..TO", help="A date, or the first and the last date of a range.")
    ],
    *,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
    watch: Annotated[bool, typer.Option(help="Show the progress until the request has ended.")] = True,
) -> None:
    """Request that dates are processed, and watch until their numbers are served; exit 1 if anything failed.

    A range is a backfill of all its dates: 'tripfold backfill' has more options. Ctrl-C stops the display; the request
    continues.

    Example: tripfold request 2024-05-01

    Example: tripfold request 2024-05-01..2024-05-07

    Example: tripfold request 2024-05-01 --api https://tripfold.example.com --no-watch
    """
    from tripfold.client.api import ApiClient

    first, last = parse_dates(dates)

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            if first == last:
                return await watch_or_print(client, await client.process(first), watch=watch)
            query = {"from": str(first), "to": str(last), "only": "all", "max_parallel": str(PARALLEL_DATES)}
            return await watch_or_print(client, await client.create_backfill(query), watch=watch)

    run_client(run())


@client_commands.command("watch", rich_help_panel="Use")
def watch(
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="[ID]", help="A request or backfill. Default: the latest requests."),
    ] = None,
    *,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Watch a request or a backfill until it has ended; exit 1 if anything failed.

    Without an id, list the latest requests.

    Example: tripfold watch

    Example: tripfold watch 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.client.api import ApiClient
    from tripfold.client.watching import watch_latest

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            if wanted is None:
                await watch_latest(client, open_console())
                return True
            return await watch_or_print(client, await client.find(wanted), watch=True)

    run_client(run())


@client_commands.command("cancel", rich_help_panel="Use")
def cancel(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Cancel a request or a backfill. Cities already in progress finish normally; the others are skipped.

    Example: tripfold cancel 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.client.api import ApiClient

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            await client.cancel(wanted)
        message = f"Cancelled. Cities already in progress finish normally. Watch them: 'tripfold watch {wanted}'."
        open_console().print(message, highlight=False, soft_wrap=True)
        return True

    run_client(run())


@client_commands.command("stats", rich_help_panel="Use")
def stats(
    first: _First,
    last: _Last,
    *,
    country: Annotated[str | None, typer.Option(help="A country's slug: print a line for each of its days.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="A table, or the response of the API as it is.")] = (
        Format.TABLE
    ),
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Print the statistics of a range: a line and sparklines for each country, or a line for each day of one.

    Example: tripfold stats --from 2024-05-01 --to 2024-05-31

    Example: tripfold stats --from 2024-05-01 --to 2024-05-31 --country armenia

    Example: tripfold stats --from 2024-05-01 --to 2024-05-31 --format csv > may.csv
    """
    from tripfold.client.api import ApiClient
    from tripfold.client.figures import decode_statistics, print_statistics, print_whole, table_of_days

    async def run() -> bool:
        media_type = {Format.CSV: "text/csv"}.get(format_, "application/json")
        async with ApiClient(api.rstrip("/"), key) as client:
            body = await client.statistics(first.date(), last.date(), country, media_type)
        if format_ is not Format.TABLE:
            sys.stdout.buffer.write(body if body.endswith(b"\n") else body + b"\n")
            return True
        statistics = decode_statistics(body)
        console = open_console()
        if not statistics:
            dates = f"{first:%Y-%m-%d}..{last:%Y-%m-%d}"
            console.print(
                f"No data of {country or 'any country'} for {dates}. Request it: 'tripfold request {dates}'.",
                highlight=False,
                soft_wrap=True,
            )
        elif country is None:
            print_statistics(statistics, console)
        else:
            (days,) = statistics.values()
            print_whole(table_of_days(days), console)
        return True

    run_client(run())


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


async def watch_or_print(client: ApiClient, state: RequestState | BackfillState, *, watch: bool) -> bool:
    """Watch a request or backfill until it has ended, or print its id; return whether nothing failed."""
    from tripfold.client.watching import watch as watch_to_end

    console = open_console()
    if not watch:
        console.print(state.id, highlight=False, soft_wrap=True)
        return True
    try:
        return await watch_to_end(client, state, console)
    except asyncio.CancelledError:
        console.print(
            f"Still running. Watch it: 'tripfold watch {state.id}'. Cancel it: 'tripfold cancel {state.id}'.",
            highlight=False,
            soft_wrap=True,
        )
        raise


def run_client(work: Coroutine[Any, Any, bool]) -> None:
    """Run a call of the API. Exits with 1 if it returns False."""
    if not asyncio.run(work):
        raise typer.Exit(1)
