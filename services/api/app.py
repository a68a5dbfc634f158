"""The API service, wired."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
from collections.abc import AsyncIterator, Callable, Mapping

import structlog
import uvicorn
from litestar import Litestar
from litestar.di import Provide

from services.api import health
from services.api.auth import access_of
from services.api.documentation.asyncapi_page import asyncapi_handlers
from services.api.documentation.openapi import docs_handlers, openapi_config
from services.api.health import Check, Readiness
from services.api.http.date_range import ProcessableDates
from services.api.http.problems import exception_handlers
from services.api.middleware.access_log import AccessLog
from services.api.middleware.compression import Compression
from services.api.middleware.cors import cors_config
from services.api.middleware.head_and_options import HeadAndOptions
from services.api.middleware.security_headers import Hardening
from services.api.quarantine import list_quarantine
from services.api.requests.event_stream import RequestEventStream
from services.api.requests.ranges import RangeRequests
from services.api.requests.service import Requests
from services.api.routes.requests import api_router
from services.api.statistics.cache import ResponseCache
from services.api.statistics.countries import CountryNames
from services.api.statistics.reader import SummaryReader
from services.api.web.page import page_handlers
from shared.domain.ids import utc_now
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher, Publisher
from shared.runtime.health import Health, measure_loop_lag
from shared.runtime.logging import configure_logging
from shared.runtime.metrics import Concern
from shared.runtime.settings import Settings
from shared.storage.object_store import ObjectStore
from shared.storage.s3 import S3Store

SHUTDOWN_GRACE_S = 5
CLOSE_TIMEOUT_S = 2.0
PUBLISHED = (Topic.PROCESS_REQUESTS,)

_log = structlog.get_logger()


def create_app(settings: Settings) -> Litestar:
    """Return the API over the S3 and the Kafka of the settings. It starts without either, and says so when asked."""
    store = S3Store(settings)
    publisher = KafkaPublisher(settings, source="api")

    @contextlib.asynccontextmanager
    async def connected() -> AsyncIterator[None]:
        async with store:
            try:
                yield
            finally:
                # A producer that Kafka has left alone would wait for it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        await publisher.__aexit__(None, None, None)

    return assemble(
        settings,
        store=store,
        publisher=publisher,
        checks={"s3": store.check, "kafka": lambda: publisher.check(PUBLISHED)},
        connected=connected,
    )


def assemble(
    settings: Settings,
    *,
    store: ObjectStore,
    publisher: Publisher,
    checks: Mapping[Concern, Check],
    connected: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext,
    clock: Callable[[], dt.datetime] = utc_now,
) -> Litestar:
    """Return the API over any store and publisher; it serves while it is inside of ``connected``."""
    state = Health()
    access = access_of(settings)
    requests = Requests(store, publisher, clock=clock)
    reader = SummaryReader(store, cache_bytes=settings.api_cache_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        measuring = asyncio.create_task(measure_loop_lag())
        try:
            async with connected():
                state.started = True
                yield
        finally:
            measuring.cancel()

    app = Litestar(
        route_handlers=[
            api_router(access),
            health.live,
            health.ready,
            health.metrics,
            *docs_handlers(),
            *asyncapi_handlers(topic_prefix=settings.topic_prefix),
            *page_handlers(),
        ],
        dependencies={
            "requests": _provided(requests),
            "ranges": _provided(RangeRequests(store, requests, clock=clock)),
            "processable": _provided(ProcessableDates(settings.api_date_first, settings.api_days_ahead_max, clock)),
            "request_days_max": _provided(settings.api_request_days_max),
            "following": _provided(RequestEventStream(requests)),
            "reader": _provided(reader),
            "countries": _provided(CountryNames(reader.countries)),
            "answers": _provided(ResponseCache(settings.api_response_cache_bytes)),
            "quarantine": _provided(functools.partial(list_quarantine, store)),
            "days_max": _provided(settings.api_range_days_max),
            "readiness": _provided(Readiness(state, checks)),
        },
        exception_handlers=exception_handlers(),
        lifespan=[lifespan],
        cors_config=cors_config(settings.api_cors_origins),
        openapi_config=openapi_config(),
        logging_config=None,  # structlog is configured once, for the whole process
    )
    # Around the router, so that a path of no route is logged too.
    app.asgi_handler = AccessLog(Hardening(HeadAndOptions(Compression(app.asgi_handler))))
    return app


def serve(settings: Settings) -> None:
    """Serve the API until the process is asked to stop; then end what is under way within a few seconds."""
    configure_logging(settings)
    uvicorn.run(
        create_app(settings),
        host=settings.api_host,
        port=settings.api_port,
        loop="uvloop",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
    )


def _provided(thing: object) -> Provide:
    return Provide(lambda: thing, sync_to_thread=False)
