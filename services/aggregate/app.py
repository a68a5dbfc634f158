"""The aggregate service: folds city statistics into country-days, and progress events into requests."""

from __future__ import annotations

import datetime as dt
from functools import partial

from services.aggregate.consumer import CityStatsConsumer, tune_collector
from services.aggregate.replay.generations import watch_rebuild
from services.aggregate.requests.consumer import RequestProgressConsumer
from services.aggregate.requests.requeue import Requeue
from services.aggregate.tables.builder import TableBuilder
from shared.domain.ids import utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka.consumer import consume, make_broker
from shared.runtime.settings import Settings
from shared.service import AsgiApp, Background, ServiceContext, make_app

STATISTICS_BATCH_MAX = 2_000
STATISTICS_LINGER_MS = 100
PROGRESS_BATCH_MAX = 5_000
PROGRESS_LINGER_MS = 100


def create_app(settings: Settings) -> AsgiApp:
    """Wire the aggregate service over the Kafka and S3 of the settings."""
    tune_collector()
    context = ServiceContext(settings, source="aggregate")
    store, publisher, retrier = context.store, context.publisher, context.retrier
    broker = make_broker(settings)
    city_stats = CityStatsConsumer(store, publisher, cache_bytes=settings.aggregate_cache_bytes)
    statistics = consume(
        broker,
        Topic.CITY_STATS,
        city_stats.process,
        settings=settings,
        retrier=retrier,
        group=GROUPS[Topic.CITY_STATS],
        publisher=publisher,
        store=store,
        skip_markers=context.skip_markers,
        batch_records_max=STATISTICS_BATCH_MAX,
        linger_ms=STATISTICS_LINGER_MS,
    )
    progress = RequestProgressConsumer(
        store, publisher, clock=utc_now, retrier=retrier, interval_s=settings.progress_interval_s
    )
    requests = consume(
        broker,
        Topic.REQUEST_PROGRESS,
        progress.process,
        settings=settings,
        retrier=retrier,
        group=GROUPS[Topic.REQUEST_PROGRESS],
        publisher=publisher,
        store=store,
        skip_markers=context.skip_markers,
        batch_records_max=PROGRESS_BATCH_MAX,
        linger_ms=PROGRESS_LINGER_MS,
    )
    requeue = Requeue(store, publisher, clock=utc_now, after=dt.timedelta(seconds=settings.stalled_request_after_s))
    background: list[Background] = [requeue.run, partial(watch_rebuild, store)]
    if settings.tables_interval_s:
        tables = TableBuilder(store, clock=utc_now)
        background.append(partial(tables.run, interval_s=settings.tables_interval_s))
    return make_app(
        context,
        broker,
        parts=("aggregate",),
        subscriptions=(statistics, requests),
        publishes=(Topic.COUNTRY_DAY_SUMMARIES, Topic.REQUEST_PROGRESS, Topic.CITY_STATS, Topic.PROCESS_REQUESTS),
        background=tuple(background),
    )
