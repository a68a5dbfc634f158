"""Events on the wire: encoding, strict decoding, poison records and later schema versions."""

from __future__ import annotations

import datetime as dt
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain import events, schema
from shared.domain.contribution import total_of
from shared.domain.events import (
    BadCity,
    Cause,
    CityDayRetracted,
    CityFinished,
    CityFolded,
    CityProgressed,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    IngestCity,
    NewerContract,
    Outcome,
    PoisonRecord,
    ProcessRequested,
    Published,
    RequestFailed,
    RequestPlanned,
    Retry,
    cause_of,
    headers_of,
)
from shared.domain.ids import CityId, CountrySlug, RequestId
from shared.domain.topics import Topic, affinity_of, partition_of
from tests.fakes.builders import STATS

DATE = dt.date(2024, 5, 1)
NOW = dt.datetime(2024, 5, 2, 10, tzinfo=dt.UTC)
REQUEST = RequestId("018f38bf-1d00-7000-8000-000000000001")
ARMENIA = CountrySlug("armenia")
CITY = CityId("~old%20port")

RETRACTED = CityDayRetracted(date=DATE, country=ARMENIA, city_id=CITY, revision=136_807_201)
EXAMPLES: list[Event] = [
    ProcessRequested(request_id=REQUEST, date=DATE, requested_at=NOW),
    ProcessRequested(
        request_id=REQUEST,
        date=DATE,
        requested_at=NOW,
        retry=Retry(plan_revision=3, positions="a", retried_at=NOW),
    ),
    IngestCity(
        request_id=REQUEST,
        date=DATE,
        city_id=CITY,
        upstream_id="old port",
        city_name="Port Tina",
        country=ARMENIA,
        country_name="Armenia",
        plan_revision=3,
        position=0,
    ),
    STATS,
    RETRACTED,
    CountryDayPlanned(date=DATE, country=ARMENIA, country_name="Armenia", plan_revision=3, city_ids=(CITY,)),
    CountryDayPlanned(
        date=DATE, country=ARMENIA, country_name="Armenia", plan_revision=3, city_ids=(CITY,), chunk=1, chunks=2
    ),
    CountryDaySummary(
        date=DATE,
        country=ARMENIA,
        country_name="Armenia",
        version=9,
        totals=total_of([STATS.contribution]),
        cities_reported=1,
        cities_expected=2,
        complete=False,
        last_ingested_at=None,
    ),
    RequestPlanned(
        request_id=REQUEST,
        date=DATE,
        requested_at=NOW,
        plan_revision=3,
        cities=1,
        countries=1,
        bad_cities_count=1,
        bad_cities=(BadCity(entry="7", reason="not an object"),),
    ),
    CityProgressed(
        request_id=REQUEST,
        date=DATE,
        city_id=CITY,
        plan_revision=3,
        position=0,
        bytes_done=5,
        bytes_total=None,
        trips_done=1,
    ),
    CityFinished(
        request_id=REQUEST,
        date=DATE,
        city_id=CITY,
        city_name="Port Tina",
        plan_revision=3,
        position=0,
        outcome=Outcome.UNCHANGED,
        published=(Published(country=ARMENIA, revision=7),),
    ),
    CityFolded(request_id=REQUEST, date=DATE, city_id=CITY, plan_revision=3, position=0, country=ARMENIA, revision=7),
    RequestFailed(request_id=REQUEST, date=DATE, requested_at=NOW, reason="/cities answered 500"),
]
each_event = pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: f"{type(event).__name__}-{event.key}")


def changed(event: Event, **fields: object) -> bytes:
    """Return the JSON of an event with other fields."""
    return json.dumps(json.loads(events.encode(event)) | fields).encode()


def test_every_type_of_event_has_an_example() -> None:
    """The examples here are all events that a topic can hold."""
    kinds = {kind for kinds in events.EVENT_TYPES.values() for kind in kinds}
    assert {type(event) for event in EXAMPLES} == kinds


@each_event
def test_a_decoded_event_equals_the_published_one(event: Event) -> None:
    """A decoded event equals the published one, and equal events have equal bytes."""
    value = events.encode(event)
    assert events.decode(event.topic, value) == event
    assert events.encode(events.decode(event.topic, value)) == value


@each_event
def test_every_event_has_its_type_and_schema_version(event: Event) -> None:
    """Every record has the type and schema version, and the tag is the name of the type."""
    body = json.loads(events.encode(event))
    assert body["schema_version"] == schema.SCHEMA_VERSION
    assert body["type"].replace("-", "") == type(event).__name__.lower()


@each_event
def test_unknown_fields_are_ignored(event: Event) -> None:
    """A field that a later release adds is ignored."""
    assert events.decode(event.topic, changed(event, added={"deep": [1, 2]})) == event


@each_event
def test_an_event_in_the_wrong_topic_is_poison(event: Event) -> None:
    """A known event in the wrong topic is neither skipped nor retried: it is poison."""
    wrong = Topic.PROCESS_REQUESTS if event.topic is not Topic.PROCESS_REQUESTS else Topic.CITY_TASKS
    with pytest.raises(PoisonRecord):
        events.decode(wrong, events.encode(event))


@each_event
def test_a_later_schema_is_not_poison(event: Event) -> None:
    """An event of a later schema version stops the service, whether or not it can be read."""
    for fields in ({}, {"date": 7}):
        with pytest.raises(NewerContract, match="upgrade"):
            events.decode(event.topic, changed(event, schema_version=schema.SCHEMA_VERSION + 1, **fields))


def test_an_unknown_type_of_a_known_version_is_poison() -> None:
    """A type that the schema version does not have goes to the dead letters: it must not stop a partition."""
    with pytest.raises(PoisonRecord, match="city-day-forecast"):
        events.decode(Topic.CITY_STATS, changed(STATS, type="city-day-forecast"))


@pytest.mark.parametrize("event", EXAMPLES)
def test_a_record_without_a_type_is_poison(event: Event) -> None:
    """A record that lacks the type, or has an empty one, is no event, also in a topic of one type."""
    fields = msgspec.json.decode(events.encode(event))
    for without in ({name: value for name, value in fields.items() if name != "type"}, {**fields, "type": ""}):
        with pytest.raises(PoisonRecord):
            events.decode(event.topic, msgspec.json.encode(without))


def test_an_unknown_type_of_a_later_version_is_newer() -> None:
    """A type of a later schema version stops the service; the error identifies the record."""
    with pytest.raises(NewerContract) as newer:
        events.decode(Topic.CITY_STATS, changed(STATS, type="city-day-forecast", schema_version=2))
    message = str(newer.value.at(3, 17))
    for named in ("partition 3", "offset 17", "city-stats", "'city-day-forecast'", "schema version 2", "tripfold skip"):
        assert named in message


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"null",
        b"7",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"type":7}',
        b'{"type":"city-day-stats"}',
        b'{"type":"city-day-stats","schema_version":0}',
        changed(STATS, type=None),
        changed(STATS, ingested_at=None),
        changed(STATS, schema_version=0),
        changed(STATS, schema_version="1"),
    ],
)
def test_a_record_of_no_version_is_poison(value: bytes | None) -> None:
    """A record that is no event of any version is poison."""
    with pytest.raises(PoisonRecord):
        events.decode(Topic.CITY_STATS, value)


@pytest.mark.parametrize(
    "fields",
    [
        {"revision": "7"},
        {"revision": 7.5},
        {"revision": 0},
        {"date": "2024-02-30"},
        {"date": "2024-05-01T00:00:00"},
        {"country": "Armenia"},
        {"country": "armenia\n"},
        {"city_id": "a/b"},
        {"city_name": ""},
        {"city_name": "x" * 301},
        {"contribution": {"trips": 1}},
        {"ingested_at": "2024-05-02T10:00:00"},
        {"ingested_at": 7},
        {"size_bytes": -1},
    ],
)
def test_decoding_is_strict(fields: dict[str, object]) -> None:
    """Decoding coerces no field and accepts no value out of bounds: a time without an offset is refused."""
    with pytest.raises(PoisonRecord):
        events.decode(Topic.CITY_STATS, changed(STATS, **fields))


def test_a_plan_of_absurdly_many_cities_is_poison() -> None:
    """The number of cities is the length of bitmaps, so it has a limit that bounds their memory."""
    (planned,) = (event for event in EXAMPLES if isinstance(event, RequestPlanned))
    events.decode(planned.topic, changed(planned, cities=10_000_000))
    with pytest.raises(PoisonRecord):
        events.decode(planned.topic, changed(planned, cities=10_000_001))


@given(st.binary(max_size=200), st.sampled_from([topic for topic in Topic if topic in events.EVENT_TYPES]))
def test_any_bytes_are_an_event_or_poison(value: bytes, topic: Topic) -> None:
    """Decoding never fails in any other way."""
    with pytest.raises((PoisonRecord, NewerContract)):
        events.decode(topic, value)


@each_event
def test_headers_are_cloud_events(event: Event) -> None:
    """Every record carries the required attributes, and a request's events its id."""
    headers = {name: value.decode() for name, value in headers_of(event, source="ingest")}
    assert {name: headers[name] for name in ("ce_specversion", "ce_source", "content-type")} == {
        "ce_specversion": "1.0",
        "ce_source": "/tripfold/ingest",
        "content-type": "application/json",
    }
    assert headers["ce_type"] == f"tripfold.{json.loads(events.encode(event))['type']}.v1"
    assert headers.get("ce_requestid") == getattr(event, "request_id", None)


def test_the_id_depends_on_event_and_request() -> None:
    """Different events have different ids, the same event always the same, and the request is part of it."""
    cause = Cause(request_id=REQUEST, plan_revision=3, position=0)
    other = msgspec.structs.replace(cause, request_id="018f38bf-1d00-7000-8000-000000000002")
    ids = [dict(headers_of(event, source="ingest"))["ce_id"] for event in EXAMPLES]
    ids += [dict(headers_of(STATS, source="ingest", cause=one))["ce_id"] for one in (cause, other)]
    assert len(set(ids)) == len(ids)
    assert dict(headers_of(STATS, source="aggregate", cause=cause))["ce_id"] == ids[-2]


def test_the_cause_of_a_record_is_in_its_headers() -> None:
    """The task that caused a record is read back from its headers, and the record's value does not change by it."""
    cause = Cause(request_id=REQUEST, plan_revision=3, position=4_711)
    assert cause_of(dict(headers_of(STATS, source="ingest", cause=cause))) == cause
    assert cause_of(dict(headers_of(STATS, source="ingest"))) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"ce_position": b"x"},
        {"ce_position": b"-1"},
        {"ce_position": b"9" * 5_000},
        {"ce_planrevision": b""},
        {"ce_requestid": b"\xff"},
        {"ce_requestid": b"me"},
    ],
)
def test_headers_that_name_no_task_are_no_cause(headers: dict[str, bytes]) -> None:
    """Headers of other programs are ignored and stop nothing."""
    good = dict(headers_of(STATS, source="ingest", cause=Cause(request_id=REQUEST, plan_revision=3, position=0)))
    assert cause_of(good | headers) is None


def test_a_country_day_stays_in_one_partition() -> None:
    """Statistics, retractions and every chunk of the plan of a country-day go to the same partition."""
    partitions = range(12)
    same = [event for event in EXAMPLES if event.topic is Topic.CITY_STATS]
    assert len({partition_of(event.key.encode(), partitions, partitions) for event in same}) == 1
    spread = {partition_of(f"2024-05-01/country-{n}/7".encode(), partitions, partitions) for n in range(100)}
    assert spread == set(partitions)


@given(st.lists(st.binary(max_size=3), max_size=4))
def test_the_affinity_of_a_key_is_its_first_two_parts(parts: list[bytes]) -> None:
    """The partition of any key depends only on the part before its second slash."""
    key = b"/".join(parts)
    assert affinity_of(key) == b"/".join(key.split(b"/")[:2])


def test_no_city_has_the_key_of_a_chunk() -> None:
    """The chunks of a plan and the cities of a country-day never replace each other in the compacted topic."""
    keys = [event.key for event in EXAMPLES if isinstance(event, CountryDayPlanned)]
    assert keys == ["2024-05-01/armenia", "2024-05-01/armenia/+1"]
    assert STATS.key == RETRACTED.key == "2024-05-01/armenia/~old%20port"


def test_outcomes_are_ordered() -> None:
    """Failed is less than skipped, skipped than unchanged, unchanged than stored."""
    assert sorted(Outcome, key=lambda outcome: outcome.rank) == [
        Outcome.FAILED,
        Outcome.SKIPPED,
        Outcome.UNCHANGED,
        Outcome.STORED,
    ]
