"""``GET /country-completeness`` and the missing cities of a country-day."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from services.api.completeness.model import CompletenessGrid
from services.api.completeness.reader import CompletenessReader
from services.api.completeness.states import grid_of
from services.api.http.date_range import DateRange, ProcessableDates
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.backfills import new_backfill
from shared.domain.events import Outcome
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import (
    ActiveRequests,
    CityUnderWay,
    Countries,
    Deadline,
    Failure,
    OpenBackfills,
    RequestRecord,
)
from tests.fakes.api import (
    DAY,
    NOW,
    REQUEST,
    Client,
    World,
    planned,
    record_of,
    stats,
    write,
    write_latest,
    write_plan,
)
from tests.fakes.builders import daily_schedule

RANGE = f"/country-completeness?from={DAY}&to={DAY + dt.timedelta(days=3)}"


def filled(world: World) -> list[RequestRecord]:
    """Fill four days: complete, with a failed and a refused city, running, and not requested."""
    names = Countries(slugs={"Armenia": CountrySlug("armenia"), "Brazil": CountrySlug("brazil")})
    world.store.write(keys.COUNTRIES, objects.encode(names))
    write_plan(world, DAY, armenia=["1"])
    world.fold_in(planned("armenia", city_ids=["1"]), stats("armenia", city_id="1"))
    second, third = DAY + dt.timedelta(days=1), DAY + dt.timedelta(days=2)
    write_plan(world, second, armenia=["1", "2"], brazil=["7"])
    failed = write_latest(
        world,
        second,
        cities=3,
        outcomes={Outcome.STORED: "1", Outcome.FAILED: "6"},
        served="1",
        failures={
            1: Failure(city_id=CityId("2"), city_name="City 2", reason="the upstream answered 404"),
            2: Failure(city_id=CityId("7"), city_name="City 7", reason="torn", quarantine_key="quarantine/a.json"),
        },
    )
    world.fold_in(planned("armenia", second, city_ids=["1", "2"]), stats("armenia", second, city_id="1"))
    write_plan(world, third, armenia=["1", "2"])
    running = write_latest(world, third, cities=2, under_way={0: CityUnderWay(bytes_done=1)})
    return [failed, running]


def states(body: object) -> dict[str, list[str]]:
    """Return the states of a response by row; the row "all" has those of the dates."""
    grid = msgspec.convert(body, dict)
    rows = {row["country"]: row["days"] for row in grid["countries"]} | {"all": grid["dates"]}
    return {name: [day["state"] for day in days] for name, days in rows.items()}


def count_grids(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that gets an element for each grid that is derived."""
    derived: list[object] = []

    def counted(*arguments: Any) -> CompletenessGrid:
        grid = grid_of(*arguments)
        derived.append(grid)
        return grid

    monkeypatch.setattr("services.api.completeness.reader.grid_of", counted)
    return derived


def test_each_day_says_how_complete_it_is(world: World, client: Client) -> None:
    """Every date and country-day has its state, with the request, the reason and the action."""
    failed, _ = filled(world)
    body = client.get(RANGE).json()
    assert states(body) == {
        "armenia": ["complete", "failed", "running", "not requested"],
        "brazil": ["not expected", "refused", "running", "not requested"],
        "all": ["complete", "refused", "running", "not requested"],
    }
    date = body["dates"][1]
    assert (date["request_id"], date["request_status"]) == (failed.request_id, "completed with failures")
    assert (date["cities_reported"], date["cities_expected"], date["action"]) == (1, 3, "retry")
    assert date["reason"] == "1 file was refused. City 7: torn"
    assert body["last_ingested_at"] == "2024-06-01T12:30:00Z"


def test_deadlines_and_backfills_explain_days(world: World, client: Client) -> None:
    """A missed deadline makes a day late; a day that a backfill is going to process is running."""
    late = daily_schedule(NOW, deadlines=(Deadline(date=DAY, at=NOW, late=True),))
    world.store.write(keys.schedule("daily"), objects.encode(late))
    backfill = new_backfill(REQUEST, DAY + dt.timedelta(days=1), DAY + dt.timedelta(days=2), now=NOW)
    world.store.write(keys.backfill(REQUEST), objects.encode(backfill))
    world.store.write(keys.OPEN_BACKFILLS, objects.encode(OpenBackfills(backfill_ids=(REQUEST,))))
    world.store.write(keys.COUNTRIES, objects.encode(Countries(slugs={"Armenia": CountrySlug("armenia")})))
    body = client.get(RANGE).json()
    assert states(body)["armenia"] == ["late", "running", "running", "not requested"]
    assert (body["dates"][0]["deadline"], body["dates"][1]["backfill_id"]) == ("2024-06-01T12:30:00Z", REQUEST)


def test_a_waiting_request_counts_before_an_ended_one(world: World, client: Client) -> None:
    """A date with failures whose next request waits is running, also before that one has a record."""
    filled(world)
    second = DAY + dt.timedelta(days=1)
    ended = objects.decode(ActiveRequests, world.store.objects[keys.active_requests(second)].body, "")
    waiting = record_of(NOW + dt.timedelta(minutes=1))
    active = msgspec.structs.replace(ended, waiting=waiting.request_id)
    world.store.write(keys.active_requests(second), objects.encode(active))
    assert states(client.get(RANGE).json())["armenia"][1] == "running"
    world.clock.advance(3_600)  # its API crashed before it published it
    assert states(client.get(RANGE).json())["armenia"][1] == "failed"
    write(world, waiting)
    assert states(client.get(RANGE).json())["armenia"][1] == "running"


def test_a_planned_day_without_a_summary_is_expected(world: World, client: Client) -> None:
    """A country whose plan is not folded yet has a row, and its day is provisional."""
    write_plan(world, DAY, armenia=["1"], brazil=["7"])
    assert states(client.get(RANGE).json())["armenia"][0] == "provisional"
    for country in ("armenia", "brazil"):
        del world.store.objects[keys.summary(1, DAY, CountrySlug(country))]
    grid = states(client.get(RANGE).json())
    assert (grid["armenia"][0], grid["brazil"][0], grid["all"][0]) == ("provisional",) * 3


def test_an_unchanged_grid_is_not_sent_again(world: World, client: Client) -> None:
    """The ETag changes when a state changes, and only then; a year compresses well."""
    filled(world)
    first = client.get(RANGE, headers={"Accept-Encoding": "gzip"})
    assert first.headers["content-encoding"] == "gzip"
    known = {"If-None-Match": first.headers["etag"], "Accept-Encoding": "gzip"}
    assert client.get(RANGE, headers=known).status_code == 304
    world.fold_in(planned("brazil", city_ids=["7"]), stats("brazil", city_id="7"))
    assert client.get(RANGE, headers=known).status_code == 200


def test_the_number_of_s3_requests_is_bounded(world: World, client: Client) -> None:
    """An unchanged range reads nothing again but what can change unseen: two objects, and the records of open dates."""
    filled(world)
    client.get(RANGE)
    world.store.reads.clear()
    client.get(RANGE)
    assert [key for key in world.store.reads if key.startswith(("plans/", "summaries/", "state/active"))] == []
    assert len([key for key in world.store.reads if key.startswith("requests/")]) == 2


def test_an_unchanged_grid_is_not_derived_again(world: World, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid is derived once for each change of a summary, a request or a backfill, also for clients without it."""
    derived = count_grids(monkeypatch)
    _, running = filled(world)
    second = DAY + dt.timedelta(days=1)
    backfill = new_backfill(REQUEST, DAY, DAY + dt.timedelta(days=3), now=NOW)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: write(world, msgspec.structs.replace(running, outcomes={Outcome.STORED: "1"}, served="1")),
        lambda: world.fold_in(planned("armenia", second, city_ids=["1", "2"]), stats("armenia", second, city_id="2")),
        lambda: world.store.write(keys.backfill(REQUEST), objects.encode(backfill)),
        lambda: world.store.write(keys.OPEN_BACKFILLS, objects.encode(OpenBackfills(backfill_ids=(REQUEST,)))),
    ]
    for change in changes:
        change()
        first = client.get(RANGE)
        assert client.get(RANGE).content == first.content
    assert len(derived) == 4  # a backfill that is not open explains nothing


def test_an_unreadable_summary_does_not_derive_an_unchanged_grid_again(
    world: World, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged day is named each time, although the grid is kept."""
    derived = count_grids(monkeypatch)
    filled(world)
    world.store.write(keys.summary(1, DAY, CountrySlug("armenia")), b"torn")
    for _ in range(2):
        response = client.get(RANGE)
        assert states(response.json())["armenia"][0] == "unreadable"
        assert response.headers["Tripfold-Unreadable"] == f"{DAY}/armenia"
    assert len(derived) == 1


async def test_concurrent_clients_share_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty clients that come at once cost two readings: that of the first, and the one that begins after it."""
    derived = count_grids(monkeypatch)
    world = World()
    filled(world)
    reader = CompletenessReader(
        world.store,
        SummaryReader(world.store, cache_bytes=1_000_000),
        ProcessableDates(world.clock, DAY, 0),
        clock=world.clock,
    )
    days = DateRange(DAY, DAY + dt.timedelta(days=3))
    await reader.read(days)
    world.store.reads.clear()
    await reader.read(days)
    of_one = len(world.store.reads)
    world.store.reads.clear()
    grids = await asyncio.gather(*(reader.read(days) for _ in range(20)))
    assert len(world.store.reads) == 2 * of_one
    assert len({grid.body for grid in grids}) == len(derived) == 1


def test_unusable_ranges_are_refused(client: Client) -> None:
    """Dates that are missing, reversed or too many are refused as for the statistics."""
    for query in ("", "from=2024-05-02&to=2024-05-01", "from=2020-01-01&to=2024-05-01"):
        assert client.get(f"/country-completeness?{query}").status_code == 400


def test_the_missing_cities_have_a_reason_and_a_usual_time(world: World, client: Client) -> None:
    """Each missing city says why, and when its file usually comes; without enough earlier days it has no usual time."""
    filled(world)
    second = DAY + dt.timedelta(days=1)
    for back, hour in ((1, 7), (2, 6), (3, 8), (4, 200)):
        date = second - dt.timedelta(days=back)
        at = dt.datetime.combine(date, dt.time(), dt.UTC) + dt.timedelta(days=1, hours=hour)
        event = msgspec.structs.replace(stats("armenia", date, city_id="2"), ingested_at=at)
        world.fold_in(planned("armenia", date, city_ids=["2"]), event)
    body = client.get(f"/country-completeness/Armenia/{second}").json()
    assert (body["country"], body["missing_total"]) == ("armenia", 1)
    (city,) = body["missing"]
    assert (city["city_id"], city["city_name"], city["state"]) == ("2", "City 2", "failed")
    assert (city["reason"], city["usual_at"]) == ("the upstream answered 404", "2024-05-03T07:00:00Z")
    (refused,) = client.get(f"/country-completeness/brazil/{second}").json()["missing"]
    assert (refused["state"], refused["quarantine_key"], refused["usual_at"]) == ("refused", "quarantine/a.json", None)
    third = client.get(f"/country-completeness/armenia/{DAY + dt.timedelta(days=2)}").json()
    assert [city["state"] for city in third["missing"]] == ["running", "waiting"]


def test_a_day_without_the_country_is_not_found(world: World, client: Client) -> None:
    """A country that the date does not expect, a date without a plan, and an unknown country are 404."""
    filled(world)
    assert "expected on" in client.get(f"/country-completeness/brazil/{DAY}").json()["detail"]
    for path in ("brazil/2023-01-01", "brazil/x", "brasil/2024-05-01"):
        assert client.get(f"/country-completeness/{path}").status_code == 404
