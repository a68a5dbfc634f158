"""The API over a store and a log in memory, and builders for the country-days of its tests."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from litestar import Litestar
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from services.aggregate.fold import StatEvent, empty_summary, fold
from services.api.app import ApiContext, make_app, make_context
from services.api.health import Check
from shared.domain import events, keys, objects
from shared.domain.contribution import Contribution
from shared.domain.events import (
    CityDayRetracted,
    CityDayStats,
    CountryDayPlanned,
    Event,
    Outcome,
)
from shared.domain.ids import CityId, CountrySlug, RequestId, mint_request_id
from shared.domain.objects import (
    ActiveRequests,
    Failure,
    GenerationPointer,
    Manifest,
    Plan,
    PlannedCity,
    PlannedCountry,
    QuarantineReport,
    ReportedRecord,
    RequestRecord,
)
from shared.domain.topics import Topic
from shared.kafka.group_offsets import GroupOffsets
from shared.kafka.producer import KafkaUnavailable
from shared.kafka.records import OutgoingEvent
from shared.runtime.metrics import Concern
from shared.runtime.settings import Settings
from shared.storage.object_store import ObjectInfo, StoredObject, StoreUnavailable
from tests.fakes.builders import Clock
from tests.fakes.log import MemoryLog, MemoryPublisher
from tests.fakes.store import MemoryStore

NOW = dt.datetime(2024, 6, 1, 12, 30, tzinfo=dt.UTC)
DAY = dt.date(2024, 5, 1)
REQUEST = RequestId("018f3d2a-5c00-7aaa-8bbb-0123456789ab")

Client = TestClient[Litestar]

_idle_apps: dict[str, list[Litestar]] = {}


class ObservedStore(MemoryStore):
    """A MemoryStore that records reads, and can be down."""

    def __init__(self) -> None:
        super().__init__(lambda: NOW)
        self.down = False
        self.reads: list[str] = []

    async def get(self, key: str, *, first_bytes: int | None = None) -> StoredObject | None:
        self._refuse_if_down()
        self.reads.append(key)
        return await super().get(key, first_bytes=first_bytes)

    async def compare_and_swap(self, key: str, body: bytes, *, etag: str | None) -> str:
        self._refuse_if_down()
        return await super().compare_and_swap(key, body, etag=etag)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        self._refuse_if_down()
        async for listed in super().list(prefix, after=after):
            yield listed

    def _refuse_if_down(self) -> None:
        if self.down:
            raise StoreUnavailable("S3 at storage.internal:9000 is down")


class ObservedPublisher(MemoryPublisher):
    """A MemoryPublisher that can be down."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__(log, source="api")
        self.down = False

    async def publish(self, outgoing: Iterable[OutgoingEvent]) -> None:
        if self.down:
            raise KafkaUnavailable("Kafka at broker.internal:9092 cannot be reached")
        await super().publish(outgoing)


class World:
    """A bucket and a log, and the API over them."""

    def __init__(self, store: ObservedStore | None = None) -> None:
        self.store = store or ObservedStore()
        self.log = MemoryLog()
        self.publisher = ObservedPublisher(self.log)
        self.clock = Clock(NOW)
        self.offsets: list[GroupOffsets] = []
        self.make_live(1)

    async def read_offsets(self) -> list[GroupOffsets]:
        """Return ``offsets``, or fail while the publisher is down."""
        if self.publisher.down:
            raise KafkaUnavailable("Kafka at broker.internal:9092 cannot be reached")
        return self.offsets

    def app(self, checks: Mapping[Concern, Check] | None = None, **settings: object) -> Litestar:
        """Return the API over this world."""
        chosen = _chosen(settings)
        return make_app(chosen, self._context(chosen, checks))

    @contextlib.contextmanager
    def shared_app(self, checks: Mapping[Concern, Check] | None = None, **settings: object) -> Iterator[Litestar]:
        """Lend the API over this world while the block lasts.

        Its routes take longer to build than most tests take, so later worlds with these settings get them again.
        """
        idle = _idle_apps.setdefault(repr(sorted(settings.items())), [])
        if idle:
            app = idle.pop()
            self.take_over(app, checks, **settings)
        else:
            app = self.app(checks, **settings)
        yield app
        idle.append(app)

    def take_over(self, app: Litestar, checks: Mapping[Concern, Check] | None = None, **settings: object) -> None:
        """Let an API that another world made with these settings be over this world from now on."""
        context = self._context(_chosen(settings), checks)
        context.health.started = app.state.context.health.started
        app.state.context = context

    @contextlib.contextmanager
    def client(self, checks: Mapping[Concern, Check] | None = None, **settings: object) -> Iterator[Client]:
        """Serve the API while the block lasts. An error inside the API becomes a response, as in production."""
        with (
            self.shared_app(checks, **settings) as app,
            TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client,
        ):
            yield client

    def _context(self, settings: Settings, checks: Mapping[Concern, Check] | None) -> ApiContext:
        return make_context(
            settings,
            store=self.store,
            publisher=self.publisher,
            checks=checks or {},
            read_offsets=self.read_offsets,
            clock=self.clock,
        )

    def fold_in(self, *folded: StatEvent, generation: int = 1) -> None:
        """Write the summary of some events of one country-day, over any earlier one."""
        summary = fold(empty_summary(folded[0].date, folded[0].country), folded)
        self.store.write(keys.summary(generation, summary.date, summary.country), objects.encode(summary))

    def make_live(self, generation: int) -> None:
        """Set the pointer to the live generation."""
        self.store.write(keys.CURRENT, objects.encode(GenerationPointer(live=generation, highest=generation)))

    def write_manifest(self, manifest: Manifest) -> None:
        """Write a city-day's manifest."""
        self.store.write(keys.manifest(manifest.date, manifest.city_id), objects.encode(manifest))

    def published(self, topic: Topic) -> list[Event]:
        """Return the events of a topic."""
        return [events.decode(topic, record.value) for record in self.log.records(topic)]


def _chosen(settings: Mapping[str, object]) -> Settings:
    return Settings.model_validate({"api_access": "open", "api_completeness_days": 0, **settings})


def stats(
    country: str,
    date: dt.date = DAY,
    *,
    city_id: str = "7",
    revision: int = 5,
    trips: int = 8,
    passengers: int = 40,
    accidents: int = 0,
    delay_total_ms: int = 9_000,
) -> CityDayStats:
    """Return the statistics event of one city."""
    return CityDayStats(
        date=date,
        country=CountrySlug(country),
        country_name=country.title(),
        city_id=CityId(city_id),
        city_name=f"City {city_id}",
        revision=revision,
        contribution=Contribution(
            trips=trips, passengers=passengers, accidents=accidents, delay_total_ms=delay_total_ms
        ),
        trips_on_other_dates=2,
        raw_key=f"raw/date={date}/city={city_id}/x.json",
        sha256="ab" * 32,
        size_bytes=1_000,
        rule_version=1,
        ingested_at=NOW,
    )


def retracted(country: str, date: dt.date = DAY, *, city_id: str, revision: int = 9) -> CityDayRetracted:
    """Return the event that a city left a country."""
    return CityDayRetracted(date=date, country=CountrySlug(country), city_id=CityId(city_id), revision=revision)


def planned(country: str, date: dt.date = DAY, *, city_ids: Iterable[str], plan_revision: int = 3) -> CountryDayPlanned:
    """Return the plan event of a country-day."""
    return CountryDayPlanned(
        date=date,
        country=CountrySlug(country),
        country_name=country.title(),
        plan_revision=plan_revision,
        city_ids=tuple(CityId(city_id) for city_id in city_ids),
    )


def manifest_of(event: CityDayStats, **changes: object) -> Manifest:
    """Return the manifest that an event was published from."""
    manifest = Manifest(
        date=event.date,
        city_id=event.city_id,
        city_name=event.city_name,
        country=event.country,
        country_name=event.country_name,
        revision=event.revision,
        contribution=event.contribution,
        trips_on_other_dates=event.trips_on_other_dates,
        attempt="a1",
        raw_key=event.raw_key,
        sha256=event.sha256,
        size_bytes=event.size_bytes,
        upstream_url=f"http://upstream.test/cities/{event.city_id}/stats?date={event.date}",
        etag='"v1"',
        last_modified=None,
        plan_revision=3,
        request_id=REQUEST,
        rule_version=event.rule_version,
        ingested_at=event.ingested_at,
    )
    return msgspec.structs.replace(manifest, **changes)


def record_of(at: dt.datetime = NOW) -> RequestRecord:
    """Return the record of a request that was made at ``at``."""
    return RequestRecord(request_id=mint_request_id(at), date=DAY, requested_at=at, updated_at=at)


def record_of_failure(city_id: str, city_name: str, reason: str) -> RequestRecord:
    """Return the record of a request for one city, which failed."""
    return msgspec.structs.replace(
        record_of(),
        planned=True,
        cities=1,
        outcomes={Outcome.FAILED: "1"},
        failures={0: Failure(city_id=CityId(city_id), city_name=city_name, reason=reason)},
    )


def write(world: World, record: RequestRecord) -> None:
    """Write a request record into the bucket."""
    world.store.write(keys.request(record.request_id), objects.encode(record))


def write_plan(world: World, date: dt.date, **cities: list[str]) -> None:
    """Write the plan of a date, as the ids of the cities of each country, and the summaries that expect them."""
    countries = {
        CountrySlug(country): PlannedCountry(
            name=country.title(),
            cities=tuple(PlannedCity(city_id=CityId(one), upstream_id=one, name=f"City {one}") for one in ids),
        )
        for country, ids in cities.items()
    }
    plan = Plan(date=date, revision=3, request_id=REQUEST, planned_at=NOW, countries=countries)
    world.store.write(keys.plan(date), objects.encode(plan))
    for country, ids in cities.items():
        world.fold_in(planned(country, date, city_ids=ids))


def write_latest(world: World, date: dt.date, **changes: object) -> RequestRecord:
    """Write a planned request as the latest one of its date."""
    record = msgspec.structs.replace(record_of(NOW), date=date, planned=True, plan_revision=3, **changes)
    write(world, record)
    active = ActiveRequests(date=date, running=record.request_id)
    world.store.write(keys.active_requests(date), objects.encode(active))
    return record


def report_of(city_id: str, date: dt.date = DAY) -> QuarantineReport:
    """Return the report on a refused file."""
    return QuarantineReport(
        date=date,
        city_id=CityId(city_id),
        city_name="Port Tina",
        country=CountrySlug("armenia"),
        country_name="Armenia",
        request_id=REQUEST,
        plan_revision=3,
        attempt="a",
        key=keys.raw(date, CityId(city_id), "a"),
        upstream_url="http://upstream.test/cities/7/stats?date=2024-05-01",
        etag='"v1"',
        last_modified=None,
        sha256="aa",
        size_bytes=200,
        reason="record 1, byte 1, field 'passengers', value -1: Expected `int` >= 0",
        byte_offset=1,
        record_number=1,
        field="passengers",
        value="-1",
        records=20,
        bad_records=12,
        reported=tuple(
            ReportedRecord(record_number=number, byte_offset=100 * number, field="passengers", value="-1", reason="bad")
            for number in range(1, 13)
        ),
        rule_version=1,
        quarantined_at=NOW,
        last_seen_at=NOW,
        last_request_id=REQUEST,
    )


def write_report(world: World, report: QuarantineReport) -> None:
    """Write a report as ingest does, with the bytes of its file."""
    world.store.write(report.key, b"[7]")
    world.store.write(report.report_key, objects.encode(report))


class Recorder:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        """Keep an entry."""
        self.entries.append((event, fields))

    error = warning = info

    def debug(self, event: str, **fields: Any) -> None:
        """Keep nothing: the level info hides it."""


def labels_of(client: Client, name: str) -> list[dict[str, str]]:
    """Return the labels of every sample of a metric."""
    assert client.get("/metrics").headers["content-type"].count("charset") == 1
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [sample.labels for family in families for sample in family.samples if sample.name == name]


def metric(client: Client, name: str, **labels: str) -> float:
    """Return the value of a metric's sample, or 0 if there is none."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if sample.labels == labels)
