"""Shared helpers of the operator commands: options, settings, running, tables, JSON and progress bars."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Annotated, Any, Self, TypeVar

import msgspec
import typer
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.domain.errors import OperatorError
from shared.domain.objects import CorruptObject
from shared.runtime.logging import configure_logging
from shared.runtime.settings import Settings, load_settings
from shared.storage.s3 import S3Store
from shared.storage.schema_switch import adopt_written_version
from tripfold.console import open_console

EXIT_TERMINATED = 128 + signal.SIGTERM
TABLE_ROWS_MAX = 1_000
JSON_ITEMS_MAX = 10_000
"""The most items that a command keeps for its output; it only counts the rest."""
PLAIN_INTERVAL_S = 10.0

FirstDate = Annotated[
    dt.datetime | None,
    typer.Option(
        "--from",
        metavar="DATE",
        formats=["%Y-%m-%d"],
        help="The first date, such as 2024-05-01. Default: the earliest.",
    ),
]
LastDate = Annotated[
    dt.datetime | None,
    typer.Option("--to", metavar="DATE", formats=["%Y-%m-%d"], help="The last date, included. Default: the latest."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

console = open_console()
progress_console = open_console(stderr=True)  # progress does not mix with output that is piped

_Result = TypeVar("_Result")


def command_settings() -> Settings:
    """Return the settings from the environment, and configure the log for a terminal."""
    settings = load_settings()
    # Without an explicit level the log shows warnings only: the command's output says the rest.
    quiet = {"log_level": "warning", "log_format": "text"} if settings.log_level == "info" else {}
    configure_logging(settings.model_copy(update=quiet))
    return settings


@contextlib.asynccontextmanager
async def open_bucket(settings: Settings) -> AsyncIterator[S3Store]:
    """Open the bucket for a command, which then writes the schema version that the bucket is written in."""
    async with S3Store(settings) as store:
        await adopt_written_version(store)
        yield store


def run_command(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a command's work. Raises OperatorError for an object that cannot be read.

    SIGTERM cancels the work as Ctrl-C does: a rebuild then removes its mark.
    """

    async def until_terminated() -> _Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in the services: a rebuild is long
            return runner.run(until_terminated())
    except asyncio.CancelledError:
        sys.exit(EXIT_TERMINATED)
    except CorruptObject as error:
        raise OperatorError(str(error)) from error


def date_range(first: dt.datetime | None, last: dt.datetime | None) -> tuple[dt.date | None, dt.date | None]:
    """Return the dates of ``--from`` and ``--to``. Raises BadParameter if they are in the wrong order."""
    if first and last and first > last:
        raise typer.BadParameter(f"{first.date()} is after --to {last.date()}: swap them", param_hint="--from")
    return first.date() if first else None, last.date() if last else None


def print_json(value: object) -> None:
    """Print a value as JSON."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def print_line(text: str) -> None:
    """Print a line as it is: without highlighting, and without line breaks of a table."""
    console.print(text, highlight=False, soft_wrap=True)


async def wait_before_comparison(look: int) -> None:
    """Wait before a comparison is repeated: longer each time."""
    await asyncio.sleep(0.5 * look)


@contextlib.contextmanager
def progress_bar(
    task_name: str, unit: str, *, clock_s: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error; yield a function that takes done, total and a remark.

    Without a terminal, print a line every PLAIN_INTERVAL_S instead.
    """
    if not progress_console.is_terminal:
        yield _ProgressLines(task_name, unit, clock_s).show
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit}{{task.fields[remark]}}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress_console, transient=True) as progress:
        task = progress.add_task(task_name, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=total, remark=remark)

        yield show


class _ProgressLines:
    """Prints progress as lines for a log."""

    def __init__(self, task_name: str, unit: str, clock_s: Callable[[], float]) -> None:
        self._task_name = task_name
        self._unit = unit
        self._clock_s = clock_s
        self._begun_s = self._printed_s = clock_s()

    def show(self, done: int, total: int, remark: str = "") -> None:
        now_s = self._clock_s()
        if now_s - self._printed_s < PLAIN_INTERVAL_S:
            return
        self._printed_s = now_s
        elapsed_s = now_s - self._begun_s
        left = f", {dt.timedelta(seconds=round(elapsed_s * (total - done) / done))} left" if done else ""
        elapsed = dt.timedelta(seconds=round(elapsed_s))
        parts = (f"{done:,} of {total:,} {self._unit}".rstrip(), remark.removeprefix(", "), f"after {elapsed}{left}")
        line = f"{self._task_name}: {', '.join(part for part in parts if part)}"
        progress_console.print(line, highlight=False, markup=False)


class StepBars:
    """Shows the steps of a command: one progress bar after the other, each with its rate and the time left."""

    def __init__(self) -> None:
        self._bars = contextlib.ExitStack()
        self._step = ""
        self._show: Callable[..., None] = lambda *_: None
        self._begun_s = 0.0
        self._events_before = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def report(self, step: str, done: int, total: int, events: int | None = None) -> None:
        """Show the progress of a step. The rate counts ``events`` if they are given, otherwise what is done."""
        if step != self._step:
            self._bars.close()
            self._show = self._bars.enter_context(progress_bar(step, ""))
            self._step, self._begun_s, self._events_before = step, time.monotonic(), events or 0
        elapsed_s = max(time.monotonic() - self._begun_s, 1e-3)
        counted = done if events is None else events - self._events_before
        self._show(done, max(done, total), f"{counted / elapsed_s:,.0f}{'' if events is None else ' events'}/s")
