"""The commands for schedules: they use the Python client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer
from tripfold_client import Schedule, Tripfold

from tripfold.client.session import API_URL, ApiKey, ApiUrl, open_api, print_unreadable
from tripfold.console import Records, open_console

MAX_PARALLEL = 2

schedule_commands = typer.Typer(help="Set, list, show, pause, run or delete schedules.", no_args_is_help=True)

_Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of the schedule.", show_default=False)]


@schedule_commands.command("set")
def set_command(
    name: _Name,
    *,
    cron: Annotated[
        str,
        typer.Option(metavar="CRON", help="When it runs: minute, hour, day, month and weekday.", show_default=False),
    ],
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="The time zone of --cron and --complete-by.")] = "UTC",
    date: Annotated[
        int, typer.Option(metavar="DAYS", help="The date that a run processes, in days from the day of the run.")
    ] = -1,
    recheck: Annotated[
        int, typer.Option(metavar="DAYS", min=0, max=31, help="The number of days before that date to check again.")
    ] = 0,
    complete_by: Annotated[
        str | None,
        typer.Option(metavar="HH:MM", help="The time of day by which the date is complete; otherwise it is late."),
    ] = None,
    max_parallel: Annotated[
        int, typer.Option(metavar="N", min=1, max=16, help="The most dates that are processed at once.")
    ] = MAX_PARALLEL,
    api: ApiUrl = API_URL,
    key: ApiKey = None,
) -> None:
    """Make a schedule, or replace the options of one.

    Each run processes a date, and checks the days before it again: an unchanged day costs little. Missed runs are
    caught up by one run.

    Example: tripfold schedule set daily --cron '0 6 * * *' --timezone Europe/Prague --date -1 --recheck 7

    Example: tripfold schedule set daily --cron '0 6 * * *' --timezone Europe/Prague --complete-by 09:00
    """
    with open_api(api, key) as client:
        schedule = client.set_schedule(
            name,
            cron,
            timezone=timezone,
            date=date,
            recheck=recheck,
            complete_by=complete_by,
            max_parallel=max_parallel,
        )
    _print(schedule)


@schedule_commands.command("list")
def list_command(*, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """List all schedules with their next and last run; exit 1 if a date is late.

    Example: tripfold schedule list
    """
    with open_api(api, key) as client:
        schedules = client.schedules(on_unreadable=print_unreadable)
    records = Records("name", "cron", "time zone", "next run (UTC)", "last run", "late", whole={"name"}, compact=True)
    for schedule in schedules:
        last = schedule.last_run
        records.add(
            schedule.name,
            schedule.cron,
            schedule.timezone,
            "paused" if schedule.next_run is None else f"{schedule.next_run:%Y-%m-%d %H:%M}",
            "" if last is None else f"{last.first}..{last.last} {last.status or 'unreadable'}",
            ", ".join(str(late.date) for late in schedule.late),
        )
    records.print(open_console())
    if any(schedule.late for schedule in schedules):
        raise typer.Exit(1)


@schedule_commands.command("show")
def show_command(name: _Name, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Show a schedule: its options, its next and last run, and its late dates.

    Example: tripfold schedule show daily
    """
    with open_api(api, key) as client:
        _print(client.schedule(name))


@schedule_commands.command("pause")
def pause_command(name: _Name, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Let no further run begin. A run that has begun goes on.

    Example: tripfold schedule pause daily
    """
    _change(Tripfold.pause_schedule, name, api, key)


@schedule_commands.command("resume")
def resume_command(name: _Name, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Let a paused schedule run again. Runs that were due during the pause are not caught up.

    Example: tripfold schedule resume daily
    """
    _change(Tripfold.resume_schedule, name, api, key)


@schedule_commands.command("run")
def run_command(name: _Name, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Start a run now, in addition to those of the schedule.

    Example: tripfold schedule run daily
    """
    _change(Tripfold.run_schedule, name, api, key)


@schedule_commands.command("delete")
def delete_command(name: _Name, *, api: ApiUrl = API_URL, key: ApiKey = None) -> None:
    """Delete a schedule. Its runs go on.

    Example: tripfold schedule delete daily
    """
    with open_api(api, key) as client:
        client.delete_schedule(name)
    open_console().print(f"Deleted {name}. Its runs stay: 'tripfold backfills list'.", highlight=False)


def _change(change: Callable[[Tripfold, str], Schedule], name: str, api: str, key: str | None) -> None:
    with open_api(api, key) as client:
        _print(change(client, name))


def _print(schedule: Schedule) -> None:
    console = open_console()
    due = "paused" if schedule.next_run is None else f"next run at {schedule.next_run:%Y-%m-%d %H:%M} UTC"
    dates = f"date {schedule.date:+}, {schedule.recheck} days before it again, {schedule.max_parallel} at once"
    by = f", complete by {schedule.complete_by}" if schedule.complete_by else ""
    lines = [f"{schedule.name}: '{schedule.cron}' in {schedule.timezone}, {due}", dates + by]
    if last := schedule.last_run:
        status = last.status or "unreadable"
        lines.append(f"last run: {last.first}..{last.last}, {status}. Watch it: 'tripfold watch {last.backfill_id}'.")
    lines += [f"late: {late.date}, due {late.deadline:%Y-%m-%d %H:%M} UTC" for late in schedule.late]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
