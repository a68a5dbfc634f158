"""The ingest service: a planner of requests and a worker of city-days, as one process or as two."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

from litestar import Litestar

from services.ingest.city_day import CityDayIngest
from services.ingest.memory import tune_allocator
from services.ingest.persistence import WAIT_MAX_S, Circuit, Persistence
from services.ingest.planner import Planner
from services.ingest.retrying import Retries
from services.ingest.role import Role
from services.ingest.upstream import HttpUpstream
from services.ingest.worker import Worker
from shared.consuming import consume, make_broker
from shared.identity import utc_now
from shared.service import Surroundings, make_app
from shared.settings import Settings
from shared.topics import GROUPS, Topic

PLANNER_LINGER_MS = 50
WORKER_LINGER_MS = 50
RETRIES_BATCH = 1_000
POLL_INTERVAL_S_MAX = 20 * 86_400.0
"""Kafka counts it in milliseconds, in 31 bits."""


def create_app(settings: Settings, role: Role = Role.ALL) -> Litestar:
    """Wire the ingest service over the Kafka, S3 and upstream of the settings."""
    tune_allocator()
    surroundings = Surroundings(settings, source="ingest")
    patience = surroundings.patience
    circuit = Circuit(patience, retry_after_max_s=settings.upstream_retry_after_max_s)
    upstream = HttpUpstream(settings, circuit)
    persistence = Persistence(
        patience,
        circuit,
        attempts_max=settings.upstream_attempts,
        outage_limit_s=settings.upstream_outage_limit_s,
        concurrency_max=settings.upstream_concurrency_max,
    )
    broker = make_broker(settings)
    consumptions = []
    publishes = {Topic.CITY_STATS, Topic.REQUEST_PROGRESS}
    if role in {Role.ALL, Role.PLANNER}:
        planner = Planner(
            surroundings.store,
            surroundings.publisher,
            upstream,
            clock=utc_now,
            persistence=persistence,
            allow_no_cities=settings.upstream_allow_no_cities,
        )
        consumption = consume(
            broker,
            Topic.PROCESS_REQUESTS,
            planner.process,
            settings=settings,
            patience=patience,
            group=GROUPS[Topic.PROCESS_REQUESTS],
            skips=surroundings.skips,
            batch_records_max=1,
            linger_ms=PLANNER_LINGER_MS,
            deadline_s=min(longest_fetch_s(settings, settings.upstream_deadline_s), POLL_INTERVAL_S_MAX),
        )
        consumptions.append(consumption)
        publishes.add(Topic.CITY_TASKS)
    if role in {Role.ALL, Role.WORKER}:
        publishes |= {Topic.CITY_TASKS, Topic.CITY_TASK_RETRIES}
        ingest = CityDayIngest(
            surroundings.store,
            surroundings.publisher,
            upstream,
            clock=utc_now,
            persistence=persistence,
            threads=ThreadPoolExecutor(settings.ingest_streams, thread_name_prefix="fold"),
            deadline_s=settings.ingest_deadline_s,
            rules=settings.file_rules,
            raw_retention=settings.raw_retention,
        )
        worker = Worker(ingest, surroundings.publisher, patience=patience, streams=settings.ingest_streams)
        rounds = math.ceil(settings.ingest_batch / min(settings.ingest_streams, settings.upstream_concurrency_max))
        consumption = consume(
            broker,
            Topic.CITY_TASKS,
            worker.process,
            settings=settings,
            patience=patience,
            group=GROUPS[Topic.CITY_TASKS],
            skips=surroundings.skips,
            batch_records_max=settings.ingest_batch,
            linger_ms=WORKER_LINGER_MS,
            deadline_s=min(longest_attempt_s(settings, settings.ingest_deadline_s) * rounds, POLL_INTERVAL_S_MAX),
        )
        retries = Retries(surroundings.publisher, clock=utc_now, patience=patience)
        retry_consumption = consume(
            broker,
            Topic.CITY_TASK_RETRIES,
            retries.process,
            settings=settings,
            patience=patience,
            group=GROUPS[Topic.CITY_TASK_RETRIES],
            skips=surroundings.skips,
            batch_records_max=RETRIES_BATCH,
            linger_ms=WORKER_LINGER_MS,
        )
        consumptions += [consumption, retry_consumption]
    return make_app(
        surroundings, broker, consumptions=tuple(consumptions), publishes=tuple(publishes), resources=(upstream,)
    )


def longest_fetch_s(settings: Settings, attempt_s: float) -> float:
    """Return how long a fetch may take with all its attempts and waits: so long Kafka is to expect no poll."""
    return settings.upstream_attempts * longest_attempt_s(settings, attempt_s)


def longest_attempt_s(settings: Settings, attempt_s: float) -> float:
    """Return how long one attempt may take, together with the waits before it."""
    return attempt_s + settings.upstream_outage_limit_s + settings.upstream_retry_after_max_s + WAIT_MAX_S
