"""The cities of a date whose stored files are read again."""

from __future__ import annotations

import pytest

from shared.domain import keys
from shared.domain.events import Background, Source
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import PlannedCity, PlannedCountry
from shared.storage.repository import read_plan
from shared.storage.stored_cities import read_stored_cities, wanted_cities
from tests.fakes.bucket import DAY, FakeBucket, trips

ALL = Background(source=Source.BUCKET)


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


@pytest.mark.parametrize("city_id", ["~c-7", "c-7"])
def test_a_city_is_found_by_its_id_in_keys_and_by_its_id_upstream(city_id: str) -> None:
    """A user may know either: the ledger shows the first, the upstream the second."""
    city = PlannedCity(city_id=CityId("~c-7"), upstream_id="c-7", name="Kumasi")
    other = PlannedCity(city_id=CityId("7"), upstream_id="7", name="Accra")
    planned = {CountrySlug("ghana"): PlannedCountry(name="Ghana", cities=(city, other))}
    found = wanted_cities(planned, Background(city_id=CityId(city_id)), [])
    assert found == {"ghana": PlannedCountry(name="Ghana", cities=(city,))}


async def named(bucket: FakeBucket, wanted: Background) -> list[str]:
    """Return the chosen cities by country."""
    found = await read_stored_cities(bucket.store, DAY, wanted, await read_plan(bucket.store, DAY))
    return [f"{country}/{city.city_id}" for country, planned in found.items() for city in planned.cities]
