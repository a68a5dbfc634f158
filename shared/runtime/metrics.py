"""The Prometheus metrics of all services. docs/reference/metrics.md lists them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal, get_args

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from shared.domain.events import Outcome
from shared.domain.topics import Topic

__all__ = ["REGISTRY"]

Concern = Literal["s3", "kafka", "consumer", "partitions", "batch", "city_day", "requeue", "upstream", "generation"]
"""The values of the label ``what``: a dependency, or the work that waits for one."""

S3Operation = Literal[
    "GetObject", "HeadObject", "PutObject", "ListObjectsV2", "DeleteObject", "UploadPart", "CompleteMultipartUpload"
]
S3Result = Literal["ok", "not_found", "conflict", "error", "cancelled"]

build_info = Gauge("tripfold_build_info", "Always 1; the label is the version of Tripfold", ["version"])
build_info.labels(version("tripfold")).set(1)
events_consumed = Counter("tripfold_events_consumed_total", "Events consumed from a topic", ["topic"])
events_published = Counter("tripfold_events_published_total", "Events acknowledged by Kafka", ["topic"])
dead_letters = Counter("tripfold_dead_letters_total", "Records sent to the dead letters", ["topic"])
commit_failures = Counter("tripfold_commit_failures_total", "Offset commits that failed; the batch is delivered again")
cas_conflicts = Counter(
    "tripfold_cas_conflicts_total", "Compare-and-swaps that conflicted with another write", ["object"]
)
faults = Counter(
    "tripfold_faults_total", "Failed tries that are repeated, most of them in a dependency outage", ["what"]
)
ready = Gauge("tripfold_ready", "1 while the service is ready")
last_poll = Gauge("tripfold_last_poll_timestamp_seconds", "When the service last took a batch or found none", ["topic"])
consumer_lag = Gauge(
    "tripfold_consumer_lag", "Records of a partition that the consumer has not processed", ["topic", "partition"]
)
oldest_record_age = Gauge(
    "tripfold_consumer_oldest_record_age_seconds",
    "Age of the oldest record that the consumer has not processed; 0 without one",
    ["topic"],
)
batch_seconds = Histogram(
    "tripfold_batch_seconds",
    "Time from taking a batch to its commit",
    ["topic"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
requeued_requests = Counter(
    "tripfold_requeued_requests_total", "Requests published again because they made no progress for long"
)
city_days = Counter("tripfold_city_days_total", "City-days that a worker has finished, by outcome", ["outcome"])
quarantined_files = Counter(
    "tripfold_quarantined_files_total",
    "Refused files, by reason: invalid, or parser_crash (parsing it crashes the process). Counts repeated files too",
    ["why"],
)
bad_records = Counter("tripfold_bad_records_total", "Bad records left out of accepted files")
upstream_requests = Counter(
    "tripfold_upstream_requests_total",
    "Requests to the upstream, by outcome",
    ["outcome"],
)
upstream_bytes = Counter("tripfold_upstream_bytes_total", "Bytes of bodies received from the upstream, before decoding")
upstream_resumptions = Counter("tripfold_upstream_resumptions_total", "Interrupted downloads that were resumed")
upstream_reachable = Gauge("tripfold_upstream_reachable", "0 while the circuit breaker of the upstream is open")
upstream_reachable.set(1)
rebuild_age = Gauge("tripfold_rebuild_age_seconds", "Age of the rebuild that runs or was interrupted; 0 without one")
s3_request_seconds = Histogram(
    "tripfold_s3_request_seconds",
    "Time from a request to S3 to its response",
    ["operation", "result"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
event_loop_lag = Histogram(
    "tripfold_event_loop_lag_seconds",
    "Delay of the event loop in waking a task",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
event_loop_lag_max = Gauge(
    "tripfold_event_loop_lag_max_seconds", "Longest delay of the event loop since the start of the process"
)

# A labelled counter exports nothing before its first use. An alert on its increase would miss that first one.
for _topic in Topic:
    dead_letters.labels(_topic.value)
for _concern in get_args(Concern):
    faults.labels(_concern)
for _object in ("active_requests", "attempts", "countries", "manifest", "plan", "request", "summary"):
    cas_conflicts.labels(_object)
for _operation in get_args(S3Operation):
    s3_request_seconds.labels(_operation, "error")
for _why in ("invalid", "parser_crash"):
    quarantined_files.labels(_why)
for _ended in Outcome:
    city_days.labels(_ended.value)
for _outcome in ("complete", "unchanged", "redirected", "refused", "interrupted", "unavailable", "aborted"):
    upstream_requests.labels(_outcome)
