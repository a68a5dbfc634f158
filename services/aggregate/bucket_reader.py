"""Reads the events of every manifest and plan in the bucket, date by date.

Manifests and plans are the source of truth: summaries can always be rebuilt from them. Only one date is in memory at a
time, however many dates there are.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from services.aggregate.fold import StatEvent, empty_summary, fold
from shared.domain import keys, objects
from shared.domain.events import CityDayStats, CountryDayPlanned
from shared.domain.ids import CityId, CountrySlug
from shared.domain.objects import CorruptObject, Manifest, Plan, Summary
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.runtime.concurrency import bounded_map
from shared.storage.object_store import ObjectStore, StoredObject

GETS_AT_ONCE_MAX = 16
KEYS_AT_ONCE_MAX = 1_000
SOURCE_PREFIXES = (keys.PLANS, keys.MANIFESTS)
"""The prefixes of the objects that summaries are built from."""


class Dates(msgspec.Struct, frozen=True):
    """A range of dates, both ends included; None is an end that is open."""

    first: dt.date | None = None
    last: dt.date | None = None

    def __contains__(self, date: dt.date) -> bool:
        return (self.first is None or self.first <= date) and (self.last is None or date <= self.last)

    def overlaps(self, month: str) -> bool:
        """Return whether a date of the month, ``YYYY-MM``, is in the range."""
        first, last = (None if end is None else keys.month_of(end) for end in (self.first, self.last))
        return (first is None or first <= month) and (last is None or month <= last)


class DateEvents(msgspec.Struct, frozen=True):
    """The events of one date by country, and the objects that cannot be read, each with the reason."""

    date: dt.date
    by_country: dict[CountrySlug, list[StatEvent]]
    unreadable: dict[str, str]

    def take(self, key: str, make: Callable[[], Iterable[StatEvent]]) -> None:
        """Add the events that ``make`` reads from an object, or record why the object cannot be read."""
        try:
            for event in make():
                self.by_country.setdefault(event.country, []).append(event)
        except CorruptObject as error:
            self.unreadable[key] = str(error)

    def summary(self, country: CountrySlug) -> Summary | None:
        """Return the expected summary of a country, or None if the bucket has no events of the country-day."""
        events = self.by_country.get(country)
        return fold(empty_summary(self.date, country), events) if events else None

    def expected_cities(self) -> frozenset[CityId] | None:
        """Return the cities that the date's plan expects in all countries, or None if there is no plan."""
        plans = [
            event for events in self.by_country.values() for event in events if isinstance(event, CountryDayPlanned)
        ]
        return frozenset(city_id for plan in plans for city_id in plan.city_ids) if plans else None

    def statistics(self) -> list[CityDayStats]:
        """Return the statistics of the current files from the date's manifests."""
        return [event for events in self.by_country.values() for event in events if isinstance(event, CityDayStats)]


async def read_events(store: ObjectStore, date: dt.date) -> DateEvents:
    """Read a date's plan and manifests, and return their events."""
    read = DateEvents(date, {}, {})

    async def read_manifest(key: str) -> None:
        found = await store.get(key)
        if found is not None:
            read.take(key, lambda: events_of_manifest(objects.decode(Manifest, found.body, key)))

    key = keys.plan(date)
    found = await store.get(key)
    if found is not None:
        read.take(key, lambda: events_of_whole_plan(objects.decode(Plan, found.body, key)))
    async for batch in key_batches(store, keys.manifests_of(date)):
        await bounded_map(read_manifest, batch, limit=GETS_AT_ONCE_MAX)
    return read


async def read_summaries(store: ObjectStore, generation: int, date: dt.date) -> dict[CountrySlug, StoredObject]:
    """Read all summaries of a date, as bytes, by country."""
    read: dict[CountrySlug, StoredObject] = {}

    async def read_one(key: str) -> None:
        named = keys.parse_summary(key)
        found = await store.get(key)
        if named is not None and found is not None:
            read[named[1]] = found

    async for batch in key_batches(store, keys.summaries_of_date(generation, date)):
        await bounded_map(read_one, batch, limit=GETS_AT_ONCE_MAX)
    return read


async def known_dates(store: ObjectStore, dates: Dates, *prefixes: str) -> list[dt.date]:
    """Return the dates of the range that have a key under ``prefixes``, in order.

    For a range with both ends it returns every date without listing, since the bucket may hold many more.
    """
    if dates.first is not None and dates.last is not None:
        days = (dates.last - dates.first).days + 1
        return [dates.first + dt.timedelta(days=day) for day in range(days)]
    found: set[dt.date] = set()
    for prefix in prefixes:
        async for listed in store.list(prefix):
            date = keys.parse_date(listed.key)
            if date is not None and date in dates:
                found.add(date)
    return sorted(found)


def events_of_whole_plan(plan: Plan) -> list[StatEvent]:
    """Return the events of all countries of a plan."""
    return [event for country in sorted({*plan.countries, *plan.gone}) for event in events_of_plan(plan, country)]


async def key_batches(store: ObjectStore, prefix: str) -> AsyncIterator[list[str]]:
    """Yield the keys under a prefix, KEYS_AT_ONCE_MAX at a time."""
    batch: list[str] = []
    async for listed in store.list(prefix):
        batch.append(listed.key)
        if len(batch) == KEYS_AT_ONCE_MAX:
            yield batch
            batch = []
    if batch:
        yield batch
