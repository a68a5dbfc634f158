"""Verifies the live summaries against the manifests, plans and raw objects of the bucket, date by date.

For each date it reads the summaries first, then the plan and the manifests. So only these can be ahead, by events in
flight. A date with events in flight is read again after a wait, a bounded number of times, before a difference counts.
A missing summary is in flight only while the request that planned its date runs: a request that has ended is served.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable

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
from shared.domain.objects import CorruptObject, Manifest, Summary
from shared.domain.requests import status_of
from shared.runtime.concurrency import bounded_map
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, ObjectNotFound, StoredObject
from shared.storage.repository import Repository, read_plan, read_request_record

READS_MAX = 6
RAW_OBJECTS_AT_ONCE_MAX = 4

Wait = Callable[[int], Awaitable[None]]


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """The differences of one date, and the progress over all dates."""

    date: dt.date
    country_days: int
    differences: list[Difference]
    dates_done: int
    dates_total: int
    raw_expired: int = 0


class DateSnapshot(msgspec.Struct, frozen=True):
    """One date as it was read: its live summaries, and the events of its manifests and plan."""

    generation: int
    found: dict[CountrySlug, StoredObject]
    events: DateEvents

    def differences(self) -> list[Difference]:
        """Compare all country-days of the date."""
        differences = [
            Difference(date=self.events.date, country=CountrySlug(""), what=key, found=reason, expected="readable")
            for key, reason in sorted(self.events.unreadable.items())
        ]
        for country in sorted({*self.found, *self.events.by_country}):
            differences += self.of_country(country)
        return differences

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
        differences = compare.differences(self.events.summary(country), summary)
        if not differences and found is not None and summary is not None:
            differences = compare.byte_differences(summary, found.body)
        return differences


async def read_snapshot(store: AdminObjectStore, date: dt.date) -> DateSnapshot:
    """Read the live summaries of a date, then its plan and manifests."""
    while True:
        live = (await read_current(store)).live
        found = await read_summaries(store, live, date)
        if (await read_current(store)).live == live:
            return DateSnapshot(live, found, await read_events(store, date))


async def verify_dates(
    store: AdminObjectStore,
    dates: Dates,
    *,
    deep: bool,
    wait: Wait,
) -> AsyncIterator[Verified]:
    """Verify date by date, also that each raw object that a manifest names is there; with ``deep`` also read it.

    A missing raw object that has expired is counted, and no difference.
    Dates with events in flight come last. They are read until no event is in flight, at most READS_MAX times.
    """
    live = (await read_current(store)).live
    known = await known_dates(store, dates, *SOURCE_PREFIXES, keys.summaries_of_generation(live))
    done = 0
    pending = known
    for read_number in range(1, READS_MAX + 1):
        if read_number > 1:
            await wait(read_number - 1)
        in_flight: list[dt.date] = []
        for date in pending:
            snapshot = await read_snapshot(store, date)
            differences = snapshot.differences()
            if read_number < READS_MAX and any(difference.in_flight for difference in differences):
                in_flight.append(date)
                continue
            if any(difference.in_flight for difference in differences) and not await _request_runs(store, date):
                differences = [
                    _not_in_flight(difference) if difference.what == compare.SUMMARY else difference
                    for difference in differences
                ]
            raw = await (_raw_differences(store, snapshot) if deep else _lost_raw_objects(store, snapshot))
            differences += [difference for difference in raw if difference.what != compare.RAW_EXPIRED]
            done += 1
            yield Verified(
                date=date,
                country_days=len({*snapshot.found, *snapshot.events.by_country}),
                differences=differences,
                dates_done=done,
                dates_total=len(known),
                raw_expired=sum(difference.what == compare.RAW_EXPIRED for difference in raw),
            )
        pending = in_flight
        if not pending:
            return


async def _request_runs(store: AdminObjectStore, date: dt.date) -> bool:
    """Return whether the last request that planned a date still runs. An unreadable record counts as ended."""
    try:
        plan = await read_plan(store, date)
        record = await read_request_record(store, plan.request_id) if plan else None
    except CorruptObject:
        return False
    return record is not None and not status_of(record).ended


def _not_in_flight(difference: Difference) -> Difference:
    return msgspec.structs.replace(difference, in_flight=False)


async def _lost_raw_objects(store: AdminObjectStore, snapshot: DateSnapshot) -> list[Difference]:
    """Return the raw objects that a manifest names, and that a listing of the date lacks."""
    listed = {raw.key async for raw in store.list(keys.raw_of(snapshot.events.date))}
    lost = [stats for stats in snapshot.events.statistics() if stats.raw_key not in listed]
    return [_missing(manifest) for stats in lost if (manifest := await _manifest_of(store, stats)) is not None]


async def _raw_differences(store: AdminObjectStore, snapshot: DateSnapshot) -> list[Difference]:
    of_files = await bounded_map(
        lambda stats: verify_raw_object(store, stats),
        snapshot.events.statistics(),
        limit=RAW_OBJECTS_AT_ONCE_MAX,
    )
    return [difference for of_file in of_files for difference in of_file]


async def verify_raw_object(store: AdminObjectStore, stats: CityDayStats) -> list[Difference]:
    """Compare the manifest of ``stats`` with the raw object that it names."""
    manifest = await _manifest_of(store, stats)
    if manifest is None:
        return []
    try:
        recount = await _recount(store, manifest)
    except ObjectNotFound:
        return [_missing(manifest)]
    except AuditParseError as error:
        return [compare.of_raw_object(manifest, what=compare.RAW_OBJECT, found=str(error), expected="a trip file")]
    return compare.raw_differences(manifest, recount)


async def _manifest_of(store: AdminObjectStore, stats: CityDayStats) -> Manifest | None:
    """Return the manifest of ``stats``, or None if another revision has replaced it; the next verification counts."""
    manifest = await Repository(store).get(Manifest, keys.manifest(stats.date, stats.city_id))
    return manifest if manifest is not None and manifest.revision == stats.revision else None


def _missing(manifest: Manifest) -> Difference:
    what = compare.RAW_EXPIRED if manifest.raw_expired else compare.RAW_OBJECT
    return compare.of_raw_object(manifest, what=what, found="nothing", expected=manifest.raw_key)


async def _recount(store: AdminObjectStore, manifest: Manifest) -> Recount:
    parser = AuditParser(
        manifest.date.isoformat(),
        form=RecordsForm.parse(manifest.records_form),
        other_dates_are_bad=manifest.other_dates_are_bad,
    )
    async for chunk in store.stream(manifest.raw_key):
        await asyncio.to_thread(parser.feed, chunk)
    return await asyncio.to_thread(parser.end)
