"""What every command prints with: tables and JSON to standard output, progress bars to standard error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.errors import OperatorError
from shared.health import configure_logging
from shared.objects import CorruptObject
from shared.settings import Settings, load_settings

LINES_MAX = 1_000
KEPT_MAX = 10_000
"""What is told at most, in JSON: the rest is only counted."""

console = Console()
progress_console = Console(stderr=True)  # so that what is printed can be piped

_Result = TypeVar("_Result")


async def wait(look: int) -> None:
    await asyncio.sleep(0.5 * look)


@contextlib.contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar; give a function that takes how much is done, of how much, and a remark."""
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
        task = progress.add_task(what, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=total, remark=remark)

        yield show


def print_json(value: object) -> None:
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def settings_of_operator() -> Settings:
    settings = load_settings()
    # At a terminal a log is noise, unless somebody looks for a fault.
    quiet = {"log_level": "warning", "log_format": "text"} if settings.log_level == "info" else {}
    configure_logging(settings.model_copy(update=quiet))
    return settings


def run_command(work: Coroutine[Any, Any, _Result]) -> _Result:
    try:
        return asyncio.run(work)
    except CorruptObject as error:
        raise OperatorError(str(error)) from error
