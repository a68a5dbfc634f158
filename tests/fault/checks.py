"""Checks of a world at rest: against the oracle, the manifests and the topics."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
from typing import Protocol, TypeVar

import msgspec
from msgspec import UNSET

from services.aggregate.bucket_reader import events_of_whole_plan
from services.aggregate.fold import StatEvent, empty_summary, fold
from services.aggregate.summary_writer import summary_event
from shared.domain import bitmap, events, keys, objects
from shared.domain.backfills import date_at, dates_total, is_closed, request_id_of
from shared.domain.events import (
    CityDayRetracted,
    CityDayStats,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    IngestCity,
    PoisonRecord,
)
from shared.domain.ids import CountrySlug, RequestId
from shared.domain.objects import (
    Backfill,
    GenerationPointer,
    Manifest,
    PastRevision,
    Plan,
    QuarantineReport,
    RequestRecord,
    Summary,
)
from shared.domain.outbox import events_of_manifest, events_of_plan
from shared.domain.requests import Status, status_of
from shared.domain.tables import CITY_DAYS, COUNTRY_DAYS, TABLES, Row, city_rows, country_row
from shared.domain.topics import Topic
from shared.kafka.records import ConsumedRecord
from shared.runtime.parquet import TableReader
from tests.fakes.log import MemoryLog
from tests.fakes.oracle import ExpectedDay
from tests.fakes.store import MemoryStore
from tests.fault.world import GC_AGE, World


class Checked(Protocol):
    """A bucket and a log whose processes are at rest. ``resumed`` counts those that were paused in between."""

    @property
    def store(self) -> MemoryStore: ...

    @property
    def log(self) -> MemoryLog: ...

    @property
    def resumed(self) -> int: ...


def live_generation(world: Checked) -> int:
    """Return the number of the live generation."""
    stored = world.store.objects.get(keys.CURRENT)
    return objects.decode(GenerationPointer, stored.body, keys.CURRENT).live if stored else 1


def summaries(world: Checked) -> dict[str, bytes]:
    """Return the bytes of every live summary, by what follows the generation in its key."""
    prefix = keys.summaries_of_generation(live_generation(world))
    return {key.removeprefix(prefix): body for key, body in world.store.bodies(prefix).items()}


def live_summaries(world: Checked) -> list[Summary]:
    """Return every live summary."""
    return _stored(world, keys.summaries_of_generation(live_generation(world)), Summary)


def manifests(world: Checked) -> list[Manifest]:
    """Return every manifest."""
    return _stored(world, keys.MANIFESTS, Manifest)


def requests(world: Checked) -> list[RequestRecord]:
    """Return the record of every request."""
    return _stored(world, keys.REQUESTS, RequestRecord)


def reports(world: Checked) -> list[QuarantineReport]:
    """Return every report on a refused file."""
    return _stored(world, keys.QUARANTINE, QuarantineReport)


def comparable_state(world: World) -> dict[str, bytes]:
    """Return all state that must be equal after a run with breaks; attempts are named by their order.

    It has the live summaries byte for byte, plans, countries, manifests, and the compacted topics.
    """
    found = {f"summaries/{key}": body for key, body in summaries(world).items()}
    found |= world.store.bodies(keys.PLANS) | world.store.bodies(keys.COUNTRIES)
    for manifest in manifests(world):
        found[keys.manifest(manifest.date, manifest.city_id)] = objects.encode(_without_attempts(manifest))
    for topic in (Topic.CITY_STATS, Topic.COUNTRY_DAY_SUMMARIES):
        for event in decoded(world, topic):
            same = msgspec.structs.replace(event, raw_key="") if isinstance(event, CityDayStats) else event
            found[f"{topic.value}: {event.key}"] = events.encode(same)
    return found


_Revision = TypeVar("_Revision", Manifest, PastRevision)


def _without_attempts(manifest: Manifest) -> Manifest:
    """Name the attempts of a manifest by their order, oldest first, and raw keys by the attempts that wrote them.

    A write intent is left out: the next check of the city-day uses or removes it.
    """
    names: dict[str, str] = {}

    def named(attempt: str) -> str:
        return names.setdefault(attempt, f"attempt {len(names) + 1}")

    def renamed(revision: _Revision) -> _Revision:
        raw_attempt = revision.raw_key.rpartition("/")[2].removesuffix(".json")
        return msgspec.structs.replace(revision, raw_key=named(raw_attempt), attempt=named(revision.attempt))

    history = [renamed(past) for past in reversed(manifest.history)]
    return renamed(msgspec.structs.replace(manifest, history=tuple(reversed(history)), write_intent=UNSET))


def tables_against_summaries(world: World) -> list[str]:
    """Compare the rows of the Parquet tables with the live summaries."""
    generation = live_generation(world)
    stored = {key: one for key, one in world.store.objects.items() if keys.parse_generation(key) == generation}
    expected: dict[str, list[Row]] = {table.name: [] for table in TABLES}
    for key, one in sorted(stored.items()):
        summary = objects.decode(Summary, one.body, key)
        version = (generation, one.etag)
        expected[COUNTRY_DAYS.name].append(country_row(summary, version, key))
        expected[CITY_DAYS.name] += city_rows(summary, version)
    wrong = []
    for table in TABLES:
        readers = [TableReader(table, body) for body in world.store.bodies(f"{keys.LAKE}{table.name}/").values()]
        found = [row for reader in readers for date in reader.dates for row in reader.rows(date)]
        if found != expected[table.name]:
            wrong.append(f"the table {table.name} has {found}, and the summaries give {expected[table.name]}")
    return wrong


async def leftovers(world: World) -> list[str]:
    """Run gc in a world at rest, and name the unneeded objects that remain."""
    world.clock.advance(2 * GC_AGE.total_seconds())
    world.port_calls.heal()
    await world.gc()
    world.clock.advance(GC_AGE.total_seconds())
    await world.drop_generations()
    named = {key for manifest in manifests(world) for key in manifest.raw_keys - manifest.expired_raw_keys()}
    live = keys.summaries_of_generation(live_generation(world))
    named |= {report.key for report in reports(world)}
    needed = (live, keys.LAKE, keys.MANIFESTS, keys.PLANS, keys.QUARANTINE, keys.REQUESTS, "state/")
    left = [f"{key} is left" for key in world.store.objects if key not in named and not key.startswith(needed)]
    left += [f"the upload {upload.upload_id} of {upload.key} is left" for upload in world.store.unfinished]
    left += [f"{key} is named by a manifest and was deleted" for key in named if key not in world.store.objects]
    current = world.store.objects.get(keys.CURRENT)
    if current is not None and objects.decode(GenerationPointer, current.body, keys.CURRENT).building is not None:
        left.append("a generation is marked as being built, and no rebuild runs")
    return left


def inconsistencies(world: World) -> list[str]:
    """Name each contradiction of a world at rest with its manifests and plans."""
    return [
        *world.unexpected,
        *summaries_against_manifests(world),
        *summaries_against_a_replay(world),
        *raw_objects_against_manifests(world),
        *topics_against_the_bucket(world),
    ]


def differences(world: World, *, one_fault: bool = False) -> list[str]:
    """Name each difference of a world at rest from the oracle and the manifests.

    In a world with a resumed process, two facts are not checked. One is the exact end of a request whose cities were
    fetched partly before and partly after the upstream changed. The other is that the last summary of a country-day in
    its topic is the highest, since consumers keep the highest themselves. After ``one_fault``, a pause, it must be.
    """
    return [
        *world.unexpected,
        *_against_the_oracle(world),
        *_requests_against_the_oracle(world),
        *summaries_against_manifests(world),
        *summaries_against_a_replay(world),
        *raw_objects_against_manifests(world),
        *quarantine_against_requests(world),
        *topics_against_the_bucket(world, dead_letters=world.dead_letters, one_fault=one_fault),
    ]


def jobs_without_requests_of_their_own(world: World) -> list[str]:
    """Name each backfill that has not ended, or counts a date without a completed request under its own id."""
    found = {record.request_id: status_of(record) for record in requests(world)}
    wrong = []
    for backfill in _stored(world, keys.BACKFILLS, Backfill):
        if not is_closed(backfill):
            wrong.append(f"{backfill} has not ended")
        for position in range(dates_total(backfill)):
            request_id = request_id_of(backfill, date_at(backfill, position))
            completed = bitmap.contains(bitmap.decode(backfill.completed), position)
            if completed and found.get(request_id) is not Status.COMPLETED:
                wrong.append(f"{backfill} counts {request_id} as completed: it is {found.get(request_id)}")
    return wrong


def tasks_of_backfills_in_the_foreground(world: World) -> list[str]:
    """Name each task that runs beside those of clients for a backfill whose request no client has joined.

    A request whose record was lost is left out: the record said that it runs in the background.
    """
    own = {
        request_id_of(backfill, date_at(backfill, position))
        for backfill in _stored(world, keys.BACKFILLS, Backfill)
        for position in range(dates_total(backfill))
    }
    own -= world.oracle.statuses.keys() | world.lost_records
    return [
        f"the task {task} runs in the foreground"
        for task in decoded(world, Topic.CITY_TASKS)
        if isinstance(task, IngestCity) and task.request_id in own
    ]


def unfinished(world: Checked) -> list[str]:
    """Name the requests that have not ended."""
    return [
        f"{record.request_id} is {status_of(record).value}" for record in requests(world) if not status_of(record).ended
    ]


def _against_the_oracle(world: World) -> list[str]:
    said: dict[str, ExpectedDay] = {summary.country: day_of(summary) for summary in live_summaries(world)}
    expected = world.oracle.days()
    return [
        f"{country}: expected {expected.get(country)}, found {said.get(country)}"
        for country in sorted({*said, *expected})
        if said.get(country) != expected.get(country)
    ]


def day_of(summary: Summary) -> ExpectedDay:
    return ExpectedDay(
        **msgspec.structs.asdict(summary.totals),
        has_data=summary.has_data,
        cities_reported=summary.cities_reported,
        cities_expected=summary.cities_expected,
        complete=summary.complete,
    )


def _requests_against_the_oracle(world: World) -> list[str]:
    said = {record.request_id: status_of(record) for record in requests(world)}
    last = max(world.oracle.statuses)
    wrong = [
        f"{request_id}: expected {expected!r}, found {said[request_id].value!r}"
        for request_id, expected in world.oracle.statuses.items()
        if said[request_id].value != expected and (request_id == last or not world.resumed)
    ]
    return wrong + unfinished(world)


def summaries_against_manifests(world: Checked) -> list[str]:
    """Compare every ledger with the manifests, entry by entry in both directions."""
    ledgers: dict[tuple[dt.date, str, str], object] = {
        (summary.date, summary.country, city_id): (entry.revision, entry.contribution, entry.sha256)
        for summary in live_summaries(world)
        for city_id, entry in summary.ledger.items()
    }
    named: dict[tuple[dt.date, str, str], object] = {}
    for manifest in manifests(world):
        named[manifest.date, manifest.country, manifest.city_id] = (
            manifest.revision,
            manifest.contribution,
            manifest.sha256,
        )
        for country, revision in manifest.retracted.items():
            named[manifest.date, country, manifest.city_id] = (revision, None, "")
    return [
        f"ledger of {place}: manifest says {named.get(place)}, found {ledgers.get(place)}"
        for place in sorted({*ledgers, *named})
        if ledgers.get(place) != named.get(place)
    ]


def summaries_against_a_replay(world: Checked) -> list[str]:
    """Compare the bytes of every live summary with those that a fold of the manifests and plans gives."""
    replayed: dict[tuple[dt.date, CountrySlug], list[StatEvent]] = {}
    of_manifests = [event for manifest in manifests(world) for event in events_of_manifest(manifest)]
    of_plans = [event for plan in _stored(world, keys.PLANS, Plan) for event in events_of_whole_plan(plan)]
    for event in (*of_manifests, *of_plans):
        replayed.setdefault((event.date, event.country), []).append(event)
    live = {(summary.date, summary.country): objects.encode(summary) for summary in live_summaries(world)}
    expected = {where: objects.encode(fold(empty_summary(*where), of)) for where, of in replayed.items()}
    return [
        f"summary of {where}: a replay gives {expected.get(where)!r}, found {live.get(where)!r}"
        for where in sorted({*live, *expected})
        if live.get(where) != expected.get(where)
    ]


def countries_without_summary(world: Checked) -> list[CountrySlug]:
    """Return the countries of all plans that have no live summary of a date."""
    live = {(summary.date, summary.country) for summary in live_summaries(world)}
    plans = _stored(world, keys.PLANS, Plan)
    return [country for plan in plans for country in (*plan.countries, *plan.gone) if (plan.date, country) not in live]


def raw_objects_against_manifests(world: Checked) -> list[str]:
    wrong = []
    raw = world.store.bodies("raw/")
    for manifest in manifests(world):
        body = raw.get(manifest.raw_key)
        expired = manifest.expired_raw_keys()
        if body is None and manifest.raw_expired:
            continue
        if body is None or hashlib.sha256(body).hexdigest() != manifest.sha256 or len(body) != manifest.size_bytes:
            wrong.append(f"{manifest.raw_key} is not what the manifest of city {manifest.city_id} says")
        wrong += [
            f"{past.raw_key} is named in a history and missing"
            for past in manifest.history
            if past.raw_key not in raw and past.raw_key not in expired
        ]
    return wrong


def quarantine_against_requests(world: World) -> list[str]:
    """Compare reports with their bytes, and requests with the reports that they name.

    The same bytes are kept once, unless a process was paused or two processes stored them at the same time.
    """
    wrong = []
    raw = world.store.bodies(keys.RAW)
    held = reports(world)
    for report in held:
        body = raw.get(report.key, b"")
        if hashlib.sha256(body).hexdigest() != report.sha256 or len(body) != report.size_bytes:
            wrong.append(f"{report.key} is not what its report says")
    kept = [(report.city_id, report.sha256) for report in held]
    if len(set(kept)) < len(kept) and not world.resumed:
        wrong.append(f"the same file is kept more than once: {kept}")
    named = {report.key for report in held}
    for record in requests(world):
        for failure in record.failures.values():
            refused = "record" in failure.reason or "array" in failure.reason
            if refused != (failure.quarantine_key in named):
                wrong.append(f"{record.request_id} says {failure.reason!r}, and names {failure.quarantine_key}")
    return wrong


def topics_against_the_bucket(world: Checked, *, dead_letters: int = 0, one_fault: bool = False) -> list[str]:
    """Compare the compacted topics, and a consumer that keeps the highest revision, with the bucket.

    Each poison record must be in the dead letters at least once, and no other record.
    """
    stats: dict[str, Event] = {}
    for manifest in manifests(world):
        stats |= {event.key: event for event in events_of_manifest(manifest)}
    for plan in _stored(world, "plans/", Plan):
        for country in (*plan.countries, *plan.gone):
            stats |= {event.key: event for event in events_of_plan(plan, country)}
    totals: dict[str, Event] = {event.key: event for event in map(summary_event, live_summaries(world))}
    wrong = []
    letters = world.log.records(Topic.DEAD_LETTERS)
    if len({letter.key for letter in letters}) != dead_letters:
        wrong.append(f"expected {dead_letters} records in the dead letters, found {letters}")
    for topic, expected in ((Topic.CITY_STATS, stats), (Topic.COUNTRY_DAY_SUMMARIES, totals)):
        published = decoded(world, topic)
        last = {event.key: event for event in published}
        highest = {event.key: event for event in sorted(published, key=_revision_of)}
        for view, found in (("last", last), ("highest", highest)):
            if view == "last" and topic is Topic.COUNTRY_DAY_SUMMARIES and world.resumed and not one_fault:
                continue
            wrong += [
                f"the {view} record of {key} in {topic.value}: expected {expected.get(key)}, found {found.get(key)}"
                for key in sorted({*expected, *found})
                if found.get(key) != expected.get(key)
            ]
    return wrong


def decoded(world: Checked, topic: Topic) -> list[Event]:
    """Return the events of a topic without poison records."""
    return [event for event in map(event_of, world.log.records(topic)) if event is not None]


def event_of(record: ConsumedRecord) -> Event | None:
    """Return the event of a record, or None for a poison record."""
    with contextlib.suppress(PoisonRecord):
        return events.decode(record.topic, record.value)
    return None


def _revision_of(event: Event) -> int:
    match event:
        case CityDayStats() | CityDayRetracted():
            return event.revision
        case CountryDayPlanned():
            return event.plan_revision
        case CountryDaySummary():
            return event.version
    raise AssertionError(f"{event} has no revision")


_Kind = TypeVar("_Kind", bound=objects.BucketObject)


def _stored(world: Checked, prefix: str, kind: type[_Kind]) -> list[_Kind]:
    return [objects.decode(kind, body, key) for key, body in world.store.bodies(prefix).items()]


def record_of(world: Checked, request_id: RequestId) -> RequestRecord:
    """Return the record of a request."""
    key = keys.request(request_id)
    return objects.decode(RequestRecord, world.store.objects[key].body, key)
