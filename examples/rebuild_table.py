"""Keep a table of one's own, in SQLite, from the compacted topic ``city-stats``.

    python examples/rebuild_table.py --database city_days.sqlite
    sqlite3 city_days.sqlite 'select * from country_days'

reads the topic to its end and exits. The next run continues from there; with ``--follow`` it does not exit. Delete the
file, and the next run builds the table again.

The database keeps the offsets, written in the same transaction as their rows: a kill at any moment repeats or loses
nothing. Only a higher ``revision`` replaces a row, since an older record can come after a newer one. A retraction stays
as a row without figures, for the same reason: a statistic that it retracted may come once more.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

BATCH_RECORDS_MAX = 1_000
POLL_S = 0.2
TIMEOUT_S = 20.0

SCHEMA = """
    create table if not exists city_days (
        key text primary key, date text not null, country text not null, city_id text not null,
        revision integer not null, trips integer, passengers integer, accidents integer, delay_total_ms integer
    );
    create table if not exists offsets (topic text, partition integer, next integer, primary key (topic, partition));
    create view if not exists country_days as
        select country, date, count(*) as cities, sum(trips) as trips, sum(passengers) as passengers,
               sum(accidents) as accidents, sum(delay_total_ms) as delay_total_ms
        from city_days where trips is not null group by country, date order by country, date;
"""
KEEP_NEWER = """
    insert into city_days values (?, ?, ?, ?, ?, ?, ?, ?, ?)
    on conflict (key) do update set
        revision = excluded.revision, trips = excluded.trips, passengers = excluded.passengers,
        accidents = excluded.accidents, delay_total_ms = excluded.delay_total_ms
    where excluded.revision > city_days.revision
"""
KEEP_OFFSET = "insert into offsets values (?, ?, ?) on conflict do update set next = excluded.next"

Row = tuple[str | int | None, ...]


def event_of(value: bytes | None) -> dict[str, Any]:
    """Return the event that a record holds; an empty one for a record that is not a JSON object."""
    try:
        event = json.loads(value or b"")
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def row_of(key: bytes, value: bytes | None) -> Row | None:
    """Return the row that a record stands for, or None if it is not about a city."""
    event = event_of(value)
    if event.get("type") not in {"city-day-stats", "city-day-retracted"}:
        return None  # a plan: which cities a country-day expects
    figures = event.get("contribution", {})
    return (
        key.decode(),
        event["date"],
        event["country"],
        event["city_id"],
        event["revision"],
        *(figures.get(name) for name in ("trips", "passengers", "accidents", "delay_total_ms")),
    )


def take_in(database: sqlite3.Connection, messages: list[Message]) -> None:
    """Take records and their offsets in, all or none."""
    rows = [row for message in messages if (row := row_of(message.key() or b"", message.value()))]
    with database:
        database.executemany(KEEP_NEWER, rows)
        database.executemany(
            KEEP_OFFSET, [(message.topic(), message.partition(), (message.offset() or 0) + 1) for message in messages]
        )


def places_to_begin(consumer: Consumer, database: sqlite3.Connection, topic: str) -> list[TopicPartition]:
    """Return every partition, each at the offset that the database names, or at its beginning."""
    found = consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic]
    if found.error is not None:
        raise KafkaException(found.error)
    places = []
    for partition in found.partitions:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=TIMEOUT_S)
        kept = database.execute("select next from offsets where topic = ? and partition = ?", (topic, partition))
        offset = (kept.fetchone() or (low,))[0]
        # A topic that was lost and filled again has lower offsets: read all of it, the revisions decide.
        places.append(TopicPartition(topic, partition, offset if low <= offset <= high else low))
    return places


def run(consumer: Consumer, database: sqlite3.Connection, topic: str, *, follow: bool) -> int:
    """Take in the topic's records up to its present end, or for ever; return how many they were."""
    places = places_to_begin(consumer, database, topic)
    consumer.assign(places)
    unread = {place.partition for place in places}
    count = 0
    while follow or unread:
        records = []
        for message in consumer.consume(BATCH_RECORDS_MAX, POLL_S):
            error = message.error()
            if error is None:
                records.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # its public name
                unread.discard(message.partition())
            else:
                raise KafkaException(error)
        take_in(database, records)
        count += len(records)
    return count


def main() -> None:
    """Read the settings and bring the table up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bootstrap-servers", default=os.environ.get("TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092")
    )
    parser.add_argument("--topic-prefix", default=os.environ.get("TRIPFOLD_TOPIC_PREFIX", ""))
    parser.add_argument("--database", type=Path, default=Path("city_days.sqlite"))
    parser.add_argument("--follow", action="store_true", help="go on after the present end")
    options = parser.parse_args()
    consumer = Consumer(
        {
            "bootstrap.servers": options.bootstrap_servers,
            "group.id": "tripfold-example",  # the client asks for one; the offsets are in the database
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
        }
    )
    with closing(consumer), closing(sqlite3.connect(options.database)) as database:
        database.executescript(SCHEMA)
        count = run(consumer, database, options.topic_prefix + "city-stats", follow=options.follow)
    print(f"{count} records read")


if __name__ == "__main__":
    main()
