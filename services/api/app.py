"""Assembles the API service from its routes, middleware and dependencies."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from litestar import Litestar, Request, Router
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from services.api.auth import Access, access_of
from services.api.backfills.service import Backfills, backfill_stream
from services.api.completeness.cities import MissingCities
from services.api.completeness.reader import CompletenessReader
from services.api.documentation.openapi import KEY, NO_KEY, openapi_config
from services.api.foreign_pages import ForeignPages
from services.api.health import PROBE_TIMEOUT_S, Check, Readiness
from services.api.http.date_range import ProcessableDates
from services.api.http.problems import exception_handlers
from services.api.http.query_parameters import check_query
from services.api.key_file import KeyFile
from services.api.middleware.access_log import AccessLog
from services.api.middleware.compression import Compression
from services.api.middleware.cors import cors_config
from services.api.middleware.head_and_options import HeadAndOptions
from services.api.middleware.security_headers import SecurityHeaders
from services.api.middleware.size_limits import SizeLimits
from services.api.pipeline.service import Pipeline, ReadOffsets
from services.api.quarantine.service import Quarantine
from services.api.requests.event_stream import StreamPlaces, request_stream
from services.api.requests.service import Requests
from services.api.routes import access as access_routes
from services.api.routes import backfills as backfill_routes
from services.api.routes import completeness as completeness_routes
from services.api.routes import documentation, health, pipeline, quarantine, statistics
from services.api.routes import requests as request_routes
from services.api.routes import schedules as schedule_routes
from services.api.schedules.service import Schedules
from services.api.server import ApiServer
from services.api.statistics.cache import ResponseCache
from services.api.statistics.completeness import Completeness
from services.api.statistics.countries import CountryNames
from services.api.statistics.index_check import IndexCheck
from services.api.statistics.reader import SummaryReader
from services.api.web.page import page_handlers
from shared.domain.ids import utc_now
from shared.domain.topics import Topic
from shared.kafka.group_offsets import read_group_offsets
from shared.kafka.producer import PROBE_TIMEOUT_MS, KafkaPublisher, Publisher
from shared.runtime.health import Health, measure_loop_lag
from shared.runtime.logging import configure_logging
from shared.runtime.metrics import Concern, registry_of
from shared.runtime.settings import Settings
from shared.runtime.tracing import shut_down_tracing
from shared.storage.bucket_check import BucketCheck
from shared.storage.object_store import ObjectStore
from shared.storage.s3 import S3Store

PUBLISHED = (Topic.PROCESS_REQUESTS,)

_log = structlog.get_logger()


def create_app(settings: Settings) -> Litestar:
    """Return the API with the S3 and Kafka of the settings. It also starts while these are down."""
    store = S3Store(settings)
    publisher = KafkaPublisher(settings, source="api")

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[None]:
        async with store, publisher:
            yield

    context = make_context(
        settings,
        store=store,
        publisher=publisher,
        checks={
            "s3": BucketCheck(store, timeout_s=PROBE_TIMEOUT_S),
            "kafka": lambda: publisher.check(PUBLISHED, timeout_ms=PROBE_TIMEOUT_MS),
        },
        read_offsets=functools.partial(read_group_offsets, settings),
    )
    return make_app(settings, context, connected=connected)


@dataclass(frozen=True)
class ApiContext:
    """The API without HTTP: its access control, its dependencies and its background tasks."""

    access: Access
    health: Health
    dependencies: dict[str, object]
    """The objects that the handlers of the routes use, by the names of their parameters."""
    background: tuple[Callable[[], Coroutine[Any, Any, None]], ...]
    """The tasks that run while the API serves."""


def make_context(
    settings: Settings,
    *,
    store: ObjectStore,
    publisher: Publisher,
    checks: Mapping[Concern, Check],
    read_offsets: ReadOffsets,
    clock: Callable[[], dt.datetime] = utc_now,
) -> ApiContext:
    """Return the context of the API over any store and publisher."""
    state = Health()
    access = access_of(settings, clock=clock)
    requests = Requests(store, publisher, clock=clock)
    backfills = Backfills(store, requests.claims, clock=clock)
    places = StreamPlaces()
    reader = SummaryReader(store, cache_bytes=settings.api_cache_bytes)
    processable = ProcessableDates(clock)
    completeness_reader = CompletenessReader(store, reader, processable, clock=clock)
    readiness = Readiness(state, checks)
    background = [measure_loop_lag, readiness.watch, KeyFile(settings, access).watch, IndexCheck(reader).run]
    if settings.api_completeness_days:
        background.append(Completeness(store, reader, days=settings.api_completeness_days, clock=clock).run)
    return ApiContext(
        access=access,
        health=state,
        dependencies={
            "requests": requests,
            "backfills": backfills,
            "backfill_stream": backfill_stream(backfills, places),
            "schedules": Schedules(store, clock=clock),
            "processable": processable,
            "event_stream": request_stream(requests, places),
            "reader": reader,
            "completeness": completeness_reader,
            "missing_cities": MissingCities(store, reader, completeness_reader),
            "pipeline": Pipeline(store, readiness, read_offsets, clock=clock),
            "countries": CountryNames(reader.countries),
            "response_cache": ResponseCache(settings.api_response_cache_bytes),
            "quarantine": Quarantine(store, publisher, clock=clock),
            "days_max": settings.api_range_days_max,
            "access": access,
            "readiness": readiness,
        },
        background=tuple(background),
    )


def make_app(
    settings: Settings,
    context: ApiContext,
    *,
    connected: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext,
) -> Litestar:
    """Return the API. Its state has the context. It serves while it is inside ``connected``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with connected():
            current: ApiContext = app.state.context
            background = [asyncio.create_task(run()) for run in current.background]
            current.health.started = True
            try:
                yield
            finally:
                for task in background:
                    task.cancel()
                shut_down_tracing()

    registry = registry_of("api")
    app = Litestar(
        route_handlers=[
            _api_router(ForeignPages(settings), needs_key=context.access.needs_key),
            *health.HANDLERS,
            *documentation.handlers(topic_prefix=settings.topic_prefix),
            *page_handlers(),
        ],
        dependencies={
            **{name: _provided(name) for name in context.dependencies},
            "registry": Provide(lambda: registry, sync_to_thread=False),
        },
        exception_handlers=exception_handlers(),
        state=State({"context": context}),
        lifespan=[lifespan],
        cors_config=cors_config(settings.api_cors_origins),
        openapi_config=openapi_config(),
        logging_config=None,  # structlog is configured once, for the whole process
    )
    # These wrap the router, so that requests that match no route are logged too.
    app.asgi_handler = AccessLog(SecurityHeaders(SizeLimits(HeadAndOptions(Compression(app.asgi_handler)))))
    if settings.api_trusted_proxies:
        behind_proxy: Any = ProxyHeadersMiddleware  # uvicorn and Litestar type the same interface differently
        app.asgi_handler = behind_proxy(app.asgi_handler, settings.api_trusted_proxies)
    return app


def serve(settings: Settings) -> None:
    """Serve the API until a signal stops the process. Open requests get a few seconds to finish."""
    configure_logging(settings)
    app = create_app(settings)
    health: Health = app.state.context.health
    with contextlib.suppress(KeyboardInterrupt):
        ApiServer(app, settings, on_stop=health.stop).run()


def _api_router(foreign_pages: ForeignPages, *, needs_key: bool) -> Router:
    """Return the router of the operations that need access and whose queries are checked."""

    # Litestar would copy a bound method, and with it the keys and rates; and it would call others in threads.
    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        foreign_pages.guard(connection, handler)
        connection.app.state.context.access.guard(connection, handler)

    return Router(
        path="/",
        route_handlers=[
            *request_routes.HANDLERS,
            *backfill_routes.HANDLERS,
            *schedule_routes.HANDLERS,
            *quarantine.HANDLERS,
            *statistics.HANDLERS,
            *completeness_routes.HANDLERS,
            *pipeline.HANDLERS,
            *access_routes.HANDLERS,
        ],
        before_request=check_query,
        guards=[guard],
        security=KEY if needs_key else [*NO_KEY, *KEY],
    )


def _provided(name: str) -> Provide:
    def provide(request: Request[Any, Any, Any]) -> object:
        context: ApiContext = request.app.state.context
        return context.dependencies[name]

    return Provide(provide, sync_to_thread=False)
