"""Publishing again, from the bucket, what the compacted topics do not hold as they should.

A topic that is behind gets the record that it lacks. One that is *ahead* (it knows a higher revision than the bucket,
as after a restored backup) cannot be mended by the same revision, for consumers keep the highest: the city-day or plan
gets a revision above it, which the base of the lineage has to allow. What nothing in the bucket stands for is told.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec

from services.aggregate.bucket import Dates
from services.aggregate.repairing import publish_as_stored, publish_summary
from services.ingest.lineage import read_lineage
from services.ingest.revision import reissued, reissued_plan
from services.operate.topic_audit import TopicAudit
from services.operate.topic_records import RecordDifference
from shared import keys, objects
from shared.bounded import map_bounded
from shared.current import read_current
from shared.events import Event
from shared.identity import CityId, CountrySlug, utc_now
from shared.objects import CorruptObject, Manifest, Plan
from shared.outbox import events_of_manifest, events_of_plan
from shared.publishing import Publisher
from shared.store import LostRace, OperatedStore
from shared.topics import Topic

TRIES_MAX = 10
KEYS_AT_ONCE_MAX = 16

_Revised = TypeVar("_Revised", Manifest, Plan)


class RepairedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A key whose records were wrong, and what was done about it, or why nothing could be."""

    difference: RecordDifference
    done: str = ""
    refused: str | None = None


class _Refused(Exception):  # a named reason, like all errors here
    """The records of this key cannot be mended: the message says why, and what to do."""


async def repair_topic(
    store: OperatedStore, publisher: Publisher, audit: TopicAudit, topic: Topic, dates: Dates
) -> AsyncIterator[RepairedRecord]:
    """Mend what an audit of a topic finds."""

    async def mend(difference: RecordDifference) -> RepairedRecord:
        try:
            done = await _mend(store, publisher, difference)
        except (_Refused, CorruptObject) as error:
            return RepairedRecord(difference=difference, refused=str(error))
        return RepairedRecord(difference=difference, done=done)

    async for audited in audit.run(topic, dates):
        for repaired in await map_bounded(mend, audited.differences, at_once_max=KEYS_AT_ONCE_MAX):
            yield repaired


async def _mend(store: OperatedStore, publisher: Publisher, difference: RecordDifference) -> str:
    if difference.what == "object":
        raise _Refused("restore it from the bucket's versions, or 'tripfold repair' a summary")
    if difference.unnamed:
        raise _Refused(
            f"nothing in the bucket stands for this key: request {difference.date} again; if that brings nothing, "
            f"consumers have to be told to drop it"
        )
    _, country_part, *city = difference.key.split("/")
    country = CountrySlug(country_part)
    if difference.topic is Topic.COUNTRY_DAY_SUMMARIES:
        live = (await read_current(store)).live
        await publish_summary(store, publisher, live, difference.date, country)
        ahead = "; whoever keeps the higher version has to be told" if difference.ahead else ""
        return f"published again{ahead}"
    if not city or city[0].startswith("+"):
        return await _mend_plan(store, publisher, difference, country)
    return await _mend_city_day(store, publisher, difference, CityId(city[0]))


async def _mend_city_day(
    store: OperatedStore, publisher: Publisher, difference: RecordDifference, city_id: CityId
) -> str:
    key = keys.manifest(difference.date, city_id)

    def read(body: bytes) -> Manifest:
        return objects.decode(Manifest, body, key)

    def reissue(manifest: Manifest, base: int) -> Manifest:
        return reissued(manifest, attempt=uuid.uuid4().hex, base=base)

    done = await _raise(store, key, read, reissue, difference.ahead)
    await publish_as_stored(store, publisher, key, lambda body: events_of_manifest(read(body)))
    return done


async def _mend_plan(
    store: OperatedStore, publisher: Publisher, difference: RecordDifference, country: CountrySlug
) -> str:
    key = keys.plan(difference.date)

    def read(body: bytes) -> Plan:
        return objects.decode(Plan, body, key)

    def events_of(body: bytes) -> list[Event]:
        plan = read(body)
        # A plan of another revision is news for each of its countries.
        told = {country} if difference.ahead is None else {*plan.countries, *plan.gone}
        return [event for one in sorted(told) for event in events_of_plan(plan, one)]

    done = await _raise(store, key, read, lambda plan, base: reissued_plan(plan, base=base), difference.ahead)
    await publish_as_stored(store, publisher, key, events_of)
    return done


async def _raise(
    store: OperatedStore,
    key: str,
    read: Callable[[bytes], _Revised],
    reissue: Callable[[_Revised, int], _Revised],
    ahead: int | None,
) -> str:
    """Give a manifest or plan a revision above ``ahead``, unless it has one; tell what will be published."""
    for _ in range(TRIES_MAX):
        found = await store.get(key)
        if found is None:
            raise _Refused(f"{key} is gone")
        stored = read(found.body)
        if ahead is None or stored.revision > ahead:
            return f"published again, at revision {stored.revision}"
        above = reissue(stored, (await read_lineage(store, utc_now)).base)
        if above.revision <= ahead:
            raise _Refused(
                f"the topic knows revision {ahead}, and the bucket's next one is {above.revision}: run "
                f"'tripfold restore', then this again"
            )
        try:
            await store.swap(key, objects.encode(above), etag=found.etag)
        except LostRace:
            continue
        return f"published as a new revision, {above.revision}"
    raise _Refused(f"{key} was written by others {TRIES_MAX} times: try again later")
