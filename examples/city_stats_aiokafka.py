"""Add up the cities of each country-day with aiokafka: the fold that Tripfold does, in thirty lines.

    python examples/city_stats_aiokafka.py

reads ``city-stats`` from its beginning to its present end, and prints a line of JSON for each country-day. It keeps
for each city of a country-day the record of the highest ``revision``. The sum over all records would count a corrected
file twice, and a city that moved to another country in both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import defaultdict
from typing import Any

from aiokafka import AIOKafkaConsumer

SUMS = ("trips", "passengers", "accidents", "delay_total_ms")

Records = dict[str, dict[str, Any]]


def event_of(value: bytes | None) -> dict[str, Any]:
    """Return the event that a record holds; an empty one for a record that is not a JSON object."""
    try:
        event = json.loads(value or b"")
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


async def read_newest(bootstrap_servers: str, topic: str) -> Records:
    """Return the record of the highest revision of each key, as the topic has them now."""
    newest: Records = {}
    # Without a group, it gets every partition and does not affect other consumers.
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap_servers,
        group_id=None,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    async with consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        # The position, not the last record, tells the end: compaction may have taken the records before it.
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                for record in records:
                    event = event_of(record.value)
                    if event.get("type") not in {"city-day-stats", "city-day-retracted"}:
                        continue  # plans say which cities a country-day expects
                    known = newest.get(record.key)
                    if known is None or known["revision"] < event["revision"]:
                        newest[record.key] = event
    return newest


def add_up(newest: Records) -> dict[tuple[str, str], dict[str, int]]:
    """Return the sums of each country and date. A retracted city adds nothing."""
    totals: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(("cities", *SUMS), 0))
    for event in newest.values():
        if event["type"] == "city-day-stats":
            of_country = totals[event["country"], event["date"]]
            of_country["cities"] += 1
            for name in SUMS:
                of_country[name] += event["contribution"][name]
    return totals


def main() -> None:
    """Read the settings, read the topic, print the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bootstrap-servers", default=os.environ.get("TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092")
    )
    parser.add_argument("--topic-prefix", default=os.environ.get("TRIPFOLD_TOPIC_PREFIX", ""))
    options = parser.parse_args()
    newest = asyncio.run(read_newest(options.bootstrap_servers, options.topic_prefix + "city-stats"))
    for (country, date), totals in sorted(add_up(newest).items()):
        print(json.dumps({"country": country, "date": date, **totals}))


if __name__ == "__main__":
    main()
