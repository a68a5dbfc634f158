"""The commands for backfills: they call the REST API."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from tripfold.client.api import ApiClient
from tripfold.client.commands import API_URL, ApiKey, ApiUrl, parse_dates, run_client, watch_or_print
from tripfold.client.watching import LISTED, backfills_table, progress_of
from tripfold.console import open_console

MAX_PARALLEL = 2

backfills_commands = typer.Typer(help="List, show, pause, resume, cancel or retry backfills.", no_args_is_help=True)

_Id = Annotated[str, typer.Argument(help="The id of a backfill.", show_default=False)]


class Only(enum.Enum):
    """The dates that a backfill processes."""

    MISSING = "missing"
    FAILED = "failed"
    STORED = "stored"
    ALL = "all"


def backfill_command(
    dates: Annotated[str, typer.Argument(metavar="FROM..TO", help="The first and the last date, at most 4,000 dates.")],
    *,
    only: Annotated[
        Only,
        typer.Option(
            help="missing: dates that lack the data of a city, or were never processed. failed: dates that were "
            "processed and lack the data of a city. stored: dates that were processed. all: every date."
        ),
    ] = Only.MISSING,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="Begin with the last date.")] = False,
    max_parallel: Annotated[
        int, typer.Option(min=1, max=16, help="The most dates that are processed at once.")
    ] = MAX_PARALLEL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which dates it would process.")] = False,
    watch: Annotated[bool, typer.Option(help="Show the progress until the backfill has ended.")] = True,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Process many dates, a few at a time, and watch until all have ended; exit 1 if a date failed.

    Ctrl-C stops the display; the backfill continues, also after a crash of any process.

    Example: tripfold backfill 2023-01-01..2024-12-31 --newest-first

    Example: tripfold backfill 2023-01-01..2024-12-31 --only failed --dry-run
    """
    query = _query(dates, newest_first=newest_first, max_parallel=max_parallel)
    _run({**query, "only": only.value}, api, key, dry_run=dry_run, watch=watch)


def reprocess_command(
    dates: Annotated[str, typer.Argument(metavar="FROM..TO", help="The first and the last date, at most 4,000 dates.")],
    *,
    country: Annotated[str | None, typer.Option(metavar="SLUG", help="Only this country.")] = None,
    city: Annotated[str | None, typer.Option(metavar="ID", help="Only this city.")] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also files that the present rules should read alike.")
    ] = False,
    newest_first: Annotated[bool, typer.Option("--newest-first", help="Begin with the last date.")] = False,
    max_parallel: Annotated[
        int, typer.Option(min=1, max=16, help="The most dates that are processed at once.")
    ] = MAX_PARALLEL,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which dates it would process.")] = False,
    watch: Annotated[bool, typer.Option(help="Show the progress until the backfill has ended.")] = True,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Read stored files again that other parsing rules have read; exit 1 if a date failed.

    This is a backfill of which workers read the files in the bucket; the upstream is not asked. The rules are those of
    the workers. A file of which they make something else gets a new revision. Ctrl-C stops the display only.

    Example: tripfold reprocess 2024-05-01..2024-05-31 --dry-run

    Example: tripfold reprocess 2024-05-01..2024-05-31 --country armenia --city 7
    """
    query = _query(dates, newest_first=newest_first, max_parallel=max_parallel)
    query |= {"source": "bucket", "again": str(again).lower()}
    query |= {name: value for name, value in (("country", country), ("city", city)) if value is not None}
    _run(query, api, key, dry_run=dry_run, watch=watch)


def _query(dates: str, *, newest_first: bool, max_parallel: int) -> dict[str, str]:
    first, last = parse_dates(dates)
    return {
        "from": str(first),
        "to": str(last),
        "order": "newest-first" if newest_first else "oldest-first",
        "max_parallel": str(max_parallel),
    }


def _run(query: dict[str, str], api: str, key: str | None, *, dry_run: bool, watch: bool) -> None:
    """Make a backfill and watch it, or print which dates it would process."""

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            if not dry_run:
                return await watch_or_print(client, await client.create_backfill(query), watch=watch)
            preview = await client.preview_backfill(query)
        console = open_console()
        for date in preview.dates:
            console.print(str(date), highlight=False)
        more = preview.dates_selected - len(preview.dates)
        if more:
            console.print(f"… and {more:,} more", highlight=False)
        console.print(
            f"{preview.dates_selected:,} of {preview.dates_total:,} dates would be processed.", highlight=False
        )
        return True

    run_client(run())


@backfills_commands.command("list")
def list_command(*, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """List the latest backfills, newest first.

    Example: tripfold backfills list
    """

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            open_console().print(backfills_table(await client.latest_backfills(LISTED)))
        return True

    run_client(run())


@backfills_commands.command("show")
def show_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Show a backfill: its progress, the dates under way, and the failed dates with their requests.

    Example: tripfold backfills show 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            state = await client.backfill(wanted)
        console = open_console()
        order, parallel = state.order, state.max_parallel
        made = f"by schedule {state.schedule}" if state.schedule else "by a client"
        for line in (
            f"{state.id}: {state.first}..{state.last}, {state.status}",
            f"only {state.only}, {order}, {parallel} at once, made {made} at {state.created_at:%Y-%m-%d %H:%M:%S} UTC",
            progress_of(state),
            *(f"{one.date} under way: {one.request_id}" for one in state.under_way),
            *(f"{one.date} failed: {one.request_id}" for one in state.failed),
        ):
            console.print(line, highlight=False, soft_wrap=True)
        return True

    run_client(run())


@backfills_commands.command("pause")
def pause_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Pause a backfill: its dates under way end, and no further one is requested.

    Example: tripfold backfills pause 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    _change(wanted, "pause", f"Paused. Resume it: 'tripfold backfills resume {wanted}'.", api, key)


@backfills_commands.command("resume")
def resume_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Resume a paused backfill.

    Example: tripfold backfills resume 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    _change(wanted, "resume", f"Resumed. Watch it: 'tripfold watch {wanted}'.", api, key)


@backfills_commands.command("retry")
def retry_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Retry the failed cities of the failed dates of a backfill.

    Example: tripfold backfills retry 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """
    _change(wanted, "retry", f"Retrying. Watch it: 'tripfold watch {wanted}'.", api, key)


@backfills_commands.command("cancel")
def cancel_command(wanted: _Id, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Cancel a backfill: its dates under way are cancelled, and no further one is requested.

    Example: tripfold backfills cancel 018f3d2a-5c00-7aaa-8bbb-0123456789ab
    """

    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            await client.cancel_backfill(wanted)
        open_console().print("Cancelled. Finished dates stay served.", highlight=False)
        return True

    run_client(run())


def _change(wanted: str, change: str, message: str, api: str, key: str | None) -> None:
    async def run() -> bool:
        async with ApiClient(api.rstrip("/"), key) as client:
            await client.change_backfill(wanted, change)
        open_console().print(message, highlight=False, soft_wrap=True)
        return True

    run_client(run())
