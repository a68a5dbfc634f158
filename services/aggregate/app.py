"""The aggregate service: folds city statistics into country-days, and progress events into requests."""

from __future__ import annotations

import datetime as dt
from functools import partial

from litestar import Litestar

from services.aggregate.folding import Folder
from services.aggregate.generations import watch_rebuild
from services.aggregate.memory import tune_collector
from services.aggregate.progress_folding import ProgressFolder, Sweep
from shared.consuming import consume, make_broker
from shared.identity import utc_now
from shared.service import Surroundings, make_app
from shared.settings import Settings
from shared.topics import GROUPS, Topic

PROGRESS_BATCH_MAX = 5_000
PROGRESS_LINGER_MS = 100


def create_app(settings: Settings) -> Litestar:
    """Wire the aggregate service over the Kafka and S3 of the settings."""
    tune_collector()
    surroundings = Surroundings(settings, source="aggregate")
    store, publisher, patience = surroundings.store, surroundings.publisher, surroundings.patience
    broker = make_broker(settings)
    folder = Folder(store, publisher, cache_bytes=settings.aggregate_cache_bytes)
    statistics = consume(
        broker,
        Topic.CITY_STATS,
        folder.process,
        settings=settings,
        patience=patience,
        group=GROUPS[Topic.CITY_STATS],
        skips=surroundings.skips,
        batch_records_max=settings.aggregate_batch,
        linger_ms=settings.aggregate_linger_ms,
    )
    progress = ProgressFolder(
        store, publisher, clock=utc_now, patience=patience, interval_s=settings.progress_interval_s
    )
    requests = consume(
        broker,
        Topic.REQUEST_PROGRESS,
        progress.process,
        settings=settings,
        patience=patience,
        group=GROUPS[Topic.REQUEST_PROGRESS],
        skips=surroundings.skips,
        batch_records_max=PROGRESS_BATCH_MAX,
        linger_ms=PROGRESS_LINGER_MS,
    )
    sweep = Sweep(store, publisher, clock=utc_now, after=dt.timedelta(seconds=settings.sweep_after_s))
    return make_app(
        surroundings,
        broker,
        consumptions=(statistics, requests),
        publishes=(Topic.COUNTRY_DAY_SUMMARIES, Topic.REQUEST_PROGRESS, Topic.CITY_STATS, Topic.PROCESS_REQUESTS),
        background=(sweep.run, partial(watch_rebuild, store)),
    )
