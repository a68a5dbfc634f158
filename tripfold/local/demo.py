"""Runs the demo: processes three dates over the REST API, prints their statistics, and can check every number."""

from __future__ import annotations

import asyncio
import datetime as dt
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.aggregate.bucket_reader import Dates
from shared.domain.errors import OperatorError
from shared.runtime.settings import load_settings
from shared.storage.s3 import S3Store
from tripfold.local.recompute import CountryDay, recompute
from tripfold.local.stack import RunningStack, StackOptions, local_stack
from tripfold.local.supervisor import StopRequested
from tripfold.local.up import event_printer, print_recovered, print_urls
from tripfold.operate import lake

DEMO_DATES = tuple(dt.date(2024, 5, day) for day in (1, 2, 3))
POLL_INTERVAL_S = 0.25
REQUEST_DEADLINE_S = 1800.0
ENDED = {"completed", "completed with failures", "failed", "cancelled"}


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
    except StopRequested:
        if leave:
            raise DemoFailed("The demo was interrupted.") from None


async def _demonstrate(stack: RunningStack, options: StackOptions, console: Console, *, check: bool) -> None:
    began_s = time.monotonic()
    console.print(f"Requesting {', '.join(map(str, DEMO_DATES))}.")
    await process_dates(stack.api_url, DEMO_DATES, console)
    statistics = await read_statistics(stack.api_url, DEMO_DATES)
    console.print(statistics_table(statistics))
    console.print(f"Processed three dates in {time.monotonic() - began_s:.0f} s.")
    print_urls(stack, options, console)
    await build_tables(stack)
    console.print(f"SQL       {query_command(stack.variables_file)}", highlight=False, markup=False, soft_wrap=True)
    if check:
        compared = await asyncio.to_thread(verify, stack.upstream_url, DEMO_DATES, statistics)
        console.print(f"[green]All numbers of {compared} country-days equal their recomputation from the raw files.")


async def process_dates(api_url: str, dates: Sequence[dt.date], console: Console) -> None:
    """Process ``dates`` and show their progress. Raises DemoFailed unless all are completed."""
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[date]}"),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        console=console,
    )
    async with httpx.AsyncClient(base_url=api_url, timeout=30, trust_env=False) as client:
        with progress:
            ends = await asyncio.gather(*(_process_date(client, date, progress) for date in dates))
    for date, request in zip(dates, ends, strict=True):
        if request["status"] != "completed":
            reasons = "; ".join(failure["reason"] for failure in request["failures"][:3])
            raise DemoFailed(f"{date} ended with status {request['status']}: {reasons or request['failed_reason']}")


async def _process_date(client: httpx.AsyncClient, date: dt.date, progress: Progress) -> dict[str, Any]:
    bar = progress.add_task("", date=str(date), detail="requested", total=None)
    response = await client.post("/process-request", params={"date": str(date)})
    response.raise_for_status()
    location = response.headers["location"]
    deadline_s = time.monotonic() + REQUEST_DEADLINE_S
    while True:
        response = await client.get(location)
        response.raise_for_status()
        request: dict[str, Any] = response.json()
        counts = request["counts"]
        ended = request["status"] in ENDED
        progress.update(
            bar,
            total=counts["cities_total"] or None,
            completed=counts["cities_done"],
            detail=f"{counts['cities_done']}/{counts['cities_total']} cities {counts['bytes_done'] / 1e6:,.0f} MB "
            f"{counts['trips_done'] / 1e6:.2f} M trips",
        )
        if ended:
            return request
        if time.monotonic() > deadline_s:
            raise DemoFailed(f"{date} is still {request['status']} after {REQUEST_DEADLINE_S:.0f} s.")
        await asyncio.sleep(POLL_INTERVAL_S)


async def read_statistics(api_url: str, dates: Sequence[dt.date]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the statistics of the range of ``dates`` in full detail, by country slug and date."""
    query = {"from": str(min(dates)), "to": str(max(dates)), "detail": "full"}
    async with httpx.AsyncClient(base_url=api_url, timeout=30, trust_env=False) as client:
        response = await client.get("/country-stats", params=query)
    response.raise_for_status()
    statistics: dict[str, dict[str, dict[str, Any]]] = response.json()
    return statistics


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


def statistics_table(statistics: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return a table with a row for each country-day."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("country", overflow="fold", min_width=12)
    table.add_column("date", no_wrap=True)
    for heading in ("departures", "passengers", "accident", "delay (s)", "cities"):
        table.add_column(heading, justify="right", no_wrap=True)
    for country, days in statistics.items():
        for day, (date, one) in enumerate(days.items()):
            table.add_row(
                country if day == 0 else "",
                date,
                f"{one['bus_count']:,}",
                f"{one['passenger_count']:,}",
                "yes" if one["exist_accident"] else "no",
                f"{one['average_delay_s']:,.3f}",
                f"{one['cities_reported']}/{one['cities_expected']}",
                end_section=day == len(days) - 1,
            )
    return table


def verify(upstream_url: str, dates: Sequence[dt.date], statistics: dict[str, dict[str, dict[str, Any]]]) -> int:
    """Compare every number with its recomputation; return the number of country-days.

    Raises DemoFailed for the first difference.
    """
    expected = recompute(upstream_url, dates)
    served = {
        (one["country_name"], date): CountryDay(
            buses=one["bus_count"],
            passengers=one["passenger_count"],
            accidents=one["accident_count"],
            delay_total_ms=one["delay_total_ms"],
            average_delay_ms=round(one["average_delay_s"] * 1000),
            exist_accident=one["exist_accident"],
        )
        for days in statistics.values()
        for date, one in days.items()
    }
    for key in sorted(expected.keys() | served.keys()):
        if expected.get(key) != served.get(key):
            raise DemoFailed(f"{key[0]} on {key[1]}: served {served.get(key)}, recomputed {expected.get(key)}")
    return len(served)
