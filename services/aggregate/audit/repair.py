"""Making wrong summaries again from manifests and plans.

Publishing the events again could not: the fold keeps the higher revision. So the summary is swapped for the one that
the bucket stands for, by comparison with the very bytes that were found wrong. The summary was read before the
manifests, so the one that replaces it misses nothing that was folded into it and that a manifest still names.

Two things are looked into before anything is thrown away. A city that the ledger alone knows may have lost its
manifest: unless its date's plan and raw objects know nothing of it either, the summary is left as it was. And where
ledger and manifest say different things under one revision, one of them was damaged: the raw object tells which.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator

import msgspec

from services.aggregate.audit.compare import LEDGER_ENTRY, Difference
from services.aggregate.audit.verify import Look, Wait, look_at, verify_dates, verify_raw_object
from services.aggregate.bucket_reader import Dates
from services.aggregate.fold import empty_summary
from services.aggregate.summary_writer import publish_summary
from shared.domain import keys, objects
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import CorruptObject, NewerObject, Summary
from shared.kafka.producer import Publisher
from shared.runtime.concurrency import bounded_map
from shared.runtime.retry import DependencyUnavailable
from shared.storage.generation_pointer import read_current
from shared.storage.object_store import AdminObjectStore, CasConflict, ObjectStore

TRIES_MAX = 10
LOST_NAMED_MAX = 10
RECOUNTED_MAX = 20
"""How many raw objects are read for one summary: damage to manifests shows in some of them, and files are large."""
RECOUNTS_AT_ONCE_MAX = 4


class TooManyConflicts(DependencyUnavailable):
    """An object is being written by others so often that it could not be swapped."""


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """A summary that was wrong: its version then and afterwards, or why it could not be made again."""

    date: dt.date
    country: CountrySlug
    differences: list[Difference]
    version_before: int | None
    version_after: int | None = None
    refused: str | None = None


class RepairedDate(msgspec.Struct, frozen=True, kw_only=True):
    """What was repaired on one date, and how far the repairing has come."""

    country_days: list[Repaired]
    dates_done: int
    dates_total: int


async def repair_dates(
    store: AdminObjectStore, publisher: Publisher, dates: Dates, *, wait: Wait, drop_lost: bool = False
) -> AsyncIterator[RepairedDate]:
    """Repair what verifying finds wrong, date by date. A summary that is right is not written.

    A summary that may lose a city or its plan, for the object is lost, is left as it is unless ``drop_lost``; and one
    whose manifests are not what their raw objects hold is left in any case.
    """
    async for verified in verify_dates(store, dates, deep=False, wait=wait):
        repaired = []
        if verified.differences:
            repaired = await repair_date(store, publisher, verified.date, drop_lost=drop_lost)
        yield RepairedDate(country_days=repaired, dates_done=verified.dates_done, dates_total=verified.dates_total)


async def repair_date(
    store: AdminObjectStore, publisher: Publisher, date: dt.date, *, drop_lost: bool = False
) -> list[Repaired]:
    """Make the wrong summaries of a date again, and publish them.

    What is in flight counts as wrong here: to fold it before the aggregate does is no fault.
    """
    repaired: dict[CountrySlug, Repaired] = {}
    for _ in range(TRIES_MAX):
        look = await look_at(store, date)
        wrong: dict[CountrySlug, list[Difference]] = {}
        for difference in look.differences():
            wrong.setdefault(difference.country, []).append(difference)
        if look.events.unreadable:
            reasons = "; ".join(reason for _, reason in sorted(look.events.unreadable.items())[:LOST_NAMED_MAX])
            unreadable = (
                f"not all that it is made from can be read: {reasons}. Restore what is damaged from the bucket's "
                f"versions, or delete it and request the date again"
            )
            return [*repaired.values(), *(_refused(look, country, wrong[country], unreadable) for country in wrong)]
        contended = False
        for country, differences in wrong.items():
            reason = await _reason_to_refuse(store, look, country, differences, drop_lost=drop_lost)
            if reason is not None:
                repaired[country] = _refused(look, country, differences, reason)
                continue
            try:
                repaired[country] = await _swap_in(store, look, country, differences)
            except CasConflict:
                contended = True
                continue
            await publish_summary(store, publisher, look.generation, date, country)
        if not contended and (await read_current(store)).live == look.generation:
            return list(repaired.values())
    raise TooManyConflicts(f"summaries of {date} were written by others {TRIES_MAX} times: try again later")


async def _reason_to_refuse(
    store: AdminObjectStore, look: Look, country: CountrySlug, differences: list[Difference], *, drop_lost: bool
) -> str | None:
    """Say why a summary must not be made again, if so.

    A later build wrote it, or a manifest is damaged or lost of a city of its ledger.
    """
    found = look.found.get(country)
    key = keys.summary(look.generation, look.events.date, country)
    try:
        summary = objects.decode(Summary, found.body, key) if found else None
    except NewerObject as error:
        return str(error)
    except CorruptObject:
        return None  # what it knew cannot be told; the manifests are all there is
    damaged = await _damaged_manifests(store, look, country, differences)
    if damaged or drop_lost or summary is None:
        return damaged
    return await _what_would_be_lost(store, look, summary)


async def _what_would_be_lost(store: AdminObjectStore, look: Look, summary: Summary) -> str | None:
    """Say what a summary knows that may have lost its manifest or its plan."""
    expected = look.events.expected_cities()
    if summary.plan_revision and expected is None:
        return (
            "the plan of the date is lost: restore it from the bucket's versions or request the date again; "
            "--drop-lost leaves it out"
        )
    remade = look.events.summary(summary.country)
    named = remade.ledger if remade else {}
    unnamed = {city_id: entry for city_id, entry in summary.ledger.items() if city_id not in named}
    elsewhere = {stats.city_id for stats in look.events.statistics()}
    lost = []
    for city_id, entry in unnamed.items():
        if city_id in elsewhere:
            # Its manifest has it in another country. A tombstone keeps older records out, whoever set it.
            may_be_lost = entry.contribution is None
        else:
            may_be_lost = expected is None or city_id in expected or await _has_raw(store, summary.date, city_id)
        if may_be_lost:
            lost.append(city_id)
    if not lost:
        return None
    more = f" and {len(lost) - LOST_NAMED_MAX} more" if len(lost) > LOST_NAMED_MAX else ""
    return (
        f"no manifest says anything of city {', '.join(lost[:LOST_NAMED_MAX])}{more}: restore it or request the date "
        f"again; --drop-lost leaves it out"
    )


async def _damaged_manifests(
    store: AdminObjectStore, look: Look, country: CountrySlug, differences: list[Difference]
) -> str | None:
    """Say which manifests are not what their raw objects hold, of those that the ledger contradicts."""
    contradicted = {one.city_id for one in differences if one.what == LEDGER_ENTRY}
    stats = [one for one in look.events.statistics() if one.country == country and one.city_id in contradicted]
    recounts = await bounded_map(
        lambda one: verify_raw_object(store, one), stats[:RECOUNTED_MAX], limit=RECOUNTS_AT_ONCE_MAX
    )
    damaged = [one for of_file in recounts for one in of_file]
    if not damaged:
        return None
    first = damaged[0]
    cities = ", ".join(sorted({str(one.city_id) for one in damaged}))
    return (
        f"it may be right, and the manifest wrong of city {cities}: {first.what} is {first.found}, the manifest says "
        f"{first.expected}. Restore the manifest from the bucket's versions, or "
        f"'tripfold reprocess --from {first.date} --to {first.date} --city {first.city_id} --again' "
        "makes a new revision from the raw object"
    )


async def _has_raw(store: AdminObjectStore, date: dt.date, city_id: CityId) -> bool:
    async for _ in store.list(keys.raw_of_city_day(date, city_id)):
        return True
    return False


async def _swap_in(store: ObjectStore, look: Look, country: CountrySlug, differences: list[Difference]) -> Repaired:
    date = look.events.date
    remade = look.events.summary(country) or empty_summary(date, country)
    found = look.found.get(country)
    key = keys.summary(look.generation, date, country)
    await store.compare_and_swap(key, objects.encode(remade), etag=found.etag if found else None)
    return Repaired(
        date=date,
        country=country,
        differences=differences,
        version_before=_version_of(look, country),
        version_after=remade.version,
    )


def _refused(look: Look, country: CountrySlug, differences: list[Difference], reason: str) -> Repaired:
    return Repaired(
        date=look.events.date,
        country=country,
        differences=differences,
        version_before=_version_of(look, country),
        refused=reason,
    )


def _version_of(look: Look, country: CountrySlug) -> int | None:
    found = look.found.get(country)
    if found is None:
        return None
    try:
        return objects.decode(Summary, found.body, "").version
    except CorruptObject:
        return None
