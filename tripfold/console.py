"""Terminals: how commands print for people and for pipes."""

from __future__ import annotations

from rich.console import Console

PIPED_WIDTH = 1_000


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or error. What is piped is not cut into lines of a terminal that nobody looks at."""
    opened = Console(stderr=stderr)
    return opened if opened.is_terminal else Console(stderr=stderr, width=PIPED_WIDTH)
