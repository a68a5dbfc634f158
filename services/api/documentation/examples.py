"""Examples for the OpenAPI and AsyncAPI documents: one day of one city, from the request to the statistics."""

from __future__ import annotations

import datetime as dt

import msgspec

from services.api.statistics.model import CountryStats, DayStats
from shared.domain.contribution import Contribution, total_of
from shared.domain.events import (
    BadCity,
    Cause,
    CityDayRetracted,
    CityDayStats,
    CityFinished,
    CityFolded,
    CityProgressed,
    CountryDayPlanned,
    CountryDaySummary,
    Event,
    IngestCity,
    Outcome,
    ProcessRequested,
    Published,
    RequestFailed,
    RequestPlanned,
)
from shared.domain.ids import CityId, CountrySlug, RequestId

_DATE = dt.date(2024, 5, 1)
_REQUESTED_AT = dt.datetime(2024, 5, 2, 1, 12, tzinfo=dt.UTC)
_INGESTED_AT = dt.datetime(2024, 5, 2, 1, 12, 9, tzinfo=dt.UTC)
_REQUEST = RequestId("018f3d2a-5c00-7aaa-8bbb-0123456789ab")
_ARMENIA = CountrySlug("armenia")
_CITY = CityId("7")
_PLAN = 136_778_400
_REVISION = 136_778_402
_CONTRIBUTION = Contribution(trips=1250, passengers=48_211, accidents=3, delay_total_ms=76_630_000)
_RAW_KEY = "raw/date=2024-05-01/city=7/018f3d2a9c407bbb8ccc0123456789ab.json"

CAUSE = Cause(request_id=_REQUEST, plan_revision=_PLAN, position=6)
"""The task that caused the examples of `city-stats`."""

EVENTS: tuple[Event, ...] = (
    ProcessRequested(request_id=_REQUEST, date=_DATE, requested_at=_REQUESTED_AT),
    IngestCity(
        request_id=_REQUEST,
        date=_DATE,
        city_id=_CITY,
        upstream_id="7",
        city_name="Port Tina",
        country=_ARMENIA,
        country_name="Armenia",
        plan_revision=_PLAN,
        position=6,
    ),
    CityDayStats(
        date=_DATE,
        country=_ARMENIA,
        country_name="Armenia",
        city_id=_CITY,
        city_name="Port Tina",
        revision=_REVISION,
        contribution=_CONTRIBUTION,
        trips_on_other_dates=2,
        raw_key=_RAW_KEY,
        sha256="9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        size_bytes=141_250,
        rule_version=1,
        ingested_at=_INGESTED_AT,
    ),
    CityDayRetracted(date=_DATE, country=_ARMENIA, city_id=CityId("12"), revision=_REVISION + 9),
    CountryDayPlanned(
        date=_DATE,
        country=_ARMENIA,
        country_name="Armenia",
        plan_revision=_PLAN,
        city_ids=(CityId("12"), CityId("31"), _CITY),
    ),
    CountryDaySummary(
        date=_DATE,
        country=_ARMENIA,
        country_name="Armenia",
        version=_REVISION + _PLAN,
        totals=total_of([_CONTRIBUTION]),
        cities_reported=1,
        cities_expected=3,
        complete=False,
        last_ingested_at=_INGESTED_AT,
    ),
    RequestPlanned(
        request_id=_REQUEST,
        date=_DATE,
        requested_at=_REQUESTED_AT,
        plan_revision=_PLAN,
        cities=30,
        countries=5,
        bad_cities_count=1,
        bad_cities=(BadCity(entry='{"id": 9, "name": "", "country": "Peru"}', reason="the name is empty"),),
    ),
    CityProgressed(
        request_id=_REQUEST,
        date=_DATE,
        city_id=_CITY,
        plan_revision=_PLAN,
        position=6,
        bytes_done=65_536,
        bytes_total=141_250,
        trips_done=580,
    ),
    CityFinished(
        request_id=_REQUEST,
        date=_DATE,
        city_id=_CITY,
        city_name="Port Tina",
        plan_revision=_PLAN,
        position=6,
        outcome=Outcome.STORED,
        size_bytes=141_250,
        trips=1250,
        published=(Published(country=_ARMENIA, revision=_REVISION),),
    ),
    CityFolded(
        request_id=_REQUEST,
        date=_DATE,
        city_id=_CITY,
        plan_revision=_PLAN,
        position=6,
        country=_ARMENIA,
        revision=_REVISION,
    ),
    RequestFailed(
        request_id=_REQUEST,
        date=_DATE,
        requested_at=_REQUESTED_AT,
        reason="the upstream has no list of cities: GET /cities answered 410",
    ),
)

_DAY = DayStats(bus_count=1250, passenger_count=48211, exist_accident=True, average_delay_s=61.304)
_FULL = msgspec.structs.replace(
    _DAY,
    country_name="Armenia",
    accident_count=3,
    delay_total_ms=76630000,
    cities_reported=11,
    cities_expected=12,
    complete=False,
    version=1680934212,
    last_ingested_at=dt.datetime(2024, 5, 2, 1, 12, 9, tzinfo=dt.UTC),
)


def _example(day: DayStats) -> object:
    stats: CountryStats = {"armenia": {"2024-05-01": day}}
    return msgspec.to_builtins(stats)


COUNTRY_STATS = _example(_DAY)
COUNTRY_STATS_FULL = _example(_FULL)

COUNTRY_STATS_CSV = """\
country,date,bus_count,passenger_count,exist_accident,average_delay_s\r
armenia,2024-05-01,1250,48211,true,61.304\r
"""
COUNTRY_STATS_NDJSON = (
    '{"country":"armenia","date":"2024-05-01","bus_count":1250,"passenger_count":48211,"exist_accident":true,'
    '"average_delay_s":61.304}\n'
)
