"""Raises the revisions of a bucket that was restored from a backup. Runs while no service runs.

A restored bucket does not know which revisions were given out since the backup, and consumers keep the highest revision
of a key. The order of effects:

1. The revision floor of the bucket is raised above all revisions of the topic. It is never lowered.
2. Each plan and city-day of which the topic has a higher revision gets a revision above the floor.
3. Its events are published.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated

import msgspec
import typer

from services.aggregate.bucket_reader import Dates, events_of_whole_plan
from services.aggregate.replay.topic_reader import TopicReader
from services.aggregate.summary_writer import publish_as_stored
from services.ingest.worker.manifest import reissued, reissued_plan
from shared.domain import events, keys, objects
from shared.domain.errors import OperatorError
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.ids import REVISION_FLOOR_MAX, CityId, CountField, utc_now
from shared.domain.objects import EPOCH, BucketEpoch, CorruptObject, Manifest, Plan
from shared.domain.outbox import events_of_manifest
from shared.domain.topics import Topic
from shared.kafka.producer import KafkaPublisher, Publisher
from shared.kafka.records import ConsumedRecord
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository
from tripfold.console import printable
from tripfold.operate.command_line import (
    TABLE_ROWS_MAX,
    AsJson,
    StepBars,
    command_settings,
    console,
    open_bucket,
    print_json,
    print_line,
    progress_bar,
    run_command,
    wait_before_comparison,
)
from tripfold.operate.topic_audit import TopicAudit, kafka_topics, print_unread
from tripfold.operate.topic_records import RecordDifference, UnreadRecord, UnreadRecords, revision_of


class CannotRestore(OperatorError):
    """The revision floor cannot be raised like this. The message says why, and what to do."""


class TopicHighest(msgspec.Struct, frozen=True, kw_only=True):
    """The highest revision in ``city-stats``, its key, and the number of records that were read.

    ``unread`` names the first of ``unread_total`` records that this build cannot read. The revisions of records of a
    later version count too.
    """

    revision: int
    key: str
    records: int
    unread_total: int = 0
    unread: tuple[UnreadRecord, ...] = ()


class _Numbered(msgspec.Struct, frozen=True):
    """The revision of an event of any version: the contract never changes the type of a field."""

    revision: CountField = 0
    plan_revision: CountField = 0


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """The revision floor before and after. ``topic`` is None if the topic was not read."""

    floor_before: int | None
    floor: int
    topic: TopicHighest | None
    dry_run: bool


class Reissued(msgspec.Struct, frozen=True, kw_only=True):
    """A key of which the topic has a higher revision than the bucket: its new revision, or why it got none."""

    key: str
    known: int
    revision: int | None = None
    refused: str | None = None


def restore_command(
    *,
    floor: Annotated[
        int | None,
        typer.Option(
            "--floor",
            metavar="REVISION",
            min=1,
            max=REVISION_FLOOR_MAX,
            help="The new revision floor. Default: just above the topic city-stats.",
        ),
    ] = None,
    now: Annotated[
        bool,
        typer.Option("--now", help="Use the present time as the floor, as in a new bucket: also if Kafka is lost."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the new floor, and change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Raise the revisions of a bucket that was restored from a backup. Stop all services first.

    The next revision of every city-day and plan is then above all that the topic has. Each of which the topic has a
    higher revision than the bucket gets a new one at once. Exit 1 if one could not.

    Example: tripfold restore

    Example: tripfold restore --now
    """
    if now and floor is not None:
        raise typer.BadParameter("use --floor or --now, not both", param_hint="--now")
    settings = command_settings()
    wanted = floor_at(utc_now()) if now else floor

    async def run() -> tuple[Restored, list[Reissued], str]:
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="restore") as publisher:
            await store.check()
            topic, outage = None, ""
            try:
                topic = await _read_topic(settings)
            except DependencyUnavailable as error:
                if wanted is None:
                    raise
                outage = str(error)
            restored = await raise_floor(store, topic=topic, wanted=wanted, clock=utc_now, dry_run=dry_run)
            if dry_run or topic is None:
                return restored, [], outage
            with StepBars() as bars:
                audit = TopicAudit(store, kafka_topics(settings), wait=wait_before_comparison, report=bars.report)
                return restored, [one async for one in reissue(store, publisher, audit)], outage

    restored, reissued, outage = run_command(run())
    refused = [one for one in reissued if one.refused is not None]
    if as_json:
        print_json({**msgspec.structs.asdict(restored), "reissued": reissued})
    else:
        _print_restored(restored, outage)
        if not dry_run:
            for one in refused[:TABLE_ROWS_MAX]:
                print_line(printable(f"{one.key}: {one.refused}"))
            print_line(
                f"{len(reissued) - len(refused):,} keys got new revisions, {len(refused):,} could not. Start the "
                f"services, then run 'tripfold republish'."
            )
    if refused:
        raise typer.Exit(1)


def _print_restored(restored: Restored, outage: str) -> None:
    topic = restored.topic
    if topic is None:
        print_line(f"The topic was not read: {outage}")
    else:
        print_unread(topic.unread_total, topic.unread)
        if topic.records:
            print_line(
                f"The highest revision in the topic is {topic.revision}, of {topic.key} ({topic.records:,} records)."
            )
        else:
            console.print("The topic is empty.")
    if restored.floor == restored.floor_before:
        console.print(f"The revision floor is {restored.floor}, which is above the topic: unchanged.")
        return
    verb = "would be" if restored.dry_run else "is"
    console.print(f"The revision floor {verb} {restored.floor}; it was {restored.floor_before or 'not set'}.")


async def _read_topic(settings: Settings) -> TopicHighest:
    async with KafkaPublisher(settings, source="restore") as publisher:
        await publisher.check()
    async with kafka_topics(settings)(Topic.CITY_STATS) as replay:
        with progress_bar("reading city-stats", "records") as show:
            return await highest_revision(replay, show)


def floor_at(now: dt.datetime) -> int:
    """Return a time as a revision floor: seconds since 2020-01-01, as a new bucket gets."""
    return int((now - EPOCH).total_seconds())


async def highest_revision(replay: TopicReader, report: Callable[[int, int], None]) -> TopicHighest:
    """Read the whole topic; return its highest revision."""
    total = await replay.take_end()
    highest, key, records = 0, "", 0
    unread = UnreadRecords()
    async for batch in replay.read():
        for record in batch:
            try:
                revision = revision_of(events.decode(record.topic, record.value))
            except PoisonRecord as error:
                unread.note(record, error)
                continue
            except NewerContract as error:
                unread.note(record, error)
                revision = _revision_of_newer(record)
            if revision > highest:
                highest, key = revision, (record.key or b"").decode(errors="replace")
        records += len(batch)
        report(records, total)
    return TopicHighest(
        revision=highest, key=key, records=records, unread_total=unread.total, unread=tuple(unread.named)
    )


def _revision_of_newer(record: ConsumedRecord) -> int:
    try:
        numbered = msgspec.json.decode(record.value or b"", type=_Numbered)
    except msgspec.MsgspecError:
        return 0
    return max(numbered.revision, numbered.plan_revision)


async def raise_floor(
    store: ObjectStore,
    *,
    topic: TopicHighest | None,
    wanted: int | None,
    clock: Callable[[], dt.datetime],
    dry_run: bool,
) -> Restored:
    """Raise the revision floor to ``wanted``, or just above the topic. Raises CannotRestore rather than lower it."""
    if wanted is None and topic is None:
        raise CannotRestore(
            "without the topic the revisions that were given out are unknown: if Kafka is lost, use --now"
        )
    if topic is not None and topic.revision >= REVISION_FLOOR_MAX:
        raise CannotRestore(
            f"the topic has revision {topic.revision} of {topic.key}, which no bucket gives out: the floor is at most "
            f"{REVISION_FLOOR_MAX}. Run 'tripfold republish', and this again when Kafka has compacted city-stats"
        )
    if wanted is not None and topic is not None and wanted <= topic.revision:
        raise CannotRestore(
            f"--floor is {wanted}; it must exceed revision {topic.revision}, which the topic has of {topic.key}: "
            f"use a higher number, or leave --floor out"
        )
    floor = wanted if wanted is not None else (topic.revision if topic else 0) + 1
    repository = Repository(store)
    while True:
        read = await repository.read(BucketEpoch, keys.BUCKET_EPOCH)
        before = read.value if read else None
        if before is not None and floor <= before.revision_floor:
            if wanted is not None and wanted < before.revision_floor:
                raise CannotRestore(
                    f"--floor is {wanted}; the floor is {before.revision_floor} and never falls: use a higher number"
                )
            floor = before.revision_floor
        restored = Restored(
            floor_before=before.revision_floor if before else None, floor=floor, topic=topic, dry_run=dry_run
        )
        if dry_run or (before is not None and floor == before.revision_floor):
            return restored
        raised = BucketEpoch(revision_floor=floor, born_at=before.born_at if before else clock())
        try:
            await repository.compare_and_swap(keys.BUCKET_EPOCH, raised, over=read)
        except CasConflict:
            continue
        return restored


async def reissue(store: ObjectStore, publisher: Publisher, audit: TopicAudit) -> AsyncIterator[Reissued]:
    """Give a new revision to each plan and city-day of which ``city-stats`` has a higher one, and publish it."""
    async for audited in audit.run(Topic.CITY_STATS, Dates()):
        for difference in audited.differences:
            known = difference.ahead
            if difference.unnamed:
                yield Reissued(key=difference.key, known=0, refused=f"not in the bucket: request {audited.date} again")
            elif known is not None:
                try:
                    revision = await _reissue(store, publisher, difference, known)
                except CorruptObject as error:
                    yield Reissued(key=difference.key, known=known, refused=str(error))
                else:
                    yield Reissued(key=difference.key, known=known, revision=revision)


async def _reissue(store: ObjectStore, publisher: Publisher, difference: RecordDifference, known: int) -> int:
    _, _, *city = difference.key.split("/")
    of_plan = not city or city[0].startswith("+")
    key = keys.plan(difference.date) if of_plan else keys.manifest(difference.date, CityId(city[0]))

    def read(body: bytes) -> Plan | Manifest:
        return objects.decode(Plan, body, key) if of_plan else objects.decode(Manifest, body, key)

    def events_of(body: bytes) -> list[Event]:
        stored = read(body)
        return [*(events_of_whole_plan(stored) if isinstance(stored, Plan) else events_of_manifest(stored))]

    while True:
        found = await store.get(key)
        if found is None:
            raise CorruptObject(key, "is gone")
        stored = read(found.body)
        if stored.revision > known:  # another key of the same plan or city has raised it
            break
        floor = (await read_bucket_epoch(store, utc_now)).revision_floor
        if isinstance(stored, Plan):
            above: Plan | Manifest = reissued_plan(stored, revision_floor=floor)
        else:
            above = reissued(stored, attempt=uuid.uuid4().hex, revision_floor=floor)
        if above.revision <= known:
            raise CannotRestore(
                f"the topic has revision {known} of {difference.key}, and the next one would be {above.revision}: "
                f"a service is running. Stop all services, then run 'tripfold restore' again"
            )
        try:
            await store.compare_and_swap(key, objects.encode(above), etag=found.etag)
        except CasConflict:
            continue
    await publish_as_stored(store, publisher, key, events_of)
    return stored.revision
