"""What a service says of itself: alive, ready and why not, metrics; and how it writes its log."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Literal, get_args

import structlog
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from shared.domain.topics import Topic
from shared.runtime.settings import Settings

Concern = Literal[
    "S3", "Kafka", "s3", "kafka", "consuming", "partitions", "batch", "city-day", "sweep", "upstream", "generation"
]
"""What can be at fault: the values of a label of the metrics, so there are only these."""

events_consumed = Counter("tripfold_events_consumed_total", "Events taken from a topic", ["topic"])
events_published = Counter("tripfold_events_published_total", "Events acknowledged by Kafka", ["topic"])
dead_letters = Counter("tripfold_dead_letters_total", "Records that could not be processed", ["topic"])
commit_failures = Counter("tripfold_commit_failures_total", "Offset commits that failed; redelivery heals them")
cas_conflicts = Counter("tripfold_cas_conflicts_total", "Compare-and-swaps that somebody else won", ["object"])
faults = Counter("tripfold_faults_total", "Outages of dependencies: each try that failed and was repeated", ["what"])
ready = Gauge("tripfold_ready", "1 while the service can do its work")
last_poll = Gauge("tripfold_last_poll_timestamp_seconds", "When the service last took a batch or found none", ["topic"])
batch_seconds = Histogram(
    "tripfold_batch_seconds",
    "Time from taking a batch to its commit",
    ["topic"],
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600),
)
quarantined_files = Counter(
    "tripfold_quarantined_files_total",
    "Files that were refused, by why: invalid, deadly (its parser dies of it); a file that came before counts too",
    ["why"],
)
bad_records = Counter("tripfold_bad_records_total", "Records that were left out of files that passed")
upstream_requests = Counter(
    "tripfold_upstream_requests_total",
    "Requests to the upstream, by how they ended: complete, unchanged, redirected, refused, broke, down, abandoned",
    ["outcome"],
)
upstream_bytes = Counter("tripfold_upstream_bytes_total", "Bytes of bodies that came from the upstream, still coded")
upstream_resumptions = Counter("tripfold_upstream_resumptions_total", "Broken downloads that went on where they broke")
upstream_reachable = Gauge("tripfold_upstream_reachable", "0 while the upstream cannot be reached")
upstream_reachable.set(1)
rebuild_age = Gauge(
    "tripfold_rebuild_age_seconds", "How long ago the rebuild began that runs, or died and left its mark; 0 without one"
)
event_loop_lag = Histogram(
    "tripfold_event_loop_lag_seconds",
    "How much later than asked for the event loop woke a task",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
event_loop_lag_max = Gauge(
    "tripfold_event_loop_lag_max_seconds", "The longest that the event loop has held a task up since the process began"
)

# A counter without children shows nothing, and an alert on its increase would miss the first one.
for _topic in Topic:
    dead_letters.labels(_topic.value)
for _concern in get_args(Concern):
    faults.labels(_concern)
for _object in ("attempts", "countries", "manifest", "plan", "request", "summary"):
    cas_conflicts.labels(_object)
for _why in ("invalid", "deadly"):
    quarantined_files.labels(_why)
for _outcome in ("complete", "unchanged", "redirected", "refused", "broke", "down", "abandoned"):
    upstream_requests.labels(_outcome)

__all__ = ["REGISTRY", "Health", "configure_logging", "measure_loop_lag"]

LAG_INTERVAL_S = 0.05
"""Whatever holds the loop for longer than this is seen."""

REPEATED_AFTER_S = 10.0


class Health:
    """What is wrong now, by name. A service is ready once it has started and nothing is wrong."""

    def __init__(self) -> None:
        self.started = False
        self._faults: dict[str, str] = {}
        ready.set_function(lambda: float(self.ready))

    @property
    def ready(self) -> bool:
        """Whether the service can do its work."""
        return self.started and not self._faults

    @property
    def faults(self) -> dict[str, str]:
        """What is wrong now: by what it concerns, in a sentence."""
        return dict(self._faults)

    def failing(self, what: Concern, reason: str, *, detail: str = "") -> None:
        """Note that ``what`` does not work, for ``reason``. ``detail`` says which of its kind; no metric has it."""
        faults.labels(what).inc()
        self._faults[f"{what} {detail}".rstrip()] = reason

    def recovered(self, what: Concern, *, detail: str = "") -> None:
        """Note that ``what`` works."""
        self._faults.pop(f"{what} {detail}".rstrip(), None)


async def measure_loop_lag() -> None:
    """Measure for ever how late the event loop wakes a task: what holds the loop holds every stream of the process."""
    loop = asyncio.get_running_loop()
    longest_s = 0.0
    while True:
        due_s = loop.time() + LAG_INTERVAL_S
        await asyncio.sleep(LAG_INTERVAL_S)
        lag_s = max(0.0, loop.time() - due_s)
        event_loop_lag.observe(lag_s)
        longest_s = max(longest_s, lag_s)
        event_loop_lag_max.set(longest_s)


class NowAndThen(logging.Filter):
    """Passes a message of a library that repeats itself at most once in REPEATED_AFTER_S; messages of others always.

    While Kafka is away aiokafka says so dozens of times a second. What is compared is a message before its arguments
    are filled in, so there are only as many as the library has.
    """

    def __init__(self, library: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._library = library
        self._clock = clock
        self._said_at_s: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(self._library) or not isinstance(record.msg, str):
            return True
        now_s = self._clock()
        said_at_s = self._said_at_s.get(record.msg)
        if said_at_s is not None and now_s - said_at_s < REPEATED_AFTER_S:
            return False
        self._said_at_s[record.msg] = now_s
        return True


def configure_logging(settings: Settings) -> None:
    """Write logs to standard error, one event a line, as JSON or as text."""
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared_steps: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    tail = [structlog.processors.format_exc_info] if settings.log_format == "json" else []
    structlog.configure(
        processors=[*shared_steps, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared_steps,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail, renderer],
        )
    )
    handler.addFilter(NowAndThen("aiokafka"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for noisy in ("httpx", "httpcore", "botocore", "aiobotocore", "aiokafka.consumer.group_coordinator"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # At debug level this one writes every request out, and one of them is the password.
    logging.getLogger("aiokafka.conn").setLevel(max(logging.INFO, root.level))
