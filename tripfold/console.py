"""Opens consoles for terminals and for pipes."""

from __future__ import annotations

from rich.console import Console

PIPED_WIDTH = 1_000


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or error. In a pipe, lines are not wrapped at the width of a terminal."""
    opened = Console(stderr=stderr)
    return opened if opened.is_terminal else Console(stderr=stderr, width=PIPED_WIDTH)
