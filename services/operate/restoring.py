"""Raising the base of the bucket's lineage, after a backup of the bucket was put back.

The backup has forgotten which revisions were given out since. Consumers keep the highest revision of a key, so the
next ones have to be above every one that the topic knows: that is what the base is for. It is never lowered.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import msgspec

from services.aggregate.replay import Replay
from services.operate.topic_records import UnreadRecord, UnreadRecords, revision_of
from shared import events, keys
from shared.errors import OperatorError
from shared.events import NewerContract, PoisonRecord
from shared.objects import EPOCH, Lineage
from shared.publishing import Received
from shared.repository import Repository
from shared.store import LostRace, ObjectStore


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


def seconds_of(now: dt.datetime) -> int:
    """Return a time as a base: seconds since 2020-01-01, as in a bucket that is born then."""
    return int((now - EPOCH).total_seconds())


async def highest_of(replay: Replay, report: Callable[[int, int], None]) -> TopicHighest:
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


def _revision_of_newer(record: Received) -> int:
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
        read = await repository.read(Lineage, keys.LINEAGE)
        before = read.value if read else None
        if before is not None and base <= before.base:
            if wanted is not None and wanted < before.base:
                raise CannotRestore(f"the base is {before.base} already, and never lowered: give more than {wanted}")
            base = before.base
        restored = Restored(base_before=before.base if before else None, base=base, topic=topic, dry_run=dry_run)
        if dry_run or (before is not None and base == before.base):
            return restored
        raised = Lineage(base=base, born_at=before.born_at if before else clock())
        try:
            await repository.compare_and_swap(keys.LINEAGE, raised, over=read)
        except LostRace:
            continue
        return restored
