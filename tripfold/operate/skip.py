"""Marks a record of a later schema version, so that the consumer that it blocks moves it to the dead letters.

The command reads the record first: the record must block a consumer. The marker holds the record's digest, so it
applies to no other record.
"""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from shared.domain import events
from shared.domain.errors import OperatorError
from shared.domain.events import NewerContract, PoisonRecord
from shared.domain.ids import utc_now
from shared.domain.topics import GROUPS, Topic
from shared.kafka import skip_markers
from shared.kafka.connection import connection
from shared.kafka.producer import KafkaPublisher
from shared.kafka.records import ConsumedRecord, consumed_records
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings
from shared.storage.object_store import ObjectStore
from tripfold.console import printable
from tripfold.operate.command_line import command_settings, open_bucket, print_line, run_command

READ_DEADLINE_S = 20.0
SHOWN_VALUE_LENGTH_MAX = 2_000


class CannotSkip(OperatorError):
    """The record cannot be skipped. The message says why."""


def skip_command(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="A topic that a service consumes, such as city-stats.")],
    partition: Annotated[int, typer.Argument(metavar="PARTITION", min=0, help="The record's partition.")],
    offset: Annotated[int, typer.Argument(metavar="OFFSET", min=0, help="The record's offset.")],
) -> None:
    """Move a record of a later schema version, which blocks its consumer, to the dead letters.

    The services keep running. Readiness, the log and 'tripfold doctor' name the record that blocks a consumer. Upgrade
    instead if you can: a skipped record counts nowhere until 'tripfold dead-letters retry' sends it back.

    Example: tripfold skip city-stats 3 17
    """
    settings = command_settings()
    consumed = {one.value: one for one in GROUPS}
    if topic not in consumed:
        raise CannotSkip(f"no service consumes a topic {topic[:100]!r}: expected one of {', '.join(consumed)}")

    async def run() -> ConsumedRecord:
        async with open_bucket(settings) as store, KafkaPublisher(settings, source="skip") as publisher:
            await publisher.check([consumed[topic]])
            return await mark_newer(store, await read_record(settings, consumed[topic], partition, offset))

    record = run_command(run())
    value = printable((record.value or b"").decode(errors="backslashreplace"), length_max=SHOWN_VALUE_LENGTH_MAX)
    key = printable((record.key or b"").decode(errors="backslashreplace"))
    print_line(f"[bold]key[/bold]  {key}")
    print_line(f"[bold]value[/bold]  {value}")
    print_line(
        f"Marked. Its consumer moves it to the dead letters within about {settings.retry_wait_max_s:.0f} s. See it: "
        f"'tripfold dead-letters list --topic {topic}'."
    )


async def mark_newer(store: ObjectStore, record: ConsumedRecord) -> ConsumedRecord:
    """Mark a record of a later schema version. Raises CannotSkip for any other record: it blocks no consumer."""
    place = f"offset {record.offset} of partition {record.partition} of {record.topic.value}"
    try:
        events.decode(record.topic, record.value)
    except NewerContract:
        await skip_markers.mark(store, record, utc_now())
        return record
    except PoisonRecord as error:
        raise CannotSkip(
            f"{place} blocks no consumer: it goes to the dead letters without this command ({error})"
        ) from error
    raise CannotSkip(f"{place} blocks no consumer: this build can read it")


async def read_record(settings: Settings, topic: Topic, partition: int, offset: int) -> ConsumedRecord:
    """Read one record. Raises CannotSkip if there is none."""
    name = settings.topic_prefix + topic.value
    place = TopicPartition(name, partition)
    consumer = AIOKafkaConsumer(name, **connection(settings), group_id=None, enable_auto_commit=False)
    try:
        await consumer.start()
        if place not in consumer.assignment():
            raise CannotSkip(f"topic {name} has no partition {partition}")
        begin = (await consumer.beginning_offsets([place]))[place]
        end = (await consumer.end_offsets([place]))[place]
        if not begin <= offset < end:
            raise CannotSkip(f"partition {partition} of {name} has offsets {begin} to {end - 1}, not {offset}")
        consumer.seek(place, offset)
        async with asyncio.timeout(READ_DEADLINE_S):
            (record,) = consumed_records(topic, [await consumer.getone(place)])
    except (KafkaError, OSError, TimeoutError) as error:
        raise DependencyUnavailable(f"{name} cannot be read: {type(error).__name__}: {error}") from error
    finally:
        await consumer.stop()
    if record.offset != offset:
        raise CannotSkip(f"partition {partition} of {name} no longer has a record at offset {offset}")
    return record
