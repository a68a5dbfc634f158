"""Shows the progress of a job on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tripfold_client.models import Backfill, Request

PLAIN_INTERVAL_S = 10.0

Show = Callable[[Request | Backfill], object]


@contextlib.contextmanager
def showing(progress: bool | Show, stream: TextIO | None = None) -> Iterator[Show]:
    """Yield a function that shows a state: ``progress`` itself, one that prints, or one that does nothing.

    In a terminal and in a notebook one line is updated. In a log there is a line every ten seconds, and for the end.
    """
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda _: None
        return
    line = _Line(stream or sys.stderr)
    try:
        yield line.show
    finally:
        line.end()


class _Line:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._updates = stream.isatty() or "ipykernel" in sys.modules
        self._width = 0
        self._printed_s = float("-inf")

    def show(self, state: Request | Backfill) -> None:
        """Show a state."""
        text = state.progress
        if self._updates:
            self._stream.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        elif state.ended or time.monotonic() - self._printed_s >= PLAIN_INTERVAL_S:
            self._stream.write(f"{text}\n")
            self._printed_s = time.monotonic()
        self._stream.flush()

    def end(self) -> None:
        """End the line."""
        if self._width:
            self._stream.write("\n")
