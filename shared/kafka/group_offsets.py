"""Reads from Kafka how far each consumer group of the services is, and how many consumers it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
)

from shared.domain.topics import GROUPS, Topic, group_id
from shared.kafka.admin import admin_client
from shared.kafka.connection import connection
from shared.runtime.retry import DependencyUnavailable
from shared.runtime.settings import Settings

REQUEST_TIMEOUT_MS = 5_000
COORDINATOR_WAIT_MAX_S = 30.0
COORDINATOR_INTERVAL_S = 0.2


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


async def committed_offsets(
    admin: AIOKafkaAdminClient, group: str, partitions: Sequence[TopicPartition]
) -> dict[TopicPartition, int]:
    """Return the committed offset of each partition: -1, or none, without a commit.

    On a new cluster this is the first request for offsets, and Kafka makes its topic for them. Raises
    DependencyUnavailable if this takes longer than COORDINATOR_WAIT_MAX_S.
    """
    ends_at_s = time.monotonic() + COORDINATOR_WAIT_MAX_S
    while True:
        try:
            stored = await admin.list_consumer_group_offsets(group, partitions=list(partitions))
        except (GroupCoordinatorNotAvailableError, GroupLoadInProgressError, NotCoordinatorForGroupError) as error:
            if time.monotonic() > ends_at_s:
                raise DependencyUnavailable(
                    f"Kafka has had no coordinator for the consumer group {group} for {COORDINATOR_WAIT_MAX_S:g} s: it "
                    "cannot make or read its topic __consumer_offsets. Its offsets.topic.replication.factor may be "
                    "above the number of brokers; the log of the brokers has the reason"
                ) from error
            await asyncio.sleep(COORDINATOR_INTERVAL_S)
        else:
            return {one: found.offset for one, found in stored.items()}


async def _offsets_of(
    admin: AIOKafkaAdminClient, consumer: AIOKafkaConsumer, group: str, partitions: list[TopicPartition]
) -> tuple[int, int]:
    """Return the lag of a group and the sum of its committed offsets."""
    begins = await consumer.beginning_offsets(partitions)
    ends = await consumer.end_offsets(partitions)
    stored = await committed_offsets(admin, group, partitions)
    # A group without a commit begins at the first record that is left.
    committed = {one: max(begins[one], stored.get(one, 0)) for one in partitions}
    return sum(max(0, ends[one] - committed[one]) for one in partitions), sum(committed.values())


async def _members(admin: AIOKafkaAdminClient, group: str) -> int | None:
    # One group in each request: aiokafka 0.14 cannot decode a response with several.
    (response,) = await admin.describe_consumer_groups([group])
    ((code, _, _, _, _, members, *_),) = response.groups
    return None if code else len(members)
