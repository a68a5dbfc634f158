"""Processes of the simulation: they start, are paused, lose their network, are killed and stop.

A process runs the real application of a service: `services.ingest.app` or `services.aggregate.app`. Only its ports are
replaced: the bucket, the producer and the consumer of Kafka, and the upstream.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime as dt
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import pytest
import structlog

import services.aggregate.app
import services.ingest.app
import shared.kafka.consumer
import shared.kafka.producer
import shared.service
from services.api.statistics import listings
from services.ingest.app import make_city_day_ingest
from services.ingest.isolated import run_through_outages
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.worker import city_day
from services.ingest.worker.isolation import IsolatedTask
from shared.domain.topics import Topic
from shared.kafka.consumer import consume
from shared.kafka.failed_keys import KeyResult
from shared.kafka.failed_keys import Process as HandleBatch
from shared.kafka.producer import CHECK_TIMEOUT_MS, KafkaPublisher, KafkaUnavailable
from shared.kafka.records import ConsumedRecord
from shared.kafka.subscription import Subscription
from shared.runtime.health import Health
from shared.runtime.metrics import Concern
from shared.runtime.settings import Settings
from shared.service import AsgiApp, ServiceContext
from shared.storage import change_index
from tests.fakes.faults import Crash
from tests.simulation.kafka import SimulatedBroker, SimulatedProducer
from tests.simulation.steps import GC_AGE_S
from tests.simulation.store import SimulatedStore
from tests.simulation.upstream import SimulatedUpstream
from tests.simulation.virtual_time import PROCESS
from tripfold.operate import gc

if TYPE_CHECKING:
    from tests.simulation.simulation import Simulation

_Result = TypeVar("_Result")

LOOKS_APART_MAX_S = GC_AGE_S / 2

APPS: dict[str, Callable[[Settings], AsgiApp]] = {
    "planner": lambda settings: services.ingest.app.create_app(settings, worker=False),
    "worker": lambda settings: services.ingest.app.create_app(settings, planner=False),
    "aggregate": services.aggregate.app.create_app,
}
"""The application of each role."""


class Process:
    """One run of a process, from its start until it is killed or stopped. Its clock may be wrong."""

    def __init__(self, simulation: Simulation, name: str, *, clock_off_by: dt.timedelta = dt.timedelta(0)) -> None:
        self.simulation = simulation
        self.name = name
        self.dead = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.paused_until_s = 0.0
        self._suspended_until_s = self._suspensions_s = 0.0
        self.cut_off_until_s = 0.0
        self._clock_off_by = clock_off_by
        self._asked_to_stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self.settings: Settings | None = None

    def clock(self) -> dt.datetime:
        """Return the time by the clock of this process."""
        return self.simulation.clock() + self._clock_off_by

    @property
    def suspended_s(self) -> float:
        """For how many seconds its host was suspended until now."""
        return self._suspensions_s - max(0.0, self._suspended_until_s - self.simulation.loop.now_s)

    def suspend(self, seconds: float) -> None:
        """Suspend its host: it makes no calls, and its monotonic clock stands still."""
        now_s = self.simulation.loop.now_s
        until_s = max(self._suspended_until_s, now_s + seconds)
        self._suspensions_s += until_s - max(self._suspended_until_s, now_s)
        self._suspended_until_s = until_s
        self.paused_until_s = max(self.paused_until_s, until_s)

    async def go_on(self) -> None:
        """Wait while the process is paused. Raises Crash after its death."""
        loop = self.simulation.loop
        while not self.dead and (left_s := self.paused_until_s - loop.now_s) > 0:  # noqa: ASYNC110  # may pause again
            await asyncio.sleep(left_s)
        if self.dead:
            raise Crash(f"{self.name} is dead")

    def spawn(self, work: Callable[[], Awaitable[_Result]]) -> asyncio.Task[_Result]:
        """Run a coroutine as a part of this process."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, self.name)

        async def run() -> _Result:
            return await work()

        return context.run(asyncio.get_running_loop().create_task, run(), context=context)

    def start(self, role: str, settings: Settings) -> None:
        """Start the application of a role."""
        self._running = self.spawn(lambda: self._serve(role, settings))

    async def _serve(self, role: str, settings: Settings) -> None:
        self.settings = settings
        with _ports_of(self):
            app = APPS[role](settings)

        async def receive() -> dict[str, str]:
            await self._asked_to_stop.wait()
            return {"type": "lifespan.shutdown"}

        async def send(_message: dict[str, str]) -> None:
            return

        received = iter(({"type": "lifespan.startup"},))

        async def first_then_wait() -> dict[str, str]:
            return next(received, None) or await receive()

        await app({"type": "lifespan"}, first_then_wait, send)

    async def stop(self) -> None:
        """Stop it as SIGTERM does."""
        self._asked_to_stop.set()
        if self._running is not None:
            await asyncio.wait([self._running])
        await self.kill()

    async def kill(self) -> None:
        """Kill it as SIGKILL does. None of its tasks makes another call."""
        self.dead = True
        for _ in range(1_000):
            if not self.tasks:
                return
            for task in list(self.tasks):
                task.cancel()
            await asyncio.sleep(0)
        raise AssertionError(f"tasks of {self.name} survived: {list(self.tasks)}")


class _WatchedHealth(Health):
    """Notes each retried error that is a bug, not an outage."""

    def __init__(self, process: Process) -> None:
        super().__init__(clock_s=process.simulation.loop.time)
        self._process = process

    def failing(self, what: Concern, reason: str, *, detail: str = "", still_ready: bool = False) -> None:
        super().failing(what, reason, detail=detail, still_ready=still_ready)
        self._process.simulation.note_fault(self._process, what, reason)


class _Publisher(KafkaPublisher):
    """The real publisher on a simulated producer."""

    def __init__(self, process: Process, settings: Settings, *, source: str) -> None:
        super().__init__(settings, source=source)
        self._process = process

    async def check(self, topics: Any = (), *, timeout_ms: int = CHECK_TIMEOUT_MS) -> None:
        del topics
        await self._process.go_on()
        if not await self._process.simulation.kafka.reach(self._process, within_s=timeout_ms / 1_000):
            raise KafkaUnavailable("Kafka cannot be reached")

    async def _start(self) -> Any:
        await self._process.go_on()
        return SimulatedProducer(self._process)


def publisher_of(process: Process, settings: Settings) -> KafkaPublisher:
    """Return the publisher of a process that runs no application."""
    return _Publisher(process, settings, source="api")


class _Resource(SimulatedUpstream):
    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


@contextlib.contextmanager
def _ports_of(process: Process) -> Iterator[None]:
    """Let an application that is made meanwhile use the ports of a process."""
    kafka = process.simulation.kafka
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.kafka.consumer, "read_batch", lambda _, *place: kafka.read_batch(process, *place))
        patch.setattr(shared.service, "S3Store", lambda _: SimulatedStore(process))
        patch.setattr(shared.service, "Health", lambda: _WatchedHealth(process))
        patch.setattr(
            shared.service, "KafkaPublisher", lambda settings, source: _Publisher(process, settings, source=source)
        )
        for app in (services.ingest.app, services.aggregate.app):
            patch.setattr(app, "utc_now", process.clock)
            patch.setattr(app, "make_broker", lambda _: SimulatedBroker(process))
            patch.setattr(app, "consume", partial(_consume, process))
        patch.setattr(services.ingest.app, "HttpUpstream", lambda _, circuit: _resource(process, circuit))
        patch.setattr(services.ingest.app, "run_child", partial(_run_isolated, process))
        yield


def _consume(process: Process, broker: Any, topic: Topic, handle: HandleBatch, **options: Any) -> Subscription:
    """Consume a topic, and note which records the handler is given."""

    async def noted(batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        process.simulation.kafka.note_handled(batch)
        return await handle(batch)

    return consume(broker, topic, noted, **options)


async def _run_isolated(process: Process, isolated: IsolatedTask) -> bool:
    """Run a task as a child process does. No file of the simulation crashes it, and it ends with its parent."""
    assert process.settings is not None, "it runs an application"
    with _ports_of(process):
        context = ServiceContext(process.settings, source="ingest")
        upstream, retry_policy = services.ingest.app.make_upstream(context)
        ingest = make_city_day_ingest(context, upstream, retry_policy, crashes=isolated.crashes)
    async with context.publisher:
        await run_through_outages(ingest, isolated.task, context.retrier)
    return True


def _resource(process: Process, circuit: CircuitBreaker) -> _Resource:
    return _Resource(process, circuit)


@contextlib.contextmanager
def without_side_effects() -> Iterator[None]:
    """Leave out what concerns the real process: its memory, its threads, its event loop and its log."""

    async def measure_nothing() -> None:
        await asyncio.Event().wait()

    log_before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services.ingest.app, "tune_allocator", lambda: None)
        patch.setattr(services.aggregate.app, "tune_collector", lambda: None)
        patch.setattr(services.ingest.app, "ThreadPoolExecutor", lambda *_, **__: object())
        patch.setattr(shared.service, "measure_loop_lag", measure_nothing)
        for interval in ("KAFKA_INTERVAL_S", "BUCKET_INTERVAL_S"):
            patch.setattr(shared.service, interval, 60.0)  # most events would come from it
        patch.setattr(city_day, "PROGRESS_INTERVAL_S", 10.0)  # as above
        for module in (change_index, listings):
            patch.setattr(module, "LOOKS_APART_MAX_S", LOOKS_APART_MAX_S)  # so that hours of virtual time are enough
        patch.setattr(gc, "COUNTERS_AGE_MIN", dt.timedelta(seconds=GC_AGE_S))
        patch.setattr(shared.service, "shut_down_tracing", lambda: None)
        try:
            yield
        finally:
            structlog.configure(**log_before)
