"""All processes of Tripfold over the fakes, in one event loop: run to rest, with calls broken by a schedule.

Besides the four services there are jobs (`Job`): an operator's rebuild, repair and gc, an aggregate's build of the
tables, and a planner's look at the backfills. A test starts each one. A job can pause at a call while the services go
on. A crashed one leaves its unfinished work behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from services.aggregate.audit.mend import mend_objects
from services.aggregate.audit.repair import repair_dates
from services.aggregate.audit.verify import verify_dates
from services.aggregate.bucket_reader import Dates
from services.aggregate.consumer import CityStatsConsumer
from services.aggregate.replay.generations import GenerationState, drop, list_generations
from services.aggregate.replay.rebuild import Rebuild
from services.aggregate.replay.topic_reader import RawReader, RewindableReader, TopicReader
from services.aggregate.requests.consumer import RequestProgressConsumer
from services.aggregate.requests.requeue import Requeue
from services.aggregate.tables.builder import TableBuilder
from services.api.quarantine.service import Quarantine, QuarantineFilter
from services.ingest.isolated import run_through_outages
from services.ingest.jobs.backfills import BackfillAdvancer
from services.ingest.jobs.schedules import ScheduleRunner
from services.ingest.planner.planner import Planner
from services.ingest.retries import Retries
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker.city_day import CityDayIngest
from services.ingest.worker.isolation import IsolatedTask, Isolation
from services.ingest.worker.worker import Worker
from shared.domain import events, keys, objects
from shared.domain.backfills import date_at, new_backfill, request_id_of
from shared.domain.errors import OperatorError
from shared.domain.events import Background, ProcessRequested
from shared.domain.ids import RequestId, derive_request_id
from shared.domain.objects import (
    Backfill,
    GenerationPointer,
    Manifest,
    Plan,
    QuarantineReport,
    RequestRecord,
    Schedule,
    ScheduledRun,
    Summary,
)
from shared.domain.requests import new_record, request_event
from shared.domain.topics import Topic
from shared.domain.volume import VolumeRules
from shared.kafka.failed_keys import FailedKeys, KeyResult
from shared.kafka.failed_keys import Process as Handler
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import ConsumedRecord
from shared.runtime.health import Health
from shared.runtime.metrics import Concern
from shared.runtime.retry import DependencyUnavailable, Retrier
from shared.storage import active_requests
from shared.storage.backfills import change_backfill, open_backfill, read_open
from shared.storage.object_store import ObjectStore
from shared.storage.repository import begin_retry
from shared.storage.schedules import claim_run
from tests.fakes.builders import Clock, UpstreamState, daily_schedule
from tests.fakes.faults import Break, Crash, PortCalls, ProcessLife
from tests.fakes.log import (
    PARTITIONS,
    BreakablePublisher,
    BreakableRecordPublisher,
    BreakableTopicReader,
    MemoryLog,
    MemoryPublisher,
    MemoryTopicReader,
)
from tests.fakes.oracle import Oracle
from tests.fakes.store import BreakableAdminStore, BreakableStore, MemoryStore
from tests.fakes.upstream import BreakableUpstream, MemoryUpstream
from tripfold.operate.dead_letters import RETRIED_MAX, DeadLetterFilter, list_dead_letters, send_back
from tripfold.operate.expire import expire_raw
from tripfold.operate.gc import collect_garbage
from tripfold.operate.republish import republish
from tripfold.operate.restore import highest_revision, raise_floor, reissue
from tripfold.operate.topic_audit import TopicAudit

DATE = dt.date(2024, 5, 1)
ROUNDS_MAX = 500
PAUSES_MAX = 500
UPLOAD_PART_BYTES = 64
GC_AGE = dt.timedelta(days=7)
EXPIRE_AGE = dt.timedelta(days=30)
TASK_DEADLINE_S = 60.0
OUTAGE_LIMIT_S = 3_600.0
STALLED_AFTER = dt.timedelta(minutes=10)
REQUEUE_LISTED_MAX = 2
DROP_GRACE = dt.timedelta(minutes=15)

_Result = TypeVar("_Result")
_Intended = TypeVar("_Intended", Manifest, Plan)

_threads = ThreadPoolExecutor(4, thread_name_prefix="fold")  # more than one: a paused stream holds its own


class NotAtRest(BaseException):  # no retry may catch it
    """The processes do not come to rest."""


class WatchedHealth(Health):
    """Records each retried fault that the fakes did not make: an error of our own."""

    def __init__(self, unexpected: list[str]) -> None:
        super().__init__()
        self._unexpected = unexpected

    def failing(self, what: Concern, reason: str, *, detail: str = "", still_ready: bool = False) -> None:
        super().failing(what, reason, detail=detail, still_ready=still_ready)
        if "was refused" not in reason and "was lost" not in reason:
            self._unexpected.append(f"{what}: {reason}")


class Slept(msgspec.Struct):
    """The time that all processes have slept, which is their monotonic clock."""

    seconds: float = 0.0


class QuickRetrier(Retrier):
    """Sleeps for no time, and gives up after so many retries that no more work can arrive."""

    def __init__(self, health: Health, slept: Slept) -> None:
        super().__init__(health=health, wait_max_s=1)
        self._pauses = 0
        self._slept = slept

    def now_s(self) -> float:
        return self._slept.seconds

    async def sleep(self, seconds: float) -> None:
        self._slept.seconds += seconds
        self._pauses += 1
        if self._pauses > PAUSES_MAX:
            raise NotAtRest(f"after {PAUSES_MAX} waits: {self.health.faults}")
        await asyncio.sleep(0)


class Role(msgspec.Struct, frozen=True):
    """The topic that a process consumes, and how many records it takes at a time."""

    topic: Topic
    batch_records_max: int


BREAKING = b"/breaking/"
"""A part of the keys of records whose handling always fails, as by a fault in the code."""

ROLES = {
    "planner": Role(Topic.PROCESS_REQUESTS, 1),
    "worker": Role(Topic.CITY_TASKS, 2),
    "background": Role(Topic.BACKGROUND_TASKS, 2),
    "retries": Role(Topic.RETRIES, 5),
    "aggregate": Role(Topic.CITY_STATS, 3),
    "progress": Role(Topic.REQUEST_PROGRESS, 20),
}


class Process(ProcessLife):
    """One life of one of the four processes, with its own objects; it keeps nothing from the life before."""

    def __init__(self, world: World, role: str, number: int) -> None:
        super().__init__(f"{role}-{number}", world.port_calls)
        self.role = role
        self.member = world.log.join(role, ROLES[role].topic)
        self.health = WatchedHealth(world.unexpected)
        self.retrier = world.make_retrier(self.health)
        self.store = world.make_bucket(self)
        self.publisher = world.make_publisher(self)
        self.upstream = BreakableUpstream(world.upstream, self)
        self.process = _with_a_fault(world.make_handler(self))
        self.failed_keys = FailedKeys(ROLES[role].topic, self.publisher, self.health, self.store)


class IsolatedLife(ProcessLife):
    """One life of a process that runs one task for its parent. It pauses and resumes with its parent."""

    def __init__(self, parent: Process) -> None:
        super().__init__(f"{parent.name}-isolated", parent.port_calls)
        self.paused, self.resumed = parent.paused, parent.resumed


class Job(ProcessLife):
    """One run of an operator's command. It ends by itself, by a fault or by a crash."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name, world.port_calls)
        self.store = BreakableAdminStore(world.store, self)
        self.publisher = BreakableRecordPublisher(MemoryPublisher(world.log, source=name), self)
        self.ended_well = False
        self.refused: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended and is not paused."""
        return self._task is None or self._task.done()

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run until it ends or pauses before a call."""
        self._task = asyncio.create_task(self._work(work))
        await _until_still(self, self._task)

    async def resume(self, *, calls: int | None = None) -> None:
        """Resume it until it ends, or for this many calls."""
        self.calls_left = calls
        self.paused.clear()
        self.resumed.set()
        assert self._task is not None
        await _until_still(self, self._task)

    async def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            self.ended_well = True
        except (DependencyUnavailable, OperatorError) as error:
            self.refused = str(error)  # the operator sees it and runs the command again
        except BaseException as error:
            if not is_crash(error):
                raise


class RecordingStore(MemoryStore):
    """A MemoryStore that records every manifest, plan and summary, and each manifest written before its raw object.

    A write that only adds or removes a write intent is not recorded.
    """

    def __init__(self, clock: Callable[[], dt.datetime], *, part_bytes: int) -> None:
        super().__init__(clock, part_bytes=part_bytes)
        self.manifests: list[Manifest] = []
        self.plans: list[Plan] = []
        self.summaries: list[Summary] = []
        self.early_manifests: list[str] = []
        self.lost_reports: list[str] = []

    async def delete(self, key: str) -> None:
        self._note_lost_report(key)
        await super().delete(key)

    def _note_lost_report(self, key: str) -> None:
        """Note a report that gc takes away although its file was refused within GC_AGE."""
        stored = self.objects.get(key)
        if stored is not None and key.startswith(keys.QUARANTINE) and is_readable(QuarantineReport, key, stored.body):
            report = objects.decode(QuarantineReport, stored.body, key)
            if not report.expired and self._clock() - stored.last_modified < GC_AGE:
                self.lost_reports.append(key)

    def write(self, key: str, body: bytes) -> str:
        if key.startswith(keys.MANIFESTS) and (manifest := self._changed(Manifest, key, body)):
            self.manifests.append(manifest)
            self.early_manifests += [key] if manifest.raw_key not in self.objects else []
        elif key.startswith(keys.PLANS) and (plan := self._changed(Plan, key, body)):
            self.plans.append(plan)
        elif key.startswith(keys.SUMMARIES):
            self.summaries.append(objects.decode(Summary, body, key))
        elif key.startswith(keys.QUARANTINE) and objects.decode(QuarantineReport, body, key).expired:
            self._note_lost_report(key)
        return super().write(key, body)

    def _changed(self, kind: type[_Intended], key: str, body: bytes) -> _Intended | None:
        """Return an object without its write intent, or None if the stored one is the same."""
        after = msgspec.structs.replace(objects.decode(kind, body, key), write_intent=UNSET)
        stored = self.objects.get(key)
        if stored is None or not is_readable(kind, key, stored.body):
            return after
        before = msgspec.structs.replace(objects.decode(kind, stored.body, key), write_intent=UNSET)
        return after if after != before else None


def is_readable(kind: type[objects.BucketObject], key: str, body: bytes) -> bool:
    """Return whether an object can be decoded."""
    try:
        objects.decode(kind, body, key)
    except objects.CorruptObject:
        return False
    return True


class World:
    """The bucket, the log, the upstream and the processes between them.

    ``broken`` says which calls break, by their number since this world began. A crashed process is started again at its
    next turn, and gets the records that it had not committed.
    """

    commit_first = False
    volume_rules: VolumeRules | None = None

    def __init__(
        self, broken: Mapping[int, Break] | None = None, *, etags: bool = True, chunk_bytes: int = 100
    ) -> None:
        self.clock = Clock(dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC))
        self.store = self.make_store()
        self.store.write(keys.CURRENT, objects.encode(GenerationPointer(changes_counted_since=self.clock())))
        self._etags = etags
        self.log = MemoryLog()
        self.upstream = MemoryUpstream(chunk_bytes=chunk_bytes, etags=etags)
        self.oracle = Oracle()
        self.port_calls = PortCalls(broken)
        self.unexpected: list[str] = []
        self.resumed = 0
        self.deaths = 0
        self.isolated_deaths = 0
        self.attempts = 0
        self.requests = 0
        self.minted = 0
        self.lost_records: set[RequestId] = set()
        self.rebuilds = 0
        self.backfills = 0
        self.dead_letters = 0
        self._settled_tables: Any = None
        self._requeue: Requeue | None = None
        self._slept = Slept()
        self._living: dict[str, Process] = {}
        self._standing_still: list[tuple[Process, asyncio.Task[None]]] = []

    def make_store(self) -> RecordingStore:
        """Build the bucket, with small upload parts."""
        return RecordingStore(self.clock, part_bytes=UPLOAD_PART_BYTES)

    def make_retrier(self, health: Health) -> Retrier:
        """Build the retrier of a process."""
        return QuickRetrier(health, self._slept)

    def make_bucket(self, life: ProcessLife) -> ObjectStore:
        """Build the bucket as a process uses it."""
        return BreakableStore(self.store, life)

    def make_publisher(self, life: ProcessLife) -> Publisher:
        """Build the publisher of a process."""
        return BreakablePublisher(MemoryPublisher(self.log, source=life.name.partition("-")[0]), life)

    def continued(self, broken: Mapping[int, Break] | None = None, *, losing: Collection[int] = ()) -> Self:
        """Return a separate world with new processes that continues from this one; its log may lose records."""
        world = type(self)(broken, etags=self._etags)
        world.clock.now = self.clock.now
        world.store.objects = dict(self.store.objects)
        world.store.unfinished = list(self.store.unfinished)
        world.log = self.log.copy(losing)
        world.upstream.city_list = self.upstream.city_list
        world.upstream.files = dict(self.upstream.files)
        world.oracle = self.oracle.copy()
        world.attempts = self.attempts
        world.requests = self.requests
        world.minted = self.minted
        world.rebuilds = self.rebuilds
        world.backfills = self.backfills
        world.dead_letters = self.dead_letters
        return world

    def lose_the_log(self) -> None:
        """Delete all records and offsets, as after the loss of Kafka; new processes start."""
        self.log = MemoryLog()
        self._requeue = None
        self._living.clear()

    def clock_of(self, role: str) -> Callable[[], dt.datetime]:
        """Return the clock of a role's processes."""
        del role
        return self.clock

    def make_handler(self, process: Process) -> Handler:
        """Build the batch handler of a process, as the services wire it."""
        retry_policy = UpstreamRetryPolicy(
            CircuitBreaker(process.retrier), attempts_max=10, outage_limit_s=OUTAGE_LIMIT_S
        )
        match process.role:
            case "planner":
                planner = Planner(
                    process.store,
                    process.publisher,
                    process.upstream,
                    clock=self.clock_of(process.role),
                    retry_policy=retry_policy,
                    allow_no_cities=True,
                )
                return planner.process
            case "worker" | "background":
                isolation = Isolation(partial(self._run_isolated, process))
                ingest = self._make_ingest(process, process.retrier, isolation=isolation)
                return Worker(ingest, process.publisher, retrier=process.retrier).process
            case "retries":
                return Retries(process.publisher, clock=self.clock_of("worker"), retrier=process.retrier).process
            case "aggregate":
                return CityStatsConsumer(process.store, process.publisher, cache_bytes=100_000).process
            case _:
                return RequestProgressConsumer(
                    process.store,
                    process.publisher,
                    clock=self.clock_of(process.role),
                    retrier=process.retrier,
                    interval_s=0,
                ).process

    def _make_ingest(self, life: ProcessLife, retrier: Retrier, **options: Any) -> CityDayIngest:
        return CityDayIngest(
            self.make_bucket(life),
            self.make_publisher(life),
            BreakableUpstream(self.upstream, life),
            clock=self.clock_of("worker"),
            retry_policy=UpstreamRetryPolicy(CircuitBreaker(retrier), attempts_max=10, outage_limit_s=3600),
            threads=_threads,
            streams=1,
            deadline_s=TASK_DEADLINE_S,
            mint_attempt=self._mint_attempt,
            volume_rules=self.volume_rules,
            **options,
        )

    async def _run_isolated(self, parent: Process, isolated: IsolatedTask) -> bool:
        """Run a task in a process of its own; return False if that process crashed."""
        child = IsolatedLife(parent)
        ingest = self._make_ingest(child, parent.retrier, crashes=isolated.crashes)
        try:
            await run_through_outages(ingest, isolated.task, parent.retrier)
        except BaseException as error:
            if is_crash(error) and not parent.dead:
                self.isolated_deaths += 1
                return False
            raise
        return True

    def request(
        self,
        truth: UpstreamState,
        *,
        joining: bool = True,
        background: Background | UnsetType = UNSET,
        lost: bool = False,
        date: dt.date = DATE,
    ) -> RequestId:
        """Request a date while the upstream holds ``truth``, as the API or a backfill does; nothing runs yet.

        Without ``joining``, the publisher ignores the date's other requests. If ``lost``, Kafka loses the event.
        """
        truth.write_into(self.upstream, date)
        self.requests += 1
        request_id = self._mint_request_id()
        if joining:
            request_id = at_once(active_requests.join(self.store, date, request_id))
        if keys.request(request_id) not in self.store.objects:
            accepted = RequestRecord(
                request_id=request_id,
                date=date,
                requested_at=self.clock(),
                updated_at=self.clock(),
                background=background,
            )
            if not lost:
                self._publish(request_event(accepted), source="api")
            self.store.write(keys.request(request_id), objects.encode(accepted))
        self.oracle.requested(request_id, truth)
        return request_id

    def end_other_requests(self, count: int) -> None:
        """Write the records of requests of another date that have ended."""
        for _ in range(count):
            request_id = self._mint_request_id()
            ended = msgspec.structs.replace(new_record(request_id, DATE - dt.timedelta(days=1)), planned=True)
            self.store.write(keys.request(request_id), objects.encode(ended))

    def _mint_request_id(self) -> RequestId:
        """Return an id with a later time than that of the one before."""
        self.minted += 1
        return derive_request_id(self.clock() + dt.timedelta(milliseconds=self.minted), f"request {self.minted}")

    def retry(self, request_id: RequestId, truth: UpstreamState) -> None:
        """Retry a request's failed cities while the upstream holds ``truth``; nothing runs yet."""
        truth.write_into(self.upstream, DATE)
        self.clock.advance(60)
        record = at_once(begin_retry(self.store, request_id, self.clock()))
        assert record is not None
        self._publish(request_event(record), source="api")
        self.oracle.requested(request_id, truth)

    def _publish(self, requested: ProcessRequested, *, source: str) -> None:
        headers = events.headers_of(requested, source=source)
        self.log.append(requested.topic, requested.key.encode(), events.encode(requested), headers)

    async def run_to_rest(self, *, resume_after_rounds: int = ROUNDS_MAX) -> None:
        """Let every process take turns until every record of every topic is committed.

        A paused process resumes after this many rounds of the others, if they take so long.
        """
        for rounds in range(ROUNDS_MAX):
            turns = [await self.turn(role) for role in ROLES]
            if not any(turns):
                return
            if rounds >= resume_after_rounds:
                await self.resume_paused()
        raise NotAtRest(f"after {ROUNDS_MAX} rounds")

    async def run_turns(self, turns: int) -> int:
        """Let the processes take this many turns with work to do; return how many they found."""
        taken = 0
        for _ in range(ROUNDS_MAX):
            before = taken
            for role in ROLES:
                if taken == turns:
                    return taken
                taken += await self.turn(role)
            if taken == before:
                break
        return taken

    async def resume_paused(self) -> None:
        """Resume the paused processes after others have done their work."""
        while self._standing_still:
            process, task = self._standing_still.pop()
            self.resumed += 1
            process.paused.clear()
            process.resumed.set()
            if not await _until_still(process, task):
                self._standing_still.append((process, task))

    def living(self, role: str) -> Process:
        """Return the process of a role."""
        return self._living[role]

    def replace(self, role: str, process: Process | None = None) -> None:
        """Give a role to another process: a new one, or a previous one."""
        self._living[role] = process or Process(self, role, self.deaths + 1)
        self._living[role].member.rejoin()

    @property
    def roles_living(self) -> list[str]:
        """Return the roles that have a process now."""
        return list(self._living)

    @property
    def has_paused_process(self) -> bool:
        """Whether a process is paused."""
        return bool(self._standing_still)

    async def rebuild(self, *, from_kafka: bool = False, seed: int | None = None, calls: int | None = None) -> Job:
        """Rebuild all summaries, or activate generation ``seed``; take over from any earlier rebuild."""
        self.rebuilds += 1
        token = f"token-{self.rebuilds}"
        job = self._job(f"rebuild-{self.rebuilds}", calls=calls)
        replay = MemoryTopicReader.of(self.log, Topic.CITY_STATS) if from_kafka else None

        async def work() -> None:
            rebuild = self.make_rebuild(job, token, BreakableTopicReader(replay, job) if replay else None, seed=seed)
            rebuilt = await rebuild.run(take_over=True)
            if not rebuilt.flipped:
                raise Refused(f"not made live: {rebuilt.refused}")

        await job.run(work)
        return job

    def make_rebuild(self, job: Job, token: str, replay: RawReader | None, *, seed: int | None = None) -> Rebuild:
        """Build the rebuild."""
        return Rebuild(
            job.store,
            job.publisher,
            token=token,
            report=lambda *_: None,
            reader=replay,
            seed=seed,
            pending_bytes_max=1_000,  # so little that country-days come in parts
        )

    async def repair(self, *, drop_lost: bool = False, calls: int | None = None) -> Job:
        """Mend what is unreadable, and repair what verify finds wrong."""
        job = self._job("repair", calls=calls)

        async def work() -> None:
            async for _ in mend_objects(job.store, Dates(), self.clock):
                pass
            async for repaired in repair_dates(
                job.store, job.publisher, Dates(), wait=no_wait, clock=self.clock, drop_lost=drop_lost
            ):
                for one in repaired.country_days:
                    if one.refused is not None:
                        raise Refused(one.refused)

        await job.run(work)
        return job

    async def verify(self) -> list[str]:
        """Verify all dates, and return the differences."""
        job = self._job("verify")
        verified = verify_dates(job.store, Dates(), deep=False, wait=no_wait)
        return [str(difference) async for date in verified for difference in date.differences]

    async def build_tables(self, *, calls: int | None = None) -> Job:
        """Build the Parquet tables of changed months, as an aggregate does every few minutes.

        Each build knows what the last one found in the change index, as in a process that lives on.
        """
        job = self._job("tables", calls=calls)
        builder = TableBuilder(job.store, clock=self.clock)
        builder._moved_months._settled = self._settled_tables

        async def work() -> None:
            await builder.once()
            self._settled_tables = builder._moved_months._settled

        await job.run(work)
        return job

    async def gc(self, *, calls: int | None = None) -> Job:
        """Delete objects that nothing can name any more."""
        job = self._job("gc", calls=calls)

        async def work() -> None:
            async for _ in collect_garbage(
                job.store,
                older_than=GC_AGE,
                quarantine_older_than=GC_AGE,
                deadline_s=TASK_DEADLINE_S,
                dry_run=False,
            ):
                pass

        await job.run(work)
        return job

    async def expire_raw(self, *, calls: int | None = None) -> Job:
        """Let the old raw objects expire."""
        job = self._job("expire", calls=calls)

        async def work() -> None:
            expiring = expire_raw(job.store, Dates(), older_than=EXPIRE_AGE, deadline_s=TASK_DEADLINE_S, dry_run=False)
            async for one in expiring:
                assert one.unreadable == []

        await job.run(work)
        return job

    async def drop_generations(self) -> Job:
        """Delete the summaries of all generations except the live one, as an operator does after a rebuild."""
        job = self._job("drop")

        async def work() -> None:
            for generation in await list_generations(job.store):
                if generation.state is GenerationState.OLD:
                    await drop(job.store, generation.number, grace=DROP_GRACE)

        await job.run(work)
        return job

    async def restore(self) -> Job:
        """Raise the revision floor above every revision in the topic, and republish what the topic knows better."""
        job = self._job("restore")

        @contextlib.asynccontextmanager
        async def open_topic(topic: Topic) -> AsyncIterator[RewindableReader]:
            yield BreakableTopicReader(MemoryTopicReader.of(self.log, topic), job)

        async def work() -> None:
            async with open_topic(Topic.CITY_STATS) as replay:
                highest = await highest_revision(replay, lambda *_: None)
            await raise_floor(job.store, topic=highest, wanted=None, clock=self.clock, dry_run=False)
            audit = TopicAudit(job.store, open_topic, wait=no_wait, report=lambda *_: None)
            async for one in reissue(job.store, job.publisher, audit):
                if one.refused is not None:
                    raise Refused(one.refused)
            await self._republish(job)

        await job.run(work)
        return job

    async def republish(self) -> Job:
        """Republish the bucket to the compacted topics."""
        job = self._job("republish")
        await job.run(lambda: self._republish(job))
        return job

    async def _republish(self, job: Job) -> None:
        async for one in republish(job.store, job.publisher, Dates()):
            if one.unreadable:
                raise Refused(str(one.unreadable))

    async def retry_quarantined(self) -> Job:
        """Retry all files in quarantine."""
        job = self._job("retry")

        async def work() -> None:
            await Quarantine(job.store, job.publisher, clock=self.clock).retry(QuarantineFilter())

        await job.run(work)
        return job

    async def retry_dead_letters(self) -> Job:
        """Send back all dead letters that were not sent back yet."""
        job = self._job("send-back")

        @contextlib.asynccontextmanager
        async def open_topic() -> AsyncIterator[TopicReader]:
            yield BreakableTopicReader(MemoryTopicReader.of(self.log, Topic.DEAD_LETTERS), job)

        async def work() -> None:
            listing = await list_dead_letters(open_topic, DeadLetterFilter(), limit=RETRIED_MAX)
            waiting = [letter.id for letter in listing.letters if letter.retried_at is None]
            await send_back(open_topic, job.publisher, waiting, clock=self.clock)

        await job.run(work)
        return job

    def open_backfill(self, first: dt.date, last: dt.date, **options: object) -> RequestId:
        """Open a backfill, as the API does; nothing is requested yet."""
        self.backfills += 1
        backfill_id = derive_request_id(self.clock(), str(self.backfills))
        backfill = msgspec.structs.replace(new_backfill(backfill_id, first, last, now=self.clock()), **options)
        at_once(open_backfill(self.store, backfill))
        return backfill_id

    def change_backfill(self, backfill_id: RequestId, rule: Callable[[Backfill, dt.datetime], Backfill]) -> None:
        """Pause, resume, cancel or retry a backfill, as the API does."""
        at_once(change_backfill(self.store, backfill_id, rule, self.clock()))

    def lose_records(self, backfill_id: RequestId) -> None:
        """Lose the records of the requests that a backfill waits for."""
        backfill = self.backfill(backfill_id)
        for position in backfill.under_way:
            request_id = request_id_of(backfill, date_at(backfill, position))
            if self.store.objects.pop(keys.request(request_id), None) is not None:
                self.lost_records.add(request_id)

    async def change_backfill_slowly(
        self, backfill_id: RequestId, rule: Callable[[Backfill, dt.datetime], Backfill], *, calls: int
    ) -> Job:
        """Change a backfill as the API does, which pauses after some calls."""
        job = self._job("api", calls=calls)

        async def work() -> None:
            await change_backfill(job.store, backfill_id, rule, self.clock())

        await job.run(work)
        return job

    def backfill(self, backfill_id: RequestId) -> Backfill:
        """Return a backfill."""
        key = keys.backfill(backfill_id)
        return objects.decode(Backfill, self.store.objects[key].body, key)

    @property
    def open_backfills(self) -> tuple[RequestId, ...]:
        """The ids of the backfills that may have work left."""
        return at_once(read_open(self.store))

    async def advance_jobs(self, *, clock_off_by: dt.timedelta = dt.timedelta(0), calls: int | None = None) -> Job:
        """Let a planner with a clock of its own look at all backfills once."""
        job = self._job("jobs", calls=calls)
        clock = self.clock_of("planner")
        await job.run(
            BackfillAdvancer(
                job.store, job.publisher, clock=lambda: clock() + clock_off_by, stalled_after=STALLED_AFTER
            ).once
        )
        return job

    def set_schedule(self, name: str, **options: object) -> Schedule:
        """Make a schedule, as the API does: at six each day in Prague, for the day before."""
        schedule = daily_schedule(self.clock(), name=name, **{"timezone": "Europe/Prague", **options})
        self.store.write(keys.schedule(name), objects.encode(schedule))
        return schedule

    def schedule(self, name: str) -> Schedule:
        """Return a schedule."""
        key = keys.schedule(name)
        return objects.decode(Schedule, self.store.objects[key].body, key)

    async def claim_run(self, name: str) -> None:
        """Claim a run of a schedule for the date of the world; a planner starts it."""
        self.backfills += 1
        run = ScheduledRun(
            due=self.clock(),
            backfill_id=derive_request_id(self.clock(), str(self.backfills)),
            first=DATE,
            last=DATE,
            claimed_at=self.clock(),
        )
        await claim_run(self.store, name, lambda _: run)

    async def run_schedules(self, *, clock_off_by: dt.timedelta = dt.timedelta(0), calls: int | None = None) -> Job:
        """Let a planner with a clock of its own look at all schedules once."""
        job = self._job("schedules", calls=calls)
        clock = self.clock_of("planner")
        await job.run(ScheduleRunner(job.store, clock=lambda: clock() + clock_off_by).once)
        return job

    async def requeue_once(self) -> Job:
        """Requeue the requests that are stalled at the present time."""
        job = self._job("requeue")

        async def work() -> None:
            clock = self.clock_of("requeue")
            await Requeue(job.store, job.publisher, clock=clock, after=STALLED_AFTER, wait_max=STALLED_AFTER).once()

        await job.run(work)
        return job

    def _job(self, name: str, *, calls: int | None = None) -> Job:
        job = Job(self, name)
        job.calls_left = calls
        return job

    async def requeue(self) -> None:
        """Let a process that lives on requeue the stalled requests. It looks at all records now and then."""
        self.clock.advance(STALLED_AFTER.total_seconds())
        if self._requeue is None:
            self._requeue = Requeue(
                self.store,
                MemoryPublisher(self.log, source="requeue"),
                clock=self.clock_of("requeue"),
                after=STALLED_AFTER,
                wait_max=STALLED_AFTER,
                listed_max=REQUEUE_LISTED_MAX,
            )
        await self._requeue.once()

    async def turn(self, role: str, *, partitions: Sequence[int] = range(PARTITIONS)) -> bool:
        """Let a process handle its next batch; return whether there was one."""
        process = self._living.get(role)
        if process is None:
            process = self._living[role] = Process(self, role, self.deaths)
        batch = await process.member.take(ROLES[role].batch_records_max, partitions=partitions)
        if not batch:
            return False
        handling = asyncio.create_task(self._handle(process, batch))
        if not await _until_still(process, handling):
            self._standing_still.append((process, handling))
            self._forget(process)
        return True

    async def _handle(self, process: Process, batch: Sequence[ConsumedRecord]) -> None:
        try:
            if self.commit_first:
                await self._commit(process, batch)
            work = partial(process.failed_keys.handle, process.process, list(batch))
            await process.retrier.retry_until_available("batch", work)
            if not self.commit_first:
                await self._commit(process, batch)
        except BaseException as error:
            if not is_crash(error):
                raise
            self._forget(process)

    async def _commit(self, process: Process, batch: Sequence[ConsumedRecord]) -> None:
        try:
            await process.make_call("commit", lambda: process.member.commit(batch), KafkaUnavailable, effect=True)
        except KafkaUnavailable:
            return  # the batch may come again

    def _forget(self, process: Process) -> None:
        if self._living.get(process.role) is process:
            del self._living[process.role]
            self.deaths += 1

    def _mint_attempt(self) -> str:
        self.attempts += 1
        return f"attempt-{self.attempts}"


def _with_a_fault(handler: Handler) -> Handler:
    """Return a handler that fails for each BREAKING key in the same way, and handles the others."""

    async def handle(batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        breaking = [record for record in batch if BREAKING in (record.key or b"")]
        results = await handler([record for record in batch if record not in breaking])
        fault = TypeError("a record was refused, whatever was tried")
        return [*results, *(KeyResult(str(record.key), [record], fault) for record in breaking)]

    return handle


def at_once(step: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a step to its end while nothing else runs."""
    while True:
        try:
            step.send(None)
        except StopIteration as ended:
            return ended.value  # type: ignore[no-any-return]  # what the step returns


async def _until_still(life: ProcessLife, task: asyncio.Task[None]) -> bool:
    """Wait until a task has ended or its process is paused; return whether it has ended."""
    pausing = asyncio.create_task(life.paused.wait())
    await asyncio.wait([task, pausing], return_when=asyncio.FIRST_COMPLETED)
    pausing.cancel()
    if task.done():
        await task
    return task.done()


async def no_wait(_look: int) -> None:
    """Let other tasks run, in place of a wait."""
    await asyncio.sleep(0)


class Refused(OperatorError):
    """A command did not do its work."""


def is_crash(error: BaseException) -> bool:
    """Tell whether an error, or a group of errors, is a crash of the process."""
    return isinstance(error, Crash) or (isinstance(error, BaseExceptionGroup) and error.subgroup(Crash) is not None)
