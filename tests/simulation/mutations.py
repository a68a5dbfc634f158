"""Promises about time, each broken on purpose, and a schedule whose simulation must notice it."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from services.aggregate.consumer import CityStatsConsumer
from services.ingest.upstream.errors import OutageTooLong, TransientUpstreamError, UpstreamDown
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker import city_day, upstream_clock
from services.ingest.worker.attempts import Attempts
from services.ingest.worker.city_day import CityDayIngest, CityResult
from services.ingest.worker.isolation import CRASHES_MAX, IsolatedTask, Isolation
from services.ingest.worker.upstream_clock import UpstreamClock
from shared.domain import keys
from shared.domain.events import IngestCity
from shared.domain.ids import CityId
from shared.domain.objects import GenerationPointer
from shared.kafka import consumer
from shared.kafka.poll import Poll
from shared.runtime import clock, retry
from shared.storage.bucket_check import BucketCheck
from shared.storage.object_store import StoreUnavailable
from tests.fault import mutations
from tests.simulation.steps import DATES, GC_AGE_S, GOOD_FILES, Step, first_file

FIRST = DATES[0]
CITY = 1
WITHDRAWN_FOR, CORRECTED = first_file(CITY), GOOD_FILES[3]


class TimeMutation(msgspec.Struct, frozen=True, kw_only=True):
    """One broken promise: a patch, and schedules of which at least one shows it.

    A ``rare`` one needs a pause at a certain moment: one random schedule of some 500 shows it.
    """

    name: str
    patch: Callable[[pytest.MonkeyPatch], None]
    schedules: tuple[tuple[Step, ...], ...]
    rare: bool = False


def deadline_ignored(patch: pytest.MonkeyPatch) -> None:
    """Let a worker wait for a file without end."""
    begin = UpstreamClock.__init__

    def patient(self: UpstreamClock, _deadline_s: float) -> None:
        begin(self, 1e9)

    patch.setattr(UpstreamClock, "__init__", patient)
    patch.setattr(city_day, "ATTEMPT_LIMIT_TIMES", 1e9)


def deadline_of_everything(patch: pytest.MonkeyPatch) -> None:
    """Let the time that S3 takes count as the upstream's."""
    ingest = CityDayIngest._ingest

    async def impatient(self: CityDayIngest, task: IngestCity, *, holds_slot: bool) -> CityResult:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await ingest(self, task, holds_slot=holds_slot)
        except TimeoutError as error:
            raise TransientUpstreamError("the city-day took longer than its deadline") from error

    patch.setattr(CityDayIngest, "_ingest", impatient)


def breaks_blamed(patch: pytest.MonkeyPatch) -> None:
    """Let the upstream pay for each download that breaks off, also if S3 has held it up."""
    patch.setattr(upstream_clock, "HELD_MAX_S", 1e9)


def notes_condemn(patch: pytest.MonkeyPatch) -> None:
    """Let a note that could not be removed within five seconds count as a crash."""
    end, run = Attempts.end, Isolation.run

    async def hasty(self: Attempts, date: dt.date, city_id: CityId) -> None:
        try:
            async with asyncio.timeout(5):
                await end(self, date, city_id)
        except (StoreUnavailable, TimeoutError):
            self._process = uuid.uuid4().hex  # it does not know its notes

    async def condemn(self: Isolation, task: IngestCity) -> None:
        run_child = self._run_child
        self._run_child = lambda one: run_child(IsolatedTask(one.task, CRASHES_MAX))
        await run(self, task)

    patch.setattr(Attempts, "end", hasty)
    patch.setattr(Isolation, "run", condemn)


def session_lost_early(patch: pytest.MonkeyPatch) -> None:
    """Let consumers lose their partitions after a batch of five seconds, long before its deadline."""
    patch.setattr(consumer, "POLL_INTERVAL_SLACK_S", -175.0)


def waiting_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let a planner wait in its batch until the upstream is back, or down for too long."""

    async def in_place(self: UpstreamRetryPolicy, attempt: Callable[[], Awaitable[Any]]) -> Any:
        began_s = self._retrier.now_s()
        while True:
            try:
                return await self.run_once(attempt, down_s=self._retrier.now_s() - began_s)
            except OutageTooLong:
                raise
            except UpstreamDown:
                continue

    patch.setattr(UpstreamRetryPolicy, "run_at_once", in_place)


def no_backoff(patch: pytest.MonkeyPatch) -> None:
    """Retry at once while the bucket is unavailable."""
    patch.setattr(retry, "WAIT_FIRST_S", 0.0)


def counted_too_early(patch: pytest.MonkeyPatch) -> None:
    """Let the aggregate count a change in the change index before it writes the summary."""
    fold_group = CityStatsConsumer._fold_group

    async def count_and_fold(self: CityStatsConsumer, group: list[Any], current: GenerationPointer) -> Any:
        await self._changes.count(current.live, {keys.month_of(group[0].event.date)})
        return await fold_group(self, group, current)

    async def count_nothing(_self: CityStatsConsumer, _folded: object) -> None:
        return

    patch.setattr(CityStatsConsumer, "_fold_group", count_and_fold)
    patch.setattr(CityStatsConsumer, "_count", count_nothing)


def asked_at_once(patch: pytest.MonkeyPatch) -> None:
    """Ask all partitions at once, as FastStream does."""

    async def take(_self: Poll, consumer: Any, *, records_max: int, wait_ms: int, **_: object) -> list[Any]:
        polled = await consumer.getmany(timeout_ms=wait_ms, max_records=records_max)
        return [record for records in polled.values() for record in records]

    patch.setattr(Poll, "take", take)


def ages_without_suspension(patch: pytest.MonkeyPatch) -> None:
    """Measure the time between two looks at the change index by a clock that stands still on a suspended host."""
    patch.setattr(clock.SuspendCountingClock, "__call__", lambda _: vars(clock)["time"].monotonic())


def check_begins_anew(patch: pytest.MonkeyPatch) -> None:
    """Let a process wait for 1.5 s for a whole check of the bucket, and forget what a slower one has proven."""
    check = BucketCheck.__call__

    async def forgetful(self: BucketCheck) -> None:
        try:
            async with asyncio.timeout(1.5):
                await check(self)
        except TimeoutError as error:
            self._passed = self._writes = False
            raise StoreUnavailable("no response") from error

    patch.setattr(BucketCheck, "__call__", forgetful)


def corrected_while_suspended(host: str) -> tuple[Step, ...]:
    """Correct a file while a host is suspended, for so long that gc deletes the counters of the correction."""
    return (
        Step(1.0, "request", (FIRST,)),
        Step(GC_AGE_S + 60, "gc"),
        Step(GC_AGE_S + 120, "request", (FIRST,)),
        Step(GC_AGE_S + 300, "suspend", (host, GC_AGE_S + 200)),
        Step(GC_AGE_S + 310, "put_file", (CITY, FIRST, CORRECTED)),
        Step(GC_AGE_S + 320, "request", (FIRST,)),
        Step(2 * GC_AGE_S + 400, "gc"),
    )


def taken_back_while_paused(at_s: float, paused: str, other: str) -> tuple[Step, ...]:
    """Pause a worker that has read a correction, until another has found that the upstream took the correction back."""
    return (
        Step(1.0, "request", (FIRST,)),
        Step(30.0, "put_file", (CITY, FIRST, CORRECTED)),
        Step(30.0, "request", (FIRST,)),
        Step(at_s, "pause", (other, 40.0)),
        Step(at_s, "pause", (paused, 100.0)),
        Step(at_s + 1, "put_file", (CITY, FIRST, WITHDRAWN_FOR)),
        Step(at_s + 5, "request", (FIRST,)),
        Step(at_s + 150, "wait"),
    )


SLOW_BUCKET = (
    *(Step(at_s, "request", (date,)) for at_s, date in zip((1.0, 2.0, 3.0), DATES, strict=True)),
    Step(1.0, "store_slow", (3_600.0, 10.0)),
    *(Step(600.0 * turn, "put_file", (CITY, FIRST, GOOD_FILES[turn % 4])) for turn in range(1, 6)),
    *(Step(600.0 * turn, "request", (FIRST,)) for turn in range(1, 6)),
    Step(3_600.0, "wait"),
)

TIME_MUTATIONS = (
    TimeMutation(
        name="deadline ignored",
        patch=deadline_ignored,
        schedules=((Step(0.0, "upstream_trickles", (60.0,)), Step(1.0, "request", (FIRST,)), Step(70.0, "wait")),),
    ),
    TimeMutation(
        name="the deadline of everything",
        patch=deadline_of_everything,
        schedules=(SLOW_BUCKET,),
    ),
    TimeMutation(
        name="a download that S3 held up costs an attempt",
        patch=breaks_blamed,
        schedules=(SLOW_BUCKET,),
    ),
    TimeMutation(
        name="a note that cannot be removed counts as a crash",
        patch=notes_condemn,
        schedules=(SLOW_BUCKET,),
    ),
    TimeMutation(
        name="session lost early",
        patch=session_lost_early,
        schedules=((Step(1.0, "request", (FIRST,)), Step(5.0, "slow", (300.0, 200.0)), Step(300.0, "wait")),),
    ),
    TimeMutation(
        name="missing backoff",
        patch=no_backoff,
        schedules=((Step(1.0, "request", (FIRST,)), Step(4.0, "store_down", (10.0,)), Step(14.0, "wait")),),
    ),
    TimeMutation(
        name="index written before its summary",
        patch=counted_too_early,
        schedules=((Step(1.0, "request", (FIRST,)),),),
    ),
    TimeMutation(
        name="a planner that waits for the upstream",
        patch=waiting_in_place,
        schedules=(
            (
                Step(1.0, "upstream_down", (400.0,)),
                *(Step(2.0, "request", (date,)) for date in DATES),
                Step(20.0, "backfill", ("bucket",)),
                Step(400.0, "wait"),
            ),
        ),
    ),
    TimeMutation(
        name="all partitions asked at once",
        patch=asked_at_once,
        schedules=((Step(1.0, "append_undecodable", ("city-stats", 30.0)), Step(2.0, "request", (FIRST,))),),
    ),
    TimeMutation(
        name="ages that leave out the suspension of a host",
        patch=ages_without_suspension,
        schedules=(corrected_while_suspended("reader"),),
    ),
    TimeMutation(
        name="a check of the bucket that begins anew",
        patch=check_begins_anew,
        schedules=((Step(0.0, "store_far", (1.0,)), Step(1.0, "request", (FIRST,))),),
    ),
    TimeMutation(
        name="a write intent left by a check",
        patch=mutations.unconfirmed,
        rare=True,
        schedules=tuple(
            taken_back_while_paused(at_s, paused, other)
            for at_s in (33.2, 36.8, 33.5, 33.0, 35.0, 34.5, 35.5, 34.0, 36.0)
            for paused, other in (("worker-1", "worker-2"), ("worker-2", "worker-1"))
        ),
    ),
)
