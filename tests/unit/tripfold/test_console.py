"""Records as a table in a terminal, and one a line in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from tripfold import console
from tripfold.console import Records

REQUEST = "018f3d2a-5c00-7aaa-8bbb-0123456789ab"


def printed(records: Records, *, width: int | None = None) -> str:
    """Return what is printed to a terminal of so many columns, or without a width to a pipe."""
    written = io.StringIO()
    records.print(Console(file=written, width=width or 1_000, force_terminal=width is not None, color_system=None))
    return written.getvalue()


def test_a_pipe_gets_one_record_a_line_with_nothing_cut() -> None:
    """In a pipe, tabs separate the fields, and control characters are escaped; numbers are plain."""
    records = Records("request", "bytes", "state", "why", whole={"request"}, length_max=10)
    records.add(REQUEST, 1_234_567, Text("failed", style="red"), f"two\nlines\t[bold]and{'x' * 2_000}\x9b31m")
    records.add(REQUEST, 0, "", "é")
    assert printed(records) == (
        f"{REQUEST}\t1234567\tfailed\ttwo\\nlines\\t[bold]and{'x' * 2_000}\\x9b31m\n{REQUEST}\t0\t\té\n"
    )


def test_a_terminal_gets_a_table_with_whole_ids() -> None:
    """Ids are on one line whatever the width; other fields break into lines, and long ones are cut."""
    records = Records("request", "bytes", "why", whole={"request"}, length_max=50)
    records.add(REQUEST, 1_234_567, f"[bold]{'x' * 100}\x9b31m")
    for width in (80, 50, 20):
        shown = printed(records, width=width)
        assert f"{REQUEST} │" in shown, width
    shown = printed(records, width=200)
    assert "1,234,567" in shown
    assert f"[bold]{'x' * 43}…" in shown


def test_a_terminal_gets_the_first_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long table names its first records only, and says how to get all."""
    monkeypatch.setattr(console, "TABLE_ROWS_MAX", 2)
    records = Records("number")
    for number in range(3):
        records.add(number)
    assert "The first 2 of 3. A pipe gets all." in printed(records, width=80)
    assert printed(records) == "0\n1\n2\n"
