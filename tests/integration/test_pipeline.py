"""The whole of Tripfold by its services as processes: what analysts see, whatever the upstream does to its data."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import datetime as dt
import hashlib
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from shared.domain import keys, objects
from shared.domain.ids import CityId
from shared.domain.objects import Manifest
from tests.integration.collector import Collector, Span
from tests.integration.commands import Command, started
from tests.integration.conftest import isolated_settings
from tests.integration.running import ROLES, Running, eventually, running, until
from tests.integration.trips import figures_of, make_trips
from tests.integration.upstream import UpstreamServer
from tripfold.local.embedded import EmbeddedServices
from tripfold.local.supervisor import http_probe

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def upstream() -> Any:
    """One upstream for the module; each test uses dates of its own."""
    with UpstreamServer() as server:
        yield server


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """One collector of traces for the module."""
    with Collector() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tripfold(
    upstream: UpstreamServer,
    collector: Collector,
    embedded: EmbeddedServices,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Running]:
    """Run the services against that upstream, with traces."""
    settings = isolated_settings(embedded, UPSTREAM_URL=upstream.url, UPSTREAM_ATTEMPTS="2")
    traces = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    own = dict.fromkeys((*ROLES, "api"), traces)
    async with running(settings, tmp_path_factory.mktemp("logs"), own=own) as services:
        yield services


@pytest.fixture(autouse=True)
def _only_its_own_cities(upstream: UpstreamServer) -> None:
    upstream.cities = []
    upstream.etags = False
    upstream.pace_s = 0.0
    upstream.silent = set()


async def test_numbers_are_exact_when_the_request_says_completed(upstream: UpstreamServer, tripfold: Running) -> None:
    """Cities of one name, an empty file and strange country names all count, the moment the request is completed."""
    date = "2024-05-01"
    one, two, three, four = (make_trips(seed, 400 + seed, date) for seed in range(4))
    upstream.add_city(0, "Port Tina", "Armenia")
    upstream.add_city(1, "Port Tina", "Armenia")
    upstream.add_city(2, "Nowhere", "Armenia")
    upstream.add_city("san/josé", "San José", "Россия")
    upstream.add_city(4, "Х", "Rossiia")
    upstream.add_city(5, "Paris", "🇫🇷")
    for city, trips in ((0, one), (1, two), (2, []), ("san/josé", three), (4, four), (5, one)):
        upstream.put(city, date, trips)
    request = await tripfold.process(date)
    statistics = await tripfold.stats(date, detail="full")
    assert request["status"] == "completed"
    assert len(statistics) == 4
    by_name = {days[date]["country_name"]: days[date] for days in statistics.values()}
    for name, files in {"Armenia": (one, two), "Россия": (three,), "Rossiia": (four,), "🇫🇷": (one,)}.items():
        assert {key: by_name[name][key] for key in figures_of(*files)} == figures_of(*files)
        assert by_name[name]["complete"] is True
    assert {"armenia", "rossiia"} <= statistics.keys()


async def test_a_corrected_file_replaces_its_numbers(upstream: UpstreamServer, tripfold: Running) -> None:
    """Numbers of a re-requested date whose upstream data changed are replaced, not added."""
    date = "2024-05-02"
    before, after = make_trips(1, 300, date), make_trips(2, 200, date)
    upstream.add_city(0, "A", "Peru")
    upstream.put(0, date, before)
    await tripfold.process(date)
    assert (await tripfold.stats(date))["peru"][date] == figures_of(before)
    upstream.put(0, date, after)
    await tripfold.process(date)
    assert (await tripfold.stats(date))["peru"][date] == figures_of(after)


@pytest.mark.parametrize("etags", [False, True])
async def test_an_unchanged_file_leaves_everything_untouched(
    upstream: UpstreamServer, tripfold: Running, etags: bool
) -> None:
    """A repeated request of the same data completes, and neither plan, manifest, raw objects nor summary change."""
    date = f"2024-05-{3 + etags:02}"
    upstream.etags = etags
    upstream.add_city(0, "A", "Peru")
    upstream.put(0, date, make_trips(1, 300, date))
    await tripfold.process(date)
    before = await _objects(tripfold, date)
    again = await tripfold.process(date)
    assert again["status"] == "completed"
    assert again["counts"]["cities_unchanged"] == 1
    assert await _objects(tripfold, date) == before


async def _objects(tripfold: Running, date: str) -> dict[str, str]:
    listed = [one async for one in tripfold.store.list("") if f"date={date}" in one.key]
    return {one.key: one.etag for one in listed if not one.key.startswith(keys.ACTIVE_REQUESTS)}


async def test_a_city_that_moves_counts_in_one_country(upstream: UpstreamServer, tripfold: Running) -> None:
    """A city that moves, with and without new bytes, and back, counts for the country it is in, and only there."""
    date = "2024-05-05"
    first, second = make_trips(1, 300, date), make_trips(2, 100, date)
    upstream.add_city(0, "A", "Peru")
    upstream.put(0, date, first)
    await tripfold.process(date)
    for country, file in (("Japan", first), ("Malta", second), ("Peru", second)):
        upstream.add_city(0, "A", country)
        upstream.put(0, date, file)
        request = await tripfold.process(date)
        assert request["status"] == "completed"
        assert await tripfold.stats(date) == {country.lower(): {date: figures_of(file)}}
    manifest_key = keys.manifest(dt.date.fromisoformat(date), CityId("0"))
    found = await tripfold.store.get(manifest_key)
    assert found is not None
    manifest = objects.decode(Manifest, found.body, manifest_key)
    raw = [one async for one in tripfold.store.list(f"raw/date={date}/")]
    assert len(raw) == 2, "a move alone names the same raw object"
    stored = await tripfold.store.get(manifest.raw_key)
    assert stored is not None
    assert hashlib.sha256(stored.body).hexdigest() == manifest.sha256


async def test_a_city_that_fails_is_named_and_the_others_count(upstream: UpstreamServer, tripfold: Running) -> None:
    """A city of 404, one of 500 and one with a bad record are failures with reasons; the rest is served."""
    date = "2024-05-06"
    good = make_trips(1, 300, date)
    bad = [*make_trips(2, 10, date), {"departure-time": f"{date}T01:00:00", "bus-type": "B", "passengers": "many"}]
    for city in range(4):
        upstream.add_city(city, f"City {city}", "Peru")
    upstream.put(0, date, good)
    upstream.files["1", date] = 404
    upstream.files["2", date] = 500
    upstream.put(3, date, bad)
    request = await tripfold.process(date)
    assert request["status"] == "completed with failures"
    reasons = {failure["city_id"]: failure["reason"] for failure in request["failures"]}
    assert reasons.keys() == {"1", "2", "3"}
    assert "404" in reasons["1"]
    assert "500" in reasons["2"]
    assert "passengers" in reasons["3"]
    assert "record 11" in reasons["3"]
    day = (await tripfold.stats(date, detail="full"))["peru"][date]
    assert (day["bus_count"], day["cities_reported"], day["cities_expected"], day["complete"]) == (300, 1, 4, False)
    upstream.put(1, date, good)
    upstream.put(2, date, good)
    upstream.put(3, date, good)
    assert (await tripfold.process(date))["status"] == "completed"
    assert (await tripfold.stats(date))["peru"][date] == figures_of(good, good, good, good)


async def test_a_404_keeps_the_good_revision_before_it(upstream: UpstreamServer, tripfold: Running) -> None:
    """A file that disappeared is a failure of the request, and its numbers stay."""
    date = "2024-05-07"
    good = make_trips(1, 300, date)
    upstream.add_city(0, "A", "Peru")
    upstream.put(0, date, good)
    await tripfold.process(date)
    upstream.files["0", date] = 404
    assert (await tripfold.process(date))["status"] == "completed with failures"
    assert (await tripfold.stats(date))["peru"][date] == figures_of(good)


async def test_a_date_requested_twice_at_once_counts_once(upstream: UpstreamServer, tripfold: Running) -> None:
    """Two requests of one date side by side both complete, and no trip counts twice."""
    date = "2024-05-08"
    files = [make_trips(seed, 300, date) for seed in range(5)]
    for city, file in enumerate(files):
        upstream.add_city(city, f"City {city}", "Peru")
        upstream.put(city, date, file)
    places = await asyncio.gather(tripfold.request(date), tripfold.request(date))
    ends = await asyncio.gather(*(tripfold.ended(place) for place in places))
    assert [end["status"] for end in ends] == ["completed", "completed"]
    assert (await tripfold.stats(date))["peru"][date] == figures_of(*files)


async def test_cities_without_a_response_delay_no_other(upstream: UpstreamServer, tripfold: Running) -> None:
    """While the upstream does not respond for more cities than there are streams, the other cities are ingested."""
    date = "2024-09-01"
    silent, others = {f"/cities/{city}/stats" for city in range(5)}, range(5, 20)
    assert len(silent) > tripfold.settings.ingest_streams
    for city in (*range(5), *others):
        upstream.add_city(city, f"City {city}", "Peru")
        upstream.put(city, date, make_trips(city, 20, date))
    upstream.silent = silent
    place = await tripfold.request(date)

    async def ingested() -> bool | None:
        listed = [one.key async for one in tripfold.store.list(keys.manifests_of(dt.date.fromisoformat(date)))]
        return len(listed) >= len(others) or None

    await eventually(ingested, "the cities that get a response")
    upstream.silent = set()
    assert (await tripfold.ended(place))["status"] == "completed"


async def test_an_empty_city_list_fails_the_request(upstream: UpstreamServer, tripfold: Running) -> None:
    """A request without a valid city fails, counts the bad entries, and names the setting that allows none."""
    upstream.cities += [{"id": 1.5, "name": "C", "country": "Peru"}, 7]
    request = await tripfold.process("2024-05-09")
    assert request["bad_cities_count"] == 2
    assert (request["status"], "TRIPFOLD_UPSTREAM_ALLOW_EMPTY_CITY_LIST" in request["failed_reason"]) == (
        "failed",
        True,
    )
    assert await tripfold.stats("2024-05-09") == {}


async def test_bad_cities_are_reported_and_the_others_are_planned(upstream: UpstreamServer, tripfold: Running) -> None:
    """Entries without id, name or country, and second ones of an id, are left out and named."""
    date = "2024-05-10"
    good = make_trips(1, 50, date)
    upstream.add_city(0, "A", "Peru")
    upstream.put(0, date, good)
    upstream.cities += [{"id": 0, "name": "B", "country": "Peru"}, {"id": 1.5, "name": "C", "country": "Peru"}, 7]
    request = await tripfold.process(date)
    assert request["status"] == "completed"
    assert request["bad_cities_count"] == 3
    assert (await tripfold.stats(date))["peru"][date] == figures_of(good)


@pytest.mark.parametrize("victim", ["planner", "worker", "aggregate", "api"])
async def test_a_service_killed_in_the_middle_loses_nothing(
    upstream: UpstreamServer, collector: Collector, tripfold: Running, victim: str
) -> None:
    """A service that is killed with -9 while cities stream is started again, and the request completes exactly.

    The request is one trace through all services, and each logs its id.
    """
    date = f"2024-06-{['planner', 'worker', 'aggregate', 'api'].index(victim) + 1:02}"
    files = [make_trips(seed, 1500, date) for seed in range(6)]
    for city, file in enumerate(files):
        upstream.add_city(city, f"City {city}", "Peru")
        upstream.put(city, date, file)
    # Work is left for each service when it is killed: the plan, or at least one city.
    last = "/cities" if victim == "planner" else "/cities/5/stats"
    upstream.silent, upstream.pace_s = {last}, 0.06
    asked_before = len(upstream.requests)
    place = await tripfold.request(date)
    await eventually(partial(_asked_for, upstream, last, asked_before), f"the request of {last}")
    tripfold.supervisor.kill(victim)
    upstream.silent = set()
    if victim == "api":
        await until(http_probe(str(tripfold.client.base_url.join("/health/live"))), "the API to come back")
    request = await tripfold.ended(place)
    assert request["status"] == "completed"
    assert (await tripfold.stats(date))["peru"][date] == figures_of(*files)
    # A killed API may have lost the span of the POST, which no other process repeats.
    wanted = {f"tripfold-{name}" for name in (*ROLES, "api")} - ({"tripfold-api"} if victim == "api" else set())
    spans = await eventually(partial(_spans_of_services, collector, request["id"], wanted), f"the spans of {wanted}")
    assert len({span.trace_id for span in spans}) == 1
    for name in (*ROLES, "api"):
        lines = [line for line in (tripfold.logs / f"{name}.log").read_text().splitlines() if request["id"] in line]
        assert any(spans[0].trace_id in line for line in lines), name


async def _spans_of_services(collector: Collector, request_id: str, services: set[str]) -> list[Span] | None:
    """Return the spans of the traces to which a request's events belong, once there are some of these services."""
    processed = [span for span in collector.spans if span.attributes.get("tripfold.request_id") == request_id]
    traces = {span.trace_id for span in processed}
    spans = [span for span in collector.spans if span.trace_id in traces]
    return spans if {span.service for span in spans} >= services else None


async def _asked_for(upstream: UpstreamServer, path: str, asked_before: int) -> bool | None:
    return any(path in asked for asked in upstream.requests[asked_before:]) or None


async def test_a_post_returns_the_url_of_its_status(tripfold: Running) -> None:
    """A request is answered with 202 and where its status is, which can be read at once."""
    response = await tripfold.client.post("/process-request", params={"date": "2024-05-11"})
    assert response.status_code == 202
    status = await tripfold.client.get(response.headers["location"])
    assert status.status_code == 200
    assert status.json()["id"] == response.json()["id"]
    assert json.loads(response.text)["date"] == "2024-05-11"


async def command(tripfold: Running, *arguments: str) -> tuple[int, str, str]:
    """Run a command of ``tripfold`` against the API; return its exit code and what it printed, to both outputs."""
    with begun(tripfold, *arguments) as process:
        ended = await process.ended()
    return ended.code, ended.out, ended.err


def begun(tripfold: Running, *arguments: str, **variables: str) -> contextlib.AbstractContextManager[Command]:
    """Start a command of ``tripfold`` against the API, with ``variables`` of its own."""
    variables |= {"TRIPFOLD_API_URL": str(tripfold.client.base_url), "COLUMNS": "120"}
    return started(tripfold.settings, *arguments, variables=variables)


async def test_client_commands_request_watch_and_print(upstream: UpstreamServer, tripfold: Running) -> None:
    """The commands ask for dates, say what failed and exit 1, and print the numbers that the API serves."""
    first, second = "2024-07-01", "2024-07-02"
    files = {date: make_trips(day, 200, date) for day, date in enumerate((first, second))}
    upstream.add_city(0, "Lima", "Peru")
    upstream.add_city(1, "Gone [bold]", "Peru")
    for date in (first, second):
        upstream.put(0, date, files[date])
    upstream.put(1, second, files[second])

    code, out, err = await command(tripfold, "backfill", f"{first}..{second}", "--only", "all")
    assert (code, err) == (1, "")
    assert f"{first}..{second} ━" in out
    assert "2/2 dates" in out
    (request_id,) = re.findall(rf"{first} .*'tripfold watch (\S+)'", out)
    code, out, err = await command(tripfold, "watch", request_id)
    assert (code, err) == (1, "")
    assert f"{first} Gone [bold] (1) failed:" in out
    assert "404" in out

    (_, table, _), (_, text, _), (_, body, _) = await asyncio.gather(
        command(tripfold, "stats", "--from", first, "--to", "2024-07-03"),
        command(tripfold, "stats", "--from", first, "--to", "2024-07-03", "--format", "csv"),
        command(tripfold, "stats", "--from", first, "--to", "2024-07-03", "--country", "peru", "--format", "json"),
    )
    expected = {first: figures_of(files[first]), second: figures_of(files[second], files[second])}
    (line,) = (line for line in table.splitlines() if line.startswith("peru\t"))
    assert f"{sum(day['passenger_count'] for day in expected.values()):,}" in line
    assert "2/3, 1 provisional" in line
    days = json.loads(body)["peru"]
    rows = {row["date"]: row for row in csv.DictReader(text.splitlines())}
    for date, figures in expected.items():
        assert days[date].items() >= figures.items()
        assert int(rows[date]["bus_count"]) == figures["bus_count"]


async def _shows(command: Command, text: str) -> bool | None:
    return text in command.printed or None


async def test_a_watched_request_can_be_cancelled(upstream: UpstreamServer, tripfold: Running) -> None:
    """Ctrl-C ends the watching alone, and says how to go on; cancelling skips the cities that were not begun."""
    date = "2024-07-04"
    cities = 20  # more than a worker takes at a time
    for city in range(cities):
        upstream.add_city(city, f"City {city}", "Peru")
        upstream.put(city, date, make_trips(city, 300, date))
    upstream.silent = {f"/cities/{city}/stats" for city in range(1, cities)}
    with begun(tripfold, "request", date, TTY_COMPATIBLE="1") as watching:
        await eventually(partial(_shows, watching, f"1/{cities} cities"), "the bar after the first city")
        watching.signal(signal.SIGINT)
        ended = await watching.ended()
    assert ended.code == 130
    told = re.search(r"'tripfold watch (\S+)'", ended.out)
    assert told is not None

    code, _, err = await command(tripfold, "cancel", told[1])
    assert (code, err) == (0, "")
    upstream.silent = set()
    code, out_of_watch, _ = await command(tripfold, "watch", told[1])
    assert code == 1
    assert "cancelled" in out_of_watch
    request = (await tripfold.client.get(f"/process-requests/{told[1]}")).json()
    counts = request["counts"]
    assert request["status"] == "cancelled"
    assert counts["cities_done"] == counts["cities_total"] == cities
    assert 0 < counts["cities_skipped"] < cities
    (day,) = (await tripfold.stats(date, detail="full"))["peru"].values()
    assert day["cities_reported"] == counts["cities_stored"] == cities - counts["cities_skipped"]
    code, _, err = await command(tripfold, "cancel", told[1])
    assert (code, "has ended: it is cancelled" in err) == (1, True)
