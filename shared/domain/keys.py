"""The keys of the bucket. They are Hive-style, so query engines see dates, cities and countries as columns."""

from __future__ import annotations

import datetime as dt
import functools
import re

from shared.domain.ids import CityId, CountrySlug, RequestId, parse_request_id, request_time_ms

BUCKET_EPOCH = "state/bucket-epoch.json"
COUNTRIES = "state/countries.json"
CURRENT = "state/current.json"
SCHEMA_SWITCH = "state/schema.json"
WRITE_CHECK = "state/write-check.json"
ACTIVE_REQUESTS = "state/active-requests/"
OPEN_BACKFILLS = "state/open-backfills.json"
CHANGES = "state/changes/"
REQUESTS = "requests/"
BACKFILLS = "backfills/"
SCHEDULES = "schedules/"
PLANS = "plans/"
MANIFESTS = "manifests/"
SUMMARIES = "summaries/"
RAW = "raw/"
QUARANTINE = "quarantine/"
ATTEMPTS = "attempts/"
IDEMPOTENCY = "idempotency/"
DAMAGED = "damaged/"
LAKE = "lake/"
TABLES = "lake/tables.json"

REPORT_SUFFIX = ".error.json"

_DATE = re.compile(r"/date=(\d{4}-\d{2}-\d{2})[/.]")
_GENERATION = re.compile(r"summaries/generation=(\d{1,15})/")
_TIME_MS_END = 1 << 48  # the time of a UUID of version 7 has 48 bits
_INVERTED_TIME_DIGITS = 12


def raw(date: dt.date, city_id: CityId, attempt: str) -> str:
    """Return the key of the upstream bytes of one attempt. It is written once and never overwritten."""
    return f"raw/date={date}/city={city_id}/{attempt}.json"


def manifest(date: dt.date, city_id: CityId) -> str:
    """Return the key of a city-day's manifest, which names its current revision."""
    return f"manifests/date={date}/city={city_id}.json"


def quarantine_report(date: dt.date, city_id: CityId, attempt: str) -> str:
    """Return the key of the report on a refused file. The file itself is under the raw key of the attempt."""
    return f"quarantine/date={date}/city={city_id}/{attempt}{REPORT_SUFFIX}"


def quarantine_of(date: dt.date, city_id: CityId) -> str:
    """Return the prefix of the reports on a city-day's refused files."""
    return f"quarantine/date={date}/city={city_id}/"


def quarantine_of_date(date: dt.date) -> str:
    """Return the prefix of the reports on a date's refused files."""
    return f"quarantine/date={date}/"


def quarantine_of_month(month: str) -> str:
    """Return the prefix of the reports on a month's refused files; ``month`` is ``YYYY-MM``."""
    return f"quarantine/date={month}-"


def attempt(date: dt.date, city_id: CityId) -> str:
    """Return the key of the note that a process parses a city-day's file."""
    return f"attempts/date={date}/city={city_id}.json"


def damaged(key: str) -> str:
    """Return the key of the copy of an unreadable object that was mended."""
    return f"{DAMAGED}{key}"


def active_requests(date: dt.date) -> str:
    """Return the key of the object that names the running and the waiting request of a date."""
    return f"{ACTIVE_REQUESTS}date={date}.json"


def skip(topic: str, partition: int, offset: int) -> str:
    """Return the key of the marker that makes a consumer send one record to the dead letters."""
    return f"state/skips/{topic}/{partition}/{offset}.json"


def plan(date: dt.date) -> str:
    """Return the key of a date's plan, which lists the expected cities."""
    return f"plans/date={date}.json"


def summary(generation: int, date: dt.date, country: CountrySlug) -> str:
    """Return the key of one country-day's summary in a generation."""
    return f"summaries/generation={generation}/date={date}/country={country}.json"


def table(name: str, month: str) -> str:
    """Return the key of the Parquet file with a month of a table; ``month`` is ``YYYY-MM``."""
    return f"{LAKE}{name}/month={month}/{name}.parquet"


def manifests_of(date: dt.date) -> str:
    """Return the prefix of a date's manifests."""
    return f"manifests/date={date}/"


def raw_of(date: dt.date) -> str:
    """Return the prefix of the raw objects of a date."""
    return f"raw/date={date}/"


def raw_of_city_day(date: dt.date, city_id: CityId) -> str:
    """Return the prefix of the raw objects of a city-day."""
    return f"raw/date={date}/city={city_id}/"


def summaries_of_generation(generation: int) -> str:
    """Return the prefix of all summaries of a generation."""
    return f"summaries/generation={generation}/"


def summaries_of_date(generation: int, date: dt.date) -> str:
    """Return the prefix of a date's summaries."""
    return f"summaries/generation={generation}/date={date}/"


def summaries_of_month(generation: int, month: str) -> str:
    """Return the prefix of a month's summaries; ``month`` is ``YYYY-MM``."""
    return f"summaries/generation={generation}/date={month}-"


def changes_of_generation(generation: int) -> str:
    """Return the prefix of the change counters of a generation."""
    return f"{CHANGES}generation={generation}/"


def changes(generation: int, writer: str) -> str:
    """Return the key of the change counters of one writer in a generation."""
    return f"{CHANGES}generation={generation}/{writer}.json"


def month_of(date: dt.date) -> str:
    """Return the month of a date, as ``YYYY-MM``."""
    return date.isoformat()[:7]


def parse_date(key: str) -> dt.date | None:
    """Return the date in a key, or None."""
    match = _DATE.search(key)
    try:
        return dt.date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def parse_summary(key: str) -> tuple[dt.date, CountrySlug] | None:
    """Return the date and country of a summary's key, or None for any other key."""
    folder, _, name = key.rpartition("/")
    date = _date_of_summaries(folder)
    if date is None or not name.startswith("country="):
        return None
    return date, CountrySlug(name[len("country=") :].removesuffix(".json"))


@functools.lru_cache(maxsize=10_000)  # a listing names the same date for every country
def _date_of_summaries(folder: str) -> dt.date | None:
    _, _, date = folder.rpartition("/")
    if folder.count("/") != 2 or not date.startswith("date="):
        return None
    try:
        return dt.date.fromisoformat(date.removeprefix("date="))
    except ValueError:
        return None


def parse_generation(key: str) -> int | None:
    """Return the generation of a summary's key, or None for any other key."""
    match = _GENERATION.match(key)
    return int(match[1]) if match else None


def idempotency(digest: str) -> str:
    """Return the key of an idempotency record. ``digest`` is the hexadecimal SHA-256 of the idempotency key."""
    return f"{IDEMPOTENCY}{digest}.json"


def request(request_id: RequestId) -> str:
    """Return the key of a request's record. It has the inverted time, so a listing returns the latest first."""
    return f"{REQUESTS}{_latest_first(request_id)}.json"


def parse_request(key: str) -> RequestId | None:
    """Return the request id of a request's key, or None for any other key."""
    return _parse_latest_first(key, REQUESTS)


def backfill(backfill_id: RequestId) -> str:
    """Return the key of a backfill. It has the inverted time, so a listing returns the latest first."""
    return f"{BACKFILLS}{_latest_first(backfill_id)}.json"


def parse_backfill(key: str) -> RequestId | None:
    """Return the id of a backfill's key, or None for any other key."""
    return _parse_latest_first(key, BACKFILLS)


def schedule(name: str) -> str:
    """Return the key of a schedule."""
    return f"{SCHEDULES}{name}.json"


def _latest_first(request_id: RequestId) -> str:
    return f"{_TIME_MS_END - 1 - request_time_ms(request_id):0{_INVERTED_TIME_DIGITS}x}-{request_id}"


def _parse_latest_first(key: str, prefix: str) -> RequestId | None:
    return parse_request_id(key.removeprefix(prefix)[_INVERTED_TIME_DIGITS + 1 :].removesuffix(".json"))
