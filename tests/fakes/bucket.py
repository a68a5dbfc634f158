"""A bucket in memory as the services leave it: plans, manifests with raw objects, and live summaries."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence

import msgspec

from services.aggregate.bucket_reader import Dates, read_events
from services.aggregate.consumer import CityStatsConsumer
from shared.domain import events, keys, objects
from shared.domain.contribution import Contribution
from shared.domain.events import Event
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.objects import GenerationPointer, Manifest, PastRevision, Plan, PlannedCity, PlannedCountry, Summary
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.storage.generation_pointer import read_current
from tests.fakes.builders import Clock, Trip, trip_file
from tests.fakes.handling import handle_all
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore

DAY = dt.date(2024, 5, 1)
ALL = Dates()
REQUEST = RequestId("018f38bf-1d00-7000-8000-000000000001")
NOON = dt.datetime(2024, 5, 2, 12, tzinfo=dt.UTC)


class FakeBucket:
    """A bucket, a log and a consumer of city-stats, which runs only when a test calls it."""

    def __init__(self) -> None:
        self.clock = Clock(NOON)
        self.store = MemoryStore(self.clock)
        self.log = MemoryLog()
        self.publisher = MemoryPublisher(self.log)
        self.store.write(keys.CURRENT, objects.encode(GenerationPointer()))

    def plan(self, revision: int, cities: dict[str, Sequence[int]], date: dt.date = DAY) -> list[Event]:
        """Write the plan of a date from cities by country. Return its events, which are not folded."""
        plan = Plan(
            date=date,
            revision=revision,
            request_id=REQUEST,
            planned_at=NOON,
            countries={
                CountrySlug(country): PlannedCountry(
                    name=country.title(),
                    cities=tuple(
                        PlannedCity(city_id=CityId(str(city)), upstream_id=str(city), name=f"City {city}")
                        for city in sorted(numbers)
                    ),
                )
                for country, numbers in sorted(cities.items())
            },
        )
        self.store.write(keys.plan(date), objects.encode(plan))
        return [event for country in plan.countries for event in events_of_plan(plan, country)]

    def store_file(
        self, city: int, revision: int, trips: Sequence[Trip], country: str = "armenia", date: dt.date = DAY
    ) -> list[Event]:
        """Write the raw object and manifest of a city-day as a worker does. Return its events, which are not folded."""
        body = trip_file(trips, date)
        attempt = f"attempt-{city}-{revision}"
        city_id = CityId(str(city))
        raw_key = keys.raw(date, city_id, attempt)
        self.store.write(raw_key, body)
        previous = self.manifest(city, date)
        manifest = Manifest(
            date=date,
            city_id=city_id,
            city_name=f"City {city}",
            country=CountrySlug(country),
            country_name=country.title(),
            revision=revision,
            contribution=Contribution(
                trips=len(trips),
                passengers=sum(trip.passengers for trip in trips),
                accidents=sum(trip.accident for trip in trips),
                delay_total_ms=sum(trip.delay_ms for trip in trips),
            ),
            trips_on_other_dates=0,
            attempt=attempt,
            raw_key=raw_key,
            sha256=hashlib.sha256(body).hexdigest(),
            size_bytes=len(body),
            upstream_url="http://upstream.test/",
            etag=None,
            last_modified=None,
            plan_revision=1,
            request_id=REQUEST,
            rule_version=1,
            ingested_at=NOON + dt.timedelta(seconds=revision),
            retracted=({previous.country: revision} if previous is not None and previous.country != country else {}),
            history=() if previous is None else (_past(previous), *previous.history),
        )
        self.store.write(keys.manifest(date, city_id), objects.encode(manifest))
        return list(events_of_manifest(manifest))

    def manifest(self, city: int, date: dt.date = DAY) -> Manifest | None:
        """Return a city-day's manifest."""
        key = keys.manifest(date, CityId(str(city)))
        return objects.decode(Manifest, self.store.objects[key].body, key) if key in self.store.objects else None

    async def fold(self, *batches: Sequence[Event]) -> None:
        """Fold events as a newly started aggregate does."""
        folder = CityStatsConsumer(self.store, self.publisher, cache_bytes=100_000)
        for batch in batches:
            await handle_all(folder.process, [self.record_of(event) for event in batch])

    def record_of(self, event: Event) -> ConsumedRecord:
        """Append an event to its topic."""
        headers = events.headers_of(event, source="test")
        return self.log.append(event.topic, event.key.encode(), events.encode(event), headers)

    async def fold_all(self) -> None:
        """Fold the events of all plans and manifests."""
        for listed in [key for key in self.store.objects if key.startswith("plans/")]:
            date = keys.parse_date(listed)
            assert date is not None
            for country_events in (await read_events(self.store, date)).by_country.values():
                await self.fold(country_events)

    async def summary_key(self, country: str = "armenia", date: dt.date = DAY) -> str:
        """Return the key of a live summary."""
        return keys.summary((await read_current(self.store)).live, date, CountrySlug(country))

    async def summary(self, country: str = "armenia", date: dt.date = DAY) -> Summary:
        """Return a live summary."""
        key = await self.summary_key(country, date)
        return objects.decode(Summary, self.store.objects[key].body, key)

    async def damage(self, country: str = "armenia", **changes: object) -> None:
        """Change some fields of a live summary."""
        damaged = msgspec.structs.replace(await self.summary(country), **changes)
        self.store.write(await self.summary_key(country), objects.encode(damaged))

    def published_versions(self, country: str = "armenia", date: dt.date = DAY) -> list[int]:
        """Return the versions of a country-day's summaries in their topic, in order."""
        decoded = [
            events.decode(Topic.COUNTRY_DAY_SUMMARIES, record.value)
            for record in self.log.records(Topic.COUNTRY_DAY_SUMMARIES)
        ]
        return [
            event.version
            for event in decoded
            if isinstance(event, events.CountryDaySummary) and (event.country, event.date) == (country, date)
        ]


def _past(manifest: Manifest) -> PastRevision:
    return PastRevision(
        revision=manifest.revision,
        attempt=manifest.attempt,
        raw_key=manifest.raw_key,
        country=manifest.country,
        request_id=manifest.request_id,
        ingested_at=manifest.ingested_at,
    )


def trips(count: int, *, passengers: int = 10) -> list[Trip]:
    """Return trips that are each a little late; every third has an accident."""
    return [Trip(passengers=passengers, delay_ms=1_500 * number, accident=number % 3 == 0) for number in range(count)]
