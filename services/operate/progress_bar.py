"""Progress bars on standard error, and what is waited for in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from services.operate.command_line import progress_console


async def wait(look: int) -> None:
    """Wait before something is looked at again: the longer, the more often it was."""
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
    at_terminal = progress_console.is_terminal
    with Progress(*columns, console=progress_console, transient=True, disable=not at_terminal) as progress:
        task = progress.add_task(what, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=total, remark=remark)

        yield show
