"""Check what Tripfold stored, published and serves. This program shares no code with Tripfold.

    python tests/chaos/oracle.py --s3 URL --bucket B --api URL --upstream URL [--kafka SERVERS --prefix P] [--tables]
        [--truth] [--dates D …]

It reads the bucket with boto3, the tables with DuckDB, the topics with confluent-kafka, and the files with the standard
library's ``json``. It makes these comparisons:

- Each manifest with its raw object: SHA-256, size, and the sums over the records.

- Each raw object of a manifest with all versions that the upstream ever served (``/truth``).

- The sums over all manifests, by country and date, with the API's response.

- The same sums with the two compacted topics, if ``--kafka`` is given. The oracle keeps the highest revision or version
  of each key. The topic of dead letters must be empty.

- The same sums with the two Parquet tables, if ``--tables`` is given.

- If ``--truth`` is given, the API's response with the sums over the upstream's current files.

It prints one JSON object with ``city_days``, ``country_days``, ``trips``, and a list of ``differences``. The exit code
is 1 if there is a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import unicodedata
import urllib.request
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import boto3
import duckdb
from botocore.config import Config
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

DIFFERENCES_MAX = 100
POLL_TIMEOUT_S = 30.0
TABLES = ("country_days", "city_days")
DURATION = re.compile(r"(-?)P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?")

Sums = list[int]
"""Trips, passengers, accidents, and delay in milliseconds."""


def milliseconds(duration: str) -> int:
    """Parse an ISO 8601 duration of whole seconds into milliseconds."""
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(duration)
    sign, days, hours, minutes, seconds = match.groups()
    whole = ((int(days or 0) * 24 + int(hours or 0)) * 60 + int(minutes or 0)) * 60 + int(seconds or 0)
    return (-1 if sign else 1) * whole * 1000


def sums_of(body: bytes) -> Sums:
    """Add up the records of a file."""
    sums = [0, 0, 0, 0]
    for trip in json.loads(body):
        sums[0] += 1
        sums[1] += trip["passengers"]
        sums[2] += trip["accident"] is True
        sums[3] += milliseconds(trip["delay"])
    return sums


def fetch(url: str) -> Any:
    """Fetch JSON."""
    return json.loads(fetch_bytes(url))


def fetch_bytes(url: str) -> bytes:
    """Fetch a body; the header asks the chaos upstream to inject no fault."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"X-Truthful": "1"}), timeout=120) as response:
        return bytes(response.read())


class Oracle:
    """Compares sums, and collects the differences as sentences."""

    def __init__(self, bucket: Any, dates: list[str] | None) -> None:
        self.bucket = bucket
        self.dates = dates
        self.city_days = 0
        self.trips = 0
        self.differences: list[str] = []

    def expect(self, what: str, found: object, expected: object) -> None:
        """Record a difference unless the two values are equal."""
        if found != expected and len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(f"{what}: found {found}, expected {expected}")

    def included(self, date: str) -> bool:
        """Return whether a date is to be checked."""
        return self.dates is None or date in self.dates

    def check_stored(self, versions: dict[str, list[str]]) -> tuple[dict[tuple[str, str], Sums], set[str]]:
        """Check the manifests and their raw objects; return the sums by country name and date, and the dates."""
        days: dict[tuple[str, str], Sums] = {}
        dates = set()
        for entry in self.bucket.objects.filter(Prefix="manifests/"):
            manifest = json.loads(entry.get()["Body"].read())
            if not self.included(manifest["date"]):
                continue
            where = f"{manifest['city_id']}/{manifest['date']}"
            raw = self.bucket.Object(manifest["raw_key"]).get()["Body"].read()
            sums = sums_of(raw)
            self.expect(f"{where} manifest's sums", totals_of(manifest["contribution"]), sums)
            digest = hashlib.sha256(raw).hexdigest()
            self.expect(f"{where} manifest's SHA-256", manifest["sha256"], digest)
            self.expect(f"{where} manifest's size", manifest["size_bytes"], len(raw))
            if digest not in versions.get(where, []):
                self.expect(f"{where} raw object", digest, "a version that the upstream had")
            day = days.setdefault((manifest["country_name"], manifest["date"]), [0, 0, 0, 0])
            days[manifest["country_name"], manifest["date"]] = [a + b for a, b in zip(day, sums, strict=True)]
            dates.add(manifest["date"])
            self.city_days += 1
            self.trips += sums[0]
        return days, dates

    def check_served(self, api: str, dates: set[str], days: dict[tuple[str, str], Sums], what: str) -> None:
        """Compare the API's statistics of ``dates`` with sums by country name and date."""
        if not dates:
            return
        response = fetch(f"{api}/country-stats?from={min(dates)}&to={max(dates)}&detail=full")
        found = {
            (day["country_name"], date): (
                day["bus_count"],
                day["passenger_count"],
                day["exist_accident"],
                day["average_delay_s"],
            )
            for by_date in response.values()
            for date, day in by_date.items()
            if self.included(date)
        }
        expected = {
            key: (
                trips,
                passengers,
                accidents > 0,
                round(Fraction(delay_ms, trips)) / 1000 if trips else 0,
            )
            for key, (trips, passengers, accidents, delay_ms) in days.items()
        }
        # The API serves every day of the range for a country with any data in it, and zeros for days without.
        for country, date in found.keys() - expected.keys():
            if any(known == country for known, _ in days):
                expected[country, date] = (0, 0, False, 0.0)
        for key in sorted(found.keys() | expected.keys()):
            self.expect(f"{what} {key[0]} {key[1]}", found.get(key), expected.get(key))

    def fold(self, events: list[dict[str, Any]]) -> dict[tuple[str, str], Sums]:
        """Keep the highest revision of each city-day; return the sums by country name and date."""
        cities: dict[tuple[str, str, str], dict[str, Any]] = {}
        names: dict[str, str] = {}
        for event in events:
            if event["type"] == "country-day-planned" or not self.included(event["date"]):
                continue
            key = event["date"], event["country"], event["city_id"]
            if event["revision"] >= cities.get(key, event)["revision"]:
                cities[key] = event
            if "country_name" in event:
                names[event["country"]] = event["country_name"]
        found: dict[tuple[str, str], Sums] = {}
        for (date, country, _), event in cities.items():
            if event["type"] == "city-day-stats":
                day = found.setdefault((names[country], date), [0, 0, 0, 0])
                sums = totals_of(event["contribution"])
                found[names[country], date] = [a + b for a, b in zip(day, sums, strict=True)]
        return found

    def check_published(self, kafka: str, prefix: str, days: dict[tuple[str, str], Sums]) -> None:
        """Compare a consumer's view of the topics with sums by country name and date."""
        self.compare("topic city-stats", self.fold(read_topic(kafka, f"{prefix}city-stats")), days)
        summaries: dict[tuple[str, str], dict[str, Any]] = {}
        for event in read_topic(kafka, f"{prefix}country-day-summaries"):
            if not self.included(event["date"]):
                continue
            key_of_day = event["country"], event["date"]
            if event["version"] >= summaries.get(key_of_day, event)["version"]:
                summaries[key_of_day] = event
        latest = {(event["country_name"], date): totals_of(event["totals"]) for (_, date), event in summaries.items()}
        # A country-day without cities keeps an empty record in the topic, but has no sums.
        self.compare("topic country-day-summaries", without_empty_days(latest), without_empty_days(days))
        for dead_letter in read_topic(kafka, f"{prefix}dead-letters"):
            self.expect("dead letters", dead_letter, None)

    def check_tables(self, days: dict[tuple[str, str], Sums]) -> None:
        """Compare the totals of the Parquet tables with sums by country name and date."""
        for table in TABLES:
            with tempfile.TemporaryDirectory() as folder:
                found = []
                for number, entry in enumerate(self.bucket.objects.filter(Prefix=f"lake/{table}/")):
                    Path(folder, f"{number}.parquet").write_bytes(entry.get()["Body"].read())
                    found.append(number)
                rows = totals_of_files(f"{folder}/*.parquet") if found else {}
            rows = {(country, date): sums for (country, date), sums in rows.items() if self.included(date)}
            self.compare(f"table {table}", without_empty_days(rows), without_empty_days(days))

    def compare(self, what: str, found: dict[tuple[str, str], Sums], expected: dict[tuple[str, str], Sums]) -> None:
        """Compare sums by country name and date."""
        for key in sorted(found.keys() | expected.keys()):
            self.expect(f"{what} {key[0]} {key[1]}", found.get(key), expected.get(key))


def without_empty_days(days: dict[tuple[str, str], Sums]) -> dict[tuple[str, str], Sums]:
    """Return the country-days that have trips."""
    return {key: sums for key, sums in days.items() if any(sums)}


def totals_of(contribution: dict[str, int]) -> Sums:
    """Return the sums of a contribution."""
    return [contribution[name] for name in ("trips", "passengers", "accidents", "delay_total_ms")]


def totals_of_files(pattern: str) -> dict[tuple[str, str], Sums]:
    """Return the sums of Parquet files by country name and date."""
    sql = """
        select country_name, date, sum(trips), sum(passengers), sum(accidents), sum(delay_total_ms)
        from read_parquet(?) group by country_name, date
    """
    with duckdb.connect() as database:
        return {(country, str(date)): sums for country, date, *sums in database.execute(sql, [pattern]).fetchall()}


def read_topic(kafka: str, topic: str) -> list[dict[str, Any]]:
    """Return all events of a topic."""
    settings = {"bootstrap.servers": kafka, "group.id": "oracle", "enable.auto.commit": False}
    consumer = Consumer({**settings, "enable.partition.eof": False})
    events = []
    try:
        partitions = consumer.list_topics(topic, timeout=POLL_TIMEOUT_S).topics[topic].partitions
        ends = {}
        for number in partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=POLL_TIMEOUT_S)
            if high > low:
                ends[number] = high
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in ends])
        while ends:
            message = consumer.poll(POLL_TIMEOUT_S)
            if message is None:
                raise TimeoutError(f"{topic} could not be read to its end")
            if message.error() is not None:
                raise RuntimeError(str(message.error()))
            events.append(json.loads(message.value() or b""))
            # Compaction may have removed the last record, so compare positions instead of offsets of records.
            for partition in consumer.position([TopicPartition(topic, number) for number in ends]):
                if partition.offset >= ends[partition.partition]:
                    del ends[partition.partition]
    finally:
        consumer.close()
    return events


def truth(upstream: str, dates: set[str]) -> dict[tuple[str, str], Sums]:
    """Return the sums of the upstream's current files by country name and date."""
    days: dict[tuple[str, str], Sums] = defaultdict(lambda: [0, 0, 0, 0])
    for city in fetch(f"{upstream}/cities"):
        country = unicodedata.normalize("NFC", city["country"])
        for date in dates:
            sums = sums_of(fetch_bytes(f"{upstream}/cities/{city['id']}/stats?date={date}"))
            days[country, date] = [a + b for a, b in zip(days[country, date], sums, strict=True)]
    return dict(days)


def main() -> int:
    """Run the comparisons, print the result, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("s3", "bucket", "api", "upstream"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--kafka")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--dates", nargs="+", help="check only these dates")
    options = parser.parse_args()
    store = boto3.resource("s3", endpoint_url=options.s3, config=Config(s3={"addressing_style": "path"}))
    oracle = Oracle(store.Bucket(options.bucket), options.dates)
    days, dates = oracle.check_stored(fetch(f"{options.upstream}/truth"))
    oracle.check_served(options.api, dates, days, "served against stored")
    if options.kafka:
        oracle.check_published(options.kafka, options.prefix, days)
    if options.tables:
        oracle.check_tables(days)
    if options.truth:
        oracle.check_served(options.api, dates, truth(options.upstream, dates), "served against the upstream")
    found = {
        "city_days": oracle.city_days,
        "country_days": len(days),
        "trips": oracle.trips,
        "differences": oracle.differences,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if oracle.differences else 0


if __name__ == "__main__":
    sys.exit(main())
