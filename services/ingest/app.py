"""The ingest service: a planner of requests and a worker of city-days, as one process or as two."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from litestar import Litestar

from services.ingest.memory import tune_allocator
from services.ingest.planner.planner import Planner
from services.ingest.role import Role
from services.ingest.upstream.client import HttpUpstream
from services.ingest.upstream.retry import WAIT_MAX_S, CircuitBreaker, UpstreamRetryPolicy
from services.ingest.worker.city_day import CityDayIngest
from services.ingest.worker.task_retries import Retries
from services.ingest.worker.worker import Worker
from shared.domain.ids import utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka.consumer import consume, make_broker
from shared.runtime.settings import Settings
from shared.service import ServiceContext, make_app

PLANNER_BATCH = 50
PLANNER_LINGER_MS = 50
WORKER_LINGER_MS = 50
RETRIES_BATCH = 1_000
POLL_INTERVAL_S_MAX = 20 * 86_400.0
"""Kafka counts it in milliseconds, in 31 bits."""


def create_app(settings: Settings, role: Role = Role.ALL) -> Litestar:
    """Wire the ingest service over the Kafka, S3 and upstream of the settings."""
    tune_allocator()
    context = ServiceContext(settings, source="ingest")
    retrier = context.retrier
    circuit = CircuitBreaker(retrier, retry_after_max_s=settings.upstream_retry_after_max_s)
    upstream = HttpUpstream(settings, circuit)
    retry_policy = UpstreamRetryPolicy(
        retrier,
        circuit,
        attempts_max=settings.upstream_attempts,
        outage_limit_s=settings.upstream_outage_limit_s,
        concurrency_max=settings.upstream_concurrency_max,
    )
    broker = make_broker(settings)
    subscriptions = []
    publishes = {Topic.CITY_STATS, Topic.REQUEST_PROGRESS}
    if role in {Role.ALL, Role.PLANNER}:
        planner = Planner(
            context.store,
            context.publisher,
            upstream,
            clock=utc_now,
            retry_policy=retry_policy,
            allow_no_cities=settings.upstream_allow_empty_city_list,
        )
        subscription = consume(
            broker,
            Topic.PROCESS_REQUESTS,
            planner.process,
            settings=settings,
            retrier=retrier,
            group=GROUPS[Topic.PROCESS_REQUESTS],
            skip_markers=context.skip_markers,
            batch_records_max=PLANNER_BATCH,
            linger_ms=PLANNER_LINGER_MS,
            deadline_s=min(
                longest_fetch_s(settings, settings.upstream_deadline_s) * PLANNER_BATCH, POLL_INTERVAL_S_MAX
            ),
            in_turns=True,
        )
        subscriptions.append(subscription)
        publishes.add(Topic.CITY_TASKS)
    if role in {Role.ALL, Role.WORKER}:
        publishes |= {Topic.CITY_TASKS, Topic.CITY_TASK_RETRIES}
        ingest = CityDayIngest(
            context.store,
            context.publisher,
            upstream,
            clock=utc_now,
            retry_policy=retry_policy,
            threads=ThreadPoolExecutor(settings.ingest_streams, thread_name_prefix="fold"),
            deadline_s=settings.ingest_deadline_s,
            rules=settings.file_rules,
            raw_retention=settings.raw_retention,
        )
        worker = Worker(ingest, context.publisher, retrier=retrier, streams=settings.ingest_streams)
        rounds = math.ceil(settings.ingest_batch / min(settings.ingest_streams, settings.upstream_concurrency_max))
        subscription = consume(
            broker,
            Topic.CITY_TASKS,
            worker.process,
            settings=settings,
            retrier=retrier,
            group=GROUPS[Topic.CITY_TASKS],
            skip_markers=context.skip_markers,
            batch_records_max=settings.ingest_batch,
            linger_ms=WORKER_LINGER_MS,
            deadline_s=min(longest_attempt_s(settings, settings.ingest_deadline_s) * rounds, POLL_INTERVAL_S_MAX),
            in_turns=True,
        )
        retries = Retries(context.publisher, clock=utc_now, retrier=retrier)
        retry_subscription = consume(
            broker,
            Topic.CITY_TASK_RETRIES,
            retries.process,
            settings=settings,
            retrier=retrier,
            group=GROUPS[Topic.CITY_TASK_RETRIES],
            skip_markers=context.skip_markers,
            batch_records_max=RETRIES_BATCH,
            linger_ms=WORKER_LINGER_MS,
        )
        subscriptions += [subscription, retry_subscription]
    return make_app(
        context, broker, subscriptions=tuple(subscriptions), publishes=tuple(publishes), resources=(upstream,)
    )


def longest_fetch_s(settings: Settings, attempt_s: float) -> float:
    """Return how long a fetch may take with all its attempts and waits: so long Kafka is to expect no poll."""
    return settings.upstream_attempts * longest_attempt_s(settings, attempt_s)


def longest_attempt_s(settings: Settings, attempt_s: float) -> float:
    """Return how long one attempt may take, together with the waits before it."""
    return attempt_s + settings.upstream_outage_limit_s + settings.upstream_retry_after_max_s + WAIT_MAX_S
