"""The Prometheus metrics of all services. docs/reference/metrics.md lists them.

Each metric belongs to a group, and a process exports only the groups of the parts that it runs: see `registry_of`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Literal, get_args

from prometheus_client import REGISTRY as EVERY_PROCESS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

from shared.domain.events import Outcome

Part = Literal["api", "planner", "worker", "aggregate"]
"""A part of Tripfold. A process runs one of them, or the planner and the worker."""

API, CACHES, CONSUMERS, INGEST, REQUESTS, PLANNER, WORKER, AGGREGATE = (CollectorRegistry() for _ in range(8))
VERIFY = CollectorRegistry()
"""The metrics that ``tripfold verify`` writes into a file."""
_GROUPS: dict[Part, tuple[CollectorRegistry, ...]] = {
    "api": (API, CACHES),
    "planner": (CONSUMERS, INGEST, REQUESTS, PLANNER),
    "worker": (CONSUMERS, INGEST, WORKER),
    "aggregate": (CACHES, CONSUMERS, REQUESTS, AGGREGATE),
}

Concern = Literal[
    "s3",
    "kafka",
    "consumer",
    "partitions",
    "batch",
    "record",
    "key",
    "requeue",
    "upstream",
    "generation",
    "jobs",
    "tables",
]
"""The values of the label ``what``: a dependency, or the work that waits for one."""

S3Operation = Literal[
    "GetObject", "HeadObject", "PutObject", "ListObjectsV2", "DeleteObject", "UploadPart", "CompleteMultipartUpload"
]
S3Result = Literal["ok", "not_found", "conflict", "error", "cancelled"]
ObjectKind = Literal["summary", "request", "backfill", "schedule", "manifest", "plan", "quarantine report", "other"]
SummaryState = Literal["complete", "incomplete", "missing", "unreadable"]
Cache = Literal["heads", "responses", "summaries"]
IngestStage = Literal[
    "city_list", "publish_plan", "request", "wait", "stream", "complete_upload", "write_manifest", "publish"
]
UpstreamOutcome = Literal["complete", "unchanged", "redirected", "refused", "interrupted", "unavailable", "aborted"]

# These are a series beside each counter and histogram, and Prometheus needs none of them.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the client has no types here

build_info = Gauge("tripfold_build_info", "Always 1; the label is the version of Tripfold", ["version"])
build_info.labels(version("tripfold")).set(1)
events_consumed = Counter(
    "tripfold_events_consumed_total", "Events consumed from a topic", ["topic"], registry=CONSUMERS
)
events_published = Counter("tripfold_events_published_total", "Events acknowledged by Kafka", ["topic"])
dead_letters = Counter("tripfold_dead_letters_total", "Records sent to the dead letters", ["topic"], registry=CONSUMERS)
commit_failures = Counter(
    "tripfold_commit_failures_total", "Offset commits that failed; the batch is delivered again", registry=CONSUMERS
)
cas_conflicts = Counter(
    "tripfold_cas_conflicts_total", "Compare-and-swaps that conflicted with another write", ["object"]
)
faults = Counter(
    "tripfold_faults_total", "Failed tries that are repeated, most of them in a dependency outage", ["what"]
)
ready = Gauge("tripfold_ready", "1 while the service is ready")
last_poll = Gauge(
    "tripfold_last_poll_timestamp_seconds",
    "When the service last took a batch or found none",
    ["topic"],
    registry=CONSUMERS,
)
consumer_lag = Gauge(
    "tripfold_consumer_lag",
    "Records of a partition that the consumer has not processed",
    ["topic", "partition"],
    registry=CONSUMERS,
)
oldest_record_age = Gauge(
    "tripfold_consumer_oldest_record_age_seconds",
    "Age of the oldest record that the consumer has not processed; 0 without one",
    ["topic"],
    registry=CONSUMERS,
)
failed_keys = Gauge(
    "tripfold_failed_keys",
    "Country-days, city-days and requests whose records go to the dead letters",
    ["topic"],
    registry=CONSUMERS,
)
blocked_partitions = Gauge(
    "tripfold_blocked_partitions",
    "Partitions that wait at a record which the Kafka client cannot decode",
    ["topic"],
    registry=CONSUMERS,
)
batch_seconds = Histogram(
    "tripfold_batch_seconds",
    "Time from taking a batch to its commit",
    ["topic"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
    registry=CONSUMERS,
)
batch_records = Histogram(
    "tripfold_batch_records",
    "Records in a batch",
    ["topic"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000),
    registry=CONSUMERS,
)
ingest_stage_seconds = Histogram(
    "tripfold_ingest_stage_seconds",
    "Time that a stage of planning a date or of ingesting a city-day takes",
    ["stage"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600),
    registry=INGEST,
)
stored_bytes = Counter("tripfold_stored_bytes_total", "Bytes of stored files, after decoding", registry=WORKER)
stored_trips = Counter("tripfold_stored_trips_total", "Trips of stored files", registry=WORKER)
cache_requests = Counter(
    "tripfold_cache_requests_total",
    "Look-ups in a cache, by result: hit or miss",
    ["cache", "result"],
    registry=CACHES,
)
requeued_requests = Counter(
    "tripfold_requeued_requests_total",
    "Requests published again because they made no progress for long",
    registry=REQUESTS,
)
city_tasks_finished = Counter(
    "tripfold_city_tasks_finished_total",
    "City-days that a worker has finished, by outcome",
    ["outcome"],
    registry=WORKER,
)
open_backfills = Gauge(
    "tripfold_open_backfills", "Backfills that have not ended, the paused ones included", registry=PLANNER
)
late_dates = Gauge(
    "tripfold_late_dates",
    "Dates of a schedule that were not complete by their deadline",
    ["schedule"],
    registry=PLANNER,
)
backfill_dates = Counter(
    "tripfold_backfill_dates_total", "Dates of backfills that have ended, by outcome", ["outcome"], registry=PLANNER
)
quarantined_files = Counter(
    "tripfold_quarantined_files_total",
    "Refused files, by reason: invalid, or parser_crash (parsing it crashes the process). Counts repeated files too",
    ["why"],
    registry=WORKER,
)
suspicious_files = Counter(
    "tripfold_suspicious_files_total",
    "Stored files whose volume is unusual for their city and weekday",
    registry=WORKER,
)
bad_records = Counter("tripfold_bad_records_total", "Bad records left out of accepted files", registry=WORKER)
upstream_requests = Counter(
    "tripfold_upstream_requests_total", "Requests to the upstream, by outcome", ["outcome"], registry=INGEST
)
upstream_bytes = Counter(
    "tripfold_upstream_bytes_total", "Bytes of bodies received from the upstream, before decoding", registry=INGEST
)
upstream_resumptions = Counter(
    "tripfold_upstream_resumptions_total", "Interrupted downloads that were resumed", registry=INGEST
)
upstream_reachable = Gauge(
    "tripfold_upstream_reachable", "0 while the circuit breaker of the upstream is open", registry=INGEST
)
upstream_reachable.set(1)
open_requests = Gauge(
    "tripfold_open_requests", "Requests that have not ended, of the latest 5,000", ["status"], registry=AGGREGATE
)
oldest_open_request_age = Gauge(
    "tripfold_oldest_open_request_age_seconds",
    "Time since the oldest open request was made; 0 without one",
    registry=AGGREGATE,
)
rebuild_age = Gauge(
    "tripfold_rebuild_age_seconds", "Age of the rebuild that runs or was interrupted; 0 without one", registry=AGGREGATE
)
tables_current = Gauge(
    "tripfold_tables_current_timestamp_seconds",
    "When the process last found or made all Parquet tables current; at first, when it started",
    registry=AGGREGATE,
)
s3_request_seconds = Histogram(
    "tripfold_s3_request_seconds",
    "Time from a request to S3 to its response",
    ["operation", "result"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
http_request_seconds = Histogram(
    "tripfold_http_request_seconds",
    "Time from an HTTP request to the end of its response",
    ["method", "route", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
    registry=API,
)
http_connections_refused = Counter(
    "tripfold_http_connections_refused_total",
    "Connections to the API that were refused, because the process had as many as it may have",
    registry=API,
)
unreadable_objects = Counter(
    "tripfold_unreadable_objects_total",
    "Objects of the bucket that the API could not read",
    ["kind"],
    registry=API,
)
recent_summaries = Gauge(
    "tripfold_recent_summaries",
    "Summaries of the latest dates, by state; missing: planned, and not there",
    ["state"],
    registry=API,
)
uncounted_summaries = Counter(
    "tripfold_uncounted_summaries_total",
    "Changed summaries that nobody counted in the change index, so that the API noticed them late",
    registry=API,
)
newest_complete_date = Gauge(
    "tripfold_newest_complete_date_timestamp_seconds",
    "Start, in UTC, of the newest date whose country-days are all complete; 0 without one",
    registry=API,
)
api_keys_file_valid = Gauge(
    "tripfold_api_keys_file_valid",
    "1 while the file of API keys is valid, or none is named; at 0 the last valid keys stay in use",
    registry=API,
)
api_keys_file_valid.set(1)
verify_compared = Gauge(
    "tripfold_verify_compared", "Country-days or keys that the last verification compared", ["check"], registry=VERIFY
)
verify_differences = Gauge(
    "tripfold_verify_differences", "Differences that the last verification found", ["check"], registry=VERIFY
)
verify_timestamp = Gauge(
    "tripfold_verify_timestamp_seconds", "End of the last verification", ["check"], registry=VERIFY
)
verify_duration = Gauge(
    "tripfold_verify_duration_seconds", "Duration of the last verification", ["check"], registry=VERIFY
)
event_loop_lag = Histogram(
    "tripfold_event_loop_lag_seconds",
    "Delay of the event loop in waking a task",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
event_loop_lag_max = Gauge(
    "tripfold_event_loop_lag_max_seconds", "Longest delay of the event loop since the start of the process"
)

_UPLOADS = ("UploadPart", "CompleteMultipartUpload")
_CONSUMER_FAULTS: tuple[Concern, ...] = ("s3", "kafka", "consumer", "partitions", "batch", "record", "key")
_FIRST_VALUES: dict[Part, dict[MetricWrapperBase, tuple[str, ...]]] = {
    "api": {
        cas_conflicts: ("active_requests", "backfill", "request", "schedule"),
        faults: ("s3", "kafka"),
        unreadable_objects: get_args(ObjectKind),
    },
    "planner": {
        backfill_dates: ("completed", "failed", "cancelled", "skipped"),
        cas_conflicts: ("active_requests", "backfill", "countries", "plan", "request", "schedule"),
        faults: (*_CONSUMER_FAULTS, "jobs", "upstream"),
        upstream_requests: get_args(UpstreamOutcome),
    },
    "worker": {
        cas_conflicts: ("attempts", "manifest"),
        city_tasks_finished: tuple(outcome.value for outcome in Outcome),
        faults: (*_CONSUMER_FAULTS, "upstream"),
        quarantined_files: ("invalid", "parser_crash", "suspicious"),
        upstream_requests: get_args(UpstreamOutcome),
    },
    "aggregate": {
        cas_conflicts: ("request", "summary", "tables"),
        faults: (*_CONSUMER_FAULTS, "requeue", "generation", "tables"),
    },
}
"""The label values that a part exports from the start. A labelled counter exports nothing before its first use, and an
alert on its increase would miss that first one. `consume` does the same for the labels of a topic."""


def time_stage(stage: IngestStage) -> AbstractContextManager[object]:
    """Observe the time of a block as that of a stage, also if the block fails."""
    return ingest_stage_seconds.labels(stage).time()


def count_lookups(cache: Cache, *, hits: int = 0, misses: int = 0) -> None:
    """Count look-ups in a cache."""
    cache_requests.labels(cache, "hit").inc(hits)
    cache_requests.labels(cache, "miss").inc(misses)


def registry_of(*parts: Part) -> CollectorRegistry:
    """Return the metrics that a process with these parts exports. Each counter of errors starts at zero."""
    registry = CollectorRegistry(auto_describe=True)  # knows the names of all groups, so none can be in two
    for group in dict.fromkeys((EVERY_PROCESS, *(group for part in parts for group in _GROUPS[part]))):
        registry.register(group)
    for part in parts:
        for metric, values in _FIRST_VALUES[part].items():
            for value in values:
                metric.labels(value)
    for operation in get_args(S3Operation):
        if "worker" in parts or operation not in _UPLOADS:
            s3_request_seconds.labels(operation, "error")
    return registry
