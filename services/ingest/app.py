"""The ingest service: plans requests and ingests city-days, in one process or in two."""

from __future__ import annotations

import datetime as dt
import math
from concurrent.futures import ThreadPoolExecutor

from faststream.kafka import KafkaBroker

from services.ingest.jobs.backfills import BackfillAdvancer
from services.ingest.jobs.runner import JobRunner
from services.ingest.jobs.schedules import ScheduleRunner
from services.ingest.planner.planner import Planner
from services.ingest.retries import Retries
from services.ingest.upstream.circuit_breaker import RETRY_AFTER_MAX_S, CircuitBreaker
from services.ingest.upstream.client import HttpUpstream
from services.ingest.upstream.port import Upstream
from services.ingest.upstream.retry import WAIT_MAX_S, UpstreamRetryPolicy
from services.ingest.worker.city_day import CityDayIngest
from services.ingest.worker.isolation import Isolation, run_child
from services.ingest.worker.streaming import tune_allocator
from services.ingest.worker.worker import Worker
from shared.domain.ids import utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka.consumer import consume, make_broker
from shared.kafka.subscription import Subscription
from shared.runtime.metrics import Part
from shared.runtime.settings import Settings
from shared.service import AsgiApp, Background, ServiceContext, make_app

PLANNER_BATCH = 50
FETCHES_MAX = 2
"""How often a planner fetches the city list for one request: a list that changes the plan is fetched again."""
PLANNER_LINGER_MS = 50
WORKER_LINGER_MS = 50
RETRY_BATCH_RECORDS = 1_000
POLL_INTERVAL_S_MAX = 20 * 86_400.0
"""The limit of ``max.poll.interval.ms``, which has 31 bits."""


def create_app(settings: Settings, *, planner: bool = True, worker: bool = True) -> AsgiApp:
    """Wire the planner, the worker, or both to the Kafka, S3 and upstream of the settings."""
    tune_allocator()
    context = ServiceContext(settings, source="ingest")
    upstream, retry_policy = make_upstream(context)
    broker = make_broker(settings)
    parts: list[Part] = []
    subscriptions: list[Subscription] = []
    background: list[Background] = []
    publishes = (
        Topic.CITY_STATS,
        Topic.CITY_TASKS,
        Topic.BACKGROUND_TASKS,
        Topic.REQUEST_PROGRESS,
        Topic.PROCESS_REQUESTS,
        Topic.RETRIES,
    )
    if planner:
        parts.append("planner")
        subscriptions.append(_consume_requests(context, broker, upstream, retry_policy))
        background.append(_job_runner(context).run)
    if worker:
        parts.append("worker")
        subscriptions += _consume_tasks(context, broker, upstream, retry_policy)
        subscriptions.append(_consume_retries(context, broker))
    return make_app(
        context,
        broker,
        parts=tuple(parts),
        subscriptions=tuple(subscriptions),
        publishes=publishes,
        background=tuple(background),
        resources=(upstream,),
    )


def make_upstream(context: ServiceContext) -> tuple[HttpUpstream, UpstreamRetryPolicy]:
    """Return the upstream of the settings, and the policy that retries its requests."""
    settings = context.settings
    circuit = CircuitBreaker(context.retrier)
    retry_policy = UpstreamRetryPolicy(
        circuit,
        attempts_max=settings.upstream_attempts,
        outage_limit_s=settings.upstream_outage_limit_s,
        concurrency_max=settings.upstream_concurrency_max,
    )
    return HttpUpstream(settings, circuit), retry_policy


def _consume_requests(
    context: ServiceContext, broker: KafkaBroker, upstream: Upstream, retry_policy: UpstreamRetryPolicy
) -> Subscription:
    """Subscribe a planner to the requests."""
    settings = context.settings
    planner = Planner(
        context.store,
        context.publisher,
        upstream,
        clock=utc_now,
        retry_policy=retry_policy,
        allow_no_cities=settings.upstream_allow_empty_city_list,
    )
    return consume(
        broker,
        Topic.PROCESS_REQUESTS,
        planner.process,
        settings=settings,
        retrier=context.retrier,
        group=GROUPS[Topic.PROCESS_REQUESTS],
        publisher=context.publisher,
        store=context.store,
        skip_markers=context.skip_markers,
        batch_records_max=PLANNER_BATCH,
        linger_ms=PLANNER_LINGER_MS,
        deadline_s=min(FETCHES_MAX * settings.upstream_deadline_s * PLANNER_BATCH, POLL_INTERVAL_S_MAX),
        in_turns=True,
    )


def _job_runner(context: ServiceContext) -> JobRunner:
    """Return what advances backfills and schedules beside a planner."""
    settings = context.settings
    backfills = BackfillAdvancer(
        context.store,
        context.publisher,
        clock=utc_now,
        stalled_after=dt.timedelta(seconds=settings.stalled_request_after_s),
    )
    return JobRunner(backfills, ScheduleRunner(context.store, clock=utc_now), interval_s=settings.jobs_interval_s)


def make_city_day_ingest(
    context: ServiceContext,
    upstream: Upstream,
    retry_policy: UpstreamRetryPolicy,
    *,
    isolation: Isolation | None = None,
    crashes: int = 0,
) -> CityDayIngest:
    """Return what ingests city-days in this process. `CityDayIngest` describes the options."""
    settings = context.settings
    return CityDayIngest(
        context.store,
        context.publisher,
        upstream,
        clock=utc_now,
        retry_policy=retry_policy,
        threads=ThreadPoolExecutor(settings.ingest_streams, thread_name_prefix="parse"),
        streams=settings.ingest_streams,
        background_streams=_background_share(settings, settings.ingest_streams),
        deadline_s=settings.ingest_deadline_s,
        rules=settings.file_rules,
        volume_rules=settings.volume_rules,
        isolation=isolation,
        crashes=crashes,
    )


def _background_share(settings: Settings, count: int) -> int:
    return max(1, int(count * settings.ingest_background_share))


def _consume_tasks(
    context: ServiceContext, broker: KafkaBroker, upstream: Upstream, retry_policy: UpstreamRetryPolicy
) -> list[Subscription]:
    """Subscribe a worker to the tasks, and to those in the background with a bounded share of its streams."""
    settings = context.settings
    ingest = make_city_day_ingest(context, upstream, retry_policy, isolation=Isolation(run_child))
    worker = Worker(ingest, context.publisher, retrier=context.retrier)
    at_once = settings.upstream_concurrency_max
    # A task waits for a stream while others use all of them.
    rounds = math.ceil(at_once / settings.ingest_streams)
    return [
        consume(
            broker,
            topic,
            worker.process,
            settings=settings,
            retrier=context.retrier,
            group=GROUPS[topic],
            publisher=context.publisher,
            store=context.store,
            skip_markers=context.skip_markers,
            batch_records_max=1,
            batches_at_once=batches_at_once,
            linger_ms=WORKER_LINGER_MS,
            deadline_s=min(longest_attempt_s(settings, settings.ingest_deadline_s) * rounds, POLL_INTERVAL_S_MAX),
            in_turns=True,
        )
        for topic, batches_at_once in (
            (Topic.CITY_TASKS, at_once),
            (Topic.BACKGROUND_TASKS, _background_share(settings, at_once)),
        )
    ]


def _consume_retries(context: ServiceContext, broker: KafkaBroker) -> Subscription:
    """Subscribe to the tasks and requests that wait for their next attempt."""
    return consume(
        broker,
        Topic.RETRIES,
        Retries(context.publisher, clock=utc_now, retrier=context.retrier).process,
        settings=context.settings,
        retrier=context.retrier,
        group=GROUPS[Topic.RETRIES],
        publisher=context.publisher,
        store=context.store,
        skip_markers=context.skip_markers,
        batch_records_max=RETRY_BATCH_RECORDS,
        linger_ms=WORKER_LINGER_MS,
    )


def longest_attempt_s(settings: Settings, attempt_s: float) -> float:
    """Return the longest time of one attempt and the waits before it. Kafka must allow this time between polls."""
    return attempt_s + settings.upstream_outage_limit_s + RETRY_AFTER_MAX_S + WAIT_MAX_S
