"""The state of the pipeline, on demand: how far each consumer group is, and what the latest requests achieved.

Services do not call each other. So this comes from what they share: their offsets on Kafka, and the requests in the
bucket. A report is kept for REPORT_AGE_MAX_S and shared by all clients, so that polling costs little.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

import msgspec
import structlog

from services.api.health import Readiness
from services.api.http.deadline import deadline
from services.api.http.unreadable import get_if_readable
from shared.domain import keys
from shared.domain.objects import RequestRecord
from shared.domain.requests import counts_of, status_of
from shared.domain.topics import Topic
from shared.kafka.group_offsets import GroupOffsets
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import DependencyUnavailable
from shared.storage.object_store import ObjectStore

REPORT_AGE_MAX_S = 3.0
READING_DEADLINE_S = 10.0
RATE_WINDOW_S = 10.0
RECENT = dt.timedelta(hours=1)
RECENT_REQUESTS_MAX = 100
CONCURRENT_GETS_MAX = 16

ReadOffsets = Callable[[], Awaitable[Sequence[GroupOffsets]]]
StageState = Literal["idle", "working", "stopped"]
SERVICES = {
    Topic.PROCESS_REQUESTS: "planner",
    Topic.CITY_TASKS: "worker",
    Topic.BACKGROUND_TASKS: "worker",
    Topic.RETRIES: "worker",
    Topic.CITY_STATS: "aggregate",
    Topic.REQUEST_PROGRESS: "aggregate",
}
"""The service that consumes each topic."""

_log = structlog.get_logger()


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """A consumer group of a service, and how far it is in its topic."""

    service: Annotated[str, msgspec.Meta(description="The service that consumes the topic.", examples=["worker"])]
    topic: Annotated[str, msgspec.Meta(examples=["city-tasks"])]
    state: Annotated[
        StageState,
        msgspec.Meta(
            description="Idle: every record is processed. Working: some are not. Stopped: it has no consumer."
        ),
    ]
    consumers: Annotated[
        int | None, msgspec.Meta(description="The consumers in the group; null: Kafka does not tell.", examples=[2])
    ]
    lag: Annotated[int, msgspec.Meta(ge=0, description="Records that are not processed yet.", examples=[40])]
    records_per_second: Annotated[
        float | None,
        msgspec.Meta(description="Records processed since an earlier report; null: there is no earlier one."),
    ]


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """The work of the requests that made progress in the last hour, of the latest hundred."""

    requests_ended: Annotated[int, msgspec.Meta(ge=0)]
    requests_open: Annotated[int, msgspec.Meta(ge=0, description="Those that have not ended.")]
    cities_done: Annotated[int, msgspec.Meta(ge=0)]
    trips_done: Annotated[int, msgspec.Meta(ge=0)]
    bytes_done: Annotated[int, msgspec.Meta(ge=0)]


class PipelineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the pipeline at a moment. A part that cannot be read is null, and ``faults`` says why."""

    measured_at: dt.datetime
    ready: Annotated[bool, msgspec.Meta(description="Whether the API can reach S3 and Kafka.")]
    faults: Annotated[dict[str, str], msgspec.Meta(description="What cannot be used or read, and why.")]
    stages: Annotated[tuple[Stage, ...] | None, msgspec.Meta(description="In the order of the data flow.")]
    throughput: Throughput | None


class Pipeline:
    """Makes the reports. ``read_offsets`` asks Kafka."""

    def __init__(
        self,
        store: ObjectStore,
        readiness: Readiness,
        read_offsets: ReadOffsets,
        *,
        clock: Callable[[], dt.datetime],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._readiness = readiness
        self._read_offsets = read_offsets
        self._clock = clock
        self._clock_s = clock_s
        self._reporting = asyncio.Lock()
        self._report: tuple[float, PipelineReport] | None = None
        self._earlier: tuple[float, dict[Topic, int]] | None = None  # committed offsets

    async def report(self) -> PipelineReport:
        """Return the latest report; make one first if it is older than REPORT_AGE_MAX_S."""
        async with self._reporting:
            now_s = self._clock_s()
            if self._report is None or now_s - self._report[0] >= REPORT_AGE_MAX_S:
                measured = await self._measure(now_s)
                # In an outage a report takes longer than it is kept. So its age counts from its end.
                self._report = (self._clock_s(), measured)
            return self._report[1]

    async def _measure(self, now_s: float) -> PipelineReport:
        readiness = await self._readiness.report()
        faults = dict(readiness.faults)
        stages = throughput = None
        try:
            async with deadline(READING_DEADLINE_S, "Reading the offsets of the consumer groups"):
                stages = self._stages(await self._read_offsets(), now_s)
        except DependencyUnavailable as error:
            _log.warning("offsets_not_read", error=str(error))
            faults.setdefault("kafka", str(error))
        try:
            async with deadline(READING_DEADLINE_S, "Reading the latest requests"):
                throughput = await self._throughput()
        except DependencyUnavailable as error:
            faults.setdefault("s3", str(error))
        return PipelineReport(
            measured_at=self._clock(),
            ready=readiness.ready,
            faults=faults,
            stages=stages,
            throughput=throughput,
        )

    def _stages(self, offsets: Sequence[GroupOffsets], now_s: float) -> tuple[Stage, ...]:
        committed = {one.topic: one.committed for one in offsets}
        since_s, before = self._earlier or (now_s, {})
        if self._earlier is None or now_s - since_s >= RATE_WINDOW_S:
            self._earlier = (now_s, committed)
        return tuple(
            Stage(
                service=SERVICES[one.topic],
                topic=one.topic.value,
                state="stopped" if one.members == 0 else "working" if one.lag else "idle",
                consumers=one.members,
                lag=one.lag,
                records_per_second=round(max(0, one.committed - before[one.topic]) / (now_s - since_s), 1)
                if one.topic in before
                else None,
            )
            for one in offsets
        )

    async def _throughput(self) -> Throughput:
        now = self._clock()
        recent: list[str] = []
        listed = 0
        async for one in self._store.list(keys.REQUESTS):
            listed += 1
            if now - one.last_modified <= RECENT:
                recent.append(one.key)
            if listed == RECENT_REQUESTS_MAX:
                break
        found = await bounded_map(
            lambda key: get_if_readable(self._store, RequestRecord, key), recent, limit=CONCURRENT_GETS_MAX
        )
        records = [record for record in found if isinstance(record, RequestRecord)]
        counts = [counts_of(record) for record in records]
        ended = sum(status_of(record).ended for record in records)
        return Throughput(
            requests_ended=ended,
            requests_open=len(records) - ended,
            cities_done=sum(one.cities_done for one in counts),
            trips_done=sum(one.trips_done for one in counts),
            bytes_done=sum(one.bytes_done for one in counts),
        )
