"""Repairs wrong summaries from manifests and plans. First it mends those of a date that are unreadable (`mend.py`).

Events that are published again could not repair them, since the fold keeps the higher revision. So a compare-and-swap
replaces the wrong bytes with the summary that manifests and plan give. The wrong summary was read before the manifests,
so the new one misses no folded event that a manifest still names.

Two checks come before a summary is replaced:

- A city that only the ledger has may have lost its manifest. The summary stays as it is, unless the plan and the raw
  objects of the date do not have the city either.
- Where ledger and manifest differ under one revision, one of them is damaged. The raw object decides which.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable

import msgspec

from services.aggregate.audit.compare import LEDGER_ENTRY, RAW_EXPIRED, Difference
from services.aggregate.audit.mend import Mended, mend
from services.aggregate.audit.verify import DateSnapshot, Wait, read_snapshot, verify_dates, verify_raw_object
from services.aggregate.bucket_reader import Dates
from services.aggregate.fold import empty_summary
from services.aggregate.summary_writer import publish_summary
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import CorruptObject, NewerObject, Summary
from shared.kafka.producer import Publisher
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import DependencyUnavailable
from shared.storage.change_index import ChangeCounter
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectStore

TRIES_MAX = 10
LOST_NAMED_MAX = 10
RECOUNTED_MAX = 20
"""At most so many raw objects are read for one summary: files are large, and a sample shows damaged manifests."""
RECOUNTS_AT_ONCE_MAX = 4

Clock = Callable[[], dt.datetime]


class TooManyConflicts(DependencyUnavailable):
    """Other writers changed the object at every try to replace it."""


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """A wrong summary: its version before and after the repair, or the reason why it was not repaired."""

    date: dt.date
    country: CountrySlug
    differences: list[Difference]
    version_before: int | None
    version_after: int | None = None
    refused: str | None = None


class RepairedDate(msgspec.Struct, frozen=True, kw_only=True):
    """The repairs of one date, the plan and manifests of it that were mended, and the progress over all dates."""

    country_days: list[Repaired]
    mended: list[Mended]
    dates_done: int
    dates_total: int


async def repair_dates(
    store: AdminObjectStore, publisher: Publisher, dates: Dates, *, wait: Wait, clock: Clock, drop_lost: bool = False
) -> AsyncIterator[RepairedDate]:
    """Verify date by date, and repair the wrong summaries. A summary that is right is not written.

    A summary that would lose a city or its plan, because their object is lost, stays as it is unless ``drop_lost``. A
    summary whose manifests do not match their raw objects always stays as it is. All months are counted in the change
    index, since an earlier repair may have crashed before it counted.
    """
    changes = ChangeCounter(store)
    months: set[str] = set()
    async for verified in verify_dates(store, dates, deep=False, wait=wait):
        repaired: list[Repaired] = []
        mended: list[Mended] = []
        if verified.differences:
            mended = await _mend_date(store, verified.date, clock)
            repaired = await repair_date(store, publisher, changes, verified.date, drop_lost=drop_lost)
        months.add(keys.month_of(verified.date))
        yield RepairedDate(
            country_days=repaired, mended=mended, dates_done=verified.dates_done, dates_total=verified.dates_total
        )
    await changes.count((await read_current(store)).live, months)


async def _mend_date(store: AdminObjectStore, date: dt.date, clock: Clock) -> list[Mended]:
    """Mend the unreadable plan and manifests of a date."""
    unreadable = (await read_snapshot(store, date)).events.unreadable
    return [one for key in sorted(unreadable) if (one := await mend(store, key, clock)) is not None]


async def repair_date(
    store: AdminObjectStore, publisher: Publisher, changes: ChangeCounter, date: dt.date, *, drop_lost: bool = False
) -> list[Repaired]:
    """Repair the wrong summaries of a date, count and publish them.

    A summary with events in flight counts as wrong here: the repair may fold them before the aggregate does.
    """
    repaired: dict[CountrySlug, Repaired] = {}
    for _ in range(TRIES_MAX):
        snapshot = await read_snapshot(store, date)
        wrong: dict[CountrySlug, list[Difference]] = {}
        for difference in snapshot.differences():
            wrong.setdefault(difference.country, []).append(difference)
        if snapshot.events.unreadable:
            reasons = "; ".join(reason for _, reason in sorted(snapshot.events.unreadable.items())[:LOST_NAMED_MAX])
            unreadable = f"not all manifests and plans of the date can be read: {reasons}"
            return [*repaired.values(), *(_refused(snapshot, country, wrong[country], unreadable) for country in wrong)]
        conflict = False
        for country, differences in wrong.items():
            reason = await _reason_to_refuse(store, snapshot, country, differences, drop_lost=drop_lost)
            if reason is not None:
                repaired[country] = _refused(snapshot, country, differences, reason)
                continue
            try:
                repaired[country] = await _swap_in(store, snapshot, country, differences)
            except CasConflict:
                conflict = True
                continue
            await publish_summary(store, publisher, changes, generation=snapshot.generation, date=date, country=country)
        if not conflict and (await read_current(store)).live == snapshot.generation:
            return list(repaired.values())
    raise TooManyConflicts(f"summaries of {date} changed at each of {TRIES_MAX} tries. Try again later")


async def _reason_to_refuse(
    store: AdminObjectStore,
    snapshot: DateSnapshot,
    country: CountrySlug,
    differences: list[Difference],
    *,
    drop_lost: bool,
) -> str | None:
    """Return the reason to leave a summary as it is, or None.

    A later build wrote the summary, or the manifest of a city in its ledger is damaged or lost.
    """
    found = snapshot.found.get(country)
    key = keys.summary(snapshot.generation, snapshot.events.date, country)
    try:
        summary = objects.decode(Summary, found.body, key) if found else None
    except NewerObject as error:
        return str(error)
    except CorruptObject:
        return None  # its ledger cannot be read, so only the manifests remain
    damaged = await _damaged_manifests(store, snapshot, country, differences)
    if damaged or drop_lost or summary is None:
        return damaged
    return await _reason_of_loss(store, snapshot, summary)


async def _reason_of_loss(store: AdminObjectStore, snapshot: DateSnapshot, summary: Summary) -> str | None:
    """Return which cities or plan of a summary would be lost, or None."""
    expected = snapshot.events.expected_cities()
    if summary.plan_revision and expected is None:
        return (
            "the plan of the date is lost. Restore it from the bucket's versions or request the date again; "
            "--drop-lost leaves it out"
        )
    expected_summary = snapshot.events.summary(summary.country)
    named = expected_summary.ledger if expected_summary else {}
    unnamed = {city_id: entry for city_id, entry in summary.ledger.items() if city_id not in named}
    elsewhere = {stats.city_id for stats in snapshot.events.statistics()}
    lost = []
    for city_id, entry in unnamed.items():
        if city_id in elsewhere:
            # Its manifest has it in another country. A tombstone still keeps older records out.
            may_be_lost = entry.contribution is None
        else:
            may_be_lost = expected is None or city_id in expected or await _has_raw(store, summary.date, city_id)
        if may_be_lost:
            lost.append(city_id)
    if not lost:
        return None
    more = f" and {len(lost) - LOST_NAMED_MAX} more" if len(lost) > LOST_NAMED_MAX else ""
    return (
        f"city {', '.join(lost[:LOST_NAMED_MAX])}{more} has no manifest. Restore the manifest or request the date "
        f"again; --drop-lost leaves the city out"
    )


async def _damaged_manifests(
    store: AdminObjectStore, snapshot: DateSnapshot, country: CountrySlug, differences: list[Difference]
) -> str | None:
    """Return which manifests contradict both the ledger and their raw objects, or None."""
    contradicted = {one.city_id for one in differences if one.what == LEDGER_ENTRY}
    stats = [one for one in snapshot.events.statistics() if one.country == country and one.city_id in contradicted]
    recounts = await bounded_map(
        lambda one: verify_raw_object(store, one), stats[:RECOUNTED_MAX], limit=RECOUNTS_AT_ONCE_MAX
    )
    found = [one for of_file in recounts for one in of_file]
    damaged = [one for one in found if one.what != RAW_EXPIRED]
    expired = [one for one in found if one.what == RAW_EXPIRED]
    if expired and not damaged:
        cities = ", ".join(sorted({str(one.city_id) for one in expired}))
        return (
            f"summary and manifest of city {cities} differ, and the raw object that decides between them has expired. "
            f"Restore the manifest from the bucket's versions, or delete it, request {expired[0].date} again "
            "and repair again"
        )
    if not damaged:
        return None
    first = damaged[0]
    cities = ", ".join(sorted({str(one.city_id) for one in damaged}))
    return (
        f"the summary may be right, and the manifest of city {cities} wrong: {first.what} is {first.found}, the "
        f"manifest says {first.expected}. Restore the manifest from the bucket's versions, or "
        f"'tripfold backfill {first.date} --source bucket --city {first.city_id} --again' "
        "makes a new revision from the raw object"
    )


async def _has_raw(store: AdminObjectStore, date: dt.date, city_id: CityId) -> bool:
    async for _ in store.list(keys.raw_of_city_day(date, city_id)):
        return True
    return False


async def _swap_in(
    store: ObjectStore, snapshot: DateSnapshot, country: CountrySlug, differences: list[Difference]
) -> Repaired:
    date = snapshot.events.date
    expected_summary = snapshot.events.summary(country) or empty_summary(date, country)
    found = snapshot.found.get(country)
    key = keys.summary(snapshot.generation, date, country)
    await store.compare_and_swap(key, objects.encode(expected_summary), etag=found.etag if found else None)
    return Repaired(
        date=date,
        country=country,
        differences=differences,
        version_before=_version_of(snapshot, country),
        version_after=expected_summary.version,
    )


def _refused(snapshot: DateSnapshot, country: CountrySlug, differences: list[Difference], reason: str) -> Repaired:
    return Repaired(
        date=snapshot.events.date,
        country=country,
        differences=differences,
        version_before=_version_of(snapshot, country),
        refused=reason,
    )


def _version_of(snapshot: DateSnapshot, country: CountrySlug) -> int | None:
    found = snapshot.found.get(country)
    if found is None:
        return None
    try:
        return objects.decode(Summary, found.body, "").version
    except CorruptObject:
        return None
