"""Runs a service of event handlers: startup checks, health endpoints, graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any

import msgspec
import structlog
import uvicorn
from faststream.asgi import AsgiResponse
from faststream.kafka import KafkaBroker
from prometheus_client import CollectorRegistry, make_asgi_app

from shared.domain.topics import Topic
from shared.kafka.producer import PROBE_TIMEOUT_MS, KafkaPublisher
from shared.kafka.skip_markers import SkipMarkers
from shared.kafka.subscription import SHUTDOWN_GRACE_S, Subscription
from shared.runtime.health import Health, measure_loop_lag
from shared.runtime.metrics import Concern, Part, registry_of
from shared.runtime.retry import Retrier, Stopping, run_all
from shared.runtime.settings import Settings
from shared.runtime.tracing import shut_down_tracing
from shared.storage.bucket_check import BucketCheck
from shared.storage.s3 import S3Store

Background = Callable[[Retrier], Awaitable[None]]
Check = Callable[[], Awaitable[None]]
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]

DISCONNECT_TIMEOUT_S = 8.0
KAFKA_INTERVAL_S = 3.0
BUCKET_INTERVAL_S = 10.0
"""Every second check tries a write. So a bucket that cannot be written is reported within 30 s, even if it hangs."""
WATCH_TIMEOUT_S = 8.0
"""A store that hangs is reported as soon as this. Its client would wait for a minute or more."""

_log = structlog.get_logger()


class ServiceContext:
    """The bucket, publisher, health and retrier of one event-handling service."""

    def __init__(self, settings: Settings, *, source: str) -> None:
        self.settings = settings
        self.health = Health()
        self.retrier = Retrier(health=self.health, wait_max_s=settings.retry_wait_max_s)
        self.store = S3Store(settings)
        self.publisher = KafkaPublisher(settings, source=source)
        self.skip_markers = SkipMarkers(self.store, self.publisher)
        self.check_bucket = BucketCheck(self.store, timeout_s=WATCH_TIMEOUT_S)


def make_app(
    context: ServiceContext,
    broker: KafkaBroker,
    *,
    parts: tuple[Part, ...],
    subscriptions: tuple[Subscription, ...],
    publishes: tuple[Topic, ...],
    background: tuple[Background, ...] = (),
    resources: tuple[contextlib.AbstractAsyncContextManager[Any], ...] = (),
) -> AsgiApp:
    """Return the service as an ASGI app: health and metrics over HTTP, with the subscriptions.

    Services can start in any order. Before it subscribes, a service waits for S3, for Kafka and for the topics that it
    consumes and ``publishes``; until then it is live but not ready. (FastStream's own ASGI app exits if Kafka is
    unavailable at the start.) It exports the metrics of its ``parts``.
    """
    retrier = context.retrier
    topics = {*(subscription.topic for subscription in subscriptions), *publishes, Topic.DEAD_LETTERS}

    async def check_kafka() -> None:
        await context.publisher.check(sorted(topics, key=lambda topic: topic.value), timeout_ms=PROBE_TIMEOUT_MS)

    async def begin() -> None:
        await retrier.retry_until_available("s3", context.check_bucket)
        await retrier.retry_until_available("kafka", check_kafka)
        await retrier.retry_until_available("consumer", lambda: start_consumers(broker, subscriptions))
        context.health.started = True
        _log.info("service_ready")
        progress = (subscription.watch(retrier, check_kafka) for subscription in subscriptions)
        await asyncio.gather(*_watches(context, check_kafka), *progress)

    @contextlib.asynccontextmanager
    async def running() -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(shut_down_tracing)
            await stack.enter_async_context(context.store)
            await stack.enter_async_context(context.publisher)
            for resource in resources:
                await stack.enter_async_context(resource)
            tasks = [asyncio.create_task(begin())]
            tasks += [asyncio.create_task(_run(job, retrier)) for job in background]
            tasks.append(asyncio.create_task(measure_loop_lag()))
            try:
                yield
            finally:
                retrier.stopping.set()
                await asyncio.gather(*(subscription.drain() for subscription in subscriptions))
                # A consumer says goodbye to its group. If Kafka hangs, it would wait for 40 s.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                        await broker.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    return health_app(context.health, running, registry_of(*parts))


async def start_consumers(broker: KafkaBroker, subscriptions: Iterable[Subscription]) -> None:
    """Start the consumers that do not run yet, all at once; raise the first error when all have started or failed.

    Each waits until its group is balanced, which takes a few seconds for a new group.
    """
    await broker.connect()
    await run_all(one.begin() for one in subscriptions if not one.consuming)


def health_app(
    health: Health, running: Callable[[], contextlib.AbstractAsyncContextManager[None]], registry: CollectorRegistry
) -> AsgiApp:
    """Return an app with ``/health/live``, ``/health/ready`` and ``/metrics``, which lives inside ``running()``.

    Litestar would take 6 MB of memory for these three routes.
    """
    metrics = make_asgi_app(registry)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            async with running():
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        match scope["path"]:
            case "/health/live":
                response = _json_response({"live": True})
            case "/health/ready":
                body = {"ready": health.ready, "started": health.started, "faults": health.faults}
                response = _json_response(body, status=200 if health.ready else 503)
            case "/metrics":
                response = metrics
            case _:
                response = AsgiResponse(status_code=404)
        await response(scope, receive, send)

    return app


def _json_response(body: dict[str, Any], *, status: int = 200) -> AsgiApp:
    return AsgiResponse(msgspec.json.encode(body), status, {"content-type": "application/json"})


def _watches(context: ServiceContext, check_kafka: Check) -> tuple[Coroutine[Any, Any, None], ...]:
    """Return the checks of S3, and of Kafka and its topics, so that an idle service reports outages too."""

    async def watch(what: Concern, check: Check, interval_s: float, timeout_s: float | None) -> None:
        while not context.retrier.stopping.is_set():
            await context.health.probe(what, check, timeout_s=timeout_s)
            await context.retrier.sleep(interval_s)

    return (
        watch("s3", context.check_bucket, BUCKET_INTERVAL_S, None),
        watch("kafka", check_kafka, KAFKA_INTERVAL_S, WATCH_TIMEOUT_S),
    )


async def _run(job: Background, retrier: Retrier) -> None:
    with contextlib.suppress(Stopping):
        await job(retrier)


def serve(app: AsgiApp, settings: Settings) -> None:
    """Run a service until SIGTERM or SIGINT."""
    uvicorn.run(
        app,
        host=settings.health_host,
        port=settings.health_port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=int(SHUTDOWN_GRACE_S),
    )
