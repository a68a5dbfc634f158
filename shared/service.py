"""What running a service of event handlers takes: its waiting for what it needs, its health page, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog
import uvicorn
from faststream.asgi import AsgiFastStream, AsgiResponse, get
from faststream.kafka import KafkaBroker
from prometheus_client import make_asgi_app

from shared.consuming import SHUTDOWN_GRACE_S
from shared.health import REGISTRY, Health
from shared.patience import Patience, Stopping
from shared.publishing import KafkaPublisher
from shared.settings import Settings
from shared.store import S3Store
from shared.topics import Topic
from shared.topics_admin import require_topics

Background = Callable[[Patience], Awaitable[None]]

_log = structlog.get_logger()


class Surroundings:
    """What every event-handling service stands on: the bucket, the publisher, and patience with both."""

    def __init__(self, settings: Settings, *, source: str) -> None:
        self.settings = settings
        self.health = Health()
        self.patience = Patience(health=self.health, wait_max_s=settings.retry_wait_max_s)
        self.store = S3Store(settings)
        self.publisher = KafkaPublisher(settings, source=source)


def make_app(
    surroundings: Surroundings,
    broker: KafkaBroker,
    *,
    topics: tuple[Topic, ...],
    background: tuple[Background, ...] = (),
    resources: tuple[contextlib.AbstractAsyncContextManager[object], ...] = (),
) -> AsgiFastStream:
    """Return the service as an ASGI app: health and metrics over HTTP, and the broker's subscribers.

    The order in which things start does not matter: before it subscribes, the service waits for S3, for Kafka and
    for ``topics``, alive but not ready.
    """
    patience = surroundings.patience
    health = surroundings.health

    @get
    async def live(_scope: object) -> AsgiResponse:
        return AsgiResponse(b"", status_code=204)

    @get
    async def ready(_scope: object) -> AsgiResponse:
        body = json.dumps({"ready": health.ready, "started": health.started, "faults": health.faults}).encode()
        headers = {"content-type": "application/json"}
        return AsgiResponse(body, status_code=200 if health.ready else 503, headers=headers)

    async def begin() -> None:
        try:
            await patience.wait_out("S3", surroundings.store.check)
            await patience.wait_out("Kafka", surroundings.publisher.check)
            await patience.wait_out("topics", lambda: require_topics(surroundings.settings, topics))
            await patience.wait_out("consuming", broker.start)
        except Stopping:
            return
        health.started = True
        _log.info("ready")

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(surroundings.store)
            await stack.enter_async_context(surroundings.publisher)
            for resource in resources:
                await stack.enter_async_context(resource)
            tasks = [asyncio.create_task(begin())]
            tasks += [asyncio.create_task(_run(job, patience)) for job in background]
            try:
                yield
            finally:
                patience.stopping.set()
                await broker.stop()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    return AsgiFastStream(
        asgi_routes=[
            ("/health/live", live),
            ("/health/ready", ready),
            ("/metrics", make_asgi_app(registry=REGISTRY)),
        ],
        lifespan=lifespan,
        logger=None,
    )


async def _run(job: Background, patience: Patience) -> None:
    with contextlib.suppress(Stopping):
        await job(patience)


def serve(app: AsgiFastStream, settings: Settings) -> None:
    """Run a service until it is asked to stop by SIGTERM or SIGINT."""
    uvicorn.run(
        app,
        host=settings.health_host,
        port=settings.health_port,
        log_config=None,
        access_log=False,
        loop="uvloop",
        lifespan="on",
        timeout_graceful_shutdown=int(SHUTDOWN_GRACE_S),
    )
