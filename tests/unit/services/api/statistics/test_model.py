"""``GET /country-stats``: the statistics of a range of dates."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import msgspec
import pytest

from services.api.middleware.legacy_query import repaired_query
from shared.domain import keys, objects
from shared.domain.ids import CountrySlug
from shared.domain.objects import Countries
from shared.runtime import metrics
from shared.runtime.settings import Settings
from tests.fakes.api import DAY, Client, World, planned, stats

NO_DATA = {"bus_count": 0, "passenger_count": 0, "exist_accident": False, "average_delay_s": 0.0}


@pytest.fixture(name="empty", scope="module")
def _empty() -> Iterator[Client]:
    with World().client() as client:
        yield client


def test_a_day_has_exactly_four_figures(world: World, client: Client) -> None:
    """A day holds exactly the four figures, each computed from the totals of its country."""
    world.fold_in(
        stats("armenia", city_id="7", trips=3, passengers=21, accidents=1, delay_total_ms=10_000),
        stats("armenia", city_id="8", trips=5, passengers=35, delay_total_ms=-1_001),
    )
    response = client.get("/country-stats?from=2024-05-01&to=2024-05-01")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "armenia": {
            "2024-05-01": {
                "bus_count": 8,
                "passenger_count": 56,
                "exist_accident": True,
                "average_delay_s": 1.125,  # 8,999 ms over 8 trips are 1,124.875 ms
            }
        }
    }


def test_days_without_data_are_zeros(world: World, client: Client) -> None:
    """A country with data on one day of the range has every day of it; the days without data are zeros."""
    world.fold_in(stats("armenia", dt.date(2024, 5, 31)))
    days = client.get("/country-stats?from=2024-05-30&to=2024-06-02").json()["armenia"]
    assert list(days) == ["2024-05-30", "2024-05-31", "2024-06-01", "2024-06-02"]
    assert days["2024-05-31"]["bus_count"] == 8
    assert [day for date, day in days.items() if date != "2024-05-31"] == [NO_DATA] * 3


def test_countries_are_sorted_by_slug(world: World, client: Client) -> None:
    """Countries are sorted by slug, whatever months their data is in."""
    world.fold_in(stats("chad", dt.date(2024, 4, 30)))
    world.fold_in(stats("armenia", dt.date(2024, 5, 2)))
    world.fold_in(stats("belgium", dt.date(2024, 6, 1)))
    assert list(client.get("/country-stats?from=2024-04-01&to=2024-06-30").json()) == ["armenia", "belgium", "chad"]


def test_countries_without_data_are_left_out(world: World, client: Client) -> None:
    """A country that is only planned, or has data only outside the range, is left out."""
    world.fold_in(planned("chad", city_ids=["1"]))
    world.fold_in(stats("armenia", dt.date(2024, 5, 2)))
    assert client.get("/country-stats?from=2024-05-01&to=2024-05-01").json() == {}


def test_empty_file_is_data(world: World, client: Client) -> None:
    """A country of which a city reported no trips has data, and its average is 0."""
    world.fold_in(stats("armenia", trips=0, passengers=0, delay_total_ms=0))
    assert client.get("/country-stats?from=2024-05-01&to=2024-05-01").json() == {"armenia": {"2024-05-01": NO_DATA}}


def test_a_country_is_selected_by_slug_or_unique_name(world: World, client: Client) -> None:
    """``country`` selects one country by its slug, or by its name if that is unique."""
    slugs = {"Belgium": "belgium", "Côte d'Ivoire": "cote-d-ivoire", "Chad": "chad", "CHAD": "chad-2"}
    countries = Countries(slugs={name: CountrySlug(slug) for name, slug in slugs.items()})
    world.store.write(keys.COUNTRIES, objects.encode(countries))
    for slug in ("armenia", "belgium", "cote-d-ivoire"):
        world.fold_in(stats(slug))
    for named, slug in {
        "belgium": "belgium",
        " BELGIUM ": "belgium",
        "CÔTE D'IVOIRE": "cote-d-ivoire",
        "armenia": "armenia",  # not in the list, and yet in the bucket
    }.items():
        response = client.get(f"/country-stats?from=2024-05-01&to=2024-05-01&country={named}")
        assert list(response.json()) == [slug]
        assert client.get(f"/country-stats/{named}/2024-05-01").json()["country"] == slug
    assert client.get("/country-stats?from=2024-05-01&to=2024-05-01&country=chad").json() == {}


@pytest.mark.parametrize(
    ("named", "hint"), [("belguim", "Did you mean belgium?"), ("Chad", "td-1 or td-2"), ("Nowhere at all", "GET")]
)
def test_unknown_country_is_404_with_similar_names(world: World, client: Client, named: str, hint: str) -> None:
    """An unknown country, or a name that two countries have, is 404 with the most similar names."""
    slugs = {"Belgium": "belgium", "Chad": "td-1", "CHAD": "td-2"}
    countries = Countries(slugs={name: CountrySlug(slug) for name, slug in slugs.items()})
    world.store.write(keys.COUNTRIES, objects.encode(countries))
    for path in (f"/country-stats?from=2024-05-01&to=2024-05-01&country={named}", f"/country-stats/{named}/{DAY}"):
        response = client.get(path)
        assert (response.status_code, hint in response.json()["detail"]) == (404, True), response.text


def test_detail_full_adds_completeness_and_exact_sums(world: World, client: Client) -> None:
    """``detail=full`` adds the completeness and the exact sums of each day."""
    world.fold_in(
        stats("armenia", city_id="7", revision=5, trips=3, accidents=2, delay_total_ms=6_000),
        planned("armenia", city_ids=["7", "8"], plan_revision=3),
    )
    days = client.get("/country-stats?from=2024-05-01&to=2024-05-02&detail=full").json()["armenia"]
    assert days["2024-05-01"] == {
        "bus_count": 3,
        "passenger_count": 40,
        "exist_accident": True,
        "average_delay_s": 2.0,
        "country_name": "Armenia",
        "accident_count": 2,
        "delay_total_ms": 6_000,
        "cities_reported": 1,
        "cities_expected": 2,
        "complete": False,
        "version": 8,
        "last_ingested_at": "2024-06-01T12:30:00Z",
        "unreadable": None,
        "cities_suspicious": 0,
    }
    assert days["2024-05-02"] == NO_DATA | {
        "country_name": "Armenia",
        "accident_count": 0,
        "delay_total_ms": 0,
        "cities_reported": 0,
        "cities_expected": 0,
        "complete": False,
        "version": 0,
        "last_ingested_at": None,
        "unreadable": None,
        "cities_suspicious": 0,
    }


def test_instants_are_served_in_utc(world: World, client: Client) -> None:
    """A table has only UTC. So a head that was read from it gives the same bytes under the same ETag."""
    paris = dt.datetime(2024, 5, 2, 12, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    world.fold_in(msgspec.structs.replace(stats("armenia"), ingested_at=paris))
    response = client.get("/country-stats?from=2024-05-01&to=2024-05-01&detail=full")
    assert response.json()["armenia"]["2024-05-01"]["last_ingested_at"] == "2024-05-02T10:00:00Z"


def test_detail_full_includes_planned_countries(world: World, client: Client) -> None:
    """``detail=full`` includes planned countries, and excludes countries that left the plan."""
    world.fold_in(planned("armenia", city_ids=["7"]))
    world.fold_in(planned("belgium", city_ids=[]))
    days = client.get("/country-stats?from=2024-05-01&to=2024-05-02&detail=full").json()
    assert list(days) == ["armenia"]
    assert (days["armenia"]["2024-05-01"]["cities_expected"], days["armenia"]["2024-05-02"]["version"]) == (1, 0)
    assert days["armenia"]["2024-05-01"]["country_name"] == "Armenia"
    assert client.get("/country-stats?from=2024-05-01&to=2024-05-02").json() == {}


@pytest.mark.parametrize(
    "query",
    ["from=2024-05-01&to2024-05-02", "to2024-05-02&from=2024-05-01", "from=2024-05-01&to2024-05-02="],
)
def test_queries_of_the_first_version_are_accepted(world: World, client: Client, query: str) -> None:
    """Queries of the first version, which lack an equals sign, get the same responses as complete ones."""
    world.fold_in(stats("armenia"))
    whole = client.get("/country-stats?from=2024-05-01&to=2024-05-02")
    assert client.get(f"/country-stats?{query}").json() == whole.json() != {}


def test_queries_of_the_first_version_accept_other_parameters(world: World, client: Client) -> None:
    """The form of the first version takes the other parameters too."""
    world.fold_in(stats("armenia"))
    world.fold_in(stats("belgium"))
    assert list(client.get("/country-stats?country=belgium&from=2024-05-01&to2024-05-02").json()) == ["belgium"]


def test_other_routes_refuse_queries_of_the_first_version(empty: Client) -> None:
    """No other route takes the form of the first version."""
    response = empty.get("/process-requests?to2024-05-31")
    assert response.status_code == 400
    assert response.json()["invalid_parameters"][0]["name"] == "to2024-05-31"


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["from", "to"]),
        ("from=2024-05-01", ["to"]),
        ("from=2024-05-01&to=", ["to"]),
        ("from=2024-05-01&to=2024-5-31", ["to"]),
        ("from=2024-05-01&to=2024-02-30", ["to"]),
        ("from=20240501&to=2024-05-31", ["from"]),
        ("from=2024-05-01T00:00:00&to=2024-05-31", ["from"]),
        ("from=yesterday&to=today", ["from", "to"]),
        ("from=2024-05-01&to=2024-05-31&to=2024-05-31", ["to"]),
        ("from=2024-05-01&to=2024-05-31&to2024-05-31", ["to"]),
        ("from=2024-05-01&to2024-05-31&to2024-05-31", ["to"]),
        ("from=2024-05-01&from=2024-05-02&to=2024-05-31", ["from"]),
        ("from=2024-05-01&to=2024-05-31&city=7", ["city"]),
        ("from=2024-05-01&to=2024-05-31&to2024-5-1", ["to2024-5-1"]),
        ("from=2024-05-01&to=2024-05-31&From=2024-05-01", ["From"]),
        ("from=2024-05-01&to=2024-05-31&from_=2024-05-01", ["from_"]),
        ("from=2024-05-01&to=2024-05-31&days_max=9000", ["days_max"]),
        ("from=2024-05-01&to=2024-05-31&country=", ["country"]),
        ("from=2024-05-01&to=2024-05-31&detail=FULL", ["detail"]),
        ("from=2024-05-02&to=2024-05-01", ["from"]),
    ],
)
def test_invalid_query_is_400_and_names_its_parameters(empty: Client, query: str, names: list[str]) -> None:
    """An invalid query is 400; the problem names each invalid parameter and the reason."""
    response = empty.get(f"/country-stats?{query}")
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["type"] == "urn:problem-type:tripfold:invalid-parameter"
    assert [fault["name"] for fault in problem["invalid_parameters"]] == names
    assert all(fault["reason"] in problem["detail"] for fault in problem["invalid_parameters"])


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("from=2024-05-01&to=2024-5-31", ["'2024-5-31'", "to=2024-05-31"]),
        ("from=2024-05-02&to=2024-05-01", ["2024-05-02", "2024-05-01", "swap"]),
        ("from=2024-05-01&to=2024-05-31&city=7", ["city", "country, detail, from, to"]),
        ("from=2024-05-01&to=2025-05-02", ["367 days", "366", "to=2025-05-01"]),
    ],
)
def test_reason_repeats_the_value_and_says_what_to_do(empty: Client, query: str, parts: list[str]) -> None:
    """A reason repeats the wrong value, and says what to do."""
    detail = empty.get(f"/country-stats?{query}").json()["detail"]
    assert all(part in detail for part in parts), detail


def test_range_longer_than_the_setting_is_refused(world: World) -> None:
    """The longest range is a setting: one day more is refused."""
    assert Settings().api_range_days_max == 366
    with world.client(api_range_days_max=2) as client:
        assert client.get("/country-stats?from=2024-05-01&to=2024-05-02").status_code == 200
        assert client.get("/country-stats?from=2024-05-01&to=2024-05-03").status_code == 400


def test_first_and_last_days_of_the_calendar_are_accepted(empty: Client) -> None:
    """The first and the last day of the calendar are valid in a query."""
    assert empty.get("/country-stats?from=0001-01-01&to=0001-01-01").json() == {}
    assert empty.get("/country-stats?from=9999-12-31&to=9999-12-31").json() == {}


def test_query_with_too_many_parameters_is_refused(empty: Client) -> None:
    """A query with too many parameters is refused."""
    response = empty.get("/country-stats?" + "&".join(f"p{number}=1" for number in range(51)))
    assert response.status_code == 400
    assert "50" in response.json()["detail"]


def test_long_values_are_cut(empty: Client) -> None:
    """The problem repeats a wrong value, cut to a limited length."""
    detail = empty.get(f"/country-stats?from={'9' * 5000}&to=2024-05-01").json()["detail"]
    assert len(detail) < 500


def test_outage_of_s3_is_503_with_retry_after(world: World, client: Client) -> None:
    """While S3 is down the response is 503 with Retry-After and no address; then statistics are served again."""
    world.fold_in(stats("armenia"))
    world.store.down = True
    response = client.get("/country-stats?from=2024-05-01&to=2024-05-01")
    assert (response.status_code, response.headers["content-type"]) == (503, "application/problem+json")
    assert int(response.headers["retry-after"]) > 0
    assert "internal" not in response.text
    world.store.down = False
    assert client.get("/country-stats?from=2024-05-01&to=2024-05-01").status_code == 200


@pytest.mark.parametrize(
    ("body", "remedy"),
    [(b"<html>", "tripfold repair --from 2024-05-01"), (b'{"schema_version":99,"plans":[]}', "upgrade")],
)
def test_unreadable_summary_is_named(world: World, client: Client, body: bytes, remedy: str) -> None:
    """An unreadable summary is named, and the others are served; a query for it alone is a problem."""
    key = f"summaries/generation=1/date={DAY}/country=armenia.json"
    world.store.write(key, body.replace(b'"plans":', b'"x":1,"plans":'))
    world.fold_in(stats("armenia", dt.date(2024, 5, 2)))
    world.fold_in(stats("belgium"))
    period = "/country-stats?from=2024-05-01&to=2024-05-02"
    before = metrics.unreadable_objects.labels("summary")._value.get()
    plain, full = client.get(period), client.get(f"{period}&detail=full")
    assert metrics.unreadable_objects.labels("summary")._value.get() == before + 2
    assert {country: list(days) for country, days in plain.json().items()} == {
        "armenia": ["2024-05-02"],
        "belgium": ["2024-05-01", "2024-05-02"],
    }
    assert plain.headers["tripfold-unreadable"] == full.headers["tripfold-unreadable"] == "2024-05-01/armenia"
    reason = full.json()["armenia"]["2024-05-01"]["unreadable"]
    assert (key in reason, remedy in reason) == (True, True)
    assert full.json()["armenia"]["2024-05-02"]["unreadable"] is None
    world.fold_in(stats("armenia"))
    mended = client.get(period, headers={"If-None-Match": plain.headers["etag"]})
    assert (mended.status_code, "tripfold-unreadable" in mended.headers) == (200, False)
    world.store.write(key, body)
    for alone in (f"/country-stats?from={DAY}&to={DAY}&country=armenia", f"/country-stats/armenia/{DAY}"):
        problem = client.get(alone)
        assert (problem.status_code, problem.json()["type"]) == (500, "urn:problem-type:tripfold:unreadable-object")
        assert (key in problem.json()["detail"], remedy in problem.json()["detail"]) == (True, True)


@pytest.mark.parametrize(
    ("query", "whole"),
    [
        (b"from=2024-05-01&to2024-05-31", b"from=2024-05-01&to=2024-05-31"),
        (b"to2024%2D05%2D31=", b"to=2024-05-31"),
        (b"to2024-05-31=x", b"to2024-05-31=x"),
        (b"xto2024-05-31", b"xto2024-05-31"),
        (b"to2024-05-311", b"to2024-05-311"),
        (b"", b""),
        (b"a=%ff&&=&to2024-05-31\xff", b"a=%ff&&=&to2024-05-31\xff"),
    ],
)
def test_repair_adds_only_the_missing_equals_sign(query: bytes, whole: bytes) -> None:
    """The repair adds the missing equals sign; every other pair stays the same, byte for byte."""
    assert repaired_query(query) == whole
