"""Shows the progress of requests and backfills in a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tripfold.client.api import ApiClient, BackfillState, RequestState
from tripfold.console import printable

LOOK_INTERVAL_S = 1.0
LISTED = 15
REASONS_SHOWN_MAX = 20


async def watch(client: ApiClient, state: RequestState | BackfillState, console: Console) -> bool:
    """Show a bar for a request or backfill until it has ended, then the failures; return whether there were none."""
    progress = Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[date]}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        if isinstance(state, BackfillState):
            state = await _watch_backfill(client, state, progress)
        else:
            state = await _watch_request(client, state, progress)
    if isinstance(state, BackfillState):
        _print_failed_dates(state, console)
        if state.source == "bucket" and state.counts.dates_skipped == state.counts.dates_total:
            _print_nothing_stored(state, console)
            return False
    else:
        _print_failures(state, console)
    return state.status == "completed"


async def _watch_request(client: ApiClient, state: RequestState, progress: Progress) -> RequestState:
    bar = progress.add_task("", date=str(state.date), detail=state.status, total=None)
    _show(progress, bar, state)
    async for later in client.follow(state):
        state = later
        _show(progress, bar, state)
    state = await client.request(state.id)  # a listing and an ended request have no failures yet
    _show(progress, bar, state)
    return state


async def _watch_backfill(client: ApiClient, state: BackfillState, progress: Progress) -> BackfillState:
    total = state.counts.dates_total
    bar = progress.add_task("", date=f"{state.first}..{state.last}", detail="", total=total)

    def show() -> None:
        progress.update(bar, completed=total if state.ended else state.counts.dates_done, detail=progress_of(state))

    show()
    async for later in client.follow(state):
        state = later
        show()
    return state


def progress_of(state: BackfillState) -> str:
    """Describe the progress of a backfill in one line."""
    counts = state.counts
    parts = [f"{counts.dates_done}/{counts.dates_total} dates"]
    parts += [
        f"{count} {what}"
        for count, what in (
            (counts.dates_skipped, "skipped"),
            (counts.dates_cancelled, "cancelled"),
            (counts.dates_failed, "[red]failed[/red]"),
        )
        if count
    ]
    if state.status not in {"running", "completed"}:
        parts.append(state.status)
    if state.dates_per_hour is not None:
        parts.append(f"{state.dates_per_hour:,.0f}/h")
    if state.estimated_end is not None:
        parts.append(f"until about {state.estimated_end:%Y-%m-%d %H:%M} UTC")
    return " ".join(parts)


def _print_failed_dates(state: BackfillState, console: Console) -> None:
    for failed in state.failed[:REASONS_SHOWN_MAX]:
        console.print(
            f"[red]{failed.date} failed.[/red] See why: 'tripfold watch {failed.request_id}'.",
            highlight=False,
            soft_wrap=True,
        )
    more = state.counts.dates_failed - min(len(state.failed), REASONS_SHOWN_MAX)
    if more > 0:
        console.print(f"{more:,} more dates failed. See all: GET /backfills/{state.id}.", highlight=False)
    if state.counts.dates_failed:
        console.print(f"Retry them: 'tripfold backfills retry {state.id}'.", highlight=False, soft_wrap=True)


def _print_nothing_stored(state: BackfillState, console: Console) -> None:
    limits = (("country", state.country), ("city", state.city))
    wanted = "".join(f" of {name} '{value}'" for name, value in limits if value is not None)
    console.print(
        f"[red]No file was read.[/red] No date from {state.first} to {state.last} has stored files{escape(wanted)}. "
        "See the countries and cities of a date: GET /country-stats.",
        highlight=False,
        soft_wrap=True,
    )


def backfills_table(states: Sequence[BackfillState]) -> Table:
    """Return a table with a line for each backfill."""
    rows = (
        (one.id, f"{one.first}..{one.last}", one.status, f"{one.counts.dates_done}/{one.counts.dates_total}")
        for one in states
    )
    return _table(("id", "dates", "status", "done"), rows)


def _show(progress: Progress, bar: TaskID, state: RequestState) -> None:
    total = state.counts.cities_total
    if state.ended:
        total = max(total, 1)  # a request without cities needs a full bar too: it stops the clock
    completed = total if state.ended else state.counts.cities_done
    progress.update(bar, total=total or None, completed=completed, detail=detail_of(state))


def detail_of(state: RequestState) -> str:
    """Describe the progress of a request in one line."""
    counts = state.counts
    if not counts.cities_total and not state.ended:
        return state.status  # its cities are not planned yet
    parts = [
        f"{counts.cities_done}/{counts.cities_total} cities",
        f"{counts.bytes_done / 1e6:,.0f} MB",
        f"{counts.trips_done / 1e6:.2f} M trips",
    ]
    parts += [
        f"{count} {what}"
        for count, what in (
            (counts.cities_unchanged, "unchanged"),
            (counts.cities_skipped, "skipped"),
            (counts.cities_failed, "[red]failed[/red]"),
        )
        if count
    ]
    if state.status in {"failed", "cancelled"}:
        parts.append(f"[red]{state.status}[/red]")
    return " ".join(parts)


def _print_failures(state: RequestState, console: Console) -> None:
    if state.failed_reason is not None:
        console.print(
            f"[red]{state.date} {state.status}:[/red] {printable(state.failed_reason)}", highlight=False, soft_wrap=True
        )
    for failure in state.failures[:REASONS_SHOWN_MAX]:
        city = printable(f"{failure.city_name or 'city'} ({failure.city_id})")
        console.print(
            f"[red]{state.date} {city} failed:[/red] {printable(failure.reason)}", highlight=False, soft_wrap=True
        )
    more = state.counts.cities_failed - min(len(state.failures), REASONS_SHOWN_MAX)
    if more > 0:
        console.print(
            f"[red]{state.date}[/red] {more:,} more cities failed. See all: GET /process-requests/{state.id}.",
            highlight=False,
        )


async def watch_latest(client: ApiClient, console: Console) -> None:
    """Show the latest requests: until Ctrl-C in a terminal, otherwise once."""
    if not console.is_terminal:
        console.print(requests_table(await client.latest(LISTED)))
        return
    with Live(requests_table(await client.latest(LISTED)), console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            live.update(requests_table(await client.latest(LISTED)), refresh=True)


def requests_table(states: Sequence[RequestState]) -> Table:
    """Return a table with a line for each request."""
    rows = (
        (one.id, str(one.date), one.status, f"{one.counts.cities_done}/{one.counts.cities_total}") for one in states
    )
    return _table(("id", "date", "status", "cities"), rows)


def _table(headings: tuple[str, str, str, str], rows: Iterable[tuple[str, str, str, str]]) -> Table:
    """Return a table of ids, dates, statuses and progress. On 80 columns a long status wraps; an id never does."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    name, dates, status, done = headings
    for heading in (name, dates):
        table.add_column(heading, no_wrap=True)
    table.add_column(status)
    table.add_column(done, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
