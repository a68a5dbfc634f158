"""Runs the demo: processes three dates over the REST API, prints their statistics, and can check every number."""

from __future__ import annotations

import asyncio
import datetime as dt
import shlex
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tripfold_client import AsyncJob, AsyncTripfold, Request, Statistics, TripfoldError

from services.aggregate.bucket_reader import Dates
from shared.domain.errors import OperatorError
from shared.runtime.settings import load_settings
from shared.storage.s3 import S3Store
from tripfold.client.watching import bars, show
from tripfold.local.recompute import CountryDay, recompute
from tripfold.local.stack import RunningStack, StackOptions, local_stack
from tripfold.local.supervisor import StopRequested
from tripfold.local.up import event_printer, print_recovered, print_urls
from tripfold.operate import lake

DEMO_DATES = tuple(dt.date(2024, 5, day) for day in (1, 2, 3))
PROCESSING_DEADLINE_S = 1800.0


class DemoFailed(OperatorError):
    """A date did not complete, or a number differs from its recomputation."""


async def run_demo(options: StackOptions, console: Console, *, leave: bool) -> None:
    """Run a stack, process the demo's dates and print their statistics; keep it running until Ctrl-C.

    If ``leave`` is true, compare every number with its recomputation and stop. Raises DemoFailed if a date does not
    complete, or a number differs.
    """
    try:
        async with local_stack(options, on_event=event_printer(console)) as stack:
            print_recovered(stack, console)
            await _demonstrate(stack, options, console, check=leave)
            if not leave:
                console.print("Stop it with Ctrl-C.")
                await stack.supervisor.wait()
    except TripfoldError as error:
        raise DemoFailed(str(error)) from error
    except StopRequested:
        if leave:
            raise DemoFailed("The demo was interrupted.") from None


async def _demonstrate(stack: RunningStack, options: StackOptions, console: Console, *, check: bool) -> None:
    began_s = time.monotonic()
    console.print(f"Requesting {', '.join(map(str, DEMO_DATES))}.")
    async with AsyncTripfold(stack.api_url) as api:
        await process_dates(api, DEMO_DATES, console)
        statistics = await api.stats(min(DEMO_DATES), max(DEMO_DATES))
    console.print(statistics_table(statistics))
    console.print(f"Processed three dates in {time.monotonic() - began_s:.0f} s.")
    print_urls(stack, options, console)
    await build_tables(stack)
    console.print(f"SQL       {query_command(stack.variables_file)}", highlight=False, markup=False, soft_wrap=True)
    if check:
        compared = await asyncio.to_thread(verify, stack.upstream_url, DEMO_DATES, statistics)
        console.print(f"[green]All numbers of {compared} country-days equal their recomputation from the raw files.")


async def process_dates(api: AsyncTripfold, dates: Sequence[dt.date], console: Console) -> None:
    """Process ``dates`` and show their progress. Raises DemoFailed unless all are completed."""
    progress = bars(console)

    async def process(date: dt.date) -> AsyncJob[Request]:
        bar = progress.add_task("", date=str(date), detail="requested", total=None)
        job = await api.process(date)
        return await job.wait(progress=partial(show, progress, bar), check=False)

    try:
        async with asyncio.timeout(PROCESSING_DEADLINE_S):
            with progress:
                jobs = await asyncio.gather(*map(process, dates))
    except TimeoutError:
        raise DemoFailed(f"The dates are not processed after {PROCESSING_DEADLINE_S:.0f} s.") from None
    for job in jobs:
        if failure := job.state.failure:
            raise DemoFailed(failure)


async def build_tables(stack: RunningStack) -> None:
    """Build the Parquet tables now. The aggregate would build them within some seconds."""
    async with S3Store(load_settings(stack.environment)) as store:
        await lake.build_tables(store, Dates(), again=False, report=lambda *_: None)


def query_command(variables_file: Path) -> str:
    """Return a line for a shell that queries the tables with SQL."""
    sql = "select country, sum(trips) as trips from country_days group by country"
    python = ".venv/bin/python"
    run = f'. {shlex.quote(str(variables_file))} && {python} examples/tables_duckdb.py "{sql}"'
    return f"{run}  # once before: {python} -m pip install duckdb s3fs"


def statistics_table(statistics: Statistics) -> Table:
    """Return a table with a row for each country-day."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("country", overflow="fold", min_width=12)
    table.add_column("date", no_wrap=True)
    for heading in ("departures", "passengers", "accident", "delay (s)", "cities"):
        table.add_column(heading, justify="right", no_wrap=True)
    for country, days in statistics.by_country().items():
        for day in days:
            table.add_row(
                country if day is days[0] else "",
                str(day.date),
                f"{day.bus_count:,}",
                f"{day.passenger_count:,}",
                "yes" if day.exist_accident else "no",
                f"{day.average_delay_s:,.3f}",
                f"{day.cities_reported}/{day.cities_expected}",
                end_section=day is days[-1],
            )
    return table


def verify(upstream_url: str, dates: Sequence[dt.date], statistics: Statistics) -> int:
    """Compare every number with its recomputation; return the number of country-days.

    Raises DemoFailed for the first difference.
    """
    expected = recompute(upstream_url, dates)
    served = {
        (day.country_name, str(day.date)): CountryDay(
            buses=day.bus_count,
            passengers=day.passenger_count,
            accidents=day.accident_count,
            delay_total_ms=day.delay_total_ms,
            average_delay_ms=round(day.average_delay_s * 1000),
            exist_accident=day.exist_accident,
        )
        for day in statistics
    }
    for key in sorted(expected.keys() | served.keys()):
        if expected.get(key) != served.get(key):
            raise DemoFailed(f"{key[0]} on {key[1]}: served {served.get(key)}, recomputed {expected.get(key)}")
    return len(served)
