"""Statistics as objects and as a table."""

from __future__ import annotations

import sys

import pytest
from tripfold_client import MissingDependency, Statistics, Tripfold

from tests.fakes.api import DAY, World, planned, stats
from tests.serving import served


def read(world: World, last: str = "2024-05-02") -> Statistics:
    """Return what the API serves."""
    with served(world) as url, Tripfold(url) as api:
        return api.stats(DAY, last)


def test_a_table_has_no_figures_where_there_is_no_data() -> None:
    """A day without data is NA, not zero; sums and means of pandas leave it out. Each day says if it is complete."""
    world = World()
    world.fold_in(stats("armenia", trips=8, delay_total_ms=9_000), planned("armenia", city_ids=["7", "8"]))
    found = read(world)
    table = found.df()
    assert list(table["bus_count"].isna()) == [False, True]
    assert (table["bus_count"].sum(), table["average_delay_s"].mean()) == (8, 1.125)
    assert str(table["date"].dt.date[0]) == "2024-05-01"
    assert list(table["complete"]) == [False, False]
    assert [day.known for day in found] == [True, False]
    assert (found[0].cities_reported, found[0].cities_expected) == (1, 2)
    assert repr(found) == "<Statistics of 2 country-days, 2 incomplete>"
    assert Statistics(()).df().empty


def test_days_are_grouped_by_country() -> None:
    """Each country has its days in their order."""
    world = World()
    for country in ("peru", "armenia"):
        world.fold_in(stats(country))
    countries = read(world).by_country()
    assert [(country, [str(day.date) for day in days]) for country, days in countries.items()] == [
        ("armenia", ["2024-05-01", "2024-05-02"]),
        ("peru", ["2024-05-01", "2024-05-02"]),
    ]


def test_without_pandas_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only ``df`` needs pandas."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependency, match=r"pip install 'tripfold-client\[pandas\]'"):
        Statistics(()).df()
