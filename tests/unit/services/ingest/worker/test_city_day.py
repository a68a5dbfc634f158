"""The ingest of city-days: how they share the stream slots of a worker, and how stored files are read again."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from services.ingest.parsing.parser import DEFAULT_RULES
from services.ingest.parsing.trips import RULE_VERSION
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.errors import PermanentUpstreamError
from services.ingest.upstream.port import Download, Validators
from services.ingest.upstream.retry import UpstreamRetryPolicy
from services.ingest.worker import city_day
from services.ingest.worker.city_day import CityDayIngest
from shared.domain import events, keys, objects
from shared.domain.events import (
    BACKGROUND,
    Background,
    Cause,
    CityDayRetracted,
    CityDayStats,
    CityFinished,
    IngestCity,
    Outcome,
    Published,
    Source,
    cause_of,
)
from shared.domain.file_rules import FileRules
from shared.domain.ids import CityId, CountrySlug, mint_request_id, utc_now
from shared.domain.objects import Manifest
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.runtime.health import Health
from shared.runtime.retry import Retrier
from shared.storage.object_store import CasConflict, StoredObject, StoreUnavailable
from tests.fakes.bucket import FakeBucket, trips
from tests.fakes.builders import Trip, trip_file
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.metrics import value
from tests.fakes.store import MemoryStore
from tests.fakes.upstream import MemoryUpstream

DAY = dt.date(2024, 5, 1)
STAGES = {"request": 3, "wait": 3, "stream": 2, "complete_upload": 2, "write_manifest": 2, "publish": 2}
"""How often each stage is timed when the first of two files waits for the slot, and the second is requested twice."""


class PacedUpstream(MemoryUpstream):
    """An upstream whose files arrive when ``flowing`` is set. It lists the cities whose response is open."""

    def __init__(self) -> None:
        super().__init__()
        self.flowing = asyncio.Event()
        self.open: list[str] = []
        self.read: list[str] = []

    @contextlib.asynccontextmanager
    async def download(self, upstream_id: str, date: dt.date, known: Validators | None) -> AsyncIterator[Download]:
        async with super().download(upstream_id, date, known) as download:
            assert download.chunks is not None
            download.chunks = self._paced(upstream_id, download.chunks)
            self.open.append(upstream_id)
            try:
                yield download
            finally:
                self.open.remove(upstream_id)

    async def _paced(self, upstream_id: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self.read.append(upstream_id)
        await self.flowing.wait()
        async for chunk in chunks:
            yield chunk


def task_of(city: str) -> IngestCity:
    """Return the task of a city."""
    return IngestCity(
        request_id=mint_request_id(utc_now()),
        date=DAY,
        city_id=CityId(city),
        upstream_id=city,
        city_name=f"City {city}",
        country=CountrySlug("armenia"),
        country_name="Armenia",
        plan_revision=1,
        position=0,
    )


@contextlib.asynccontextmanager
async def ingesting(
    upstream: MemoryUpstream, store: MemoryStore, log: MemoryLog, **options: Any
) -> AsyncIterator[CityDayIngest]:
    """Open an ingest of one stream, whose first attempt is its last."""
    circuit = CircuitBreaker(Retrier(health=Health(), wait_max_s=1))
    policy = UpstreamRetryPolicy(circuit, attempts_max=1, outage_limit_s=60)
    with ThreadPoolExecutor(1) as threads:
        yield CityDayIngest(
            store,
            MemoryPublisher(log),
            upstream,
            **{
                "clock": utc_now,
                "retry_policy": policy,
                "threads": threads,
                "streams": 1,
                "deadline_s": 60,
                **options,
            },
        )


async def test_a_response_that_waits_long_for_a_slot_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one file takes the only slot for long, the other's connection is closed and costs it no attempt."""
    monkeypatch.setattr(city_day, "SLOT_WAIT_MAX_S", 0)
    upstream, store, log = PacedUpstream(), MemoryStore(utc_now), MemoryLog()
    file = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    upstream.files = dict.fromkeys(("0", "1"), file)
    timed = {stage: value("tripfold_ingest_stage_seconds_count", stage=stage) for stage in STAGES}
    stored_bytes, stored_trips = value("tripfold_stored_bytes_total"), value("tripfold_stored_trips_total")
    async with ingesting(upstream, store, log) as ingest, asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        tasks.create_task(ingest.run(task_of("0")))
        tasks.create_task(ingest.run(task_of("1")))
        # The second response is open, and is then closed.
        while upstream.downloads != ["0", "1"] or upstream.open != ["0"]:  # noqa: ASYNC110  # waits for this state
            await asyncio.sleep(0)
        upstream.flowing.set()
    assert upstream.downloads == ["0", "1", "1"]
    assert all(keys.manifest(DAY, CityId(city)) in store.objects for city in ("0", "1"))
    for stage, times in STAGES.items():
        assert value("tripfold_ingest_stage_seconds_count", stage=stage) == timed[stage] + times, stage
    assert value("tripfold_stored_bytes_total") == stored_bytes + 2 * len(file)
    assert value("tripfold_stored_trips_total") == stored_trips + 2


def ended(log: MemoryLog) -> CityFinished:
    """Return the last event of a request."""
    record = [one for one in log.appended if one.topic is Topic.REQUEST_PROGRESS][-1]
    event = events.decode(record.topic, record.value)
    assert isinstance(event, CityFinished)
    return event


async def test_a_finished_city_tells_what_it_published() -> None:
    """The event has the size, the trips and the revision of the file. The events that it published name its task."""
    upstream, store, log = MemoryUpstream(), MemoryStore(utc_now), MemoryLog()
    upstream.files["0"] = file = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    task = msgspec.structs.replace(task_of("0"), position=5, plan_revision=3, retried_at=utc_now())
    finished = value("tripfold_city_tasks_finished_total", outcome="stored")
    async with ingesting(upstream, store, log) as ingest:
        await ingest.run(task)
    assert value("tripfold_city_tasks_finished_total", outcome="stored") == finished + 1
    manifest = objects.decode(Manifest, store.objects[keys.manifest(DAY, CityId("0"))].body, "a manifest")
    told = {"request_id": task.request_id, "plan_revision": 3, "position": 5}
    expected = CityFinished(
        **told,  # type: ignore[arg-type]  # of three types
        date=DAY,
        city_id=CityId("0"),
        city_name="City 0",
        outcome=Outcome.STORED,
        size_bytes=len(file),
        trips=1,
        published=(Published(country=CountrySlug("armenia"), revision=manifest.revision),),
        retried_at=task.retried_at,
    )
    assert ended(log) == expected
    (stats,) = log.records(Topic.CITY_STATS)
    assert cause_of(dict(stats.headers)) == Cause(**told)  # type: ignore[arg-type]  # as above


async def test_the_reason_of_a_failed_city_has_a_bounded_length() -> None:
    """However long the upstream's error is, the event has the first 2,000 characters, no file and no revision."""
    upstream, log = MemoryUpstream(), MemoryLog()
    upstream.files["0"] = PermanentUpstreamError("x" * 3_000)
    task = task_of("0")
    async with ingesting(upstream, MemoryStore(utc_now), log) as ingest:
        await ingest.run(task)
    assert ended(log) == CityFinished(
        request_id=task.request_id,
        date=DAY,
        city_id=CityId("0"),
        city_name="City 0",
        plan_revision=1,
        position=0,
        outcome=Outcome.FAILED,
        reason="x" * 2_000,
    )


async def test_an_upstream_that_exceeds_the_deadline_fails() -> None:
    """The waits for the upstream have a deadline together, and the reason names its setting."""
    upstream, log = PacedUpstream(), MemoryLog()
    upstream.files["0"] = trip_file([], DAY)
    async with ingesting(upstream, MemoryStore(utc_now), log, deadline_s=0.05) as ingest:
        await ingest.run(task_of("0"))
    reason = "the upstream took longer than TRIPFOLD_INGEST_DEADLINE_S allows, 0.05 s (1 attempts)"
    assert ended(log).reason == reason


class SlowStore(MemoryStore):
    """A store that takes a while for each read."""

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        await asyncio.sleep(0.2)
        return await super().get(key, first_bytes=first_bytes)


async def test_a_slow_bucket_costs_no_attempt() -> None:
    """The time that S3 takes is not the upstream's fault, even if it is longer than the deadline."""
    upstream, log = MemoryUpstream(), MemoryLog()
    upstream.files["0"] = trip_file([], DAY)
    async with ingesting(upstream, SlowStore(utc_now), log, deadline_s=0.1) as ingest:
        await ingest.run(task_of("0"))
    assert ended(log).outcome is Outcome.STORED


async def test_a_very_slow_bucket_starts_the_attempt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many deadlines in all the attempt ends as in an outage of S3: it is repeated, and counts as no failure."""
    monkeypatch.setattr(city_day, "ATTEMPT_LIMIT_TIMES", 1)
    upstream, log = MemoryUpstream(), MemoryLog()
    upstream.files["0"] = trip_file([], DAY)
    async with ingesting(upstream, SlowStore(utc_now), log, deadline_s=0.1) as ingest:
        with pytest.raises(StoreUnavailable, match="S3 was so slow"):
            await ingest.run(task_of("0"))
    assert log.appended == []


async def test_backfills_use_no_more_streams_than_asked() -> None:
    """Two of three streams may be used for tasks of backfills; another task gets the third."""
    upstream, log = PacedUpstream(), MemoryLog()
    upstream.files = dict.fromkeys("0123", trip_file([], DAY))
    async with (
        ingesting(upstream, MemoryStore(utc_now), log, streams=3, background_streams=2) as ingest,
        asyncio.timeout(10),
        asyncio.TaskGroup() as tasks,
    ):
        for city in "012":
            tasks.create_task(ingest.run(msgspec.structs.replace(task_of(city), background=BACKGROUND)))
        while len(upstream.open) < 3:  # noqa: ASYNC110  # waits for this state
            await asyncio.sleep(0)
        tasks.create_task(ingest.run(task_of("3")))
        while "3" not in upstream.read:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0)
        assert upstream.read == ["0", "1", "3"]
        upstream.flowing.set()


class CountingStore(MemoryStore):
    """A store that lists its calls. The next swaps of manifests conflict, or write and then conflict."""

    def __init__(self) -> None:
        super().__init__(utc_now)
        self.calls: list[str] = []
        self.conflicts = self.responses_lost = 0

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self.calls.append(f"get {key.partition('/')[0]}")
        return await super().get(key, first_bytes=first_bytes)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        self.calls.append(f"swap {key.partition('/')[0]}")
        is_manifest = key.startswith("manifests/")
        if self.conflicts and is_manifest:
            self.conflicts -= 1
            raise CasConflict(key)
        etag = await super().compare_and_swap(key, body, etag=etag)
        if self.responses_lost and is_manifest:
            self.responses_lost -= 1
            raise CasConflict(key)
        return etag


async def test_only_a_changed_file_costs_a_write_intent() -> None:
    """A first file and an unchanged one cost no further write. A changed one is marked, and then requested again."""
    store, upstream = CountingStore(), MemoryUpstream()
    swaps, reads = [], []
    async with ingesting(upstream, store, MemoryLog()) as ingest:
        for passengers in (3, 3, 4):
            upstream.files["0"] = trip_file([Trip(passengers=passengers, delay_ms=0)], DAY)
            store.calls.clear()
            await ingest.run(task_of("0"))
            swaps.append(store.calls.count("swap manifests"))
            reads.append(list(store.calls))
    assert swaps == [1, 0, 2]
    assert reads[1] == ["get manifests", "get requests", "get raw", "get manifests"]
    assert upstream.downloads == ["0", "0", "0"]


async def test_an_unchanged_file_removes_a_write_intent() -> None:
    """The intent of a worker that crashed is removed by a check. After a conflict it is checked again."""
    store, upstream, log = CountingStore(), MemoryUpstream(), MemoryLog()
    upstream.files["0"] = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    key = keys.manifest(DAY, CityId("0"))
    async with ingesting(upstream, store, log) as ingest:
        await ingest.run(task_of("0"))
        manifest = objects.decode(Manifest, store.objects[key].body, key)
        store.write(key, objects.encode(msgspec.structs.replace(manifest, write_intent="another's")))
        conflicts = value("tripfold_cas_conflicts_total", object="manifest")
        store.conflicts = 1
        await ingest.run(task_of("0"))
    assert value("tripfold_cas_conflicts_total", object="manifest") == conflicts + 1
    assert ended(log).outcome is Outcome.UNCHANGED
    assert objects.decode(Manifest, store.objects[key].body, key) == manifest


async def test_a_lost_response_of_the_manifest_is_recognised() -> None:
    """A worker whose write conflicts with itself has written the manifest, and does not store the file twice."""
    store, upstream, log = CountingStore(), MemoryUpstream(), MemoryLog()
    upstream.files["0"] = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    store.responses_lost = 1
    conflicts = value("tripfold_cas_conflicts_total", object="manifest")
    async with ingesting(upstream, store, log) as ingest:
        await ingest.run(task_of("0"))
    assert (store.calls.count("swap manifests"), upstream.downloads) == (1, ["0"])
    assert value("tripfold_cas_conflicts_total", object="manifest") == conflicts + 1
    assert ended(log).outcome is Outcome.STORED


@pytest.mark.parametrize(
    ("task_plan", "newest_plan", "place"),
    [
        (4, 4, ("brasil", "Brasil", 5)),
        (6, 6, ("armenia", "Armenia", 6)),
        (6, 9, ("chad", "Chad", 9)),
    ],
)
async def test_a_city_goes_where_the_newest_plan_has_it(
    task_plan: int, newest_plan: int, place: tuple[str, str, int]
) -> None:
    """A late task of an older plan leaves the city where the stored file or a newer plan has it."""
    bucket, upstream = FakeBucket(), MemoryUpstream()
    bucket.store_file(1, 11, trips(1), "brasil")
    change(bucket, 1, plan_revision=5)
    bucket.plan(newest_plan, {"chad": [7, 1], "peru": [8]})
    upstream.files["1"] = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    async with ingesting(upstream, bucket.store, bucket.log, clock=bucket.clock) as ingest:
        await ingest.run(msgspec.structs.replace(task_of("1"), plan_revision=task_plan))
    manifest = manifest_of(bucket, 1)
    assert (manifest.country, manifest.country_name, manifest.plan_revision) == place
    moved = {event.country for event in map(stats_of, bucket.log.records(Topic.CITY_STATS))}
    assert moved == {"brasil", place[0]}


async def test_a_plan_that_is_written_during_a_move_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer plan's task may have run before the move, so the worker moves the city again."""
    bucket, upstream = FakeBucket(), MemoryUpstream()
    bucket.store_file(1, 11, trips(1), "brasil")
    change(bucket, 1, plan_revision=5)
    bucket.plan(6, {"armenia": [1]})
    upstream.files["1"] = trip_file([Trip(passengers=3, delay_ms=0)], DAY)
    swap = bucket.store.compare_and_swap

    async def swap_late(key: str, body: bytes, *, etag: str | None) -> str:
        if key == keys.manifest(DAY, CityId("1")) and b'"country":"armenia"' in body:
            bucket.plan(9, {"brasil": [1]})
        return await swap(key, body, etag=etag)

    monkeypatch.setattr(bucket.store, "compare_and_swap", swap_late)
    async with ingesting(upstream, bucket.store, bucket.log, clock=bucket.clock) as ingest:
        await ingest.run(msgspec.structs.replace(task_of("1"), plan_revision=6))
    manifest = manifest_of(bucket, 1)
    assert (manifest.country, manifest.plan_revision) == ("brasil", 9)


def stats_of(record: ConsumedRecord) -> CityDayStats | CityDayRetracted:
    """Return an event of a city."""
    event = events.decode(record.topic, record.value)
    assert isinstance(event, CityDayStats | CityDayRetracted)
    return event


AGAIN = Background(source=Source.BUCKET, again=True)


@pytest.fixture
def bucket() -> FakeBucket:
    """Return a date of three files. The manifests of 1 and 2 have no passengers, as if other rules had read them."""
    bucket = FakeBucket()
    for city in (1, 2, 3):
        bucket.store_file(city, city + 10, trips(city))
    for city in (1, 2):
        manifest = manifest_of(bucket, city)
        change(bucket, city, contribution=msgspec.structs.replace(manifest.contribution, passengers=0))
    return bucket


def manifest_of(bucket: FakeBucket, city: int) -> Manifest:
    """Return the manifest of a city."""
    manifest = bucket.manifest(city)
    assert manifest is not None
    return manifest


def change(bucket: FakeBucket, city: int, **changes: object) -> None:
    """Change fields of a manifest."""
    changed = msgspec.structs.replace(manifest_of(bucket, city), **changes)
    bucket.store.write(keys.manifest(DAY, changed.city_id), objects.encode(changed))


async def reprocess(
    bucket: FakeBucket, *, background: Background = AGAIN, rules: FileRules = DEFAULT_RULES
) -> dict[str, tuple[str, str]]:
    """Read the files of cities 1 to 4 again; return the outcome and the reason of each."""
    upstream = MemoryUpstream()
    raw_before = bucket.store.bodies(keys.RAW)
    async with ingesting(upstream, bucket.store, bucket.log, clock=bucket.clock, rules=rules) as ingest:
        for city in ("1", "2", "3", "4"):
            await ingest.run(msgspec.structs.replace(task_of(city), background=background))
    assert upstream.downloads == []
    assert bucket.store.bodies(keys.RAW) == raw_before
    ended = [events.decode(one.topic, one.value) for one in bucket.log.appended if one.topic is Topic.REQUEST_PROGRESS]
    return {one.city_id: (one.outcome.value, one.reason or "") for one in ended if isinstance(one, CityFinished)}


async def test_a_stored_file_with_other_totals_becomes_a_revision(bucket: FakeBucket) -> None:
    """The revision names the same raw object. A second run changes nothing, and a city without a file is skipped."""
    ended = await reprocess(bucket)
    assert [ended[city][0] for city in "1234"] == ["stored", "stored", "unchanged", "skipped"]
    assert ended["4"][1] == "no file of the city is stored"
    manifest = manifest_of(bucket, 1)
    assert (manifest.contribution.passengers, manifest.raw_key) == (10, manifest.history[0].raw_key)
    assert {outcome for outcome, _ in (await reprocess(bucket)).values()} == {"unchanged", "skipped"}


async def test_files_of_the_present_rules_are_not_read(bucket: FakeBucket) -> None:
    """Without ``again``, a file is read only if the present rules and settings may read it differently."""
    change(bucket, 1, rule_version=RULE_VERSION - 1)
    change(bucket, 3, trips_on_other_dates=1)
    rules = FileRules(other_dates_are_bad=True)
    ended = await reprocess(bucket, background=Background(source=Source.BUCKET), rules=rules)
    assert [ended[city][0] for city in "123"] == ["stored", "unchanged", "stored"]
    assert (manifest_of(bucket, 1).rule_version, manifest_of(bucket, 2).contribution.passengers) == (RULE_VERSION, 0)


async def test_a_stored_file_that_cannot_be_read_again_fails_with_its_reason(bucket: FakeBucket) -> None:
    """A raw object that is lost, has expired or was changed, and later rules: the numbers stay as they were."""
    before = manifest_of(bucket, 1)
    del bucket.store.objects[before.raw_key]
    bucket.store.write(manifest_of(bucket, 2).raw_key, b"[]")
    change(bucket, 3, rule_version=RULE_VERSION + 1)
    ended = await reprocess(bucket)
    assert {outcome for outcome, _ in (ended[city] for city in "123")} == {"failed"}
    for city, reason in (("1", "is lost"), ("2", "has changed since it was stored"), ("3", "upgrade")):
        assert reason in ended[city][1]
    assert manifest_of(bucket, 1) == before
    change(bucket, 1, raw_expired_before=before.ingested_at + dt.timedelta(days=1))
    bucket.store.write(manifest_of(bucket, 2).raw_key, b"[7]")
    ended = await reprocess(bucket)
    assert "has expired" in ended["1"][1]
    assert f"Request {DAY} again" in ended["1"][1]
    assert "the present rules refuse its stored file" in ended["2"][1]
