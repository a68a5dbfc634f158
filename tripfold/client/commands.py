"""The commands of those who use Tripfold from afar, over its REST API."""

from __future__ import annotations

import asyncio
import datetime as dt
import enum
import sys
from collections.abc import Coroutine
from typing import Annotated, Any

import typer
from rich.console import Console

from shared.domain.errors import OperatorError
from tripfold.console import open_console

API_URL = "http://127.0.0.1:8080"

client_commands = typer.Typer()

_Api = Annotated[str, typer.Option("--api", envvar="TRIPFOLD_API_URL", help="Where the API is.")]
_Key = Annotated[
    str | None,
    typer.Option("--key", envvar="TRIPFOLD_API_KEY", help="The API key. Better in the variable: others see commands."),
]
_First = Annotated[
    dt.datetime, typer.Option("--from", metavar="YYYY-MM-DD", formats=["%Y-%m-%d"], help="The first day.")
]
_Last = Annotated[
    dt.datetime, typer.Option("--to", metavar="YYYY-MM-DD", formats=["%Y-%m-%d"], help="The last day, included.")
]
_Id = Annotated[str, typer.Argument(help="The id of a request, or of a range of dates.", show_default=False)]


class Format(enum.Enum):
    """How statistics are printed."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class NoDates(OperatorError):
    """What was given is neither a date nor a range of dates."""


@client_commands.command("request", rich_help_panel="Use")
def request(
    dates: Annotated[
        str, typer.Argument(metavar="DATE|FROM..TO", help="A date, or the first and the last of several.")
    ],
    *,
    api: _Api = API_URL,
    key: _Key = None,
    watch: Annotated[bool, typer.Option(help="Show how it progresses until it has ended.")] = True,
) -> None:
    """Have dates processed, and watch until their numbers are served; exit 1 if anything failed.

    Ctrl-C stops watching, not the request.

    Example: tripfold request 2024-05-01

    Example: tripfold request 2024-05-01..2024-05-07

    Example: tripfold request 2024-05-01 --api https://tripfold.example.com --no-watch
    """
    from tripfold.client.api import ApiClient
    from tripfold.client.watching import watch_requests

    first, last = parse_dates(dates)
    console = open_console()

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            asked, states = await client.ask(first, last)
            if not watch:
                console.print(asked, highlight=False, soft_wrap=True)
                return True
            return await _watched(watch_requests(client, states, console), asked, console)

    _end(run())


@client_commands.command("watch", rich_help_panel="Use")
def watch(
    wanted: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A request or a range. Unset: the latest requests.")
    ] = None,
    *,
    api: _Api = API_URL,
    key: _Key = None,
) -> None:
    """Watch a request, or a range of dates, until it has ended; exit 1 if anything failed. Without an id: the latest.

    Example: tripfold watch

    Example: tripfold watch 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.client.api import ApiClient
    from tripfold.client.watching import watch_latest, watch_requests

    console = open_console()

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            if wanted is None:
                await watch_latest(client, console)
                return True
            states = await client.requests_of(wanted)
            return await _watched(watch_requests(client, states, console), wanted, console)

    _end(run())


@client_commands.command("cancel", rich_help_panel="Use")
def cancel(wanted: _Id, *, api: _Api = API_URL, key: _Key = None) -> None:
    """Cancel a request, or a range of dates: cities that are not started yet are skipped.

    Example: tripfold cancel 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    from tripfold.client.api import ApiClient

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            await client.cancel(wanted)
        told = f"cancelled; what was started ends as it would have: tripfold watch {wanted}"
        open_console().print(told, highlight=False, soft_wrap=True)
        return True

    _end(run())


@client_commands.command("stats", rich_help_panel="Use")
def stats(
    first: _First,
    last: _Last,
    *,
    country: Annotated[str | None, typer.Option(help="One country's slug: then day by day.")] = None,
    format_: Annotated[Format, typer.Option("--format", help="A table to look at, or what the API answers.")] = (
        Format.TABLE
    ),
    api: _Api = API_URL,
    key: _Key = None,
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
            what = f"{country} from" if country else "any country from"
            console.print(f"there is no data of {what} {first:%Y-%m-%d} to {last:%Y-%m-%d}", highlight=False)
        elif country is None:
            print_statistics(statistics, console)
        else:
            print_whole(table_of_days(next(iter(statistics.values()))), console)  # a name has its slug as the key
        return True

    _end(run())


def parse_dates(text: str) -> tuple[dt.date, dt.date]:
    """Read ``DATE`` or ``FROM..TO``. Raises NoDates."""
    first, dots, last = text.partition("..")
    try:
        days = dt.date.fromisoformat(first), dt.date.fromisoformat(last if dots else first)
    except ValueError:
        raise NoDates(
            f"{text!r} is no date and no range of dates: write 2024-05-01, or 2024-05-01..2024-05-07"
        ) from None
    if days[0] > days[1]:
        raise NoDates(f"{text!r} ends before it begins: write {days[1]}..{days[0]}")
    return days


async def _watched(watching: Coroutine[Any, Any, bool], asked: str, console: Console) -> bool:
    try:
        return await watching
    except asyncio.CancelledError:
        console.print(
            f"it goes on without you; to watch it again: tripfold watch {asked}; to cancel it: tripfold cancel {asked}",
            highlight=False,
            soft_wrap=True,
        )
        raise


def _end(work: Coroutine[Any, Any, bool]) -> None:
    if not asyncio.run(work):
        raise typer.Exit(1)
