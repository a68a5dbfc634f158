"""Prints for terminals and for pipes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

PIPED_WIDTH = 1_000
TABLE_ROWS_MAX = 1_000

Field = str | int | Text
"""A field of a record: untrusted text, a number, or styled text."""


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or error. In a pipe, lines are not wrapped at the width of a terminal."""
    opened = Console(stderr=stderr)
    return opened if opened.is_terminal else Console(stderr=stderr, width=PIPED_WIDTH)


def printable(text: str, *, length_max: int | None = None) -> str:
    """Escape control characters and markup, so that untrusted text cannot change the terminal.

    Text longer than ``length_max`` ends in an ellipsis.
    """
    shown = text if length_max is None or len(text) <= length_max else f"{text[: length_max - 1]}…"
    return escape("\n".join(map(_visible, shown.split("\n"))))


def print_remark(text: str) -> None:
    """Print a line about printed records: in a pipe to standard error, so that records stay alone."""
    console = open_console()
    (console if console.is_terminal else open_console(stderr=True)).print(text, highlight=False, soft_wrap=True)


class Records:
    """Records of the same fields: a table in a terminal, and one record a line in a pipe.

    In a pipe, tabs separate the fields, and nothing is cut. The fields of the ``whole`` columns stay on one line of the
    table too, so that they can be copied into other commands; others break into lines. The table cuts fields to
    ``length_max``. A compact table has no frame.
    """

    def __init__(
        self, *headings: str, whole: Collection[str] = (), length_max: int | None = None, compact: bool = False
    ) -> None:
        self._headings = headings
        self._whole = whole
        self._length_max = length_max
        self._compact = compact
        self._rows: list[tuple[Field, ...]] = []

    def add(self, *fields: Field) -> None:
        """Add a record."""
        self._rows.append(fields)

    def print(self, console: Console) -> None:
        """Print all records, the first TABLE_ROWS_MAX of them in a terminal."""
        if console.is_terminal:
            console.print(self.table(), crop=False)
            if len(self._rows) > TABLE_ROWS_MAX:
                console.print(f"The first {TABLE_ROWS_MAX:,} of {len(self._rows):,}. A pipe gets all.", highlight=False)
            return
        for line in self.lines():
            console.file.write(f"{line}\n")  # rich would expand the tabs

    def table(self) -> Table:
        """Return the table of the first TABLE_ROWS_MAX records."""
        rows = [tuple(map(self._cell, row)) for row in self._rows[:TABLE_ROWS_MAX]]
        table = Table(*(self._column(place, rows) for place in range(len(self._headings))))
        if self._compact:
            table.box, table.padding, table.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
        for row in rows:
            table.add_row(*row)
        return table

    def lines(self) -> Iterator[str]:
        """Yield a line for each record, in which control characters are escaped."""
        for row in self._rows:
            yield "\t".join(_visible(str(field)) for field in row)

    def _column(self, place: int, rows: list[tuple[Text, ...]]) -> Column:
        heading = self._headings[place]
        if heading not in self._whole:
            return Column(heading, overflow="fold")
        # Without a least width, rich would cut the fields where the terminal is too narrow for them.
        return Column(heading, no_wrap=True, min_width=max((row[place].cell_len for row in rows), default=0))

    def _cell(self, field: Field) -> Text:
        if isinstance(field, Text):
            return field
        text = f"{field:,}" if isinstance(field, int) else printable(field, length_max=self._length_max)
        return Text.from_markup(text)


def _visible(text: str) -> str:
    """Escape control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
