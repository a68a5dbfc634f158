"""What every operator's command does alike: read the settings, run to its end, print."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.markup import escape

from shared.errors import OperatorError
from shared.health import configure_logging
from shared.objects import CorruptObject
from shared.settings import Settings, load_settings

console = Console()
progress_console = Console(stderr=True)  # so that what is printed can be piped

_Result = TypeVar("_Result")


def command_settings() -> Settings:
    """Return the settings of the environment, and log as a terminal wants it."""
    settings = load_settings()
    # At a terminal a log is noise, unless somebody looks for a fault.
    quiet = {"log_level": "warning", "log_format": "text"} if settings.log_level == "info" else {}
    configure_logging(settings.model_copy(update=quiet))
    return settings


def run_command(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a command's work. What cannot be read in the bucket is told as an OperatorError."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the services: a rebuild is long work
            return runner.run(work)
    except CorruptObject as error:
        raise OperatorError(str(error)) from error


def print_json(value: object) -> None:
    """Print a value as JSON, for a program to read."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value)))


def printable(text: str, *, length_max: int | None = None) -> str:
    """Return text that does nothing to a terminal but appear: control characters and the like are escaped.

    What is longer than ``length_max`` ends in an ellipsis.
    """
    shown = text if length_max is None or len(text) <= length_max else f"{text[: length_max - 1]}…"
    escaped = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in shown)
    return escape(escaped)
