"""The commands for one date or a range: they use the Python client."""

from __future__ import annotations

import datetime as dt
import enum
import sys
from typing import Annotated

import typer

from tripfold.client.figures import print_statistics, print_whole, table_of_days
from tripfold.client.session import API_URL, ApiKey, ApiUrl, find_job, open_api, parse_dates
from tripfold.client.watching import watch_latest, watch_or_print
from tripfold.console import open_console, print_remark

_First = Annotated[
    dt.datetime,
    typer.Option("--from", metavar="DATE", formats=["%Y-%m-%d"], help="The first day, such as 2024-05-01."),
]
_Last = Annotated[
    dt.datetime, typer.Option("--to", metavar="DATE", formats=["%Y-%m-%d"], help="The last day (included).")
]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a request or of a backfill.", show_default=False)]


class Format(enum.Enum):
    """The format of printed statistics."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def request_command(
    date: Annotated[str, typer.Argument(metavar="DATE", help="A date, such as 2024-05-01.")],
    *,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
    watch: Annotated[bool, typer.Option(help="Show the progress until the request has ended.")] = True,
) -> None:
    """Request that a date is processed, and watch until its numbers are served; exit 1 if anything failed.

    Ctrl-C stops the display; the request continues. For a range, see 'tripfold backfill'.

    Example: tripfold request 2024-05-01

    Example: tripfold request 2024-05-01 --api https://tripfold.example.com --no-watch
    """
    first, last = parse_dates(date)
    if first != last:
        raise typer.BadParameter(
            f"the argument is {date!r}; it must be one date. For a range: 'tripfold backfill {date} --only all'",
            param_hint="DATE",
        )
    with open_api(api, key) as client:
        watch_or_print(client.process(first), watch=watch)


def watch_command(
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
    with open_api(api, key) as client:
        if wanted is None:
            watch_latest(client, open_console())
        else:
            watch_or_print(find_job(client, wanted), watch=True)


def retry_command(
    wanted: _Id,
    *,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
    watch: Annotated[bool, typer.Option(help="Show the progress until the request has ended.")] = True,
) -> None:
    """Retry the failed cities of a request or backfill, and watch until it has ended; exit 1 if anything failed.

    When the last failed city succeeds, "completed with failures" becomes "completed".

    Example: tripfold retry 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    with open_api(api, key) as client:
        watch_or_print(find_job(client, wanted).retry(), watch=watch)


def cancel_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Cancel a request or a backfill. Cities already in progress finish normally; the others are skipped.

    Example: tripfold cancel 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    with open_api(api, key) as client:
        find_job(client, wanted).cancel()
    message = f"Cancelled. Cities already in progress finish normally. Watch them: 'tripfold watch {wanted}'."
    open_console().print(message, highlight=False, soft_wrap=True)


def stats_command(
    first: _First,
    last: _Last,
    *,
    country: Annotated[
        str | None, typer.Option(metavar="SLUG", help="A country's slug: print a line for each of its days.")
    ] = None,
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
    with open_api(api, key) as client:
        if format_ is not Format.TABLE:
            body = client.export(first, last, country, format="csv" if format_ is Format.CSV else "json")
            sys.stdout.buffer.write(body if body.endswith(b"\n") else body + b"\n")
            return
        countries = client.stats(first, last, country).by_country()
    if not countries:
        dates = f"{first:%Y-%m-%d}..{last:%Y-%m-%d}"
        print_remark(f"No data of {country or 'any country'} for {dates}. Process it: 'tripfold backfill {dates}'.")
    elif country is None:
        print_statistics(countries, open_console())
    else:
        (days,) = countries.values()
        print_whole(table_of_days(days), open_console())
