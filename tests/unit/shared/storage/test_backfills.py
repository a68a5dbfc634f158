"""The dates that a backfill selects by what is stored of them."""

from __future__ import annotations

import pytest

from shared.domain.events import BACKGROUND, Background
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import DateSelection
from shared.storage.backfills import is_selected
from tests.fakes.bucket import DAY, FakeBucket, trips


@pytest.mark.parametrize(
    ("wanted", "selected"),
    [
        (BACKGROUND, True),
        (Background(country=CountrySlug("armenia"), city_id=CityId("1")), True),
        (Background(country=CountrySlug("brasil")), False),
        (Background(city_id=CityId("nosuch")), False),
    ],
)
@pytest.mark.parametrize("planned", [True, False])
async def test_a_stored_date_is_selected_if_it_has_a_wanted_city(
    wanted: Background, selected: bool, planned: bool
) -> None:
    """A date without the city is skipped; a lost plan hides no stored file."""
    bucket = FakeBucket()
    if planned:
        bucket.plan(1, {"armenia": [1]})
    assert await is_selected(bucket.store, DateSelection.STORED, DAY, wanted) is (planned and selected)
    bucket.store_file(1, 10, trips(2))
    assert await is_selected(bucket.store, DateSelection.STORED, DAY, wanted) is selected
