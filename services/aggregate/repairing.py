"""Making wrong summaries again from manifests and plans.

Publishing the events again could not: the fold keeps the higher revision. So the summary is swapped for the one that
the bucket stands for, by comparison with the very bytes that were found wrong. The summary was read before the
manifests, so the one that replaces it misses nothing that was folded into it and that a manifest still names.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from services.aggregate.bucket import TRUTH, Dates, known_dates
from services.aggregate.fold import empty_summary
from services.aggregate.folding import summary_event
from services.aggregate.verify import Difference
from services.aggregate.verifying import Look, Wait, settled_look_at
from shared import keys, objects
from shared.current import read_current
from shared.events import Event
from shared.identity import CountrySlug
from shared.objects import CorruptObject, Summary
from shared.patience import SurroundingsFault
from shared.publishing import Outgoing, Publisher
from shared.store import LostRace, ObjectStore, OperatedStore

TRIES_MAX = 10


class StillContended(SurroundingsFault):
    """A summary is being written by others so often that it could not be swapped."""


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
    store: OperatedStore, publisher: Publisher, dates: Dates, *, wait: Wait
) -> AsyncIterator[RepairedDate]:
    """Repair date by date. A summary that is right is not written."""
    live = (await read_current(store)).live
    known = await known_dates(store, dates, *TRUTH, keys.summaries_of_generation(live))
    for done, date in enumerate(known, 1):
        repaired = await repair_date(store, publisher, date, wait=wait)
        yield RepairedDate(country_days=repaired, dates_done=done, dates_total=len(known))


async def repair_date(store: OperatedStore, publisher: Publisher, date: dt.date, *, wait: Wait) -> list[Repaired]:
    """Make the wrong summaries of a date again, and publish them."""
    repaired: dict[CountrySlug, Repaired] = {}
    for _ in range(TRIES_MAX):
        look, told = await settled_look_at(store, date, wait)
        wrong: dict[CountrySlug, list[Difference]] = {}
        for difference in told:
            wrong.setdefault(difference.country, []).append(difference)
        if look.events.unreadable and wrong:
            reason = "these objects cannot be read: " + ", ".join(sorted(look.events.unreadable))
            return [*repaired.values(), *(_refused(look, country, wrong[country], reason) for country in wrong)]
        lost = False
        for country, differences in wrong.items():
            try:
                one = await _swap_in(store, look, country, differences)
            except LostRace:
                lost = True
                continue
            repaired[country] = one
            await publish_summary(store, publisher, look.generation, date, country)
        if not lost and (await read_current(store)).live == look.generation:
            return list(repaired.values())
    raise StillContended(f"summaries of {date} were written by others {TRIES_MAX} times: try again later")


async def _swap_in(store: ObjectStore, look: Look, country: CountrySlug, differences: list[Difference]) -> Repaired:
    date = look.events.date
    remade = look.events.summary(country) or empty_summary(date, country)
    found = look.found.get(country)
    key = keys.summary(look.generation, date, country)
    await store.swap(key, objects.encode(remade), etag=found.etag if found else None)
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


async def publish_summary(
    store: ObjectStore, publisher: Publisher, generation: int, date: dt.date, country: CountrySlug
) -> None:
    """Publish a summary as it is stored, unless there is nothing to tell of it."""
    key = keys.summary(generation, date, country)

    def events_of(body: bytes) -> list[Event]:
        summary = objects.decode(Summary, body, key)
        return [summary_event(summary)] if summary.version else []

    await publish_as_stored(store, publisher, key, events_of)


async def publish_as_stored(
    store: ObjectStore, publisher: Publisher, key: str, events_of: Callable[[bytes], Iterable[Event]]
) -> None:
    """Publish what an object stands for, and again if it changed meanwhile.

    Otherwise these records might come after those of the change, and be what compaction keeps.
    """
    found = await store.get(key)
    while found is not None:
        await publisher.publish(map(Outgoing, events_of(found.body)))
        again = await store.get(key, first_bytes=1)
        if again is not None and again.etag == found.etag:
            return
        found = await store.get(key)
