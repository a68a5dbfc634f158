"""Judge what Tripfold stored and serves. This program shares no code with Tripfold, and imports nothing of it.

    python tests/chaos/oracle.py --s3 URL --bucket B --api URL --upstream URL [--kafka SERVERS --prefix P] [--truth]
        [--dates D …]

It reads the bucket with boto3, the topics with confluent-kafka, and the files with Python's own ``json``. What it
compares:

- each manifest with the raw object that it names: SHA-256, size, and the sums over the records;
- each raw object that a manifest names with the versions that the upstream has ever had (``/truth``);
- the sums by country and date over all manifests with what the API serves;
- with ``--kafka``, the same sums with the two compacted topics, of which it keeps the highest revision or version of
  each key, and the topic of dead letters, which is to be empty;
- with ``--truth``, what the API serves with the sums over the upstream's files as they are now, country by country.

It prints one JSON object: ``city_days``, ``country_days``, ``trips``, and ``differences``, a list of sentences. The
exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import unicodedata
import urllib.request
from collections import defaultdict
from fractions import Fraction
from typing import Any

import boto3
from botocore.config import Config
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

DIFFERENCES_MAX = 100
POLL_TIMEOUT_S = 30.0
DURATION = re.compile(r"(-?)P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:(\d+)S)?)?")

Sums = list[int]
"""Trips, passengers, accidents, and delay in milliseconds."""


def milliseconds(duration: str) -> int:
    """Read a duration of whole seconds, as this upstream writes it."""
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
    """Fetch JSON; an upstream of the chaos is asked to be truthful."""
    return json.loads(fetch_bytes(url))


def fetch_bytes(url: str) -> bytes:
    """Fetch a body."""
    with urllib.request.urlopen(urllib.request.Request(url, headers={"X-Truthful": "1"}), timeout=120) as answer:
        return bytes(answer.read())


class Judge:
    """Collects what is wrong, in sentences."""

    def __init__(self, bucket: Any, dates: list[str] | None) -> None:
        self.bucket = bucket
        self.dates = dates
        self.city_days = 0
        self.trips = 0
        self.differences: list[str] = []

    def expect(self, what: str, found: object, expected: object) -> None:
        """Note a difference unless the two are equal."""
        if found != expected and len(self.differences) < DIFFERENCES_MAX:
            self.differences.append(f"{what}: found {found}, expected {expected}")

    def judged(self, date: str) -> bool:
        """Say whether a date is to be judged."""
        return self.dates is None or date in self.dates

    def stored(self, versions: dict[str, list[str]]) -> tuple[dict[tuple[str, str], Sums], set[str]]:
        """Add up the raw objects that manifests name, by country name and date; also return the dates."""
        days: dict[tuple[str, str], Sums] = {}
        dates = set()
        for entry in self.bucket.objects.filter(Prefix="manifests/"):
            manifest = json.loads(entry.get()["Body"].read())
            if not self.judged(manifest["date"]):
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

    def served(self, api: str, dates: set[str], days: dict[tuple[str, str], Sums], what: str) -> None:
        """Compare what the API answers about ``dates`` with sums by country name and date."""
        if not dates:
            return
        answer = fetch(f"{api}/country-stats?from={min(dates)}&to={max(dates)}&detail=full")
        found = {
            (day["country_name"], date): (
                day["bus_count"],
                day["passenger_count"],
                day["exist_accident"],
                day["average_delay_s"],
            )
            for by_date in answer.values()
            for date, day in by_date.items()
            if self.judged(date)
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
        # A country with data anywhere in the range is served every day of it, zeros where it has none.
        for country, date in found.keys() - expected.keys():
            if any(known == country for known, _ in days):
                expected[country, date] = (0, 0, False, 0.0)
        for key in sorted(found.keys() | expected.keys()):
            self.expect(f"{what} {key[0]} {key[1]}", found.get(key), expected.get(key))

    def joined(self, events: list[dict[str, Any]]) -> dict[tuple[str, str], Sums]:
        """Keep the highest revision of each city, and add up what is left, by country name and date."""
        cities: dict[tuple[str, str, str], dict[str, Any]] = {}
        names: dict[str, str] = {}
        for event in events:
            if event["type"] == "country-day-planned" or not self.judged(event["date"]):
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

    def logged(self, kafka: str, prefix: str, days: dict[tuple[str, str], Sums]) -> None:
        """Compare what a consumer of the topics ends with with sums by country name and date."""
        self.alike("topic city-stats", self.joined(read_topic(kafka, f"{prefix}city-stats")), days)
        summaries: dict[tuple[str, str], dict[str, Any]] = {}
        for event in read_topic(kafka, f"{prefix}country-day-summaries"):
            if not self.judged(event["date"]):
                continue
            key_of_day = event["country"], event["date"]
            if event["version"] >= summaries.get(key_of_day, event)["version"]:
                summaries[key_of_day] = event
        latest = {(event["country_name"], date): totals_of(event["totals"]) for (_, date), event in summaries.items()}
        # A country-day that its last city has left has a record of nothing, and no sums.
        self.alike("topic country-day-summaries", without_nothing(latest), without_nothing(days))
        for letter in read_topic(kafka, f"{prefix}dead-letters"):
            self.expect("dead letters", letter, None)

    def alike(self, what: str, found: dict[tuple[str, str], Sums], expected: dict[tuple[str, str], Sums]) -> None:
        """Compare sums by country name and date."""
        for key in sorted(found.keys() | expected.keys()):
            self.expect(f"{what} {key[0]} {key[1]}", found.get(key), expected.get(key))


def without_nothing(days: dict[tuple[str, str], Sums]) -> dict[tuple[str, str], Sums]:
    """Leave out the country-days without a single trip."""
    return {key: sums for key, sums in days.items() if any(sums)}


def totals_of(contribution: dict[str, int]) -> Sums:
    """Return a contribution as sums."""
    return [contribution[name] for name in ("trips", "passengers", "accidents", "delay_total_ms")]


def read_topic(kafka: str, topic: str) -> list[dict[str, Any]]:
    """Read a topic from its beginning to its end; what is no JSON is returned as its error."""
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
            # The last record before the end may have been compacted away; the position moves past it all the same.
            for partition in consumer.position([TopicPartition(topic, number) for number in ends]):
                if partition.offset >= ends[partition.partition]:
                    del ends[partition.partition]
    finally:
        consumer.close()
    return events


def truth(upstream: str, dates: set[str]) -> dict[tuple[str, str], Sums]:
    """Add up the upstream's files as they are now, by country name and date."""
    days: dict[tuple[str, str], Sums] = defaultdict(lambda: [0, 0, 0, 0])
    for city in fetch(f"{upstream}/cities"):
        country = unicodedata.normalize("NFC", city["country"])
        for date in dates:
            sums = sums_of(fetch_bytes(f"{upstream}/cities/{city['id']}/stats?date={date}"))
            days[country, date] = [a + b for a, b in zip(days[country, date], sums, strict=True)]
    return dict(days)


def main() -> int:
    """Judge, print what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("s3", "bucket", "api", "upstream"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--kafka")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--dates", nargs="+", help="judge these alone")
    asked = parser.parse_args()
    store = boto3.resource("s3", endpoint_url=asked.s3, config=Config(s3={"addressing_style": "path"}))
    judge = Judge(store.Bucket(asked.bucket), asked.dates)
    days, dates = judge.stored(fetch(f"{asked.upstream}/truth"))
    judge.served(asked.api, dates, days, "served against stored")
    if asked.kafka:
        judge.logged(asked.kafka, asked.prefix, days)
    if asked.truth:
        judge.served(asked.api, dates, truth(asked.upstream, dates), "served against the upstream")
    found = {
        "city_days": judge.city_days,
        "country_days": len(days),
        "trips": judge.trips,
        "differences": judge.differences,
    }
    sys.stdout.write(json.dumps(found) + "\n")
    return 1 if judge.differences else 0


if __name__ == "__main__":
    sys.exit(main())
