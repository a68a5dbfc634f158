"""Restores the order of revisions after a backup of the bucket was put back. Runs while no service runs.

The backup has forgotten which revisions were given out since, and consumers keep the highest revision of a key. The
order of effects: the base of the lineage is raised above all that the topic knows, and never lowered; then each plan
and city-day that the topic knows better gets a revision above the base, and its events are published.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable

import msgspec

from services.aggregate.bucket_reader import Dates, events_of_whole_plan
from services.aggregate.replay.topic_reader import TopicReader
from services.aggregate.summary_writer import publish_as_stored
from services.ingest.worker.manifest import reissued, reissued_plan
from shared.domain import events, keys, objects
from shared.domain.errors import OperatorError
from shared.domain.events import Event, NewerContract, PoisonRecord
from shared.domain.ids import CityId, utc_now
from shared.domain.objects import EPOCH, BucketEpoch, CorruptObject, Manifest, Plan
from shared.domain.outbox import events_of_manifest
from shared.domain.topics import Topic
from shared.kafka.producer import Publisher
from shared.kafka.records import ConsumedRecord
from shared.storage.bucket_epoch import read_bucket_epoch
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository
from tripfold.operate.topic_audit import TopicAudit
from tripfold.operate.topic_records import RecordDifference, UnreadRecord, UnreadRecords, revision_of


class CannotRestore(OperatorError):
    """The base cannot be raised like this; the message says why, and what to do."""


class TopicHighest(msgspec.Struct, frozen=True, kw_only=True):
    """The highest revision in ``city-stats``, the key that has it, and how many records were read.

    ``unread`` names the first records that this build cannot read, of ``unread_total``. Of those of a later version the
    revisions count too.
    """

    revision: int
    key: str
    records: int
    unread_total: int = 0
    unread: tuple[UnreadRecord, ...] = ()


class _Numbered(msgspec.Struct, frozen=True):
    """What an event of any version says of its revision: the contract never retypes a field."""

    revision: int = 0
    plan_revision: int = 0


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the base. ``topic`` is None if the topic was not read."""

    base_before: int | None
    base: int
    topic: TopicHighest | None
    dry_run: bool


class Reissued(msgspec.Struct, frozen=True, kw_only=True):
    """A key that the topic knows better than the bucket: its new revision, or why it got none."""

    key: str
    known: int
    revision: int | None = None
    refused: str | None = None


def seconds_of(now: dt.datetime) -> int:
    """Return a time as a base: seconds since 2020-01-01, as in a bucket that is born then."""
    return int((now - EPOCH).total_seconds())


async def highest_of(replay: TopicReader, report: Callable[[int, int], None]) -> TopicHighest:
    """Read the whole topic; return the highest revision in it."""
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


async def raise_base(
    store: ObjectStore,
    *,
    topic: TopicHighest | None,
    wanted: int | None,
    clock: Callable[[], dt.datetime],
    dry_run: bool,
) -> Restored:
    """Raise the base to ``wanted``, or just above what the topic knows. Raises CannotRestore rather than lower it."""
    if wanted is None and topic is None:
        raise CannotRestore(
            "without the topic it is not known which revisions were given out: with Kafka lost, give --now"
        )
    if wanted is not None and topic is not None and wanted <= topic.revision:
        raise CannotRestore(
            f"a base of {wanted} is not above revision {topic.revision}, which the topic knows of {topic.key}: "
            f"give more, or leave --base out"
        )
    base = wanted if wanted is not None else (topic.revision if topic else 0) + 1
    repository = Repository(store)
    while True:
        read = await repository.read(BucketEpoch, keys.BUCKET_EPOCH)
        before = read.value if read else None
        if before is not None and base <= before.revision_floor:
            if wanted is not None and wanted < before.revision_floor:
                raise CannotRestore(
                    f"the base is {before.revision_floor} already, and never lowered: give more than {wanted}"
                )
            base = before.revision_floor
        restored = Restored(
            base_before=before.revision_floor if before else None, base=base, topic=topic, dry_run=dry_run
        )
        if dry_run or (before is not None and base == before.revision_floor):
            return restored
        raised = BucketEpoch(revision_floor=base, born_at=before.born_at if before else clock())
        try:
            await repository.compare_and_swap(keys.BUCKET_EPOCH, raised, over=read)
        except CasConflict:
            continue
        return restored


async def reissue(store: ObjectStore, publisher: Publisher, audit: TopicAudit) -> AsyncIterator[Reissued]:
    """Give a new revision to each plan and city-day of which ``city-stats`` knows a higher one, and publish it."""
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
        if stored.revision > known:  # another key of the same plan or city came first
            break
        base = (await read_bucket_epoch(store, utc_now)).revision_floor
        if isinstance(stored, Plan):
            above: Plan | Manifest = reissued_plan(stored, revision_floor=base)
        else:
            above = reissued(stored, attempt=uuid.uuid4().hex, revision_floor=base)
        if above.revision <= known:
            raise CannotRestore(
                f"the topic knows revision {known} of {difference.key}, and the next one would be {above.revision}: "
                f"a service runs; stop all, then run 'tripfold restore' again"
            )
        try:
            await store.compare_and_swap(key, objects.encode(above), etag=found.etag)
        except CasConflict:
            continue
    await publish_as_stored(store, publisher, key, events_of)
    return stored.revision
