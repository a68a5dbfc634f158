"""A model of rebuild: the interleavings of a rebuild, two aggregates and a reader, call by call.

The fault model: every call across a port can wait for any other process. A schedule switches processes at most so many
times without need. Schedules that reach a known state (equal bucket, and equal responses to every process) are not
followed further. The aggregates fold a correction and a first file, whose manifests are written before, during or after
the start of the rebuild.

At each end the live summaries match the manifests byte for byte. A folded event is in the live generation from then on.
A reader sees versions of one whole generation that never go back.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from random import Random

import pytest

from services.aggregate.bucket_reader import read_events
from services.aggregate.consumer import CityStatsConsumer
from services.aggregate.fold import StatEvent
from services.aggregate.replay.rebuild import Rebuild, Rebuilt
from services.aggregate.replay.topic_reader import RawRecord
from services.api.http.date_range import DateRange
from services.api.statistics.reader import SummaryReader
from shared.domain import keys, objects
from shared.domain.events import Event
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import Summary
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, ObjectInfo, StoredObject, UnfinishedUpload, Upload
from tests.fakes.bucket import DAY, FakeBucket, trips
from tests.fakes.handling import handle_all
from tests.fakes.store import MemoryStore

PREEMPTIONS_MAX = 1
SCHEDULES_MAX = 5_000
RANDOM_SCHEDULES = 200
STEPS_MAX = 200


class Process:
    """One process under the scheduler: it waits before each call until the scheduler lets it go on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = hashlib.blake2b(digest_size=12)
        self._arrived = asyncio.Event()
        self._go = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Start it, and let it run up to its first call."""

        async def run() -> None:
            try:
                await work()
            finally:
                self._arrived.set()

        self.task = asyncio.create_task(run())

    @property
    def ended(self) -> bool:
        """Whether it has nothing more to do."""
        return self.task is not None and self.task.done()

    async def arrive(self) -> None:
        """Wait until it is before a call, or has ended."""
        await self._arrived.wait()
        if self.task is not None and self._at_end():
            await self.task

    def _at_end(self) -> bool:
        return not self._waiting

    _waiting = False

    async def step(self) -> None:
        """Let it make its next call, and run up to the one after."""
        self._arrived.clear()
        self._waiting = False
        self._go.set()
        await self.arrive()

    async def gate(self) -> None:
        """Wait before a call."""
        self._waiting = True
        self._go.clear()
        self._arrived.set()
        await self._go.wait()

    def note(self, answer: object) -> None:
        """Record a response: the process depends on its responses alone."""
        self.seen.update(repr(answer).encode() + b"\0")


class GatedStore:
    """An AdminObjectStore whose every call waits for the scheduler."""

    def __init__(self, store: MemoryStore, process: Process) -> None:
        self._store = store
        self._process = process

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await self._process.gate()
        found = await self._store.get(key, first_bytes=first_bytes)
        self._process.note((key, found))
        return found

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        await self._process.gate()
        try:
            swapped = await self._store.compare_and_swap(key, body, etag=etag)
        except Exception as error:
            self._process.note((key, repr(error)))
            raise
        self._process.note((key, swapped))
        return swapped

    async def put(self, key: str, body: bytes) -> None:
        await self._process.gate()
        await self._store.put(key, body)
        self._process.note(key)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        await self._process.gate()
        listed = [one async for one in self._store.list(prefix, after=after)]
        self._process.note((prefix, [one.key for one in listed], [one.etag for one in listed]))
        for one in listed:
            yield one

    def upload(self, key: str) -> Upload:
        return self._store.upload(key)

    async def stream(self, key: str) -> AsyncIterator[bytes]:
        async for chunk in self._store.stream(key):
            yield chunk

    async def delete(self, key: str) -> None:
        await self._process.gate()
        await self._store.delete(key)
        self._process.note(key)

    async def now(self) -> object:
        return await self._store.now()

    async def unfinished_uploads(self, prefix: str) -> AsyncIterator[UnfinishedUpload]:
        async for upload in self._store.unfinished_uploads(prefix):
            yield upload

    async def abort_upload(self, unfinished: UnfinishedUpload) -> None:
        await self._store.abort_upload(unfinished)


class GatedTopicReader:
    """The topic as a rebuild reads it, up to the end offset that it took."""

    def __init__(self, bucket: FakeBucket, process: Process) -> None:
        self._bucket = bucket
        self._process = process
        self._records: list[ConsumedRecord] = []

    async def take_end(self) -> int:
        await self._process.gate()
        self._records = self._bucket.log.records(Topic.CITY_STATS)
        self._process.note(len(self._records))
        return len(self._records)

    async def read_raw(self) -> AsyncIterator[Sequence[RawRecord]]:
        yield [(record.key, record.value, record.partition, record.offset) for record in self._records]


class Scene:
    """One run: a bucket with a live summary, and four processes, each before its first call."""

    def __init__(self, *, from_kafka: bool, kind: type[Rebuild] = Rebuild) -> None:
        self._kind = kind
        self.bucket = FakeBucket()
        self.versions: list[int] = []
        self.failures: list[str] = []
        self.processes = [Process(name) for name in ("rebuild", "aggregate-1", "aggregate-2", "reader")]
        self._from_kafka = from_kafka

    async def begin(self) -> None:
        bucket = self.bucket
        await bucket.fold([*bucket.plan(1, {"armenia": [1, 2]}), *bucket.store_file(1, 11, trips(1))])
        rebuild, first, second, reader = self.processes
        rebuild.start(lambda: self._rebuild(rebuild))
        first.start(lambda: self._aggregate(first, 1, 12, 3))
        second.start(lambda: self._aggregate(second, 2, 13, 4))
        reader.start(lambda: self._read(reader))
        for process in self.processes:
            await process.arrive()

    async def _rebuild(self, process: Process) -> None:
        store: AdminObjectStore = GatedStore(self.bucket.store, process)  # type: ignore[assignment]  # no clock is read
        replay = GatedTopicReader(self.bucket, process) if self._from_kafka else None
        job = self._kind(store, self.bucket.publisher, token="token", report=lambda *_: None, reader=replay)
        rebuilt = await job.run()
        if not rebuilt.flipped:
            self.failures.append(f"refused: {rebuilt.refused}")

    async def _aggregate(self, process: Process, city: int, revision: int, count: int) -> None:
        """Act as a worker and an aggregate: write the manifest, publish its event, and fold the batch."""
        await process.gate()
        published: list[Event] = self.bucket.store_file(city, revision, trips(count))
        await process.gate()
        batch = [self.bucket.record_of(event) for event in published]
        store = GatedStore(self.bucket.store, process)
        await handle_all(CityStatsConsumer(store, self.bucket.publisher, cache_bytes=100_000).process, batch)
        if (await self.live_summary()).ledger[CityId(str(city))].revision < revision:
            self.failures.append(f"{process.name} has folded revision {revision}, which is not live")

    async def _read(self, process: Process) -> None:
        for _ in range(2):
            reader = SummaryReader(GatedStore(self.bucket.store, process), cache_bytes=10_000)
            heads = (await reader.read(DateRange(DAY, DAY))).heads
            self.versions.append(sum(head.version for head in heads))

    async def live_summary(self) -> Summary:
        """Return the live summary, without a call that the scheduler can hold."""
        return await self.bucket.summary()

    def state(self) -> bytes:
        """Return the state that determines the rest of the run."""
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(self.bucket.store.objects):
            digest.update(key.encode() + self.bucket.store.objects[key].etag.encode())
        digest.update(repr(len(self.bucket.log.records(Topic.CITY_STATS))).encode())
        for process in self.processes:
            digest.update(process.seen.digest() + bytes([process.ended]))
        digest.update(repr(self.versions).encode())
        return digest.digest()

    async def differences(self) -> list[str]:
        """Name all that is wrong after all processes have ended."""
        store = self.bucket.store
        must = (await read_events(store, DAY)).summary((await self.live_summary()).country)
        assert must is not None
        told = list(self.failures)
        if (await read_current(store)).live != 2:
            told.append("nothing was made live")
        if store.bodies(keys.summaries_of_generation(2)) != {keys.summary(2, DAY, must.country): objects.encode(must)}:
            told.append("the generation that was built is not what the manifests say")
        if self.versions != sorted(self.versions) or self.versions[0] < 12:
            told.append(f"a reader saw the versions {self.versions}")
        return told


async def run(
    schedule: Sequence[int], *, from_kafka: bool, kind: type[Rebuild] = Rebuild
) -> tuple[Scene, list[tuple[bytes, list[int], int]]]:
    """Run a scene by a schedule, then on without a switch; return the possible choices at each step.

    If the chosen process has ended, the next one that has not ended runs. A step within the schedule has no state.
    """
    scene = Scene(from_kafka=from_kafka, kind=kind)
    await scene.begin()
    steps: list[tuple[bytes, list[int], int]] = []
    chosen = 0
    while ready := [number for number, process in enumerate(scene.processes) if not process.ended]:
        if len(steps) < len(schedule):
            chosen = schedule[len(steps)]
        if chosen not in ready:
            chosen = ready[0]
        steps.append((b"" if len(steps) < len(schedule) else scene.state(), ready, chosen))
        await scene.processes[chosen].step()
    return scene, steps


async def wrong_ends(*, from_kafka: bool, kind: type[Rebuild] = Rebuild) -> AsyncIterator[tuple[list[str], list[int]]]:
    """Run every schedule of up to PREEMPTIONS_MAX preemptions; yield its errors at the end, and the schedule."""
    open_schedules: list[tuple[list[int], int]] = [([], 0)]
    seen: set[tuple[bytes, int, int]] = set()
    schedules = 0
    while open_schedules:
        schedule, preemptions = open_schedules.pop()
        scene, steps = await run(schedule, from_kafka=from_kafka, kind=kind)
        schedules += 1
        assert schedules < SCHEDULES_MAX, "the model has grown: give it fewer preemptions"
        yield await scene.differences(), [chosen for _, _, chosen in steps]
        for place in range(len(schedule), len(steps)):
            state, ready, chosen = steps[place]
            before = steps[place - 1][2] if place else None
            for other in ready:
                cost = preemptions + (before is not None and before in ready and other != before)
                if other == chosen or cost > PREEMPTIONS_MAX or (state, other, cost) in seen:
                    continue
                seen.add((state, other, cost))
                open_schedules.append(([one for _, _, one in steps[:place]] + [other], cost))


@pytest.mark.parametrize("from_kafka", [False, True], ids=["from-s3", "from-kafka"])
async def test_every_interleaving_ends_with_the_right_summaries(from_kafka: bool) -> None:
    """In any order of calls the live summaries match the manifests at the end, and no reader sees less."""
    schedules = 0
    async for differences, schedule in wrong_ends(from_kafka=from_kafka):
        schedules += 1
        assert differences == [], schedule
    assert schedules > 100


@pytest.mark.parametrize("from_kafka", [False, True], ids=["from-s3", "from-kafka"])
async def test_random_interleavings_end_with_the_right_summaries(from_kafka: bool) -> None:
    """The same holds for random schedules that switch at every call, drawn from a fixed seed."""
    random = Random(20240501)
    for _ in range(RANDOM_SCHEDULES):
        schedule = random.choices(range(4), k=STEPS_MAX)
        scene, steps = await run(schedule, from_kafka=from_kafka)
        assert await scene.differences() == [], [chosen for _, _, chosen in steps]


class HastyRebuild(Rebuild):
    """Reads the manifests before the pointer says that a generation is being built."""

    async def _build(self, *, take_over: bool, dry_run: bool) -> Rebuilt:
        self._early = await super()._bucket_events(DAY)
        return await super()._build(take_over=take_over, dry_run=dry_run)

    async def _bucket_events(self, date: dt.date) -> dict[CountrySlug, list[StatEvent]]:
        del date
        return self._early


async def test_the_model_detects_a_rebuild_in_the_wrong_order() -> None:
    """If the rebuild reads the manifests before it sets the pointer, some interleaving ends wrong."""
    async for differences, _ in wrong_ends(from_kafka=False, kind=HastyRebuild):
        if differences:
            return
    raise AssertionError("no interleaving ended wrong")
