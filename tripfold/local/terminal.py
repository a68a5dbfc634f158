"""What ``tripfold up`` and ``tripfold demo`` show in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from collections.abc import Callable

from rich.console import Console

from tripfold.local.demo import DemoFailed, process_dates, read_statistics, statistics_table, verify
from tripfold.local.stack import RunningStack, StackOptions, local_stack
from tripfold.local.supervisor import ChildEvent, StopRequested

DEMO_DATES = tuple(dt.date(2024, 5, day) for day in (1, 2, 3))


async def run_up(options: StackOptions, console: Console) -> None:
    """Run the stack until Ctrl-C."""
    with contextlib.suppress(StopRequested):
        await _run_up(options, console)


async def _run_up(options: StackOptions, console: Console) -> None:
    async with local_stack(options, on_event=_teller(console)) as stack:
        _tell_recovered(stack, console)
        _print_urls(stack, options, console)
        console.print("Ctrl-C stops it; started again on the same data directory it goes on where it stopped")
        await stack.supervisor.wait()


async def run_demo(options: StackOptions, console: Console, *, leave: bool) -> None:
    """Run the stack, process the demo's dates and print what comes out; then leave, or stay until Ctrl-C.

    Raises DemoFailed if a date does not complete, or, when leaving, if a number differs from the recomputed one.
    """
    try:
        async with local_stack(options, on_event=_teller(console)) as stack:
            _tell_recovered(stack, console)
            await stack.supervisor.run(_demonstrate(stack, options, console, check=leave))
            if not leave:
                console.print("Ctrl-C stops it")
                await stack.supervisor.wait()
    except StopRequested:
        if leave:
            raise DemoFailed("stopped before the end") from None


async def _demonstrate(stack: RunningStack, options: StackOptions, console: Console, *, check: bool) -> None:
    began_s = time.monotonic()
    console.print(f"requesting {', '.join(map(str, DEMO_DATES))}")
    await process_dates(stack.api_url, DEMO_DATES, console)
    statistics = await read_statistics(stack.api_url, DEMO_DATES)
    console.print(statistics_table(statistics))
    console.print(f"three dates in {time.monotonic() - began_s:.0f} s")
    _print_urls(stack, options, console)
    if check:
        compared = await asyncio.to_thread(verify, stack.upstream_url, DEMO_DATES, statistics)
        console.print(f"[green]every number of {compared} country-days equals its recomputation from the raw files")


def _print_urls(stack: RunningStack, options: StackOptions, console: Console) -> None:
    lines = {
        "API": stack.api_url,
        "docs": f"{stack.api_url}/docs",
        "upstream": f"{stack.upstream_url}/cities",
        "Kafka": stack.endpoints.kafka_bootstrap_servers,
        "S3": f"{stack.endpoints.s3_endpoint_url}/{stack.endpoints.bucket}",
        "clients": f". {stack.variables_file}  (Kafka, S3 and its keys, as variables)",
        "data": f"{options.data_dir} (logs in {options.data_dir / 'logs'})",
    }
    for name, text in lines.items():
        console.print(f"{name:<9} {text}", highlight=False, soft_wrap=True)


def _tell_recovered(stack: RunningStack, console: Console) -> None:
    recovered = stack.recovered
    if recovered and (recovered.events or recovered.requests or recovered.unreadable):
        console.print(recovered.sentence(), highlight=False, markup=False, soft_wrap=True)


def _teller(console: Console) -> Callable[[ChildEvent], None]:
    """Return what prints a line for each event of a child."""

    def tell(event: ChildEvent) -> None:
        console.print(f"[dim]{event.text}[/dim]", highlight=False)

    return tell
