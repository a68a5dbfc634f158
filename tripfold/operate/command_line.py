"""What every operator's command does alike: read the settings, run to its end, print."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import typer
import uvloop
from rich.markup import escape
from rich.table import Column

from shared.domain.errors import OperatorError
from shared.domain.objects import CorruptObject
from shared.runtime.logging import configure_logging
from shared.runtime.settings import Settings, load_settings
from tripfold.console import open_console

EXIT_TERMINATED = 128 + signal.SIGTERM


console = open_console()
progress_console = open_console(stderr=True)  # so that what is printed can be piped

_Result = TypeVar("_Result")


def command_settings() -> Settings:
    """Return the settings of the environment, and log as a terminal wants it."""
    settings = load_settings()
    # At a terminal a log is noise, unless somebody looks for a fault.
    quiet = {"log_level": "warning", "log_format": "text"} if settings.log_level == "info" else {}
    configure_logging(settings.model_copy(update=quiet))
    return settings


def run_command(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a command's work. What cannot be read in the bucket is told as an OperatorError.

    SIGTERM ends it as Ctrl-C does: a rebuild gives its pointer back before it goes.
    """

    async def until_terminated() -> _Result:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the services: a rebuild is long work
            return runner.run(until_terminated())
    except asyncio.CancelledError:
        sys.exit(EXIT_TERMINATED)
    except CorruptObject as error:
        raise OperatorError(str(error)) from error


def print_json(value: object) -> None:
    """Print a value as JSON, for a program to read."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def argument_column(heading: str, *, folded: bool = False) -> Column:
    """Return the column of a table whose cells are arguments of other commands: a narrow terminal cuts others short.

    Arguments of any length are ``folded``, on as many lines as they need.
    """
    return Column(heading, overflow="fold") if folded else Column(heading, no_wrap=True)


def printable(text: str, *, length_max: int | None = None) -> str:
    """Return text that does nothing to a terminal but appear: control characters and the like are escaped.

    What is longer than ``length_max`` ends in an ellipsis.
    """
    shown = text if length_max is None or len(text) <= length_max else f"{text[: length_max - 1]}…"
    escaped = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in shown)
    return escape(escaped)
