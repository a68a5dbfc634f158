"""The figures that the benchmark of a loaded deployment reports."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.load import Dated, Look, Requested, Results, Soaked, _compared, _requested

GOOD = _requested("day", [1.0], Counter())


@pytest.mark.parametrize(
    ("latencies_ms", "expected"),
    [
        ([], (None, None, None, None)),
        ([3.0], (3.0, 3.0, 3.0, 3.0)),
        ([2.0, 1.0], (1.0, 2.0, 2.0, 2.0)),
        ([float(number) for number in range(200, 0, -1)], (100.0, 190.0, 198.0, 200.0)),
    ],
)
def test_percentiles_of_any_number_of_responses(latencies_ms: list[float], expected: tuple[float | None, ...]) -> None:
    """Percentiles are latencies that occurred; without a response there are none, and the errors are still there."""
    found = _requested("day", latencies_ms, Counter({"ReadTimeout": 1}))
    assert (found.p50_ms, found.p95_ms, found.p99_ms, found.max_ms) == expected
    assert (found.responses, found.errors) == (len(latencies_ms), {"ReadTimeout": 1})


@pytest.mark.parametrize("api", [True, False])
@pytest.mark.parametrize("soak", [True, False])
def test_an_error_in_any_part_fails_the_benchmark(*, api: bool, soak: bool) -> None:
    """The requests of the soak count like those before it."""
    bad = _requested("day", [1.0], Counter({"503": 1}))

    def requests(fail: bool) -> list[Requested]:
        return [GOOD, bad if fail else GOOD]

    results = Results(
        date=Dated(cities=1, megabytes=1, wall_s=1, peak_mb={}),
        api=requests(api),
        soaked_s=1,
        soaked=Soaked(dates=1, requests=requests(soak), processes=[]),
        load=0,
    )
    assert results.failed is (api or soak)


@pytest.mark.parametrize(
    ("megabytes", "early_mb", "late_mb"),
    [([7], 7, 7), ([9, 5, 6], 5, 6), ([90, 90, 1, 2, 3, 3, 5, 6], 1.5, 5.5)],
)
def test_the_last_quarter_is_compared_with_the_second(megabytes: list[float], early_mb: float, late_mb: float) -> None:
    """The first quarter warms up, so it does not count."""
    found = _compared("api", [Look(one, 10) for one in megabytes])
    assert (found.early_mb, found.late_mb, found.early_files, found.late_files) == (early_mb, late_mb, 10, 10)
