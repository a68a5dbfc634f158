"""The ``tripfold`` command as a client of the API."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import sys

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from services.api.auth import digest_of
from shared.domain import keys, objects
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Countries, Failure, RequestRecord
from tests.fakes.api import DAY, NOW, REQUEST, World, planned, record_of, stats, write
from tests.serving import served
from tripfold import cli
from tripfold.client import api as api_module
from tripfold.client.api import ApiClient, ApiUnusable, Counts, NotFound, RequestState
from tripfold.client.commands import InvalidDates, parse_dates
from tripfold.client.figures import decode_statistics, print_statistics, sparkline, table_of, table_of_days
from tripfold.client.watching import detail_of, requests_table, watch


def test_a_request_without_a_plan_shows_its_status() -> None:
    """Until its cities are planned, the progress line has the status and no zeros."""
    counts = Counts(**dict.fromkeys(Counts.__struct_fields__, 0))
    state = RequestState(id="1", date=DAY, status="accepted", version=1, requested_at=NOW, counts=counts)
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
    with world.client() as client:
        body = client.get("/country-stats?from=2024-05-01&to=2024-05-03&detail=full").content
    statistics = decode_statistics(body)
    console = Console(file=io.StringIO(), width=200)
    console.print(table_of(statistics))
    console.print(table_of_days(statistics["armenia"]))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "armenia ▁█· 3.000 ▁▁· 80 4 2 2/3, 1 provisional" in lines
    assert "2024-05-01 3 40 2 1.000 ▁ 1/2 provisional" in lines
    assert "2024-05-02 1 40 0 9.000 █ 1/1" in lines
    assert "2024-05-03 · no data" in lines


@pytest.mark.parametrize("width", [200, 120, 90, 60, 30])
def test_sparklines_shrink_on_narrow_terminals(width: int) -> None:
    """Where there is little room sparklines get shorter, then go; names and figures are whole on any terminal."""
    world = World()
    for place in range(31):
        world.fold_in(stats("cote-d-ivoire", DAY + dt.timedelta(days=place), trips=1_234, passengers=45_678))
    with world.client() as client:
        body = client.get("/country-stats?from=2024-05-01&to=2024-05-31&detail=full").content
    console = Console(file=io.StringIO(), width=width)
    print_statistics(decode_statistics(body), console)
    assert isinstance(console.file, io.StringIO)
    (line,) = [line for line in console.file.getvalue().splitlines() if "cote-d-ivoire" in line]
    words = line.split()
    assert [word for word in words if "▁" not in word][:5] == ["cote-d-ivoire", "0.007", "1,416,018", "38,254", "0"]
    longest = max((len(word) for word in words if "▁" in word), default=0)
    assert longest == {200: 31, 120: 12}.get(width, 0)
    assert len(line.rstrip()) <= max(width, 90)


async def test_watching_reports_each_state_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state of a request comes once, also over a stream that broke; failures are named, and are not success.

    Markup and control characters in a name change nothing in the terminal.
    """
    monkeypatch.setattr(api_module, "TRY_AGAIN_S", 0.01)
    world = World()
    record = record_of()
    write(world, record)
    states = [
        msgspec.structs.replace(record, planned=True, cities=2, version=2),
        msgspec.structs.replace(
            record,
            planned=True,
            cities=2,
            version=3,
            outcomes={Outcome.STORED: "1", Outcome.FAILED: "2"},
            served="1",
            failures={1: Failure(city_id=CityId("8"), city_name="[red]Li\x1bma", reason="it answered [404]")},
        ),
    ]
    console = Console(file=io.StringIO(), width=120)
    with served(world) as url:
        async with ApiClient(url, None) as client:
            state = await client.request(record.request_id)
            coming = iter(states)
            write(world, next(coming))
            seen = []
            async with asyncio.timeout(20):
                async for later in client.follow(state):
                    seen.append(later.version)
                    for following in coming:
                        write(world, following)
                        break
            assert seen == [2, 3]
            assert await watch(client, state, console) is False
    assert isinstance(console.file, io.StringIO)
    assert "2/2 cities" in console.file.getvalue()
    assert "2024-05-01 [red]Li\\x1bma (8) failed: it answered [404]" in console.file.getvalue()


async def test_line_separator_in_a_city_name_does_not_break_the_stream() -> None:
    """An event is read whole although its JSON has U+2028, which Python counts as the end of a line."""
    world = World()
    ended: RequestRecord = msgspec.structs.replace(
        record_of(),
        planned=True,
        cities=1,
        version=2,
        outcomes={Outcome.FAILED: "1"},
        failures={0: Failure(city_id=CityId("8"), city_name="Li\u2028ma", reason="404")},
    )
    write(world, ended)
    with served(world) as url:
        async with ApiClient(url, None) as client:
            state = await client.request(ended.request_id)
            older = msgspec.structs.replace(state, status="running", version=1)
            async with asyncio.timeout(20):
                (later,) = [later async for later in client.follow(older)]
    assert [failure.city_name for failure in later.failures] == ["Li\u2028ma"]


async def test_errors_have_the_message_of_the_api_or_its_address() -> None:
    """The client sends its key; an error has the API's message, or the address that did not respond."""
    keys = f"reader:read:{digest_of('sesame')}"
    with served(World(), api_access="keys", api_keys=keys) as url:
        async with ApiClient(url, "sesame") as client:
            assert await client.latest(5) == ()
            with pytest.raises(NotFound, match="no request or backfill"):
                await client.find(REQUEST)
            with pytest.raises(ApiUnusable, match='"process" scope'):
                await client.process(DAY)
        async with ApiClient(url, None) as client:
            with pytest.raises(ApiUnusable, match="Set it with --key or TRIPFOLD_API_KEY"):
                await client.latest(5)
    async with ApiClient(url, None) as client:
        with pytest.raises(ApiUnusable, match=f"the API at {url} cannot be reached"):
            await client.latest(5)


async def test_an_error_of_the_service_leads_to_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage has the id under which the log of the API has its reason."""
    monkeypatch.setattr(api_module, "RETRY_AFTER_MAX_S", 0.01)
    world = World()
    world.store.down = True
    with served(world) as url:
        async with ApiClient(url, None) as client:
            with pytest.raises(ApiUnusable, match=r"S3 cannot be reached.* under [0-9a-f]{32}\.$"):
                await client.latest(5)


async def test_a_lost_response_still_makes_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """While S3 is down a request is retried, and is one request in the end."""
    monkeypatch.setattr(api_module, "RETRY_AFTER_MAX_S", 0.01)
    world = World()
    compare_and_swap = world.store.compare_and_swap
    refusals = iter([True, False])

    async def sometimes(key: str, body: bytes, *, etag: str | None) -> str:
        if key.startswith("requests/"):
            world.store.down = next(refusals, False)
        try:
            return await compare_and_swap(key, body, etag=etag)
        finally:
            world.store.down = False

    monkeypatch.setattr(world.store, "compare_and_swap", sometimes)
    with served(world) as url:
        async with ApiClient(url, None) as client:
            state = await client.process(DAY)
            assert [one.id for one in await client.latest(5)] == [state.id]


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

        def last_line(*arguments: str) -> str:  # the service logs to the same output
            return run(*arguments).output.splitlines()[-1]

        listed = run("watch")
        assert (listed.exit_code, done.request_id in listed.output, "completed" in listed.output) == (0, True, True)
        assert run("watch", done.request_id).exit_code == 0
        period = ("--from", "2024-05-01", "--to", "2024-05-01")
        assert json.loads(last_line("stats", *period, "--format", "json"))["armenia"]["2024-05-01"]["bus_count"] == 8
        assert last_line("stats", *period, "--format", "csv").startswith("armenia,2024-05-01,8,40,false,1.125,")
        world.store.write(keys.COUNTRIES, objects.encode(Countries(slugs={"Armenia": CountrySlug("armenia")})))
        assert "1/1" in run("stats", *period, "--country", "ARMENIA").output
        with pytest.raises(ApiUnusable, match=r"There is no country 'armenai'\. Did you mean armenia"):
            runner.invoke(cli.app, ["stats", *period, "--country", "armenai", "--api", url], catch_exceptions=False)
        asked = last_line("request", "2024-05-01", "--no-watch")
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
        narrow = Console(file=io.StringIO(), width=80)
        narrow.print(requests_table(asyncio.run(_latest(url))))
        listed = runner.invoke(cli.app, ["watch", "--api", url], env={"COLUMNS": "80"})
        watched = runner.invoke(cli.app, ["watch", failed.request_id, "--api", url], env={"COLUMNS": "80"})
    assert isinstance(narrow.file, io.StringIO)
    assert failed.request_id in narrow.file.getvalue()
    (line,) = [line for line in listed.output.splitlines() if line.strip().startswith(failed.request_id)]
    assert "completed with failures" in line
    assert f"2024-05-01 Lima (8) failed: {reason.strip()}" in watched.output.splitlines()


async def _latest(url: str) -> tuple[RequestState, ...]:
    async with ApiClient(url, None) as client:
        return await client.latest(5)


async def test_loading_the_client_loads_no_service() -> None:
    """A client of the API imports none of the libraries of the services."""
    script = (
        "import sys, tripfold.client.api, tripfold.client.watching, tripfold.client.figures, tripfold.client.commands;"
        "print([name for name in sys.modules if name.split('.')[0] in "
        "{'litestar', 'faststream', 'aiokafka', 'aioboto3'} or name.startswith(('services.api', 'services.ingest'))])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"
