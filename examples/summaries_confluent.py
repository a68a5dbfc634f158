"""Print the present totals of every country-day with confluent-kafka.

    python examples/summaries_confluent.py
    python examples/summaries_confluent.py --follow

reads ``country-day-summaries`` to its present end, and prints a line of JSON for each country-day. Then ``--follow``
prints each that changes. The record with the highest ``version`` of its key counts, which may not be the last.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

POLL_S = 1.0
TIMEOUT_S = 20.0


def event_of(value: bytes | None) -> dict[str, Any]:
    """Return the event that a record holds; an empty one for a record that is not a JSON object."""
    try:
        event = json.loads(value or b"")
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def newer_summaries(bootstrap_servers: str, topic: str) -> Iterator[dict[str, Any] | None]:
    """Yield each summary that is newer than the one before of its key, and once None: when the present end is read."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "tripfold-example",  # the client asks for one; nothing is committed under it
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "reconnect.backoff.ms": 1000,
        }
    )
    try:
        found = consumer.list_topics(topic, timeout=TIMEOUT_S).topics[topic]
        if found.error is not None:
            raise KafkaException(found.error)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in found.partitions])
        unread = set(found.partitions)
        versions: dict[bytes, int] = {}
        while True:
            message = consumer.poll(POLL_S)
            if message is None:
                continue
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:  # noqa: SLF001  # its public name
                raise KafkaException(error)
            if error is not None:
                if unread == {message.partition()}:
                    yield None
                unread.discard(message.partition())
                continue
            key, summary = message.key() or b"", event_of(message.value())
            if summary.get("type") == "country-day-summary" and summary["version"] > versions.get(key, 0):
                versions[key] = summary["version"]
                yield summary
    finally:
        consumer.close()


def main() -> None:
    """Read the settings, read the topic, print what is newest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bootstrap-servers", default=os.environ.get("TRIPFOLD_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:9092")
    )
    parser.add_argument("--topic-prefix", default=os.environ.get("TRIPFOLD_TOPIC_PREFIX", ""))
    parser.add_argument("--follow", action="store_true", help="go on after the present end")
    options = parser.parse_args()
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    at_end = False
    for summary in newer_summaries(options.bootstrap_servers, options.topic_prefix + "country-day-summaries"):
        if summary is None:
            at_end = True
            for _, known in sorted(newest.items()):
                print(json.dumps(known), flush=True)
            if not options.follow:
                break
        elif at_end:
            print(json.dumps(summary), flush=True)
        else:
            newest[summary["country"], summary["date"]] = summary


if __name__ == "__main__":
    main()
