"""The cities of a date whose stored files are read again."""

from __future__ import annotations

import pytest

from services.ingest.planner.stored_cities import read_stored_cities
from shared.domain import keys
from shared.domain.events import Background, Source
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Plan
from tests.fakes.bucket import DAY, NOON, REQUEST, FakeBucket, trips

ALL = Background(source=Source.BUCKET)
NO_PLAN = Plan(date=DAY, revision=1, request_id=REQUEST, planned_at=NOON, countries={})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (ALL, ["armenia/1", "armenia/2", "brasil/3", "chad/4"]),
        (Background(country=CountrySlug("armenia")), ["armenia/1", "armenia/2"]),
        (Background(city_id=CityId("4")), ["chad/4"]),
        (Background(country=CountrySlug("armenia"), city_id=CityId("3")), []),
    ],
)
async def test_cities_are_those_of_the_plan_and_those_with_a_file(wanted: Background, expected: list[str]) -> None:
    """City 4 is in no plan any more, and its file still counts; an unreadable manifest of such a city is left out."""
    bucket = FakeBucket()
    bucket.plan(1, {"armenia": [1, 2], "brasil": [3]})
    for city, country in ((1, "armenia"), (4, "chad")):
        bucket.store_file(city, 10, trips(2), country)
    bucket.store.write(keys.manifest(DAY, CityId("5")), b"{")
    assert await named(bucket, wanted) == expected


async def test_a_date_without_a_plan_has_its_stored_files() -> None:
    """A lost plan hides no file."""
    bucket = FakeBucket()
    assert await named(bucket, ALL) == []
    bucket.store_file(1, 10, trips(2))
    assert await named(bucket, ALL) == ["armenia/1"]


async def named(bucket: FakeBucket, wanted: Background) -> list[str]:
    """Return the chosen cities by country."""
    plan = await read_stored_cities(bucket.store, DAY, wanted, without_plan=NO_PLAN)
    return [f"{country}/{city.city_id}" for country, found in plan.countries.items() for city in found.cities]
