"""The model of what a deployment needs."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sizing import Costs, Load, fit, predict, size_rows
from bench.sizing_run import Measured
from tests import ROOT

GUIDE = ROOT / "docs" / "how-to" / "size.md"
LOADS = st.builds(
    Load,
    cities=st.integers(1, 40),
    megabytes=st.floats(0.01, 500),
    workers=st.integers(1, 12),
    upstream_mb_s=st.none() | st.floats(1, 1000),
)


@given(LOADS, st.sampled_from(["cities", "megabytes"]))
def test_more_data_needs_no_less_of_anything(load: Load, more: str) -> None:
    """Twice the cities or twice the bytes take at least as long, and as many requests and bytes."""
    larger = msgspec.structs.replace(load, **{more: getattr(load, more) * 2})
    small, large = predict(load, Costs()), predict(larger, Costs())
    assert large.time_s >= small.time_s
    assert large.writes >= small.writes
    assert large.reads >= small.reads
    assert large.compacted_bytes >= small.compacted_bytes


@given(LOADS)
def test_the_time_is_that_of_the_first_bottleneck(load: Load) -> None:
    """No resource takes longer than the bottleneck; one worker has all cities, several at least their share."""
    found = predict(load, Costs())
    assert found.time_s == found.limits_s[found.bottleneck] == max(found.limits_s.values())
    assert load.cities / load.workers <= load.busiest_cities <= load.cities


def measured(load: Load, costs: Costs) -> Measured:
    """Return a measurement that the costs explain exactly."""
    worker_s = load.cities * (costs.worker_city_s + load.megabytes * costs.worker_mb_s)
    other_s = load.cities * (costs.other_city_s + load.megabytes * costs.other_mb_s)
    return Measured(
        wall_s=predict(load, costs).time_s,
        cpu_s={"worker": worker_s, "aggregate": load.cities * costs.aggregate_city_s}
        | {"kafka": other_s - load.cities * costs.aggregate_city_s},
        others_cores=0,
        peak_mb={},
        s3_calls={},
        kafka_bytes={},
    )


def test_the_fit_finds_the_costs_of_a_city_and_of_a_megabyte() -> None:
    """Two loads whose files differ in size give the costs of a city and those of a megabyte."""
    costs = Costs(worker_city_s=0.02, worker_mb_s=0.005, other_city_s=0.03, other_mb_s=0.002, fixed_s=2)
    small = Load(cities=40, megabytes=0.1, workers=1, cores=2)
    large = Load(cities=16, megabytes=16, workers=1, cores=2)
    found = fit((small, measured(small, costs)), (large, measured(large, costs)))
    assert msgspec.structs.asdict(found) == pytest.approx(msgspec.structs.asdict(costs))


@pytest.mark.parametrize(("cities", "partitions", "workers"), [(30, 12, (1, 2, 4)), (1000, 24, (1, 2, 4, 8))])
def test_the_tables_of_the_guide_are_those_of_the_model(cities: int, partitions: int, workers: tuple[int, ...]) -> None:
    """docs/how-to/size.md has each row that `python -m bench.sizing` prints."""
    loads = [Load(cities=cities, megabytes=100, workers=count, partitions=partitions) for count in workers]
    guide = GUIDE.read_text()
    for row in size_rows(loads, Costs()):
        assert f"| {' | '.join(row)} |" in guide
