"""Progress bars on standard error, and what is waited for in between."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tripfold.operate.command_line import progress_console


async def wait(look: int) -> None:
    """Wait before something is looked at again: the longer, the more often it was."""
    await asyncio.sleep(0.5 * look)


PLAIN_INTERVAL_S = 10.0


class _PlainLines:
    """Says now and then how far something is, where nobody looks at a terminal: in lines for a log."""

    def __init__(self, what: str, unit: str, clock_s: Callable[[], float]) -> None:
        self._what = what
        self._unit = unit
        self._clock_s = clock_s
        self._begun_s = self._told_s = clock_s()

    def show(self, done: int, total: int, remark: str = "") -> None:
        now_s = self._clock_s()
        if now_s - self._told_s < PLAIN_INTERVAL_S:
            return
        self._told_s = now_s
        elapsed_s = now_s - self._begun_s
        left = f", {dt.timedelta(seconds=round(elapsed_s * (total - done) / done))} left" if done else ""
        elapsed = dt.timedelta(seconds=round(elapsed_s))
        parts = (f"{done:,} of {total:,} {self._unit}".rstrip(), remark.removeprefix(", "), f"after {elapsed}{left}")
        progress_console.print(
            f"{self._what}: {', '.join(part for part in parts if part)}",
            highlight=False,
            markup=False,
        )


@contextlib.contextmanager
def progress_bar(
    what: str, unit: str, *, clock_s: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show a progress bar; give a function that takes how much is done, of how much, and a remark.

    Without a terminal it is a line every PLAIN_INTERVAL_S.
    """
    if not progress_console.is_terminal:
        yield _PlainLines(what, unit, clock_s).show
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
        task = progress.add_task(what, total=None, remark="")

        def show(done: int, total: int, remark: str = "") -> None:
            progress.update(task, completed=done, total=total, remark=remark)

        yield show
