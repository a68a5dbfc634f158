"""Prints Markdown tables that are readable in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, note: str = "") -> None:
    """Print a table: the first column to the left, the others to the right; None is an empty cell.

    Numbers with a fraction are shown with three digits at least, and no more than they need.
    """
    cells = [list(columns), *([_shown(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    print(f"\n### {title}\n")
    for number, row in enumerate(cells):
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(f"| {' | '.join((row[0].ljust(widths[0]), *others))} |")
        if not number:
            dashes = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
            print(f"| {' | '.join(dashes)} |")
    if note:
        print(f"\n{note}")


def _shown(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return str(value)
