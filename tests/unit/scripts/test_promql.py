"""Expressions from metrics."""

from __future__ import annotations

import pytest

from scripts.promql import sample
from shared.runtime import metrics


def test_a_selector_has_the_name_that_prometheus_has() -> None:
    """A counter ends in _total, and a histogram in the part that is asked for."""
    assert sample(metrics.dead_letters, topic='="city-tasks"') == 'tripfold_dead_letters_total{topic="city-tasks"}'
    assert sample(metrics.ready) == "tripfold_ready"
    assert sample(metrics.batch_seconds) == "tripfold_batch_seconds_count"
    assert sample(metrics.batch_seconds, "topic", part="_bucket") == "tripfold_batch_seconds_bucket"


def test_a_label_that_a_metric_lacks_is_refused() -> None:
    """A matcher of a label, or a group by it, is an error if the metric does not have it."""
    with pytest.raises(ValueError, match="tripfold_dead_letters has no label partition"):
        sample(metrics.dead_letters, partition='="0"')
    with pytest.raises(ValueError, match="tripfold_dead_letters has no label why"):
        sample(metrics.dead_letters, "why")
