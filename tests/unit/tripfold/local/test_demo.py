"""The demo's output."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from tripfold_client import AsyncTripfold, CityCounts, CityFailure, CountryDay, Request, Statistics

from tests.fakes.api import DAY, NOW, REQUEST
from tests.fakes.scripted_server import response, scripted_server
from tripfold.local.demo import DemoFailed, process_dates, query_command, statistics_table


def day(country: str) -> CountryDay:
    """Return the statistics of a country on a date."""
    return CountryDay(
        country=country,
        country_name=country.title(),
        date=DAY,
        bus_count=1_234_567,
        passenger_count=37_189_404,
        accident_count=3,
        exist_accident=True,
        average_delay_s=1_672.55,
        delay_total_ms=2_064_875_000,
        cities_reported=6,
        cities_expected=6,
        complete=True,
        version=1,
    )


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("country", ["peru", "cote-d-ivoire", "bosnia-and-herzegovina", "a" * 89])
def test_columns_stand_under_their_headings(country: str, width: int) -> None:
    """A country with a long name folds into its column, and no other moves."""
    console = Console(file=io.StringIO(), width=width)
    console.print(statistics_table(Statistics([day("armenia"), day(country)])))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    heading = next(line for line in lines if "passengers" in line)
    rows = [line for line in lines if "2024-05-01" in line]
    assert len(rows) == 2
    for row in rows:
        assert row.index("2024-05-01") == heading.index("date")
        assert row.index("37,189,404") == heading.index("passengers")
        assert row.index("6/6") + 3 == heading.index("cities") + 6


async def test_a_date_that_does_not_complete_fails_the_demo() -> None:
    """All dates are processed, and the first failure is named with its reason."""
    counts = dict.fromkeys(CityCounts.__struct_fields__, 0) | {"cities_total": 1, "cities_done": 1, "cities_failed": 1}
    lima = CityFailure(city_id="8", city_name="Lima", reason="the upstream answered 404")
    ended = Request(
        id=REQUEST,
        date=DAY,
        status="completed with failures",
        version=2,
        requested_at=NOW,
        updated_at=NOW,
        counts=CityCounts(**counts),
        failures=(lima,),
    )
    completed = msgspec.structs.replace(ended, status="completed", failures=())
    console = Console(file=io.StringIO())
    answers = [response(202, msgspec.to_builtins(one)) for one in (completed, ended)]
    with scripted_server(*answers) as (url, seen):
        async with AsyncTripfold(url) as api:
            with pytest.raises(DemoFailed, match=r"1 city failed: Lima \(the upstream answered 404\)"):
                await process_dates(api, [DAY, DAY], console)
    assert len(seen) == 2


def test_the_line_with_sql_can_be_pasted_into_a_shell() -> None:
    """A shell can parse the whole line, with the hint at its end."""
    line = query_command(Path("a folder/environment"))
    subprocess.run(["sh", "-n", "-c", line], check=True)
