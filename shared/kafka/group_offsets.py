"""Reads from Kafka how far each consumer group of the services is, and how many consumers it has."""

from __future__ import annotations

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from shared.domain.topics import GROUPS, Topic, group_id
from shared.kafka.admin import admin_client
from shared.kafka.connection import connection
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

REQUEST_TIMEOUT_MS = 5_000


class GroupOffsets(msgspec.Struct, frozen=True, kw_only=True):
    """How far a consumer group is in its topic.

    ``lag``: the records that the group has not committed. ``committed``: the sum of its offsets. ``members``: its
    consumers; None if Kafka does not tell.
    """

    topic: Topic
    lag: int
    committed: int
    members: int | None


async def read_group_offsets(settings: Settings) -> list[GroupOffsets]:
    """Return the offsets of every consumer group whose topic exists. Raises DependencyUnavailable."""
    prefix = settings.topic_prefix
    consumer = AIOKafkaConsumer(**connection(settings), group_id=None, request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        async with admin_client(settings) as admin:
            await consumer.start()
            listed = {topic["topic"]: topic["partitions"] for topic in await admin.describe_topics()}
            read = []
            for topic, short_name in GROUPS.items():
                name, group = prefix + topic.value, group_id(prefix, short_name)
                partitions = [TopicPartition(name, one["partition"]) for one in listed.get(name, ())]
                if partitions:
                    lag, committed = await _offsets_of(admin, consumer, group, partitions)
                    members = await _members(admin, group)
                    read.append(GroupOffsets(topic=topic, lag=lag, committed=committed, members=members))
            return read
    except (KafkaError, OSError) as error:
        raise DependencyUnavailable(
            f"Kafka at {settings.kafka_bootstrap_servers} did not say how far the consumer groups are"
        ) from error
    finally:
        await consumer.stop()


async def _offsets_of(
    admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer, group: str, partitions: list[TopicPartition]
) -> tuple[int, int]:
    """Return the lag of a group and the sum of its committed offsets."""
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    stored = await admin.list_consumer_group_offsets(group, partitions=partitions)
    # A group without a commit begins at the first record that is left.
    committed = {one: max(begins[one], stored[one].offset if one in stored else 0) for one in partitions}
    return sum(max(0, ends[one] - committed[one]) for one in partitions), sum(committed.values())


async def _members(admin: AIOKafkaAdminClient, group: str) -> int | None:
    # One group in each request: aiokafka 0.14 cannot decode a response with several.
    (response,) = await admin.describe_consumer_groups([group])
    ((code, _, _, _, _, members, *_),) = response.groups
    return None if code else len(members)
