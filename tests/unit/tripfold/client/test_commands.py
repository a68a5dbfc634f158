"""The ``tripfold`` command as a client of the API."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import re
import sys

import msgspec
import pytest
from rich.console import Console
from tripfold_client import CityCounts, CountryDay, Request, Statistics, Tripfold
from typer.testing import CliRunner, Result

from services.api.auth import digest_of
from services.api.statistics import formats
from shared.domain import keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Countries, Failure, RequestRecord
from tests.fakes.api import DAY, NOW, REQUEST, World, planned, record_of, record_of_failure, stats, write
from tests.serving import served
from tests.unit.tripfold.client import id_in
from tripfold import cli
from tripfold.client.figures import DaysByCountry, print_statistics, sparkline, table_of, table_of_days
from tripfold.client.session import ApiUnusable, InvalidDates, parse_dates
from tripfold.client.watching import detail_of, records_of_requests, watch_to_end


def test_a_request_without_a_plan_shows_its_status() -> None:
    """Until its cities are planned, the progress line has the status and no zeros."""
    counts = CityCounts(**dict.fromkeys(CityCounts.__struct_fields__, 0))
    state = Request(id="1", date=DAY, status="accepted", version=1, requested_at=NOW, updated_at=NOW, counts=counts)
    assert detail_of(state) == "accepted"
    planned_state = msgspec.structs.replace(
        state, status="running", counts=msgspec.structs.replace(counts, cities_total=3)
    )
    assert detail_of(planned_state).startswith("0/3 cities")


@pytest.mark.parametrize(
    ("text", "dates"),
    [
        ("2024-05-01", ("2024-05-01", "2024-05-01")),
        ("2024-05-01..2024-05-07", ("2024-05-01", "2024-05-07")),
        ("2024-02-29..2024-02-29", ("2024-02-29", "2024-02-29")),
    ],
)
def test_dates_and_ranges_are_parsed(text: str, dates: tuple[str, str]) -> None:
    """A date means itself, and two dates with two dots between them mean a range."""
    assert tuple(map(str, parse_dates(text))) == dates


@pytest.mark.parametrize(
    "text", ["", "..", "2024-05-01..", "..2024-05-01", "may", "2023-02-29", "2024-05-02..2024-05-01"]
)
def test_a_text_that_is_no_date_is_refused(text: str) -> None:
    """A text that is neither a date nor a range is refused, and the error shows the expected form."""
    with pytest.raises(InvalidDates, match=r"; (it must be|use) "):
        parse_dates(text)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([], ""),
        ([None, None], "··"),
        ([3.0], "▁"),
        ([0.0, 7.0], "▁█"),
        ([-1.0, None, 0.0, 1.0], "▁·▅█"),
        ([5.0, 5.0], "▁▁"),
    ],
)
def test_a_sparkline_scales_to_its_values(values: list[float | None], drawn: str) -> None:
    """The least value is the lowest bar and the greatest the highest; a day without data has none."""
    assert sparkline(values) == drawn


def test_a_long_sparkline_groups_days() -> None:
    """More days than there is room for are taken together, and none is left out."""
    assert sparkline([float(place // 100) for place in range(800)], width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([1.0] * 366)) == 31


def test_tables_sum_days_and_mark_incomplete_ones() -> None:
    """A country's line sums its days exactly; a day's line says what is missing of it."""
    world = World()
    world.fold_in(stats("armenia", trips=3, delay_total_ms=3_000, accidents=2), planned("armenia", city_ids=["7", "8"]))
    second = DAY + dt.timedelta(days=1)
    world.fold_in(stats("armenia", second, trips=1, delay_total_ms=9_000), planned("armenia", second, city_ids=["7"]))
    countries = countries_of(world, "2024-05-03")
    console = Console(file=io.StringIO(), width=200)
    console.print(table_of(countries))
    console.print(table_of_days(countries["armenia"]))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "armenia ▁█· 3.000 ▁▁· 80 4 2 2/3, 1 provisional" in lines
    assert "2024-05-01 3 40 2 1.000 ▁ 1/2 provisional" in lines
    assert "2024-05-02 1 40 0 9.000 █ 1/1" in lines
    assert "2024-05-03 · no data" in lines


def countries_of(world: World, last: str) -> DaysByCountry:
    """Return what the API serves from the first of May on."""
    with world.client() as client:
        lines = client.get(
            "/country-stats",
            params={"from": str(DAY), "to": last, "detail": "full"},
            headers={"Accept": formats.NDJSON},
        )
    return Statistics([msgspec.json.decode(line, type=CountryDay) for line in lines.content.splitlines()]).by_country()


@pytest.mark.parametrize("width", [200, 120, 90, 60, 30])
def test_sparklines_shrink_on_narrow_terminals(width: int) -> None:
    """Where there is little room sparklines get shorter, then go; names and figures are whole on any terminal."""
    world = World()
    for place in range(31):
        world.fold_in(stats("cote-d-ivoire", DAY + dt.timedelta(days=place), trips=1_234, passengers=45_678))
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_statistics(countries_of(world, "2024-05-31"), console)
    assert isinstance(console.file, io.StringIO)
    (line,) = [line for line in console.file.getvalue().splitlines() if "cote-d-ivoire" in line]
    words = line.split()
    assert [word for word in words if "▁" not in word][:5] == ["cote-d-ivoire", "0.007", "1,416,018", "38,254", "0"]
    longest = max((len(word) for word in words if "▁" in word), default=0)
    assert longest == {200: 31, 120: 12}.get(width, 0)
    assert len(line.rstrip()) <= max(width, 90)


def test_watching_names_the_failures() -> None:
    """Failures are named, and are not success. Markup and control characters in a name change nothing."""
    world = World()
    failed: RequestRecord = msgspec.structs.replace(
        record_of(),
        planned=True,
        cities=2,
        version=3,
        outcomes={Outcome.STORED: "1", Outcome.FAILED: "2"},
        served="1",
        failures={1: Failure(city_id=CityId("8"), city_name="[red]Li\x1bma", reason="it answered [404]")},
    )
    write(world, failed)
    console = Console(file=io.StringIO(), width=120)
    with served(world) as url, Tripfold(url) as api:
        assert watch_to_end(api.job(failed.request_id), console) is False
    assert isinstance(console.file, io.StringIO)
    assert "2/2 cities" in console.file.getvalue()
    assert "2024-05-01 [red]Li\\x1bma (8) failed: it answered [404]" in console.file.getvalue()


def test_errors_name_the_remedy() -> None:
    """A wrong key, a key that may only read, a wrong URL, an unknown id and an outage each say what to do."""
    world = World()
    with served(world, api_access="keys", api_keys=f"reader:read:{digest_of('sesame')}") as url:
        given = ("--api", url)
        assert "Set it with --key or TRIPFOLD_API_KEY" in error_of("watch", *given)
        assert "Set it with --key or TRIPFOLD_API_KEY" in error_of("watch", *given, "--key", "wrong")
        assert '"process" scope' in error_of("request", "2024-05-01", *given, "--key", "sesame")
        assert "no request or backfill" in error_of("cancel", REQUEST, *given, "--key", "sesame")
    assert f"the API at {url} cannot be reached" in error_of("watch", *given)
    assert "--api or TRIPFOLD_API_URL sets the URL" in error_of("watch", *given)
    assert "must begin with http://" in error_of("watch", "--api", "127.0.0.1:8080")


def error_of(*arguments: str) -> str:
    """Return the error of a command."""
    result = CliRunner().invoke(cli.app, list(arguments))
    assert isinstance(result.exception, ApiUnusable)
    return str(result.exception)


def test_an_error_of_the_service_leads_to_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage has the id under which the log of the API has its reason."""
    monkeypatch.setattr("tripfold_client.connection.RETRY_AFTER_MAX_S", 0.01)
    world = World()
    world.store.down = True
    with served(world) as url:
        assert re.search(r"S3 cannot be reached.* under [0-9a-f]{32}\.$", error_of("watch", "--api", url))


def test_a_retry_continues_the_request() -> None:
    """``tripfold retry`` retries the failed cities under the same id; a request without failures is refused."""
    world = World()
    failed = record_of_failure("8", "Lima", "404")
    write(world, failed)
    with served(world) as url:
        printed = CliRunner().invoke(cli.app, ["retry", failed.request_id, "--no-watch", "--api", url]).output
        assert id_in(printed) == failed.request_id
        with Tripfold(url) as api:
            assert api.job(failed.request_id).status == "running"
        waiting = CliRunner().invoke(cli.app, ["request", "2024-05-02", "--no-watch", "--api", url]).output
        assert "retry it when it has ended" in error_of("retry", id_in(waiting), "--api", url)


def test_commands_print_the_responses_of_the_api() -> None:
    """The commands print what the API has: the latest requests, and its statistics as they are."""
    world = World()
    world.fold_in(stats("armenia"), planned("armenia", city_ids=["7"]))
    done: RequestRecord = msgspec.structs.replace(
        record_of(NOW), planned=True, cities=1, outcomes={Outcome.STORED: "1"}, served="1"
    )
    write(world, done)
    runner = CliRunner()
    with served(world) as url:

        def run(*arguments: str) -> Result:
            return runner.invoke(cli.app, [*arguments, "--api", url])

        def line(begin: str, *arguments: str) -> str:  # the service logs to the same output
            (found,) = (line for line in run(*arguments).output.splitlines() if line.startswith(begin))
            return found

        listed = run("watch")
        assert (listed.exit_code, done.request_id in listed.output, "completed" in listed.output) == (0, True, True)
        assert run("watch", done.request_id).exit_code == 0
        period = ("--from", "2024-05-01", "--to", "2024-05-01")
        assert json.loads(line("{", "stats", *period, "--format", "json"))["armenia"]["2024-05-01"]["bus_count"] == 8
        assert line("armenia,", "stats", *period, "--format", "csv").startswith("armenia,2024-05-01,8,40,false,1.125,")
        world.store.write(keys.COUNTRIES, objects.encode(Countries(slugs={"Armenia": CountrySlug("armenia")})))
        assert "1/1" in run("stats", *period, "--country", "ARMENIA").output
        with pytest.raises(ApiUnusable, match=r"There is no country 'armenai'\. Did you mean armenia"):
            runner.invoke(cli.app, ["stats", *period, "--country", "armenai", "--api", url], catch_exceptions=False)
        asked = id_in(run("request", "2024-05-01", "--no-watch").output)
        assert asked != done.request_id
        assert asked in {key[-41:-5] for key in world.store.bodies("requests/")}


def test_ids_and_reasons_are_not_truncated() -> None:
    """Ids are whole on 80 columns; in a pipe every request and every failure is one line."""
    world = World()
    reason = "record 41, byte 4879, field 'passengers', value -1: " + "expected 0 or more " * 20
    failed: RequestRecord = msgspec.structs.replace(
        record_of(NOW),
        planned=True,
        cities=2,
        outcomes={Outcome.STORED: "1", Outcome.FAILED: "2"},
        served="1",
        failures={1: Failure(city_id=CityId("8"), city_name="Lima", reason=reason.strip())},
    )
    write(world, failed)
    runner = CliRunner()
    with served(world) as url:
        narrow = Console(file=io.StringIO(), width=80, force_terminal=True)
        with Tripfold(url) as api:
            records_of_requests(api.requests(5)).print(narrow)
        listed = runner.invoke(cli.app, ["watch", "--api", url], env={"COLUMNS": "80"})
        watched = runner.invoke(cli.app, ["watch", failed.request_id, "--api", url], env={"COLUMNS": "80"})
    assert isinstance(narrow.file, io.StringIO)
    assert failed.request_id in narrow.file.getvalue()
    (line,) = [line for line in listed.output.splitlines() if line.strip().startswith(failed.request_id)]
    assert "completed with failures" in line
    assert f"2024-05-01 Lima (8) failed: {reason.strip()}" in watched.output.splitlines()


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("watch",), keys.request(REQUEST)),
        (("backfills", "list"), keys.backfill(REQUEST)),
        (("schedule", "list"), keys.schedule("daily")),
    ],
)
def test_lists_name_what_cannot_be_read(command: tuple[str, ...], key: str) -> None:
    """A list that lacks an object says so beside its records, on standard error."""
    world = World()
    world.store.write(key, b"torn")
    with served(world) as url:
        result = CliRunner().invoke(cli.app, [*command, "--api", url])
    assert result.stderr.startswith("Left out: ")
    assert key in result.stderr
    assert "Left out" not in result.stdout


async def test_loading_the_client_loads_no_service() -> None:
    """A client of the API imports none of the libraries of the services."""
    script = (
        "import sys, tripfold.client.commands, tripfold.client.backfills, tripfold.client.schedules;"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "{'litestar', 'faststream', 'aiokafka', 'aioboto3'} or name.startswith(('services.api', 'services.ingest'))])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"
