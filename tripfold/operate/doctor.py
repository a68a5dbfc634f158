"""Looking at everything that Tripfold stands on, as it is now: each examination says what it found, and the remedy."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from services.aggregate.replay.generations import rebuild_age_s
from services.aggregate.replay.topic_reader import KafkaTopicReader, TopicReader
from services.ingest.planner.city_list import InvalidCityList, parse_city_list
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.client import HttpUpstream
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from shared.domain import events, keys
from shared.domain.errors import OperatorError
from shared.domain.events import CityDayRetracted, CityDayStats, CountryDayPlanned, NewerContract, PoisonRecord
from shared.domain.objects import BucketEpoch, CorruptObject, Manifest, Plan
from shared.domain.topics import GROUPS, Topic
from shared.kafka.admin import check_topics
from shared.kafka.producer import KafkaPublisher
from shared.kafka.skip_markers import is_marked
from shared.runtime.concurrency import bounded_map
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier
from shared.runtime.settings import Settings
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectStore
from shared.storage.repository import Repository
from shared.storage.s3 import S3Store

NEWER_NAMED_MAX = 10
RACE_ROUNDS = 3
RACE_WRITERS = 4
LINEAGE_RECORDS_MAX = 2_000
WAITING_RECORDS_MAX = 5_000
"""So many records after the last commit are looked at, of each partition: more than a batch has of it."""
GETS_AT_ONCE_MAX = 16
NEEDS = {
    "compare-and-swap": {"S3"},
    "topics": {"Kafka"},
    "consuming": {"S3", "Kafka", "topics"},
    "lineage": {"S3", "Kafka"},
    "rebuild": {"S3"},
}
"""What cannot be examined when something else failed: a probe might even make a bucket that is missing."""
REBUILD_OLD_S = 3_600
UNKNOWN = "this could not be examined: see first to what failed above"


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, whether it is as it should be, what was found, and what to do if it is not."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


class Unfit(OperatorError):
    """What was examined is not as it should be; the message says how."""


async def examine(settings: Settings) -> AsyncIterator[Examined]:
    """Examine S3, its compare-and-swap, Kafka, topics, consumers, upstream, lineage and a rebuild, in turn."""
    async with S3Store(settings) as store, KafkaPublisher(settings, source="doctor") as publisher:

        async def s3() -> str:
            await store.check()
            return f"bucket {store.bucket} answers"

        async def kafka() -> str:
            await publisher.check()
            return f"{settings.kafka_bootstrap_servers} answers"

        examinations: list[tuple[str, Callable[[], Awaitable[str]], str]] = [
            ("S3", s3, "see TRIPFOLD_S3_* and the AWS credentials; 'tripfold bucket apply' makes the bucket"),
            (
                "compare-and-swap",
                lambda: race(store),
                "this store must not be used: racing writers would lose each other's changes",
            ),
            ("Kafka", kafka, "see TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS, and whether the brokers run"),
            (
                "topics",
                lambda: _topics(settings),
                "'tripfold topics apply' creates missing topics; 'tripfold topics check' says how to change the others",
            ),
            (
                "consuming",
                lambda: _consuming(settings, store),
                "upgrade the processes, or move the record to the dead letters: tripfold skip TOPIC PARTITION OFFSET",
            ),
            ("upstream", lambda: city_list(settings), "see TRIPFOLD_UPSTREAM_URL, and whether that server runs"),
            (
                "lineage",
                lambda: _lineage_of(settings, store),
                "stop the services, run 'tripfold restore', start them, then 'tripfold republish'",
            ),
            (
                "rebuild",
                lambda: rebuild_mark(store),
                "if it does not run any more, clear its mark with 'tripfold rebuild --abandon'",
            ),
        ]
        failed: set[str] = set()
        for what, examination, remedy in examinations:
            missing = NEEDS.get(what, set()) & failed
            if missing:
                yield Examined(
                    what=what, ok=False, found=f"not examined without {' and '.join(sorted(missing))}", remedy=UNKNOWN
                )
                continue
            examined = await _examined(what, examination, remedy)
            if not examined.ok:
                failed.add(what)
            yield examined


async def _examined(what: str, examination: Callable[[], Awaitable[str]], remedy: str) -> Examined:
    try:
        return Examined(what=what, ok=True, found=await examination())
    except DependencyUnavailable as error:
        return Examined(what=what, ok=False, found=str(error), remedy=UNKNOWN if what in NEEDS else remedy)
    except (OperatorError, CorruptObject) as error:
        return Examined(what=what, ok=False, found=str(error), remedy=remedy)


async def race(store: AdminObjectStore) -> str:
    """Let writers race for one key, to make it and to change it; raise Unfit unless one of them wins each time.

    A winner whose answer was lost counts as the winner if its bytes are what is stored.
    """
    key = f"state/probe-{uuid.uuid4().hex}.json"
    try:
        for number in range(RACE_ROUNDS):
            etag = await _race_once(store, key, f"{number}-made", None)
            await _race_once(store, key, f"{number}-changed", etag)
            await store.delete(key)
    finally:
        await store.delete(key)
    return f"one of {RACE_WRITERS} writers won each of {2 * RACE_ROUNDS} races"


async def _race_once(store: ObjectStore, key: str, name: str, etag: str | None) -> str:
    async def write(number: int) -> bool:
        try:
            await store.compare_and_swap(key, _probe(name, number), etag=etag)
        except CasConflict:
            return False
        return True

    won = await asyncio.gather(*(write(number) for number in range(RACE_WRITERS)))
    winners = [number for number, one in enumerate(won) if one]
    if len(winners) > 1:
        raise Unfit(f"{len(winners)} of {RACE_WRITERS} racing writers were each told that they had won")
    stored = await store.get(key)
    written = [number for number in range(RACE_WRITERS) if stored and stored.body == _probe(name, number)]
    if stored is None or not written or (winners and winners != written):
        raise Unfit("after a race the object is not what its winner wrote")
    return stored.etag


def _probe(name: str, number: int) -> bytes:
    return f'{{"probe":"{name}","writer":{number}}}'.encode()


async def _topics(settings: Settings) -> str:
    differences = await check_topics(settings)
    if differences:
        raise Unfit("; ".join(f"{one.topic}: {one.what} is {one.found}, not {one.expected}" for one in differences))
    return "all are as they should be"


async def rebuild_mark(store: AdminObjectStore) -> str:
    """Say how old the mark of a rebuild is. Raises Unfit for one so old that its rebuild has probably died."""
    age_s = await rebuild_age_s(store)
    if age_s is None:
        return "none is under way"
    found = f"one was begun {age_s:.0f} s ago, and has not ended"
    if age_s > REBUILD_OLD_S:
        raise Unfit(found)
    return found


async def _consuming(settings: Settings, store: ObjectStore) -> str:
    blocking: list[str] = []
    for topic, group in GROUPS.items():
        replay = KafkaTopicReader(settings, topic, after_commits_of=group, records_max=WAITING_RECORDS_MAX)
        try:
            blocking += await newer_records(store, replay)
        finally:
            await replay.close()
    if blocking:
        raise Unfit("; ".join(blocking))
    return "no record of a later schema version waits"


async def newer_records(store: ObjectStore, replay: TopicReader) -> list[str]:
    """Name the records of a later schema version that no operator has marked to be skipped."""
    told: list[str] = []
    await replay.take_end()
    async for batch in replay.read():
        for record in batch:
            try:
                events.decode(record.topic, record.value)
            except PoisonRecord:
                continue
            except NewerContract as error:
                if not await is_marked(store, record):
                    told.append(str(error.at(record.partition, record.offset)))
                    if len(told) == NEWER_NAMED_MAX:
                        return told
    return told


async def city_list(settings: Settings) -> str:
    """Say how many cities the upstream lists. Raises Unfit if it lists none, or cannot be asked."""
    url = f"{settings.upstream_url}/cities"
    retrier = Retrier(health=Health(), wait_max_s=settings.retry_wait_max_s)
    async with HttpUpstream(settings, CircuitBreaker(retrier)) as upstream:
        try:
            listed = parse_city_list(await upstream.cities())
        except (UpstreamDown, TransientUpstreamError, PermanentUpstreamError, InvalidCityList) as error:
            raise Unfit(f"{url}: {error}" if isinstance(error, InvalidCityList) else str(error)) from error
    found = f"{url} lists {len(listed.cities)} cities"
    if listed.bad_cities_count:
        first = listed.bad_cities[0]
        found += f", and {listed.bad_cities_count} bad entries; the first is {first.entry}: {first.reason}"
    if not listed.cities and not settings.upstream_allow_empty_city_list:
        raise Unfit(found)
    return found


async def _lineage_of(settings: Settings, store: ObjectStore) -> str:
    replay = KafkaTopicReader(settings, Topic.CITY_STATS, last_records_max=LINEAGE_RECORDS_MAX)
    try:
        return await epoch(store, replay)
    finally:
        await replay.close()


async def epoch(store: ObjectStore, replay: TopicReader) -> str:
    """Compare the revisions at the end of the topic with what the bucket would mint next.

    Raises Unfit if the bucket would mint a revision that the topic has seen, as after a restored backup: consumers
    would then keep the other one.
    """
    repository = Repository(store)
    known = await repository.get(BucketEpoch, keys.BUCKET_EPOCH)
    base = known.revision_floor if known else 0
    seen: dict[str, int] = {}
    await replay.take_end()
    async for batch in replay.read():
        for record in batch:
            try:
                event = events.decode(record.topic, record.value)
            except (PoisonRecord, NewerContract):
                continue  # "consuming" names what is newer
            match event:
                case CityDayStats() | CityDayRetracted():
                    key, revision = keys.manifest(event.date, event.city_id), event.revision
                case CountryDayPlanned():
                    key, revision = keys.plan(event.date), event.plan_revision
                case _:
                    continue
            seen[key] = max(seen.get(key, 0), revision)

    async def next_of(key: str) -> int:
        kind: type[Plan | Manifest] = Plan if key.startswith(keys.PLANS) else Manifest
        held = await repository.get(kind, key)
        return max(held.revision + 1 if held else 0, base)

    nexts = await bounded_map(next_of, list(seen), limit=GETS_AT_ONCE_MAX)
    repeated = {
        key: revision for (key, revision), coming in zip(seen.items(), nexts, strict=True) if revision >= coming
    }
    if repeated:
        key = max(repeated, key=lambda one: repeated[one])
        raise Unfit(
            f"the topic knows higher revisions than the bucket, of {len(repeated)} city-days and plans: {key} has "
            f"revision {repeated[key]} in the topic"
        )
    return f"{len(seen)} city-days and plans at the end of the topic, none of a revision that the bucket would repeat"
