"""Writes deploy/grafana/tripfold.json, a dashboard for Grafana: ``make monitoring``.

Names and labels come from the metrics of the code, so none can be wrong.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from prometheus_client.metrics import MetricWrapperBase

from scripts.check_docs import ROOT
from scripts.promql import NOT_PROBED, sample
from shared.runtime import metrics

DASHBOARD = ROOT / "deploy" / "grafana" / "tripfold.json"
PANELS_IN_ROW = 3
PANEL_WIDTH = 24 // PANELS_IN_ROW
PANEL_HEIGHT = 8
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(msgspec.Struct, frozen=True, kw_only=True):
    """A graph of the results of ``expr``. ``unit`` is a name of Grafana; ``legend`` names a curve by its labels."""

    title: str
    expr: str
    unit: str = "short"
    legend: str = "__auto"


def rate(metric: MetricWrapperBase, *labels: str, **matchers: str) -> str:
    """Return the rate of a counter in a second, by ``labels``."""
    return f"sum by ({', '.join(labels)}) (rate({sample(metric, *labels, **matchers)}[$__rate_interval]))"


def in_an_hour(metric: MetricWrapperBase, *labels: str) -> str:
    """Return the increase of a counter in an hour, by ``labels``."""
    return f"sum by ({', '.join(labels)}) (increase({sample(metric, *labels)}[1h]))"


def p99(metric: MetricWrapperBase, *labels: str, **matchers: str) -> str:
    """Return the 99th percentile of a histogram, by ``labels``."""
    buckets = sample(metric, *labels, part="_bucket", **matchers)
    return f"histogram_quantile(0.99, sum by ({', '.join(('le', *labels))}) (rate({buckets}[$__rate_interval])))"


def shared(metric: MetricWrapperBase, *labels: str) -> str:
    """Return a gauge that each process of a service exports alike, by ``labels``."""
    return f"max by ({', '.join(labels)}) ({sample(metric, *labels)})"


CACHE_HITS = rate(metrics.cache_requests, "cache", result='="hit"')

PANELS = (
    Panel(title="Firing alerts", expr='count by (alertname) (ALERTS{alertstate="firing",alertname=~"Tripfold.*"})'),
    Panel(title="Ready (1) or not (0)", expr=sample(metrics.ready), legend="{{job}} {{instance}}"),
    Panel(title="Versions", expr=f"count by (version) ({sample(metrics.build_info, 'version')})"),
    Panel(title="Country-days of the latest dates, by state", expr=shared(metrics.recent_summaries, "state")),
    Panel(
        title="Age of the newest complete date",
        expr=f"time() - ({shared(metrics.newest_complete_date)} > 0)",
        unit="s",
    ),
    Panel(title="Differences that verify found", expr=shared(metrics.verify_differences, "check")),
    Panel(title="Late dates of schedules", expr=shared(metrics.late_dates, "schedule")),
    Panel(title="Dates of backfills in an hour, by outcome", expr=in_an_hour(metrics.backfill_dates, "outcome")),
    Panel(title="Open requests, by status", expr=shared(metrics.open_requests, "status")),
    Panel(title="Age of the oldest open request", expr=shared(metrics.oldest_open_request_age), unit="s"),
    Panel(title="City-days in an hour, by outcome", expr=in_an_hour(metrics.city_tasks_finished, "outcome")),
    Panel(
        title="HTTP requests, by status",
        expr=rate(metrics.http_request_seconds, "status", route=NOT_PROBED),
        unit="reqps",
    ),
    Panel(
        title="HTTP responses, 99th percentile",
        expr=p99(metrics.http_request_seconds, "route", route=NOT_PROBED),
        unit="s",
    ),
    Panel(title="Unreadable objects in an hour", expr=in_an_hour(metrics.unreadable_objects, "kind")),
    Panel(title="Records that wait", expr=f"sum by (topic) ({sample(metrics.consumer_lag, 'topic')})"),
    Panel(
        title="Age of the oldest record that waits",
        expr=f"max by (topic) ({sample(metrics.oldest_record_age, 'topic')})",
        unit="s",
    ),
    Panel(title="Batches, 99th percentile", expr=p99(metrics.batch_seconds, "topic"), unit="s"),
    Panel(title="Stages of the ingest, 99th percentile", expr=p99(metrics.ingest_stage_seconds, "stage"), unit="s"),
    Panel(title="Stored files", expr=rate(metrics.stored_bytes), unit="Bps"),
    Panel(title="Trips stored in an hour", expr=in_an_hour(metrics.stored_trips)),
    Panel(title="Requests to the upstream, by outcome", expr=rate(metrics.upstream_requests, "outcome"), unit="reqps"),
    Panel(title="Received from the upstream", expr=rate(metrics.upstream_bytes), unit="Bps"),
    Panel(title="Requests to S3", expr=rate(metrics.s3_request_seconds, "operation", "result"), unit="reqps"),
    Panel(title="Requests to S3, 99th percentile", expr=p99(metrics.s3_request_seconds, "operation"), unit="s"),
    Panel(
        title="Cache hits, as a share of the look-ups",
        expr=f"{CACHE_HITS} / {rate(metrics.cache_requests, 'cache')}",
        unit="percentunit",
    ),
    Panel(title="Failed tries in an hour", expr=in_an_hour(metrics.faults, "what")),
    Panel(title="Refused files in an hour", expr=in_an_hour(metrics.quarantined_files, "why")),
    Panel(title="Dead letters in an hour", expr=in_an_hour(metrics.dead_letters, "topic")),
    Panel(
        title="Memory",
        expr=f"process_resident_memory_bytes and on (job, instance) {sample(metrics.ready)}",
        unit="bytes",
        legend="{{job}} {{instance}}",
    ),
)


def dashboard() -> str:
    """Return the text of the dashboard."""
    document = {
        "uid": "tripfold",
        "title": "Tripfold",
        "description": "Made by `make monitoring` from scripts/dashboard.py.",
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "1m",
        "templating": {
            "list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }
    return json.dumps(document, indent=2) + "\n"


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    row, column = divmod(number, PANELS_IN_ROW)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": _DATASOURCE,
        "gridPos": {"x": column * PANEL_WIDTH, "y": row * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "datasource": _DATASOURCE, "expr": panel.expr, "legendFormat": panel.legend}],
    }


if __name__ == "__main__":
    DASHBOARD.parent.mkdir(exist_ok=True)
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
