"""Promises of the design, each broken on purpose, and the runs that must notice it.

A mutation changes the services, or the store that they trust, during one test. Its proof is a series of runs. They
report nothing while the promise holds, which separate tests assert, and at least one complaint while it is broken.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from functools import partial

import msgspec
import pytest
from msgspec import UNSET

from services.aggregate import consumer, summary_writer
from services.aggregate import fold as pure_fold
from services.aggregate.audit import mend
from services.aggregate.consumer import CityStatsConsumer, _Folded
from services.aggregate.fold import StatEvent, empty_summary
from services.aggregate.replay import generations
from services.aggregate.replay.rebuild import Rebuild, Rebuilt
from services.aggregate.requests import fold
from services.aggregate.requests.requeue import Requeue
from services.aggregate.summary_writer import CachedSummary, SummaryWriter
from services.api.statistics import listings
from services.api.statistics.listings import IndexedListings, MonthListing, MonthListings, list_month
from services.ingest.jobs import backfills as jobs_of_planner
from services.ingest.jobs.backfills import BackfillAdvancer
from services.ingest.planner import city_list
from services.ingest.planner.planner import Planner
from services.ingest.upstream.errors import TransientUpstreamError
from services.ingest.worker.city_day import CityDayIngest, CityResult
from services.ingest.worker.manifest import Place
from shared.domain import events, keys, objects
from shared.domain.backfills import retried
from shared.domain.contribution import Contribution, total_of
from shared.domain.events import CityDayRetracted, CityDayStats, Event, IngestCity, Outcome
from shared.domain.ids import CityId, CountrySlug, RequestId, mint_request_id
from shared.domain.objects import (
    Backfill,
    ChangeCounters,
    GenerationPointer,
    LedgerEntry,
    Manifest,
    PastRevision,
    Plan,
    PlanChunks,
    RequestRecord,
    Summary,
)
from shared.domain.outbox import events_of_plan
from shared.domain.topics import Topic
from shared.kafka import consumer as kafka_consumer
from shared.kafka.consumer import DecodedRecord, decode_batch
from shared.kafka.failed_keys import FailedKeys, KeyResult
from shared.kafka.failed_keys import Process as HandleBatch
from shared.kafka.producer import KafkaUnavailable, Publisher
from shared.kafka.records import ConsumedRecord, OutgoingEvent
from shared.storage import active_requests
from shared.storage.change_index import ChangeCounter, _OwnCounters
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import CasConflict, ObjectInfo, ObjectStore, Upload
from shared.storage.repository import Versioned
from tests.fakes.builders import FORGED_STATS, City, UpstreamState
from tests.fakes.faults import Break, ProcessLife
from tests.fakes.handling import handle_all
from tests.fakes.index_race import Race
from tests.fakes.log import PARTITIONS
from tests.fakes.store import BreakableStore
from tests.fakes.upstream import BreakableUpstream
from tests.fault import checks, damage, job_scenarios, jobs, scenarios
from tests.fault.checks import differences, tasks_of_backfills_in_the_foreground, unfinished
from tests.fault.scenarios import CORRECTED, EMPTY, EVENING, HOME, MOVED, WHOLE, Scenario
from tests.fault.watcher import Watcher
from tests.fault.world import BREAKING, DATE, REQUEUE_LISTED_MAX, ROLES, Job, NotAtRest, RecordingStore, World
from tripfold.operate import gc
from tripfold.operate.gc import GcCandidate

RACES = 300

Proof = Callable[[type[World]], AsyncIterator[str]]


class Mutation(msgspec.Struct, frozen=True, kw_only=True):
    """One broken promise: a world of another kind, or a patch, and the runs that must notice it."""

    name: str
    proof: Proof
    kind: type[World] = World
    patch: Callable[[pytest.MonkeyPatch], None] = lambda _: None


CORRECTION = Scenario(
    name="a corrected file",
    before=(WHOLE,),
    state=UpstreamState(cities=HOME, files={1: CORRECTED, 2: EMPTY, 3: EVENING}),
)


def scenario(name: str) -> Scenario:
    """Return a scenario of the crash points by its name."""
    return next(one for one in scenarios.SCENARIOS if one.name == name)


def breaking(name: str) -> Proof:
    """Break every call of a scenario."""
    return partial(scenarios.broken_anywhere, scenario(name))


def pausing(name: str) -> Proof:
    """Let every process of a scenario pause before every call."""
    return partial(scenarios.paused_anywhere, scenario(name))


async def breaking_a_correction(kind: type[World]) -> AsyncIterator[str]:
    """Break every call while a file is corrected."""
    async for one in scenarios.broken_anywhere(CORRECTION, kind):
        yield one


async def pausing_a_correction(kind: type[World]) -> AsyncIterator[str]:
    """Pause before every call while a file is corrected."""
    async for one in scenarios.paused_anywhere(CORRECTION, kind):
        yield one


async def taking_back_a_correction(kind: type[World]) -> AsyncIterator[str]:
    """Let the upstream take a correction back while a process is paused at each of its calls."""
    async for what, world in scenarios.taken_back_anywhere(CORRECTION.state, kind):
        for one in differences(world, one_fault=True):
            yield f"{what}: {one}"


async def losing_records(kind: type[World]) -> AsyncIterator[str]:
    """Lose every record of a first request."""
    first = scenario("a first request: one city good, one empty, one missing")
    async for one in scenarios.losing_anything(first, kind):
        yield one


async def hiding_a_lost_request(kind: type[World]) -> AsyncIterator[str]:
    """Lose a request, and let more requests end than the requeue lists each time."""
    world = kind()
    world.request(WHOLE, lost=True)
    world.end_other_requests(REQUEUE_LISTED_MAX)
    for _ in range(REQUEUE_LISTED_MAX):
        await world.requeue()
        await world.run_to_rest()
    for one in unfinished(world):
        yield one


async def losing_the_log(kind: type[World]) -> AsyncIterator[str]:
    """Lose all topics, with a correction in the bucket that was not folded; the date's next request brings it back."""
    world = kind()
    world.request(WHOLE)
    await world.run_to_rest()
    world.request(CORRECTION.state)
    while await world.turn("planner") or await world.turn("worker"):
        pass
    world.lose_the_log()
    world.request(CORRECTION.state)
    await world.run_to_rest()
    await world.requeue()
    await world.run_to_rest()
    for one in differences(world):
        yield one


async def writing_ids_differently(kind: type[World]) -> AsyncIterator[str]:
    """Let the city list have an id as a number, then as a string, and then as both."""
    world = kind()
    ids = frozenset({1})
    for truth in (WHOLE, msgspec.structs.replace(WHOLE, in_text=ids), msgspec.structs.replace(WHOLE, twice=ids)):
        world.request(truth)
        await world.run_to_rest()
        for one in differences(world):
            yield one


async def cleaning_up(kind: type[World]) -> AsyncIterator[str]:
    """Break every call of gc."""
    (gc,) = (one for one in job_scenarios.SCENARIOS if one.name.startswith("gc"))
    async for one in job_scenarios.broken_anywhere(gc, kind):
        yield one


async def redelivering_everything(kind: type[World]) -> AsyncIterator[str]:
    """Deliver every record of the statistics topic again, and check the world after each batch."""
    world = kind()
    watcher = Watcher(world)
    for truth in (WHOLE, UpstreamState(cities=MOVED, files={1: CORRECTED, 2: EMPTY, 3: EVENING}), WHOLE):
        world.request(truth)
        await world.run_to_rest()
        for one in await watcher.complaints():
            yield one
    for partition in world.log.ends(Topic.CITY_STATS):
        world.log.rewind("aggregate", Topic.CITY_STATS, partition, 1_000)
    while await world.turn("aggregate"):
        for one in await watcher.complaints():
            yield one
    for one in differences(world):
        yield one


async def breaking_a_backfill(_kind: type[World]) -> AsyncIterator[str]:
    """Break every call of the planners while a backfill runs."""
    async for one in jobs.broken_anywhere(DATE, DATE):
        yield one


async def losing_a_record_of_a_retry(_kind: type[World]) -> AsyncIterator[str]:
    """Lose the record of a failed date after a backfill has claimed its retry."""
    world = jobs.JobsWorld(failing=(DATE,))
    backfill_id = world.open_backfill(DATE, DATE)
    for one in await world.finish(backfill_id):
        yield one
    world.change_backfill(backfill_id, retried)
    await world.advance_jobs()
    world.lose_records(backfill_id)
    for one in await world.finish(backfill_id):
        yield one


async def crashing_before_the_record(kind: type[World]) -> AsyncIterator[str]:
    """Crash a planner wherever it requests a date of a backfill that another request processes."""
    for calls in range(job_scenarios.MANY_CALLS):
        world = kind()
        world.request(WHOLE)
        await world.turn("planner")
        world.open_backfill(DATE, DATE)
        job = await world.advance_jobs(calls=calls)
        has_ended = job.ended
        job.dead = True
        await job.resume()
        for _ in range(3):
            await world.run_to_rest()
            await world.advance_jobs()
        for one in tasks_of_backfills_in_the_foreground(world):
            yield f"after {calls} calls: {one}"
        if has_ended:
            return


async def breaking_a_retry_of_a_backfill(_kind: type[World]) -> AsyncIterator[str]:
    """Break every call of the planners while a backfill runs and its failed date is retried."""
    async for one in jobs.broken_anywhere(DATE, DATE, failing=(DATE,)):
        yield one


async def spelling_a_country_anew(kind: type[World]) -> AsyncIterator[str]:
    """Let the city list spell a country in another way, which sorts before the first one."""
    world = kind()
    for country in ("armenia", "Armenia"):
        world.request(UpstreamState(cities=(City(1, country),), files={1: CORRECTED}))
        await world.run_to_rest()
        for one in differences(world):
            yield one


async def damaging_each_object(kind: type[World]) -> AsyncIterator[str]:
    """Damage or remove each object of a bucket, request its date and another one, and mend the bucket."""
    world = kind()
    for state in (WHOLE, CORRECTION.state):
        world.request(state)
        await world.run_to_rest()
    world.open_backfill(DATE, DATE)
    await world.advance_jobs()
    for number in range(len(world.store.objects)):
        for body in (b"{", None):
            copy = world.continued()
            keys_of = damage.damage(copy, [number], body)
            found = [] if keys_of[0] in damage.STOPPING else await damage.go_on(copy, CORRECTION.state)
            await damage.mend(copy, WHOLE, is_lost=body is None)
            found += checks.summaries_against_a_replay(copy) + checks.unfinished(copy)
            for one in found:
                yield f"{keys_of}: {one}"


async def losing_a_summary(kind: type[World]) -> AsyncIterator[str]:
    """Delete the live summaries between two requests that find nothing changed."""
    world = kind()
    world.request(WHOLE)
    await world.run_to_rest()
    for key in world.store.bodies(keys.SUMMARIES):
        del world.store.objects[key]
    world.request(WHOLE)
    await world.run_to_rest()
    for one in differences(world):
        yield one


async def breaking_handlers(kind: type[World]) -> AsyncIterator[str]:
    """Put a record whose handling always fails before the records of a request, in each topic."""
    world = kind()
    for role, one in ROLES.items():
        for partition in range(PARTITIONS):
            world.log.append(one.topic, f"{DATE}{BREAKING.decode()}{role}/{partition}".encode(), b"{}")
            world.dead_letters += 1
    world.request(WHOLE)
    try:
        await world.run_to_rest()
    except NotAtRest as error:
        yield str(error)
        return
    for one_wrong in differences(world):
        yield one_wrong


async def forging_figures(kind: type[World]) -> AsyncIterator[str]:
    """Append statistics with figures and revisions beyond their bounds to those of a request."""
    world = kind()
    world.request(WHOLE)
    await world.run_to_rest()
    for number, value in enumerate(FORGED_STATS):
        world.log.append(Topic.CITY_STATS, f"{DATE}/forged/{number}".encode(), value)
        world.dead_letters += 1
    try:
        await world.run_to_rest()
    except NotAtRest as error:
        yield str(error)
        return
    for one in differences(world):
        yield one


async def watching_progress(kind: type[World]) -> AsyncIterator[str]:
    """Check, with the aggregate behind, that no request is completed before its numbers are served."""
    world = kind()
    watcher = Watcher(world)
    world.request(WHOLE)
    while await world.turn("planner") or await world.turn("worker") or await world.turn("progress"):
        for one in await watcher.complaints():
            yield one
    await world.run_to_rest()
    for one in differences(world):
        yield one


async def building_on_a_lost_response(kind: type[World]) -> AsyncIterator[str]:
    """Lose the response to a manifest's write; another worker builds on it, and then the upstream has no file.

    The city is stored, so the request must not report it as failed.
    """

    class Hasty(kind):  # type: ignore[valid-type, misc]  # its base class is an argument
        def make_store(self) -> RecordingStore:
            return LosesTheFirstResponse(self)

    world = Hasty()
    world.request(UpstreamState(cities=HOME[:1], files={1: EVENING}))
    await world.run_to_rest()
    record = objects.decode(objects.RequestRecord, next(iter(world.store.bodies(keys.REQUESTS).values())), "request")
    if record.failures:
        yield f"a city that was stored is reported as failed: {record.failures}"
    for one in unfinished(world):
        yield one


class LosesTheFirstResponse(RecordingStore):
    """Stores the first manifest and a later one of another worker, removes the file, and raises a conflict."""

    def __init__(self, world: World) -> None:
        super().__init__(world.clock, part_bytes=64)
        self._world = world
        self._lost = False

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        swapped = await super().compare_and_swap(key, body, etag=etag)
        if not key.startswith(keys.MANIFESTS) or self._lost:
            return swapped
        self._lost = True
        first = objects.decode(Manifest, body, key)
        past = PastRevision(
            revision=first.revision,
            attempt=first.attempt,
            raw_key=first.raw_key,
            country=first.country,
            request_id=first.request_id,
            ingested_at=first.ingested_at,
        )
        later = msgspec.structs.replace(
            first,
            revision=first.revision + 1,
            attempt="another",
            request_id=RequestId("018f38bf-1d00-7000-8000-0000000000ff"),
            etag=None,
            history=(past,),
        )
        self.write(key, objects.encode(later))
        self._world.upstream.files.clear()
        raise CasConflict(key)


async def refusing_dead_letters(kind: type[World]) -> AsyncIterator[str]:
    """Break the sending of a poison record to the dead letters in each way: it must be there in the end."""
    for how in Break:
        if how is Break.PAUSE:
            continue
        world = kind()
        world.log.append(Topic.CITY_STATS, b"2024-05-01/poison", b"{")
        world.port_calls.break_after(0, how)
        await world.run_to_rest()
        dead_letters = {record.key for record in world.log.records(Topic.DEAD_LETTERS)}
        if dead_letters != {b"2024-05-01/poison"}:
            yield f"{how.value}: dead letters {dead_letters}"


async def watching_the_aggregate(kind: type[World]) -> AsyncIterator[str]:
    """Pause or crash the aggregate at each of its calls; a reader that has read before looks after every turn."""

    async def corrected() -> tuple[World, Watcher]:
        world = kind()
        watcher = Watcher(world)
        world.request(WHOLE)
        await world.run_to_rest()
        await watcher.look()
        world.request(CORRECTION.state)
        while await world.turn("planner") or await world.turn("worker"):
            pass
        return world, watcher

    calm, _ = await corrected()
    before = len(calm.port_calls.made)
    while await calm.turn("aggregate"):
        pass
    for number, port_call in enumerate(calm.port_calls.made[before:]):
        for how in (Break.PAUSE, Break.DIE_AFTER):
            world, watcher = await corrected()
            world.port_calls.break_after(number, how)
            wrong = []
            while await world.turn("aggregate"):
                wrong += await watcher.complaints()
            await world.resume_paused()
            await world.run_to_rest()
            for one in [*wrong, *await watcher.complaints(at_rest=True)]:
                yield f"call {number} ({port_call.what}), {how.value}: {one}"


async def flipping_under_the_aggregate(kind: type[World]) -> AsyncIterator[str]:
    """Let a rebuild go live while an aggregate has read the pointer and not folded yet; a reader looks in between."""
    for calls in range(job_scenarios.MANY_CALLS):
        world = kind()
        watcher = Watcher(world)
        await job_scenarios.at_rest(world)
        job = await world.rebuild(calls=calls)
        ended = job.ended
        world.request(job_scenarios.CORRECTION)
        while await world.turn("planner") or await world.turn("worker"):
            pass
        world.port_calls.break_after(1, Break.PAUSE)
        await world.turn("aggregate")
        if not ended:
            await job.resume()
        wrong = await watcher.complaints()
        await world.resume_paused()
        wrong += await watcher.complaints()
        await world.run_to_rest()
        for one in [*wrong, *await watcher.complaints(at_rest=True)]:
            yield f"a rebuild that was paused after {calls} calls goes live: {one}"
        if ended:
            return


async def racing(_kind: type[World]) -> AsyncIterator[str]:
    """Interleave writers, gc, an older build and a reader of the change index at random."""
    for seed in range(RACES):
        async for one in Race(random.Random(seed)).complaints():
            yield f"race {seed}: {one}"


# The broken promises.


class BlindStore(RecordingStore):
    """A store whose compare-and-swap ignores the ETag."""

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        del etag
        await asyncio.sleep(0)
        return self.write(key, body)


class BlindSwap(World):
    """Has a store whose compare-and-swap writes without comparing."""

    def make_store(self) -> RecordingStore:
        return BlindStore(self.clock, part_bytes=64)


class CommitFirst(World):
    """Commits a batch before its effects happen."""

    commit_first = True


class OncePublisher:
    """Publishes each event to a topic at most once: a tried event counts as published."""

    def __init__(self, publisher: Publisher, tried: set[bytes]) -> None:
        self._publisher = publisher
        self._tried = tried

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        for item in outgoing:
            value = events.encode(item.event) + repr(item.cause).encode()
            if value not in self._tried:
                self._tried.add(value)
                await self._publisher.publish([item])

    async def send_to_dead_letters(self, record: ConsumedRecord, error: str) -> None:
        await self._publisher.send_to_dead_letters(record, error)


class AtMostOnce(World):
    """Has processes that never publish an event twice, even if the first try may have failed."""

    def __init__(self, broken: Mapping[int, Break] | None = None, *, etags: bool = True) -> None:
        super().__init__(broken, etags=etags)
        self._tried: set[bytes] = set()

    def make_publisher(self, life: ProcessLife) -> Publisher:
        return OncePublisher(super().make_publisher(life), self._tried)


class RawLastStore(BreakableStore):
    """Completes a raw object only after the manifest that names it was written."""

    def __init__(self, store: ObjectStore, life: ProcessLife) -> None:
        super().__init__(store, life)
        self._uploads: list[Upload] = []

    def upload(self, key: str) -> Upload:
        return _Postponed(super().upload(key), self._uploads)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        swapped = await super().compare_and_swap(key, body, etag=etag)
        while key.startswith(keys.MANIFESTS) and self._uploads:
            await self._uploads.pop().complete()
        return swapped


class _Postponed:
    def __init__(self, upload: Upload, postponed: list[Upload]) -> None:
        self._upload = upload
        self._postponed = postponed

    async def write(self, chunk: bytes) -> None:
        await self._upload.write(chunk)

    async def complete(self) -> None:
        self._postponed.append(self._upload)

    async def abort(self) -> None:
        if self._upload not in self._postponed:
            await self._upload.abort()


class RawLast(World):
    """Has workers whose manifest names a raw object that does not exist yet."""

    def make_bucket(self, life: ProcessLife) -> ObjectStore:
        return RawLastStore(self.store, life)


class HastyRebuild(Rebuild):
    """Reads the manifests before the pointer says that a generation is being built."""

    async def _build(self, *, take_over: bool, dry_run: bool) -> Rebuilt:
        self._early = await super()._bucket_events(DATE)
        return await super()._build(take_over=take_over, dry_run=dry_run)

    async def _bucket_events(self, date: dt.date) -> dict[CountrySlug, list[StatEvent]]:
        del date
        return self._early


class ReadsBeforeThePointer(World):
    """Has a rebuild that reads the manifests before it sets the pointer."""

    def make_rebuild(self, job: Job, token: str, replay: object, *, seed: int | None = None) -> Rebuild:
        del replay, seed
        return HastyRebuild(job.store, job.publisher, token=token, report=lambda *_: None)


def pointer_before_the_batch(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate fold by the pointer that it read after the previous batch."""
    known: dict[int, GenerationPointer] = {}
    process = CityStatsConsumer.process

    async def remembered(store: ObjectStore) -> GenerationPointer:
        return known.get(id(store)) or await read_current(store)

    async def process_and_remember(self: CityStatsConsumer, batch: Sequence[ConsumedRecord]) -> Sequence[KeyResult]:
        results = await process(self, batch)
        known[id(self._store)] = await read_current(self._store)
        return results

    patch.setattr(consumer, "read_current", remembered)
    patch.setattr(CityStatsConsumer, "process", process_and_remember)


def live_alone(patch: pytest.MonkeyPatch) -> None:
    """Let aggregates fold into the live generation only."""
    patch.setattr(GenerationPointer, "folded", property(lambda self: (self.live,)))


def the_last_plan_wins(patch: pytest.MonkeyPatch) -> None:
    """Let the fold keep the last plan of a batch instead of the highest."""

    def last(known: tuple[PlanChunks, ...], added: Iterable[PlanChunks]) -> tuple[PlanChunks, ...]:
        return tuple(added)[-1:] or known

    patch.setattr(pure_fold, "_joined_plans", last)


def any_country(patch: pytest.MonkeyPatch) -> None:
    """Accept a task's country, whatever a newer plan says."""

    async def asked(_self: CityDayIngest, task: IngestCity, _previous: Manifest | None) -> Place:
        return Place(country=task.country, country_name=task.country_name, plan_revision=task.plan_revision)

    async def stays(_self: CityDayIngest, _manifest: Manifest) -> None:
        return None

    patch.setattr(CityDayIngest, "_place", asked)
    patch.setattr(CityDayIngest, "_place_after_move", stays)


def conflict_means_loss(patch: pytest.MonkeyPatch) -> None:
    """Let a worker treat every conflict as a write of another worker."""
    patch.setattr(Manifest, "made_by", lambda _self, _attempt: False)


def unconfirmed(patch: pytest.MonkeyPatch) -> None:
    """Let a worker that finds a file unchanged ignore the write intents of others."""

    async def trusting(_self: CityDayIngest, stored: Versioned[Manifest]) -> CityResult:
        return CityResult(outcome=Outcome.UNCHANGED, manifest=stored.value)

    patch.setattr(CityDayIngest, "_confirm_unchanged", trusting)


def any_revision(patch: pytest.MonkeyPatch) -> None:
    """Let the ledger keep the latest entry to arrive, whatever its revision."""

    def keep(ledger: dict[CityId, LedgerEntry], city_id: CityId, entry: LedgerEntry) -> bool:
        changed = ledger.get(city_id) != entry
        ledger[city_id] = entry
        return changed

    patch.setattr(pure_fold, "_keep_greater", keep)


def silent_if_unchanged(patch: pytest.MonkeyPatch) -> None:
    """Let a worker that finds no change publish nothing."""
    publish = CityDayIngest._publish

    async def quiet(self: CityDayIngest, task: IngestCity, finished: CityResult) -> None:
        if finished.outcome is Outcome.UNCHANGED:
            finished = CityResult(outcome=Outcome.UNCHANGED)
        await publish(self, task, finished)

    patch.setattr(CityDayIngest, "_publish", quiet)


def _folding(patch: pytest.MonkeyPatch, change: Callable[[Summary, Sequence[StatEvent]], Summary]) -> None:
    patch.setattr(summary_writer, "fold", lambda summary, folded: change(summary, list(folded)))


def no_retractions(patch: pytest.MonkeyPatch) -> None:
    """Let the fold ignore retractions."""
    fold = pure_fold.fold
    _folding(patch, lambda before, new: fold(before, [one for one in new if not isinstance(one, CityDayRetracted)]))


def no_tombstones(patch: pytest.MonkeyPatch) -> None:
    """Let a retraction remove a city from the ledger without a tombstone."""
    fold = pure_fold.fold

    def forget(before: Summary, new: Sequence[StatEvent]) -> Summary:
        after = fold(before, new)
        left = {city: entry for city, entry in after.ledger.items() if entry.contribution is not None}
        if left == after.ledger:
            return after
        return pure_fold._with_totals(after, left, after.plans)

    _folding(patch, forget)


def adding(patch: pytest.MonkeyPatch) -> None:
    """Let the fold add new contributions to the totals, instead of replacing old ones."""
    fold = pure_fold.fold

    def add(before: Summary, new: Sequence[StatEvent]) -> Summary:
        after = fold(before, new)
        added = [one.contribution for one in new if isinstance(one, CityDayStats)]
        return msgspec.structs.replace(after, totals=total_of([before.totals, *added]))

    _folding(patch, add)


def a_name_that_never_falls(patch: pytest.MonkeyPatch) -> None:
    """Let a summary keep the greatest name that its country ever had."""
    with_totals = pure_fold._with_totals

    def greatest(summary: Summary, ledger: dict[CityId, LedgerEntry], plans: tuple[PlanChunks, ...]) -> Summary:
        after = with_totals(summary, ledger, plans)
        return msgspec.structs.replace(after, country_name=max(summary.country_name, after.country_name))

    patch.setattr(pure_fold, "_with_totals", greatest)


def vanished_taken_for_unchanged(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate write a summary only if an event changes the one that it knows."""
    change = SummaryWriter._change

    async def trusting(
        self: SummaryWriter, generation: int, empty: Summary, apply: Callable[[Summary], Summary]
    ) -> CachedSummary:
        key = keys.summary(generation, empty.date, empty.country)
        known = self._cache.get(key)
        if known and apply(known.summary) is known.summary and await self._store.get(key, first_bytes=0) is None:
            return known
        return await change(self, generation, empty, apply)

    patch.setattr(SummaryWriter, "_change", trusting)


def without_isolation(patch: pytest.MonkeyPatch) -> None:
    """Try a batch again without end, whatever its error is."""

    async def stubborn(_self: FailedKeys, process: HandleBatch, left: list[ConsumedRecord]) -> None:
        await handle_all(process, left)

    patch.setattr(FailedKeys, "handle", stubborn)


def damage_tried_again(patch: pytest.MonkeyPatch) -> None:
    """Wait for an unreadable object of one date as for any other fault of a record."""
    patch.setattr(FailedKeys, "_is_known", lambda _self, _key, _error: False)


class _Unbounded:
    """Decodes statistics without the bounds of their figures and revisions."""

    def __init__(self, strict: msgspec.json.Decoder[Event]) -> None:
        self._strict = strict

    def decode(self, value: bytes) -> Event:
        try:
            return self._strict.decode(value)
        except msgspec.ValidationError:
            body = msgspec.json.decode(value)
            if not isinstance(body, dict) or not isinstance(body.get("contribution"), dict):
                raise
            figures = dict.fromkeys(Contribution.__struct_fields__, 0)
            bounded = self._strict.decode(msgspec.json.encode(body | {"contribution": figures, "revision": 1}))
            contribution = Contribution(**body["contribution"])
            return msgspec.structs.replace(bounded, contribution=contribution, revision=body["revision"])


def any_figure(patch: pytest.MonkeyPatch) -> None:
    """Accept statistics with any figures and revisions."""
    patch.setitem(events._decoders, Topic.CITY_STATS, _Unbounded(events._decoders[Topic.CITY_STATS]))


def completed_before_folded(patch: pytest.MonkeyPatch) -> None:
    """Let a city count as served as soon as its worker has finished."""
    finished = fold._finished

    def early(city: objects.CityUnderWay, event: events.CityFinished) -> objects.CityUnderWay:
        return msgspec.structs.replace(finished(city, event), published={})

    patch.setattr(fold, "_finished", early)


def flip_without_token(patch: pytest.MonkeyPatch) -> None:
    """Let a rebuild make its generation live even if another rebuild took over."""

    async def flip(store: ObjectStore, _token: str, number: int) -> None:
        found = await store.get(keys.CURRENT)
        assert found is not None
        flipped = GenerationPointer(
            live=number, highest=objects.decode(GenerationPointer, found.body, keys.CURRENT).highest
        )
        await store.put(keys.CURRENT, objects.encode(flipped))

    patch.setattr(generations, "flip", flip)


def gc_without_history(patch: pytest.MonkeyPatch) -> None:
    """Let gc keep the current attempt only."""
    judge = gc._judge

    async def forgetful(store: ObjectStore, group: list[ObjectInfo]) -> list[GcCandidate]:
        return await judge(_WithoutHistory(store), group)  # type: ignore[arg-type]  # it only reads manifests

    patch.setattr(gc, "_judge", forgetful)


class _WithoutHistory:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def get(self, key: str, *, first_bytes: int | None = None) -> object:
        found = await self._store.get(key, first_bytes=first_bytes)
        if found is None or not key.startswith(keys.MANIFESTS):
            return found
        manifest = msgspec.structs.replace(objects.decode(Manifest, found.body, key), history=())
        return msgspec.structs.replace(found, body=objects.encode(manifest))

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        return self._store.list(prefix)


def gc_of_any_age(patch: pytest.MonkeyPatch) -> None:
    """Let gc delete recent objects."""
    old_raw_objects = gc._old_raw_objects
    patch.setattr(gc, "_old_raw_objects", lambda store, before: old_raw_objects(store, before + dt.timedelta(days=365)))


def gc_of_renewed_reports(patch: pytest.MonkeyPatch) -> None:
    """Let gc delete a report that was old when it was listed, without a look at it."""

    async def as_listed(_store: ObjectStore, _listed: ObjectInfo) -> bool:
        return True

    patch.setattr(gc, "_mark_expired", as_listed)


def gone_is_silent(patch: pytest.MonkeyPatch) -> None:
    """Let the planner publish no plan for a country without cities."""

    async def present_only(self: Planner, plan: Plan) -> None:
        planned: list[Event] = [one for country in plan.countries for one in events_of_plan(plan, country)]
        await self._publisher.publish(map(OutgoingEvent, planned))

    patch.setattr(Planner, "_publish_countries", present_only)


def drop_if_dead_letter_fails(patch: pytest.MonkeyPatch) -> None:
    """Drop a poison record if it cannot be sent to the dead letters at once."""

    async def careless(batch: Sequence[ConsumedRecord], publisher: Publisher) -> list[DecodedRecord]:
        try:
            return await decode_batch(batch, publisher)
        except KafkaUnavailable:
            return []

    patch.setattr(kafka_consumer, "decode_batch", careless)


def no_record_after_stale_ones(patch: pytest.MonkeyPatch) -> None:
    """Let a stale record be the last one of its key in the topic."""

    async def deaf(_self: CityStatsConsumer, _events: Sequence[StatEvent], _summary: Summary) -> list[Event]:
        return []

    patch.setattr(CityStatsConsumer, "_current_of_superseded", deaf)


def quiet_without_change(patch: pytest.MonkeyPatch) -> None:
    """Let only the process that changed a summary publish it."""
    _take_for_done_if_unchanged(patch, "published")


def _take_for_done_if_unchanged(patch: pytest.MonkeyPatch, step: str) -> None:
    fold = SummaryWriter.fold

    async def once(self: SummaryWriter, generation: int, new: Sequence[StatEvent]) -> CachedSummary:
        key = keys.summary(generation, new[0].date, new[0].country)
        found = await self._store.get(key)
        before = objects.decode(Summary, found.body, key) if found else empty_summary(new[0].date, new[0].country)
        entry = await fold(self, generation, new)
        if entry.summary == before:
            setattr(entry.handled, step, True)
        return entry

    patch.setattr(SummaryWriter, "fold", once)


def ids_by_type(patch: pytest.MonkeyPatch) -> None:
    """Take the number 7 and the string "7" for two cities."""
    identify = city_list.identify_city

    def told_apart(value: object) -> tuple[CityId, str]:
        city_id, upstream_id = identify(value)
        return (CityId(f"~{value}"), upstream_id) if value == city_id else (city_id, upstream_id)

    patch.setattr(city_list, "identify_city", told_apart)


def damage_taken_for_an_outage(patch: pytest.MonkeyPatch) -> None:
    """Wait for an unreadable object of a date or a request, as for a store that is down."""
    patch.setattr(objects.CorruptObject, "harms_alone", False)


def mended_below_the_lost_revision(patch: pytest.MonkeyPatch) -> None:
    """Remove an unreadable plan or manifest without raising the revision floor."""

    async def unchanged(_store: ObjectStore, _clock: Callable[[], dt.datetime]) -> None: ...

    patch.setattr(mend, "raise_floor", unchanged)


def no_request_without_a_record(patch: pytest.MonkeyPatch) -> None:
    """Let a backfill that has claimed a retry only retry the request, also if its record is lost."""
    carry_on = BackfillAdvancer._carry_on

    async def retry_only(
        self: BackfillAdvancer, backfill: Backfill, position: int, record: RequestRecord | None, now: dt.datetime
    ) -> None:
        if record is not None or not backfill.under_way[position]:
            await carry_on(self, backfill, position, record, now)

    patch.setattr(BackfillAdvancer, "_carry_on", retry_only)


def waiting_in_the_foreground(patch: pytest.MonkeyPatch) -> None:
    """Forget that a waiting request is one of a backfill."""
    waiting_for = active_requests.waiting_for

    async def foreground(store: ObjectStore, date: dt.date, request_id: RequestId) -> RequestRecord | None:
        waiting = await waiting_for(store, date, request_id)
        return waiting and msgspec.structs.replace(waiting, background=UNSET)

    patch.setattr(active_requests, "waiting_for", foreground)


def ids_of_their_own(patch: pytest.MonkeyPatch) -> None:
    """Let a backfill request a date under a new id each time."""

    def minted(backfill: Backfill, _date: dt.date) -> RequestId:
        return mint_request_id(backfill.created_at)

    patch.setattr(jobs_of_planner, "request_id_of", minted)


def never_stalled(patch: pytest.MonkeyPatch) -> None:
    """Let a backfill publish no stalled request again."""
    patch.setattr(jobs_of_planner, "is_stalled", lambda *_, **__: False)


def only_latest_requeued(patch: pytest.MonkeyPatch) -> None:
    """Requeue only requests among the latest records, open or not."""
    look = Requeue._look

    async def latest(self: Requeue, now: dt.datetime) -> list[Versioned[RequestRecord]]:
        self._looks_at_latest_left = 1
        self._known.clear()
        return await look(self, now)

    patch.setattr(Requeue, "_look", latest)


def no_requeue(patch: pytest.MonkeyPatch) -> None:
    """Requeue no request."""

    async def nothing(_self: Requeue) -> int:
        return 0

    patch.setattr(Requeue, "once", nothing)


def upstream_without_conditions(patch: pytest.MonkeyPatch) -> None:
    """Treat a broken download as the whole file."""
    chunks = BreakableUpstream._chunks

    async def cut(self: BreakableUpstream, of: AsyncIterator[bytes], upstream_id: str) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks(self, of, upstream_id):
                yield chunk
        except TransientUpstreamError:
            yield b"]"

    patch.setattr(BreakableUpstream, "_chunks", cut)


def published_before_counted(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate publish summaries before it counts them."""

    async def early(self: CityStatsConsumer, folded: Sequence[_Folded], current: GenerationPointer) -> None:
        await self._publish(folded, current)
        await self._count(folded)

    patch.setattr(CityStatsConsumer, "_count_and_publish", early)


def unchanged_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate count only the versions that it has written."""
    _take_for_done_if_unchanged(patch, "counted")


def building_not_counted(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate count only the live generation."""
    count = CityStatsConsumer._count

    async def live_only(self: CityStatsConsumer, folded: Sequence[_Folded]) -> None:
        for one in folded:
            for generation, handled in one.handled.items():
                handled.counted = handled.counted or generation != one.generation
        await count(self, folded)

    patch.setattr(CityStatsConsumer, "_count", live_only)


def others_never_count(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate look at no summary again after it has published it."""

    async def deaf(_self: ChangeCounter, _generation: int) -> bool:
        return False

    patch.setattr(ChangeCounter, "others_have_counted", deaf)


def looked_after_the_writes(patch: pytest.MonkeyPatch) -> None:
    """Let an aggregate compare the change index with how it was after its writes, not before them."""
    count = CityStatsConsumer._count

    async def late(self: CityStatsConsumer, folded: Sequence[_Folded]) -> None:
        await count(self, folded)
        for generation in {one.generation for one in folded}:
            await self._changes.others_have_counted(generation)

    patch.setattr(CityStatsConsumer, "_count", late)


def index_after_summaries(patch: pytest.MonkeyPatch) -> None:
    """Let a reader look at the change index after it has listed a month."""

    async def late(self: IndexedListings, month: str) -> MonthListing:
        listing = await list_month(self._store, self._generation, month)
        await self._look()
        self._kept.keep(month, listings._Kept(self._looks, listing))
        return listing

    patch.setattr(IndexedListings, "_list", late)


def blind_counters(patch: pytest.MonkeyPatch) -> None:
    """Let a writer put its counters, whatever is stored."""

    async def put(self: _OwnCounters) -> None:
        counters = ChangeCounters(months=dict(sorted(self.months.items())))
        await self._store.put(self.key, objects.encode(counters))

    patch.setattr(_OwnCounters, "write", put)


def vanished_counters_ignored(patch: pytest.MonkeyPatch) -> None:
    """Let a reader ignore that the counters of a writer are gone."""
    look = IndexedListings._look

    async def forgiving(self: IndexedListings) -> None:
        before = self._all_moved
        await look(self)
        self._all_moved = before

    patch.setattr(IndexedListings, "_look", forgiving)


def switch_ignored(patch: pytest.MonkeyPatch) -> None:
    """Let a reader trust the change index, whatever the pointer says."""
    indexed = MonthListings.indexed

    def trusting(self: MonthListings, pointer: GenerationPointer) -> IndexedListings | None:
        return indexed(self, msgspec.structs.replace(pointer, changes_counted_since=objects.EPOCH))

    patch.setattr(MonthListings, "indexed", trusting)


def switched_off_unnoticed(patch: pytest.MonkeyPatch) -> None:
    """Let a reader keep its listings while the change index was off."""
    indexed = MonthListings.indexed

    def forgetful(self: MonthListings, pointer: GenerationPointer) -> IndexedListings | None:
        if pointer.changes_counted_since is UNSET:
            return None
        return indexed(self, msgspec.structs.replace(pointer, changes_counted_since=objects.EPOCH))

    patch.setattr(MonthListings, "indexed", forgetful)


MUTATIONS = (
    Mutation(name="compare-and-swap dropped", kind=BlindSwap, proof=pausing_a_correction),
    Mutation(
        name="the pointer read before the batch",
        patch=pointer_before_the_batch,
        proof=job_scenarios.rebuilt_beside_services,
    ),
    Mutation(name="plans unordered", patch=the_last_plan_wins, proof=redelivering_everything),
    Mutation(name="a stale country accepted", patch=any_country, proof=pausing("a city moves back")),
    Mutation(name="a lost response taken for a conflict", patch=conflict_means_loss, proof=building_on_a_lost_response),
    Mutation(name="a write intent left by a check", patch=unconfirmed, proof=taking_back_a_correction),
    Mutation(name="revision check dropped", patch=any_revision, proof=redelivering_everything),
    Mutation(name="commit before effect", kind=CommitFirst, proof=breaking_a_correction),
    Mutation(name="unchanged without re-publish", patch=silent_if_unchanged, proof=losing_the_log),
    Mutation(name="retraction ignored", patch=no_retractions, proof=breaking("a city moves")),
    Mutation(name="tombstone dropped", patch=no_tombstones, proof=redelivering_everything),
    Mutation(name="adding instead of replacing", patch=adding, proof=breaking_a_correction),
    Mutation(name="a name that never falls", patch=a_name_that_never_falls, proof=spelling_a_country_anew),
    Mutation(name="a vanished summary taken for unchanged", patch=vanished_taken_for_unchanged, proof=losing_a_summary),
    Mutation(name="a batch tried without end", patch=without_isolation, proof=breaking_handlers),
    Mutation(name="figures without bounds", patch=any_figure, proof=forging_figures),
    Mutation(name="completed before it is served", patch=completed_before_folded, proof=watching_progress),
    Mutation(name="flip without the token", patch=flip_without_token, proof=job_scenarios.taken_over_anywhere),
    Mutation(
        name="a rebuild that reads before the pointer",
        kind=ReadsBeforeThePointer,
        proof=job_scenarios.rebuilt_beside_services,
    ),
    Mutation(name="the building generation not folded", patch=live_alone, proof=job_scenarios.rebuilt_beside_services),
    Mutation(name="gc ignoring the history", patch=gc_without_history, proof=cleaning_up),
    Mutation(name="gc ignoring the age", patch=gc_of_any_age, proof=job_scenarios.cleaned_beside_services),
    Mutation(name="gc of renewed reports", patch=gc_of_renewed_reports, proof=job_scenarios.refused_again_beside_gc),
    Mutation(name="at most once", kind=AtMostOnce, proof=breaking_a_correction),
    Mutation(name="a raw object after its manifest", kind=RawLast, proof=breaking_a_correction),
    Mutation(name="a stale record left in the topic", patch=no_record_after_stale_ones, proof=pausing_a_correction),
    Mutation(name="an unchanged summary not published again", patch=quiet_without_change, proof=breaking_a_correction),
    Mutation(
        name="a country that left not planned",
        patch=gone_is_silent,
        proof=breaking("the only city of a country moves away"),
    ),
    Mutation(
        name="poison dropped when the dead letter fails", patch=drop_if_dead_letter_fails, proof=refusing_dead_letters
    ),
    Mutation(name="only the latest requests requeued", patch=only_latest_requeued, proof=hiding_a_lost_request),
    Mutation(name="requests not requeued", patch=no_requeue, proof=losing_records),
    Mutation(name="a city for each type of an id", patch=ids_by_type, proof=writing_ids_differently),
    Mutation(name="a new id for each publish of a backfill", patch=ids_of_their_own, proof=breaking_a_backfill),
    Mutation(name="a damaged object taken for an outage", patch=damage_taken_for_an_outage, proof=damaging_each_object),
    Mutation(name="a damaged object tried again", patch=damage_tried_again, proof=damaging_each_object),
    Mutation(name="mended below the lost revision", patch=mended_below_the_lost_revision, proof=damaging_each_object),
    Mutation(
        name="a lost record not requested again", patch=no_request_without_a_record, proof=losing_a_record_of_a_retry
    ),
    Mutation(
        name="a waiting backfill in the foreground",
        patch=waiting_in_the_foreground,
        proof=crashing_before_the_record,
    ),
    Mutation(name="a backfill that sends nothing again", patch=never_stalled, proof=breaking_a_retry_of_a_backfill),
    Mutation(
        name="a broken download taken for the file",
        patch=upstream_without_conditions,
        proof=breaking("files break off twice before they come"),
    ),
    Mutation(
        name="a summary published before it is counted", patch=published_before_counted, proof=watching_the_aggregate
    ),
    Mutation(name="an unchanged summary not counted", patch=unchanged_not_counted, proof=watching_the_aggregate),
    Mutation(
        name="the building generation not counted", patch=building_not_counted, proof=flipping_under_the_aggregate
    ),
    Mutation(
        name="counts of other processes ignored by the aggregate",
        patch=others_never_count,
        proof=taking_back_a_correction,
    ),
    Mutation(
        name="the aggregate's look at the change index after its writes",
        patch=looked_after_the_writes,
        proof=taking_back_a_correction,
    ),
    Mutation(name="the change index listed after the summaries", patch=index_after_summaries, proof=racing),
    Mutation(name="change counters written without a condition", patch=blind_counters, proof=racing),
    Mutation(name="vanished change counters ignored", patch=vanished_counters_ignored, proof=racing),
    Mutation(name="the switch of the change index ignored", patch=switch_ignored, proof=racing),
    Mutation(name="listings kept while the change index was off", patch=switched_off_unnoticed, proof=racing),
)
