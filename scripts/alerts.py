"""Writes deploy/prometheus/rules.yml, the alerts for Prometheus: ``make monitoring``.

Names and labels come from the metrics of the code, so none can be wrong. Symptoms come before causes. A ``page`` cannot
wait until the morning; a ``ticket`` can. docs/how-to/alerts.md has a section for each alert, under its name.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import yaml
from prometheus_client.metrics import MetricWrapperBase

from scripts.check_docs import ROOT
from scripts.promql import NOT_PROBED, sample
from shared.domain.topics import GROUPS, Topic
from shared.runtime import metrics
from shared.runtime.metrics import SummaryState

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RUNBOOKS = "docs/how-to/alerts.md"

ERROR_BUDGET = 0.001
"""The share of HTTP requests that may fail in 30 days."""
ERRORS_MIN = 5
"""Fewer failed requests raise no alert, or one failure would be a high rate on a quiet API."""
FOLD_AGE_MAX_S = 10 * 60
INGEST_AGE_MAX_S = 60 * 60
STALLED_AGE_MIN_S = 5 * 60
VERIFY_AGE_MAX_S = 2 * 24 * 60 * 60
REBUILD_AGE_MAX_S = 2 * 60 * 60
TABLES_AGE_MAX_S = 30 * 60
HERE = "on (job, instance)"
FOLDED = (Topic.CITY_STATS, Topic.REQUEST_PROGRESS)
KINDS = {
    "api": metrics.unreadable_objects,
    "planner": metrics.open_backfills,
    "worker": metrics.city_tasks_finished,
    "aggregate": metrics.rebuild_age,
}
"""A metric that each kind of process exports from its start, and no other kind."""
UPSTREAM_FAILURES = sample(metrics.upstream_requests, outcome='="interrupted"')
"""An unreachable upstream has an alert of its own."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert that fires once ``expr`` has had a result for ``lasts``. ``summary`` is a template of Prometheus."""

    name: str
    severity: Literal["page", "ticket"]
    expr: str
    lasts: str = "0m"
    summary: str


def grown(metric: MetricWrapperBase, *labels: str) -> str:
    """Return whether a counter grew in the last hour, by ``labels``."""
    return f"sum by ({', '.join(labels)}) (increase({sample(metric, *labels)}[1h])) > 0"


def older(topics: tuple[Topic, ...], limit_s: int) -> str:
    """Return whether a record of a topic has waited for more than ``limit_s``, by topic."""
    among = f'=~"{"|".join(topic.value for topic in topics)}"'
    return f"max by (topic) ({sample(metrics.oldest_record_age, topic=among)}) > {limit_s}"


def burns(factor: float, long: str, short: str) -> str:
    """Return whether failed HTTP requests use up the error budget ``factor`` times too fast, in both windows.

    The short window ends the alert soon after the failures end. Probes do not count.
    """
    requests = sample(metrics.http_request_seconds, route=NOT_PROBED)
    errors = sample(metrics.http_request_seconds, route=NOT_PROBED, status='=~"5.."')
    limit = f"{factor * ERROR_BUDGET:g}"
    return "(" + " and ".join((
        f"sum(rate({errors}[{long}])) / sum(rate({requests}[{long}])) > {limit}",
        f"sum(rate({errors}[{short}])) / sum(rate({requests}[{short}])) > {limit}",
        f"sum(increase({errors}[{long}])) >= {ERRORS_MIN}",
    )) + ")"  # fmt: skip  # a condition on each line


def summaries(*states: SummaryState) -> str:
    """Return the number of latest country-days in a state, while no record waits that could change it.

    After a date has ended, its lag is gone at once, and its old state until the next measurement, half a minute later.
    So the lag of the last 30 s counts, and the alert waits for 45 s.
    """
    chosen = sample(metrics.recent_summaries, state=f'=~"{"|".join(states)}"')
    return f"sum(max by (state) ({chosen})) > 0 unless sum(max_over_time({sample(metrics.consumer_lag)}[30s])) > 0"


def not_ready() -> str:
    """Return which processes are not ready.

    A process that only waits for the upstream does not count: the upstream has an alert of its own.
    """
    return f"{sample(metrics.ready)} == 0 unless {HERE} {sample(metrics.upstream_reachable)} == 0"


ALERTS = (
    Alert(
        name="TripfoldApiErrorsFast",
        severity="page",
        expr=f"{burns(14.4, '1h', '5m')} or {burns(6, '6h', '30m')}",
        summary="{{ $value | humanizePercentage }} of the HTTP requests fail",
    ),
    Alert(
        name="TripfoldApiErrorsSlow",
        severity="ticket",
        expr=burns(1, "3d", "6h"),
        summary="{{ $value | humanizePercentage }} of the HTTP requests of three days failed",
    ),
    Alert(
        name="TripfoldProcessMissing",
        severity="page",
        expr=" or ".join(
            f'label_replace(absent({sample(metric)}), "job", "{kind}", "", "")' for kind, metric in KINDS.items()
        ),
        lasts="15s",
        summary="No {{ $labels.job }} runs",
    ),
    Alert(
        name="TripfoldProcessMissing",
        severity="ticket",
        expr=f"up == 0 and {HERE} last_over_time({sample(metrics.ready)}[1d])",
        lasts="15s",
        summary="{{ $labels.job }} on {{ $labels.instance }} does not respond",
    ),
    Alert(
        name="TripfoldServiceDown",
        severity="page",
        expr=f"count by (job) ({not_ready()}) == count by (job) ({sample(metrics.ready)})",
        lasts="1m",
        summary="No {{ $labels.job }} is ready",
    ),
    Alert(
        name="TripfoldNotReady",
        severity="ticket",
        expr=not_ready(),
        lasts="1m",
        summary="{{ $labels.job }} on {{ $labels.instance }} is not ready",
    ),
    Alert(
        name="TripfoldPartitionBlocked",
        severity="ticket",
        expr=f"max by (topic) ({sample(metrics.blocked_partitions, 'topic')}) > 0",
        lasts="1m",
        summary="A record of {{ $labels.topic }} cannot be decoded, and its partition waits",
    ),
    Alert(
        name="TripfoldNumbersLate",
        severity="page",
        expr=older(FOLDED, FOLD_AGE_MAX_S),
        lasts="1m",
        summary="A record of {{ $labels.topic }} waits since {{ $value | humanizeDuration }}",
    ),
    Alert(
        name="TripfoldIngestLate",
        severity="ticket",
        expr=older(tuple(topic for topic in GROUPS if topic not in FOLDED), INGEST_AGE_MAX_S),
        lasts="1m",
        summary="A record of {{ $labels.topic }} waits since {{ $value | humanizeDuration }}",
    ),
    Alert(
        name="TripfoldRequestsStalled",
        severity="ticket",
        # A request that waits behind others is published again too, but then city-days end.
        expr=f"sum(increase({sample(metrics.requeued_requests)}[1h])) > 0 "
        f"and max({sample(metrics.oldest_open_request_age)}) > {STALLED_AGE_MIN_S} "
        f"unless sum(increase({sample(metrics.city_tasks_finished)}[15m])) > 0",
        summary="Requests make no progress, and no city-day ends",
    ),
    Alert(
        name="TripfoldSummariesMissing",
        severity="ticket",
        expr=summaries("missing", "unreadable"),
        lasts="45s",
        summary="{{ $value }} country-days have lost their summary",
    ),
    Alert(
        name="TripfoldIncompleteDays",
        severity="ticket",
        expr=summaries("incomplete"),
        lasts="45s",
        summary="{{ $value }} country-days are incomplete",
    ),
    Alert(
        name="TripfoldVerifyDifferences",
        severity="ticket",
        expr=f"max by (check) ({sample(metrics.verify_differences, 'check')}) > 0",
        summary="The check {{ $labels.check }} of verify found {{ $value }} differences",
    ),
    Alert(
        name="TripfoldVerifyOld",
        severity="ticket",
        expr=f"time() - max by (check) ({sample(metrics.verify_timestamp, 'check')}) > {VERIFY_AGE_MAX_S}",
        summary="The check {{ $labels.check }} of verify last ran {{ $value | humanizeDuration }} ago",
    ),
    Alert(
        name="TripfoldDatesLate",
        severity="page",
        expr=f"max by (schedule) ({sample(metrics.late_dates, 'schedule')}) > 0",
        lasts="1m",
        summary="Late dates of schedule {{ $labels.schedule }}: {{ $value }}",
    ),
    Alert(
        name="TripfoldUnreadableObjects",
        severity="ticket",
        expr=grown(metrics.unreadable_objects, "kind"),
        summary="The API cannot read a stored {{ $labels.kind }}",
    ),
    Alert(
        name="TripfoldUncountedSummaries",
        severity="ticket",
        expr=grown(metrics.uncounted_summaries),
        summary="The API noticed changed summaries late: {{ $value }}",
    ),
    Alert(
        name="TripfoldDeadLetters",
        severity="ticket",
        expr=grown(metrics.dead_letters, "topic"),
        summary="Records of {{ $labels.topic }} went to the dead letters",
    ),
    Alert(
        name="TripfoldQuarantinedFiles",
        severity="ticket",
        expr=grown(metrics.quarantined_files, "why"),
        summary="Trip files are refused: {{ $labels.why }}",
    ),
    Alert(
        name="TripfoldSuspiciousFiles",
        severity="ticket",
        expr=f"sum(increase({sample(metrics.suspicious_files)}[1h])) > 0",
        summary="Trip files are much smaller or larger than usual",
    ),
    Alert(
        name="TripfoldUpstreamUnreachable",
        severity="ticket",
        expr=f"min({sample(metrics.upstream_reachable)}) == 0",
        lasts="1m",
        summary="The upstream cannot be reached",
    ),
    Alert(
        name="TripfoldUpstreamFailing",
        severity="ticket",
        expr=f"sum(rate({UPSTREAM_FAILURES}[1m])) / sum(rate({sample(metrics.upstream_requests)}[1m])) > 0.5 "
        f"and sum(increase({UPSTREAM_FAILURES}[5m])) >= {ERRORS_MIN}",
        summary="{{ $value | humanizePercentage }} of the requests to the upstream fail",
    ),
    Alert(
        name="TripfoldRebuildOld",
        severity="ticket",
        expr=f"max({sample(metrics.rebuild_age)}) > {REBUILD_AGE_MAX_S}",
        summary="A rebuild began {{ $value | humanizeDuration }} ago and has not ended",
    ),
    Alert(
        name="TripfoldTablesLate",
        severity="ticket",
        expr=f"time() - (max({sample(metrics.tables_current)}) > 0) > {TABLES_AGE_MAX_S}",
        summary="The Parquet tables were last current {{ $value | humanizeDuration }} ago",
    ),
    Alert(
        name="TripfoldApiKeysFileInvalid",
        severity="ticket",
        expr=f"{sample(metrics.api_keys_file_valid)} == 0",
        lasts="1m",
        summary="{{ $labels.job }} on {{ $labels.instance }} keeps old API keys: their file is invalid",
    ),
    Alert(
        name="TripfoldCommitFailures",
        severity="ticket",
        expr=f"sum by (job, instance) (increase({sample(metrics.commit_failures)}[10m])) > 0",
        lasts="30m",
        summary="{{ $labels.job }} on {{ $labels.instance }} cannot commit its offsets",
    ),
)


def runbook(alert: Alert) -> str:
    """Return the section that says what an alert means and what to do."""
    return f"{RUNBOOKS}#{alert.name.lower()}"


def rules() -> str:
    """Return the text of the rules file."""
    rows: list[dict[str, Any]] = [
        {
            "alert": alert.name,
            "expr": alert.expr,
            "for": alert.lasts,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary, "runbook": runbook(alert)},
        }
        for alert in ALERTS
    ]
    text: str = yaml.safe_dump({"groups": [{"name": "tripfold", "rules": rows}]}, sort_keys=False, width=1_000)
    return f"# Made by `make monitoring` from scripts/alerts.py. {RUNBOOKS} explains each alert.\n{text}"


if __name__ == "__main__":
    RULES.write_text(rules(), encoding="utf-8")
