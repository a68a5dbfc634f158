"""Checks S3, Kafka, topics, upstream, schema version and revisions, and names a remedy for each fault."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec
import typer
from msgspec import UNSET
from rich.text import Text

from services.aggregate.audit.mend import KINDS, faults_of, sampled_faults
from services.aggregate.replay.generations import rebuild_age_s
from services.aggregate.replay.topic_reader import KafkaTopicReader, TopicReader
from services.api.auth import key_file_is_exposed, read_keys
from services.ingest.planner.city_list import InvalidCityList, parse_city_list
from services.ingest.upstream.circuit_breaker import CircuitBreaker
from services.ingest.upstream.client import HttpUpstream
from services.ingest.upstream.errors import PermanentUpstreamError, TransientUpstreamError, UpstreamDown
from shared.domain import events, keys, schema
from shared.domain.errors import OperatorError
from shared.domain.events import CityDayRetracted, CityDayStats, CountryDayPlanned, NewerContract, PoisonRecord
from shared.domain.ids import utc_now
from shared.domain.objects import BucketEpoch, CorruptObject, Manifest, Plan
from shared.domain.topics import GROUPS, Topic
from shared.kafka.admin import check_topics
from shared.kafka.dead_letters import ERROR_HEADER
from shared.kafka.poll import UndecodableRecord
from shared.kafka.producer import KafkaPublisher
from shared.kafka.raw_batches import Undecodable
from shared.kafka.records import consumed_records
from shared.kafka.skip_markers import is_marked
from shared.runtime.concurrency import bounded_map
from shared.runtime.health import Health
from shared.runtime.retry import DependencyUnavailable, Retrier
from shared.runtime.settings import Settings
from shared.storage.conditional_writes import UnsafeStore
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectStore
from shared.storage.repository import Repository
from shared.storage.s3 import S3Store
from shared.storage.schema_switch import WrongSchemaVersion, read_written_version
from tripfold.console import Records
from tripfold.operate.command_line import AsJson, command_settings, console, print_json, run_command

NEWER_NAMED_MAX = 10
FAULTS_NAMED_MAX = 10
RACE_ROUNDS = 3
RACE_WRITERS = 4
REVISION_RECORDS_MAX = 2_000
DEAD_LETTERS_MAX = 2_000
"""How many dead letters of each partition are read."""
WAITING_RECORDS_MAX = 5_000
"""The most records of a partition that are read after the last commit: more than a batch has."""
GETS_AT_ONCE_MAX = 16
NEEDS = {
    "compare-and-swap": {"S3"},
    "schema version": {"S3"},
    "stored objects": {"S3"},
    "topics": {"Kafka"},
    "consumers": {"S3", "Kafka", "topics"},
    "dead letters": {"S3", "Kafka", "topics"},
    "revisions": {"S3", "Kafka"},
    "rebuild": {"S3"},
}
"""The checks that a check needs. Without them it does not run: a probe could even make a missing bucket."""
REBUILD_OLD_S = 3_600
EXPIRES_SOON = dt.timedelta(days=14)
NOT_CHECKED = "not checked: first repair what failed above"
AGAIN = "it responded to the checks above: run 'tripfold doctor' again, and look at its log if this stays"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check: its name, whether it passed, what it found, and the remedy if it failed."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


class CheckFailed(OperatorError):
    """A check failed. The message says what it found."""


def doctor_command(*, as_json: AsJson = False) -> None:
    """Check S3 and its compare-and-swap, Kafka, topics, consumers, upstream and revisions; exit 1 if a check fails.

    Example: tripfold doctor
    """
    settings = command_settings()

    async def run() -> list[Check]:
        return [one async for one in run_checks(settings)]

    checks = run_command(run())
    if as_json:
        print_json(checks)
    else:
        records_of(checks).print(console)
    if not all(one.ok for one in checks):
        raise typer.Exit(1)


def records_of(checks: Iterable[Check]) -> Records:
    """Return the records of checks: the name, the verdict, what it found, and the remedy."""
    records = Records("check", "", "found", "remedy")
    for one in checks:
        verdict = Text("ok", style="green") if one.ok else Text("failed", style="red")
        records.add(one.what, verdict, one.found, one.remedy)
    return records


async def run_checks(settings: Settings) -> AsyncIterator[Check]:
    """Check S3, compare-and-swap, schema version, Kafka, topics, consumers, upstream, revisions and a rebuild."""
    async with S3Store(settings) as store, KafkaPublisher(settings, source="doctor") as publisher:
        failed: set[str] = set()
        for what, check, remedy in _checks(settings, store, publisher):
            missing = NEEDS.get(what, set()) & failed
            if missing:
                yield Check(
                    what=what,
                    ok=False,
                    found=f"not checked without {' and '.join(sorted(missing))}",
                    remedy=NOT_CHECKED,
                )
                continue
            result = await _run_check(what, check, remedy)
            if not result.ok:
                failed.add(what)
            yield result


def _checks(
    settings: Settings, store: S3Store, publisher: KafkaPublisher
) -> list[tuple[str, Callable[[], Awaitable[str]], str]]:
    """Return the name, the work and the remedy of each check."""

    async def s3() -> str:
        await store.get(keys.CURRENT, first_bytes=0)
        return f"bucket {store.bucket} responds"

    async def kafka() -> str:
        await publisher.check()
        return f"{settings.kafka_bootstrap_servers} responds"

    checks: list[tuple[str, Callable[[], Awaitable[str]], str]] = [
        ("S3", s3, "check TRIPFOLD_S3_* and the AWS credentials; make the bucket with 'tripfold bucket apply'"),
        (
            "compare-and-swap",
            lambda: check_compare_and_swap(store),
            "do not use this store: concurrent writers would lose each other's changes",
        ),
        (
            "schema version",
            lambda: check_schema_version(store),
            "use the build that the message names",
        ),
        (
            "stored objects",
            lambda: check_stored_objects(store),
            "mend them with 'tripfold repair', or restore them from the bucket's versions",
        ),
        ("Kafka", kafka, "check TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS, and that the brokers run"),
        (
            "topics",
            lambda: _check_topics(settings),
            "'tripfold topics apply' creates missing topics; 'tripfold topics check' says how to change the others",
        ),
        (
            "consumers",
            lambda: _check_consumers(settings, store),
            "upgrade the processes, or move the record to the dead letters: tripfold skip TOPIC PARTITION OFFSET",
        ),
        (
            "dead letters",
            lambda: _check_dead_letters(settings, store),
            "mend the objects with 'tripfold repair', or restore them from the bucket's versions",
        ),
        ("upstream", lambda: check_city_list(settings), "check TRIPFOLD_UPSTREAM_URL, and that this server runs"),
        (
            "revisions",
            lambda: _check_revisions(settings, store),
            "stop the services, run 'tripfold restore', start them, then 'tripfold republish'",
        ),
        (
            "rebuild",
            lambda: check_rebuild_mark(store),
            "if it no longer runs, clear its mark with 'tripfold rebuild --abandon'",
        ),
    ]
    if settings.api_keys or settings.api_keys_file:
        checks.append(
            (
                "API keys",
                lambda: check_api_keys(settings, utc_now()),
                "correct the entries; until then the API keeps the last valid keys, and a new process does not start",
            )
        )
    return checks


async def _run_check(what: str, check: Callable[[], Awaitable[str]], remedy: str) -> Check:
    try:
        return Check(what=what, ok=True, found=await check())
    except DependencyUnavailable as error:
        return Check(what=what, ok=False, found=str(error), remedy=AGAIN if what in NEEDS else remedy)
    except (OperatorError, CorruptObject) as error:
        return Check(what=what, ok=False, found=str(error), remedy=remedy)


async def check_compare_and_swap(store: AdminObjectStore) -> str:
    """Let writers race to make and to change one object. Raises CheckFailed unless exactly one wins each race.

    A writer whose response was lost counts as the winner if its bytes are stored.
    """
    key = f"state/probe-{uuid.uuid4().hex}.json"
    try:
        for number in range(RACE_ROUNDS):
            etag = await _race_once(store, key, f"{number}-made", None)
            await _race_once(store, key, f"{number}-changed", etag)
            await store.delete(key)
    except UnsafeStore as error:  # found before the first race, as by every process that writes
        raise CheckFailed(str(error)) from error
    finally:
        await store.delete(key)
    return f"1 of {RACE_WRITERS} concurrent writes succeeded, in each of {2 * RACE_ROUNDS} rounds"


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
        raise CheckFailed(f"{len(winners)} of {RACE_WRITERS} concurrent conditional writes succeeded; only one may")
    stored = await store.get(key)
    written = [number for number in range(RACE_WRITERS) if stored and stored.body == _probe(name, number)]
    if stored is None or not written or (winners and winners != written):
        raise CheckFailed("after concurrent conditional writes the object is not what the successful one wrote")
    return stored.etag


def _probe(name: str, number: int) -> bytes:
    return f'{{"probe":"{name}","writer":{number}}}'.encode()


async def check_schema_version(store: ObjectStore) -> str:
    """Return which schema version is written, and whether an upgrade has to be finalized.

    Raises CheckFailed if this build cannot write the version.
    """
    try:
        version = await read_written_version(store)
    except WrongSchemaVersion as error:
        raise CheckFailed(str(error)) from error
    if version == schema.SCHEMA_VERSION:
        found = f"version {version} is written, the latest of this build"
        if (await read_current(store)).changes_counted_since is UNSET:
            return (
                f"{found}. The API lists every month of a query, as it does not trust the change index yet: when all "
                "processes run this build, run 'tripfold upgrade finalize'"
            )
        return found
    return (
        f"version {version} is written. When all processes run this build, 'tripfold upgrade finalize' lets them write "
        f"version {schema.SCHEMA_VERSION}"
    )


async def check_stored_objects(store: ObjectStore) -> str:
    """Look for unreadable objects: the state of the bucket, and the dates requested last. Raises CheckFailed."""
    _require_none([fault async for fault in sampled_faults(store)])
    return "the state of the bucket and the dates requested last are readable"


def _require_none(faults: list[CorruptObject]) -> None:
    if faults:
        more = f", and {len(faults) - FAULTS_NAMED_MAX} more" if len(faults) > FAULTS_NAMED_MAX else ""
        raise CheckFailed(f"unreadable: {'; '.join(map(str, faults[:FAULTS_NAMED_MAX]))}{more}")


async def _check_dead_letters(settings: Settings, store: ObjectStore) -> str:
    replay = KafkaTopicReader(settings, Topic.DEAD_LETTERS, last_records_max=DEAD_LETTERS_MAX)
    try:
        return await check_dead_letters(store, replay)
    finally:
        await replay.close()


async def check_dead_letters(store: ObjectStore, replay: TopicReader) -> str:
    """Look for dates and requests whose records go to the dead letters because an object is unreadable.

    Raises CheckFailed if such an object is still unreadable.
    """
    blamed: set[str] = set()
    await replay.take_end()
    async for batch in replay.read():
        for record in batch:
            key = dict(record.headers).get(ERROR_HEADER, b"").partition(b" ")[0].decode(errors="replace")
            if key.startswith(tuple(KINDS)):
                blamed.add(key)
    _require_none(await faults_of(store, sorted(blamed)))
    return "none of the latest is due to an object that is still unreadable"


async def _check_topics(settings: Settings) -> str:
    differences = await check_topics(settings)
    if differences:
        raise CheckFailed(
            "; ".join(f"{one.topic}: {one.what} is {one.found}, not {one.expected}" for one in differences)
        )
    return "all have the expected settings"


async def check_rebuild_mark(store: AdminObjectStore) -> str:
    """Return the age of a rebuild's mark. Raises CheckFailed if it is so old that the rebuild has probably crashed."""
    age_s = await rebuild_age_s(store)
    if age_s is None:
        return "no rebuild is marked"
    found = f"a rebuild began {age_s:.0f} s ago and has not ended"
    if age_s > REBUILD_OLD_S:
        raise CheckFailed(found)
    return found


async def check_api_keys(settings: Settings, now: dt.datetime) -> str:
    """Return how many API keys there are, and which have expired or expire soon. Raises the errors of `read_keys`."""
    keys = read_keys(settings)
    found = [f"{len(keys):,} keys" if len(keys) != 1 else "1 key"]
    if expired := [key.name for key in keys if key.expired(now)]:
        found.append(f"expired: {', '.join(expired)}")
    if soon := [key.name for key in keys if not key.expired(now) and key.expired(now + EXPIRES_SOON)]:
        found.append(f"expire within {EXPIRES_SOON.days} days: {', '.join(soon)}")
    if key_file_is_exposed(settings):
        path = settings.api_keys_file
        found.append(f"every user of this machine may read or change {path}: chmod o= {path}")
    return "; ".join(found)


async def _check_consumers(settings: Settings, store: ObjectStore) -> str:
    blocking: list[str] = []
    for topic, group in GROUPS.items():
        replay = KafkaTopicReader(settings, topic, after_commits_of=group, records_max=WAITING_RECORDS_MAX)
        try:
            blocking += await newer_records(store, replay)
            blocking += await undecodable_records(store, topic, replay.undecodable.values())
        finally:
            await replay.close()
    if blocking:
        raise CheckFailed("; ".join(blocking))
    return "no record blocks a consumer"


async def undecodable_records(store: ObjectStore, topic: Topic, found: Iterable[Undecodable]) -> list[str]:
    """Name the records that the Kafka client cannot decode, and that are not marked to be skipped."""
    waiting = []
    for bad in found:
        (record,) = consumed_records(topic, [bad.record])
        if not await is_marked(store, record):
            waiting.append(str(UndecodableRecord(topic, bad)))
    return waiting


async def newer_records(store: ObjectStore, replay: TopicReader) -> list[str]:
    """Name the records of a later schema version that are not marked to be skipped."""
    newer: list[str] = []
    await replay.take_end()
    async for batch in replay.read():
        for record in batch:
            try:
                events.decode(record.topic, record.value)
            except PoisonRecord:
                continue
            except NewerContract as error:
                if not await is_marked(store, record):
                    newer.append(str(error.at(record.partition, record.offset)))
                    if len(newer) == NEWER_NAMED_MAX:
                        return newer
    return newer


async def check_city_list(settings: Settings) -> str:
    """Return how many cities the upstream lists. Raises CheckFailed if it lists none, or cannot be reached."""
    url = f"{settings.upstream_url}/cities"
    retrier = Retrier(health=Health(), wait_max_s=settings.retry_wait_max_s)
    async with HttpUpstream(settings, CircuitBreaker(retrier)) as upstream:
        try:
            listed = parse_city_list(await upstream.cities())
        except (UpstreamDown, TransientUpstreamError, PermanentUpstreamError, InvalidCityList) as error:
            raise CheckFailed(f"{url}: {error}" if isinstance(error, InvalidCityList) else str(error)) from error
    found = f"{url} lists {len(listed.cities)} cities"
    if listed.bad_cities_count:
        first = listed.bad_cities[0]
        found += f", and {listed.bad_cities_count} bad entries; the first is {first.entry}: {first.reason}"
    if not listed.cities and not settings.upstream_allow_empty_city_list:
        raise CheckFailed(found)
    return found


async def _check_revisions(settings: Settings, store: ObjectStore) -> str:
    replay = KafkaTopicReader(settings, Topic.CITY_STATS, last_records_max=REVISION_RECORDS_MAX)
    try:
        return await check_revisions(store, replay)
    finally:
        await replay.close()


async def check_revisions(store: ObjectStore, replay: TopicReader) -> str:
    """Compare the revisions at the end of the topic with the next revisions of the bucket.

    Raises CheckFailed if the bucket would give out a revision that the topic already has, as after a restored backup.
    Consumers would keep the record of the topic.
    """
    repository = Repository(store)
    known = await repository.get(BucketEpoch, keys.BUCKET_EPOCH)
    floor = known.revision_floor if known else 0
    seen: dict[str, int] = {}
    await replay.take_end()
    async for batch in replay.read():
        for record in batch:
            try:
                event = events.decode(record.topic, record.value)
            except (PoisonRecord, NewerContract):
                continue  # the check of the consumers names newer records
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
        return max(held.revision + 1 if held else 0, floor)

    nexts = await bounded_map(next_of, list(seen), limit=GETS_AT_ONCE_MAX)
    repeated = {
        key: revision for (key, revision), coming in zip(seen.items(), nexts, strict=True) if revision >= coming
    }
    if repeated:
        key = max(repeated, key=lambda one: repeated[one])
        raise CheckFailed(
            f"the topic has higher revisions than the bucket, of {len(repeated)} city-days and plans: {key} has "
            f"revision {repeated[key]} in the topic"
        )
    return f"{len(seen):,} city-days and plans at the end of the topic; the bucket would repeat none of their revisions"
