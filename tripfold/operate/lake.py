"""Builds the Parquet tables of the bucket at once, without waiting for the aggregate service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
import typer

from services.aggregate.bucket_reader import Dates
from services.aggregate.tables.builder import TableBuilder
from shared.domain.errors import OperatorError
from shared.domain.ids import utc_now
from shared.domain.tables import MonthTables
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import ObjectStore
from tripfold.console import Records, print_remark
from tripfold.operate.command_line import (
    AsJson,
    FirstDate,
    LastDate,
    command_settings,
    console,
    date_range,
    open_bucket,
    print_json,
    progress_bar,
    run_command,
)

TRIES_MAX = 5

lake_commands = typer.Typer(help="Build the Parquet tables of the bucket.", no_args_is_help=True, add_completion=False)


Report = Callable[[int, int], None]
"""Reports progress: how many months are done, and their total."""


class BuiltTables(msgspec.Struct, frozen=True, kw_only=True):
    """The months that a command built, and how many were current already."""

    built: dict[str, MonthTables]
    current: int


@lake_commands.callback()
def lake_group() -> None:
    """Keep the name of the only command: Typer would make it the group itself."""


@lake_commands.command("build")
def build_command(
    first: FirstDate = None,
    last: LastDate = None,
    *,
    again: Annotated[
        bool, typer.Option("--again", help="Build every month from its summaries, also those that are current.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build the Parquet tables of all months whose summaries changed, or of the months of some dates.

    The aggregate service does the same every TRIPFOLD_TABLES_INTERVAL_S. Both may run at once.

    Example: tripfold lake build

    Example: tripfold lake build --from 2024-05-01 --to 2024-05-31 --again
    """
    dates = Dates(*date_range(first, last))
    settings = command_settings()

    async def run() -> BuiltTables:
        async with open_bucket(settings) as store:
            with progress_bar("building tables", "months") as show:
                return await build_tables(store, dates, again=again, report=show)

    result = run_command(run())
    if as_json:
        print_json(result)
        return
    if result.built:
        records = Records("month", "country-days", "city-days", "unreadable", "as of", whole={"month"})
        for month, one in result.built.items():
            records.add(month, one.country_days, one.city_days, one.unreadable, f"{one.as_of:%Y-%m-%dT%H:%M:%SZ}")
        records.print(console)
    print_remark(f"Months built: {len(result.built):,}. Months already current: {result.current:,}.")
    if any(one.unreadable for one in result.built.values()):
        print_remark("Unreadable summaries are left out. Name them: 'tripfold verify'. Repair them: 'tripfold repair'.")


async def build_tables(store: ObjectStore, dates: Dates, *, again: bool, report: Report) -> BuiltTables:
    """Build the changed months of some dates, or with ``again`` all of them.

    Raises OperatorError if other processes write a month each time that it is built.
    """
    builder = TableBuilder(store, clock=utc_now)
    months = await builder.months((await read_current(store)).live)
    wanted = {month: current for month, current in months.items() if dates.overlaps(month)}
    to_build = [month for month, current in wanted.items() if again or not current]
    built = {}
    for done, month in enumerate(to_build):
        report(done, len(to_build))
        built[month] = await _build(store, builder, month, again=again)
    return BuiltTables(built=built, current=len(wanted) - len(to_build))


async def _build(store: ObjectStore, builder: TableBuilder, month: str, *, again: bool) -> MonthTables:
    for _ in range(TRIES_MAX):
        built = await builder.build((await read_current(store)).live, month, again=again)
        if built is not None:
            return built
    raise OperatorError(
        f"other processes wrote the tables of {month} {TRIES_MAX} times while they were built. Try again"
    )
