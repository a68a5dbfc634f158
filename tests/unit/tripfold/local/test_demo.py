"""The demo's output."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from tripfold.local.demo import query_command, statistics_table

DAY = {
    "bus_count": 1_234_567,
    "passenger_count": 37_189_404,
    "exist_accident": True,
    "average_delay_s": 1_672.55,
    "cities_reported": 6,
    "cities_expected": 6,
}


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("country", ["peru", "cote-d-ivoire", "bosnia-and-herzegovina", "a" * 89])
def test_columns_stand_under_their_headings(country: str, width: int) -> None:
    """A country with a long name folds into its column, and no other moves."""
    console = Console(file=io.StringIO(), width=width)
    console.print(statistics_table({"armenia": {"2024-05-01": DAY}, country: {"2024-05-01": DAY}}))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    heading = next(line for line in lines if "passengers" in line)
    rows = [line for line in lines if "2024-05-01" in line]
    assert len(rows) == 2
    for row in rows:
        assert row.index("2024-05-01") == heading.index("date")
        assert row.index("37,189,404") == heading.index("passengers")
        assert row.index("6/6") + 3 == heading.index("cities") + 6


def test_the_line_with_sql_can_be_pasted_into_a_shell() -> None:
    """A shell can parse the whole line, with the hint at its end."""
    line = query_command(Path("a folder/environment"))
    subprocess.run(["sh", "-n", "-c", line], check=True)
