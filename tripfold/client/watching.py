"""Shows the progress of requests and backfills in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from tripfold_client import Backfill, Job, Request, Tripfold

from tripfold.client.session import print_unreadable
from tripfold.console import Records, open_console, printable

LOOK_INTERVAL_S = 1.0
LISTED = 15
REASONS_SHOWN_MAX = 20


def watch_or_print(job: Job[Request] | Job[Backfill], *, watch: bool) -> None:
    """Watch a job until it has ended, or print its id. Exits with 1 if anything failed."""
    console = open_console()
    if not watch:
        console.print(job.id, highlight=False, soft_wrap=True)
        return
    try:
        completed = watch_to_end(job, console)
    except KeyboardInterrupt:
        console.print(
            f"Still running. Watch it: 'tripfold watch {job.id}'. Cancel it: 'tripfold cancel {job.id}'.",
            highlight=False,
            soft_wrap=True,
        )
        raise
    if not completed:
        raise typer.Exit(1)


def watch_to_end(job: Job[Request] | Job[Backfill], console: Console) -> bool:
    """Show a bar for a job until it has ended, then the failures; return whether there were none."""
    progress = bars(console)
    with progress:
        bar = progress.add_task("", date="", detail="", total=None)
        job.wait(progress=partial(show, progress, bar), check=False)
    state = job.state
    if isinstance(state, Request):
        _print_failures(state, console)
    else:
        _print_failed_dates(state, console)
        if state.read_nothing:
            _print_nothing_stored(state, console)
            return False
    return state.status == "completed"


def bars(console: Console) -> Progress:
    """Return a display for the bars of jobs."""
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.fields[date]}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )


def show(progress: Progress, bar: TaskID, state: Request | Backfill) -> None:
    """Show the state of a job in its bar."""
    if isinstance(state, Backfill):
        date, detail, total = f"{state.first}..{state.last}", progress_of(state), state.counts.dates_total
        done = state.counts.dates_done
    else:
        date, detail, total = str(state.date), detail_of(state), state.counts.cities_total
        done = state.counts.cities_done
    if state.ended:
        total = done = max(total, 1)  # a request without cities needs a full bar too: it stops the clock
    progress.update(bar, date=date, detail=detail, total=total or None, completed=done)


def progress_of(state: Backfill) -> str:
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


def _print_failed_dates(state: Backfill, console: Console) -> None:
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
        console.print(f"Retry them: 'tripfold retry {state.id}'.", highlight=False, soft_wrap=True)


def _print_nothing_stored(state: Backfill, console: Console) -> None:
    limits = (("country", state.country), ("city", state.city))
    wanted = "".join(f" of {name} '{value}'" for name, value in limits if value is not None)
    console.print(
        f"[red]No file was read.[/red] No date from {state.first} to {state.last} has stored files{escape(wanted)}. "
        "See the countries and cities of a date: GET /country-stats.",
        highlight=False,
        soft_wrap=True,
    )


def records_of_backfills(states: Iterable[Backfill]) -> Records:
    """Return a record for each backfill."""
    records = Records("id", "dates", "status", "done", whole={"id", "dates", "done"}, compact=True)
    for one in states:
        records.add(one.id, f"{one.first}..{one.last}", one.status, f"{one.counts.dates_done}/{one.counts.dates_total}")
    return records


def detail_of(state: Request) -> str:
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


def _print_failures(state: Request, console: Console) -> None:
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


def watch_latest(api: Tripfold, console: Console) -> None:
    """Show the latest requests: until Ctrl-C in a terminal, otherwise once."""
    latest = records_of_requests(api.requests(LISTED, on_unreadable=print_unreadable))
    if not console.is_terminal:
        latest.print(console)
        return
    with Live(latest.table(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(LOOK_INTERVAL_S)
            # Those that cannot be read are named once, above the table.
            latest = records_of_requests(api.requests(LISTED, on_unreadable=lambda _: None))
            live.update(latest.table(), refresh=True)


def records_of_requests(states: Iterable[Request]) -> Records:
    """Return a record for each request."""
    records = Records("id", "date", "status", "cities", whole={"id", "date", "cities"}, compact=True)
    for one in states:
        records.add(one.id, str(one.date), one.status, f"{one.counts.cities_done}/{one.counts.cities_total}")
    return records
