"""Marks a record that blocks a consumer, so that the consumer moves it to the dead letters and goes on.

Such a record has a later schema version, or the Kafka client cannot decode it. The command reads the record first. The
marker holds the record's digest, so it applies to no other record.
"""

from __future__ import annotations

from typing import Annotated

import typer
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError, OffsetOutOfRangeError, UnknownTopicOrPartitionError

from shared.domain import events
from shared.domain.errors import OperatorError
from shared.domain.events import NewerContract, PoisonRecord
from shared.domain.ids import utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka import skip_markers
from shared.kafka.producer import KafkaPublisher
from shared.kafka.raw_batches import Undecodable, read_batch
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings
from shared.storage.object_store import ObjectStore
from tripfold.console import printable
from tripfold.operate.command_line import command_settings, open_bucket, print_line, run_command

SHOWN_VALUE_LENGTH_MAX = 2_000


class CannotSkip(OperatorError):
    """The record cannot be skipped. The message says why."""


def skip_command(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="A topic that a service consumes, such as city-stats.")],
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0, help="The record's partition.")],
    offset: Annotated[int, typer.Argument(metavar="OFFSET", min=0, help="The record's offset.")],
) -> None:
    """Move a record that blocks a consumer to the dead letters: it cannot be decoded, or has a later schema version.

    The services keep running. Readiness, the log and 'tripfold doctor' name the record. If it has a later schema
    version, upgrade instead if you can: a skipped record counts nowhere until 'tripfold dead-letters retry' sends it
    back.

    Example: tripfold skip city-stats 3 17
    """
    settings = command_settings()
    consumed = {one.value: one for one in GROUPS}
    if topic not in consumed:
        raise CannotSkip(f"no service consumes a topic {topic[:100]!r}: expected one of {', '.join(consumed)}")

    async def run() -> ConsumedRecord:
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="skip") as publisher:
            await publisher.check([consumed[topic]])
            return await mark_blocking(settings, store, consumed[topic], partition, offset)

    record = run_command(run())
    value = printable((record.value or b"").decode(errors="backslashreplace"), length_max=SHOWN_VALUE_LENGTH_MAX)
    key = printable((record.key or b"").decode(errors="backslashreplace"))
    print_line(f"[bold]key[/bold]  {key}")
    print_line(f"[bold]value[/bold]  {value}")
    print_line(
        f"Marked. Its consumer moves it to the dead letters within about {settings.retry_wait_max_s:.0f} s. See it: "
        f"'tripfold dead-letters list --topic {topic}'."
    )


async def mark_blocking(
    settings: Settings, store: ObjectStore, topic: Topic, partition: int, offset: int
) -> ConsumedRecord:
    """Mark the record of an offset, and return it. Raises CannotSkip if there is none, or if it blocks no consumer."""
    name = settings.topic_prefix + topic.value
    try:
        batch = await read_batch(settings, TopicPartition(name, partition), offset)
    except UnknownTopicOrPartitionError as error:
        raise CannotSkip(f"topic {name} has no partition {partition}") from error
    except OffsetOutOfRangeError as error:
        raise CannotSkip(f"partition {partition} of {name} has no offset {offset}") from error
    except (KafkaError, OSError) as error:
        raise DependencyUnavailable(f"{name} cannot be read: {type(error).__name__}: {error}") from error
    first = batch.records[0] if batch and batch.records else None
    bad = first if isinstance(first, Undecodable) else None
    found = consumed_records(topic, [bad.record if bad else first]) if first else []
    if not found or found[0].offset != offset:
        raise CannotSkip(f"partition {partition} of {name} has no record at offset {offset}")
    (record,) = found
    if bad is None:
        refuse_harmless(record)
    await skip_markers.mark(store, record, utc_now())
    return record


def refuse_harmless(record: ConsumedRecord) -> None:
    """Raise CannotSkip if a record has no later schema version: it blocks no consumer."""
    place = f"offset {record.offset} of partition {record.partition} of {record.topic.value}"
    try:
        events.decode(record.topic, record.value)
    except NewerContract:
        return
    except PoisonRecord as error:
        raise CannotSkip(
            f"{place} blocks no consumer: it goes to the dead letters without this command ({error})"
        ) from error
    raise CannotSkip(f"{place} blocks no consumer: this build can read it")
