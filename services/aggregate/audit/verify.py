"""Verifying the live summaries against the bucket's manifests, plans and raw objects, date by date.

Of each date the summaries are read first, then the plan and the manifests: so these alone can be ahead, by events
that are on their way. Whatever is ahead is looked at again after a wait, a bounded number of times, before it counts.
A missing summary is on its way only while the request that planned its date runs: a request that has ended is served.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec

from services.aggregate.audit import compare
from services.aggregate.audit.compare import Difference
from services.aggregate.audit.recount import AuditParseError, AuditParser, Recount
from services.aggregate.bucket_reader import (
    SOURCE_PREFIXES,
    DateEvents,
    Dates,
    known_dates,
    read_events,
    read_summaries,
)
from shared.domain import keys, objects
from shared.domain.events import CityDayStats
from shared.domain.file_rules import RecordsForm
from shared.domain.ids import CountrySlug
from shared.domain.objects import BucketObject, CorruptObject, Manifest, Plan, RequestRecord, Summary
from shared.domain.requests import status_of
from shared.runtime.concurrency import bounded_map
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, ObjectNotFound, StoredObject
from shared.storage.repository import Repository

LOOKS_MAX = 6
RAW_OBJECTS_AT_ONCE_MAX = 4

_Stored = TypeVar("_Stored", bound=BucketObject)
Wait = Callable[[int], Awaitable[None]]


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What was found on one date, and how far the verifying has come."""

    date: dt.date
    country_days: int
    differences: list[Difference]
    dates_done: int
    dates_total: int
    raw_expired: int = 0


class Look(msgspec.Struct, frozen=True):
    """One date as it was read: its live summaries, and what the bucket says they must be."""

    generation: int
    found: dict[CountrySlug, StoredObject]
    events: DateEvents

    def differences(self) -> list[Difference]:
        """Compare all country-days of the date."""
        told = [
            Difference(date=self.events.date, country=CountrySlug(""), what=key, found=reason, expected="readable")
            for key, reason in sorted(self.events.unreadable.items())
        ]
        for country in sorted({*self.found, *self.events.by_country}):
            told += self.of_country(country)
        return told

    def of_country(self, country: CountrySlug) -> list[Difference]:
        """Compare one country-day."""
        found = self.found.get(country)
        key = keys.summary(self.generation, self.events.date, country)
        try:
            summary = objects.decode(Summary, found.body, key) if found else None
        except CorruptObject as error:
            return [
                Difference(
                    date=self.events.date, country=country, what=compare.SUMMARY, found=str(error), expected="readable"
                )
            ]
        told = compare.differences(self.events.summary(country), summary)
        if not told and found is not None and summary is not None:
            told = compare.byte_differences(summary, found.body)
        return told


async def look_at(store: AdminObjectStore, date: dt.date) -> Look:
    """Read the live summaries of a date, then what the bucket says of it."""
    while True:
        live = (await read_current(store)).live
        found = await read_summaries(store, live, date)
        if (await read_current(store)).live == live:
            return Look(live, found, await read_events(store, date))


async def verify_dates(
    store: AdminObjectStore,
    dates: Dates,
    *,
    deep: bool,
    wait: Wait,
    raw_expired_before: dt.datetime | None = None,
) -> AsyncIterator[Verified]:
    """Verify date by date; with ``deep`` also read every raw object that a manifest names.

    A raw object that was stored before ``raw_expired_before`` may be gone on purpose: it is counted, and no difference.

    Dates with something in flight come last, looked at until nothing is in flight, at most LOOKS_MAX times.
    """
    live = (await read_current(store)).live
    known = await known_dates(store, dates, *SOURCE_PREFIXES, keys.summaries_of_generation(live))
    done = 0
    pending = known
    for look_number in range(1, LOOKS_MAX + 1):
        if look_number > 1:
            await wait(look_number - 1)
        in_flight: list[dt.date] = []
        for date in pending:
            look = await look_at(store, date)
            told = look.differences()
            if look_number < LOOKS_MAX and any(difference.in_flight for difference in told):
                in_flight.append(date)
                continue
            if any(difference.in_flight for difference in told) and not await _request_runs(store, date):
                told = [
                    _deleted(difference) if difference.what == compare.SUMMARY else difference for difference in told
                ]
            raw = await _raw_differences(store, look, raw_expired_before) if deep else []
            told += [difference for difference in raw if difference.what != compare.RAW_EXPIRED]
            done += 1
            yield Verified(
                date=date,
                country_days=len({*look.found, *look.events.by_country}),
                differences=told,
                dates_done=done,
                dates_total=len(known),
                raw_expired=sum(difference.what == compare.RAW_EXPIRED for difference in raw),
            )
        pending = in_flight
        if not pending:
            return


async def _request_runs(store: AdminObjectStore, date: dt.date) -> bool:
    """Tell whether the request that planned a date last has not ended. What cannot be read counts as ended."""
    try:
        plan = await _read(store, Plan, keys.plan(date))
        record = await _read(store, RequestRecord, keys.request(plan.request_id)) if plan else None
    except CorruptObject:
        return False
    return record is not None and not status_of(record).ended


async def _read(store: AdminObjectStore, kind: type[_Stored], key: str) -> _Stored | None:
    found = await store.get(key)
    return objects.decode(kind, found.body, key) if found else None


def _deleted(difference: Difference) -> Difference:
    return msgspec.structs.replace(difference, in_flight=False)


async def _raw_differences(
    store: AdminObjectStore, look: Look, raw_expired_before: dt.datetime | None
) -> list[Difference]:
    of_files = await bounded_map(
        lambda stats: verify_raw_object(store, stats, raw_expired_before),
        look.events.statistics(),
        limit=RAW_OBJECTS_AT_ONCE_MAX,
    )
    return [difference for of_file in of_files for difference in of_file]


async def verify_raw_object(
    store: AdminObjectStore, stats: CityDayStats, raw_expired_before: dt.datetime | None = None
) -> list[Difference]:
    """Compare the manifest that ``stats`` were read from with the raw object that it names."""
    manifest = await Repository(store).get(Manifest, keys.manifest(stats.date, stats.city_id))
    if manifest is None or manifest.revision != stats.revision:
        return []  # replaced since the look began: its next verifying is the one that counts
    try:
        recount = await _recount(store, manifest)
    except ObjectNotFound:
        expired = raw_expired_before is not None and manifest.raw_stored_at < raw_expired_before
        what = compare.RAW_EXPIRED if expired else compare.RAW_OBJECT
        return [compare.of_raw_object(manifest, what=what, found="nothing", expected=manifest.raw_key)]
    except AuditParseError as error:
        return [compare.of_raw_object(manifest, what=compare.RAW_OBJECT, found=str(error), expected="a trip file")]
    return compare.raw_differences(manifest, recount)


async def _recount(store: AdminObjectStore, manifest: Manifest) -> Recount:
    counter = AuditParser(
        manifest.date.isoformat(),
        form=RecordsForm.parse(manifest.records_form),
        other_dates_are_bad=manifest.other_dates_are_bad,
    )
    async for chunk in store.stream(manifest.raw_key):
        await asyncio.to_thread(counter.feed, chunk)
    return await asyncio.to_thread(counter.end)
