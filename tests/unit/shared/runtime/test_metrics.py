"""Which metrics a process exports."""

from __future__ import annotations

from typing import get_args

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from shared.runtime import metrics
from shared.runtime.metrics import Part, registry_of
from tests.prometheus import run_tool

PARTS: tuple[Part, ...] = get_args(Part)
EXPORTED_BY: dict[MetricWrapperBase, set[Part]] = {
    metrics.ready: {*PARTS},
    metrics.s3_request_seconds: {*PARTS},
    metrics.consumer_lag: {"planner", "worker", "aggregate"},
    metrics.dead_letters: {"planner", "worker", "aggregate"},
    metrics.upstream_reachable: {"planner", "worker"},
    metrics.bad_records: {"worker"},
    metrics.rebuild_age: {"aggregate"},
    metrics.http_request_seconds: {"api"},
}


def names_of(registry: CollectorRegistry) -> set[str]:
    """Return the names of Tripfold's metrics in a registry."""
    return {family.name for family in registry.collect() if family.name.startswith("tripfold_")}


@pytest.mark.parametrize("part", PARTS)
def test_a_process_exports_only_the_metrics_of_its_part(part: Part) -> None:
    """Each process has the metrics of every process and its own, and none of another."""
    names = names_of(registry_of(part))
    for metric, parts in EXPORTED_BY.items():
        (family,) = metric.describe()
        assert (family.name in names) == (part in parts), family.name


def test_a_process_with_two_parts_exports_the_metrics_of_both() -> None:
    """The metrics that planner and worker share are exported once."""
    assert names_of(registry_of("planner", "worker")) == names_of(registry_of("planner")) | names_of(
        registry_of("worker")
    )


def test_counters_of_errors_start_at_zero() -> None:
    """A counter of errors is exported before the first error, so that an alert sees its increase."""
    samples = [(sample.name, sample.labels) for family in registry_of(*PARTS).collect() for sample in family.samples]
    for name, labels in (
        ("tripfold_quarantined_files_total", {"why": "parser_crash"}),
        ("tripfold_faults_total", {"what": "generation"}),
        ("tripfold_cas_conflicts_total", {"object": "manifest"}),
        ("tripfold_s3_request_seconds_count", {"operation": "UploadPart", "result": "error"}),
        ("tripfold_upstream_requests_total", {"outcome": "unavailable"}),
    ):
        assert (name, labels) in samples


def test_names_follow_the_conventions_of_prometheus() -> None:
    """Promtool finds no fault in the names, types and units."""
    run_tool("promtool", "check", "metrics", text=generate_latest(registry_of(*PARTS)).decode())
