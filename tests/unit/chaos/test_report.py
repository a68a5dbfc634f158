"""The report of a chaos campaign."""

from __future__ import annotations

import pytest

from tests.chaos.report import CampaignReport, markdown_of, percentile


@pytest.mark.parametrize(("percent", "expected"), [(50, 5.0), (90, 9.0), (100, 10.0)])
def test_a_percentile_is_one_of_the_values(percent: int, expected: float) -> None:
    """The nearest rank of ten values, in any order."""
    assert percentile([10.0, *map(float, range(1, 10))], percent) == expected


def test_the_report_has_the_recovery_times_of_each_fault() -> None:
    """A row has how often a fault was injected, and the percentiles of its recovery."""
    recovery_s = {"clock jumped": [2.0, 1.0, 9.5]}
    report = CampaignReport(seconds=60, seed=7, broker="Apache Kafka", started_at="now", recovery_s=recovery_s)
    assert "| clock jumped | 3 | 2.0 s | 9.5 s | 9.5 s | 0 |" in markdown_of(report).splitlines()
