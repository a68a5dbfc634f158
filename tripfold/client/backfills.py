"""The commands for backfills: they use the Python client."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Annotated

import typer
from tripfold_client import Backfill, BackfillOptions, Preview, Tripfold

from tripfold.client.session import API_URL, ApiKey, ApiUnusable, ApiUrl, open_api, parse_dates, print_unreadable
from tripfold.client.watching import LISTED, progress_of, records_of_backfills, watch_or_print
from tripfold.console import open_console, print_remark

MAX_PARALLEL = 2

backfills_commands = typer.Typer(help="List, show, pause or resume backfills.", no_args_is_help=True)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The id of a backfill.", show_default=False)]


class Origin(enum.Enum):
    """Where a backfill reads the files."""

    UPSTREAM = "upstream"
    BUCKET = "bucket"


class Only(enum.Enum):
    """The dates that a backfill processes."""

    MISSING = "missing"
    FAILED = "failed"
    STORED = "stored"
    ALL = "all"


def backfill_command(
    dates: Annotated[str, typer.Argument(metavar="FROM..TO", help="The first and the last date, at most 4,000 dates.")],
    *,
    source: Annotated[
        Origin,
        typer.Option(
            help="upstream: fetch changed files. bucket: read stored files again that other parsing rules have read."
        ),
    ] = Origin.UPSTREAM,
    only: Annotated[
        Only | None,
        typer.Option(
            help="missing: dates that lack the data of a city, or were never processed. failed: dates that were "
            "processed and lack the data of a city. stored: dates that were processed. all: every date. "
            "Default: missing.",
            show_default=False,
        ),
    ] = None,
    country: Annotated[
        str | None, typer.Option(metavar="SLUG", help="Only this country; needs --source bucket.")
    ] = None,
    city: Annotated[str | None, typer.Option(metavar="ID", help="Only this city; needs --source bucket.")] = None,
    again: Annotated[
        bool,
        typer.Option("--again", help="Also files that the present rules should read alike; needs --source bucket."),
    ] = False,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="Begin with the last date.")] = False,
    max_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="The most dates that are processed at once.")
    ] = MAX_PARALLEL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which dates it would process.")] = False,
    watch: Annotated[bool, typer.Option(help="Show the progress until the backfill has ended.")] = True,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Process many dates, a few at a time, and watch until all have ended; exit 1 if a date failed.

    Ctrl-C stops the display; the backfill continues, also after a crash of any process. With --source bucket the
    workers read the files in the bucket, by their present rules. A file that they total differently gets a new
    revision.

    Example: tripfold backfill 2023-01-01..2024-12-31 --newest-first

    Example: tripfold backfill 2023-01-01..2024-12-31 --only failed --dry-run

    Example: tripfold backfill 2024-05-01..2024-05-31 --source bucket --country armenia
    """
    options: BackfillOptions = {"newest_first": newest_first, "max_parallel": max_parallel}
    if source is Origin.BUCKET:
        if only is not None:
            raise typer.BadParameter("--source bucket takes every stored date, and no --only", param_hint="--only")
        options |= {"source": "bucket", "country": country, "city": city, "again": again}
    elif country or city or again:
        raise typer.BadParameter("--country, --city and --again need --source bucket", param_hint="--source")
    elif only is not None:
        options["only"] = only.value
    first, last = parse_dates(dates)
    with open_api(api, key) as client:
        if dry_run:
            _print_preview(client.preview_backfill(first, last, **options))
        else:
            watch_or_print(client.backfill(first, last, **options), watch=watch)


def _print_preview(preview: Preview) -> None:
    for date in preview.dates:
        open_console().print(str(date), highlight=False)
    if more := preview.dates_selected - len(preview.dates):
        print_remark(f"… and {more:,} more")
    print_remark(f"{preview.dates_selected:,} of {preview.dates_total:,} dates would be processed.")


@backfills_commands.command("list")
def list_command(*, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """List the latest backfills, newest first.

    Example: tripfold backfills list
    """
    with open_api(api, key) as client:
        records_of_backfills(client.backfills(LISTED, on_unreadable=print_unreadable)).print(open_console())


@backfills_commands.command("show")
def show_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Show a backfill: its progress, the dates under way, and the failed dates with their requests.

    Example: tripfold backfills show 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    with open_api(api, key) as client:
        state = client.job(wanted).state
        if not isinstance(state, Backfill):
            raise ApiUnusable(f"{wanted} is a request. Show it: 'tripfold watch {wanted}'.")
    console = open_console()
    made = f"by schedule {state.schedule}" if state.schedule else "by a client"
    at = f"{state.created_at:%Y-%m-%d %H:%M:%S} UTC"
    for line in (
        f"{state.id}: {state.first}..{state.last}, {state.status}",
        f"only {state.only}, {state.order}, {state.max_parallel} at once, made {made} at {at}",
        progress_of(state),
        *(f"{one.date} under way: {one.request_id}" for one in state.under_way),
        *(f"{one.date} failed: {one.request_id}" for one in state.failed),
    ):
        console.print(line, highlight=False, soft_wrap=True)


@backfills_commands.command("pause")
def pause_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Pause a backfill: its dates under way end, and no further one is requested.

    Example: tripfold backfills pause 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    _change(Tripfold.pause, wanted, f"Paused. Resume it: 'tripfold backfills resume {wanted}'.", api, key)


@backfills_commands.command("resume")
def resume_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Resume a paused backfill.

    Example: tripfold backfills resume 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    _change(Tripfold.resume, wanted, f"Resumed. Watch it: 'tripfold watch {wanted}'.", api, key)


def _change(change: Callable[[Tripfold, str], object], wanted: str, message: str, api: str, key: str | None) -> None:
    with open_api(api, key) as client:
        change(client, wanted)
    open_console().print(message, highlight=False, soft_wrap=True)
