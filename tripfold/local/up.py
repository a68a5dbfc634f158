"""Runs all of Tripfold until Ctrl-C, and prints its addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from rich.console import Console

from tripfold.local.stack import RunningStack, StackOptions, local_stack
from tripfold.local.supervisor import ChildEvent, StopRequested


async def run_up(options: StackOptions, console: Console) -> None:
    """Run the stack until Ctrl-C."""
    with contextlib.suppress(StopRequested):
        async with local_stack(options, on_event=event_printer(console)) as stack:
            print_recovered(stack, console)
            print_urls(stack, options, console)
            console.print("Stop it with Ctrl-C. It continues on the same data directory when you start it again.")
            await stack.supervisor.wait()


def print_urls(stack: RunningStack, options: StackOptions, console: Console) -> None:
    """Print the addresses and directories of a stack."""
    lines = {
        "API": stack.api_url,
        "docs": f"{stack.api_url}/docs",
        "upstream": f"{stack.upstream_url}/cities",
        "Kafka": stack.endpoints.kafka_bootstrap_servers,
        "S3": f"{stack.endpoints.s3_endpoint_url}/{stack.endpoints.bucket}",
        "clients": f". {stack.variables_file}  (sets Kafka, S3 and its keys as variables)",
        "metrics": ", ".join(f"{url} ({name})" for name, url in stack.metrics_urls.items()),
        "data": f"{options.data_dir} (logs in {options.data_dir / 'logs'})",
    }
    for name, text in lines.items():
        console.print(f"{name:<9} {text}", highlight=False, soft_wrap=True)


def print_recovered(stack: RunningStack, console: Console) -> None:
    """Print what was published again, if the last stop was not clean."""
    recovered = stack.recovered
    if recovered and (recovered.events or recovered.requests or recovered.unreadable):
        console.print(recovered.sentence(), highlight=False, markup=False, soft_wrap=True)


def event_printer(console: Console) -> Callable[[ChildEvent], None]:
    """Return a function that prints the events of child processes."""

    def print_event(event: ChildEvent) -> None:
        console.print(f"[dim]{event.text}[/dim]", highlight=False)

    return print_event
