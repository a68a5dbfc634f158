"""All processes of Tripfold over the fakes, in one event loop: run to rest, with calls broken as a schedule says."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import msgspec

from services.aggregate.folding import Folder, summary_event
from services.aggregate.progress_folding import ProgressFolder, Sweep
from services.ingest.city_day import CityDayIngest
from services.ingest.parser import fold_trip_file
from services.ingest.planner import Planner
from services.ingest.streaming import Fold
from services.ingest.upstream import Persistence
from services.ingest.worker import Worker
from shared import events, keys, objects
from shared.events import CityDayRetracted, CityDayStats, CountryDayPlanned, CountryDaySummary, Event, ProcessRequested
from shared.health import Health
from shared.identity import RequestId
from shared.objects import Manifest, Plan, QuarantineReport, RequestRecord, Summary
from shared.outbox import events_of_manifest, events_of_plan
from shared.patience import Patience
from shared.publishing import LogUnavailable, Publisher, Received
from shared.requests import retry_of, status_of
from shared.topics import Topic
from tests.fakes import (
    Break,
    BreakablePublisher,
    BreakableStore,
    BreakableUpstream,
    Clock,
    Crash,
    Crossings,
    ExpectedDay,
    Life,
    MemoryLog,
    MemoryPublisher,
    MemoryStore,
    MemoryUpstream,
    Oracle,
    Truth,
)

DATE = dt.date(2024, 5, 1)
ROUNDS_MAX = 500
PAUSES_MAX = 500
SWEEP_AFTER = dt.timedelta(minutes=10)

Handler = Callable[[Sequence[Received]], Awaitable[None]]

_threads = ThreadPoolExecutor(4, thread_name_prefix="fold")  # more than one: a paused stream holds its own


class Stuck(BaseException):  # nothing that waits out faults may catch it
    """The processes do not come to rest."""


class WatchedHealth(Health):
    """Notes what was waited out although it was none of the faults that the fakes make: an error of our own."""

    def __init__(self, unexpected: list[str]) -> None:
        super().__init__()
        self._unexpected = unexpected

    def failing(self, what: str, reason: str) -> None:
        super().failing(what, reason)
        if "was refused" not in reason and "was lost" not in reason:
            self._unexpected.append(f"{what}: {reason}")


class QuickPatience(Patience):
    """Waits no time, but gives up after so many waits that nothing can be coming."""

    def __init__(self, health: Health) -> None:
        super().__init__(health=health, wait_max_s=1)
        self._pauses = 0
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        self._now_s += seconds
        self._pauses += 1
        if self._pauses > PAUSES_MAX:
            raise Stuck(f"after {PAUSES_MAX} waits: {self.health.faults}")
        await asyncio.sleep(0)


class Role(msgspec.Struct, frozen=True):
    """What a process consumes, and how many records at a time."""

    topic: Topic
    batch_records_max: int


ROLES = {
    "planner": Role(Topic.PROCESS_REQUESTS, 1),
    "worker": Role(Topic.CITY_TASKS, 2),
    "aggregate": Role(Topic.CITY_STATS, 3),
    "progress": Role(Topic.REQUEST_PROGRESS, 20),
}


class Process(Life):
    """One life of one of the four processes: objects of its own, nothing kept from the life before it."""

    def __init__(self, world: World, role: str, number: int) -> None:
        super().__init__(f"{role}-{number}", world.crossings)
        self.role = role
        self.patience = QuickPatience(WatchedHealth(world.unexpected))
        self.store = BreakableStore(world.store, self)
        self.publisher = world.make_publisher(self)
        self.upstream = BreakableUpstream(world.upstream, self)
        self.process = world.make_handler(self)


class World:
    """The bucket, the log, the upstream and the processes between them.

    ``broken`` says which calls break, by their number since this world began. A process that died is started again
    at its next turn, and finds the records that it had not committed.
    """

    commit_first = False

    def __init__(
        self, broken: Mapping[int, Break] | None = None, *, etags: bool = True, chunk_bytes: int = 100
    ) -> None:
        self.clock = Clock(dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC))
        self.store = self.make_store()
        self._etags = etags
        self.log = MemoryLog()
        self.upstream = MemoryUpstream(chunk_bytes=chunk_bytes, etags=etags)
        self.oracle = Oracle()
        self.crossings = Crossings(broken)
        self.fold_apart: Fold = fold_trip_file
        self.unexpected: list[str] = []
        self.resumed = 0
        self.deaths = 0
        self.attempts = 0
        self.requests = 0
        self._living: dict[str, Process] = {}
        self._standing_still: list[tuple[Process, asyncio.Task[None]]] = []

    def make_store(self) -> MemoryStore:
        """Build the bucket."""
        return MemoryStore(self.clock)

    def make_publisher(self, process: Process) -> Publisher:
        """Build what a process publishes with."""
        return BreakablePublisher(MemoryPublisher(self.log, source=process.role), process)

    def continued(self, broken: Mapping[int, Break] | None = None, *, losing: Collection[int] = ()) -> Self:
        """Return a world of its own that begins, with new processes, where this one rests; its log may lose records."""
        world = type(self)(broken, etags=self._etags)
        world.clock.now = self.clock.now
        world.store.objects = dict(self.store.objects)
        world.log = self.log.copy(losing)
        world.oracle = self.oracle.copy()
        world.attempts = self.attempts
        world.requests = self.requests
        return world

    def make_handler(self, process: Process) -> Handler:
        """Build what a process of a role does with a batch, as the services wire it."""
        persistence = Persistence(process.patience, attempts_max=10, outage_limit_s=3600)
        match process.role:
            case "planner":
                planner = Planner(
                    process.store, process.publisher, process.upstream, clock=self.clock, persistence=persistence
                )
                return planner.process
            case "worker":
                ingest = CityDayIngest(
                    process.store,
                    process.publisher,
                    process.upstream,
                    clock=self.clock,
                    persistence=persistence,
                    threads=_threads,
                    deadline_s=60,
                    mint_attempt=self._mint_attempt,
                    fold_apart=self.fold_apart,
                )
                # One stream at a time, so that the same call has the same number in every run.
                return Worker(ingest, process.publisher, patience=process.patience, streams=1).process
            case "aggregate":
                return Folder(process.store, process.publisher, cache_bytes=100_000).process
            case _:
                return ProgressFolder(
                    process.store, process.publisher, clock=self.clock, patience=process.patience, interval_s=0
                ).process

    def request(self, truth: Truth) -> RequestId:
        """Ask for the date while the upstream holds ``truth``, as the API does; nothing runs yet."""
        truth.write_into(self.upstream, DATE)
        self.requests += 1
        request_id = RequestId(f"018f38bf-1d00-7000-8000-{self.requests:012x}")
        requested = ProcessRequested(request_id=request_id, date=DATE, requested_at=self.clock())
        headers = events.headers_of(requested, source="api")
        self.log.append(requested.topic, requested.key.encode(), events.encode(requested), headers)
        accepted = RequestRecord(request_id=request_id, date=DATE, requested_at=self.clock(), updated_at=self.clock())
        self.store.write(keys.request(request_id), objects.encode(accepted))
        self.oracle.requested(request_id, truth)
        return request_id

    def retry(self, request_id: RequestId, truth: Truth) -> None:
        """Take up a request's failed cities again while the upstream holds ``truth``; nothing runs yet."""
        truth.write_into(self.upstream, DATE)
        key = keys.request(request_id)
        self.clock.advance(60)
        requested = retry_of(objects.decode(RequestRecord, self.store.objects[key].body, key), self.clock())
        headers = events.headers_of(requested, source="retry")
        self.log.append(requested.topic, requested.key.encode(), events.encode(requested), headers)
        self.oracle.requested(request_id, truth)

    async def run_to_rest(self, *, resume_after_rounds: int = ROUNDS_MAX) -> None:
        """Let every process take its turns until no topic holds anything that is not committed.

        A process that stands still goes on after so many rounds of the others, if they take so long.
        """
        for rounds in range(ROUNDS_MAX):
            turns = [await self.take_turn(role) for role in ROLES]
            if not any(turns):
                return
            if rounds >= resume_after_rounds:
                await self.resume_paused()
        raise Stuck(f"after {ROUNDS_MAX} rounds")

    async def run_turns(self, turns: int) -> int:
        """Let the processes take so many turns that have something to do; return how many they found."""
        taken = 0
        for _ in range(ROUNDS_MAX):
            before = taken
            for role in ROLES:
                if taken == turns:
                    return taken
                taken += await self.take_turn(role)
            if taken == before:
                break
        return taken

    async def resume_paused(self) -> None:
        """Let the processes that stood still go on where they were; others have long done their work."""
        while self._standing_still:
            process, task = self._standing_still.pop()
            self.resumed += 1
            process.resumed.set()
            process.paused.clear()
            await task

    def living(self, role: str) -> Process:
        """Return the process of a role."""
        return self._living[role]

    def replace(self, role: str, process: Process | None = None) -> None:
        """Give a role to another process: a new one, or one that had it before."""
        self._living[role] = process or Process(self, role, self.deaths + 1)

    async def sweep(self) -> None:
        """Send every request on its way again that has made no progress for long."""
        self.clock.advance(SWEEP_AFTER.total_seconds())
        publisher = MemoryPublisher(self.log, source="sweep")
        await Sweep(self.store, publisher, clock=self.clock, after=SWEEP_AFTER).once()

    async def take_turn(self, role: str) -> bool:
        """Let a process handle its next batch; tell whether there was one."""
        process = self._living.get(role)
        if process is None:
            process = self._living[role] = Process(self, role, self.deaths)
        batch = self.log.take(role, ROLES[role].topic, ROLES[role].batch_records_max)
        if not batch:
            return False
        handling = asyncio.create_task(self._handle(process, batch))
        pausing = asyncio.create_task(process.paused.wait())
        await asyncio.wait([handling, pausing], return_when=asyncio.FIRST_COMPLETED)
        pausing.cancel()
        if process.paused.is_set():
            self._standing_still.append((process, handling))
            self._forget(process)
        else:
            await handling
        return True

    async def _handle(self, process: Process, batch: Sequence[Received]) -> None:
        try:
            if self.commit_first:
                await self._commit(process, batch)
            await process.patience.wait_out("handling a batch", lambda: process.process(batch))
            if not self.commit_first:
                await self._commit(process, batch)
        except BaseException as error:
            if not _is_death(error):
                raise
            self._forget(process)

    async def _commit(self, process: Process, batch: Sequence[Received]) -> None:
        async def commit() -> None:
            await asyncio.sleep(0)
            if self._living.get(process.role) is not process:
                raise LogUnavailable("the group has gone on without this member")
            self.log.commit(process.role, batch)

        try:
            await process.cross("commit", commit, LogUnavailable, effect=True)
        except LogUnavailable:
            return  # the batch may come again

    def _forget(self, process: Process) -> None:
        if self._living.get(process.role) is process:
            del self._living[process.role]
            self.deaths += 1

    def _mint_attempt(self) -> str:
        self.attempts += 1
        return f"attempt-{self.attempts}"


def _is_death(error: BaseException) -> bool:
    return isinstance(error, Crash) or (isinstance(error, BaseExceptionGroup) and error.subgroup(Crash) is not None)


def summaries(world: World) -> dict[str, bytes]:
    """Return the bytes of every summary, by key."""
    return world.store.bodies("summaries/")


def inconsistencies(world: World) -> list[str]:
    """Name everything in a world at rest that does not agree with the manifests and plans, whatever it says."""
    return [
        *world.unexpected,
        *_summaries_against_manifests(world),
        *_raw_objects_against_manifests(world),
        *_topics_against_the_bucket(world),
    ]


def differences(world: World) -> list[str]:
    """Name everything in a world at rest that is not as the oracle and the manifests say; empty if all is well.

    Of a world in which a process came back, two things are not asked: how exactly a request ended whose cities were
    fetched partly before and partly after the upstream changed, and that the *last* summary of a country-day in its
    topic is the highest, which is why consumers keep the highest.
    """
    return [
        *world.unexpected,
        *_against_the_oracle(world),
        *_requests_against_the_oracle(world),
        *_summaries_against_manifests(world),
        *_raw_objects_against_manifests(world),
        *_quarantine_against_requests(world),
        *_topics_against_the_bucket(world),
    ]


def unfinished(world: World) -> list[str]:
    """Name the requests that have not come to an end."""
    return [
        f"{record.request_id} is {status_of(record).value}"
        for record in _stored(world, keys.REQUESTS, RequestRecord)
        if not status_of(record).ended
    ]


def _against_the_oracle(world: World) -> list[str]:
    said: dict[str, ExpectedDay] = {
        summary.country: _day_of(summary) for summary in _stored(world, "summaries/", Summary)
    }
    expected = world.oracle.days()
    return [
        f"{country}: expected {expected.get(country)}, found {said.get(country)}"
        for country in sorted({*said, *expected})
        if said.get(country) != expected.get(country)
    ]


def _day_of(summary: Summary) -> ExpectedDay:
    return ExpectedDay(
        **msgspec.structs.asdict(summary.totals),
        has_data=summary.has_data,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
        complete=summary.complete,
    )


def _requests_against_the_oracle(world: World) -> list[str]:
    said = {record.request_id: status_of(record) for record in _stored(world, keys.REQUESTS, RequestRecord)}
    last = max(world.oracle.statuses)
    wrong = [
        f"{request_id}: expected {expected!r}, found {said[request_id].value!r}"
        for request_id, expected in world.oracle.statuses.items()
        if said[request_id].value != expected and (request_id == last or not world.resumed)
    ]
    return wrong + unfinished(world)


def _summaries_against_manifests(world: World) -> list[str]:
    """Compare every ledger with the manifests, entry by entry: each names what the other does."""
    ledgers: dict[tuple[str, str], object] = {
        (summary.country, city_id): (entry.revision, entry.contribution, entry.sha256)
        for summary in _stored(world, "summaries/", Summary)
        for city_id, entry in summary.ledger.items()
    }
    named: dict[tuple[str, str], object] = {}
    for manifest in _stored(world, "manifests/", Manifest):
        named[manifest.country, manifest.city_id] = (manifest.revision, manifest.contribution, manifest.sha256)
        for country, revision in manifest.retracted.items():
            named[country, manifest.city_id] = (revision, None, "")
    return [
        f"ledger of {place}: manifest says {named.get(place)}, found {ledgers.get(place)}"
        for place in sorted({*ledgers, *named})
        if ledgers.get(place) != named.get(place)
    ]


def _raw_objects_against_manifests(world: World) -> list[str]:
    wrong = []
    raw = world.store.bodies("raw/")
    for manifest in _stored(world, "manifests/", Manifest):
        body = raw.get(manifest.raw_key)
        if body is None or hashlib.sha256(body).hexdigest() != manifest.sha256 or len(body) != manifest.size_bytes:
            wrong.append(f"{manifest.raw_key} is not what the manifest of city {manifest.city_id} says")
        wrong += [
            f"{past.raw_key} is named in a history and missing" for past in manifest.history if past.raw_key not in raw
        ]
    return wrong


def _quarantine_against_requests(world: World) -> list[str]:
    """Compare reports with the bytes that they are about, and requests with the reports that they name.

    The same bytes are kept once, unless a process stood still or two were at it side by side.
    """
    wrong = []
    held = world.store.bodies(keys.QUARANTINE)
    reports = [
        objects.decode(QuarantineReport, body, key) for key, body in held.items() if key.endswith(keys.REPORT_SUFFIX)
    ]
    for report in reports:
        body = held.get(report.key, b"")
        if hashlib.sha256(body).hexdigest() != report.sha256 or len(body) != report.size_bytes:
            wrong.append(f"{report.key} is not what its report says")
    kept = [(report.city_id, report.sha256) for report in reports]
    if len(set(kept)) < len(kept) and not world.resumed:
        wrong.append(f"the same file is kept more than once: {kept}")
    named = {report.key for report in reports}
    for record in _stored(world, keys.REQUESTS, RequestRecord):
        for failure in record.failures.values():
            refused = "record" in failure.reason or "array" in failure.reason
            if refused != (failure.quarantine_key in named):
                wrong.append(f"{record.request_id} says {failure.reason!r}, and names {failure.quarantine_key}")
    return wrong


def _topics_against_the_bucket(world: World) -> list[str]:
    """Compare what compaction would leave, and what a careful consumer would keep, with the bucket."""
    stats: dict[str, Event] = {}
    for manifest in _stored(world, "manifests/", Manifest):
        stats |= {event.key: event for event in events_of_manifest(manifest)}
    for plan in _stored(world, "plans/", Plan):
        for country in (*plan.countries, *plan.gone):
            stats |= {event.key: event for event in events_of_plan(plan, country)}
    totals: dict[str, Event] = {event.key: event for event in map(summary_event, _stored(world, "summaries/", Summary))}
    wrong = [f"buried: {record}" for record in world.log.records(Topic.DEAD_LETTERS)]
    for topic, expected in ((Topic.CITY_STATS, stats), (Topic.COUNTRY_DAY_SUMMARIES, totals)):
        published = [events.decode(record.topic, record.value) for record in world.log.records(topic)]
        last = {event.key: event for event in published}
        highest = {event.key: event for event in sorted(published, key=_revision_of)}
        for view, found in (("last", last), ("highest", highest)):
            if view == "last" and topic is Topic.COUNTRY_DAY_SUMMARIES and world.resumed:
                continue
            wrong += [
                f"the {view} record of {key} in {topic.value}: expected {expected.get(key)}, found {found.get(key)}"
                for key in sorted({*expected, *found})
                if found.get(key) != expected.get(key)
            ]
    return wrong


def _revision_of(event: Event) -> int:
    match event:
        case CityDayStats() | CityDayRetracted():
            return event.revision
        case CountryDayPlanned():
            return event.plan_revision
        case CountryDaySummary():
            return event.version
    raise AssertionError(f"{event} has no revision")


_Kind = TypeVar("_Kind", bound=objects.StoredObject)


def _stored(world: World, prefix: str, kind: type[_Kind]) -> list[_Kind]:
    return [objects.decode(kind, body, key) for key, body in world.store.bodies(prefix).items()]
