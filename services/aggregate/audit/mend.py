"""Finds the unreadable objects of a bucket, and mends them. Their bytes are kept under ``damaged/``.

| unreadable | mended |
|---|---|
| a plan or a manifest | it is removed, and the next request of its date makes a new one |
| a summary | `repair` makes it from manifests and plans |
| a request, a backfill, a schedule, a quarantine report, an idempotency claim | it is removed |
| ``state/active-requests/`` | it is removed; the requeue of stalled requests publishes what waited |
| ``state/open-backfills.json`` | it names every backfill that is not closed |
| ``state/schema.json`` | it has the first version that this build writes |
| ``state/countries.json`` | it has the countries of all plans |
| ``state/bucket-epoch.json`` | its floor is the present time |
| ``state/current.json`` | the highest generation is live, and `repair` corrects its summaries |

A pointer that is missing, and an open backfill that the list lacks, are mended too.

No service writes an unreadable object. So the delete, which S3 does without a condition, removes what was read here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from services.aggregate.bucket_reader import GETS_AT_ONCE_MAX, Dates, key_batches
from shared.domain import keys, objects, schema
from shared.domain.backfills import is_closed
from shared.domain.ids import CountrySlug, RequestId
from shared.domain.objects import (
    ActiveRequests,
    Backfill,
    BucketEpoch,
    BucketObject,
    CorruptObject,
    Countries,
    GenerationPointer,
    Manifest,
    NewerObject,
    OpenBackfills,
    Plan,
    QuarantineReport,
    RequestRecord,
    Schedule,
    SchemaSwitch,
    Summary,
)
from shared.runtime.concurrency import bounded_map
from shared.storage.bucket_epoch import new_epoch, raise_floor
from shared.storage.generation_pointer import GenerationPointerMissing, read_current
from shared.storage.object_store import CasConflict, ObjectStore
from shared.storage.repository import Repository

LATEST_REQUESTS = 20
SAMPLE_OBJECTS_MAX = 1_000

_Kind = TypeVar("_Kind", bound=BucketObject)

KINDS: Mapping[str, type[BucketObject]] = {
    keys.BUCKET_EPOCH: BucketEpoch,
    keys.COUNTRIES: Countries,
    keys.CURRENT: GenerationPointer,
    keys.OPEN_BACKFILLS: OpenBackfills,
    keys.SCHEMA_SWITCH: SchemaSwitch,
    keys.ACTIVE_REQUESTS: ActiveRequests,
    keys.REQUESTS: RequestRecord,
    keys.BACKFILLS: Backfill,
    keys.SCHEDULES: Schedule,
    keys.QUARANTINE: QuarantineReport,
    keys.IDEMPOTENCY: BucketObject,
    keys.PLANS: Plan,
    keys.MANIFESTS: Manifest,
    keys.SUMMARIES: Summary,
}
"""The kinds of objects, by their key or its prefix."""
OF_DATES = (keys.PLANS, keys.MANIFESTS, keys.SUMMARIES)
"""What `repair_dates` reads, date by date."""


class Mended(msgspec.Struct, frozen=True, kw_only=True):
    """An object that was mended, what was wrong with it, and what was done."""

    key: str
    fault: str
    done: str


async def sampled_faults(store: ObjectStore) -> AsyncIterator[CorruptObject]:
    """Yield an error for each unreadable object in the state of the bucket, and of the dates requested last.

    At most SAMPLE_OBJECTS_MAX objects are read under each prefix.
    """
    prefixes = [prefix for prefix in KINDS if prefix not in (*OF_DATES, keys.QUARANTINE, keys.ACTIVE_REQUESTS)]
    dates: set[dt.date] = set()
    async for batch in key_batches(store, keys.REQUESTS):
        found = await bounded_map(
            lambda key: _readable(store, RequestRecord, key), batch[:LATEST_REQUESTS], limit=GETS_AT_ONCE_MAX
        )
        dates = {record.date for record in found if record is not None}
        break
    for date in sorted(dates):
        prefixes += [
            keys.plan(date),
            keys.active_requests(date),
            keys.manifests_of(date),
            keys.quarantine_of_date(date),
        ]
    try:
        live = (await read_current(store)).live
        prefixes += [keys.summaries_of_date(live, date) for date in sorted(dates)]
    except (CorruptObject, GenerationPointerMissing):
        pass  # it is one of the faults
    for prefix in prefixes:
        async for batch in key_batches(store, prefix):
            for fault in await faults_of(store, batch[:SAMPLE_OBJECTS_MAX]):
                yield fault
            break


async def mend_objects(store: ObjectStore, dates: Dates, clock: Callable[[], dt.datetime]) -> AsyncIterator[Mended]:
    """Mend all unreadable objects of a range except plans, manifests and summaries, which `repair_dates` mends."""
    for prefix in KINDS:
        if prefix in OF_DATES:
            continue
        async for listed in key_batches(store, prefix):
            dated = [(key, keys.parse_date(key)) for key in listed]
            batch = [key for key, date in dated if date is None or date in dates]
            for fault in await faults_of(store, batch):
                if (mended := await mend(store, fault.key, clock)) is not None:
                    yield mended
    try:
        await read_current(store)
    except GenerationPointerMissing as error:
        pointer, done = await _successor(store, keys.CURRENT, clock)
        if pointer is not None and await Repository(store).create_if_absent(keys.CURRENT, pointer) is pointer:
            yield Mended(key=keys.CURRENT, fault=str(error), done=done)
    if (added := await _add_open_backfills(store)) is not None:
        yield Mended(key=keys.OPEN_BACKFILLS, fault=f"{keys.OPEN_BACKFILLS} lacks open backfills", done=added)


async def mend(store: ObjectStore, key: str, clock: Callable[[], dt.datetime]) -> Mended | None:
    """Mend an object. Return None if it is readable or gone, or if a later build wrote it."""
    found = await store.get(key)
    fault = _fault_in(key, found.body) if found is not None else None
    if found is None or fault is None or isinstance(fault, NewerObject):
        return None
    copy = keys.damaged(key)
    await store.put(copy, found.body)
    made, done = await _successor(store, key, clock)
    if made is not None:
        try:
            await store.compare_and_swap(key, objects.encode(made), etag=found.etag)
        except CasConflict:
            return None  # somebody else mended it
    else:
        if key.startswith((keys.PLANS, keys.MANIFESTS)):
            await raise_floor(store, clock)  # what is made instead must have a revision above the lost one
        await store.delete(key)
    return Mended(key=key, fault=str(fault), done=f"{done}; its bytes are in {copy}")


async def _successor(store: ObjectStore, key: str, clock: Callable[[], dt.datetime]) -> tuple[BucketObject | None, str]:
    """Return what stands in for an object and what that is, or None if the object is removed."""
    match key:
        case keys.BUCKET_EPOCH:
            epoch = new_epoch(clock())
            return epoch, f"made again with the revision floor {epoch.revision_floor}"
        case keys.COUNTRIES:
            countries = await _countries_of_plans(store)
            return countries, f"made again from the plans: {len(countries.slugs)} names"
        case keys.CURRENT:
            live = await _highest_generation(store)
            pointer = GenerationPointer(live=live, highest=live, changes_counted_since=clock())
            return pointer, f"made again: generation {live} is live"
        case keys.OPEN_BACKFILLS:
            return OpenBackfills(), "begun anew"
        case keys.SCHEMA_SWITCH:
            switch = SchemaSwitch(schema_version=schema.oldest_written_version())
            return switch, f"made again with schema version {switch.schema_version}"
        case _:
            date = keys.parse_date(key)
            return None, f"removed: request {date} again" if key.startswith(OF_DATES) else "removed"


async def _add_open_backfills(store: ObjectStore) -> str | None:
    """Name every backfill that is not closed as open. Return what was done, or None if nothing was."""
    unclosed: set[RequestId] = set()
    async for batch in key_batches(store, keys.BACKFILLS):
        for backfill in await bounded_map(lambda key: _readable(store, Backfill, key), batch, limit=GETS_AT_ONCE_MAX):
            if backfill is not None and not is_closed(backfill):
                unclosed.add(backfill.backfill_id)
    added: set[RequestId] = set()

    async def add(stored: OpenBackfills | None) -> OpenBackfills | None:
        nonlocal added
        before = stored or OpenBackfills()
        added = unclosed.difference(before.backfill_ids)
        if not added:
            return stored
        ids = tuple(sorted({*before.backfill_ids, *added}))
        return OpenBackfills(backfill_ids=ids, additions=before.additions + 1)

    await Repository(store).update(OpenBackfills, keys.OPEN_BACKFILLS, add)
    return f"added {', '.join(sorted(added))}" if added else None


async def _countries_of_plans(store: ObjectStore) -> Countries:
    slugs: dict[str, CountrySlug] = {}
    async for batch in key_batches(store, keys.PLANS):
        for plan in await bounded_map(lambda key: _readable(store, Plan, key), batch, limit=GETS_AT_ONCE_MAX):
            if plan is not None:
                slugs |= {name: country for country, name in plan.gone.items()}
                slugs |= {planned.name: country for country, planned in plan.countries.items()}
    return Countries(slugs=dict(sorted(slugs.items())))


async def _highest_generation(store: ObjectStore) -> int:
    highest = 1
    async for listed in store.list(keys.SUMMARIES):
        highest = max(highest, keys.parse_generation(listed.key) or highest)
    return highest


async def _readable(store: ObjectStore, kind: type[_Kind], key: str) -> _Kind | None:
    try:
        return await Repository(store).get(kind, key)
    except CorruptObject:
        return None


async def faults_of(store: ObjectStore, batch: Sequence[str]) -> list[CorruptObject]:
    """Return an error for each of these objects that is unreadable. One that does not exist is none."""

    async def fault_of(key: str) -> CorruptObject | None:
        found = await store.get(key)
        return None if found is None else _fault_in(key, found.body)

    return [one for one in await bounded_map(fault_of, batch, limit=GETS_AT_ONCE_MAX) if one is not None]


def _fault_in(key: str, body: bytes) -> CorruptObject | None:
    kind = KINDS.get(key) or next(kind for prefix, kind in KINDS.items() if key.startswith(prefix))
    try:
        objects.decode(kind, body, key)
    except CorruptObject as error:
        return error
    return None
