"""The alerts name only what exists, each fires on its fault, and none fires at rest."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from scripts import alerts, check_docs
from shared.domain.topics import GROUPS
from tests import ROOT
from tests.prometheus import run_tool

ALERTMANAGER = ROOT / "deploy" / "alertmanager" / "alertmanager.yml"
NEVER_ENDS = "xN"
"""Repeats a value until the end of a test."""
PROCESSES = ("api", "planner", "worker", "worker-2", "aggregate")
CONSUMED = tuple(topic.value for topic in GROUPS)

Series = Mapping[str, str]
"""The values of each series, one at each interval, as promtool writes them."""
Fired = Mapping[str, tuple[Mapping[str, str], str]]
"""The labels and the summary of each alert that fires."""
Case = Mapping[str, object]
"""A test as promtool reads it."""


def series(name: str, instance: str, **labels: str) -> str:
    """Return a series as Prometheus scrapes it from a process."""
    pairs = {"job": instance.partition("-")[0], "instance": instance, **labels}
    chosen = ",".join(f'{label}="{value}"' for label, value in pairs.items())
    return f"{name}{{{chosen}}}"


def served(status: str, route: str = "/country-stats") -> str:
    """Return the series that counts the responses of a route with a status."""
    return series("tripfold_http_request_seconds_count", "api", method="GET", route=route, status=status)


def lag(topic: str) -> str:
    """Return the series of the lag of a topic."""
    return series("tripfold_consumer_lag", "worker", topic=topic, partition="0")


def age(topic: str) -> str:
    """Return the series of the age of the oldest record of a topic."""
    return series("tripfold_consumer_oldest_record_age_seconds", "worker", topic=topic)


DEAD_LETTERS = series("tripfold_dead_letters_total", "worker", topic="city-tasks")
REFUSED = series("tripfold_quarantined_files_total", "worker", why="invalid")
SUSPICIOUS = series("tripfold_suspicious_files_total", "worker")
UNREADABLE = series("tripfold_unreadable_objects_total", "api", kind="summary")
UNCOUNTED = series("tripfold_uncounted_summaries_total", "api")
LATE = series("tripfold_late_dates", "planner", schedule="daily")
REACHABLE = series("tripfold_upstream_reachable", "worker")
BACKFILLS = series("tripfold_open_backfills", "planner")
REBUILD = series("tripfold_rebuild_age_seconds", "aggregate")
TABLES = series("tripfold_tables_current_timestamp_seconds", "aggregate")
KEYS_VALID = series("tripfold_api_keys_file_valid", "api")
COMMITS = series("tripfold_commit_failures_total", "worker")
REQUEUED = series("tripfold_requeued_requests_total", "aggregate")
OPEN_AGE = series("tripfold_oldest_open_request_age_seconds", "aggregate")
STORED = series("tripfold_city_tasks_finished_total", "worker", outcome="stored")
REFUSED_BY_UPSTREAM = series("tripfold_upstream_requests_total", "worker", outcome="interrupted")
SERVED_BY_UPSTREAM = series("tripfold_upstream_requests_total", "worker", outcome="complete")
VERIFIED = series("tripfold_verify_differences", "verify", check="summaries")
VERIFIED_AT = series("tripfold_verify_timestamp_seconds", "verify", check="summaries")


def summaries(state: str) -> str:
    """Return the series of the latest country-days in a state."""
    return series("tripfold_recent_summaries", "api", state=state)


REST: Series = {
    **{series("up", one): f"1+0{NEVER_ENDS}" for one in PROCESSES},
    **{series("tripfold_ready", one): f"1+0{NEVER_ENDS}" for one in PROCESSES},
    **{lag(topic): f"0+0{NEVER_ENDS}" for topic in CONSUMED},
    **{age(topic): f"0+0{NEVER_ENDS}" for topic in CONSUMED},
    **dict.fromkeys(
        (
            DEAD_LETTERS,
            REFUSED,
            SUSPICIOUS,
            UNREADABLE,
            UNCOUNTED,
            BACKFILLS,
            REBUILD,
            COMMITS,
            REQUEUED,
            STORED,
            OPEN_AGE,
        ),
        f"0+0{NEVER_ENDS}",
    ),
    REACHABLE: f"1+0{NEVER_ENDS}",
    VERIFIED: f"0+0{NEVER_ENDS}",
    VERIFIED_AT: f"0+60{NEVER_ENDS}",
    KEYS_VALID: f"1+0{NEVER_ENDS}",
    SERVED_BY_UPSTREAM: f"0+60{NEVER_ENDS}",
    REFUSED_BY_UPSTREAM: f"0+0{NEVER_ENDS}",
    **{summaries(state): f"0+0{NEVER_ENDS}" for state in ("incomplete", "missing", "unreadable")},
    summaries("complete"): f"150+0{NEVER_ENDS}",
    served("200"): f"0+60{NEVER_ENDS}",
    served("503"): f"0+0{NEVER_ENDS}",
    served("200", "/health/ready"): f"0+6{NEVER_ENDS}",
}
"""A deployment without a fault or work."""

QUIET: dict[str, Series] = {
    "rest": {},
    "processes that restart within a minute": {
        UNREADABLE: f"0x9 stale 0{NEVER_ENDS}",
        series("up", "worker"): f"1x9 0 1{NEVER_ENDS}",
        series("tripfold_ready", "worker"): f"1x9 stale 1{NEVER_ENDS}",
        series("tripfold_ready", "aggregate"): f"1x9 0 1{NEVER_ENDS}",
        lag("city-tasks"): f"0x9 stale 0{NEVER_ENDS}",
    },
    "a removed process": {
        series("up", "worker"): "1x9 stale",
        series("tripfold_ready", "worker"): "1x9 stale",
    },
    "another program is down": {series("up", "elsewhere"): f"0{NEVER_ENDS}"},
    "a date that is being processed": {
        lag("city-tasks"): f"0x9 1{NEVER_ENDS}",
        summaries("missing"): f"0x9 3 0{NEVER_ENDS}",
        summaries("incomplete"): f"0x9 2 5{NEVER_ENDS}",
    },
    "an upstream that refuses one request in three": {
        SERVED_BY_UPSTREAM: f"0+40{NEVER_ENDS}",
        REFUSED_BY_UPSTREAM: f"0+20{NEVER_ENDS}",
    },
    "failed probes": {served("503", "/health/ready"): f"0+6{NEVER_ENDS}"},
    "four failed requests of a quiet API": {served("200"): f"0+1{NEVER_ENDS}", served("503"): f"0x20 4{NEVER_ENDS}"},
    "requests behind a backlog": {
        REQUEUED: f"0+1{NEVER_ENDS}",
        STORED: f"0+1{NEVER_ENDS}",
        OPEN_AGE: f"0+60{NEVER_ENDS}",
    },
    "a stalled request that has ended": {REQUEUED: f"0x9 1{NEVER_ENDS}"},
    "a commit that fails in a rebalance": {COMMITS: f"0x9 1{NEVER_ENDS}"},
}

WORKER = {"job": "worker", "instance": "worker"}
FAULTS: dict[str, tuple[Series, int, Fired]] = {
    "S3 fails for minutes": (
        {served("503"): f"0+6{NEVER_ENDS}"},
        10,
        {
            "TripfoldApiErrorsFast": ({}, "9.091% of the HTTP requests fail"),
            "TripfoldApiErrorsSlow": ({}, "9.091% of the HTTP requests of three days failed"),
        },
    ),
    "a little more than one request in a hundred fails for hours": (
        {served("200"): f"0+600{NEVER_ENDS}", served("503"): f"0+6{NEVER_ENDS}"},
        400,
        {
            "TripfoldApiErrorsFast": ({}, "0.9901% of the HTTP requests fail"),
            "TripfoldApiErrorsSlow": ({}, "0.9901% of the HTTP requests of three days failed"),
        },
    ),
    "two requests in a thousand fail for hours": (
        {served("200"): f"0+998{NEVER_ENDS}", served("503"): f"0+2{NEVER_ENDS}"},
        400,
        {"TripfoldApiErrorsSlow": ({}, "0.2% of the HTTP requests of three days failed")},
    ),
    **{
        f"no {kind}": (
            {metric: "0x4 stale"},
            8,
            {"TripfoldProcessMissing": ({"severity": "page", "job": kind}, f"No {kind} runs")},
        )
        for kind, metric in (("api", UNREADABLE), ("planner", BACKFILLS), ("worker", STORED), ("aggregate", REBUILD))
    },
    "the only aggregate is not ready": (
        {series("tripfold_ready", "aggregate"): f"1x4 0{NEVER_ENDS}"},
        8,
        {
            "TripfoldServiceDown": ({"job": "aggregate"}, "No aggregate is ready"),
            "TripfoldNotReady": (
                {"job": "aggregate", "instance": "aggregate"},
                "aggregate on aggregate is not ready",
            ),
        },
    ),
    "one of two workers is gone, and the other is not ready": (
        {
            series("up", "worker-2"): "1x4 stale",
            series("tripfold_ready", "worker-2"): "1x4 stale",
            series("tripfold_ready", "worker"): f"1x4 0{NEVER_ENDS}",
        },
        8,
        {
            "TripfoldServiceDown": ({"job": "worker"}, "No worker is ready"),
            "TripfoldNotReady": (WORKER, "worker on worker is not ready"),
        },
    ),
    "one of two workers is not ready": (
        {series("tripfold_ready", "worker"): f"1x4 0{NEVER_ENDS}"},
        8,
        {"TripfoldNotReady": (WORKER, "worker on worker is not ready")},
    ),
    "one of two workers is down": (
        {series("up", "worker"): f"1x4 0{NEVER_ENDS}", series("tripfold_ready", "worker"): "1x4 stale"},
        8,
        {"TripfoldProcessMissing": (WORKER, "worker on worker does not respond")},
    ),
    "a record that cannot be decoded": (
        {series("tripfold_blocked_partitions", "aggregate", topic="city-stats"): f"0x4 1{NEVER_ENDS}"},
        8,
        {
            "TripfoldPartitionBlocked": (
                {"topic": "city-stats"},
                "A record of city-stats cannot be decoded, and its partition waits",
            )
        },
    ),
    "a summary is late": (
        {age("city-stats"): f"0+60{NEVER_ENDS}"},
        15,
        {"TripfoldNumbersLate": ({"topic": "city-stats"}, "A record of city-stats waits since 15m 0s")},
    ),
    "a city-day is late": (
        {age("city-tasks"): f"0+60{NEVER_ENDS}"},
        90,
        {"TripfoldIngestLate": ({"topic": "city-tasks"}, "A record of city-tasks waits since 1h 30m 0s")},
    ),
    "requests stall": (
        {REQUEUED: f"0x9 1{NEVER_ENDS}", OPEN_AGE: f"0+60{NEVER_ENDS}"},
        20,
        {"TripfoldRequestsStalled": ({}, "Requests make no progress, and no city-day ends")},
    ),
    "a damaged summary": (
        {UNREADABLE: f"0x9 1{NEVER_ENDS}"},
        12,
        {"TripfoldUnreadableObjects": ({"kind": "summary"}, "The API cannot read a stored summary")},
    ),
    "an aggregate of an older build": (
        {UNCOUNTED: f"0x9 2{NEVER_ENDS}"},
        12,
        {"TripfoldUncountedSummaries": ({}, "The API noticed changed summaries late: 2")},
    ),
    "a poison record": (
        {DEAD_LETTERS: f"0x9 1{NEVER_ENDS}"},
        12,
        {"TripfoldDeadLetters": ({"topic": "city-tasks"}, "Records of city-tasks went to the dead letters")},
    ),
    "a halved file": (
        {SUSPICIOUS: f"0x9 1{NEVER_ENDS}"},
        12,
        {"TripfoldSuspiciousFiles": ({}, "Trip files are much smaller or larger than usual")},
    ),
    "an invalid file": (
        {REFUSED: f"0x9 1{NEVER_ENDS}"},
        12,
        {"TripfoldQuarantinedFiles": ({"why": "invalid"}, "Trip files are refused: invalid")},
    ),
    "the upstream is down, so the workers are not ready": (
        {REACHABLE: f"1x4 0{NEVER_ENDS}", series("tripfold_ready", "worker"): f"1x4 0{NEVER_ENDS}"},
        8,
        {"TripfoldUpstreamUnreachable": ({}, "The upstream cannot be reached")},
    ),
    "the upstream refuses all requests": (
        {SERVED_BY_UPSTREAM: f"0x9 0{NEVER_ENDS}", REFUSED_BY_UPSTREAM: f"0x4 0+30{NEVER_ENDS}"},
        8,
        {"TripfoldUpstreamFailing": ({}, "100% of the requests to the upstream fail")},
    ),
    "a city of two countries has failed": (
        {summaries("incomplete"): f"0x4 2{NEVER_ENDS}"},
        8,
        {"TripfoldIncompleteDays": ({}, "2 country-days are incomplete")},
    ),
    "summaries are deleted and damaged": (
        {summaries("missing"): f"0x4 2{NEVER_ENDS}", summaries("unreadable"): f"0x4 1{NEVER_ENDS}"},
        8,
        {"TripfoldSummariesMissing": ({}, "3 country-days have lost their summary")},
    ),
    "verify finds a lost object": (
        {VERIFIED: f"0x4 2{NEVER_ENDS}"},
        8,
        {
            "TripfoldVerifyDifferences": (
                {"check": "summaries"},
                "The check summaries of verify found 2 differences",
            )
        },
    ),
    "verify has not run for days": (
        {VERIFIED_AT: f"-179400+0{NEVER_ENDS}"},
        10,
        {
            "TripfoldVerifyOld": (
                {"check": "summaries"},
                "The check summaries of verify last ran 2d 2h 0m 0s ago",
            )
        },
    ),
    "a date is not complete by its deadline": (
        {LATE: f"0x4 1{NEVER_ENDS}"},
        8,
        {"TripfoldDatesLate": ({"schedule": "daily"}, "Late dates of schedule daily: 1")},
    ),
    "a rebuild died": (
        {REBUILD: f"0+60{NEVER_ENDS}"},
        180,
        {"TripfoldRebuildOld": ({}, "A rebuild began 3h 0m 0s ago and has not ended")},
    ),
    "the tables are late": (
        {TABLES: f"60{NEVER_ENDS}"},
        40,
        {"TripfoldTablesLate": ({}, "The Parquet tables were last current 39m 0s ago")},
    ),
    "no aggregate builds tables": ({TABLES: f"0{NEVER_ENDS}"}, 40, {}),
    "an invalid file of API keys": (
        {KEYS_VALID: f"1x4 0{NEVER_ENDS}"},
        8,
        {
            "TripfoldApiKeysFileInvalid": (
                {"job": "api", "instance": "api"},
                "api on api keeps old API keys: their file is invalid",
            )
        },
    ),
    "commits fail all the time": (
        {COMMITS: f"0+1{NEVER_ENDS}"},
        40,
        {"TripfoldCommitFailures": (WORKER, "worker on worker cannot commit its offsets")},
    ),
}


def case(name: str, changes: Series, times: Sequence[int], fired: Fired, *, interval_s: int = 60) -> dict[str, object]:
    """Return a test of promtool: at these intervals of a deployment that differs from REST, only ``fired`` fires."""
    expected = []
    by_name = {alert.name: alert for alert in alerts.ALERTS}
    for time, alert in itertools.product(times, by_name.values()):
        labels, summary = fired.get(alert.name, ({}, ""))
        annotations = {"summary": summary, "runbook": alerts.runbook(alert)}
        one = {"exp_labels": {"severity": alert.severity, **labels}, "exp_annotations": annotations}
        expected.append(
            {
                "eval_time": f"{time * interval_s}s",
                "alertname": alert.name,
                "exp_alerts": [one] if alert.name in fired else [],
            }
        )
    inputs = [
        {"series": name, "values": values.replace(NEVER_ENDS, f"x{max(times)}")}
        for name, values in ({**REST, **changes}).items()
    ]
    return {"name": name, "interval": f"{interval_s}s", "input_series": inputs, "alert_rule_test": expected}


def check(tmp_path: Path, cases: Iterable[Case], *, interval_s: int = 60) -> None:
    """Let promtool run its tests, and evaluate the rules at each interval. Its output names the tests that fail."""
    file = {"rule_files": [str(alerts.RULES)], "evaluation_interval": f"{interval_s}s", "tests": [*cases]}
    (tmp_path / "test.json").write_text(json.dumps(file))
    run_tool("promtool", "test", "rules", str(tmp_path / "test.json"))


def test_the_rules_file_is_up_to_date() -> None:
    """The file is what ``make monitoring`` writes."""
    assert alerts.RULES.read_text() == alerts.rules()


def test_prometheus_accepts_the_rules() -> None:
    """The rules pass Prometheus's own check."""
    run_tool("promtool", "check", "rules", str(alerts.RULES))


def test_prometheus_and_alertmanager_accept_their_configuration() -> None:
    """The files of docker-compose.yml pass the programs' own checks."""
    run_tool("promtool", "check", "config", str(ROOT / "deploy" / "prometheus" / "prometheus.yml"))
    run_tool("amtool", "check-config", str(ALERTMANAGER))


def test_alertmanager_names_existing_alerts() -> None:
    """The inhibitions and routes of Alertmanager name alerts and severities of the rules."""
    named = set(re.findall(r'(?:alertname|severity)="(\w+)"', ALERTMANAGER.read_text()))
    assert named
    assert named <= {value for alert in alerts.ALERTS for value in (alert.name, alert.severity)}


def test_each_metric_of_an_alert_exists() -> None:
    """An expression names only metrics of Tripfold and ``up``, which Prometheus makes."""
    exported = check_docs.metrics()
    for alert in alerts.ALERTS:
        named = set(re.findall(r"\b(?:tripfold_\w+|up)\b", alert.expr))
        assert named, alert.name
        assert {name.removesuffix("_count") for name in named} <= {*exported, "up"}


def test_each_alert_has_a_runbook() -> None:
    """The link of an alert leads to a section of a page."""
    for alert in alerts.ALERTS:
        page, _, anchor = alerts.runbook(alert).partition("#")
        assert anchor in check_docs.anchors_of((ROOT / page).read_text())


def test_each_alert_is_tested() -> None:
    """Each alert fires in a test below."""
    assert {name for _, _, fired in FAULTS.values() for name in fired} == {alert.name for alert in alerts.ALERTS}


def test_a_missing_process_is_told_within_30_s() -> None:
    """A scrape, an evaluation, the time that the alert waits and that of Alertmanager are 30 s together."""
    configured = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["global"]
    waits = [configured["scrape_interval"], configured["evaluation_interval"]]
    waits.append(yaml.safe_load(ALERTMANAGER.read_text())["route"]["group_wait"])
    for alert in alerts.ALERTS:
        if alert.name == "TripfoldProcessMissing":
            assert sum(int(one.removesuffix("s")) for one in (*waits, alert.lasts)) <= 30


def test_no_alert_fires_without_a_fault(tmp_path: Path) -> None:
    """At rest, under load and during a restart no alert fires."""
    check(tmp_path, [case(state, changes, (11, 25, 90), {}) for state, changes in QUIET.items()])


def test_a_date_that_has_ended_raises_no_alert(tmp_path: Path) -> None:
    """The states of a date are older than its lag: they still say that cities are missing when the lag has gone."""
    ended: Series = {
        lag("city-tasks"): f"1x8 0{NEVER_ENDS}",
        summaries("missing"): f"2x11 0{NEVER_ENDS}",
        summaries("incomplete"): f"3x11 0{NEVER_ENDS}",
    }
    check(tmp_path, [case("a date ends", ended, range(6, 16), {}, interval_s=15)], interval_s=15)


@pytest.mark.parametrize(("minutes", "interval_s"), [(range(60), 60), (range(60, 100_000), 300)])
def test_each_alert_fires_on_its_fault(tmp_path: Path, minutes: range, interval_s: int) -> None:
    """A fault raises its own alerts, with their labels and summaries, and no other."""
    faults = [(name, fault) for name, fault in FAULTS.items() if fault[1] in minutes]
    check(tmp_path, [case(name, changes, (at,), fired) for name, (changes, at, fired) in faults], interval_s=interval_s)
