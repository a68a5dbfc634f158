"""Parts of PromQL expressions, made from the metrics of the code, so that no name or label can be wrong."""

from __future__ import annotations

from prometheus_client.metrics import MetricWrapperBase

from services.api.middleware.access_log import PROBED

NOT_PROBED = f'!~"{"|".join(sorted(PROBED))}"'
"""Matches the routes of the API that users request."""
_SUFFIXES = {"counter": "_total", "gauge": "", "histogram": "_count"}


def sample(metric: MetricWrapperBase, *grouped_by: str, part: str = "", **matchers: str) -> str:
    """Return the selector of a metric; of a histogram, of its count, or of another ``part``.

    A matcher has its operator: ``topic='="city-stats"'``. Raises ValueError if the metric lacks a label, of a matcher
    or of ``grouped_by``.
    """
    (family,) = metric.describe()
    if unknown := {*grouped_by, *matchers} - {*metric._labelnames}:  # noqa: SLF001  # the client has no public name
        raise ValueError(f"{family.name} has no label {', '.join(sorted(unknown))}")
    chosen = ",".join(f"{label}{matcher}" for label, matcher in matchers.items())
    return f"{family.name}{part or _SUFFIXES[family.type]}" + (f"{{{chosen}}}" if chosen else "")
