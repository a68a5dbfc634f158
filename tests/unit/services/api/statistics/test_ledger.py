"""``GET /country-stats/{country}/{date}``: the ledger of a country-day."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Plan, PlannedCity, PlannedCountry
from tests.fakes.api import DAY, NOW, REQUEST, Client, World, manifest_of, planned, retracted, stats

LEDGER = "/country-stats/armenia/2024-05-01"


def test_a_city_has_its_contribution_and_provenance(world: World, client: Client) -> None:
    """A city's row has its contribution, its revision, and the origin of its file."""
    event = stats("armenia", city_id="7", trips=3, passengers=21, accidents=1, delay_total_ms=6_000)
    world.fold_in(event, planned("armenia", city_ids=["7"]))
    world.write_manifest(manifest_of(event))
    ledger = client.get(LEDGER).json()
    assert (ledger["country"], ledger["date"], ledger["next"]) == ("armenia", "2024-05-01", None)
    assert ledger["cities"] == [
        {
            "city_id": "7",
            "city_name": "City 7",
            "standing": "reported",
            "revision": 5,
            "contribution": {"trips": 3, "passengers": 21, "accidents": 1, "delay_total_ms": 6_000},
            "trips_on_other_dates": 2,
            "suspicious": None,
            "provenance": {
                "revision": 5,
                "country": "armenia",
                "request_id": REQUEST,
                "upstream_url": "http://upstream.test/cities/7/stats?date=2024-05-01",
                "raw_key": "raw/date=2024-05-01/city=7/x.json",
                "sha256": "ab" * 32,
                "size_bytes": 1_000,
                "etag": '"v1"',
                "last_modified": None,
                "ingested_at": "2024-06-01T12:30:00Z",
                "bad_records": 0,
                "rule_version": 1,
                "plan_revision": 3,
            },
        }
    ]


def test_totals_of_a_ledger_equal_the_statistics(world: World, client: Client) -> None:
    """The totals of a ledger equal the day's statistics in full detail."""
    world.fold_in(stats("armenia", city_id="7"), stats("armenia", city_id="8"), planned("armenia", city_ids=["7"]))
    in_full = client.get("/country-stats?from=2024-05-01&to=2024-05-01&detail=full").json()
    assert client.get(LEDGER).json()["totals"] == in_full["armenia"]["2024-05-01"]


def test_each_city_has_a_status(world: World, client: Client) -> None:
    """A city is reported, has left, is missing or was retracted."""
    world.fold_in(
        stats("armenia", city_id="1"),
        stats("armenia", city_id="2"),
        retracted("armenia", city_id="4"),
        retracted("armenia", city_id="5"),
        planned("armenia", city_ids=["1", "3", "5"]),
    )
    assert standings(client.get(LEDGER).json()) == {
        "1": "reported",
        "2": "left",
        "3": "missing",
        "4": "retracted",
        "5": "missing",
    }


def test_an_incomplete_plan_is_not_in_force(world: World, client: Client) -> None:
    """While a part of a newer plan is missing, the plan before it names the expected cities."""
    newer = planned("armenia", city_ids=["8"], plan_revision=4)
    world.fold_in(planned("armenia", city_ids=["7"]), msgspec.structs.replace(newer, chunks=2))
    assert standings(client.get(LEDGER).json()) == {"7": "missing"}


def test_moved_city_is_named_by_its_manifest(world: World, client: Client) -> None:
    """A city that moved away gets its name from its manifest, which says where it counts."""
    world.fold_in(retracted("armenia", city_id="7", revision=6))
    world.write_manifest(manifest_of(stats("belgium", city_id="7", revision=6)))
    (city,) = client.get(LEDGER).json()["cities"]
    assert (city["standing"], city["revision"], city["contribution"]) == ("retracted", 6, None)
    assert (city["city_name"], city["provenance"]["country"]) == ("City 7", "belgium")


def test_manifest_ahead_of_the_ledger_shows_its_own_revision(world: World, client: Client) -> None:
    """A manifest that is ahead shows its own revision beside the ledger's."""
    world.fold_in(stats("armenia", city_id="7", revision=5))
    world.write_manifest(manifest_of(stats("armenia", city_id="7", revision=6)))
    (city,) = client.get(LEDGER).json()["cities"]
    assert (city["revision"], city["provenance"]["revision"]) == (5, 6)


def test_next_links_list_every_city_once(world: World, client: Client) -> None:
    """Following ``next`` lists every city once, in the order of the ids, whatever characters those have."""
    city_ids = sorted(["7", "10", "~S%C3%A3o%2FLuiz", "~a&b", "~x#y", "~+" + "ab" * 32])
    world.fold_in(*(stats("armenia", city_id=city_id) for city_id in city_ids))
    seen: list[str] = []
    path: str | None = f"{LEDGER}?limit=1"
    while path is not None:
        assert len(seen) < len(city_ids), "the pages do not end"
        page = client.get(path).json()
        assert len(page["cities"]) == 1
        seen += [city["city_id"] for city in page["cities"]]
        path = page["next"]
    assert seen == city_ids


def test_only_manifests_of_the_page_are_read(world: World, client: Client) -> None:
    """Only the manifests of the cities on the page are read."""
    world.fold_in(*(stats("armenia", city_id=str(number)) for number in range(10, 20)))
    client.get(f"{LEDGER}?limit=3&after=12")
    manifests = sorted(key for key in world.store.reads if key.startswith("manifests/"))
    assert manifests == [f"manifests/date={DAY}/city={number}.json" for number in (13, 14, 15)]


def test_page_after_the_last_city_is_empty(world: World, client: Client) -> None:
    """After the last city there is an empty page."""
    world.fold_in(stats("armenia"))
    ledger = client.get(f"{LEDGER}?after=9").json()
    assert (ledger["cities"], ledger["next"]) == ([], None)


def test_planned_day_has_a_ledger_of_missing_cities(world: World, client: Client) -> None:
    """A day that is planned and not yet reported has a ledger of missing cities."""
    world.fold_in(planned("armenia", city_ids=["7", "8"]))
    assert standings(client.get(LEDGER).json()) == {"7": "missing", "8": "missing"}


def test_city_without_a_file_has_its_name_from_the_plan(world: World, client: Client) -> None:
    """A city without a file has its name from the plan."""
    world.fold_in(planned("armenia", city_ids=["7"]))
    city = PlannedCity(city_id=CityId("7"), upstream_id="7", name="Port Tina")
    countries = {CountrySlug("armenia"): PlannedCountry(name="Armenia", cities=(city,))}
    plan = Plan(date=DAY, revision=3, request_id=REQUEST, planned_at=NOW, countries=countries)
    world.store.write(keys.plan(DAY), objects.encode(plan))
    assert client.get(LEDGER).json()["cities"][0]["city_name"] == "Port Tina"


def test_unreadable_manifest_is_named(world: World, client: Client) -> None:
    """A city whose manifest is unreadable has no provenance, and the manifest is named."""
    world.fold_in(stats("armenia", city_id="7"))
    key = keys.manifest(DAY, CityId("7"))
    world.store.write(key, b"{")
    response = client.get(LEDGER)
    assert (response.json()["cities"][0]["provenance"], response.headers["tripfold-unreadable"]) == (None, key)


def test_ledger_comes_from_the_live_generation(world: World, client: Client) -> None:
    """The ledger is the live generation's."""
    world.fold_in(stats("armenia", trips=1), generation=1)
    world.fold_in(stats("armenia", trips=2), generation=2)
    assert client.get(LEDGER).json()["totals"]["bus_count"] == 1
    world.make_live(2)
    assert client.get(LEDGER).json()["totals"]["bus_count"] == 2


@pytest.mark.parametrize(
    "path",
    [
        "/country-stats/belgium/2024-05-01",
        "/country-stats/armenia/2024-05-02",
        "/country-stats/armenia/2024-5-1",
        "/country-stats/armenia/20240501",
        "/country-stats/armenia/today",
        "/country-stats/%2e%2e%2fstate/2024-05-01",
        "/country-stats/armenia/2024-05-01/7",
        "/country-stats/Armenia/2024-05-01",
        f"/country-stats/{'a' * 3_000}/2024-05-01",
        "/country-stats/%00/2024-05-01",
    ],
)
def test_unknown_country_day_is_404(world: World, client: Client, path: str) -> None:
    """An unknown country-day is 404, as a problem."""
    world.fold_in(stats("armenia"))
    response = client.get(path)
    assert (response.status_code, response.headers["content-type"]) == (404, "application/problem+json")


@pytest.mark.parametrize(
    ("query", "name"),
    [("limit=0", "limit"), ("limit=1001", "limit"), ("before=7", "before"), ("after=1&after=2", "after")],
)
def test_invalid_page_is_400(world: World, client: Client, query: str, name: str) -> None:
    """An invalid page is 400; the problem names the parameter."""
    world.fold_in(stats("armenia"))
    response = client.get(f"{LEDGER}?{query}")
    assert response.status_code == 400
    assert [fault["name"] for fault in response.json()["invalid_parameters"]] == [name]


def test_outage_of_s3_is_503_with_retry_after(world: World, client: Client) -> None:
    """While S3 is down a ledger is 503 with Retry-After."""
    world.store.down = True
    response = client.get(LEDGER)
    assert response.status_code == 503
    assert "retry-after" in response.headers


def standings(ledger: dict[str, Any]) -> dict[str, str]:
    """Return how each city of a ledger stands to its day."""
    return {city["city_id"]: city["standing"] for city in ledger["cities"]}


def test_a_suspicious_city_is_marked_and_counted(world: World, client: Client) -> None:
    """The ledger says why the volume of a city's file is unusual, and the day how many cities have such a file."""
    reason = "8 trips; usual on a Wednesday are 2,000"
    world.fold_in(msgspec.structs.replace(stats("armenia"), suspicious=reason), stats("armenia", city_id="8"))
    ledger = client.get(f"/country-stats/armenia/{DAY}").json()
    assert {city["city_id"]: city["suspicious"] for city in ledger["cities"]} == {"7": reason, "8": None}
    assert ledger["totals"]["cities_suspicious"] == 1
    day = client.get(f"/country-stats?from={DAY}&to={DAY}&detail=full").json()["armenia"][str(DAY)]
    assert day["cities_suspicious"] == 1
