"""Opens consoles for terminals and for pipes."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

PIPED_WIDTH = 1_000


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or error. In a pipe, lines are not wrapped at the width of a terminal."""
    opened = Console(stderr=stderr)
    return opened if opened.is_terminal else Console(stderr=stderr, width=PIPED_WIDTH)


def printable(text: str, *, length_max: int | None = None) -> str:
    """Escape control characters and markup, so that untrusted text cannot change the terminal.

    Text longer than ``length_max`` ends in an ellipsis.
    """
    shown = text if length_max is None or len(text) <= length_max else f"{text[: length_max - 1]}…"
    escaped = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in shown)
    return escape(escaped)
